"""Every number of the groups of a run as a CSV file: a spreadsheet can do Eqs. 8-13 with it, and so can a sceptic."""

import csv
import io
from collections.abc import Iterable, Iterator

from common.files import Record

FIRST = ("group", "step", "sample_id", "answer", "rule", "lam")
LAST = ("reward", "consistency", "advantage")


def columns(records: Iterable[Record]) -> list[str]:
    """The head of the table: three columns per label, raw weights of gold and of the answer, and p* of the group."""
    labels = dict.fromkeys(label for record in records for label in record["labels"])
    return [*FIRST, *(f"{kind} {label}" for kind in ("gold", "says", "core") for label in labels), *LAST]


def rows(records: Iterable[Record]) -> Iterator[Record]:
    """One row per answer. An emotion that is not named has no entry; `rule` is 1 or 0.

    Groups and steps count from 0, as in the files of a run.
    """
    for number, record in enumerate(records):
        for answer in record["answers"]:
            valid = answer["parse"]["reason"] is None
            row: Record = {"group": number, "step": record["step"], "sample_id": record["sample_id"]}
            row |= {"answer": answer["index"], "rule": int(valid)}
            said = answer["parse"]["last_emotions"] if valid else {}
            for kind, weights in (("gold", record["gold"]), ("says", said), ("core", record["core"])):
                row |= {f"{kind} {label}": repr(float(weight)) for label, weight in weights.items()}
            yield {**row, "lam": repr(record["lam"]), **{name: repr(answer[name]) for name in LAST}}


def table(head: list[str], found: Iterable[Record]) -> str:
    """The file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
