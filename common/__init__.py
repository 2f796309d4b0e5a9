"""What has nothing to do with the paper: a user's mistakes, files, text, seeded draws, opening model folders.

It imports nothing of ours; everybody may import it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  said here, before a file that an older Python cannot read
    sys.stderr.write(f"error: this needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}\n")
    sys.exit(2)
