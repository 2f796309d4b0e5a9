"""Fetch MELD and EmoryNLP, and say how to get IEMOCAP."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import sha256, write_atomically
from corpora import iemocap


@dataclass(frozen=True)
class Remote:
    """A file of declare-lab/MELD: its place below --to, its URL, its size in bytes and its SHA-256."""

    path: str
    url: str
    size: int
    sha256: str


MELD = "https://raw.githubusercontent.com/declare-lab/MELD/2d2011b409d3ca2d7e94460cd007d434b1d0a102/data"
FILES = tuple(
    Remote(f"{folder.lower()}/{name}", f"{MELD}/{folder}/{name}", size, sha256)
    for folder, name, size, sha256 in (
        ("MELD", "train_sent_emo.csv", 1119290, "d2fa2d6529cf03cac2989efec05c9b27d8fd2f4c8fc5974c7ae88aa537fa02db"),
        ("MELD", "dev_sent_emo.csv", 121640, "2e89c6f8aa182d6f62f8c6331aece905ac7273ca4999660bfb5213e1d0370c1c"),
        ("MELD", "test_sent_emo.csv", 294526, "8d37103938f7067600839fe29d5a114a6cd1bcdafb75bec101e06464c5006888"),
        ("emorynlp", "emorynlp_train_final.csv", 771777, "462c66c333783adb801836d12d1424f48489bef4fb8ddfec7fbb2f08ce8211d5"),
        ("emorynlp", "emorynlp_dev_final.csv", 93130, "20edc9d5917fe705b17b849f7f288e495d4132a60353a6247c3800445bdf8734"),
        ("emorynlp", "emorynlp_test_final.csv", 100280, "dbc4b5638acd12c92a5f48def829e04f1c765cddffb4eedbe34216312e0d2d78"),
    )
)


class Again(Exception):
    """A fault that another try may mend."""


def download(to: Path = Path("data")) -> Iterator[str]:
    """Fetch MELD and EmoryNLP, and say how to get IEMOCAP.

    One line per file says what became of it. Raises UserError for what does not arrive; what has arrived stays.

    Args:
        to: Folder for meld/ and emorynlp/.
    """
    for remote in FILES:
        yield f"{to / remote.path}: {fetch(remote, to)}"
    yield iemocap.REQUEST


def fetch(remote: Remote, to: Path, *, timeout: float = 30.0, tries: int = 6, wait: float = 1.0) -> str:
    """Bring one file to its place, complete and checked.

    `timeout`: seconds without a byte; `wait`: seconds before the second try, doubled each time. Raises UserError if the
    file cannot be had, and for another file in its place, which is never touched.
    """
    target = to / remote.path
    try:
        if target.exists():
            if sha256(target) == remote.sha256:
                return "already there"
            raise UserError(f"{target}: another file is in this place; move it away and run the command again")
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in range(tries):
            try:
                write_atomically(target, received(remote, timeout))
                break
            except Again as fault:
                if number == tries - 1:
                    again = "run the command again"
                    raise UserError(f"{remote.url}: {fault}, {tries} times in a row; {again}") from None
                time.sleep(wait * 2**number)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}; make room there or give another --to") from None
    return f"{remote.size} bytes, SHA-256 as pinned"


def received(remote: Remote, timeout: float) -> bytes:
    """The whole file, from one try. Raises Again for faults of the network and of the content, UserError for the others."""
    request = urllib.request.Request(remote.url, headers={"User-Agent": "selfemo"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content: bytes = response.read(remote.size + 1)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Again(f"{error.code} {error.reason}") from None
        raise UserError(f"{remote.url}: {error.code} {error.reason}; is something between you and the site?") from None
    except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and TLS are OSErrors
        raise Again(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None
    if len(content) < remote.size:
        raise Again(f"the connection ended after {len(content)} of {remote.size} bytes")
    if (found := hashlib.sha256(content).hexdigest()) != remote.sha256:
        raise Again(f"what came has the SHA-256 {found} and not {remote.sha256}")
    return content
