"""How a command ends: one line for what a user has to mend, and silence for a reader who has seen enough."""

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

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
    status = 2
    try:
        status, line = outcome(work, f"; {kept}" if kept else "")
        if line:
            print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        status = READER_GONE
        silence(sys.stdout)
        silence(sys.stderr)
    except OSError:  # stderr cannot be written either: the status says it alone
        silence(sys.stderr)
    return status


def outcome(work: Callable[[], int | None], kept: str) -> tuple[int, str]:
    """The status of a command, and the line that is still to be said. Raises `BrokenPipeError` without a reader."""
    if sys.stdout is None:  # a file that is opened now would get its number, and what is printed
        return 2, "error: stdout is closed: send it to a file, or to /dev/null"
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that knows no Chinese shows \u4e2d
        sys.stdout.reconfigure(errors="backslashreplace")
    status, line = 0, ""
    try:
        status = work() or 0
    except UserError as error:
        status, line = 2, f"error: {error}"
    except BrokenPipeError:
        raise
    except OSError as error:
        status, line = 2, f"error: {reason(error)}{kept}"
    except KeyboardInterrupt:
        status, line = 130, f"stopped{kept}"
    except SystemExit as ended:  # help, or flags that do not exist: that has been said
        status = int(ended.code or 0)
    lost = unwritten()  # here, where a missing reader can still be told from a mistake
    return (2, f"error: {lost}{kept}") if lost and not line and status != 2 else (status, line)


def unwritten() -> str:
    """Why what was printed cannot be written, "" where it can. It is then thrown away: at its end Python tries again."""
    try:
        sys.stdout.flush()
        return ""
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        return f"{error.strerror or error} (stdout)"


def tell(line: str) -> None:
    """A line on stderr, where that can be written: no work ends for its sake."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send what a stream still holds, and what comes, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except io.UnsupportedOperation:  # a stream of a test, in memory
        pass
    finally:
        os.close(nowhere)
