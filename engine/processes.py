"""Many processes, one per GPU: who does what, and what they tell each other.

A process is called a rank, after its number. Every rank runs the same program on the same data and comes to the same
rewards, buffers and decisions; only rank 0 writes records. What the ranks divide are the prompts of a rollout and the
micro-batches of a forward. The results are the same whatever the number of ranks. Ranks talk through two libraries of
PyTorch: NCCL between GPUs, gloo between CPUs. Without torchrun, PyTorch's launcher, and without a GPU there is one process,
and every function here is the obvious one.
"""

import json
import os
import re
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.peers import watched

Value = TypeVar("Value")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes of the run, over all nodes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """`rank`, but known before the processes have met; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def launched_size() -> int:
    """`size`, but known before the processes have met; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_here() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device() -> torch.device:
    """The GPU of this process; the CPU where there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def computing(dtype: str) -> torch.dtype:
    """The type that --dtype names; `auto` is bf16, a 16-bit type, on a GPU and float32 on a CPU."""
    chosen: torch.dtype = getattr(torch, {"cuda": "bfloat16", "cpu": "float32"}[device().type] if dtype == "auto" else dtype)
    return chosen


@contextmanager
def processes(dtype: str = "auto") -> Iterator[None]:
    """Meet the other processes that torchrun started, and part at the end.

    One process in float32 on a CPU meets nobody. One process in bf16, or on a GPU, is a run of one rank and takes the same
    path as many ranks. Raises `PeerLost` where another rank is gone.
    """
    if "RANK" not in os.environ and not torch.cuda.is_available() and computing(dtype) == torch.float32:
        yield
        return
    if torch.cuda.is_available():
        grow_in_place()
        torch.cuda.set_device(device())
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # PyTorch's own calls are of yesterday
    alone: Any = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Ranks wait a day while one asks an expert: those waits are barriers and exchanges of gloo, as "cpu" stands first among
    # the backends. `device_id=` would make them NCCL's without a word.
    dist.init_process_group(backend, timeout=timedelta(days=1), **alone)
    if torch.cuda.is_available():
        limit_waits("cuda", NCCL_WAIT)
    try:
        with watched() if size() > 1 else nullcontext():
            yield
    except RuntimeError as error:  # gloo has no type of its own for it
        if size() > 1 and re.search(LOST, str(error)):
            raise PeerLost("another rank has ended") from error
        raise
    # After an error nobody parts: a rank that waits inside NCCL would keep the others from saying what happened.
    dist.barrier()
    dist.destroy_process_group()


NCCL_WAIT = timedelta(minutes=30)  # no rank is ever so far behind another on the GPU


def grow_in_place() -> None:
    """Let freed blocks of a GPU's memory grow, because a growing cache fits into none of them.

    Must be called before the GPU is first used.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def limit_waits(device_type: str, most: timedelta) -> None:
    """How long ranks wait for each other at most, in what they do on one type of device.

    Sets of ranks (PyTorch's process groups) that are made later inherit it.
    """
    dist.group.WORLD._get_backend(torch.device(device_type))._set_default_timeout(most)  # type: ignore[union-attr]


class PeerLost(Exception):
    """Another rank has ended, so this one cannot go on. That one has said why."""


LOST = r"(?i)connection (was )?(closed|reset|refused)|broken pipe|remote process exited|socket closed"


def announce(line: str) -> None:
    """Print a line for the person who watches: rank 0 does, the others do not."""
    if launched_rank() == 0:
        print(line, flush=True)


def complain(line: str, *, lost: bool = False) -> None:
    """Print an error on stderr, once though all ranks may have it: the launcher ends those that still wait to print.

    Rank 0 prints at once, the others after 2 s, in case rank 0 has the same error; a rank that only lost another after 10 s.
    """
    if "RANK" in os.environ:
        time.sleep(10 if lost else 2 if launched_rank() else 0)
        line = f"rank {launched_rank()}: {line}"
    print(line, file=sys.stderr, flush=True)


def relaunch(argv: Sequence[str]) -> str:
    """The command line that goes on with this run.

    It has a `--`, because torchrun would take our --n for the beginning of a flag of its own.
    """
    if launched_size() > ranks_here():
        return "the same torchrun command on every node, with --resume"
    program = ["python"] if "RANK" not in os.environ else ["torchrun", "--nproc_per_node", str(ranks_here()), "--"]
    return shlex.join([*program, "selfemo.py", *(a for a in argv if a != "--resume"), "--resume"])


def wait() -> None:
    """Wait until every rank is here."""
    if size() > 1:
        dist.barrier()


def exchange(value: Value) -> list[Value]:
    """What every rank gave, in the order of ranks. JSON values: floats come back bit by bit."""
    if size() == 1:
        return [value]
    sent_N = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(text_N.numpy().tobytes()) for text_N in exchanged(sent_N)]


def exchanged(x_N: Tensor) -> list[Tensor]:
    """The vector of every rank, in the order of ranks, in main memory; lengths may differ, and no bit changes."""
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(x_N)]))
    longest = max(int(n) for n in lengths)
    found = [x_N.new_zeros(longest) for _ in range(size())]
    dist.all_gather(found, torch.nn.functional.pad(x_N, (0, longest - len(x_N))))
    return [row_N[: int(n)] for row_N, n in zip(found, lengths, strict=True)]


def gathered(found: Mapping[int, Sequence[float]]) -> list[list[float]]:
    """Each rank gives some rows of numbers by index; every rank gets all rows, in the order of indices; float64, exact."""
    if size() == 1:
        return [list(found[i]) for i in sorted(found)]
    flat = [number for i, row in found.items() for number in (i, len(row), *row)]
    everything: dict[int, list[float]] = {}
    for part_N in exchanged(torch.tensor(flat, dtype=torch.float64)):
        numbers, at = part_N.tolist(), 0
        while at < len(numbers):
            start, end = at + 2, at + 2 + int(numbers[at + 1])
            everything[int(numbers[at])], at = numbers[start:end], end
    return [everything[i] for i in sorted(everything)]


def summed(x: Tensor) -> Tensor:
    """The sum of what all ranks hold. Where each fills rows of its own and leaves 0 elsewhere, that is all rows, exactly.

    On GPUs NCCL does it while Python goes on, so a rank that is gone shows only where the result is next read.
    """
    if size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(exchange(flag))


# Division of work


def divide(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices divided among ranks, which differ by one index at most, and by little in the sum of costs.

    The costliest are dealt first, like cards, from left to right and then from right to left. So at any time the ranks are
    busy with work of like cost.
    """
    if ranks == 1:
        return [list(range(len(costs)))]
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    rounds = [order[first : first + ranks] for first in range(0, len(order), ranks)]
    divided: list[list[int]] = [[] for _ in range(ranks)]
    for number, indices in enumerate(rounds):
        for who, i in zip(range(ranks) if number % 2 == 0 else reversed(range(ranks)), indices, strict=False):
            divided[who].append(i)
    return divided


def share(costs: Sequence[float]) -> list[int]:
    """Indices of the work that is this rank's."""
    return divide(costs, size())[rank()]


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine divided by the number of processes on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here()


def peak_memory() -> dict[str, float]:
    """Most GB in use so far: on a GPU by tensors, and as reserved by PyTorch; on a CPU by the whole process."""
    if device().type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory/peak_gb": peak / 1e9, "memory/reserved_gb": reserved / 1e9}
    return {"memory/peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def give_back_memory() -> None:
    """Return to the GPU the freed memory that PyTorch keeps, for NCCL and for the next phase, whose blocks differ."""
    if device().type == "cuda":
        torch.cuda.empty_cache()
