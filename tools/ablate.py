"""The ablations of Table 2 over seeds, and some of our own: one run per row and seed, then one table.

    python -m tools.ablate --preset toy --seeds 3 --out runs/ablate
    python -m tools.ablate --preset toy --seeds 3 --out runs/ablate --rows full no_self_emo -- --n 4
    python -m tools.ablate noise --preset toy --seeds 5 --out runs/noise

Flags after `--` go to every run. Each run is a folder DIR/<row>-<seed> with its log beside it. The same command goes on
where it was stopped: finished runs stay as they are, broken ones continue from their checkpoint. The table is also
written to DIR/ablate.json, which `tools.report` shows. `noise` is the study of tools/noise.py: wrong training labels.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

import data
from analysis.consensus import consensus
from analysis.table1 import averaged, markdown
from common.errors import UserError, command
from common.files import jsonl, lock, read_json, read_lines, write_atomically
from common.flags import Pairs, pairs
from common.template import day
from tools import noise
from toy import base
from training import config
from training.config import MAY_DIFFER, PRESETS, Config
from training.task import read_samples, read_splits

SELFEMO = Path(__file__).resolve().parent.parent / "selfemo.py"
ONE_HOT = "one-hot-gold.jsonl"


@dataclass(frozen=True)
class Row:
    """One line of the table: its name (also of the folders), its title, its flags, and why it cannot be run, if so."""

    name: str
    title: str
    flags: tuple[str, ...] = ()
    skip: str = ""


@dataclass(frozen=True)
class Ablate:
    """Train every row of Table 2 (D27), and more, with several seeds; print one table. Flags after -- go to every run."""

    study: tyro.conf.Positional[Literal["table2", "noise"]] = "table2"
    """table2, or noise: wrong training labels, with and without consensus and self-play; also writes DIR/noise.svg."""
    _: KW_ONLY
    out: Path  # Folder of all runs, their logs and ablate.json.
    preset: Literal["paper", "toy", "small"] = "toy"  # Where the settings of all runs start from.
    seeds: int = 3  # Seeds 0, 1, ... of each row.
    rows: tuple[str, ...] = ()  # Only these rows. Default: all.
    jobs: int = 1  # Runs at the same time. Each takes as many threads as OMP_NUM_THREADS says.
    expert: Pairs = ()  # The run's --expert, for the row w/ COLD; without it that row is left out. Repeatable.
    expert_model: Pairs = ()  # The run's --expert_model, for the same row. Repeatable.
    markdown: tyro.conf.FlagCreatePairsOff[bool] = False  # Print the table as Markdown.
    show: tyro.conf.FlagCreatePairsOff[bool] = False  # Run nothing: only the table of what is finished.


@dataclass(frozen=True)
class Job:
    """One run to make: its folder, its command line, and the settings that it must have."""

    row: Row
    seed: int
    folder: Path
    argv: tuple[str, ...]
    cfg: Config

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


# Rows


def table_rows(samples: int, soft: bool, gold: Path, expert: Sequence[str]) -> list[Row]:
    """All rows, those of Table 2 first. `samples`: training samples there are; `soft`: whether any has two gold labels."""
    fewer, few = max(1, 2 * samples // 3), max(1, samples // 20)
    no_expert = "" if expert else "give --expert: its data is what this row learns first"
    one_hot = "" if soft else "gold has one label per sample already: the row would repeat the full one"
    return [
        Row("full", "SELF-EMO"),
        Row("with_cold", "w/ COLD", ("--cold_start", "expert", *expert), no_expert),
        Row("no_self_grpo", "w/o SELF-GRPO", ("--self_grpo", "false")),
        Row("no_self_emo", "w/o SELF-EMO", ("--self_grpo", "false", "--self_play", "false", "--originals", "0")),
        Row("no_self_play", "self-play off alone", ("--self_play", "false")),
        Row("lr_0", "control: RL rate 0", ("--lr", "0")),
        Row("fewer_originals", f"{fewer} originals", ("--originals", str(fewer))),
        Row("few_synthetic", f"at most {few} synthetic", ("--max_synthetic", str(few))),
        Row("from_base", "retrain from base", ("--retrain_from", "base")),
        Row("sequence_ratio", "one ratio per sequence", ("--ratio", "sequence")),
        Row("one_hot", "one-hot gold", ("--gold", str(gold)), one_hot),
    ]


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the order of the table; all for none. Raises `UserError` for an unknown name."""
    if unknown := set(names) - {row.name for row in rows}:
        raise UserError(f"--rows {' '.join(sorted(unknown))}: there are {' '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name in names]


def one_hot_gold(cfg: Config) -> list[dict[str, Any]]:
    """The training samples' heaviest gold label alone, as lines of a --gold file: the true one, noise is the run's."""
    found = read_samples(replace(cfg, label_noise=0.0), pairs("data", cfg.data))
    train = [s for (_, split), own in found.items() if split == "train" for s in own]
    return [{"id": sample.id, "weights": {data.heaviest(sample.gold): 1.0}} for sample in train]


def job(args: Ablate, extra: Sequence[str], row: Row, seed: int) -> Job:
    """The run of a row and a seed. The row's flags come last, so that they win over those of all rows."""
    folder = args.out / f"{row.name}-{seed}"
    argv = ("--preset", args.preset, *extra, *row.flags, "--seed", str(seed), "--out", str(folder), "--resume")
    return Job(row, seed, folder, argv, config.parse(argv))


def date_of_runs(out: Path, cfg: Config) -> str:
    """The one date that all runs of a table have: --date, that of a run which is there already, or today."""
    kept = [str(read_json(path).get("date", "")) for path in sorted(out.glob("*/config.json"))]
    return day(cfg.date or next(filter(None, kept), ""))


# Running


def finished(job: Job) -> bool:
    """Whether the run of a job is done. Raises `UserError` where the folder holds a run with other settings."""
    if not (job.folder / "config.json").exists():
        return False
    known = read_json(job.folder / "config.json")
    default, wanted = (json.loads(json.dumps(asdict(cfg))) for cfg in (Config(), job.cfg))
    free = MAY_DIFFER - {"lr", "cold_start_lr", "sft_lr"}  # a resumed run may change a rate, a row of a table may not
    free |= {"date"} if not (known.get("date") and job.cfg.date) else set()  # an older run kept none
    both = {k: (known.get(k, default[k]), v) for k, v in wanted.items() if k not in free}
    changed = ", ".join(f"{k} was {was!r}, is {now!r}" for k, (was, now) in both.items() if was != now)
    if changed:
        raise UserError(f"{job.folder} was made with other settings ({changed}): give another --out")
    if not (job.folder / "model").exists():  # a killed run may have left half a line: its resume cuts that off
        return False
    return any(x.get("when") == "test" for x in read_lines(job.folder / "metrics.jsonl"))


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a run. Raises `UserError` if the one before it still runs: its log stays locked as long as it lives."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        lock(log, f"a run still writes to {job.folder}: wait for it, or stop it")
        command = [sys.executable, str(SELFEMO), *job.argv]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def run_all(jobs: Sequence[Job], at_once: int) -> list[str]:
    """Make all runs, at most `at_once` together; one line per run that did not finish.

    Raises `UserError` if a run says that the command is wrong. Whatever ends it, the runs that still go are asked to save.
    """
    waiting, going, failed = deque(jobs), dict[subprocess.Popen[bytes], tuple[Job, float]](), []
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                job = waiting.popleft()
                print(f"{job.folder.name}: started", flush=True)
                going[start(job)] = (job, time.monotonic())
            time.sleep(0.2)
            for process in [p for p in going if p.poll() is not None]:
                job, began = going.pop(process)
                if finished(job):
                    print(f"{job.folder.name}: done in {time.monotonic() - began:.0f} s", flush=True)
                    continue
                failed.append(f"{job.folder.name}: status {process.returncode}: {last_line(job.log)}")
                print(failed[-1], flush=True)
                if process.returncode == 2:
                    raise UserError(failed[-1])
    finally:
        for process in going:
            process.send_signal(signal.SIGTERM)
        for process in going:
            process.wait()
    return failed


def last_line(log: Path) -> str:
    """The last line with something in it."""
    return (log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1].strip()) or "it said nothing"


# The table


def scores(job: Job) -> dict[str, float]:
    """Numbers of a finished run: every test score, the last ones on dev, and how many answers were kept."""
    lines = [x for x in read_lines(job.folder / "metrics.jsonl") if x["phase"] == "eval"]
    found = {k: v for x in lines[-2:] for k, v in x.items() if k.startswith(("eval/", "test/")) and "/entropy/" not in k}
    plain = sorted({name.split("/")[1] for name in found if name.startswith("test/") and "@" not in name})
    names = ("acc", "wf1", "macro_f1", "iou", "rule_rate")
    average = averaged({s: {name: found[f"test/{s}/{name}"] for name in names} for s in plain})
    found |= {f"test/average/{name}": value for name, value in average.get("average", {}).items()}
    return {**found, "kept": len(read_lines(job.folder / "buffer.jsonl"))}


def with_consensus(job: Job) -> dict[str, float]:
    """The same, and what the consensus did."""
    return {**scores(job), **{f"consensus/{name}": value for name, value in consensus(job.folder).items()}}


def collected(jobs: Sequence[Job], measure: Callable[[Job], dict[str, float]] = scores) -> list[dict[str, Any]]:
    """One record per row: title, flags, the seeds that are finished, and every number by seed, with mean and deviation."""
    records: list[dict[str, Any]] = []
    for row in dict.fromkeys(job.row for job in jobs):
        runs = {job.seed: measure(job) for job in jobs if job.row == row and finished(job)}
        names = list(next(iter(runs.values()), {}))
        numbers = {name: spread([run[name] for run in runs.values()]) for name in names}
        records.append({**asdict(row), "seeds": list(runs), "scores": numbers})
    full = next((r for r in records if r["name"] == "full"), None)
    for record in records:
        record["difference"] = difference(record, full) if full and record is not full else None
    return records


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and the values."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def difference(record: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy of a row minus that of the full one, seed by seed (Table 2's brackets); None without a common seed."""
    name = accuracy_name(full["scores"])
    both = [seed for seed in record["seeds"] if seed in full["seeds"]]
    mine, theirs = ([r["scores"][name]["values"][r["seeds"].index(s)] for s in both] for r in (record, full))
    return spread([a - b for a, b in zip(mine, theirs, strict=True)]) if both else None


def accuracy_name(numbers: Mapping[str, Any]) -> str:
    """The accuracy that rows are compared by: averaged over datasets where there are several; "" of nothing."""
    names = [name for name in numbers if name.startswith("test/") and name.endswith("/acc") and "@" not in name]
    return next((name for name in names if name == "test/average/acc"), names[0] if names else "")


def cell(number: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A share in percent, as 70.52 +- 4.10; a dash for None."""
    if number is None:
        return "-"
    mean = f"{100 * number['mean']:{'+' if signed else ''}.2f}"
    return mean if number["std"] is None else f"{mean} +- {100 * number['std']:.2f}"


def table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table, the head first."""
    named = dict.fromkeys(name.split("/")[1] for r in records for name in r["scores"] if name.startswith("test/"))
    columns = {f"{s.replace('@', ' T=')} {title}": f"test/{s}/{key}" for s in named for key, title in METRICS.items()}
    lines = [["", "seeds", "kept", *columns, "Acc. against the full row"]]
    for r in records:
        kept = f"{r['scores']['kept']['mean']:.0f}" if r["seeds"] else "-"
        values = [cell(r["scores"].get(name)) for name in columns.values()]
        lines.append([r["title"], str(len(r["seeds"])), kept, *values, cell(r["difference"], signed=True)])
    return lines


METRICS = {"acc": "Acc.", "wf1": "W-F1", "iou": "IOU"}


def text(lines: Sequence[Sequence[str]]) -> str:
    """The table in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True))) for x in lines
    )


# The command


def ablate(args: Ablate, extra: Sequence[str]) -> int:
    """Make the runs and the table. 0: all runs of all rows are there; 1: some are not."""
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    cfg = config.parse(("--preset", args.preset, *extra))
    dated = ("--date", date_of_runs(args.out, cfg), *extra)
    if cfg.model == PRESETS["toy"].model and not Path(cfg.model).exists():
        print("building the toy world in data/toy (once)", flush=True)
        base.build()
    gold = one_hot_gold(cfg)
    train = read_splits(cfg)["train"]
    expert = [x for flag in ("expert", "expert_model") for value in getattr(args, flag) for x in (f"--{flag}", value)]
    soft = any(len(sample.gold) > 1 for sample in train)
    noisy = args.study == "noise"
    known = [Row(*row) for row in noise.rows()] if noisy else table_rows(len(train), soft, args.out / ONE_HOT, expert)
    rows = chosen(known, args.rows)
    for row in rows:
        if row.skip:
            print(f"{row.title} ({row.name}) is left out: {row.skip}", flush=True)
    jobs = [job(args, dated, row, seed) for row in rows if not row.skip for seed in range(args.seeds)]
    write_atomically(args.out / ONE_HOT, jsonl(gold))
    failed = [] if args.show else run_all([job for job in jobs if not finished(job)], args.jobs)
    records = collected(jobs, with_consensus if noisy else scores)
    skipped = {row.title: row.skip for row in rows if row.skip}
    settings = {"preset": args.preset, "flags": list(extra), "seeds": args.seeds, "failed": failed, "skipped": skipped}
    lines = noise.table(records) if noisy else table(records)
    found = {**settings, "rows": records, "table": lines}
    shown = markdown if args.markdown else text
    print(shown(lines))
    if noisy:
        effects = noise.effects(records)
        found |= {"effects": effects}
        print(f"\n{shown(noise.effects_table(effects))}")
        if any(record["seeds"] for record in records):
            write_atomically(args.out / "noise.svg", noise.picture(records))
    write_atomically(args.out / "ablate.json", json.dumps(found, indent=1) + "\n")
    return 0 if all(len(record["seeds"]) == args.seeds for record in records) else 1


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def work() -> int:
        cut = argv.index("--") if "--" in argv else len(argv)
        args = tyro.cli(Ablate, args=list(argv[:cut]), use_underscores=True)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return ablate(args, argv[cut + 1 :])
        finally:
            signal.signal(signal.SIGTERM, before)

    return command(work, kept="the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
