"""Which claims about GPUs hold: one command, one NVIDIA GPU, ten minutes, no network.

    python -m tools.accept                    a table, and the same in accept.json
    python -m tools.accept --only cascade     one check; may be repeated
    python -m tools.accept --cpu              the same lines in small on a CPU, in a minute

Every check runs in a process of its own, with a limit of time: one that crashes, hangs or ruins its CUDA context is a row
that FAILED, and the others go on. Exit status 0: nothing failed; 1: something did.
"""

import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro

from common.errors import UserError, command
from common.files import write_atomically
from common.hub import quiet_transformers
from engine.processes import grow_in_place
from tools import checks, decoding, trials
from tools.bench import commit, hardware
from tools.checks import Row


@dataclass(frozen=True)
class Check:
    """Yields rows when it is given a device; `limit` in seconds. A CPU, which may be busy, has three times that."""

    work: Callable[[torch.device], Iterator[Row]]
    limit: float


CHECKS: Mapping[str, Check] = {  # 590 s in all
    "cascade": Check(checks.cascade, 45),
    "head": Check(checks.head, 20),
    "draws": Check(checks.draws, 20),
    "sampler": Check(decoding.sampler, 30),
    "graphs": Check(decoding.graphs, 25),
    "ranks": Check(trials.ranks, 95),
    "plan": Check(trials.plan, 60),
    "run": Check(trials.run, 130),
    "pace": Check(decoding.pace, 165),
}


@dataclass(frozen=True)
class Accept:
    """Print which claims about GPUs hold, with the expected and the measured value of each."""

    cpu: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run the checks in small on the CPU, with stand-ins; skips what means nothing there."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A check, repeatable: cascade, head, draws, sampler, graphs, ranks, plan, run or pace. Default: all."""
    out: str = "accept.json"  # The same table as JSON; what checks print beside it is in a .log of the same name.


@dataclass(frozen=True)
class Finding:
    """A row of the table: of which check, and the seconds that it took."""

    check: str
    row: Row
    seconds: float

    @property
    def line(self) -> str:
        """As it is printed."""
        r = self.row
        cells = f"{self.check:8} {r.what:64} {r.expected:>15} {r.measured:>12} {self.seconds:7.1f}  {r.verdict:8}"
        return f"{cells}{r.note}".rstrip()


HEAD = f"{'check':8} {'what':64} {'expected':>15} {'measured':>12} {'seconds':>7}  verdict"


# One check in a process of its own


def findings(name: str, check: Check, cpu: bool, log: Path) -> Iterator[Finding]:
    """The rows of a check as it finds them, and one that FAILED where it did not end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.trials"])  # imported once; nothing there touches CUDA
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(check.work, cpu, str(log), theirs))
    process.start()
    theirs.close()
    began = before = time.monotonic()
    limit, trouble = check.limit * (3 if cpu else 1), ""
    try:
        while not trouble:
            if not ours.poll(max(0.0, began + limit - time.monotonic())):
                trouble = f"not done after {limit:g} s"
                break
            row, before, last = ours.recv(), time.monotonic(), before
            yield Finding(name, row, before - last)
    except EOFError:
        process.join()
        trouble = ended(process.exitcode)
    finally:
        end(process)
    if trouble:
        yield Finding(name, Row("ends well", "", "", "FAILED", trouble), time.monotonic() - before)


def ended(status: int | None) -> str:
    """What an exit status says of a process that said nothing; "" of a good end or one that it has spoken of."""
    if not status or status == SPOKEN:
        return ""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def end(process: Any) -> None:
    """Kill a check and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it is gone, or has not yet a group of its own
        process.kill()
    process.join()


SPOKEN = 70  # exit status of a check whose last row tells its error


def work(check: Callable[[torch.device], Iterator[Row]], cpu: bool, log: str, pipe: Connection) -> None:
    """In the process: send the rows; an error is the last one, and stands in the log as a whole."""
    os.setsid()
    with Path(log).open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    else:
        grow_in_place()
    quiet_transformers()
    try:
        for row in check(torch.device("cpu") if cpu else torch.device("cuda", 0)):
            pipe.send(row)
    except BaseException as error:
        traceback.print_exc()
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        pipe.send(Row("ends well", "", "", "FAILED", last))
        os._exit(SPOKEN)


# The table


def about(cpu: bool) -> dict[str, Any]:
    """Date, machine, versions."""
    gpu = "no GPU used" if cpu else torch.cuda.get_device_name(0)
    found = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "hardware": f"{gpu}; {hardware()}"}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda or "none"}
    return {**found, "python": platform.python_version(), "commit": commit()}


def accept(args: Accept, known: Mapping[str, Check] = CHECKS) -> int:
    """Run the checks and print the table. 0: nothing failed; 1: something did."""
    if unknown := [name for name in args.only if name not in known]:
        raise UserError(f"--only {unknown[0]}: no such check; take one or more of {', '.join(known)}")
    if not args.cpu and not torch.cuda.is_available():
        raise UserError("no GPU that PyTorch can use: give --cpu for the same checks in small")
    out, head, rows = Path(args.out), about(args.cpu), list[Finding]()
    log = out.with_suffix(".log")
    write(out, head, rows)
    log.write_text("", encoding="utf-8")
    print("\n".join([*(f"{name}: {value}" for name, value in head.items()), "", HEAD]), flush=True)
    for name in args.only or known:
        for finding in findings(name, known[name], args.cpu, log):
            rows.append(finding)
            print(finding.line, flush=True)
        write(out, head, rows)
    verdicts = [finding.row.verdict for finding in rows]
    failed = verdicts.count("FAILED")
    print(f"\n{verdicts.count('ok')} ok, {failed} FAILED, {verdicts.count('skipped')} skipped; {out}, {log}")
    return 1 if failed else 0


def write(out: Path, head: Mapping[str, Any], rows: list[Finding]) -> None:
    """The table so far as JSON."""
    listed = [{"check": f.check, **asdict(f.row), "seconds": round(f.seconds, 1)} for f in rows]
    write_atomically(out, json.dumps({**head, "rows": listed}, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    return command(lambda: accept(tyro.cli(Accept, use_underscores=True, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
