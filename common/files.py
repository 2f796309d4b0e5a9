"""Files: JSON lines, writing aside and renaming, SHA-256 sums. No torch here.

A folder that holds weights, a checkpoint or the exported model, has a file SHA256SUMS beside them, in the format of the
command of that name: `sha256sum -c SHA256SUMS` says the same as `unlike`.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from common.errors import UserError, reason, tell

Record = dict[str, Any]
Built = TypeVar("Built")
SUMS = "SHA256SUMS"


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(path: Path, size: int | None = None) -> Any:
    """SHA-256 (hashlib's object, to go on with) of a file, or of its first `size` bytes. OSError, also if it has fewer."""
    found, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left:
            part = file.read(min(left, 1 << 24))
            if not part:
                raise OSError(None, f"{left} bytes short", str(path))
            found.update(part)
            left -= len(part)
    return found


def sha256(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes, in hexadecimal. OSError as `hash_of`."""
    return str(hash_of(path, size).hexdigest())


def text_of(sums: Mapping[str, str]) -> str:
    """The text of SHA256SUMS."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the files that are in a folder now."""
    (folder / SUMS).write_text(text_of({name: sha256(folder / name) for name in names(folder, {})}), encoding="utf-8")


def listed(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that a folder had when it was written. Raises `UserError` where that cannot be read."""
    try:
        *lines, end = (folder / SUMS).read_bytes().decode("ascii").split("\n")
    except FileNotFoundError:
        mend = "restore it, or start again with another --out"
        raise UserError(f"{folder} has no {SUMS}: an earlier version wrote it, or it is damaged; {mend}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / SUMS}: {error}") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in lines]
    if not lines or end or None in found:
        raise UserError(f"{folder / SUMS} is damaged: restore it")
    return {match[2]: match[1] for match in found if match}


def names(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """What is to be compared: what is listed, and what is there and should be; hidden files are other systems'."""
    there = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    return sorted({*sums, *there} - {SUMS})


def unlike(folder: Path, sums: Mapping[str, str], some: Iterable[str]) -> list[str]:
    """Those of some files that are not what was written: changed, missing or added."""

    def same(name: str) -> bool:
        try:
            return sha256(folder / name) == sums.get(name)
        except OSError:
            return False

    return [name for name in some if not same(name)]


def read_lines(path: Path) -> list[Record]:
    """The records of a JSONL file; [] where it does not exist. Raises `UserError` at a broken line."""
    return [record for _, record in numbered(path)]


def numbered(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of a JSONL file, one by one: it may be larger than memory. Raises as `read_lines`."""
    if not path.exists():
        return
    with path.open("rb") as file:  # bytes end a line at \n alone: a string may hold U+2028
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line.decode("utf-8"))
                if not isinstance(record, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error}); restore the file or delete the run") from error
            yield number, record


def build_records(path: Path, records: Sequence[Record], build: Callable[[Record], Built]) -> list[Built]:
    """What `build` makes of the records of a file. Raises `UserError` for one that it cannot read."""
    found = []
    for number, record in enumerate(records, 1):
        try:
            found.append(build(record))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            why = f"{type(error).__name__} {error}"
            raise UserError(f"{path} line {number} is not what a run writes ({why}); restore the file") from error
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write aside, sync, rename: the file is the old one or the new one, never half of it. A device is written to.

    Raises OSError with the name of the file; what was written aside is gone then.
    """
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # /dev/null or a pipe: a rename would put a file in its place
        with named(path):
            path.write_bytes(raw)
        return
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with named(path), aside.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError of writing (no space left) say of which file it speaks; Python leaves that out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def lock(file: IO[bytes], in_use: str) -> None:
    """Keep an open file for this process alone, until it is closed. Raises `UserError(in_use)` where another one has it.

    Who has it may remove it before closing it: whoever opened it meanwhile is refused too. Where the file system knows no
    locks the work goes on without, and one line on stderr says so.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno == errno.EACCES:
            raise UserError(in_use) from None
        without_locks(Path(file.name).parent, reason(error))
    if not os.fstat(file.fileno()).st_nlink:
        raise UserError(in_use)


@cache
def without_locks(folder: Path, why: str) -> None:
    """Say once that nothing notices a second job on the files of a folder."""
    tell(f"{folder} cannot lock files ({why}): going on; see to it yourself that no other job works on them")


def jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as JSON lines. NaN and infinities are refused (ValueError): no line may hold what JSON cannot say."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def read_json(path: Path) -> Record:
    """A JSON object from a file. Raises `UserError` with the path where that fails."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
