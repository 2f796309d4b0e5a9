"""Fast paths of sampling. Each is chosen once a call of `rollout.generate`, and changes no answer but for rounding.

Packed weights: the products of a CPU want a weight in an order of their own. Ordered once a call in place of once a
product, they save a seventh of a decode step in bf16 and more in float32 (SmolLM2-135M, 64 rows; see LOG.md).

Recorded steps: a GPU finishes the kernels of a decode step sooner than Python can start them. Recorded once a shape as a
CUDA graph, they start together. A graph needs fixed shapes in fixed places; that part runs, and is tested, on a CPU too.

Shapes: as in rollout.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.head import scaled_logits
from engine.cache import DecodeLayout, GroupCache

PACKED = 100_000  # elements of the smallest weight that is packed
ROWS = 16  # recorded steps have a multiple of so many rows
Step = Callable[[Tensor, Tensor, DecodeLayout], Tensor]  # (ids_R, positions_R, layout) -> logits_RV
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@contextmanager
def packed_weights(lm: nn.Module) -> Iterator[None]:
    """Let large linear layers on a CPU keep their weights packed for the length of a call (float32, bf16).

    Costs a second copy of them. The weights themselves stay where they are; those of a later update are packed anew.
    """
    layers = [m for m in lm.modules() if type(m) is nn.Linear and "forward" not in vars(m) and can_pack(m.weight)]
    for layer in layers:
        layer.forward = partial(packed_linear, pack(layer.weight), layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def float32_logits(lm: PreTrainedModel) -> Iterator[None]:
    """Let logits leave the head of a bf16 model in float32 for the length of a call, as in training.

    On a CPU that takes a float32 copy of the head, packed if it is large.
    """
    head: Any = lm.get_output_embeddings()
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    if head.weight.dtype == wide or "forward" in vars(head):
        yield
        return
    weight = head.weight if head.weight.is_cuda else head.weight.to(wide)
    bias = None if head.bias is None else head.bias.to(wide)
    packed = partial(packed_linear, pack(weight), bias) if can_pack(weight) else None
    head.forward = packed or partial(scaled_logits, weight_VD=weight, bias_V=bias)
    try:
        yield
    finally:
        del head.forward


def can_pack(weight: Tensor) -> bool:
    """Whether packing is worth it here: oneDNN has products for the type, and the weight is large."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or weight.device.type != "cpu" or weight.numel() < PACKED:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16())


def multiplies_bf16() -> bool:
    """Whether oneDNN has products in bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A weight in the order of oneDNN, best for some 64 rows and right for any number."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
    return packed


def packed_linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`F.linear` with a packed weight."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, bias, "none", [], "")
    return out


@dataclass(frozen=True, eq=False)
class Recording:
    """A decode step of one shape: the tensors it reads, how to run it again, and the logits it writes."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    logits_RV: Tensor


@dataclass(eq=False)
class RecordedSteps:
    """`step`, recorded once a shape. Rows are filled up to a multiple of ROWS, groups to what the cache holds.

    Rows that fill up write their keys and values over places of the cache that are not in use. Recordings end with the
    cache's tensors that they read.
    """

    step: Step
    cache: GroupCache
    n: int
    record: Recorder
    recordings: dict[int, Recording] = field(default_factory=dict)
    version: int = -1

    def __call__(self, ids_R: Tensor, positions_R: Tensor, layout: DecodeLayout) -> Tensor:
        """Logits [R, V], valid until the next call."""
        if self.version != self.cache.version:
            self.recordings.clear()
            self.version = self.cache.version
        R = len(ids_R)
        slots, S, most, T = self.cache.size
        rows = min(-(-R // ROWS) * ROWS, most)
        shapes = [(rows,), (rows,), (slots, self.n), (rows,), (rows,), (rows,), (rows, 1, 1, S + T)]
        given = (ids_R, positions_R, *layout.tensors)
        if rows not in self.recordings:
            self.recordings[rows] = self.new([filled(x, shape) for x, shape in zip(given, shapes, strict=True)])
        else:
            for buffer, x, shape in zip(self.recordings[rows].inputs, given, shapes, strict=True):
                buffer.copy_(filled(x, shape))
        recording = self.recordings[rows]
        recording.replay()
        return recording.logits_RV[:R]

    def new(self, inputs: list[Tensor]) -> Recording:
        """Recorder the step over these tensors."""
        ids_R, positions_R, *parts = inputs
        layout = DecodeLayout(self.cache, *parts)
        return Recording(tuple(inputs), *self.record(lambda: self.step(ids_R, positions_R, layout)))


def filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` with zeros behind it, up to a shape: row 0, position 0, nothing hidden."""
    out = x.new_zeros(shape)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


def cuda_graph(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Recorder `compute` as a CUDA graph: (replay, the tensor it writes). It has run once before, as graphs want it."""
    aside: Any = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    return graph.replay, out
