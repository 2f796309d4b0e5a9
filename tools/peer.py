"""What every side of a benchmark shares: jobs come as JSON lines on stdin, answers go as JSON lines to stdout.

Only the standard library, so that it runs in any interpreter. A side is started as `python -m tools.NAME MODEL DTYPE`.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]  # task, prompts (token ids), n, max_new_tokens, micro_batch
Found = dict[str, Any]  # seconds, tokens, and what else a side knows


def serve(packages: list[str], open_side: Callable[[str, str], Callable[[Job], Found]]) -> None:
    """Open the side (model folder, dtype), say which versions it has, then answer job after job until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    run = open_side(sys.argv[1], sys.argv[2])
    say(out, {name: version(name) for name in packages})
    for line in sys.stdin:
        forget_peak()
        started = time.process_time()
        found = run(json.loads(line))
        say(out, {"cpu_s": time.process_time() - started, **found, "peak_mib": peak_mib()})


def say(out: Any, record: Mapping[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(record), file=out, flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def forget_peak() -> None:
    """Let the kernel measure the peak of resident memory anew (Linux)."""
    with contextlib.suppress(OSError):  # the peak is then that of the whole life of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Most resident memory of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
