"""What python -m tools.accept asks of sampling: the policy's own log-probs, recorded steps, and the pace of a step.

Models are random, in the shapes of Qwen3; on a CPU a small one stands for them. See tools/checks.py for what a check is.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

import selfemo
from data import Completion, Sample
from engine.cascade import kernels_for, layout_for
from engine.fast import Capture, cuda_graphs
from model import ATTENTION, Policy
from rollout import generate
from tools.checks import CPU, NO_CLOCK, NO_WAIT, Row, median_s, on_gpu, row, settle
from tools.limits import Shapes, decode_bytes
from training.coldstart import adamw
from training.config import Config
from training.folder import Learner
from training.plan import SHAPES
from training.records import ScoredGroup

SMALL = {
    "vocab_size": 500, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_size": 32, "intermediate_size": 64,
}  # fmt: skip


def qwen_config(name: str, device: torch.device, layers: int) -> Qwen3Config:
    """The shape of a Qwen3 with so many layers; on a CPU a small one stands for it."""
    shape = {**SHAPES[name], "num_hidden_layers": layers} if on_gpu(device) else SMALL
    return Qwen3Config(**shape, bos_token_id=None, eos_token_id=None)


def random_policy(config: Qwen3Config, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Policy:
    """A policy that knows nothing, with the attention that a run would choose."""
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype).eval()
    return Policy(lm, layout_for(kernels_for(config, dtype, device)))


def prompts_for(policy: Policy, many: int, tokens: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = torch.randint(policy.lm.config.vocab_size, (many, tokens), generator=generator).tolist()
    return rows


def sampled(
    policy: Policy, prompts: Sequence[Sequence[int]], n: int, tokens: int, record: Capture | None = None
) -> list[list[Completion]]:
    """n answers of exactly so many tokens."""
    keys = [(0, 0, str(i)) for i in range(len(prompts))]
    return generate(
        policy, prompts, n=n, max_new_tokens=tokens, temperature=1.0, eos_ids=(), keys=keys, record=record
    )  # fmt: skip


def scored(prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]]) -> list[ScoredGroup]:
    """Groups as an update wants them, with advantages that differ."""
    values = [tuple(float(i % 3 - 1) for i in range(len(group))) for group in groups]
    rows = zip(prompts, groups, values, strict=True)
    return [ScoredGroup(cast(Sample, None), tuple(p), tuple(g), v, {}, v, v) for p, g, v in rows]


def sampler(device: torch.device) -> Iterator[Row]:
    """What the sampler says of its tokens against what the policy says, and the first ratio of an update.

    How far the two are apart depends on the model: a random one has logits without meaning and with all their noise. So both
    are also compared with the same weights in float32. The sampler may not be twice as far from the truth as the policy is.
    """
    policy = random_policy(qwen_config("Qwen/Qwen3-4B", device, layers=12), device)
    prompts = prompts_for(policy, 4, 200 if on_gpu(device) else 12)
    groups = sampled(policy, prompts, 8, 128 if on_gpu(device) else 10)
    cfg, parts = Config(n=8, micro_batch=16, mini_batch_prompts=4), scored(prompts, groups)
    ref_BT = selfemo.logprobs(policy, parts, cfg)
    before_BT = torch.full_like(ref_BT, selfemo.NOT_MEASURED)
    found, old_BT = selfemo.mini_batch(policy, Learner(adamw(policy, 0.0), None), parts, before_BT, ref_BT, cfg)
    exact = Policy(copy.deepcopy(policy.lm).float())
    true_N, old_N = (selfemo.answer_tokens(x_BT, parts) for x_BT in (selfemo.logprobs(exact, parts, cfg), old_BT))
    rollout_N = old_N.new_tensor([logp for group in groups for answer in group for logp in answer.logprobs])
    theirs, ours = ((x_N - true_N).abs().mean().item() for x_N in (rollout_N, old_N))
    note = f"{theirs:.3g} and {ours:.3g} nats on average"
    yield row("log-probs: error of the sampler over the policy's", theirs / ours, "<", 2, note=note)
    yield row("mean gap of log-probs, nats", (rollout_N - old_N).abs().mean().item(), "<", 0.02)
    yield row("largest gap of log-probs, nats", (rollout_N - old_N).abs().max().item(), "<", 0.3)
    off = max(abs(found[f"ratio/{name}"] - 1) for name in ("mean", "max"))
    yield row("first ratio, off 1 (a last bit of a mean is let pass)", off, "<", 1e-6)


# Recorded steps


def copied(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands for a CUDA graph: the same places are read and written, and every step is started anew."""
    out = compute().clone()

    def replay() -> None:
        out.copy_(compute())

    return replay, out


def counted(capture: Capture, calls: list[int]) -> Capture:
    """A capture that adds 1 to `calls` each time."""

    def call(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        calls.append(1)
        return capture(compute)

    return call


def differing(one: Sequence[Sequence[Completion]], two: Sequence[Sequence[Completion]]) -> int:
    """Tokens in which two rollouts of the same lengths differ."""
    pairs = [(a.ids, b.ids) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(i != j for a, b in pairs for i, j in zip(a, b, strict=True))


def graphs(device: torch.device) -> Iterator[Row]:
    """Recorded decode steps against others while the cache grows three times: places for 64, 128, 256, 320 tokens.

    In float64, where no rounding chooses a token, against steps of a cache that grows as it does without recordings. In bf16
    against steps of the same shapes that are started one by one.
    """
    gpu, calls = on_gpu(device), list[int]()
    record = cuda_graphs if gpu else lambda: copied
    exact = random_policy(qwen_config("", CPU, layers=2), device, torch.float64)
    prompts = prompts_for(exact, 2, 12)
    plain, recorded = sampled(exact, prompts, 4, 300), sampled(exact, prompts, 4, 300, counted(record(), calls))
    yield row("float64: tokens that differ from eager steps", differing(recorded, plain), "=", 0)
    yield row("captures: the first and one a growth", len(calls), "=", 4)
    policy = random_policy(qwen_config("Qwen/Qwen3-4B", device, layers=4), device)
    tokens = 300 if gpu else 10
    pair = [sampled(policy, prompts, 4, tokens, capture) for capture in (record(), copied)]
    alone = "" if gpu else "the stand-in is what it is compared with"
    yield row("bf16: tokens that differ from eager steps of their shapes", differing(*pair), "=", 0, skip=alone)


# Speed


@dataclass(frozen=True)
class Pace:
    """Of one decode step: seconds of the clock, seconds in which the GPU worked, times that the host waited."""

    seconds: float
    busy: float
    waits: float


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def waits_in(events: Iterable[Any]) -> int:
    """Calls of the driver that wait, in what the profiler saw."""
    return sum(event.name in WAITS for event in events)


def busy_s(events: Iterable[Any]) -> float:
    """Seconds in which at least one kernel or copy was on the GPU."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA")
    total, until = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def profiled(work: Callable[[], object], device: torch.device) -> list[Any]:
    """What the profiler saw of a call: on a GPU its kernels and the driver's calls, on a CPU operators."""
    activity = ProfilerActivity.CUDA if on_gpu(device) else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        work()
        settle(device)
    return list(seen.events() or ())


def pace_of(sample: Callable[[int], object], device: torch.device, short: int, long: int) -> Pace:
    """A decode step, as the difference of long and short answers: what happens once per rollout cancels out.

    The clock runs without the profiler, which slows the host and takes long to read. It sees a twelfth of the steps.
    """
    sample(short)
    few, many = (median_s(partial(sample, tokens), device, 3) for tokens in (short, long))
    steps = max(1, (long - short) // 12)
    less, more = (profiled(partial(sample, tokens), device) for tokens in (steps, 2 * steps))
    return Pace(
        (many - few) / (long - short), (busy_s(more) - busy_s(less)) / steps, (waits_in(more) - waits_in(less)) / steps
    )


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    x = torch.randn(2**28 if on_gpu(device) else 2**20, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_s(partial(y.copy_, x), device, 10)


def pace(device: torch.device) -> Iterator[Row]:
    """Decode steps: waits, how busy the GPU is, and tokens per second against the bytes that have to move."""
    speed = bandwidth(device)
    for name in SHAPES if on_gpu(device) else ("Qwen/small",):
        policy = random_policy(qwen_config(name, device, layers=36), device)
        for rows in (64, 256) if on_gpu(device) else (16,):
            yield from pace_rows(f"{name.partition('/')[2]}, {rows} rows", policy, rows, speed)
        del policy
        gc.collect()


def pace_rows(what: str, policy: Policy, rows: int, speed: float) -> Iterator[Row]:
    """Of eight answers to each prompt, with steps recorded and not; `speed` in bytes per second."""
    device, n = policy.device, 8
    gpu = on_gpu(device)
    S, short, long = (512, 8, 56) if gpu else (12, 2, 8)
    many = rows // n
    prompts, shapes = prompts_for(policy, many, S), Shapes.of_config(policy.lm.config)
    moved = decode_bytes(shapes, [S] * many, n, long, 2) - decode_bytes(shapes, [S] * many, n, short, 2)
    bound = n * many * (long - short) * speed / moved
    for how, record in (("graphs", cuda_graphs if gpu else lambda: copied), ("eager", lambda: None)):
        found = pace_of(partial(rollout_of, policy, prompts, n, record), device, short, long)
        rate = n * many / found.seconds
        clock, share = "" if gpu else NO_CLOCK, f"{100 * rate / bound:.0f} % of the bound"
        yield row(f"{what}, {how}: waits per step", found.waits, "<=", 1, skip="" if gpu else NO_WAIT)
        if how == "graphs":
            yield row(f"{what}, {how}: share of time the GPU works", found.busy / found.seconds, ">", 0.8, skip=clock)
        yield row(f"{what}, {how}: tokens/s", rate, "<=", bound, note=share, skip=clock)


def rollout_of(
    policy: Policy, prompts: Sequence[Sequence[int]], n: int, record: Callable[[], Capture | None], tokens: int
) -> None:
    """Answers of so many tokens, recorded anew."""
    sampled(policy, prompts, n, tokens, record())
