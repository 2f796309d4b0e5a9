"""What a run says in sums, computed again from its answers: the metrics of every RL step, the scores of every evaluation.

Called by analysis/audit.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import data
from common.files import Record, numbered, read_lines
from corpora.dialogue import Turn
from data import Failure, Output, Responder, Sample
from training.metrics import buffer_metrics, rollout_metrics

Scoring = Callable[[Sequence[Sample], Sequence[Output | Failure]], Mapping[str, float]]  # acc, wf1 and so on (D15)
DERIVED = ("reward/", "consistency/", "rule/", "answer/", "gold/", "buffer/")  # names that follow from the records of a step
UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what damaged lines may raise
CONTEXT = (Turn("somebody", "-"),)  # scores do not look at it


def rl_step(step: object) -> str:
    """An RL step as the run prints it: its records count from 0, readers from 1."""
    return f"RL step {step + 1 if type(step) is int else step!r}"


def place(line: Record) -> tuple[str, str, str]:
    """Which evaluation a line belongs to."""
    return repr(line.get("iteration")), repr(line.get("step")), repr(line.get("when"))


class Totals:
    """metrics.jsonl and evaluations/ of a run; `silent` says what of them cannot be computed again, and why."""

    def __init__(self, run: Path, score: Scoring | None) -> None:
        """Nothing is compared yet. Raises `UserError` where a line is not JSON."""
        self.run, self.score = run, score
        self.lines = [(f"metrics.jsonl:{n}", line) for n, line in numbered(run / "metrics.jsonl")]
        self.steps: set[object] = set()
        self.compared = 0
        self.absent: set[str] = set()
        self.silent: list[str] = [] if self.lines else ["metrics.jsonl is missing or empty"]

    def step(self, step: object, records: Sequence[Record], weight: Callable[[int], float]) -> Iterator[str]:
        """The line of an RL step against what its records say. `weight`: the lambda of a step."""
        if not self.lines:
            return
        found = [(where, line) for where, line in self.lines if line.get("phase") == "rl" and line.get("step") == step]
        self.steps.add(step if isinstance(step, int) else None)
        if len(found) != 1:
            yield f"metrics.jsonl: {rl_step(step)}: {len(found)} lines, there should be one"
            return
        [(where, line)] = found
        try:
            assert isinstance(step, int)
            expected = {**rollout_metrics(records), "lam": weight(step)}
        except (*UNREADABLE, AssertionError) as error:
            yield f"{where}: its records cannot be added up: {type(error).__name__} {error}"
            return
        yield from self.differences(where, line, expected)
        for name in line:
            if name.startswith(DERIVED) and name not in expected:
                yield f"{where}: {name}: written {line[name]!r}, but no record of the step has it"

    def differences(self, where: str, line: Record, expected: Mapping[str, object]) -> Iterator[str]:
        """One line per number that is written otherwise. A name that the line lacks is noted: earlier versions had fewer."""
        for name, value in expected.items():
            if name not in line:
                self.absent.add(name)
                continue
            self.compared += 1
            if line[name] != value or isinstance(line[name], bool):
                yield f"{where}: {name}: written {line[name]!r}, recomputed {value!r}"

    def end(self, children: Sequence[tuple[int, Sample]], samples: Mapping[str, Sample] | None) -> Iterator[str]:
        """The other lines: RL steps without records, new samples of each iteration, evaluations.

        `children`: (iteration, new sample) in the order of the buffer; `samples`: those of dev and test by id, if known.
        """
        for where, line in self.lines:
            if line.get("phase") == "rl" and line.get("step") not in self.steps:
                yield f"{where}: {rl_step(line.get('step'))}: it has no record"
            if line.get("phase") == "sft" and "new/samples" in line:
                own = [child for k, child in children if k == line.get("iteration")]
                expected = {k: v for k, v in buffer_metrics(own, own).items() if k != "new/label_js"}  # that one needs D0
                yield from self.differences(where, line, expected)
        yield from self.evaluations(samples)
        if self.absent:
            self.silent.append(f"not in metrics.jsonl: {', '.join(sorted(self.absent))}")

    def evaluations(self, samples: Mapping[str, Sample] | None) -> Iterator[str]:
        """Every evaluation scored again, from the texts of its answers."""
        wanted = {
            (*place(line), repr(name.removesuffix("/acc"))): (where, line)
            for where, line in self.lines
            if line.get("phase") == "eval"
            for name in line
            if name.endswith("/acc")
        }
        paths = sorted((self.run / "evaluations").glob("iteration-*.jsonl"))
        if not paths or self.score is None:
            self.silent += [f"{len(wanted)} evaluations not scored again (no evaluations/)"] if wanted else []
            return
        known = dict(samples) if samples is not None else None
        own = {row.get("id"): row for row in read_lines(self.run / "selfemo_test.jsonl")}
        ids: dict[str, list[str]] = {}
        for path in paths:
            for key, group in groupby(numbered(path), key=lambda found: (*place(found[1]), repr(found[1].get("set")))):
                found = list(group)
                first = f"{path.name}:{found[0][0]}"
                try:
                    yield from self.evaluation(first, [row for _, row in found], wanted.pop(key, None), known, own, ids)
                except UNREADABLE as error:
                    yield f"evaluations/{first}: {type(error).__name__} {error}"
        for (_, _, when, name), (where, _) in wanted.items():
            shown = name.strip("'")
            yield f"{where}: {shown}: no answers in evaluations/ for {when}"

    def evaluation(
        self, where: str, rows: Sequence[Record], line: tuple[str, Record] | None, samples: dict[str, Sample] | None,
        own: Mapping[object, Record], ids: dict[str, list[str]],
    ) -> Iterator[str]:
        """One evaluation of one set. `own`: the SELF-EMO test split; `ids`: the samples of each set, as met first."""
        name = str(rows[0]["set"])
        if line is None or self.score is None:
            yield f"evaluations/{where}: {name}: no line of metrics.jsonl has this evaluation"
            return
        answered = [str(row["sample_id"]) for row in rows]
        if ids.setdefault(name.partition("@")[0], answered) != answered:
            yield f"evaluations/{where}: {name}: other samples than in the evaluation before"
        selfemo = name.partition("@")[0].endswith("/selfemo")
        if selfemo and answered != list(own):
            yield f"evaluations/{where}: {name}: not the samples of selfemo_test.jsonl"
        asked, parses = [], []
        for row in rows:
            labels, gold, key = tuple(row["labels"]), row["gold"], str(row["sample_id"])
            asked.append(Sample(key, "", CONTEXT, Responder(None, None, "none"), labels, gold))
            parses.append(data.parse_output(row["text"], labels, finished=row["finished"]))
            if selfemo and key in own and own[key].get("gold") != gold:
                yield f"evaluations/{where}: gold of {key}: {gold!r}, selfemo_test.jsonl says {own[key].get('gold')!r}"
            if not selfemo and samples is not None:
                sample = samples.get(key)
                real = dict(sample.gold) if sample else None
                if sample is None or real != gold or sample.labels != labels:
                    yield f"evaluations/{where}: gold of {key}: {gold!r}, the data says {real!r}"
        expected = {f"{name}/{metric}": value for metric, value in self.score(asked, parses).items()}
        yield from self.differences(line[0], line[1], expected)


def against_data(record: Record, samples: Mapping[str, Sample]) -> Iterator[str]:
    """Gold, labels and responder of an original sample against the data that the run says it learned from."""
    if record["depth"]:
        return
    sample = samples.get(record["sample_id"])
    if sample is None:
        yield f"sample_id: {record['sample_id']} is in no data of the run"
        return
    real = {"gold": dict(sample.gold), "labels": list(sample.labels), "responder": asdict(sample.responder)}
    for name, value in real.items():
        if record[name] != value:
            yield f"{name}: written {record[name]!r}, the data says {value!r}"
