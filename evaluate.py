"""Scores of a model (Table 1), evaluation inside a run (Figs. 5, 6), and the commands about models and finished runs.

    python evaluate.py score --model DIR --data meld=data/meld [--data ...] --split test
    python evaluate.py judge RUN --early 0-9 --late 10-19 --judge URL --judge_name NAME
    python evaluate.py personas --run RUN [--plot FILE.svg]
    python evaluate.py audit RUN [--show SAMPLE_ID]
    python evaluate.py try MODEL < DIALOGUE

An answer without a valid output is a wrong answer, never a missing one: it is counted and its reason shown (D15).
"""

import common  # noqa: F401  # isort: skip  its check of Python comes first
import json
import math
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import PreTrainedTokenizerBase

import data
from analysis import audit, byhand
from analysis.clusters import personas_command
from analysis.compare import baseline_dates, compared, read_baseline
from analysis.judge import judge_command
from analysis.scoring import ScoreCommand, all_answers, datasets_of, unclean
from analysis.table1 import averaged, rendered, spread, summary
from analysis.trying import try_command
from common.errors import UserError, command
from common.files import build_records, jsonl, write_atomically
from common.flags import Pairs, Switch, pairs
from common.hub import enough_memory
from data import Completion, Failure, Output, Sample, heaviest
from engine.batches import my_micro_batches
from engine.processes import gathered
from experts.asking import KEPT
from grpo import iou
from model import Group, Policy
from training.folder import Run, made_once
from training.metrics import means
from training.records import parse_record, sample_from_record, sample_record
from training.task import EVALUATION, SELF_EMO_TEST, Task, answer, group_by_dataset

Parse = Output | Failure


# Metrics. Arguments are keywords, so that gold and predictions cannot be swapped: F1 is not symmetric.


def accuracy(*, gold: Sequence[str], pred: Sequence[str | None]) -> float:
    """Share of samples whose predicted label is the gold one; None is wrong."""
    return sum(g == p for g, p in zip(gold, pred, strict=True)) / len(gold)


def class_scores(label: str, *, gold: Sequence[str], pred: Sequence[str | None]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one class; 0 where undefined."""
    hit = sum(g == p == label for g, p in zip(gold, pred, strict=True))
    named, real = pred.count(label), gold.count(label)
    return hit / max(named, 1), hit / max(real, 1), 2 * hit / max(named + real, 1)


def weighted_f1(*, gold: Sequence[str], pred: Sequence[str | None]) -> float:
    """F1 of the classes, weighted by how many gold samples each has (Table 1's W-F1; scikit-learn's `weighted`)."""
    support = Counter(gold)
    return math.fsum(n * class_scores(c, gold=gold, pred=pred)[2] for c, n in support.items()) / len(gold)


def macro_f1(*, gold: Sequence[str], pred: Sequence[str | None]) -> float:
    """Plain mean of F1 over the classes that occur, as gold or as prediction."""
    classes = {*gold, *pred} - {None}
    return math.fsum(class_scores(c, gold=gold, pred=pred)[2] for c in classes if c) / len(classes)


@dataclass(frozen=True)
class Scores:
    """One row per sample: gold label, predicted label (None = no valid output), IOU (Eq. 10) and reason of the failure."""

    labels: tuple[str, ...]
    gold: tuple[str, ...]
    pred: tuple[str | None, ...]
    ious: tuple[float, ...]
    reasons: tuple[str | None, ...]

    @property
    def correct(self) -> list[bool]:
        """Whether the answer is right, per sample."""
        return [g == p for g, p in zip(self.gold, self.pred, strict=True)]

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """acc, wf1, macro_f1, iou (0 where the rule failed) and rule_rate, all in [0, 1], names after `prefix`."""
        values = {
            "acc": accuracy(gold=self.gold, pred=self.pred), "wf1": weighted_f1(gold=self.gold, pred=self.pred),
            "macro_f1": macro_f1(gold=self.gold, pred=self.pred), "iou": math.fsum(self.ious) / len(self.ious),
            "rule_rate": self.reasons.count(None) / len(self.reasons),
        }
        return {prefix + name: value for name, value in values.items()}

    def confusion(self) -> dict[str, Counter[str | None]]:
        """Gold label -> predicted label (None = no valid output) -> samples."""
        cells = Counter(zip(self.gold, self.pred, strict=True))
        return {g: Counter({p: cells[g, p] for p in (*self.labels, None)}) for g in self.labels}

    def table(self) -> str:
        """Per-class scores beside the confusion matrix (rows gold, columns predicted), then failures by reason."""
        head = f"{'gold':>12} {'n':>6} {'P %':>7} {'R %':>7} {'F1 %':>7}  |"
        lines = [head + "".join(f" {name[:8]:>8}" for name in (*self.labels, "(none)"))]
        for label, row in self.confusion().items():
            shares = [f"{100 * x:7.2f}" for x in class_scores(label, gold=self.gold, pred=self.pred)]
            counts = "".join(f" {row[p]:8d}" for p in (*self.labels, None))
            lines.append(f"{label[:12]:>12} {self.gold.count(label):6d} {' '.join(shares)}  |{counts}")
        failed = Counter(reason for reason in self.reasons if reason)
        reasons = ", ".join(f"{reason} {n}" for reason, n in failed.most_common())
        lines.append(f"no valid output: {failed.total()} of {len(self.gold)}" + (f" ({reasons})" if reasons else ""))
        return "\n".join(lines)


def score(samples: Sequence[Sample], parses: Sequence[Parse]) -> Scores:
    """Scores of one answer per sample against its gold. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("there is nothing to score")
    valid = [(s, p if isinstance(p, Output) else None) for s, p in zip(samples, parses, strict=True)]
    return Scores(
        labels=tuple(dict.fromkeys(label for sample in samples for label in sample.labels)),
        gold=tuple(heaviest(sample.gold) for sample in samples),
        pred=tuple(heaviest(p.last_emotions) if p else None for _, p in valid),
        ious=tuple(iou(p.last_emotions, s.gold) if p else 0.0 for s, p in valid),
        reasons=tuple(p.reason if isinstance(p, Failure) else None for p in parses),
    )


def majority(samples: Sequence[Sample]) -> Scores:
    """What always naming the most frequent gold label of these samples would score."""
    label = Counter(heaviest(sample.gold) for sample in samples).most_common(1)[0][0]
    return score(samples, [Output("", {label: 1.0}, {}, "", {})] * len(samples))


TRIES = 16  # braces of either kind that the lenient reading tries


def parse_lenient(text: str, labels: Sequence[str]) -> Parse:
    """The last dictionary anywhere in an answer that keeps the contract, whatever stands around it.

    For comparison with work that reads answers that way; training and the main score never use it. Looks at the last
    `TRIES` opening braces and for each at the next `TRIES` closing ones. The strict failure if there is none.
    """
    opens, closes = ([i for i, c in enumerate(text) if c == brace] for brace in "{}")
    for start in reversed(opens[-TRIES:]):
        first = bisect_right(closes, start)
        for end in closes[first : first + TRIES]:
            parse = data.parse_output(f"<think>-</think>{text[start : end + 1]}", labels)
            if isinstance(parse, Output):
                return parse
    return data.parse_output(text, labels)


# Inside a run


def between_steps(run: Run, task: Task, policy: Policy, k: int, t: int) -> None:
    """A point of the curve between two stages: scores on dev alone, at the first temperature."""
    first = task.cfg.eval_temperatures[:1]
    on_sets(run, task, policy, group_by_dataset(task.dev), k, t, "eval", f"after step {t}", first)


def on_dev(run: Run, task: Task, policy: Policy, k: int, t: int, when: str) -> None:
    """Scores on dev and, once there is one, on the SELF-EMO test split (D23)."""
    sets = group_by_dataset(task.dev)
    if run.position.stage > 0:
        sets["selfemo"] = self_emo_test(run, task, policy)
    on_sets(run, task, policy, sets, k, t, "eval", when, task.cfg.eval_temperatures)


def on_sets(
    run: Run, task: Task, policy: Policy, sets: Mapping[str, Sequence[Sample]], k: int, t: int, name: str, when: str,
    temperatures: Sequence[float],
) -> None:  # fmt: skip
    """One line of metrics: every set at every temperature, `name/<set>/acc` and so on, `@T` beside the first one.

    The entropies of the parts cost another forward of all answers, so they are those at the first temperature.
    """
    values: dict[str, Any] = {"when": when}
    rows = list[dict[str, Any]]()
    for temperature in temperatures:
        mark = "" if temperature == task.cfg.eval_temperatures[0] else f"@{temperature:g}"
        for label, samples in sets.items():
            if samples:
                run.pause(policy)
                answers = [g[0] for g in answer(task, policy, samples, n=1, temperature=temperature, step=EVALUATION)]
                values |= score(samples, [a.parse for a in answers]).metrics(f"{name}/{label}{mark}/")
                if not mark:
                    values |= task_entropies(task, policy, samples, answers, f"{name}/{label}/entropy/")
                head = {"step": t, "iteration": k, "when": when, "set": f"{name}/{label}{mark}"}
                rows += [head | answer_record(s, a) for s, a in zip(samples, answers, strict=True)]
    run.append(f"evaluations/iteration-{k}.jsonl", rows)
    run.log("eval", k, values, t)
    shown = [f"{n} {v:.3f}" for n, v in values.items() if n.endswith(("/acc", "/iou", "/rule_rate"))]
    run.say(f"{when}: {', '.join(shown)}")


def answer_record(sample: Sample, said: Completion) -> dict[str, Any]:
    """What evaluations/ keeps of an answer: all that its score follows from."""
    asked = {"sample_id": sample.id, "labels": list(sample.labels), "gold": dict(sample.gold)}
    return {**asked, "text": said.text, "finished": said.finished}


def self_emo_test(run: Run, task: Task, policy: Policy) -> list[Sample]:
    """The SELF-EMO test split: one valid answer to each dev sample made a new sample, once, after the cold start (D23)."""
    path = run.out / "selfemo_test.jsonl"

    def make() -> str:
        groups = answer(task, policy, task.dev, n=1, temperature=task.cfg.temperature, step=SELF_EMO_TEST)
        parsed = [(s, g[0].parse) for s, g in zip(task.dev, groups, strict=True)]
        made = [data.new_sample(s, parse, 0) for s, parse in parsed if isinstance(parse, Output)]
        return jsonl([sample_record(child) for child in made if isinstance(child, Sample) and task.fits(child)])

    return build_records(path, made_once(path, make), sample_from_record)


TASKS = {"last_emotions": "recognition", "my_emotions": "self_emotion", "my_output": "response"}  # Eq. (1): T_o, T_s, T_r


@torch.no_grad()
def task_entropies(
    task: Task, policy: Policy, samples: Sequence[Sample], answers: Sequence[Completion], prefix: str
) -> dict[str, float]:
    """Mean token entropies of recognition, self-emotion and response over the valid answers (Fig. 6b)."""
    pairs = [(task.encode(s), a) for s, a in zip(samples, answers, strict=True) if isinstance(a.parse, Output)]
    groups = [Group(prompt, [a.ids]) for (prompt, _), a in pairs]
    found: dict[int, list[float]] = {}
    for part in my_micro_batches(groups, task.cfg.micro_batch) if groups else ():
        _, entropy_BT = policy(part.groups)
        if part.counted:
            rows = range(len(pairs))[part.rows]
            for row, entropy_T in zip(rows, entropy_BT.tolist(), strict=True):
                (_, opened), a = pairs[row]
                assert isinstance(a.parse, Output)
                by_task = span_entropies(entropy_T, a.ids, task.tokenizer, opened, a.parse.spans)
                found[row] = [by_task[name] for name in TASKS.values()]
    return means([dict(zip(TASKS.values(), row, strict=True)) for row in gathered(found)], prefix)


def span_entropies(
    entropies: Sequence[float], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, prefix: str,
    spans: Mapping[str, tuple[int, int]],
) -> dict[str, float]:
    """Mean token entropy (nats) of an answer's recognition, self-emotion and response (Fig. 6b).

    `entropies` and `ids`: one per token of the answer; `prefix` and `spans`: as `data.answer_text` and `Output.spans`. A
    token belongs to a part if it wrote one of its characters; found by binary search over the decoded beginnings.
    """

    def written(tokens: int) -> int:
        # Half of a character decodes as U+FFFD until its last token arrives: without it lengths never shrink.
        return len(data.answer_text(tokenizer, ids[:tokens], frozenset(), prefix).rstrip("\ufffd"))

    found = {}
    for key, (start, end) in spans.items():
        first = bisect_right(range(len(ids) + 1), start, key=written) - 1
        last = bisect_left(range(len(ids) + 1), end, key=written)
        found[TASKS[key]] = math.fsum(entropies[first:last]) / (last - first)
    return found


# The score command


def prediction_rows(
    samples: Sequence[Sample], answers: Sequence[tuple[str, bool]], date: str | None = None
) -> list[dict[str, Any]]:
    """What --out keeps, one row per sample: id, gold, the text of the answer, how it reads and what that earns.

    `date`: the one that the prompts show, if their chat template shows one.
    """
    rows = []
    for sample, (text, finished) in zip(samples, answers, strict=True):
        parse = data.parse_output(text, sample.labels, finished=finished)
        scores = score([sample], [parse])
        asked = {"id": sample.id, "persona": sample.responder.persona, "gold": dict(sample.gold), "date": date}
        said = {"text": text, "finished": finished, "parse": parse_record(parse)}
        rows.append({**asked, **said, "predicted": scores.pred[0], "correct": scores.correct[0], "iou": scores.ious[0]})
    return rows


def why_invalid(rows: Sequence[Mapping[str, Any]]) -> str:
    """What went wrong where no answer is valid: the most frequent reason, and one example."""
    reason, n = Counter(row["parse"]["reason"] for row in rows).most_common(1)[0]
    row = next(row for row in rows if row["parse"]["reason"] == reason)
    example = f"{row['id']}: {row['parse']['detail']}; the answer begins with {' '.join(row['text'].split())[:100]!r}"
    mend = "; give more --max_new_tokens" * (reason == "unfinished")
    return f"none of {len(rows)} answers is valid, most often for '{reason}' ({n}), such as {example}{mend}"


def report(
    datasets: Mapping[str, Sequence[Sample]],
    answers: Mapping[str, Sequence[tuple[str, bool]]],
    *,
    lenient: bool = False,
    baseline: Mapping[str, bool] | None = None,
    seed: int = 0,
    unclean: Set[str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Text for people and the same numbers for programs: per dataset and averaged, with the majority class beside.

    `unclean`: keys of dialogues that the rows `clean` leave out (D24).
    """
    strict, clean, clean_counts, beside, beaten, text = {}, {}, {}, {}, {}, []
    for name, samples in datasets.items():
        pairs = list(zip(samples, answers[name], strict=True))
        parses = [data.parse_output(text, s.labels, finished=done) for s, (text, done) in pairs]
        scores = score(samples, parses)
        strict[name] = scores.metrics()
        kept = [i for i, s in enumerate(samples) if unclean is not None and s.id.rpartition("/")[0] not in unclean]
        if kept:
            clean[name] = score([samples[i] for i in kept], [parses[i] for i in kept]).metrics()
            clean_counts[name] = len(kept)
        beside[f"{name}, majority"] = majority(samples).metrics()
        if lenient:
            beside[f"{name}, lenient"] = score(samples, [parse_lenient(text, s.labels) for s, (text, _) in pairs]).metrics()
        text.append(f"{name}: {len(samples)} samples\n{scores.table()}\n")
        if baseline is not None:
            beaten[name] = compared(scores.correct, [baseline[sample.id] for sample in samples], seed)
            text.append(f"{name} against the baseline: " + ", ".join(f"{k} {v:.4g}" for k, v in beaten[name].items()))
    rows = strict | averaged(strict) | {f"{name}, clean": row for name, row in (clean | averaged(clean)).items()} | beside
    counts = {name: len(samples) for name, samples in datasets.items()}
    numbers = {"samples": counts, "clean_samples": clean_counts, "scores": rows, "compared": beaten}
    return "\n".join([*text, summary(rows)]), numbers


def score_command(command: tyro.conf.OmitArgPrefixes[ScoreCommand]) -> int:
    """Score a model on labelled splits (Table 1). Raises `UserError` in the end where every answer of a model is invalid."""
    if not command.model or not command.data:
        raise UserError("give --model and --data NAME=DIR")
    for path in (command.out.parent if command.out else None, command.gold, command.prompts):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist")
    datasets = datasets_of(command)
    baseline, left_out = read_baseline(command.baseline, datasets) if command.baseline else None, unclean(command)
    titles, runs, silent = list[str](), list[dict[str, Any]](), list[str]()
    for (model, seed, date), answers in all_answers(command, datasets):
        text, numbers = report(
            datasets, answers, lenient=command.lenient, baseline=baseline, seed=command.seed[0], unclean=left_out
        )
        titles.append(f"{model}, seed {seed}" if len(command.seed) > 1 else model)
        asked = {"split": command.split, "temperature": command.temperature, "seed": seed, "date": date}
        runs.append({"model": model, **asked, **numbers})
        print(f"{titles[-1]}\n{text}\n")
        if date and command.baseline and (others := baseline_dates(command.baseline) - {date}):
            were = f"prompts of {command.baseline} show the date {', '.join(sorted(others))}, those of {model} {date}"
            print(f"{were}: --date makes them alike", file=sys.stderr)
        rows = [row for name in datasets for row in prediction_rows(datasets[name], answers[name], date)]
        several = len(command.model) * len(command.seed) > 1
        path = command.out.with_stem(f"{command.out.stem}-{len(runs)}") if several and command.out else command.out
        if not any(row["predicted"] for row in rows):
            silent.append(f"{titles[-1]}: {why_invalid(rows)}; see {path or 'them all with --out FILE'}")
        if path:
            write_atomically(path, jsonl(rows))
    scores = [run["scores"] for run in runs]
    if len(runs) > 1 or command.table:
        print(rendered(command.table or "text", titles, scores, [*datasets, *(["average"] if len(datasets) > 1 else [])]))
    means, stds = spread(scores) if len(runs) > 1 else ({}, {})
    print(json.dumps(runs[0] if len(runs) == 1 else {"runs": runs, "mean": means, "std": stds}), flush=True)
    if silent:  # a score of 0 that says nothing about emotions
        raise UserError("; ".join(silent))
    return 0


# The audit command


def audit_command(
    run: tyro.conf.Positional[Path], show: str | None = None, markdown: Switch = False, data: Pairs = (),
    csv: Path | None = None,
) -> int:  # fmt: skip
    """Recompute what follows from the answers of a run: rewards, consensus, advantages, selections, metrics, the scores of
    its evaluations. Exit 1 and say where if one differs. docs/measuring.md lists what an audit cannot see.

    Args:
        run: Folder of the run.
        show: Sample id: print how its rewards and advantages come about instead.
        markdown: With --show: as a chapter from text to gradient (docs/by-hand.md). tools.replay measures the update.
        data: NAME=DIR of a dataset that is not where the run found it; repeatable. Gold and prompts are compared with it.
        csv: Write every number of the groups there instead, of all or of --show, for a spreadsheet.
    """
    if markdown and show is None:
        raise UserError("--markdown true goes with --show SAMPLE_ID")
    if csv is not None:
        write_atomically(csv, audit.as_csv(run, show))
        return 0
    if show is not None:
        print(byhand.chapter(run, show) if markdown else audit.show(run, show), end="" if markdown else "\n")
        return 0
    findings = audit.audit(run, data_at=pairs("data", data), score=lambda asked, parses: score(asked, parses).metrics())
    for problem in findings.problems:
        print(problem)
    print(findings.summary)
    return 1 if findings.problems else 0


def main() -> int:
    """Run a command; see `common.errors.command` for the exit status."""
    commands: dict[str, Callable[..., int]] = {
        "score": score_command, "judge": judge_command, "personas": personas_command, "audit": audit_command,
        "try": try_command,
    }  # fmt: skip
    return command(enough_memory()(lambda: int(tyro.extras.subcommand_cli_from_dict(commands))), kept=KEPT)


if __name__ == "__main__":
    sys.exit(main())
