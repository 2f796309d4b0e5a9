"""One HTML page that shows a run: what ran, its curves (Figs. 5, 6), tables, confusion, groups worked out, alarms.

    python -m tools.report RUN [--out FILE.html] [--scores FILE ...] [--ablate FILE]

The page stands alone: no script, no network. Scores that `evaluate.py score --out` wrote as RUN/scores*.jsonl, and the
ablate.json of `tools.ablate` beside the run, are shown without being named.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

import data
from analysis import audit
from analysis.table1 import averaged
from common.errors import UserError, command
from common.files import Record, numbered, read_json, read_lines, write_atomically
from common.hub import load_tokenizer
from evaluate import Scores
from tools.alarms import alarms, new_prompts, right_answers
from tools.charts import Chart, Drawing, Series, Timeline, draw
from training.config import PRESETS
from training.folder import undamaged
from training.metrics import all_equal, mean

Lines = Sequence[Record]
SPLIT = "SELF-EMO split"


@dataclass(frozen=True)
class Report:
    """One HTML page that shows a run."""

    run: tyro.conf.Positional[Path]  # Folder of the run, finished or not.
    out: Path | None = None  # Where to write the page. Default: RUN/report.html.
    scores: tuple[Path, ...] = ()  # Answers scored with evaluate.py score --out. Default: RUN/scores*.jsonl.
    ablate: Path | None = None  # What tools.ablate wrote. Default: ablate.json beside the run, if there is one.


# Curves (Figs. 5, 6)


def temperatures(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(mark in metric names, in words) of every temperature of an evaluation; the first one has no mark."""
    words = [(f"@{t:g}", f"T\u00a0=\u00a0{t:g}" if t else "greedy") for t in config["eval_temperatures"]]
    return [("", words[0][1]), *words[1:]]


def eval_sets(lines: Lines) -> list[str]:
    """Names of the sets that evaluations on dev score, without marks of temperature, the SELF-EMO split last."""
    names = dict.fromkeys(n.split("/")[1].partition("@")[0] for x in lines for n in x if n.startswith("eval/"))
    return sorted(names, key=lambda name: name == "selfemo")


def title(name: str) -> str:
    """A set in words."""
    return SPLIT if name == "selfemo" else name


def chart(key: str, heading: str, unit: str, text: str, names: Mapping[str, str], lines: Lines, time: Timeline) -> Chart:
    """A chart over RL steps or evaluations; `names`: metric -> line. Metrics that were never measured are left out."""
    measured = {metric: name for metric, name in names.items() if any(metric in x for x in lines)}
    series = [Series(name, tuple(x.get(metric) for x in lines)) for metric, name in measured.items()]
    return replace(Chart.over_time(key, heading, text, lines, series, time), unit=unit)


def learning(config: Record, evals: Lines, rl: Lines, time: Timeline) -> Iterator[Chart]:
    """Fig. 5: scores on dev and on the SELF-EMO split, and the reward in training."""
    sets, marks = eval_sets(evals), temperatures(config)
    for key, heading in (("acc", "Accuracy"), ("wf1", "Weighted F1"), ("iou", "IOU (Eq. 10)")):
        names = {f"eval/{s}{mark}/{key}": f"{title(s)}, {words}" for s in sets for mark, words in marks}
        yield chart(key, heading, heading, f"{heading} on dev, before and after each stage.", names, evals, time)
    names = {"reward/original": "original prompts", "reward/synthetic": "new samples", "reward/acc": "accuracy, all"}
    text = "Mean reward (Eq. 8) of the answers of each RL step, and the share whose heaviest emotion is the gold one."
    found, P = chart("reward", "Reward in training", "reward, share", text, names, rl, time), config["batch_prompts"]
    counts = [f" ({n} of {P} new)" if (n := new_prompts(line, P)) else "" for line in rl]
    yield replace(found, names=tuple(map("".join, zip(found.names, counts, strict=True))))


def entropies(config: Record, evals: Lines, rl: Lines, time: Timeline) -> Iterator[Chart]:
    """Fig. 6: (a) of the policy, (b) of the three tasks, nats per token."""
    text = "Token entropy of the answers that the policy sampled, in nats."
    yield chart("entropy", "Entropy of the policy (a)", "nats per token", text, {"policy/entropy": "policy"}, rl, time)
    tasks = {"recognition": "recognition", "self_emotion": "own emotion", "response": "response"}
    words = temperatures(config)[0][1]
    for s in reversed(eval_sets(evals)):
        names = {f"eval/{s}/entropy/{task}": name for task, name in tasks.items()}
        text = f"Mean token entropy of the three parts of an answer, {words}, in nats."
        yield chart(f"entropy-{s}", f"Entropy of the tasks, {title(s)} (b)", "nats per token", text, names, evals, time)


def health(rl: Lines, time: Timeline) -> Iterator[Chart]:
    """What else moves during RL."""
    for key, heading, unit, text, names in (
        ("rule", "Rule and selection", "share", "Shares of answers, and of groups whose best answer became a new sample.",
         {"rule/rate": "keeps the rule", "buffer/keep_rate": "kept", "answer/truncated": "cut off"}),
        ("consensus", "Consensus", "share", "Consistency (Eq. 12), and shares of groups.",
         {"consistency/mean": "consistency", "consistency/core_on_gold": "consensus on gold",
          "reward/zero_std": "equal rewards", "consistency/zero_std": "equal consistency"}),
        ("entries", "Emotions in an answer", "emotions, share",
         "How many a valid answer recognises, and the smallest share among them.",
         {"answer/entries": "emotions per answer", "answer/min_share": "smallest share"}),
        ("top", "Variety", "share",
         "Share of the emotion that most valid answers name, and of the most frequent gold label.",
         {"answer/top_emotion": "named most", "gold/top_emotion": "gold"}),
        ("ratio", "Importance ratio", "ratio", "Of the tokens of a step (Eq. 14): 1 before its first update.",
         {"ratio/max": "largest", "ratio/mean": "mean"}),
        ("clip", "Clipping", "share of loss weight",
         "Share of the loss weight whose gain is clipped (Eq. 14), or whose KL is cut.",
         {"clip_frac": "clipped", "kl/clamped": "KL cut"}),
        ("gradient", "Gradient", "norm", "Norm of the gradient before it is clipped at 1, mean of a step's updates.",
         {"grad_norm": "gradient norm"}),
        ("length", "Length", "tokens", "Mean number of tokens of an answer.", {"answer/tokens": "tokens per answer"}),
        ("kl", "Distance", "nats per token", "KL to the iteration's reference and to the model after the cold start.",
         {"policy/kl": "to the reference", "policy/kl_cold_start": "to the cold start"}),
    ):  # fmt: skip
        yield chart(key, heading, unit, text, names, rl, time)


def drawn(charts: Iterator[Chart], time: Timeline) -> list[Drawing]:
    """The charts that have something to show."""
    return [draw(c, time) for c in charts if any(v is not None for s in c.series for v in s.values)]


# Tables 1 and 2


def table_1(config: Record, evals: Lines, files: Mapping[str, Mapping[str, Scores]]) -> list[list[str]]:
    """Accuracy and weighted F1 as in Table 1, IOU and valid answers beside them; [] if nothing was scored.

    A run scores test once, at its end; it scores base model and cold start on dev, so its own last ones stand there.
    """
    columns = {"acc": "Acc.", "wf1": "W-F1", "iou": "IOU", "rule_rate": "valid"}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for mark, words in temperatures(config):
        for name, room, line in stages(evals):
            sets = dict.fromkeys(n.split("/")[1].partition("@")[0] for n in line if n.startswith(f"{room}/"))
            own = {s: {k: line[n] for k in columns if (n := f"{room}/{s}{mark}/{k}") in line} for s in sets}
            own = {s: row for s, row in own.items() if row and s != "selfemo"}
            rows |= {f"{name}, {words}": own} if own else {}
    rows |= {name: {s: scores.metrics() for s, scores in found.items()} for name, found in files.items()}
    rows = {name: own | averaged(own) for name, own in rows.items() if own}
    sets = dict.fromkeys(s for own in rows.values() for s in own)
    head = ["", *(f"{s} {words}" for s in sets for words in columns.values())]
    cells = {n: [f"{100 * own[s][k]:.2f}" if s in own else "" for s in sets for k in columns] for n, own in rows.items()}
    return [head, *([name, *row] for name, row in cells.items())] if cells else []


def stages(evals: Lines) -> list[tuple[str, str, Record]]:
    """(words, eval or test, line) of what Table 1 compares: base model, cold start, the end of the last stage; and test."""
    by_when = {x["when"]: x for x in evals}
    found = [(f"{name}, dev", "eval", by_when[when]) for when, name in FIRST.items() if when in by_when]
    ends = [x for when, x in by_when.items() if when.startswith(("after RL", "after SFT"))]
    found += [(f"this run {x['when']}, dev", "eval", x) for x in ends[-1:]]
    return [*found, *(("this run, test", "test", x) for when, x in by_when.items() if when == "test")]


FIRST = {"start": "base model", "after the cold start": "cold start"}


def read_scores(path: Path) -> dict[str, Scores]:
    """Dataset -> scores, from the answers that `evaluate.py score --out` wrote. Raises `UserError` for anything else."""
    try:
        by_set = defaultdict(list)
        for row in read_lines(path):
            by_set[row["id"].partition("/")[0]].append(row)
        found = {name: scored(rows) for name, rows in by_set.items()}
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} does not hold answers of evaluate.py score --out: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{path} holds no answers")
    return found


def scored(rows: Sequence[Record]) -> Scores:
    """Scores of written answers."""
    gold = [data.heaviest(row["gold"]) for row in rows]
    labels = dict.fromkeys([*gold, *(row["predicted"] for row in rows if row["predicted"])])
    return Scores(
        labels=tuple(labels), gold=tuple(gold), pred=tuple(row["predicted"] for row in rows),
        ious=tuple(float(row["iou"]) for row in rows), reasons=tuple(row["parse"]["reason"] for row in rows),
    )


def table_2(path: Path) -> Record:
    """What `tools.ablate` wrote, checked. Raises `UserError` for anything else."""
    found = read_json(path)
    table = found.get("table")
    cells = isinstance(table, list) and table and all(isinstance(x, list) and len(x) == len(table[0]) for x in table)
    if not cells or not isinstance(found.get("skipped"), dict):
        raise UserError(f"{path} is not an ablate.json of tools.ablate")
    return {"seeds": None, "preset": None, **found, "table": [[str(cell) for cell in line] for line in found["table"]]}


# Rollouts: confusion, and groups to work out


@dataclass(frozen=True)
class Matrix:
    """Answers by gold (rows) and recognised (columns) emotion; the last column is "no valid output"."""

    title: str
    labels: tuple[str, ...]
    counts: Mapping[tuple[str | None, str | None], int]

    def rows(self) -> list[tuple[str, int, list[tuple[int, float]]]]:
        """(gold, answers, (count, share) per column) of every gold label that occurs."""
        found = []
        for gold in self.labels:
            row = [self.counts.get((gold, p), 0) for p in (*self.labels, None)]
            if sum(row):
                found.append((gold, sum(row), [(n, n / sum(row)) for n in row]))
        return found


@dataclass(frozen=True)
class Pick:
    """A kind of group to show: the last of greatest `rank`, among those for which it is not None."""

    title: str
    text: str
    rank: Callable[[Record], float | None]


def rewards(record: Record) -> list[float]:
    """Those of a group."""
    return [answer["reward"] for answer in record["answers"]]


def refused(record: Record) -> float | None:
    """Rank of a group whose best answer was looked at and not kept."""
    return max(rewards(record)) if record["selected"] is None and record["why"] != "off" else None


PICKS = (
    Pick("Selected", "Its best answer was kept and became a new sample (Eq. 7). Of these groups the one with the most "
         "different rewards.", lambda r: len({*rewards(r)}) if r["selected"] is not None else None),
    Pick("Refused", "Nothing of it was kept. Of these groups the one that came closest.", refused),
    Pick("Best", "The highest mean reward of a group whose answers still differ.",
         lambda r: mean(rewards(r)) if not all_equal(r, "reward") else None),
    Pick("Worst", "The lowest mean reward of a group whose answers still differ.",
         lambda r: -mean(rewards(r)) if not all_equal(r, "reward") else None),
    Pick("Consistency at work", "Where Eq. 12 moves advantages most: lambda times the spread of consistencies.",
         lambda r: r["lam"] * (max(a["consistency"] for a in r["answers"]) - min(a["consistency"] for a in r["answers"]))),
    Pick("Self-play", "A prompt that the model made itself. Of these groups the one with the most different rewards.",
         lambda r: len({*rewards(r)}) if r["origin"] == "synthetic" else None),
    Pick("Nothing to compare", "All answers earn the same, so the first term of Eq. 13 is 0.",
         lambda r: mean(rewards(r)) if all_equal(r, "reward") else None),
)  # fmt: skip

WHY = {
    "kept": "the best answer became a new sample", "rule": "no answer keeps the rule",
    "reward": "the best reward is too low", "label": "less than half of what the answer feels is in the label set",
    "responder": "nobody can answer next", "length": "the new prompt would be too long", "off": "self-play is off",
}


@dataclass
class Rollouts:
    """What one pass over the rollout records gathers; the records themselves may be far too many to hold."""

    stretches: tuple[frozenset[int], frozenset[int]]  # RL steps, early and late
    groups: int = 0
    answers: int = 0
    why: Counter[str] = field(default_factory=Counter)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    confusion: dict[tuple[str, int], Counter[tuple[str | None, str | None]]] = field(default_factory=dict)
    picked: dict[str, tuple[float, Record]] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        """Add a record."""
        self.groups += 1
        self.answers += len(record["answers"])
        self.why[record["why"]] += 1
        self.labels.setdefault(record["dataset"], tuple(record["labels"]))
        for i, steps in enumerate(self.stretches):
            if record["step"] in steps and record["origin"] == "original":
                named = (data.heaviest(a["parse"].get("last_emotions", {})) or None for a in record["answers"])
                pairs = [(data.heaviest(record["gold"]), name) for name in named]
                self.confusion.setdefault((record["dataset"], i), Counter()).update(pairs)
        for pick in PICKS:
            rank = pick.rank(record)
            if rank is not None and rank >= self.picked.get(pick.title, (-math.inf,))[0]:
                self.picked[pick.title] = (rank, record)

    def matrices(self) -> list[Matrix]:
        """Confusion of every dataset, early and late."""
        spans = [f"RL steps {min(steps) + 1} to {max(steps) + 1}" for steps in self.stretches if steps]
        cells = sorted(self.confusion.items())
        return [Matrix(f"{dataset}, {spans[i]}", self.labels[dataset], counts) for (dataset, i), counts in cells]


def read_rollouts(run: Path, steps: Sequence[int]) -> Rollouts:
    """One pass over rollouts/iteration-K.jsonl. Raises `UserError` at a line that is no rollout record."""
    fifth = max(1, len(steps) // 5)
    found = Rollouts((frozenset(steps[:fifth]), frozenset(steps[-fifth:])))
    for path in audit.rollout_files(run):
        for number, record in numbered(path):
            try:
                found.take(record)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                why = f"{type(error).__name__} {error}; python evaluate.py audit {run} says more"
                raise UserError(f"{path} line {number} is no rollout record: {why}") from None
    return found


def groups(run: Path, rollouts: Rollouts) -> list[Record]:
    """The picked groups worked out, each once, with their prompts once the run has written a tokenizer."""
    tokenizer = load_tokenizer(run / "model") if (run / "model" / "tokenizer_config.json").exists() else None
    found: dict[tuple[int, str], Record] = {}
    for pick in PICKS:
        _, record = rollouts.picked.get(pick.title, (0.0, None))
        if record is not None and (key := (record["step"], record["sample_id"])) not in found:
            prompt = data.answer_text(tokenizer, record["prompt_ids"], (), "").strip() if tokenizer else ""
            why, lines = WHY.get(record["why"], record["why"]), "\n".join(audit.derivation(record))
            found[key] = {**asdict(pick), "record": record, "prompt": prompt, "why": why, "derivation": lines}
    return list(found.values())


# The page


def settings(config: Record) -> list[list[str]]:
    """Every setting beside the paper's value: those that differ first."""
    paper = json.loads(json.dumps(asdict(PRESETS["paper"])))
    own = {k: v for k, v in config.items() if k not in ("versions", "S", "T", "resume", "prompt_sums")}
    rows = [[k, shown(v), shown(paper.get(k, ""))] for k, v in own.items()]
    return sorted(rows, key=lambda row: row[1] == row[2])


def shown(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def figures(config: Record, evals: Lines, rl: Lines, rollouts: Rollouts) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what one wants to know first."""
    found, greedy = [], temperatures(config)[0][1]
    for s in eval_sets(evals):
        for key, words in (("acc", "accuracy"), ("iou", "IOU")):
            values = [(x[name], x["when"]) for x in evals if (name := f"eval/{s}/{key}") in x]
            best, when = max(values, key=lambda value: value[0])
            remark = f"first → last on dev, {greedy}; best {best:.3f}, {when}"
            found.append((f"{title(s)}, {words}", f"{values[0][0]:.3f} → {values[-1][0]:.3f}", remark))
    found.append(("RL steps", f"{len(rl)} of {config['T']}", f"{rollouts.groups:,} groups, {rollouts.answers:,} answers"))
    found.append(("new samples", f"{rollouts.why['kept']:,}", "kept answers, each a new dialogue turn"))
    return found


def state(lines: Lines) -> str:
    """How far the run is."""
    if any(x.get("when") == "test" for x in lines):
        return "finished"
    last = lines[-1]
    where = f"of iteration {last['iteration']}" if last["iteration"] else "before the first iteration"
    names = {"rl": f"RL step {last['step'] + 1}", "sft": "fine-tuning", "eval": f"the evaluation “{last.get('when')}”"}
    return f"not finished; the last thing written is {names[last['phase']]} {where}"


NEEDED = {"preset", "seed", "model", "data", "iterations", "S", "T", "batch_prompts", "n", "eval_temperatures", "versions"}


def page(args: Report) -> str:
    """The whole page. Raises `UserError` where the folder is no run, or a file is not what it should be."""
    undamaged(args.run)
    try:
        return made(args)
    except (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
        why = f"{type(error).__name__} {error}"
        raise UserError(f"{args.run} holds what selfemo.py does not write ({why}): see python evaluate.py audit") from error


def made(args: Report) -> str:
    """`page`, for a run without damage."""
    run = args.run
    config, lines = read_json(run / "config.json"), read_lines(run / "metrics.jsonl")
    if missing := NEEDED - set(config):
        raise UserError(f"{run / 'config.json'} lacks {', '.join(sorted(missing))}: it is not of a run of selfemo.py")
    if not lines:
        raise UserError(f"{run} holds nothing to report yet: give the folder of a run after its first evaluation")
    rl = [x for x in lines if x["phase"] == "rl"]
    evals = [x for x in lines if x["phase"] == "eval" and x["when"] != "test"]
    time = Timeline(config["S"], config["iterations"])
    rollouts = read_rollouts(run, [x["step"] for x in rl])
    paths = args.scores or tuple(sorted(run.glob("scores*.jsonl")))
    files = {path.stem: read_scores(path) for path in paths}
    beside = args.ablate or (path if (path := run.resolve().parent / "ablate.json").exists() else None)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        name=run.resolve().name, run=str(run), config=config, state=state(lines),
        hours=sum(x.get("time/rollout_s", 0) + x.get("time/update_s", 0) for x in rl) / 3600,
        figures=figures(config, evals, rl, rollouts), alarms=alarms(lines, right_answers(run), config["batch_prompts"]),
        learning=drawn(learning(config, evals, rl, time), time),
        entropies=drawn(entropies(config, evals, rl, time), time), health=drawn(health(rl, time), time),
        tested=any(x.get("when") == "test" for x in lines),
        table_1=table_1(config, [x for x in lines if x["phase"] == "eval"], files),
        table_2=table_2(beside) if beside else None,
        matrices=[*rollouts.matrices(), *written_matrices(files)], groups=groups(run, rollouts),
        why=[(WHY.get(name, name), n) for name, n in rollouts.why.most_common()], settings=settings(config),
    )


def written_matrices(files: Mapping[str, Mapping[str, Scores]]) -> list[Matrix]:
    """Confusion of scored answers."""
    return [
        Matrix(f"{dataset}, {name}", scores.labels, Counter(zip(scores.gold, scores.pred, strict=True)))
        for name, found in files.items()
        for dataset, scores in found.items()
    ]


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def work() -> None:
        args = tyro.cli(Report, args=list(argv), use_underscores=True)
        out = args.out or args.run / "report.html"
        write_atomically(out, page(args))
        print(f"wrote {out}")

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
