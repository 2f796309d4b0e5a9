"""Mistakes that would train on the wrong thing without a word: each is made in a copy of the tree, and a test must fail.

    python -m tests.mutants
    python -m tests.mutants D5 engine/cache.py --jobs 2 --json

mutants.toml, beside this file, has a row a mistake: one line of one file, and the tests that should notice it. They must
first pass on an unchanged copy. Then each mistake has a copy and a process of its own, forked from this one, which has
imported the slow libraries and nothing of ours. Exit status 1 if a mistake survives or can no longer be made.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import tyro

from common.errors import UserError, command

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-x", "-p", "no:cacheprovider", "-p", "no:anyio", "--basetemp", "temporary")  # anyio imports much, for nobody
CLUMSY = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError")  # these show a row that is wrong, not a test
Seen = list[tuple[str, str, str]]  # kind (passed failed skipped broken), node id, first line of the message


@dataclass(frozen=True)
class Mutants:
    """Make every mistake of mutants.toml in a copy of the tree, and see which test notices it."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only mistakes in whose file name or description one of these words occurs. Default: all."""
    jobs: int = 1
    """Mistakes tried at the same time."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """One JSON object instead of a table."""
    timeout: float = 120
    """Seconds after which tests count as hanging. A mistake that makes them hang is noticed, and shown as such."""
    file: Path = Path(__file__).with_suffix(".toml")
    """The mistakes. They are made in the tree that this file stands in, TREE/tests/mutants.toml."""


@dataclass(frozen=True)
class Mutation:
    """One mistake: of the lines `old`, which occur once in the file, one becomes another; `tests` are pytest's node ids."""

    file: str
    mistake: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> tuple[str, int]:
        """The file with the mistake, and the number of its line. Raises ValueError where it cannot be made."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"the line occurs {count} times in the file")
        pairs = zip(self.old.split("\n"), self.new.split("\n"), strict=True)
        changed = [i for i, (before, after) in enumerate(pairs) if before != after]
        if len(changed) != 1:
            raise ValueError(f"{len(changed)} lines change")
        return text.replace(self.old, self.new), text[: text.index(self.old)].count("\n") + changed[0] + 1


@dataclass(frozen=True)
class Verdict:
    """killed, timeout, SURVIVED, BROKEN (no test could judge it) or STALE (its line is gone); by which test, and why."""

    outcome: str
    mutation: Mutation
    line: int
    by: str
    why: str
    seconds: float

    def __str__(self) -> str:
        by, where = self.by if self.outcome == "killed" else f"{self.by} ({self.why})", f"{self.mutation.file}:{self.line}"
        return f"{self.outcome:9}{self.seconds:5.1f} s  {where:15} {self.mutation.mistake:66} {by.strip()}"


def read(path: Path) -> tuple[list[str], list[Mutation]]:
    """The libraries to import once, and the mistakes. Raises `UserError` for a file that cannot be read."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return content["preload"], [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in content["mutant"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; it has preload, and rows of file, mistake, old, new and tests") from None


@dataclass(eq=False)
class Recorder:
    """A pytest plugin that notes what tests did. Only what fails in a test itself, not before or after it, is `failed`."""

    seen: Seen = field(default_factory=list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test has ended, or a test file was read."""
        called = getattr(report, "when", "") == "call"
        if called or report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.partition("\n")[0] if crash else str(report.longrepr or "").strip().rpartition("\n")[2]
            own = called and not why.startswith(CLUMSY)
            self.seen.append((report.outcome if own else "broken", report.nodeid, why))

    pytest_collectreport = pytest_runtest_logreport


def run_tests(folder: Path, tests: Sequence[str]) -> None:
    """In a forked process: pytest on the copy; seen.json is what it did. Our own files make way for those of the copy."""
    os.setsid()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for name in [name for name, module in sys.modules.items() if ours(module) and name != "__main__"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    recorder = Recorder()
    status = pytest.main([*PYTEST, *tests], plugins=[recorder])
    if status > pytest.ExitCode.TESTS_FAILED and not recorder.seen:
        said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").partition("ERROR: ")[2]
        recorder.seen.append(("broken", "", f"pytest ended with {status} {' '.join(said.splitlines()[:1])}"))
    (folder / "seen.json").write_text(json.dumps(recorder.seen), encoding="utf-8")


def ours(module: Any) -> bool:
    """Whether a module is of this tree, and not a library of a virtual environment in it."""
    path = Path(getattr(module, "__file__", None) or "/")
    return ROOT in path.parents and "site-packages" not in path.parts


class Trial:
    """A copy of the tree, perhaps with a mistake in it, and the process that runs tests on it."""

    def __init__(self, source: Path, folder: Path, tests: Sequence[str], limit: float, **changed: str) -> None:
        """Start the tests. `changed`: the new texts of files."""
        self.folder, self.began, self.last = folder, time.monotonic(), time.monotonic() + limit
        shutil.copytree(source, folder)
        for file, text in changed.items():
            (folder / file).write_text(text, encoding="utf-8")
        self.process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        self.process.start()

    def end(self) -> Seen | None:
        """What the tests did; None if they hang. The processes, the tests' own too, and the copy are gone then."""
        self.process.join(max(0.0, self.last - time.monotonic()))
        hangs = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        path, ended = self.folder / "seen.json", f"the process ended with {self.process.exitcode}"
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else [("broken", "", ended)]
        shutil.rmtree(self.folder)
        return None if hangs else [(kind, test, why) for kind, test, why in seen]


def copy_tree(root: Path, target: Path) -> None:
    """What tests need of a tree: code, settings and documents at its top, tests/ and every room."""
    files = {p.name for p in root.iterdir() if p.suffix in (".py", ".toml", ".md", ".txt") or p.name == "LICENSE"}
    top = files | {"tests"} | {p.parent.name for p in root.glob("*/__init__.py")}
    shutil.copytree(root, target, ignore=lambda at, names: {*names} - top if Path(at) == root else {"__pycache__"})


def check_unchanged(source: Path, folder: Path, mutations: Sequence[Mutation], limit: float) -> int:
    """How many tests pass on the unchanged copy. Raises `UserError` unless all that rows name are there and pass."""
    named = list(dict.fromkeys(test for m in mutations for test in m.tests))
    seen = Trial(source, folder, named, limit).end()
    if seen is None:
        raise UserError(f"on the unchanged tree the tests take more than {limit:g} s: raise --timeout")
    if bad := [f"{test or 'the run'} fails: {why}" for kind, test, why in seen if kind in ("failed", "broken")]:
        raise UserError(f"nothing can be said, on the unchanged tree {bad[0]}")
    passed = [test for kind, test, _ in seen if kind == "passed"]
    if silent := [t for t in named if not any(p == t or p.startswith((f"{t}[", f"{t}::")) for p in passed)]:
        raise UserError(f"nothing of {silent[0]} passed on the unchanged tree (skipped, perhaps)")
    return len(passed)


def verdicts(source: Path, folder: Path, mutations: Sequence[Mutation], jobs: int, limit: float) -> Iterator[Verdict]:
    """Make every mistake, `jobs` at a time, and tell of each when it is decided."""
    waiting, running = deque(enumerate(mutations)), dict[Trial, tuple[Mutation, int]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, m = waiting.popleft()
            try:
                text, line = m.apply((source / m.file).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                yield Verdict("STALE", m, 0, "", str(error), 0.0)
                continue
            running[Trial(source, folder / f"{number}", m.tests, limit, **{m.file: text})] = (m, line)
        ended = wait([t.process.sentinel for t in running], min((t.last for t in running), default=0) - time.monotonic())
        for trial in [t for t in running if t.process.sentinel in ended or t.last < time.monotonic()]:
            m, line = running.pop(trial)
            yield judge(m, line, trial.end(), time.monotonic() - trial.began)


def judge(m: Mutation, line: int, seen: Seen | None, seconds: float) -> Verdict:
    """The verdict on a mistake from what the tests did; None: they hang."""
    if seen is None:
        return Verdict("timeout", m, line, " ".join(m.tests), "no end", seconds)
    outcomes = {"failed": "killed", "broken": "BROKEN"}
    kind, test, why = next((x for x in seen if x[0] in outcomes), ("", "", f"{len(seen)} tests ran"))
    return Verdict(outcomes.get(kind, "SURVIVED"), m, line, test, why, seconds)


def mutants(cfg: Mutants) -> bool:
    """Try and print; whether every mistake is noticed. Raises `UserError` where that cannot be said."""
    preload, rows = read(cfg.file)
    chosen = [m for m in rows if not cfg.words or any(w in m.file or w in m.mistake for w in cfg.words)]
    if not chosen:
        raise UserError(f"{cfg.file}: no mistake has {' or '.join(cfg.words) or 'a row'} in its file or description")
    began, table = time.monotonic(), sys.stderr if cfg.json else sys.stdout
    for name in preload:
        with contextlib.suppress(ImportError):  # the tests will say what is missing
            importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end: not among all of torch
    found = []
    with tempfile.TemporaryDirectory() as place:
        source, folder = Path(place) / "source", Path(place)
        copy_tree(cfg.file.resolve().parent.parent, source)
        passed = check_unchanged(source, folder / "unchanged", chosen, 10 * cfg.timeout)
        print(f"{passed} tests pass without a mistake, {time.monotonic() - began:.0f} s", file=table, flush=True)
        for verdict in verdicts(source, folder, chosen, cfg.jobs, cfg.timeout):
            found.append(verdict)
            print(verdict, file=table, flush=True)
    noticed, seconds = sum(v.outcome in ("killed", "timeout") for v in found), time.monotonic() - began
    print(f"{noticed} of {len(found)} mistakes are noticed, {seconds:.0f} s", file=table)
    if cfg.json:
        print(json.dumps({"noticed": noticed, "seconds": seconds, "mistakes": [asdict(v) for v in found]}))
    return noticed == len(found)


def main() -> int:
    """Exit status 1 if a mistake is not noticed; otherwise see `common.errors.command`."""
    return command(lambda: int(not mutants(tyro.cli(Mutants, use_underscores=True, description=__doc__))))


if __name__ == "__main__":
    sys.exit(main())
