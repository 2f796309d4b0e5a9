"""How a command ends: one line for a user's mistake, and silence for a reader who has seen enough."""

import os
import sys
from collections.abc import Callable

READER_GONE = 128 + 13  # what a shell says of a program that SIGPIPE ended


class UserError(Exception):
    """A user's mistake. Its text is one line: where, what, and how to mend it."""


def reason(error: BaseException) -> str:
    """What an error says, and of which file, in one line."""
    file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{getattr(error, 'strerror', None) or error}{file}"


def command(work: Callable[[], int | None], kept: str = "") -> int:
    """Run a command and return its exit status: its own, or 2 for what a user has to mend, said in one line on stderr.

    `kept` says what a command that is stopped (status 130) or runs into a file error leaves. Where stdout or stderr is a
    pipe whose reader has gone, as with `| head`, the command ends without a word, like other Unix programs.
    """
    try:
        try:
            return work() or 0
        except (UserError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            more = f"; {kept}" if kept and isinstance(error, OSError) else ""
            print(f"error: {reason(error)}{more}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"stopped; {kept}" if kept else "stopped", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()  # here, where a missing reader can still be told from a mistake
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # what Python still wants to flush at its end
            os.dup2(nowhere, stream.fileno())
        return READER_GONE
