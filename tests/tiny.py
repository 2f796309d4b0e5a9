"""Tiny causal LMs in float64 for the tests: random ones, one with known probabilities, and a tokenizer for them."""

import copy
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from common.hub import quiet_transformers
from model import ATTENTION

V = 97  # vocabulary
torch.set_num_threads(1)  # on a busy machine a second thread makes such small products some 50 times slower
quiet_transformers()


def tiny(kind: str = "qwen3", *, tied: bool = True, seed: int = 0, attention: str = ATTENTION, **settings: Any) -> Any:
    """A random Qwen3 or Llama: 2 layers, 4 query heads over 2 key/value heads 8 wide, float64 norms, sharp logits."""
    base = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind](**{**base, **settings})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    return exact_norms(lm)


def exact_norms(lm: Any) -> Any:
    """Keep transformers' RMSNorms in the model's own dtype: theirs cast to float32, which hides errors below 1e-7."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        scale: Tensor = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * (x * scale)  # type: ignore[no-any-return]

    for module in lm.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(forward, module)
    return lm


def with_attention(lm: Any, name: str) -> Any:
    """A copy of `lm` that runs with one of transformers' own attentions: the model that ours must equal."""
    other = copy.deepcopy(lm)
    other.set_attn_implementation(name)
    return other


def chain(table: Mapping[int, Mapping[int, float]]) -> Any:
    """A Llama whose next token depends on the last one only, with the probabilities of `table` (last -> next -> p).

    The embedding is one-hot of 100, both blocks add nothing, and the final norm (eps 0) makes sqrt(100) of the 1: so
    the head's column is ln p / 10. Tokens not named have probability 0 (logit -10,000), rows not named are uniform.
    """
    lm = tiny("llama", tied=False, hidden_size=100, intermediate_size=8, rms_norm_eps=0.0)
    with torch.no_grad():
        lm.model.embed_tokens.weight.copy_(torch.eye(V, 100))
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        logits_VV = torch.zeros(V, V, dtype=torch.float64)  # [last, next]
        for last, row in table.items():
            logits_VV[last] = -10_000
            for token, p in row.items():
                logits_VV[last, token] = torch.tensor(p, dtype=torch.float64).log()
        lm.lm_head.weight[:, :V] = logits_VV.T / 10
        lm.lm_head.weight[:, V:] = 0
    return lm


def answer_logprobs(lm: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs of one answer from transformers' model, prompt and answer as one unpadded sequence."""
    logits_TV = lm(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    logp_T: Tensor = logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return logp_T


def gradients(lm: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d weight of every parameter, by name."""
    names, values = zip(*lm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w92; ids 93-96 are <pad>, <|im_start|>, <|im_end|> (the stop token), <unk>."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = [f"w{i}" for i in range(V - len(special))] + special
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    return made
