"""What python -m tools.accept asks of single functions: attention in training, the head, the choice of a token.

A check is given a device and yields rows, a measured number each and the bound on it. On a CPU the same lines run in small,
with stand-ins for what only a GPU has; what means nothing there is skipped, with the reason. tools/decoding.py has the
checks of sampling, tools/trials.py those of whole runs and of several processes.

Shapes: as in engine/cascade.py, common/head.py and rollout.py.
"""

import importlib.util
import math
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.head import Head
from engine.cascade import FLASH_ATTN, PLAIN, TORCH, CascadeLayout, Kernels
from model import HEAD_BYTES, GroupLayout
from rollout import draw_in_blocks

CPU = torch.device("cpu")
Lengths = tuple[Sequence[int], Sequence[Sequence[int]]]  # of prompts, and of the answers to each
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # `model.Layout.attend`
NO_MEMORY = "a CPU has no peak of its tensors alone"
NO_CLOCK = "the bound is a GPU's"
NO_WAIT = "a CPU is where the host is; tests/test_rollout.py counts copies"


# Rows


@dataclass(frozen=True)
class Row:
    """A claim: what is measured, the bound, what was found, whether it holds; `note` says more, or why it was skipped."""

    what: str
    expected: str
    measured: str
    verdict: Literal["ok", "FAILED", "skipped"]
    note: str = ""
    value: float | None = None


HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, "=": operator.eq,
}  # fmt: skip


def row(what: str, value: float, sign: str, bound: float, unit: str = "", *, note: str = "", skip: str = "") -> Row:
    """`value` must be `sign` (<, <=, >, =) `bound`; NaN is nothing of it. `skip`: why it was not measured."""
    expected = f"{sign} {number(bound)}{unit}"
    if skip:
        return Row(what, expected, "", "skipped", skip)
    return Row(what, expected, f"{number(value)}{unit}", "ok" if HOLDS[sign](value, bound) else "FAILED", note, value)


def number(x: float) -> str:
    """Three digits, or all of a large or whole number."""
    if not math.isfinite(x):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 or x == int(x) else f"{x:.3g}"


# Time and memory


def on_gpu(device: torch.device) -> bool:
    """Whether it is one."""
    return device.type == "cuda"


def settle(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def median_s(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of a call, after one that is not counted."""
    found = []
    for _ in range(1 + repeats):
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def peak_bytes(work: Callable[[], object], device: torch.device) -> float:
    """Bytes of a GPU in use at most during a call, beyond those before it; NaN without a GPU."""
    if not on_gpu(device):
        work()
        return math.nan
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    settle(device)
    return torch.cuda.max_memory_allocated(device) - before


def warned_waits(work: Callable[[], object], device: torch.device) -> int:
    """How often PyTorch warns in a call that the host waits for the GPU."""
    if on_gpu(device):
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        if on_gpu(device):
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


# Attention in training


HEADS = {"H": 32, "K": 8, "D": 128}  # those of Qwen3-8B and Qwen3-4B
SMALL_HEADS = {"H": 4, "K": 2, "D": 32}
UNEQUAL: Lengths = ([200, 31], [[130, 7, 300], [64, 1]])
ONES: Mapping[str, Lengths] = {  # with queries of one token the kernels swap heads and queries
    "answers of one token": ([40, 1, 7], [[1], [1], [1]]),
    "all of one token": ([1, 1], [[1], [1]]),
}
CAUSAL: Lengths = ([700], [[1]])
AGAIN: Lengths = ([300, 40], [[200, 100], [90]])


def qkv(
    shape: Lengths, H: int = 4, K: int = 2, D: int = 8, dtype: torch.dtype = torch.float64,
    given: torch.dtype = torch.float64, seed: int = 0, device: torch.device = CPU,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Random q, k, v of a stream and a gradient of its output, rounded to the type `given`."""
    N, generator = sum(shape[0]) + sum(map(sum, shape[1])), torch.Generator(device).manual_seed(seed)
    sizes = [(N, heads, D) for heads in (H, K, K, H)]
    made = [torch.randn(size, generator=generator, dtype=torch.float64, device=device) for size in sizes]
    q, k, v, dout = (x.to(given).to(dtype) for x in made)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout


def solved(attend: Attend, shape: Lengths, scale: float = 0.35, **sizes: Any) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of an attention over a stream of this shape."""
    inputs, dout = qkv(shape, **sizes)
    out = attend(0, *inputs, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def attends(shape: Lengths, kernels: Kernels = PLAIN, device: torch.device = CPU) -> Attend:
    """The cascade over a stream of this shape."""
    return CascadeLayout.of(kernels, *shape, device).attend


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """|found - exact| / |exact| of each pair, over all elements (2-norm)."""
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True)]


def errors(attends_of: Callable[[Lengths], Attend], shape: Lengths, dtype: torch.dtype, **sizes: Any) -> list[float]:
    """Relative errors in 16 bits of out, dq, dk and dv against float64 on the same rounded numbers, of a whole stream."""
    found = solved(attends_of(shape), shape, dtype=dtype, given=dtype, **sizes)
    return relative(found, solved(attends(shape, PLAIN, sizes.get("device", CPU)), shape, given=dtype, **sizes))


def second_group(attends_of: Callable[[Lengths], Attend], L: int, n: int, device: torch.device) -> list[float]:
    """Relative differences of the second of two groups, n answers and a prompt of L tokens each, from itself alone."""
    (q, k, v), dout = qkv(([L] * 2, [[L] * n] * 2), H=4, K=1, D=64, dtype=torch.bfloat16, device=device)
    own = [slice(L, 2 * L), slice(2 * L + n * L, None)]  # its prompt and its answers
    out = attends_of(([L] * 2, [[L] * n] * 2))(0, q, k, v, 0.125)
    both = [torch.cat([x[part] for part in own]) for x in (out, *torch.autograd.grad(out, (q, k, v), dout))]
    q, k, v = (torch.cat([x.detach()[part] for part in own]).requires_grad_() for x in (q, k, v))
    out = attends_of(([L], [[L] * n]))(0, q, k, v, 0.125)
    return relative(both, (out, *torch.autograd.grad(out, (q, k, v), torch.cat([dout[part] for part in own]))))


def changed(attend: Attend, shape: Lengths, **sizes: Any) -> int:
    """Numbers of out, dq, dk and dv that differ a second time, where PyTorch is asked for what repeats."""
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (solved(attend, shape, dtype=torch.bfloat16, **sizes) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    return sum(int((a != b).sum()) for a, b in zip(one, two, strict=True))


def cost(attend: Attend, shape: Lengths, device: torch.device, **heads: Any) -> tuple[float, float]:
    """(seconds, peak bytes beyond q, k, v and the gradient given) of a forward and a backward of one layer."""
    inputs, dout = qkv(shape, dtype=torch.bfloat16, device=device, **heads)

    def work() -> None:
        torch.autograd.grad(attend(0, *inputs, 0.1), inputs, dout)

    return median_s(work, device), peak_bytes(work, device)


def kernels_here(device: torch.device) -> dict[str, Kernels]:
    """The kernels that there are, by name; PyTorch's in any case on a GPU."""
    if not on_gpu(device):
        return {"plain": PLAIN}
    return {"torch": TORCH} | ({"flash_attn": FLASH_ATTN} if importlib.util.find_spec("flash_attn") else {})


def cascade(device: torch.device) -> Iterator[Row]:
    """Attention in training: errors, repetition, waits, and what a long group costs."""
    gpu = on_gpu(device)
    heads: Mapping[str, Any] = HEADS if gpu else SMALL_HEADS
    L, n = (1024, 32) if gpu else (16, 4)
    for name, kernels in kernels_here(device).items():
        of = partial(attends, kernels=kernels, device=device)
        merged, alone = (errors(of, shape, torch.bfloat16, device=device, **heads) for shape in (UNEQUAL, CAUSAL))
        yield row(f"{name}: error against float64, unequal lengths", max(merged), "<", 1e-2)
        for title, shape in ONES.items():
            found = max(errors(of, shape, torch.bfloat16, device=device, **heads))
            yield row(f"{name}: error against float64, {title}", found, "<", 1e-2)
        ratio = max(ours / theirs for ours, theirs in zip(merged, alone, strict=True))
        yield row(f"{name}: error over that of one causal call", ratio, "<", 2)
        many = f"{name}: group 2 of {2 * L * (n + 1):,} tokens, alone"
        yield row(many, max(second_group(of, L, n, device)), "<", 1e-2)
        inputs, dout = qkv(AGAIN, dtype=torch.bfloat16, device=device, **heads)
        attend = of(AGAIN)
        first, second = attend(0, *inputs, 0.1), attend(0, *inputs, 0.1)
        yield row(f"{name}: output again, numbers changed", int((first != second).sum()), "=", 0)
        yield row(f"{name}: the same with gradients, deterministic", changed(attend, AGAIN, device=device, **heads), "=", 0)
        waits = warned_waits(partial(torch.autograd.grad, first, inputs, dout), device)
        waits += warned_waits(partial(attend, 0, *inputs, 0.1), device)
        yield row(f"{name}: waits in forward and backward", waits, "=", 0, skip="" if gpu else NO_WAIT)
        long: Lengths = ([4096], [[4096] * 8]) if gpu else ([16], [[16] * 8])
        layouts = of(long), GroupLayout.of(*long, device).attend
        (ours_s, ours), (mask_s, mask) = (cost(attend, long, device, **heads) for attend in layouts)
        # By hand: out 302 MB and lse 5 are kept, backward of the own call needs dq in float32 604, dk and dv of every query
        # head 604, dq 302, dk and dv 151.
        memory, clock = ("", "") if gpu else (NO_MEMORY, NO_CLOCK)
        yield row(f"{name}: a layer of 36,864 tokens, memory", ours / 1e9, "<", 1.15 * 1.97, " GB", skip=memory)
        note = f"{mask / 1e9:.2f} GB with a mask"
        yield row(f"{name}: the same over that of a mask", ours / mask, "<", 1, note=note, skip=memory)
        note = f"{ours_s * 1e3:.1f} ms, {mask_s * 1e3:.1f} with a mask"
        yield row(f"{name}: a layer of 36,864 tokens, time over a mask's", ours_s / mask_s, "<", 1, note=note, skip=clock)


# The head


def plain_scores(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    """Log-probs of the targets, all logits at once, every gradient autograd's."""
    return F.linear(hidden_MD, weight_VD).log_softmax(-1).gather(-1, target_M[:, None])[:, 0]


def head(device: torch.device) -> Iterator[Row]:
    """Log-probs in blocks and their gradients in bf16, against all logits at once in float64 on the same numbers."""
    M, V, D, limit = (1192, 151_936, 2560, HEAD_BYTES) if on_gpu(device) else (1192, 97, 32, 8 * 97 * 4)
    torch.manual_seed(0)
    hidden_MD, weight_VD = torch.randn(M, D, device=device), 2 * torch.randn(V, D, device=device) / D**0.5
    given = [x.bfloat16().requires_grad_() for x in (hidden_MD, weight_VD)]
    exact_MD, exact_VD = exact = [x.detach().double().requires_grad_() for x in given]
    target_M, slope_M = torch.randint(V, (M,), device=device), torch.randn(M, device=device)
    apply: Any = Head.apply
    ours_M, theirs_M = apply(*given, None, target_M, 1.0, limit)[0], plain_scores(exact_MD, exact_VD, target_M)
    found = torch.autograd.grad((ours_M * slope_M).sum(), given)
    right = torch.autograd.grad((theirs_M * slope_M.double()).sum(), exact)
    for name, error in zip(("hidden states", "weight"), relative(found, right), strict=True):
        yield row(f"error of the gradient of the {name}, {M:,} tokens of {V:,}", error, "<", 3e-3)


# The sampler's choice


def draws(device: torch.device) -> Iterator[Row]:
    """The sampler's choice among tokens of which half have weight 0, the first and the last among them."""
    R, V, times = (4096, 151_936, 245) if on_gpu(device) else (4096, 1000, 8)
    generator = torch.Generator(device).manual_seed(0)
    logits_RV = 3 * torch.randn(R, V, generator=generator, device=device)
    none_RV = torch.rand(R, V, generator=generator, device=device) < 0.5
    none_RV[:, 0] = none_RV[:, -1] = True
    logits_RV[none_RV] = -torch.inf
    logits_RV[:, 1] = -1000.0  # exp of it is 0
    never_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp() == 0
    ends = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24, 1.0], device=device)
    wrong, unsound = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))
    for _ in range(times):
        uniform_R = torch.rand(R, generator=generator, device=device)
        uniform_R[: len(ends)] = ends
        token_R, logp_R, finite_R = draw_in_blocks(logits_RV, 1.0, uniform_R).unbind(1)
        wrong += never_RV.gather(1, token_R.long()[:, None]).sum()
        unsound += ((finite_R == 0) | ~logp_R.isfinite()).sum()
    yield row(f"tokens of weight 0 in {R * times:,} draws", wrong.item(), "=", 0)
    yield row("log-probs of these that are no number", unsound.item(), "=", 0)
