"""Several models on the same samples: the scores of each, and every pair of models with tests and intervals.

    python evaluate.py score --model A --data meld=data/meld --out a.jsonl
    python evaluate.py score --model B --data meld=data/meld --out b.jsonl
    python -m tools.paired a.jsonl b.jsonl

Every score stands twice: *strict*, where an answer that breaks the rule is wrong, and *in the text*, which counts the first
emotion that an answer names, rule or not. A model that only learned the form rises in the first and not in the second.
The last line has all numbers as JSON.
"""

import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import tyro

from analysis.compare import f1_differences, mcnemar, scored_rows
from analysis.table1 import markdown
from common.errors import UserError, command
from common.files import Record
from data import heaviest
from evaluate import accuracy, macro_f1, weighted_f1

METRICS = {"accuracy": accuracy, "W-F1": weighted_f1, "macro F1": macro_f1}


@dataclass(frozen=True)
class Paired:
    """Compare the answers of models to the same samples, pair by pair, by the rule and in the text."""

    files: tyro.conf.Positional[tuple[Path, ...]]  # What `evaluate.py score --out` wrote, in the order to show.


@dataclass(frozen=True)
class Answer:
    """What is compared of one answer."""

    id: str
    gold: str  # the heaviest label
    strict: str | None  # the heaviest emotion of a valid answer
    named: tuple[str, ...]  # none where the answer breaks the rule
    iou: float
    text: str


def read_answer(row: Record) -> Answer:
    """A row of `evaluate.py score --out`."""
    named = tuple(row["parse"].get("last_emotions", ()))
    return Answer(row["id"], heaviest(row["gold"]), row["predicted"], named, float(row["iou"]), str(row["text"]))


def first_named(text: str, labels: Collection[str]) -> str | None:
    """The label with which `last_emotions` of an answer begins, else the first label in its text, valid or not."""
    begun = re.search(r"last_emotions['\"]*\s*:\s*\{\s*['\"](\w+)", text)
    if begun and begun[1] in labels:
        return begun[1]
    anywhere = re.search(rf"\b({'|'.join(map(re.escape, labels))})\b", text)
    return anywhere[1] if anywhere else None


def shared(files: Sequence[Path]) -> dict[str, list[list[Answer]]]:
    """Dataset -> the answers of each file, of the samples that all of them have, in one order. Raises `UserError`."""
    found = [{answer.id: answer for answer in scored_rows(path, read_answer)} for path in files]
    common = [name for name in found[0] if all(name in answers for answers in found)]
    if not common:
        raise UserError(f"no sample is in all of {', '.join(map(str, files))}")
    for name in common:
        if len({answers[name].gold for answers in found}) > 1:
            raise UserError(f"{name} has another gold label in one of the files than in another")
    datasets = defaultdict(list)
    for name in common:
        datasets[name.partition("/")[0]].append(name)
    return {dataset: [[answers[name] for name in names] for answers in found] for dataset, names in datasets.items()}


def readings(answers: Sequence[Answer], labels: Collection[str]) -> dict[str, list[str | None]]:
    """The prediction of each answer in both readings."""
    return {"strict": [x.strict for x in answers], "in the text": [first_named(x.text, labels) for x in answers]}


def scores(answers: Sequence[Answer], read: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """All scores of one model on one dataset, in [0, 1]; `emotions` is how many a valid answer names on average."""
    gold = [answer.gold for answer in answers]
    most, n = Counter(gold).most_common(1)[0]
    found: dict[str, Any] = {way: {k: f(gold=gold, pred=pred) for k, f in METRICS.items()} for way, pred in read.items()}
    valid = [answer for answer in answers if answer.strict]
    return found | {
        "iou": statistics.fmean(answer.iou for answer in answers), "valid": len(valid) / len(answers),
        "emotions": statistics.fmean(len(answer.named) for answer in valid) if valid else 0.0,
        "gold_most": most, "share_of_it_in_gold": n / len(gold), "in_the_text": read["in the text"].count(most) / len(gold),
    }  # fmt: skip


def difference(gold: Sequence[str], before: Sequence[str | None], after: Sequence[str | None]) -> dict[str, Any]:
    """After less before: who is right alone, McNemar's exact p, and each metric's difference with its 95 % interval."""
    right = [[g == p for g, p in zip(gold, side, strict=True)] for side in (after, before)]
    only_after, only_before, p = mcnemar(*right)
    moved = dict(zip(METRICS, f1_differences(gold, after, before), strict=True))
    return {"only_after": only_after, "only_before": only_before, "p": p, **moved}


def compare(files: Sequence[Path]) -> dict[str, Any]:
    """Per dataset: `samples`, the scores of each file and the difference of every two. Raises `UserError`."""
    if len({path.resolve() for path in files}) < max(2, len(files)):
        raise UserError("give two or more files, each once")
    found = {}
    for dataset, answers in shared(files).items():
        labels = sorted({x.gold for side in answers for x in side} | {e for side in answers for x in side for e in x.named})
        read = [readings(side, labels) for side in answers]
        gold = [answer.gold for answer in answers[0]]
        pairs = {
            f"{files[i]} -> {files[j]}": {way: difference(gold, read[i][way], read[j][way]) for way in read[i]}
            for i, j in combinations(range(len(files)), 2)
        }
        models = {str(path): scores(*pair) for path, pair in zip(files, zip(answers, read, strict=True), strict=True)}
        found[dataset] = {"samples": len(gold), "models": models, "pairs": pairs}
    return found


def shown(dataset: str, found: Mapping[str, Any]) -> str:
    """The two tables of a dataset, in percent, differences in [-1, 1]."""
    first = next(iter(found["models"].values()))
    share = f"{first['gold_most']} (gold {100 * first['share_of_it_in_gold']:.1f})"
    text = [f"in the text: {name}" for name in METRICS]
    lines = [[f"{dataset}, {found['samples']}", *METRICS, "IOU", "valid", "emotions", *text, share]]
    for path, row in found["models"].items():
        values = [*row["strict"].values(), row["iou"], row["valid"], *row["in the text"].values(), row["in_the_text"]]
        cells = [f"{100 * value:.1f}" for value in values]
        lines.append([path, *cells[:5], f"{row['emotions']:.2f}", *cells[5:]])
    pairs = [["after less before", "right only after / before", *METRICS]]
    for name, ways in found["pairs"].items():
        for way, row in ways.items():
            moved = [f"{x:+.3f} [{low:.3f}, {high:.3f}]" for x, low, high in (row[k] for k in METRICS)]
            pairs.append([f"{name}, {way}", f"{row['only_after']} / {row['only_before']}, p = {row['p']:.2g}", *moved])
    return f"{markdown(lines)}\n\n{markdown(pairs)}\n"


def main() -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def run() -> None:
        found = compare(tyro.cli(Paired).files)
        print(*(shown(dataset, rows) for dataset, rows in found.items()), json.dumps(found), sep="\n")

    return command(run)


if __name__ == "__main__":
    sys.exit(main())
