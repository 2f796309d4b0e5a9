"""Right or refused: which models can be opened, and up to which length (docs/architectures.md, tests/architectures.py)."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import architectures
import pytest
import torch
import transformers as hf
from tiny import tiny, tokenizer
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import model
from common.errors import UserError
from common.shrunk import FAR, NEAR, positions, random_model, shrunk
from engine.fsdp import blocks, checkpoint_blocks
from model import ATTENTION, Group, Policy, Unlike, attention, check_architecture, check_sharing
from rollout import generate

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1, initializer_range=0.3,
)  # fmt: skip
HEADS = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, initializer_range=0.3)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=8.0,
    original_max_position_embeddings=128,
)  # fmt: skip
OPT = hf.OPTConfig(
    vocab_size=97, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=200,
)  # fmt: skip
PHI3 = hf.Phi3Config(**SMALL, sliding_window=None, original_max_position_embeddings=128, rope_parameters=LONGROPE)


def folder(path: Path, config: hf.PretrainedConfig) -> Path:
    """A random model of this configuration as a user has it."""
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


# What the attention is handed


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "indices", "block_indices", "softcap", "sliding_window", "c"])
def test_a_keyword_that_the_attention_does_not_know_is_refused(name):
    """Swallowed, a sink moved log-probs by nats. None is what a layer hands over that does not use the keyword."""
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    attention(torch.nn.Module(), q, k, k, None, **{name: None})
    with pytest.raises(ValueError, match=name):
        attention(torch.nn.Module(), q, k, k, None, **{name: torch.ones(4)})


def test_an_attention_that_looks_ahead_is_refused():
    q = torch.zeros(1, 4, 3, 8)
    attention(torch.nn.Module(), q, q, q, None, is_causal=True)
    with pytest.raises(ValueError, match="causal"):
        attention(torch.nn.Module(), q, q, q, None, is_causal=False)


# A tiny copy of a configuration


def test_a_large_configuration_by_hand():
    """Of everything at most so much: 8 of 36 layers, 4 of 32 heads, 2 of 8 key/value heads, width 8 of 128, window 16 of
    4,096; the list names the kinds of layers, so the first of each kind stays: 0 and 30, and 1 to 6 to make eight."""
    kinds = ["full_attention"] * 30 + ["sliding_attention"] * 6
    large = hf.Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, use_sliding_window=True, sliding_window=4096, max_window_layers=30,
        layer_types=kinds, eos_token_id=151645, max_position_embeddings=40960,
    )  # fmt: skip
    small = shrunk(large, NEAR)
    assert (small.num_hidden_layers, small.num_attention_heads, small.num_key_value_heads) == (8, 4, 2)
    assert (small.hidden_size, small.intermediate_size, small.head_dim, small.vocab_size) == (32, 64, 8, 128)
    assert (small.sliding_window, small.max_position_embeddings, small.eos_token_id) == (16, 16, 127)
    assert small.layer_types == ["full_attention"] * 7 + ["sliding_attention"]
    assert (large.num_hidden_layers, large.sliding_window) == (36, 4096)  # the given one is left alone
    assert random_model(hf.Qwen3Config(**{**small.to_dict(), "use_sliding_window": False})).num_parameters() < 200_000


def test_heads_without_groups_stay_without_groups():
    """32 of 32 key/value heads become 4 of 4, for 2 of 4 would be another way through the code."""
    assert shrunk(hf.LlamaConfig(num_attention_heads=32, num_key_value_heads=32), NEAR).num_key_value_heads == 4


def test_settings_of_single_layers_keep_their_layers():
    """Layers 0 to 7 stay of 35; 11, 17, ... have settings of their own in Gemma 4: none of them is left, 3 is."""
    made = shrunk(hf.CONFIG_MAPPING["gemma4_text"](), NEAR)
    assert all(0 <= int(layer) < made.num_hidden_layers for layer in made.to_dict().get("per_layer_config") or {})
    random_model(made)


def test_the_fewest_positions():
    """Phi-3 names 131,072 positions and the 4,096 after which its frequencies change."""
    rope = {**LONGROPE, "original_max_position_embeddings": 4096, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    assert positions(hf.Phi3Config(max_position_embeddings=131072, rope_parameters=rope)) == 4096
    assert positions(hf.GPT2Config(n_positions=77)) == 77


def test_nobody_s_random_numbers_move():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    random_model(hf.LlamaConfig(**SMALL))
    assert torch.equal(torch.get_rng_state(), before)


# Right


@pytest.mark.parametrize(
    "config",
    [
        hf.Qwen3Config(**SMALL),
        hf.Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        hf.MistralConfig(**SMALL, sliding_window=None),
        hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_can_share_prompts(config):
    """Equal to eager attention at any length: there is no longest text."""
    assert check_architecture(config, "m", tokens=10**6) is None


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (hf.GPT2Config(**HEADS, n_positions=300), 300),
        (OPT, 200),
        (PHI3, 128),
        (hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 256),
    ],
    ids=["gpt2", "opt", "longrope", "dynamic"],
)
def test_models_that_can_share_prompts_up_to_a_length(config, longest):
    """A table of positions ends; longrope and dynamic change all frequencies when one text of the call is longer."""
    assert check_architecture(config, "m", tokens=longest) == longest
    with pytest.raises(UserError, match=f"after {longest} tokens, and .* may have {longest + 1}: lower .*--max_new_tokens"):
        check_architecture(config, "m", tokens=longest + 1)


def test_below_its_switch_a_longrope_model_is_right_in_any_company(tmp_path):
    """Against transformers' eager attention, each text alone; beyond the switch nothing is computed."""
    policy = Policy.load(folder(tmp_path, PHI3)).eval()
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    answer = [5, 6, 7]
    texts = [[2, 3, 4], [(3 * i) % 97 for i in range(125)]]
    with torch.no_grad():
        logp_BT, _ = policy([Group(text, [answer]) for text in texts])
        for row, text in zip(logp_BT, texts, strict=True):
            logits_TV = plain(torch.tensor([text + answer]), use_cache=False).logits[0, len(text) - 1 : -1]
            assert_close(row, logits_TV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0], rtol=0, atol=1e-4)
        with pytest.raises(UserError, match="129 tokens.*up to 128"):
            policy([Group(texts[0], [answer]), Group([*texts[1], 9], [answer])])
        with pytest.raises(UserError, match="129 tokens.*up to 128"):
            generate(policy, [texts[0]], keys=[(0, 0, "a")], n=1, max_new_tokens=126, temperature=1.0, eos_ids=frozenset())
    assert policy.frozen_copy().longest == 128


# Refused


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (hf.PhimoeConfig(**SMALL, sliding_window=4096, num_local_experts=4), "nats off transformers' eager attention"),
        (hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, layer_types=["full_attention"] * 2), "s_aux"),
        (hf.MistralConfig(**SMALL, sliding_window=4096), "sliding_window"),
        (hf.Gemma2Config(**SMALL, head_dim=8, layer_types=["full_attention"] * 2), "softcap"),
        (hf.DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4}, n_routed_experts=8), "of one width"),
        (hf.DiffLlamaConfig(**SMALL), "not every layer"),
        (hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8), "MambaConfig"),
        (hf.CohereConfig(**SMALL, logit_scale=0.06), "nats off"),
        (hf.BertConfig(**{**SMALL, "num_key_value_heads": None}, is_decoder=True), "nats off"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_models_that_are_refused(config, why):
    """Windows by mask alone, sinks, windows, soft caps, values of another width than keys, two attentions per layer, none at
    all, scaled logits, an encoder: one line that says why and where to look."""
    with pytest.raises(UserError) as raised:
        check_architecture(config, "some/model")
    told = str(raised.value)
    assert why in told and told.startswith("the model some/model (") and "docs/architectures.md" in told and "\n" not in told


def test_a_window_beyond_every_text_here_is_seen_all_the_same(tmp_path):
    """4,096 tokens in the configuration: the tiny copy has 16. Refused when the model is opened, before a weight is read."""
    path = folder(tmp_path, hf.PhimoeConfig(**SMALL, sliding_window=4096, num_local_experts=4))
    os.remove(path / "model.safetensors")
    with pytest.raises(UserError, match="phimoe"):
        Policy.load(path)


def test_weights_that_do_not_give_eager_attention_are_refused(tmp_path, monkeypatch):
    """The tiny copy may be right and the model not: an attention that is wrong where heads are 40 wide, as only here."""
    path = folder(tmp_path, hf.LlamaConfig(**{**SMALL, "hidden_size": 160}))
    Policy.load(path)
    right = model.rectangle
    monkeypatch.setattr(model, "rectangle", lambda x, index: right(x, index) * (1 if x.shape[-1] < 40 else 1.1))
    with pytest.raises(UserError, match=f"{path.name} cannot share prompts: .* nats off"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("dtype", "gap", "refused"),
    [
        (torch.bfloat16, 0.49, False), (torch.bfloat16, 0.51, True), (torch.float32, 9e-4, False),
        (torch.float32, 0.0011, True),
    ],
)
def test_likely_tokens_are_compared(dtype, gap, refused):
    """After the prompt token 9 has 1/2 and token 4 has 1/4, after 9 token 2 has 1/2: ln 1/2 = -.6931, ln 1/4 = -1.3863.

    SmolLM2's log-prob of a fixed token was -17.61 in float32 and, after 40 RL steps, -18.02 and -18.59 in bf16: no fault.
    """
    asked = []

    def eager(ids_1N, use_cache):
        shares_NV = torch.full((ids_1N.shape[1], 32), 0.5 / 31)
        shares_NV[3:, 2] = 0.5
        shares_NV[2] = 0.25 / 30
        shares_NV[2, [9, 4]] = torch.tensor([0.5, 0.25])
        return SimpleNamespace(logits=shares_NV[None].log())

    def shared(groups):
        asked.extend(groups)
        return torch.tensor([[-0.693147, -0.693147 + gap], [-1.386294, 0.0]]), None

    lm = Mock(side_effect=eager, dtype=dtype)
    lm.config.get_text_config.return_value.vocab_size = 32
    with pytest.raises(Unlike, match="nats off") if refused else nullcontext():
        check_sharing(Mock(side_effect=shared, lm=lm, device="cpu"))
    assert [group.answers for group in asked] == [[[9, 2], [4]]]


def test_an_opened_model_keeps_our_attention(tmp_path):
    """The comparison with eager attention gives it back."""
    policy = Policy.load(folder(tmp_path, hf.LlamaConfig(**SMALL)))
    assert policy.lm.config._attn_implementation == ATTENTION


# In training


def test_nothing_drops_out_under_activation_checkpoints():
    """GPT-2 has dropout of .1 in its blocks: it would give every answer another probability in each forward."""
    policy = Policy(random_model(shrunk(hf.GPT2Config(), FAR), ATTENTION))
    groups = [Group([1, 2, 3], [[4, 5], [6]])]
    expected = policy(groups)[0]
    checkpoint_blocks(policy)
    assert all(block.training for block in blocks(policy))
    for _ in range(2):
        assert_close(policy(groups)[0], expected)


# The page


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt2", "gpt_oss", "diffllama"])
def test_the_page_of_architectures_says_what_the_models_say(name):
    """Five of its 189 rows are made again here, all of them by .ci/nightly."""
    row = "\n".join(line for line in architectures.page([architectures.tried(name)]) if line.startswith("| `"))
    assert row in architectures.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_names_every_class_that_transformers_registers():
    lines = architectures.PAGE.read_text(encoding="utf-8").splitlines()
    named = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert named == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_tiny_models_of_the_tests_are_right_too():
    assert check_architecture(tiny().config, "tiny") is None
