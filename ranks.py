"""Many processes, one a GPU: who does what, weights in shards (FSDP2), whole weights for sampling. Off the reading path.

    torchrun --nproc_per_node 8 selfemo.py

Every rank runs the same program on the same data and comes to the same rewards, buffers and decisions; only rank 0 writes
records. Three things are divided: the prompts of a rollout, the micro-batches of a forward, and the rows of every weight.
What they give is the same whatever the number of ranks. Without torchrun and without a GPU there is one process, nothing
is sharded, and every function here is the obvious one.

Shapes: as in model.py. R ranks that share the weights (all of them, or those of one node), C rows a rank of a weight.
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
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from model import ATTENTION, Policy, attention

Value = TypeVar("Value")


# Processes


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes of the run, over all nodes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """`rank`, known before the processes have met; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def launched_size() -> int:
    """`size`, known before the processes have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def ranks_here() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device() -> torch.device:
    """The GPU of this process; the CPU where there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def processes() -> Iterator[None]:
    """Meet the other processes that torchrun started, and part at the end. One process on a CPU meets nobody.

    One process on a GPU is a run of one rank, so that it computes in bf16 on the same path as many do. Raises `PeerLost`
    where another rank is gone.
    """
    if "RANK" not in os.environ and not torch.cuda.is_available():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    alone: Any = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1), **alone)  # ranks wait while one asks an expert
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own for it
        if size() > 1 and re.search(LOST, str(error)):
            raise PeerLost("another rank has ended") from error
        raise
    # After an error nobody parts: a rank that waits inside NCCL would keep the others from saying what happened.
    dist.barrier()
    dist.destroy_process_group()


class PeerLost(Exception):
    """Another rank has ended, so this one cannot go on. That one has said why."""


LOST = r"(?i)connection (was )?(closed|reset|refused)|broken pipe|remote process exited|socket closed"


def announce(line: str) -> None:
    """A line for the person who watches: once, not once a rank."""
    if launched_rank() == 0:
        print(line, flush=True)


def complain(line: str, *, lost: bool = False) -> None:
    """An error on stderr, heard once: the launcher ends the other ranks while they wait with theirs.

    Rank 0 speaks at once, the others after 2 s, in case rank 0 fails alike; those that only lost a rank after 10 s.
    """
    if "RANK" in os.environ:
        time.sleep(10 if lost else 2 if launched_rank() else 0)
        line = f"rank {launched_rank()}: {line}"
    print(line, file=sys.stderr, flush=True)


def relaunch(argv: Sequence[str]) -> str:
    """The command line that goes on with this run. `--`: torchrun would take --n for the beginning of a flag of its own."""
    if launched_size() > ranks_here():
        return "the same torchrun command on every node, with --resume"
    program = ["python"] if "RANK" not in os.environ else ["torchrun", "--nproc_per_node", str(ranks_here()), "--"]
    return shlex.join([*program, "selfemo.py", *(a for a in argv if a != "--resume"), "--resume"])


def wait() -> None:
    """Until every rank is here."""
    if size() > 1:
        dist.barrier()


def exchange(value: Value) -> list[Value]:
    """What every rank gave, in the order of ranks. JSON values: floats come back bit by bit."""
    if size() == 1:
        return [value]
    sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(sent)]))
    longest = max(int(n) for n in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(texts, torch.nn.functional.pad(sent, (0, longest - len(sent))))
    return [json.loads(text[: int(n)].numpy().tobytes()) for text, n in zip(texts, lengths, strict=True)]


def gathered(found: Mapping[int, Value]) -> list[Value]:
    """Values by index, of which each rank has some, as one list on every rank."""
    if size() == 1:
        return [found[i] for i in sorted(found)]
    everything = {int(i): value for part in exchange({str(i): v for i, v in found.items()}) for i, value in part.items()}
    return [everything[i] for i in sorted(everything)]


def any_rank(flag: bool) -> bool:
    """Whether any rank says so."""
    return any(exchange(flag))


# Division of work


def deal(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Indices dealt to `hands` ranks by cost: counts differ by one at most, sums by little, rounds are alike.

    The costliest go first, in turns from left to right and from right to left.
    """
    if hands == 1:
        return [list(range(len(costs)))]
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    rounds = [order[first : first + hands] for first in range(0, len(order), hands)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for number, cards in enumerate(rounds):
        for hand, card in zip(range(hands) if number % 2 == 0 else reversed(range(hands)), cards, strict=False):
            dealt[hand].append(card)
    return dealt


def share(costs: Sequence[float]) -> list[int]:
    """Indices of the work that is this rank's."""
    return deal(costs, size())[rank()]


def turns(costs: Sequence[float]) -> Iterator[tuple[int, float]]:
    """(index, scale) of the micro-batches that this rank computes: all ranks take the same number of turns, or they hang.

    Multiply the loss by `scale`: the number of ranks, because FSDP averages gradients over them; 0 where a rank short of
    work repeats the cheapest micro-batch to keep in step.
    """
    dealt = deal(costs, size())
    idle = min(range(len(costs)), key=lambda i: costs[i])
    own = dealt[rank()]
    for turn in range(max(map(len, dealt))):
        yield (own[turn], float(size())) if turn < len(own) else (idle, 0.0)


# Weights in shards


class ShardedPolicy(Policy):
    """A policy whose weights are spread over the ranks by rows (FSDP2), stored in one type and computed in another.

    `whole` holds the policy that samples: all weights in the computing type, on every rank. See `sharded`.
    """

    settings: Mapping[str, Any]
    whole: tuple[Policy, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where it computes; the weights of an offloaded one lie in main memory."""
        where: torch.device = self.settings["where"]
        return where

    @torch.no_grad()
    def sampler(self) -> Policy:
        """All weights, gathered anew from the shards: never those of an earlier update. Every rank must call this."""
        if not self.whole:
            self.whole = (empty(self.lm.config, self.settings["compute"], self.device, like=self),)
            self.whole[0].lm.generation_config = self.lm.generation_config
        for own, part in zip(self.whole[0].parameters(), self.parameters(), strict=True):
            own.copy_(full(part.detach().to(own.dtype)))
        return self.whole[0]

    @torch.no_grad()
    def frozen_copy(self, *, offload: bool = False) -> Policy:
        """The same weights in shards of their own, without gradients; in main memory between layers if offloaded."""
        other = sharded(self.lm.config, **{**self.settings, "offload": offload})
        for theirs, own in zip(other.parameters(), self.parameters(), strict=True):
            local(theirs).copy_(local(own))
        copy_buffers(self, other)
        return other.requires_grad_(False)


def sharded(
    config: PretrainedConfig,
    *,
    storage: torch.dtype = torch.float32,
    compute: torch.dtype,
    where: torch.device,
    offload: bool = False,
) -> ShardedPolicy:
    """A policy with uninitialised weights in shards: built on the meta device, so no rank ever holds the whole.

    One FSDP group a block, one for the rest: embeddings, norm and head, which may be tied. Gradients are summed in
    `storage`. On several nodes every node holds all shards (HSDP).
    """
    policy = ShardedPolicy(on_meta(config, storage))
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=storage)
    kept = CPUOffloadPolicy(pin_memory=where.type == "cuda") if offload else OffloadPolicy()
    grid = mesh(where.type)
    # The root gives its weights back after a forward too: an optimizer made after an evaluation would hold the whole ones.
    for module in [*blocks(policy), policy]:
        fully_shard(module, mesh=grid, mp_policy=precision, offload_policy=kept, reshard_after_forward=True)
    policy.to_empty(device="cpu" if offload else where)
    policy.settings = {"storage": storage, "compute": compute, "where": where}
    return policy


def blocks(policy: Policy) -> list[nn.Module]:
    """The transformer's layers."""
    return [module for module in policy.lm.modules() if isinstance(module, GradientCheckpointingLayer)]


@cache  # each call would open communicators of its own
def mesh(device_type: str) -> DeviceMesh:
    """The ranks as FSDP sees them: one row, or nodes by ranks of a node."""
    nodes = size() // ranks_here() if "LOCAL_WORLD_SIZE" in os.environ else 1
    if nodes == 1:
        return init_device_mesh(device_type, (size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (nodes, size() // nodes), mesh_dim_names=("replicate", "shard"))


def on_meta(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype).eval()


def empty(config: PretrainedConfig, dtype: torch.dtype, where: torch.device, *, like: Policy) -> Policy:
    """A whole policy with uninitialised weights and the buffers of another one."""
    policy = Policy(on_meta(config, dtype)).to_empty(device=where).requires_grad_(False)
    policy.lm.tie_weights()  # to_empty gives the head and the embeddings memory of their own
    copy_buffers(like, policy)
    return policy


def copy_buffers(source: Policy, target: Policy) -> None:
    """Rotary frequencies and the like: no checkpoint holds them, and none of them is sharded."""
    for theirs, own in zip(target.buffers(), source.buffers(), strict=True):
        theirs.data = own.data.to(own.device).clone()


def local(x: Tensor) -> Tensor:
    """The rows of a weight that this rank holds: all of them where nothing is sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """All rows of a weight. Every rank must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def bounds(rows: int, parts: int, part: int) -> tuple[int, int]:
    """First and last row (excluded) of one of `parts` shards of a weight with `rows` rows, as FSDP2 cuts them."""
    each = -(-rows // parts)
    return min(part * each, rows), min((part + 1) * each, rows)


def sharded_over() -> tuple[int, int, bool]:
    """(shards, number of this rank's, whether this rank is the one that writes it): nodes hold copies of each other."""
    parts = ranks_here() if size() > 1 and "LOCAL_WORLD_SIZE" in os.environ else size()
    return parts, rank() % parts, rank() < parts


# Opening


def open_policy(path: str | Path, *, activation_checkpointing: bool = False) -> Policy:
    """The start model in float32 (bf16 compute on a GPU). Raises `UserError` as `Policy.load` does.

    One process on a CPU holds it whole. Otherwise rank 0 reads it, as it is stored, and every rank keeps its rows.
    """
    if not dist.is_initialized():
        policy = Policy.load(path)
    else:
        source = Policy.load(path, "auto") if rank() == 0 else None
        wait()  # a model from the hub is downloaded once
        compute = torch.bfloat16 if device().type == "cuda" else torch.float32
        policy = sharded(AutoConfig.from_pretrained(str(path)), compute=compute, where=device())
        fill(policy, source)
        if source:
            policy.lm.generation_config = source.lm.generation_config  # for the export: all stop tokens are in it
    if activation_checkpointing:
        checkpoint_blocks(policy)
    return policy


def reopen(policy: Policy, path: str | Path) -> None:
    """Put the weights of a model back into an open policy."""
    fill(policy, Policy.load(path, "auto") if rank() == 0 else None)


@torch.no_grad()
def fill(policy: Policy, source: Policy | None) -> None:
    """Copy a whole policy, open on rank 0 alone, into the shards of all: one weight at a time, in the type it has there."""
    given = dict([*source.named_parameters(), *source.named_buffers()]) if source else {}
    types = exchange({name: str(x.dtype).removeprefix("torch.") for name, x in given.items()})[0]
    for name, target in [*policy.named_parameters(), *policy.named_buffers()]:
        whole = torch.empty(target.shape, dtype=getattr(torch, types[name]), device=device())
        if source:
            whole.copy_(given[name])
        if size() > 1:
            dist.broadcast(whole, 0)
        if isinstance(target, DTensor) and target.dim():
            parts, part, _ = sharded_over()
            first, last = bounds(len(whole), parts, part)
            whole = whole[first:last]
        local(target).copy_(whole)


def checkpoint_blocks(policy: Policy) -> None:
    """Keep of every block only its input in a forward; backward computes the rest again. Less memory, the same result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that both versions of transformers know is on its way out
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.lm.train()


def compile_blocks(policy: Policy) -> None:
    """Compile the blocks in training (torch.compile; attention stays as it is). The first updates wait for the compiler."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))
    for block in blocks(policy):
        block.compile(dynamic=True)


def clip_gradients(policy: Policy, most: float) -> float:
    """Scale gradients down to a norm of `most` over all weights and ranks; returns the norm they had."""
    return float(full(torch.nn.utils.clip_grad_norm_(policy.parameters(), most)))


def peak_memory() -> int:
    """Bytes of memory at most in use so far: of the GPU, or of this process, interpreter included."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
