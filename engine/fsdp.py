"""Weights in shards, and whole weights for sampling. Off the reading path.

A shard is the rows of every weight that one rank (process) holds. PyTorch's FSDP2 gathers the rows of a layer while it is
computed. Without torchrun and without a GPU nothing is sharded.

Shapes: as in model.py. R ranks that share the weights (all of them, or those of one node, which is one machine), C rows of a
weight per rank.
"""

import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from common.hub import read_config
from engine.cascade import kernels_for, layout_for
from engine.processes import computing, device, exchange, rank, ranks_here, size, wait
from model import ATTENTION, Policy, attention


class ShardedPolicy(Policy):
    """A policy whose weights are spread over the ranks by rows, stored in one type and computed in another; see `sharded`.

    `whole` holds the policy that samples: all weights in the computing type, on every rank.
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
        """The same weights in shards of their own, without gradients; if offloaded, in main memory until a layer needs them.

        They are stored in the type that they are computed in. Nothing is added up in them, so the results are the same, and
        bf16 takes half the memory.
        """
        other = sharded(self.lm.config, **{**self.settings, "storage": self.settings["compute"], "offload": offload})
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
    """A policy with uninitialised weights in shards. It is built on the meta device, so no rank ever holds the whole.

    FSDP gathers the weights of one block (transformer layer) at a time, and those of the rest (embeddings, norm and head,
    which may be tied) as one. Gradients are summed in the type `storage`. On several nodes every node holds all shards,
    which PyTorch calls HSDP.
    """
    policy = ShardedPolicy(on_meta(config, storage), layout_for(kernels_for(config, compute, where)))
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
    """The ranks as FSDP sees them: one row on one node, else a rectangle of nodes x ranks of a node."""
    nodes = size() // ranks_here() if "LOCAL_WORLD_SIZE" in os.environ else 1
    shape, names = ((size(),), ("shard",)) if nodes == 1 else ((nodes, size() // nodes), ("replicate", "shard"))
    grid = init_device_mesh(device_type, shape, mesh_dim_names=names)
    open_communicators(grid)
    return grid


def open_communicators(grid: DeviceMesh) -> None:
    """One tiny all-gather and reduce-scatter in every set of ranks of a mesh.

    NCCL, by which GPUs talk to each other, takes its memory at the first use, beside PyTorch's. After the first rollout
    there might be none left.
    """
    for group in grid.get_all_groups():
        part = torch.ones(1, device=grid.device_type)
        whole = part.new_empty(group.size())
        dist.all_gather_into_tensor(whole, part, group)
        dist.reduce_scatter_tensor(part, whole, group=group)


def on_meta(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype).eval()


def empty(config: PretrainedConfig, dtype: torch.dtype, where: torch.device, *, like: Policy) -> Policy:
    """A whole policy with uninitialised weights and the buffers of another one."""
    policy = Policy(on_meta(config, dtype), like.layout_of).to_empty(device=where).requires_grad_(False)
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
    """(number of shards, which one this rank holds, whether this rank writes it to disk).

    Nodes hold copies of each other, so only one of them writes.
    """
    parts = ranks_here() if size() > 1 and "LOCAL_WORLD_SIZE" in os.environ else size()
    return parts, rank() % parts, rank() < parts


# Opening


def open_policy(path: str | Path, *, dtype: str = "auto", activation_checkpointing: bool = False) -> Policy:
    """The start model in float32, computed in `dtype` (see `processes.computing`). Raises `UserError` as `Policy.load` does.

    One process in float32 on a CPU holds it whole. Else rank 0 reads it in the type of the files, and every rank keeps its
    rows.
    """
    if not dist.is_initialized():
        policy = Policy.load(path)
    else:
        source = Policy.load(path, "auto") if rank() == 0 else None
        wait()  # a model from the hub is downloaded once
        policy = sharded(read_config(path), compute=computing(dtype), where=device())
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
    """Copy a whole policy, which is open on rank 0 alone, into the shards of all ranks, one weight at a time.

    A weight travels in the type that it has in `source`.
    """
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
    """Let a forward keep only the input of every block; backward computes the rest again. Less memory, the same result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that both versions of transformers know is on its way out
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks(policy):
        block.training = True  # what the library asks for; only here, for what lies inside would begin to drop out


def compile_blocks(policy: Policy) -> None:
    """Compile the blocks in training (torch.compile; attention stays as it is). The first updates wait for the compiler."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))
    for block in blocks(policy):
        block.compile(dynamic=True)


def clip_gradients(policy: Policy, most: float) -> float:
    """Scale gradients down to a norm of `most` over all weights and ranks; returns the norm they had."""
    return float(full(torch.nn.utils.clip_grad_norm_(policy.parameters(), most)))
