"""Strict reading: whatever is wrong in a file becomes one line with file, line number and the shape that is expected."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import INSIDE, clean, made_of, small
from corpora.dialogue import LABELS

CP1252 = dict(zip(range(0x91, 0x98), "‘’“”•–—", strict=True))  # older copies hold these as control characters
UNREADABLE = (
    *(csv.Error, AttributeError, TypeError, ValueError, ArithmeticError, SyntaxError),
    *(RecursionError, MemoryError),
)


@contextmanager
def reading(where: str, shape: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line: where, what, and the shape that is expected."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing; expected {shape}") from None
    except UNREADABLE as error:
        raise UserError(f"{where}: {str(error)[:400]}; expected {shape}") from None


def file_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `UserError` where it cannot be read, is in another encoding or holds a zero byte."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        names = f"{', '.join(LABELS)}, or any other name for a folder of JSONL files"
        raise UserError(f"{path}: {error.strerror}; check NAME=DIR (NAME is {names})") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file in that encoding") from None
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        raise UserError(f"{path}:{line}: a zero byte, which no text has; the file is damaged, or its encoding not UTF-8")
    return text


def json_value(text: str) -> Any:
    """A JSON value. ValueError too for an object with a key twice: which of the two is meant, nobody knows."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key twice among {', '.join(key for key, _ in pairs)!r:.80}")
        return found

    return json.loads(text, object_pairs_hook=once)


def known_fields(row: Any, known: Iterable[str]) -> None:
    """ValueError for a field that is not known: a label under a misspelt name would be a turn without one."""
    if isinstance(row, dict) and (others := [name for name in row if name not in known]):
        raise ValueError(f"unknown field {others[0]!r:.60}")


def records(path: Path, shape: str, build: Callable[[str], tuple[Any, Any]], skip: int = 0) -> dict[Any, Any]:
    """The keys and values that `build` makes of the lines of a file."""
    found: dict[Any, Any] = {}
    for number, line in enumerate(file_text(path).split("\n"), start=1):
        if number > skip and line.strip():
            with reading(f"{path}:{number}", shape):
                key, value = build(line)
                if key in found:
                    raise ValueError(f"{key!r} a second time")
                found[key] = value
    if not found:
        raise UserError(f"{path}: nothing in it; expected {shape}")
    return found


def whole_number(cell: str) -> int:
    """A number of digits alone. Raises ValueError."""
    if not re.fullmatch("[0-9]{1,9}", cell):  # int() would take "1 " and "1_0" too
        raise ValueError(f"{cell!r:.60} where a number is needed")
    return int(cell)


def needed_text(text: Any) -> str:
    """A text that is not blank, quotes and dashes of Windows put right. Raises ValueError."""
    if not isinstance(text, str) or not clean(text):
        raise ValueError(f"{text!r:.60} where a text is needed")
    return text.translate(CP1252)


def emotion_weights(raw: Mapping[Any, Any], labels: Sequence[str] | None = None) -> dict[str, float]:
    """Weights by emotion in lower case, of `labels` if given. Raises ValueError for a name or a weight that is none."""
    if odd := [weight for weight in raw.values() if type(weight) not in (int, float)]:
        raise ValueError(f"weight {odd[0]!r:.60} is no number")
    weights = {small(name.strip()): float(weight) for name, weight in raw.items()}
    for name, weight in weights.items():
        if not (name[:1].isalnum() and made_of(name, " -_" + INSIDE)) or name not in (labels or weights):
            raise ValueError(f"unknown label {name!r}" + (f", known are {' '.join(labels)}" if labels else ""))
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {weight} of {name!r} is not above 0")
    if not 0 < len(weights) == len(raw):
        raise ValueError("no label, or one twice")
    return weights
