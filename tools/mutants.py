"""Mistakes that would train on the wrong thing without a word: each is made in a copy of the tree, and a test must fail.

    python -m tools.mutants
    python -m tools.mutants D5 cache.py --jobs 2 --json

mutants.toml, beside this file, has a row a mistake: one line of one file, and the tests that should notice it. The tests of
all rows must first pass on an unchanged copy. Then each mistake has a copy and a process of its own, forked from this one,
which has imported the slow libraries and nothing of the copy. Exit status 1 if a mistake survives or can no longer be made.
"""

import contextlib
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
from typing import Any, Literal

import pytest
import tyro

from data import UserError

ROOT = Path(__file__).resolve().parent.parent
TOP = {".py", ".toml", ".md", ".txt"}  # what a copy has of the files at the top; tests/ and tools/ come whole
CLUMSY = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError")  # these show a row that is wrong, not a test
PYTEST = ("-x", "-p", "no:cacheprovider", "--basetemp", "temporary")


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
    """The mistakes."""
    root: Path = ROOT
    """The tree in which they are made."""


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
    """What became of a mistake: `by` is the first test that failed, or hung, `why` the first line of its message."""

    outcome: Literal["killed", "timeout", "SURVIVED", "BROKEN", "STALE"]
    file: str
    line: int
    mistake: str
    by: str
    why: str
    seconds: float

    @property
    def noticed(self) -> bool:
        """Whether a test noticed it. BROKEN (no test ran to its end) and STALE (the line is gone) are no notice."""
        return self.outcome in ("killed", "timeout")


def read(path: Path) -> tuple[list[str], list[Mutation]]:
    """The libraries to import once, and the mistakes. Raises `UserError` for a file that cannot be read."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in content["mutant"]]
        return content["preload"], rows
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; a row has file, mistake, old, new and tests, the file begins with preload") from None


# One process


@dataclass(eq=False)  # pytest wants its plugins hashable
class Report:
    """A pytest plugin: node ids that passed; (node id, first line of the message) of tests that failed, and of all else."""

    passed: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test has ended."""
        if report.failed:
            message = first_line(report)
            own = report.when == "call" and not message.startswith(CLUMSY)
            (self.failed if own else self.broken).append((report.nodeid, message))
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        """A test file was read."""
        if report.failed:
            self.broken.append((report.nodeid, first_line(report)))


def first_line(report: Any) -> str:
    """Of what pytest says about a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = crash.message.splitlines() if crash else str(report.longrepr).splitlines()[-1:]
    return str(next(iter(lines), ""))


def run_tests(folder: Path, tests: Sequence[str]) -> None:
    """In a forked process: pytest on the copy, report.json in it. This program's own files make way for those of the copy."""
    os.setsid()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tools"):
            del sys.modules[name]
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    report = Report()
    status = pytest.main([*PYTEST, *tests], plugins=[report])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not report.broken:
        report.broken.append(("", f"pytest ended with {status}: {' '.join(tests)}"))
    Path("report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")


class Trial:
    """A copy of the tree, perhaps with a mistake in it, and the process that runs tests on it."""

    def __init__(self, source: Path, folder: Path, tests: Sequence[str], limit: float, changed: tuple[str, str] = ("", "")):
        """Start the tests. `changed`: a file and its new text."""
        self.folder, self.limit, self.began = folder, limit, time.monotonic()
        shutil.copytree(source, folder)
        if changed[0]:
            (folder / changed[0]).write_text(changed[1], encoding="utf-8")
        self.process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        self.process.start()

    @property
    def left(self) -> float:
        """Seconds until it counts as hanging."""
        return max(0.0, self.began + self.limit - time.monotonic())

    def end(self) -> Report | None:
        """What it found; None if it hangs. Its processes, its own children too, and its copy are gone then."""
        self.process.join(self.left)
        hangs = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        found, said = self.folder / "report.json", self.folder / "said.txt"
        report = Report(**json.loads(found.read_text(encoding="utf-8"))) if found.exists() else Report()
        if not hangs and not found.exists():
            last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if said.exists() else []
            report.broken.append(("", f"the process ended with {self.process.exitcode}: {' '.join(last)}"))
        shutil.rmtree(self.folder)
        return None if hangs else report


# All of them


def copy_tree(root: Path, target: Path) -> None:
    """What tests need of a tree: the files at its top, tests/ and tools/."""
    target.mkdir()
    for path in root.iterdir():
        if path.is_file() and path.suffix in TOP:
            shutil.copy2(path, target)
    for name in ("tests", "tools"):
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def check_unchanged(source: Path, folder: Path, mutations: Sequence[Mutation], limit: float) -> int:
    """How many tests pass on the unchanged copy. Raises `UserError` unless all that rows name are there and pass."""
    named = list(dict.fromkeys(test for m in mutations for test in m.tests))
    report = Trial(source, folder, named, limit).end()
    if report is None:
        raise UserError(f"on the unchanged tree the tests take more than {limit:g} s: raise --timeout")
    for test, why in report.failed + report.broken:
        raise UserError(f"on the unchanged tree {test or 'the run'} fails, so nothing can be said: {why}")
    silent = [t for t in named if not any(p == t or p.startswith((f"{t}[", f"{t}::")) for p in report.passed)]
    if silent:
        raise UserError(f"{', '.join(silent)}: no such test passed on the unchanged tree (skipped, perhaps)")
    return len(report.passed)


def verdicts(source: Path, folder: Path, mutations: Sequence[Mutation], jobs: int, limit: float) -> Iterator[Verdict]:
    """Make every mistake, `jobs` at a time, and tell of each when it is decided."""
    waiting, running = deque(enumerate(mutations)), dict[Trial, tuple[Mutation, int]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, m = waiting.popleft()
            try:
                text, line = m.apply((source / m.file).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                yield Verdict("STALE", m.file, 0, m.mistake, "", str(error), 0.0)
                continue
            running[Trial(source, folder / str(number), m.tests, limit, (m.file, text))] = (m, line)
        ended = wait([t.process.sentinel for t in running], min((t.left for t in running), default=0.0))
        for trial in [t for t in running if t.process.sentinel in ended or not t.left]:
            (m, line), seconds = running.pop(trial), time.monotonic() - trial.began
            yield verdict(m, line, trial.end(), seconds)


def verdict(m: Mutation, line: int, report: Report | None, seconds: float) -> Verdict:
    """From what the tests said; None: they hang."""
    if report is None:
        return Verdict("timeout", m.file, line, m.mistake, " ".join(m.tests), f"no end after {seconds:.0f} s", seconds)
    for outcome, found in (("killed", report.failed), ("BROKEN", report.broken)):
        if found:
            return Verdict(outcome, m.file, line, m.mistake, *found[0], seconds)  # type: ignore[arg-type]
    return Verdict("SURVIVED", m.file, line, m.mistake, "", f"{len(report.passed)} tests passed", seconds)


def row(v: Verdict) -> str:
    """A line of the table."""
    by = v.by if v.outcome == "killed" else f"{v.by} ({v.why})".strip()
    return f"{v.outcome:9}{v.seconds:6.1f} s  {f'{v.file}:{v.line}':16} {v.mistake:70} {by}"


def mutants(cfg: Mutants) -> bool:
    """Try and print; whether every mistake is noticed. Raises `UserError` where that cannot be said."""
    preload, everything = read(cfg.file)
    chosen = [m for m in everything if not cfg.words or any(w in m.file or w in m.mistake for w in cfg.words)]
    if not chosen:
        raise UserError(f"no mistake has {' or '.join(cfg.words) or 'a row'} in its file or description")
    began = time.monotonic()
    for name in preload:
        with contextlib.suppress(ImportError):  # the tests will say what is missing
            importlib.import_module(name)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = Path(temporary) / "source", Path(temporary)
        copy_tree(cfg.root, source)
        passed = check_unchanged(source, folder / "unchanged", chosen, 10 * cfg.timeout)
        if not cfg.json:
            print(f"{passed} tests pass on the unchanged tree, {time.monotonic() - began:.0f} s", flush=True)
        for v in verdicts(source, folder, chosen, cfg.jobs, cfg.timeout):
            found.append(v)
            if not cfg.json:
                print(row(v), flush=True)
    seconds = round(time.monotonic() - began, 1)
    noticed = sum(v.noticed for v in found)
    if cfg.json:
        print(json.dumps({"noticed": noticed, "seconds": seconds, "mistakes": [asdict(v) for v in found]}))
    else:
        print(f"{noticed} of {len(found)} mistakes are noticed, {seconds:.0f} s")
    return noticed == len(found)


def main() -> int:
    """Exit status 1 if a mistake is not noticed, 2 for a user's mistake."""
    try:
        return 0 if mutants(tyro.cli(Mutants, use_underscores=True, description=__doc__)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
