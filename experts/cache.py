"""The cache that keeps what experts answered: a file of JSON lines, one per response, kept by one job at a time."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import lock, named
from experts import responses
from experts.responses import Reply


@dataclass(frozen=True)
class Cache:
    """Answers that are there already, and the file that new ones are added to."""

    file: IO[bytes]
    known: dict[str, Reply]

    def add(self, key: str, expert: str, reply: Reply) -> None:
        """Write an answer down at once, as one line."""
        row = {"key": key, "expert": expert, "response": reply.response or responses.as_response(reply)}
        with named(Path(self.file.name)):
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
        self.known[key] = reply


@contextmanager
def open_cache(path: Path) -> Iterator[Cache]:
    """The cache in a file of JSON lines; a last line that was cut off is removed.

    Raises `UserError` where another job has it open and where another line is broken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock(file, f"{path} is in use by another job: wait for it, or give another --cache")
        file.seek(0)
        lines = file.read().split(b"\n")
        if lines[-1]:
            file.truncate(file.tell() - len(lines[-1]))
        rows = (cached(path, number, line) for number, line in enumerate(lines[:-1], 1) if line)
        try:
            yield Cache(file, {key: reply for row in rows for key, reply in row})
        finally:
            if not os.fstat(file.fileno()).st_size:  # nobody has answered
                path.unlink(missing_ok=True)


def cached(path: Path, number: int, line: bytes) -> Iterator[tuple[str, Reply]]:
    """The key and the answer of a line of the cache; none where it has to be asked for again.

    Earlier versions kept what they made of a response, and counted answers as cut off that were not: of theirs, only those
    that count as whole are taken.
    """
    try:
        row = json.loads(line)
        if "response" in row:
            reply = responses.read_response(row["response"])
        else:
            asked, said = row["tokens"]
            reply = Reply(str(row["text"]), row["finished"] is True, (int(asked), int(said)))
        if isinstance(reply, Reply) and (reply.finished or "response" in row):
            yield str(row["key"]), reply
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{number}: {error}; remove that line: its prompt is asked again") from None
