"""How much memory a run will need, before anything is loaded: `python selfemo.py --plan [RANKSxGB] ...`.

One line a component, for one rank: the parameters are counted on a model without memory, what a forward keeps for backward
by running one on fake tensors. The longest prompts and answers that the settings allow are assumed, so real runs, whose
answers rarely reach the limit, stay below.

Sizes are bytes. R ranks of a node share the weights; c bytes a number in the computing type (2 in bf16, 4 in float32).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from common.errors import UserError
from common.hub import openable, read_config, user_errors
from engine import fsdp, processes
from engine.batches import longest_micro_batch, tokens_of
from engine.cache import cache_bytes, largest
from engine.cascade import TORCH, kernels_fit, layout_for
from engine.processes import device_memory
from model import ATTENTION, HEAD_BYTES, Group, Policy, check_architecture
from rollout import MAX_ROWS, PREFILL_TOKENS
from training.config import Config

GB = 10**9
MARGIN = 0.08  # of the device: CUDA's own context, fragmentation, collectives
QWEN3 = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: Mapping[str, Mapping[str, Any]] = {  # the paper's two models, so that a plan needs no download
    "Qwen/Qwen3-8B": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    "Qwen/Qwen3-4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Place:
    """Where a run would run: ranks, bytes of a device, a GPU or a CPU, whether weights are sharded."""

    ranks: int
    memory: int
    gpu: bool
    sharded: bool
    nodes: int = 1
    dtype: str = "auto"

    @property
    def R(self) -> int:
        """Ranks that share the weights: those of a node."""
        return self.ranks // self.nodes if self.sharded else 1

    @property
    def c(self) -> int:
        """Bytes a number in the computing type."""
        return {"auto": 2 if self.gpu else 4, "bfloat16": 2, "float32": 4}[self.dtype]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, of the largest block, outside of the blocks."""

    all: int
    block: int
    rest: int
    layers: int


@dataclass(frozen=True)
class Plan:
    """Bytes on the device by component: held all the time, while sampling, while learning; and in main memory."""

    held: Mapping[str, int]
    sampling: Mapping[str, int]
    learning: Mapping[str, int]
    host: Mapping[str, int]
    place: Place

    @property
    def peak(self) -> int:
        """The most that is in use at once: sampling and learning take turns."""
        return sum(self.held.values()) + max(sum(self.sampling.values()), sum(self.learning.values()))

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.peak <= self.place.memory * (1 - MARGIN)


def plan(cfg: Config) -> str:
    """The text that `--plan` prints. Raises `UserError` for a model that cannot be opened."""
    place, config = place_of(cfg.plan or "", cfg.dtype), config_of(cfg.model)
    check_architecture(config, cfg.model, cfg.max_prompt_tokens + cfg.max_new_tokens)
    with user_errors(f"cannot open the model {cfg.model}"):
        made = estimate(cfg, config, place)
    return "\n".join([*table(cfg, made), *advice(cfg, config, made)])


def place_of(text: str, dtype: str = "auto") -> Place:
    """`8x80`: eight GPUs of 80 GB; `2x8x80`: two such nodes; nothing: this machine. Raises `UserError` for other words."""
    if not text:
        here, many = processes.device(), processes.launched_size()
        nodes = many // processes.ranks_here()
        gpu = here.type == "cuda"
        return Place(many, device_memory(here), gpu, many > 1 or gpu or dtype == "bfloat16", nodes, dtype)
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)(?:GB)?", text, re.IGNORECASE)
    if not match or match[1] == "0" or int(match[2]) < 1 or float(match[3]) <= 0:
        raise UserError(f"--plan {text}: give GPUs x GB, for example 8x80 or 2x8x80, or nothing for this machine")
    nodes = int(match[1] or 1)
    return Place(nodes * int(match[2]), int(float(match[3]) * GB), gpu=True, sharded=True, nodes=nodes, dtype=dtype)


def config_of(model: str) -> PretrainedConfig:
    """The configuration of a model, without its weights."""
    if model in SHAPES:
        return Qwen3Config(**SHAPES[model])
    openable(model)
    return read_config(model)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Parameters, counted on a model without memory; tied ones once."""
    policy = Policy(fsdp.on_meta(config, torch.float32))
    each = [sum(p.numel() for p in block.parameters()) for block in fsdp.blocks(policy)]
    total = sum(p.numel() for p in policy.parameters())
    return Sizes(total, max(each), total - sum(each), len(each))


def estimate(cfg: Config, config: PretrainedConfig, place: Place) -> Plan:
    """Bytes of every component for one rank."""
    n = sizes_of(config)
    R, c = place.R, place.c
    head = 4 * n.rest if c == 2 and not place.gpu else 0  # a float32 copy (see `common.head.product`)
    offloaded = place.gpu and cfg.ref_offload
    held = {"weights (float32)": 4 * n.all // R, "AdamW's moments": 8 * n.all // R}
    if not offloaded:
        held["reference"] = c * n.all // R
    if place.sharded:
        held["rollout copy"] = c * n.all
    logits = sampling_bytes(cfg, config, place) + head
    sampling = {"keys and values": kv_bytes(cfg, config, place), "logits and prefill": logits}
    learning = {"gradients": 4 * n.all // R, "activations": activation_bytes(cfg, config, place)}
    learning["head chunks"] = 2 * HEAD_BYTES + head  # logits and their exponentials
    if place.sharded:
        # Gathered: the rest (embeddings, head) and two blocks; the largest of them also as a gradient and its float32 sum.
        learning["gathered weights"] = c * (n.rest + 2 * n.block) + (c + 4) * max(n.rest, n.block)
    host = {"reference (offloaded)": c * n.all} if offloaded else {}
    return Plan(held, sampling, learning, host, place)


def kv_bytes(cfg: Config, config: Any, place: Place) -> int:
    """Keys and values at most: the budget, or less where all rows at their longest need less."""
    prompts = -(-cfg.batch_prompts // place.ranks)
    evaluated = cfg.eval_limit or MAX_ROWS  # one answer per prompt
    S, T = cfg.max_prompt_tokens, cfg.max_new_tokens
    sizes = [largest(many, n, MAX_ROWS, S, T) for many, n in ((prompts, cfg.n), (evaluated, 1))]
    return min(max(cache_bytes(config, place.c, size) for size in sizes), cfg.kv_budget or place.memory // 2)


def sampling_bytes(cfg: Config, config: Any, place: Place) -> int:
    """What a decode step makes of its logits (six of their size, float32), or a prefill of its longest layer.

    Recorded steps keep theirs for themselves, so it counts beside the prefill's.
    """
    logits = MAX_ROWS * config.vocab_size * 6 * 4
    prefill = PREFILL_TOKENS * place.c * (3 * config.intermediate_size + 6 * config.hidden_size)
    return int(logits + prefill if cfg.compile and place.gpu else max(logits, prefill))


def activation_bytes(cfg: Config, config: PretrainedConfig, place: Place) -> int:
    """What the longest micro-batch keeps for backward, counted on fake tensors for one and for two blocks."""
    part = longest_micro_batch(cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.n, cfg.micro_batch)
    one, two = (kept_bytes(config, layers, part, place) for layers in (1, 2))
    block, layers = two - one, sizes_of(config).layers
    if not cfg.activation_checkpointing:
        return one + (layers - 1) * block
    hidden: int = config.hidden_size  # type: ignore[attr-defined]
    return one + layers * tokens_of(part) * hidden * place.c  # a block's input each; one block is computed again at a time


def kept_bytes(config: PretrainedConfig, layers: int, groups: Sequence[Group], place: Place) -> int:
    """Bytes that autograd keeps of a forward of a model cut to a number of layers; no memory is used for it."""
    cut = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with FakeTensorMode():
        dtype = torch.bfloat16 if place.c == 2 else torch.float32
        layout_of = layout_for(TORCH if place.gpu and kernels_fit(config, dtype) else None)
        policy = Policy(AutoModelForCausalLM.from_config(cut, attn_implementation=ATTENTION, dtype=dtype), layout_of)
        weights = {p.untyped_storage()._cdata for p in policy.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            policy(groups)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def changes(cfg: Config, made: Plan) -> Iterator[tuple[Config, str]]:
    """Settings that need less memory and give the same results, each with those before it."""
    if not cfg.activation_checkpointing:
        cfg = replace(cfg, activation_checkpointing=True)
        yield cfg, "--activation_checkpointing true"
    if not cfg.ref_offload:
        cfg = replace(cfg, ref_offload=True)
        yield cfg, "--ref_offload true"
    for share in (4, 8, 16):
        cfg = replace(cfg, kv_budget=made.place.memory // share)
        yield cfg, f"--kv_budget {cfg.kv_budget}"
    cfg = replace(cfg, micro_batch=1)
    yield cfg, "--micro_batch 1"


def table(cfg: Config, made: Plan) -> list[str]:
    """One line a component."""
    place = made.place
    where = f"{place.ranks} x {place.memory / GB:.0f} GB, {'bf16' if place.c == 2 else 'float32'} compute"
    shape = f"{cfg.max_prompt_tokens} + {cfg.max_new_tokens} tokens, micro-batch {cfg.micro_batch}"
    lines = [f"plan for {cfg.model} on {where}; {shape}", f"{'GB on each device':>40}"]
    for title, part in (("all the time", made.held), ("while sampling", made.sampling), ("while learning", made.learning)):
        lines += [title, *(f"  {name:26} {size / GB:11.2f}" for name, size in part.items())]
    lines.append(f"{'peak':28} {made.peak / GB:11.2f}  of {place.memory * (1 - MARGIN) / GB:.2f} usable")
    lines += [f"in the main memory of a node: {name} {size / GB:.1f} GB" for name, size in made.host.items()]
    return lines


def advice(cfg: Config, config: PretrainedConfig, made: Plan) -> list[str]:
    """Whether it fits; if not, which one change makes it fit, the mildest first."""
    if made.fits:
        return ["fits"]
    over = made.peak - int(made.place.memory * (1 - MARGIN))
    lines = [f"does not fit: {over / GB:.1f} GB too much"]
    for change, words in changes(cfg, made):
        other = estimate(change, config, made.place)
        start = "" if len(lines) == 1 else "and "
        lines.append(f"  {start}{words}: peak {other.peak / GB:.1f} GB, {'fits' if other.fits else 'still too much'}")
        if other.fits:
            return lines
    return [*lines, "  more GPUs, a smaller model, or shorter answers"]
