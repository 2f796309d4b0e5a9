"""Speed against others: one run, same model, prompts and numbers of tokens; sides take turns, each in its own process.

    python -m tools.bench --quick
    python -m tools.bench rollout-a --model DIR --data meld=data/meld --peer vllm=/venvs/vllm/bin/python --peer transformers
    python -m tools.bench step step-long --dtype float32 --model DIR --peer trl=/venvs/trl/bin/python
    python -m tools.bench limits --dtype float32 --model DIR

A peer is NAME=PYTHON, the interpreter that has it; without =PYTHON it runs in ours. Answers always have their full length.
Seconds are wall time; CPU seconds stand beside them, because wall time on a busy machine says little. Beside the sides,
tools.limits measures in every turn what the machine can do; the columns in % say how much of that a side reaches.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

import data
from common.errors import UserError, command
from common.files import jsonl
from common.flags import Pairs, pairs
from common.hub import load_tokenizer
from tools.ablate import last_line, text
from tools.limits import tokens_bound
from toy import base

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Workload:
    """What every side does, and how long its prompts are."""

    name: str
    task: Literal["rollout", "step", "limits"]
    prompts: int
    prompt_tokens: int
    n: int
    max_new_tokens: int
    micro_batch: int = 16
    kv_mib: int = 0  # most memory for keys and values, ours alone; 0 = no limit
    trl_micro_batch: int = 0  # TRL's own, where ours would take it all memory; 0 = the same


A = Workload("rollout-a", "rollout", 8, 180, 8, 128)
B = Workload("rollout-b", "rollout", 8, 1070, 8, 128)
STEP = Workload("step", "step", 4, 180, 8, 128)  # the policy update is a part of it, and has its own columns
ONE = replace(STEP, name="step-1", prompts=1, micro_batch=8)  # a quarter of it, for a busy machine
LONG = replace(STEP, name="step-long", prompt_tokens=1000, micro_batch=8, trl_micro_batch=2)
LONG_ONE = replace(LONG, name="step-long-1", prompts=1)
LIMITS = replace(STEP, name="limits", task="limits")  # what the machine can do with products as large as the step's
SHORT = replace(A, max_new_tokens=64)
GROWTH = (
    *(replace(SHORT, name=f"prompts-{x}", prompts=x) for x in (8, 32, 128)),
    *(replace(SHORT, name=f"n-{x}", n=x) for x in (1, 4, 8, 32)),
    *(replace(SHORT, name=f"prompt_tokens-{x}", prompt_tokens=x) for x in (100, 500, 2000)),
    *(replace(SHORT, name=f"max_new_tokens-{x}", max_new_tokens=x) for x in (64, 256, 1024)),
    *(replace(SHORT, name=f"kv_mib-{x}", prompts=32, kv_mib=x) for x in (64, 128, 256, 512)),
)
QUICK = (Workload("quick-rollout", "rollout", 8, 100, 8, 32), Workload("quick-step", "step", 4, 100, 8, 32))
WORKLOADS = {w.name: w for w in (A, B, STEP, ONE, LONG, LONG_ONE, LIMITS, *GROWTH)}


@dataclass(frozen=True)
class Settings:
    """Time ours against peers. Prints a table and writes one JSON line per row."""

    workloads: tyro.conf.Positional[tuple[str, ...]] = ("rollout-a",)
    """rollout-a, rollout-b, step, step-long (prompts of 1,000 tokens), step-1 and step-long-1 (one prompt), limits (what the
    machine can do), growth, or the name of one point of growth (n-32, prompts-128, ...)."""
    model: str = ""  # Hugging Face folder; without it an untaught model of the toy world's size.
    data: Pairs = ()  # NAME=DIR: where prompts come from; without it they are random tokens of the same lengths.
    peer: Pairs = ()  # NAME=PYTHON or NAME, repeatable: vllm, trl, transformers.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights; for trl bfloat16 is autocast over float32 weights, as its users run it. Rows say what a side does."""
    repeats: int = 3  # Turns of every side, after a short one that is not counted.
    threads: int = os.cpu_count() or 1  # OMP threads of every side.
    out: str = ""  # Also append the JSON lines to this file.
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Small work on an untaught model of the toy world's size, under a minute."""


class Side:
    """A process that does jobs when told, until `stack` is left: the end of its stdin is its own end."""

    def __init__(self, name: str, python: str, cfg: Settings, stack: ExitStack) -> None:
        """Start it and wait until it has opened the model."""
        threads = str(cfg.threads)
        places = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"} if cfg.threads > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **places}
        self.name = name
        self.log = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".log"))  # noqa: SIM115
        self.process = stack.enter_context(subprocess.Popen(
            [python, "-m", "tools.peers", name, str(Path(cfg.model).resolve()), cfg.dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, cwd=ROOT,
        ))  # fmt: skip
        self.versions = self.read()

    def read(self) -> dict[str, Any]:
        """The next line it says. Raises `UserError` where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} has ended: {last_line(Path(self.log.name))}")
        return dict(json.loads(line))

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job."""
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.read()


def prompts(work: Workload, cfg: Settings) -> list[list[int]]:
    """Prompts of the data nearest to the length; where they are far from it, seeded runs of tokens of several."""
    rng = random.Random(0)
    if not cfg.data:
        return [[rng.randrange(10, 600) for _ in range(work.prompt_tokens)] for _ in range(work.prompts)]
    tokenizer = load_tokenizer(cfg.model)
    found = [s for name, root in pairs("data", cfg.data).items() for s in data.read_samples(name, root, "train")]
    pool = [data.encode(tokenizer, s, data.DEFAULT)[0] for s in rng.sample(found, min(600, len(found)))]
    near = sorted(pool, key=lambda ids: abs(len(ids) - work.prompt_tokens))[: work.prompts]
    if len(near) == work.prompts and abs(len(near[-1]) - work.prompt_tokens) <= 0.1 * work.prompt_tokens:
        return near
    stream = [token for ids in pool for token in ids]
    starts = [rng.randrange(len(stream) - work.prompt_tokens) for _ in range(work.prompts)]
    return [stream[start : start + work.prompt_tokens] for start in starts]


def measure(work: Workload, cfg: Settings, opened: Sequence[Side], limits: Side) -> list[dict[str, Any]]:
    """One row per side. The sides take turns, so that a slow minute of the machine falls on all of them."""
    job = {**asdict(work), "prompts": prompts(work, cfg)}
    able = [side for side in opened if can(side.name, work)]
    for side in able:
        side.run({**job, "max_new_tokens": min(8, work.max_new_tokens)})
    turns = [[side.run(job) for side in (limits, *able)] for _ in range(cfg.repeats)]
    possible, *found = zip(*turns, strict=True)
    best = fastest(possible)
    if not able:
        return [{**about(limits, work, cfg), "limits": best}]
    rows = [row(side, work, cfg, times) for side, times in zip(able, found, strict=True)]
    bound = {"tokens_bound": round(tokens_bound([*map(len, job["prompts"])], work.n, work.max_new_tokens), 2)}
    more = bound if work.task == "step" else {}
    return [{**r, **ratios(rows[0], r), **shares(best, r), **more, "limits": best} for r in rows]


def fastest(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The limits over all turns: least seconds, most operations and bytes per second of each kind."""
    least: dict[str, Any] = {name: min(t[name] for t in turns) for name in TIMES if name in turns[0]}
    return {**least, **{kind: {k: max(t[kind][k] for t in turns) for k in turns[0][kind]} for kind in ("flops", "bytes")}}


def shares(possible: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Per cent of what is possible that a side reaches: the least seconds to its median ones."""
    both = [name for name in TIMES if name in possible and name in found]
    return {f"{name}_share": round(100 * possible[name] / statistics.median(found[name]), 1) for name in both}


def can(peer: str, work: Workload) -> bool:
    """Whether a side does such work: ours all but limits; steps are TRL's, rollouts the others', bytes have no other."""
    if peer == "selfemo" or work.task == "limits":
        return work.task != "limits"
    return (peer == "trl") == (work.task == "step") and not work.kv_mib


def row(side: Side, work: Workload, cfg: Settings, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of one side."""
    listed = {name: [round(f[name], 3) for f in found] for name in TIMES if name in found[0]}
    tokens, median = found[0]["tokens"], statistics.median(listed["seconds"])
    return {
        **about(side, work, cfg), "computes": found[0]["computes"], "tokens": tokens, **listed,
        "tokens_per_s": round(tokens / median, 1), "tokens_per_s_best": round(tokens / min(listed["seconds"]), 1),
        "sequences_per_s": round(work.prompts * work.n / median, 3), "peak_mib": round(max(f["peak_mib"] for f in found)),
    }  # fmt: skip


def about(side: Side, work: Workload, cfg: Settings) -> dict[str, Any]:
    """Who measured what, where and when. Load: jobs that wanted a core during the last minute, this one's too."""
    return {
        "workload": asdict(work), "side": side.name, "dtype": cfg.dtype, "threads": cfg.threads, "versions": side.versions,
        "hardware": hardware(), "load": round(os.getloadavg()[0], 1), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


TIMES = ("seconds", "cpu_s", "generate_s", "score_s", "update_s", "update_cpu_s")


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How many times longer a side takes than ours: medians, bests, CPU time, the update; and its memory to ours."""
    both = [name for name in TIMES if name in ours and name in theirs]
    found = {f"{name}_ratio": statistics.median(theirs[name]) / statistics.median(ours[name]) for name in both}
    found["best_ratio"] = min(theirs["seconds"]) / min(ours["seconds"])
    found["peak_ratio"] = theirs["peak_mib"] / ours["peak_mib"]
    return {name: round(value, 2) for name, value in found.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people. Ratios: the side's time (memory) over ours, so above 1 we are faster (smaller). % of what is possible."""
    ratio = {"x median": "seconds", "x best": "best", "x cpu": "cpu_s", "x update": "update_s", "x peak": "peak"}
    lines = [["workload", "side", "median s", "best s", "cpu s", "tokens/s", "peak MiB", *ratio, "x tokens", *SHARES]]
    for r in rows:
        seconds = statistics.median(r["seconds"]), min(r["seconds"]), statistics.median(r["cpu_s"])
        sizes = f"{r['tokens_per_s']:.1f}", f"{r['peak_mib']}"
        over = [f"{r[f'{name}_ratio']:.2f}" if f"{name}_ratio" in r else "—" for name in ratio.values()]
        bound = f"{r['tokens_bound']:.2f}" if r["side"] == "trl" else "—"
        reached = [next((f"{r[key]:.0f}" for key in keys if key in r), "—") for keys in SHARES.values()]
        side = f"{r['side']}, {r['computes']}"
        lines.append([r["workload"]["name"], side, *(f"{x:.2f}" for x in seconds), *sizes, *over, bound, *reached])
    return text(lines)


# Columns in per cent. A step is known by its parts; the share in CPU time is of its update, elsewhere of the rollout.
SHARES = {
    "% rollout": ("generate_s_share", "seconds_share"),
    "% update": ("update_s_share",),
    "% cpu": ("update_cpu_s_share", "cpu_s_share"),
}


def limits_table(found: Sequence[dict[str, Any]]) -> str:
    """The machine's own speed, for people: the best that was seen of each product and of each way to read."""
    lines = [["limits", "reached"]]
    for kind, unit in (("flops", "GFLOP/s"), ("bytes", "GB/s, memory")):
        for name in dict.fromkeys(name for f in found for name in f[kind]):
            lines.append([name, f"{max(f[kind].get(name, 0.0) for f in found) / 1e9:.1f} {unit}"])
    return text(lines)


def hardware() -> str:
    """Processor, its cores, and whether it computes in bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return f"{os.cpu_count()} cores, {facts.get('model name', platform.machine()).strip()}, {' '.join(wide)}"


def commit() -> str:
    """Of the working tree; with a plus where it is changed."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def chosen(cfg: Settings) -> list[Workload]:
    """The workloads by name. Raises `UserError` for an unknown one."""
    if cfg.quick:
        return list(QUICK)
    names = [name for given in cfg.workloads for name in ([w.name for w in GROWTH] if given == "growth" else [given])]
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise UserError(f"unknown workload {unknown[0]}: take growth or one of {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in names]


def bench(cfg: Settings) -> None:
    """Measure and print."""
    works, rows = chosen(cfg), list[dict[str, Any]]()
    with ExitStack() as stack:
        if not cfg.model:
            cfg = replace(cfg, model=f"{stack.enter_context(tempfile.TemporaryDirectory())}/base")
            base.untaught(Path(cfg.model))
        others = () if all(work.task == "limits" for work in works) else ("selfemo", *cfg.peer)
        peers = (entry.partition("=") for entry in ("limits", *others))
        limits, *sides = (Side(name, python or sys.executable, cfg, stack) for name, _, python in peers)
        for work in works:
            rows += (found := measure(work, cfg, sides, limits))
            print(jsonl(found), end="", flush=True)
            if cfg.out:
                with Path(cfg.out).open("a", encoding="utf-8") as file:
                    file.write(jsonl(found))
    print(limits_table([r["limits"] for r in rows]) + "\n")
    if timed := [r for r in rows if r["side"] != "limits"]:
        print(table(timed))


def main() -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    return command(lambda: bench(tyro.cli(Settings, use_underscores=True, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
