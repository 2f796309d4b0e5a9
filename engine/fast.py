"""Fast paths of sampling. Each is chosen once per call of `rollout.generate`, and changes no answer but for rounding.

Packed weights: a CPU's matrix product wants a weight in an order of its own. Putting weights into it once per call, and not
once per product, saves a seventh of a decode step in bf16 (a 16-bit type) and more in float32 (SmolLM2-135M, 64 rows; see
LOG.md). A decode step gives every unfinished answer one more token.

Recorded steps: a decode step is many small kernels (programs of the GPU), which a GPU finishes sooner than Python can start
them. Recorded once per shape, as a CUDA graph, they start together. A graph needs fixed shapes at fixed addresses; the code
that sees to this runs, and is tested, on a CPU too. A replayed step changes its rows itself, so nothing is copied to the
device until rows come or go.

Shapes: as in rollout.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.head import scaled_logits
from engine.cache import DecodeRows, GroupCache

PACKED = 100_000  # elements of the smallest weight that is packed
ROWS = 16  # a recorded step has a multiple of so many rows
Step = Callable[[DecodeRows], Tensor]  # a decode step: returns what was drawn, [R, 3], and moves the rows on
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # (replay, the tensor that it writes)


@contextmanager
def packed_weights(lm: nn.Module) -> Iterator[None]:
    """Let large linear layers on a CPU keep their weights packed for the length of a call (float32, bf16).

    This takes memory for a second copy of them. The weights themselves stay where they are; each call packs anew.
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

    The head is the last linear layer. On a CPU this takes a float32 copy of it, packed if it is large.
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
    """Whether packing is worth it: oneDNN, PyTorch's library on CPUs, multiplies this type, and the weight is large."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or weight.device.type != "cpu" or weight.numel() < PACKED:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16())


def multiplies_bf16() -> bool:
    """Whether oneDNN has products in bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A weight in the order of oneDNN: fastest for about 64 rows, right for any number."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
    return packed


def packed_linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`F.linear` with a packed weight."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, bias, "none", [], "")
    return out


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded decode step of one shape: the rows it reads and moves on, how to run it again, and what it draws."""

    rows: DecodeRows
    replay: Callable[[], None]
    drawn_R3: Tensor

    @classmethod
    def of(cls, step: Step, rows: DecodeRows, capture: Capture) -> "Recording":
        """Record the step over these rows, which move on meanwhile."""
        return cls(rows, *capture(lambda: step(rows)))


@dataclass(eq=False)
class Recorder:
    """`step`, recorded once per shape. Rows are filled up to a multiple of ROWS, groups to the capacity of the cache.

    The rows that fill up write their keys and values into places of the cache that are not in use. A recording reads fixed
    addresses, so all recordings are dropped when the cache's tensors move.
    """

    step: Step
    cache: GroupCache
    n: int
    capture: Capture
    recordings: dict[int, Recording] = field(default_factory=dict)
    version: int = -1
    loaded: DecodeRows | None = None

    def __call__(self, rows: DecodeRows) -> Tensor:
        """What was drawn, [R, 3], valid until the next call. The same `rows` object again means the step after the last."""
        if self.version != self.cache.version:
            self.recordings.clear()
            self.version, self.loaded = self.cache.version, None
        R = len(rows.ids_R)
        slots, _, most, _ = self.cache.size
        filled_R = min(-(-R // ROWS) * ROWS, most)
        if filled_R not in self.recordings:
            self.recordings[filled_R] = Recording.of(self.step, filled(rows, filled_R, slots, self.n), self.capture)
            self.loaded = None
        recording = self.recordings[filled_R]
        if rows is not self.loaded:
            for kept, x in zip(tensors(recording.rows), tensors(filled(rows, filled_R, slots, self.n)), strict=True):
                kept.copy_(x)
            self.loaded = rows
        recording.replay()
        return recording.drawn_R3[:R]


def tensors(rows: DecodeRows) -> list[Tensor]:
    """All that a step reads of its rows."""
    return [getattr(rows, part.name) for part in fields(rows)]


def filled(rows: DecodeRows, R: int, groups: int, n: int) -> DecodeRows:
    """A copy with R rows and so many groups; the rows that fill up have token 0, the groups no rows."""
    shapes = {"row_PG": (groups, n), "uniform_RA": (R, rows.uniform_RA.shape[1])}
    return DecodeRows(*(padded(getattr(rows, part.name), shapes.get(part.name, (R,))) for part in fields(rows)))


def padded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` with zeros behind it, up to a shape."""
    out = x.new_zeros(shape)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


def cuda_graphs() -> Capture:
    """A function that records a step as a CUDA graph.

    All graphs of a call share one memory pool, so together they take only the memory of the largest.
    """
    pool, aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    newest: list[Any] = []  # a pool ends with the last of its graphs: one outlives the recordings of an old capacity

    def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            compute()  # graphs want it to have run once before
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the device
            out = compute()
        newest[:] = [graph]
        return graph.replay, out

    return capture
