"""SHA-256 sums of what a run writes, so that a flipped bit is refused and never trained on; flushing to disk. No torch here.

A folder that holds weights, a checkpoint or the exported model, has a file SHA256SUMS beside them, in the format of the
command of that name: `sha256sum -c SHA256SUMS` says the same as `unlike`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from data import UserError

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
    """The same in hexadecimal."""
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


def check_model(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raise `UserError` where a model folder has SHA256SUMS and a file is not what was written. Others have no such file."""
    if (folder / SUMS).exists():
        sums = listed(folder)
        if bad := unlike(folder, sums, filter(wanted, names(folder, sums))):
            mend = f"restore it, or delete {folder / SUMS} if it was changed on purpose"
            raise UserError(f"{folder / bad[0]} is not what was written (SHA-256): {mend}")
