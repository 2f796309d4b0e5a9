"""A run folder: what a run writes, so that nothing is lost whatever happens, and how it goes on.

    config.json          the settings, the schedule (S steps per iteration, T in all), versions
    metrics.jsonl        a line per step, end of a stage and evaluation
    rollouts/            iteration-K.jsonl, a line per group: all that an audit needs
    evaluations/         iteration-K.jsonl, a line per answer of every evaluation
    buffer.jsonl         a line a kept answer and the new sample made of it, in the order of the steps
    cold_start.jsonl     the answers of the cold start; cold_start/, the weights after it; cold_start.parts/ until then
    selfemo_test.jsonl   the frozen SELF-EMO test split (D23)
    checkpoints/         the newest complete one; model/, the result as an ordinary Hugging Face folder

Every random draw of a run is a hash of seed and place (common/draws.py), so the position in the run IS the
state of its random numbers. Files that grow are cut back to the checkpoint's offsets on resume, if what is left has the
SHA-256 that the checkpoint knows.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import files
from common.errors import UserError, tell
from common.files import SUMS, Record, hash_of, jsonl, listed, read_json, read_lines, sha256, sync, unlike, write_atomically
from engine.processes import any_rank, exchange, rank, wait
from engine.shards import intact, load_moments, moments, read_part, save_parts, weights
from model import Policy
from training.config import Config

LOCK = "lock"  # a file that is there while a job works on the run
ONCE = ("config.json", "cold_start.jsonl", "selfemo_test.jsonl")  # files that never change once they are there


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""


@dataclass(frozen=True)
class Position:
    """How far a run has come: `stage` 0 cold start, 2k-1 RL and 2k SFT of iteration k; `step` steps of it are done.

    `updates` counts optimizer steps since the start: the version of the weights.
    """

    stage: int = 0
    step: int = 0
    updates: int = 0


def made_once(path: Path, make: Callable[[], str]) -> list[Record]:
    """The records of a file that is made once in a run, from the text that `make` gives. Only rank 0 reads and writes."""
    if not exchange(path.exists())[0]:
        text = make()
        if rank() == 0:
            write_atomically(path, text)
    return exchange(read_lines(path) if rank() == 0 else [])[0]


class Run:
    """The folder of one run. Use `open_run`."""

    def __init__(self, out: Path, settings: Record, state: Mapping[str, Any] | None = None) -> None:
        """Go on from the state of a checkpoint, the growing files cut back to its offsets, or start.

        Raises `UserError` where a file is not what the checkpoint knows of it.
        """
        state = state or {"position": {}, "offsets": {}, "sums": {}}
        self.out, self.settings, self.position = out, settings, Position(**state["position"])
        self.offsets: dict[str, int] = dict(state["offsets"])
        self.sums: dict[str, str] = dict(state["sums"])  # of files that never change
        if bad := exchange(changed_files(out, state) if rank() == 0 else [])[0]:
            raise UserError(f"{bad[0]}; restore it, or start again with another --out")
        self.hashes = {name: hash_of(out / name, n) for name, n in self.offsets.items()} if rank() == 0 else {}
        self.begin_step()
        self.loaded = newest_checkpoint(out)
        self.stop_asked = False
        self.notes: Record = {}
        self.learner: Learner | None = None
        self.board = tensorboard(out) if rank() == 0 else None
        self.started = time.monotonic()
        parts = [path for room in ("rollouts", "evaluations") for path in (out / room).glob("*.jsonl")]
        for path in [out / "metrics.jsonl", out / "buffer.jsonl", *parts]:
            if rank() == 0 and path.exists():
                os.truncate(path, self.offsets.get(str(path.relative_to(out)), 0))
        wait()

    def append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to a growing file of the run; rank 0 does."""
        if rank() > 0:
            return
        path, text = self.out / name, jsonl(records).encode()
        path.parent.mkdir(exist_ok=True)
        with files.named(path), path.open("ab") as file:
            file.write(text)
        self.offsets[name] = path.stat().st_size
        self.hashes.setdefault(name, hashlib.sha256()).update(text)

    def log(self, phase: str, iteration: int, metrics: Mapping[str, Any], step: int) -> Record:
        """One line of metrics.jsonl (and TensorBoard where it is installed): the metrics and what was noted before."""
        metrics, self.notes = {**metrics, **self.notes}, {}
        self.append("metrics.jsonl", [{"step": step, "iteration": iteration, "phase": phase, **metrics}])
        if self.board is not None:
            stage = f"sft-{iteration}/" if phase == "sft" else ""  # its steps begin at 0 in every stage
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(stage + name, value, step)
        return dict(metrics)

    def note(self, values: Mapping[str, Any]) -> None:
        """Measurements that belong to the next line of metrics.jsonl."""
        self.notes |= values

    def say(self, line: str) -> None:
        """A line for the person who watches, with the time since the start."""
        if rank() == 0:
            print(f"[{time.monotonic() - self.started:6.1f} s] {line}", flush=True)

    def rescue(self, policy: Policy) -> None:
        """Save where the run stands in the middle of a step, after a NaN or a signal: the step is done again on resume.

        What it has written since, an evaluation before it, is taken back. Not in the first step of a stage: it begins again
        from the checkpoint that the stage before it left.
        """
        if self.learner is not None and self.position.step > 0:
            offsets, hashes = self.begun
            for name in self.offsets:
                os.truncate(self.out / name, offsets.get(name, 0))
            self.offsets, self.hashes = dict(offsets), dict(hashes)
            save_checkpoint(self, saved_tensors(policy, self.learner))

    def begin_step(self) -> None:
        """Remember what the files hold, for `rescue`."""
        self.begun = dict(self.offsets), {name: found.copy() for name, found in self.hashes.items()}

    def pause(self, policy: Policy) -> None:
        """A place inside a long step where a signal is looked at. Every rank must call this. Raises `Stopped`."""
        if any_rank(self.stop_asked):
            self.rescue(policy)
            raise Stopped

    def count_update(self) -> None:
        """An optimizer step was made."""
        self.position = replace(self.position, updates=self.position.updates + 1)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the run to save and stop after this step or at a `pause`; a second one stops it at once."""

        def ask(number: int, frame: object) -> None:
            launched = "RANK" in os.environ  # torchrun passes on what the scheduler sends to all: twice is not a person
            if self.stop_asked and not launched:
                raise KeyboardInterrupt
            if rank() == 0 and not self.stop_asked:
                more = "" if launched else "; once more to stop at once"
                tell(f"\nsaving after this step{more}")
            self.stop_asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other jobs away from a run folder for the length of a call. Raises `UserError` where one is at work on it."""
    with ExitStack() as stack:
        refused = None
        if rank() == 0 and (not out.exists() or (out.is_dir() and os.access(out, os.W_OK))):
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((out / LOCK).open("ab"))
            try:
                files.lock(file, f"another job works on {out}: wait for it, or give another --out")
                stack.callback((out / LOCK).unlink, missing_ok=True)
            except UserError as error:
                refused = str(error)
        if refused := exchange(refused)[0]:
            raise UserError(refused)
        yield


def open_run(
    out: Path, settings: Record, *, resume: bool, may_differ: frozenset[str],
    check: Callable[[Path, Record], None] = lambda out, known: None,
) -> Run:  # fmt: skip
    """Start a run in an empty folder, or go on from its newest checkpoint.

    Raises `UserError` if the folder holds a run and `resume` is not set, if settings that change results differ, and what
    `check` raises for the folder and the settings of a run that would go on. Until then nothing is changed.
    """
    config = out / "config.json"
    others = out.exists() and set(os.listdir(out)) - {LOCK}
    found = exchange("run" if config.exists() else "else" if others else "nothing")[0]
    if found == "run" and not os.access(out, os.W_OK):
        raise UserError(f"{out} is read-only: make it writable, or copy it and give the copy as --out")
    if found == "else":
        raise UserError(f"{out} is not empty and holds no run: give another --out")
    if found == "nothing":
        if rank() == 0:
            write_atomically(config, json.dumps(settings, indent=1) + "\n")
        return Run(out, settings)
    if not resume:
        raise UserError(f"{out} holds a run already: add --resume to go on with it, or give another --out")
    # An earlier version had fewer settings: its runs are as the defaults say. It kept no date: `check` compares prompts.
    defaults = {f.name: f.default for f in fields(Config) if f.name in settings}
    known = {**json.loads(json.dumps(defaults)), "date": settings.get("date"), **read_json(config)}
    changed = [k for k in {**known, **settings} if k not in may_differ and known.get(k) != settings.get(k)]
    if changed:
        pairs = ", ".join(f"{k} was {known.get(k)!r}, is {settings.get(k)!r}" for k in changed)
        raise UserError(f"{out} was started with other settings ({pairs}): use those, or give another --out")
    check(out, known)
    checkpoint = newest_checkpoint(out)
    if checkpoint is None:
        if any(path.stat().st_size for path in [*out.glob("rollouts/*.jsonl"), *out.glob("buffer.jsonl")]):
            raise UserError(f"{out} holds rollouts and no checkpoint: restore {out / 'checkpoints'}, or give another --out")
        return Run(out, settings)
    return Run(out, settings, read_json(intact(checkpoint) / "state.json"))


def changed_files(out: Path, state: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files that the state of a checkpoint knows, one line per file."""
    found = []
    for name, expected in state["sums"].items():
        size = state["offsets"].get(name)
        try:
            same = sha256(out / name, size) == expected
        except OSError as error:
            found.append(f"cannot read {out / name}: {error.strerror or error}")
        else:
            found += [] if same else [f"{out / name} is not what the run wrote (SHA-256)"]
    return found


def damage(out: Path) -> list[str] | None:
    """What is wrong with the files of a run, as far as its newest checkpoint knows them; None without one that knows."""
    checkpoint = newest_checkpoint(out)
    if checkpoint is None or not (checkpoint / SUMS).exists():
        return None
    if unlike(checkpoint, listed(checkpoint), ["state.json"]):
        return [f"{checkpoint / 'state.json'} is not what was written (SHA-256)"]
    return changed_files(out, read_json(checkpoint / "state.json"))


def undamaged(out: Path) -> Path:
    """The folder of a run, unless `damage` finds any. Raises `UserError`."""
    if found := damage(out):
        raise UserError(f"{found[0]}: restore it; what one reads here would never have been")
    return out


def tensorboard(out: Path) -> Any:
    """A TensorBoard writer, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))  # type: ignore[no-untyped-call]


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint that is furthest, if there is one. Only a rename makes a folder complete."""
    found = [p for p in (out / "checkpoints").glob("[0-9]*") if p.is_dir() and re.fullmatch(r"[0-9]+(-[0-9]+){2}", p.name)]
    return max(found, key=lambda p: tuple(map(int, p.name.split("-"))), default=None)


def save_checkpoint(run: Run, tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write weights, reference and moments and the position; the older checkpoint goes. Every rank must call this."""
    folder = run.out / "checkpoints"
    target = folder / "{stage:03d}-{step:06d}-{updates:08d}".format(**asdict(run.position))
    if exchange(target.exists())[0]:
        return target  # the same weights: never touch a complete checkpoint
    run.sums |= {name: sha256(run.out / name) for name in ONCE if name not in run.sums and (run.out / name).exists()}
    sums = {**run.sums, **{name: found.hexdigest() for name, found in run.hashes.items()}}
    state = {"position": asdict(run.position), "offsets": run.offsets, "sums": sums, "settings": run.settings}
    for grown in run.offsets:
        sync(run.out / grown)
    save_parts(target, tensors, state)
    if rank() == 0:
        for old in folder.iterdir():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    return target


@dataclass(frozen=True)
class Learner:
    """What a stage learns with: a fresh AdamW (D26) and, in an RL stage, the frozen reference of the KL (D6)."""

    optimizer: torch.optim.Optimizer
    reference: Policy | None

    def apply(self) -> None:
        """One optimizer step; the next rollout gets the gradients' memory."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def stage_steps(
    run: Run, policy: Policy, stage: int, total: int, make: Callable[[], Learner], save_every: int
) -> Iterator[tuple[int, Learner]]:
    """The steps of a stage that are still to be done: 0..total-1, or from where a resumed run stands, or none.

    When the caller asks for the next step, the last one is done: the position moves on, and a checkpoint is written if it
    is due (every `save_every` steps, at the end of the stage, on a signal). Raises `Stopped` after a signal.
    """
    if run.position.stage > stage:
        return
    learner = make()
    if run.position.step and run.loaded is not None:
        restore(run.loaded, policy, learner)
    run.learner = learner
    for step in range(run.position.step, total):
        run.begin_step()
        yield step, learner
        run.position = replace(run.position, step=step + 1)
        stop = any_rank(run.stop_asked)
        if stop or (step + 1) % save_every == 0:
            save_checkpoint(run, saved_tensors(policy, learner))
        if stop:
            raise Stopped
    run.position, run.learner = replace(run.position, stage=stage + 1, step=0), None
    save_checkpoint(run, {"weights": weights(policy)})
    if any_rank(run.stop_asked):
        raise Stopped


def saved_tensors(policy: Policy, learner: Learner) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint inside a stage holds."""
    parts: dict[str, Mapping[str, Tensor]] = {"weights": weights(policy), "moments": moments(policy, learner.optimizer)}
    return parts if learner.reference is None else {**parts, "reference": weights(learner.reference)}


def restore(checkpoint: Path, policy: Policy, learner: Learner) -> None:
    """The stage's optimizer and reference as they were saved (the policy itself was read when the run was opened)."""
    load_moments(policy, learner.optimizer, checkpoint)
    if learner.reference is not None:
        read_part(checkpoint, "reference", weights(learner.reference))
