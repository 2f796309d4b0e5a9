"""Does our GRPO learn as TRL's does? Both train the toy's base model on the same prompts in the same order.

    python -m tools.learning --peer trl=/venvs/trl/bin/python --seeds 5 --out runs/learning

Eq. 8 is the reward, lambda is 0, there is no self-play and no cold start; rate, clip range, beta, mini-batches, optimizer
and clipping of gradients are the same. Every few RL steps both models answer dev as in our own runs. The same command goes
on where it was stopped. OUT/learning.json has all numbers, OUT/learning.svg the curves with 95 % t intervals over seeds.
"""

import contextlib
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import data
import evaluate
import grpo
from common.errors import UserError, command
from common.files import Record, read_json, read_lines, write_atomically
from common.flags import Pairs, pairs
from common.hub import quiet_transformers
from data import Output
from model import Policy, few_threads
from tools.ablate import Ablate, Job, Row, finished, job, run_all, text
from tools.bands import Points, bands_svg
from tools.bench import Settings, Side
from tools.noise import signed, summary
from toy import base
from training import config
from training.coldstart import ADAMW, MAX_GRAD_NORM
from training.task import EVALUATION, Buffer, Task, answer, group_by_dataset, open_task


@dataclass(frozen=True)
class Learning:
    """Train the toy's base model by TRL's GRPOTrainer and by ours, with several seeds each; draw both learning curves."""

    out: Path  # Folder of all runs, learning.json and learning.svg.
    peer: Pairs = ()  # trl=PYTHON, the interpreter that has TRL.
    seeds: int = 3  # Seeds 0, 1, ... of each side.
    steps: int = 20  # RL steps.
    every: int = 5  # RL steps between evaluations on dev.


def plain(args: Learning) -> Row:
    """Our side: GRPO alone, from the base model."""
    off = ("--self_grpo", "false", "--self_play", "false", "--cold_start", "none", "--iterations", "1", "--test_limit", "1")
    return Row("ours", "ours", (*off, "--steps", str(args.steps), "--eval_every", str(args.every)))


def kept(values: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy and IOU among the values of an evaluation, by what follows `eval/`: toy/acc, toy@1/iou, ..."""
    found = {name.removeprefix("eval/"): value for name, value in values.items() if name.endswith(("/acc", "/iou"))}
    return {name: value for name, value in found.items() if not name.startswith("selfemo")}


def our_result(run: Path) -> Record:
    """Scores by RL step, seconds of rollouts and updates, and most memory of a finished run of ours."""
    lines = read_lines(run / "metrics.jsonl")
    points = {line["step"]: kept(line) for line in lines if line["phase"] == "eval" and line["when"] != "test"}
    rl = [line for line in lines if line["phase"] == "rl"]
    seconds = sum(line["time/rollout_s"] + line["time/update_s"] for line in rl)
    return {"points": points, "seconds": seconds, "peak_mib": max(line["memory/peak_gb"] for line in rl) * 1e9 / 2**20}


# TRL's side


def asked(task: Task, folder: Path, every: int) -> dict[str, Any]:
    """What TRL is to do, in its words: our prompts in the order of a run's steps, and our settings."""
    cfg, buffer = task.cfg, Buffer(task.originals)
    samples = [sample for step in range(task.S) for sample in buffer.draw(1, step, cfg)]
    parts = -(-cfg.batch_prompts // cfg.mini_batch_prompts)
    return {
        "prompts": [task.encode(sample)[0] for sample in samples], "samples": [sample.id for sample in samples],
        "n": cfg.n, "answers": cfg.mini_batch_prompts * cfg.n, "mini_batches": parts, "max_steps": task.S * parts,
        "max_new_tokens": cfg.max_new_tokens, "lr": cfg.lr, "adamw": ADAMW, "max_grad_norm": MAX_GRAD_NORM,
        "epsilon": cfg.clip_eps, "beta": cfg.kl_coef, "seed": cfg.seed, "save": str(folder), "save_every": every * parts,
    }  # fmt: skip


def trl_result(args: Learning, made: Job, python: str) -> Record:
    """Train with TRL and evaluate what it saved, as `our_result`; kept in result.json beside, and read where it is there."""
    folder = args.out / f"trl-{made.seed}"
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        task = open_task(made.cfg)
    rewards = [sys.executable, "-m", "tools.learning", "rewards", *made.argv]
    with ExitStack() as stack:
        side = Side("trl-train", python, Settings(model=made.cfg.model, dtype="float32", threads=1), stack)
        said = side.run({**asked(task, folder, args.every), "rewards": rewards})
    models = {0: Path(made.cfg.model), **{int(path.name): path for path in folder.glob("[0-9]*")}}
    points = {step: evaluated(task, models[step]) for step in sorted(models)}
    found = {"points": points, "seconds": said["seconds"], "peak_mib": said["peak_mib"], "versions": side.versions}
    write_atomically(folder / "result.json", json.dumps(found, indent=1) + "\n")
    return read_json(folder / "result.json")


def evaluated(task: Task, model: Path) -> dict[str, float]:
    """Scores of a model folder on dev, as a run of ours takes them: the same answers for the same weights."""
    policy = Policy.load(model)
    few_threads(policy)
    values: dict[str, float] = {}
    for temperature in task.cfg.eval_temperatures:
        mark = "" if temperature == task.cfg.eval_temperatures[0] else f"@{temperature:g}"
        for label, samples in group_by_dataset(task.dev).items():
            parses = [g[0].parse for g in answer(task, policy, samples, n=1, temperature=temperature, step=EVALUATION)]
            values |= kept(evaluate.score(samples, parses).metrics(f"eval/{label}{mark}/"))
    return values


def rewards(argv: Sequence[str]) -> None:
    """A process that TRL's reward function asks: JSON lines of sample ids and answers in, Eq. 8 out."""
    with contextlib.redirect_stdout(sys.stderr):
        task = open_task(config.parse(argv))
    for line in sys.stdin:
        print(json.dumps(rewards_of(task, **json.loads(line))), flush=True)


def rewards_of(task: Task, samples: Sequence[str], answers: Sequence[Sequence[int]]) -> list[float]:
    """Eq. 8 of answers, given as token ids with their end-of-sequence token, to the samples of these ids."""
    known, found = {sample.id: sample for sample in task.originals}, []
    for name, ids in zip(samples, answers, strict=True):
        sample = known[name]
        said = data.answer_text(task.tokenizer, ids, task.eos, task.encode(sample)[1])
        parse = data.parse_output(said, sample.labels, finished=bool(ids) and ids[-1] in task.eos)
        found.append(grpo.reward(parse.last_emotions if isinstance(parse, Output) else None, sample.gold))
    return found


# Both


def panels(sides: Mapping[str, Sequence[Record]]) -> dict[str, Points]:
    """Every score over RL steps: heading -> side -> (step, values of all seeds), at the steps at which every run has it."""
    taken = {side: [{int(k): own for k, own in r["points"].items()} for r in records] for side, records in sides.items()}
    runs = [run for own in taken.values() for run in own]
    found: dict[str, Points] = {}
    for name in runs[0][0]:
        steps = sorted(set.intersection(*({step for step, own in run.items() if name in own} for run in runs)))
        label, _, score = name.partition("/")
        how = f", T = {label.partition('@')[2]}" if "@" in label else ", greedy"
        lines = {side: [(float(k), [run[k][name] for run in own]) for k in steps] for side, own in taken.items()}
        found[f"{'Accuracy' if score == 'acc' else 'IOU'} on dev{how}"] = lines
    return found


def title(side: str, records: Sequence[Record]) -> str:
    """A side with its median seconds and its most memory, for the key of the picture and the table."""
    seconds = statistics.median(record["seconds"] for record in records)
    return f"{side}: {seconds:.0f} s, {max(record['peak_mib'] for record in records):.0f} MiB"


def table(sides: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Scores in per cent at the first and the last evaluation, means over seeds, and how far two sides lie apart.

    The last line is the first side less the second, seed by seed, with its 95 % t interval; seeds share prompts and order.
    It is left out where the sides have not as many seeds.
    """
    found = panels(sides)
    lines = [["", "seeds", *(f"{heading} {when}" for heading in found for when in ("first", "last"))]]
    for side, records in sides.items():
        cells = [100 * v for points in found.values() for end in (0, -1) for v in [statistics.fmean(points[side][end][1])]]
        lines.append([side, str(len(records)), *(f"{cell:.1f}" for cell in cells)])
    if len(sides) == 2 and len({len(records) for records in sides.values()}) == 1:
        ends = [[points[side][end][1] for side in sides] for points in found.values() for end in (0, -1)]
        parted = [summary([a - b for a, b in zip(*pair, strict=True)]) for pair in ends]
        lines.append(["difference", lines[-1][1], *map(signed, parted)])
    return lines


def learning(args: Learning) -> None:
    """Train what is missing, then write the numbers and the picture."""
    peers = pairs("peer", args.peer)
    if list(peers) != ["trl"]:
        raise UserError("give --peer trl=PYTHON, the interpreter of an environment with TRL")
    if args.seeds < 1 or args.steps < 1 or not 1 <= args.every <= args.steps or args.steps % args.every:
        raise UserError("--seeds, --steps and --every must be at least 1, and --every a divisor of --steps")
    quiet_transformers()
    row = plain(args)
    if not Path(config.PRESETS["toy"].model).exists():
        base.build()
    jobs = [job(Ablate(out=args.out), (), row, seed) for seed in range(args.seeds)]
    failed = run_all([one for one in jobs if not finished(one)], 1)
    if failed:
        raise UserError(failed[0])
    both = {"ours": [our_result(one.folder) for one in jobs], "TRL": []}
    for one in jobs:
        print(f"trl-{one.seed}", flush=True)
        both["TRL"].append(trl_result(args, one, peers["trl"]))
    sides = {title(side, records): records for side, records in both.items()}
    write_atomically(args.out / "learning.json", json.dumps(both, indent=1) + "\n")
    drawn = bands_svg("GRPO in the toy: TRL's trainer and ours", panels(sides), "RL steps")
    write_atomically(args.out / "learning.svg", drawn)
    print(text(table(sides)))


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    if argv[:1] == ["rewards"]:
        return command(lambda: rewards(argv[1:]))

    def work() -> None:
        learning(tyro.cli(Learning, args=list(argv), use_underscores=True))

    return command(work, kept="the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
