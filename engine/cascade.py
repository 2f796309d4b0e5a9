"""Training attention without a mask: the result of `model.GroupLayout`, by two calls of a GPU's fast kernels.

A kernel here is a library's attention function that takes pieces of different lengths. A query of an answer sees two sets of
keys that have none in common: its own answer so far, and its whole prompt. One call lets every prompt and every answer
attend to itself, causally. The other lets the answers of a group, as one piece, attend to their prompt. The stream begins
with all prompts, so both calls read slices of one q, k and v, and nothing is copied. Each call returns its output o and its
log-sum-exp lse, the log of the sum of exp(scores) over its keys. They are merged:

    lse = logaddexp(lse_own, lse_prompt)        o = exp(lse_own - lse) o_own + exp(lse_prompt - lse) o_prompt

Backward: the weight of key j for query i, over both sets, is exp(s_ij - lse), where s_ij is the score. Beside these weights,
q, k, v and the incoming gradient, the gradients need only the merged o. So the backward of each call, given the merged o
and lse, returns exactly its part of the gradients. Autograd must not do the merge: these kernels pass no gradient through
lse, and give no warning, so dq and dk would be wrong by as much as their own size.

Shapes: N tokens of the stream, the first L of prompts, H query heads, K key/value heads, G = H / K, D head width. One
call has X queries and Y keys.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from model import GroupLayout, LayoutOf, shape

ROWS = 4096  # rows merged at once: float32 copies of all rows would be the largest tensors of a layer
WIDEST_HEAD = 256  # head widths beyond it have no kernels


@dataclass(frozen=True)
class Segments:
    """What a call needs beside q, k and v: where its pieces begin, the longest of them, and whether they are causal.

    The bounds `cu_q` and `cu_k` are int32 on the device of q. The lengths are Python's numbers, because Python would have to
    wait for the GPU to read them from there.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool

    @classmethod
    def of(cls, q: Sequence[int], k: Sequence[int], device: torch.device, *, causal: bool) -> "Segments":
        """From the number of queries and of keys of each piece; none may be 0."""
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q, k))
        return cls(cu_q, cu_k, max(q), max(k), causal)


@dataclass(frozen=True)
class Kernels:
    """Attention over pieces, with H a multiple of K. `lse_HX` is the natural log, over scaled scores, in float32 at least.

    `forward` takes q_XHD, k_YKD, v_YKD, pieces and the scale, and returns out_XHD and lse_HX. `backward` takes dout_XHD, q,
    k, v, out_XHD, lse_HX, pieces and the scale, and returns dq, dk and dv. It believes the out and lse that it is given.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Segments, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class CascadeLayout:
    """What the two calls for a stream need: `own` pieces, `prompt` pieces, and L, where the answers begin."""

    own: Segments
    prompt: Segments
    L: int
    kernels: Kernels

    @classmethod
    def of(
        cls, kernels: Kernels, prompts: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device
    ) -> "CascadeLayout":
        """From the lengths of the prompts and of the answers to each of them."""
        each = [*prompts, *(length for group in answers for length in group)]
        own = Segments.of(each, each, device, causal=True)
        return cls(own, Segments.of([sum(group) for group in answers], prompts, device, causal=False), sum(prompts), kernels)

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `model.Layout`."""
        out_NHD: Tensor = Cascade.apply(q_NHD, k_NKD, v_NKD, self, scaling)  # type: ignore[no-untyped-call]
        return out_NHD


class Cascade(torch.autograd.Function):
    """Both calls and the merge as one step for autograd. Kept for backward: q, k, v, the merged out and lse."""

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, layout: CascadeLayout, scale: float) -> Tensor:
        """Output of every token; `layout` and `scale` have no gradient."""
        L, call = layout.L, layout.kernels.forward
        out_NHD, lse_HN = call(q_NHD, k_NKD, v_NKD, layout.own, scale)
        far_XHD, far_HX = call(q_NHD[L:], k_NKD[:L], v_NKD[:L], layout.prompt, scale)
        for first in range(0, len(far_XHD), ROWS):
            near, far = slice(L + first, L + first + ROWS), slice(first, first + ROWS)
            lse_HX = torch.logaddexp(lse_HN[:, near], far_HX[:, far])
            near_X, far_X = ((x - lse_HX).exp().T[..., None] for x in (lse_HN[:, near], far_HX[:, far]))
            out_NHD[near] = near_X * out_NHD[near] + far_X * far_XHD[far]  # summed in the type of lse, then rounded once
            lse_HN[:, near] = lse_HX  # in place, because autograd has seen neither tensor
        ctx.save_for_backward(q_NHD, k_NKD, v_NKD, out_NHD, lse_HN)
        ctx.layout, ctx.scale = layout, scale
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHD: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients from both calls, added."""
        q, k, v, out, lse = ctx.saved_tensors
        L, call, dout = ctx.layout.L, ctx.layout.kernels.backward, dout_NHD.contiguous()
        dq, dk, dv = call(dout, q, k, v, out, lse, ctx.layout.own, ctx.scale)
        far_lse = lse[:, L:].contiguous()  # kernels take its address and know nothing of strides
        far_dq, far_dk, far_dv = call(dout[L:], q[L:], k[:L], v[:L], out[L:], far_lse, ctx.layout.prompt, ctx.scale)
        dq[L:] += far_dq
        dk[:L] += far_dk
        dv[:L] += far_dv
        return dq, dk, dv, None, None


# The kernels in plain PyTorch: any device, any type, one piece after the other


def pairs(s: Segments) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each piece."""
    q, k = s.cu_q.tolist(), s.cu_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def scores(q_XHD: Tensor, k_YHD: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled scores [H, X, Y]. If causal, keys behind a query get -inf; the last query stands at the last key."""
    s_HXY = torch.einsum("xhd,yhd->hxy", q_XHD, k_YHD) * scale
    later_XY = torch.ones_like(s_HXY[0], dtype=torch.bool).triu(1 + s_HXY.shape[2] - s_HXY.shape[1])
    return s_HXY.masked_fill(later_XY, -torch.inf) if causal else s_HXY


def plain_forward(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """See `Kernels`. Computes in float32 at least."""
    G, dtype = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    out_XHD, lse_HX = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=dtype)
    for a, b in pairs(s):
        qa, kb, vb = q[a].to(dtype), *(x[b].to(dtype).repeat_interleave(G, 1) for x in (k, v))
        s_HXY = scores(qa, kb, s.causal, scale)
        lse_HX[:, a] = s_HXY.logsumexp(-1)
        out_XHD[a] = torch.einsum("hxy,yhd->xhd", s_HXY.softmax(-1), vb).to(q.dtype)
    return out_XHD, lse_HX


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`. p = exp(score - lse); dv = p^T dout; dscore = p (dout v^T - dout out^T); dq and dk from that."""
    G, dtype = q.shape[1] // k.shape[1], lse.dtype
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for a, b in pairs(s):
        da, qa, oa = (x[a].to(dtype) for x in (dout, q, out))
        kb, vb = (x[b].to(dtype).repeat_interleave(G, 1) for x in (k, v))
        p_HXY = (scores(qa, kb, s.causal, scale) - lse[:, a, None]).exp()
        ds_HXY = p_HXY * (torch.einsum("xhd,yhd->hxy", da, vb) - (da * oa).sum(-1).T[..., None]) * scale
        dq[a] = torch.einsum("hxy,yhd->xhd", ds_HXY, kb).to(q.dtype)
        dk[b] = torch.einsum("hxy,xhd->yhd", ds_HXY, qa).unflatten(1, (-1, G)).sum(2).to(q.dtype)
        dv[b] = torch.einsum("hxy,xhd->yhd", p_HXY, da).unflatten(1, (-1, G)).sum(2).to(q.dtype)
    return dq, dk, dv


PLAIN = Kernels(plain_forward, plain_backward)


# The kernels of PyTorch itself (flash-attention 2, or 3 after torch.nn.attention.activate_flash_attention_impl("FA3"))


def torch_forward(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, s.causal, False, scale=scale
    )
    return out, lse


def torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`. Without dropout the kernel reads neither of the two arguments about random numbers."""
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, s.causal, state, unused, scale=scale
    )
    return found


TORCH = Kernels(torch_forward, torch_backward)


# The kernels of flash-attn 2.8.3, for a PyTorch that was built without its own


def flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    from flash_attn import flash_attn_interface as library

    out, lse, *_ = library._flash_attn_varlen_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p=0.0, softmax_scale=scale, causal=s.causal
    )
    return out, lse


def flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`. Like PyTorch's, dq repeats bit by bit only under torch.use_deterministic_algorithms."""
    from flash_attn import flash_attn_interface as library

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    library._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, s.cu_q, s.cu_k, s.max_q, s.max_k,
        dropout_p=0.0, softmax_scale=scale, causal=s.causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


FLASH_ATTN = Kernels(flash_attn_forward, flash_attn_backward)


# The choice


def kernels_for(config: PretrainedConfig, compute: torch.dtype, where: torch.device) -> Kernels | None:
    """The fast kernels for a model that computes in this type on this device; None where there are none.

    They exist for 16-bit types, head widths that 8 divides, and GPUs from the Ampere generation (8.0) on. PyTorch's own go
    first: flash-attn does the same work, and has to be built for each PyTorch.
    """
    if where.type != "cuda" or not kernels_fit(config, compute) or torch.cuda.get_device_capability(where) < (8, 0):
        return None
    if torch.backends.cuda.is_flash_attention_available():
        return TORCH
    return FLASH_ATTN if importlib.util.find_spec("flash_attn") else None


def kernels_fit(config: PretrainedConfig, compute: torch.dtype) -> bool:
    """Whether fast kernels exist for a model that computes in this type, on a GPU that has them."""
    D = shape(config)[2]
    return compute in (torch.float16, torch.bfloat16) and D % 8 == 0 and D <= WIDEST_HEAD


def layout_for(kernels: Kernels | None) -> LayoutOf:
    """The layout of streams in training: two calls of these kernels, or without kernels rectangles and a mask."""
    return partial(CascadeLayout.of, kernels) if kernels else GroupLayout.of
