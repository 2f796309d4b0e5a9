"""A tiny copy of a model's configuration: the same architecture, with few and narrow layers and short distances.

A rule that is read from a configuration (a window, a switch between two sets of rotary frequencies) then acts within a
few tokens, and a random model of that shape costs a fraction of a second, however large the one that is to be opened.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

NEAR, FAR = 16, 64  # tokens: what windows and chunks shrink to, and more than the compared texts have
LAYERS = r"(num_hidden_layers|n_layers?|num_layers|num_blocks|((en|de)coder|num_(en|de)coder)_layers|num_layers_per_stack)"
POSITIONS = r".*(position_embeddings|target_positions|source_positions|model_max_length|max_seq_len)|n_positions|n_ctx"
PATTERNS = r"chunk_size_feed_forward|.*_pattern"  # count layers, or nothing that matters here
SIZES = {  # at most so much of what a name means; the first that fits counts
    r".*vocab.*": 128,
    r".*(intermediate|ffn|feed_forward|inner|dff|dim_ff).*": 64,
    r"((swa|encoder|decoder|num|index|linear|mamba|query|key|value|attention|n)_)*(heads?|query_groups)": 4,
    r"qk_head_dim|head_dim_qk|mamba_(d_head|headdim)": 16,
    r".*(head_?dim|head_size|d_head|dim_head|channels|rotary_dim|d_rel|d_kv)": 8,
    r".*(lora_?rank|_rank|state_size|d_state|topk_blocks)": 8,
    r".*(per_tok|per_token|shared_experts|topk|moe_k|top_k_experts|group|groups|n?groups)": 2,
    r".*(num_experts|routed_experts|local_experts|expert_num)": 4,
    r".*(hidden|embd?|d_model|embed|embedding|model_base|width|d_ssm|.*_dim).*": 32,
    r".*(window|chunk|length|floor|local_att|extent|distance|index_block).*": NEAR,
}


def shrunk(config: PretrainedConfig, positions: int) -> PretrainedConfig:
    """A tiny copy of a configuration that knows `positions` positions. May raise anything where a class checks its sizes."""
    return type(config).from_dict(_shrunk(config.to_dict(), positions))


@torch.no_grad()
def random_model(config: PretrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """A float32 model with random weights, always the same ones; nobody's random numbers move.

    Its attention is sharp: in an even one a wrong mask would hardly show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for weight in lm.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return lm.eval()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Known:
    """A configuration that equals another one of the same text."""

    text: str
    config: PretrainedConfig = field(compare=False)


def positions(config: PretrainedConfig) -> int | None:
    """The fewest positions that a configuration names, None if it names none."""
    return min(_positions(config.get_text_config().to_dict()), default=None)


def _positions(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _positions(value)
        elif re.fullmatch(POSITIONS, str(name)) and isinstance(value, int):
            yield value


def _shrunk(settings: Mapping[Any, Any], positions: int) -> dict[Any, Any]:
    layers = next((v for k, v in settings.items() if re.fullmatch(LAYERS, str(k)) and isinstance(v, int)), 0)
    kept = _layers(settings, layers)
    heads = next((settings[k] for k in ("num_attention_heads", "n_head", "n_heads") if settings.get(k)), 0)
    return {name: _value(str(name), value, positions, layers, kept, heads) for name, value in settings.items()}


def _layers(settings: Mapping[Any, Any], layers: int) -> list[int]:
    """At most eight layers, with one of every kind that the lists of a configuration (layer_types and others) tell apart."""
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == layers]
    kinds = [repr(kind) for kind in zip(*lists, strict=True)] or [""] * layers
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:8]
    return sorted([*first, *[i for i in range(layers) if i not in first][: 8 - len(first)]])


def _value(name: str, value: Any, positions: int, layers: int, kept: list[int], heads: int) -> Any:
    if isinstance(value, Mapping) and name not in ("id2label", "label2id"):
        if value and all(str(key).isdecimal() for key in value):  # settings of single layers, by their numbers
            by_number = {int(key): _shrunk(inner, positions) for key, inner in value.items() if isinstance(inner, Mapping)}
            return {new: by_number[old] for new, old in enumerate(kept) if old in by_number}
        return _shrunk(value, positions)
    if isinstance(value, list) and layers and len(value) == layers:
        return [value[i] for i in kept]
    if isinstance(value, bool) or not isinstance(value, int) or re.fullmatch(PATTERNS, name):
        return value
    if re.fullmatch(LAYERS, name):
        return min(value, len(kept) or 8)
    if re.fullmatch(r"(swa_)?num_key_value_heads|num_kv_heads", name):
        return 4 if value == heads else min(value, 2)
    sizes = {r".*token_id": 127, POSITIONS: positions, r"num_kv_shared_layers": 2, r"max_window_layers": 4, **SIZES}
    return min(value, next((size for pattern, size in sizes.items() if re.fullmatch(pattern, name)), value))
