"""What is possible: how fast this machine multiplies and reads, and the least that a rollout and an RL step must do.

    python -m tools.bench limits --model DIR --dtype float32

The counts are for dense models and for what has to be computed: every prompt once per group, logits of answer tokens alone,
keys that a token sees. What is computed twice to save memory, and padding, do not count as work. A multiplication and an
addition are two operations (FLOPs).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from engine.batches import longest_micro_batch, tokens_of
from engine.fast import can_pack, pack, packed_linear
from model import HEAD_BYTES, shape

SECONDS = 0.1  # each product and each reading is repeated for so long
READ_BYTES = 2**28  # what is read: far more than caches hold
SQUARE = 1024  # side of the square product
MOST_ROWS = 2048  # more tokens make no product faster


@dataclass(frozen=True)
class Shapes:
    """The matrices of a dense model as (out, in), and its attention: layers, widths of all queries and of all keys."""

    linear: tuple[tuple[int, int], ...]  # without the head
    head: tuple[int, int]
    layers: int
    queries: int
    keys: int

    @classmethod
    def of(cls, model: str) -> "Shapes":
        """Those of a Hugging Face folder; its weights are not read."""
        return cls.of_config(AutoConfig.from_pretrained(model))

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> "Shapes":
        """Those of a model so configured."""
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config)
        bodies = [m for m in lm.base_model.modules() if not isinstance(m, nn.Embedding)]
        linear = [tuple(p.shape) for m in bodies for p in m.parameters(recurse=False) if p.ndim == 2]
        L, K, D = shape(config)
        heads = config.get_text_config().num_attention_heads
        return cls(tuple(linear), tuple(lm.get_output_embeddings().weight.shape), L, heads * D, K * D)

    @property
    def body(self) -> int:
        """Weights of the layers that multiply."""
        return sum(out * into for out, into in self.linear)

    @property
    def top(self) -> int:
        """Weights of the head."""
        return self.head[0] * self.head[1]


@dataclass(frozen=True)
class Limits:
    """Operations per second of each product, bytes per second of each way to read; the best of each kind is the limit."""

    flops: Mapping[str, float]
    bytes: Mapping[str, float]

    @property
    def peak(self) -> float:
        """Operations per second."""
        return max(self.flops.values())

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return max(self.bytes.values())


# The least work. `prompts` are their lengths in tokens; each has n answers of T tokens.


def tokens_bound(prompts: Sequence[int], n: int, T: int) -> float:
    """How many times more tokens a trainer computes that repeats the prompt for every answer."""
    return sum(n * (S + T) for S in prompts) / sum(S + n * T for S in prompts)


def forward_flops(shapes: Shapes, prompts: Sequence[int], n: int, T: int) -> int:
    """Of the log-probs of all answers: layers over every token, the head over answer tokens, attention over what is seen."""
    pairs = sum(S * (S + 1) // 2 + n * (T * S + T * (T + 1) // 2) for S in prompts)
    tokens, answer_tokens = sum(prompts) + len(prompts) * n * T, len(prompts) * n * T
    return 2 * shapes.body * tokens + 2 * shapes.top * answer_tokens + attention_flops(shapes, pairs)


def attention_flops(shapes: Shapes, pairs: int) -> int:
    """Scores and weighted values of so many (query, key) pairs in every layer."""
    return 4 * shapes.queries * shapes.layers * pairs


def update_flops(shapes: Shapes, prompts: Sequence[int], n: int, T: int) -> int:
    """Forward and backward: each product once forward, and backward once for its input and once for its weight."""
    return 3 * forward_flops(shapes, prompts, n, T)


def prefill_flops(shapes: Shapes, prompts: Sequence[int]) -> int:
    """Of all prompts, with the logits of their last tokens."""
    pairs = sum(S * (S + 1) // 2 for S in prompts)
    return 2 * shapes.body * sum(prompts) + 2 * shapes.top * len(prompts) + attention_flops(shapes, pairs)


def decode_flops(shapes: Shapes, prompts: Sequence[int], n: int, T: int) -> int:
    """Of the T - 1 steps that follow the prefill, which gives the first token: every answer sees its prompt and itself."""
    rows, steps = len(prompts) * n, T - 1
    pairs = n * steps * sum(prompts) + rows * steps * T // 2
    return 2 * (shapes.body + shapes.top) * rows * steps + attention_flops(shapes, pairs)


def decode_bytes(shapes: Shapes, prompts: Sequence[int], n: int, T: int, size: int) -> int:
    """Read in these steps, `size` bytes a number: all weights, keys and values of a prompt once, and of every answer."""
    rows, steps = len(prompts) * n, T - 1
    cached = steps * sum(prompts) + rows * steps * T // 2
    return size * (steps * (shapes.body + shapes.top) + 2 * shapes.keys * shapes.layers * cached)


def rollout_s(shapes: Shapes, prompts: Sequence[int], n: int, T: int, size: int, limits: Limits) -> float:
    """Least seconds of a rollout: prefill, then decoding, each by its operations or its bytes, whichever takes longer."""
    prefill = prefill_flops(shapes, prompts) / limits.peak, size * (shapes.body + shapes.top) / limits.bandwidth
    decode = (
        decode_flops(shapes, prompts, n, T) / limits.peak,
        decode_bytes(shapes, prompts, n, T, size) / limits.bandwidth,
    )
    return max(prefill) + max(decode)


# What this machine does


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest call on an idle machine, or more: wall time, or CPU seconds of all threads where they are less.

    Other work stretches the first and not the second. CPU seconds divided by threads would be too few: small products keep
    one thread busy, whatever the number.
    """
    found, end = list[float](), time.perf_counter() + SECONDS
    while not found or time.perf_counter() < end:
        started, used = time.perf_counter(), time.process_time()
        work()
        found.append(min(time.perf_counter() - started, time.process_time() - used))
    return min(found)


@torch.no_grad()
def measure(shapes: Shapes, dtype: torch.dtype, tokens: int) -> Limits:
    """Products of the model's own shapes over so many tokens and a large square one; three ways to read memory."""
    rows = min(tokens, MOST_ROWS)
    sizes = {(rows, *weight) for weight in shapes.linear} | {(SQUARE, SQUARE, SQUARE)}
    sizes |= {(min(rows, max(1, HEAD_BYTES // (4 * shapes.head[0]))), *shapes.head)}  # as many as one chunk of the head
    flops = {f"{r}x{i} by {i}x{o}": 2 * r * i * o / product_s(r, o, i, dtype) for r, o, i in sorted(sizes)}
    x = torch.zeros(READ_BYTES // 4)
    y = torch.empty_like(x)
    weight = y.view(dtype).zero_().view(-1, SQUARE)
    one = torch.zeros(1, SQUARE, dtype=dtype)
    ways: dict[str, Callable[[], object]] = {"sum": x.sum, "matrix by vector": lambda: F.linear(one, weight)}
    read = {name: READ_BYTES / best_s(way) for name, way in ways.items()}
    return Limits(flops, {**read, "copy": 2 * READ_BYTES / best_s(lambda: y.copy_(x))})


def product_s(rows: int, out: int, into: int, dtype: torch.dtype) -> float:
    """Seconds of one product, by PyTorch's own or with the weight packed, whichever is faster here."""
    x, weight = torch.randn(rows, into).to(dtype), torch.randn(out, into).to(dtype)
    plain = best_s(lambda: F.linear(x, weight))
    if not can_pack(weight):
        return plain
    packed: Tensor = pack(weight)
    return min(plain, best_s(lambda: packed_linear(packed, None, x)))


def ideal(shapes: Shapes, dtype: torch.dtype, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A job of tools.bench as a side that reaches the limits would do it: its times, and the limits they come from."""
    prompts, n, T = [len(ids) for ids in job["prompts"]], job["n"], job["max_new_tokens"]
    step = job["task"] != "rollout"
    tokens = tokens_of(longest_micro_batch(max(prompts), T, n, job["micro_batch"])) if step else sum(prompts)
    limits = measure(shapes, dtype, tokens)
    generate = rollout_s(shapes, prompts, n, T, dtype.itemsize, limits)
    found: dict[str, Any] = {"flops": limits.flops, "bytes": limits.bytes}
    if not step:
        return {**found, "seconds": generate, "cpu_s": threads * generate}
    score, update = (work(shapes, prompts, n, T) / limits.peak for work in (forward_flops, update_flops))
    parts = {"generate_s": generate, "score_s": score, "update_s": update, "update_cpu_s": threads * update}
    return {**found, "seconds": generate + score + update, "cpu_s": threads * (generate + score + update), **parts}
