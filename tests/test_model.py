"""The policy against transformers' own model: group attention, the head in chunks, export, and what it refuses.

All in float64 with the norms kept in float64 (see `tiny.exact_norms`), so that equal means equal to 1e-12.
"""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import V, answer_logprobs, chain, exact_norms, gradients, tiny, tokenizer, with_attention
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from common.errors import UserError
from common.hub import eos_ids, load_tokenizer
from model import ATTENTION, Group, Policy, attention, pad

EXACT = {"rtol": 1e-12, "atol": 1e-12}
KINDS = pytest.mark.parametrize("kind", ["qwen3", "llama"])
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Prompts of 1, 9 and 2 tokens; 2, 3 and 1 answers of 4, 1 | 3, 1, 6 | 5 tokens; token 0 inside prompts and answers.
GROUPS = [
    Group([5], [[7, 0, 9, 10], [11]]),
    Group([1, 0, 2, 3, 4, 90, 6, 7, 8], [[1, 2, 3], [96], [0, 0, 30, 40, 50, 0]]),
    Group([3, 4], [[20, 20, 20, 20, 20]]),
]
LENGTHS = [4, 1, 3, 1, 6, 5]


@pytest.fixture
def folder(tmp_path):
    """A model folder as a user has it, with a tokenizer; its config names stop token 7."""
    path = tmp_path / "start"
    Policy(tiny(eos_token_id=7).float()).export(path, tokenizer())
    return path


def weights_B6():
    """An arbitrary weight per token, 0 off the answers: what a loss would multiply the log-probs with."""
    generator = torch.Generator().manual_seed(1)
    on_BT = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(6, 6, dtype=torch.float64, generator=generator) * on_BT


def separate(lm, temperature=1.0):
    """The six answers of GROUPS one by one through transformers' sdpa model, padded with zeros to [6, 6]."""
    rows = [answer_logprobs(lm, g.prompt_ids, answer, temperature) for g in GROUPS for answer in g.answers]
    return torch.stack([torch.nn.functional.pad(row, (0, 6 - len(row))) for row in rows])


# Group attention


@KINDS
@TIES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_groups_equal_separate_sequences_in_values_and_gradients(kind, tied, temperature):
    """One stream with shared prompts against transformers' sdpa on prompt + answer, one unpadded sequence per answer."""
    lm = tiny(kind, tied=tied)
    plain = with_attention(lm, "sdpa")
    ours_BT, theirs_BT = Policy(lm)(GROUPS, temperature=temperature)[0], separate(plain, temperature)
    assert_close(ours_BT, theirs_BT, **EXACT)
    ours = gradients(lm, (ours_BT * weights_B6()).sum())
    theirs = gradients(plain, (theirs_BT * weights_B6()).sum())
    assert ours.keys() == theirs.keys()
    assert max(g.abs().max() for g in theirs.values()) > 0.1  # there is something to compare
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@KINDS
def test_groups_equal_one_right_padded_batch_with_a_mask(kind):
    """The six sequences in one padded batch of transformers: rows of prompt + answer, mask 1 on tokens, any padding."""
    lm = tiny(kind)
    plain = with_attention(lm, "sdpa")
    rows = [[*g.prompt_ids, *answer] for g in GROUPS for answer in g.answers]
    mask_BZ = pad([[1] * len(row) for row in rows])
    logp_BZV = plain(pad(rows, value=33), attention_mask=mask_BZ, use_cache=False).logits.log_softmax(-1)
    logp_BT = Policy(lm)(GROUPS)[0]
    for i, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        for t in range(length):
            at = len(row) - length + t
            assert_close(logp_BT[i, t], logp_BZV[i, at - 1, row[at]], **EXACT)


@KINDS
def test_groups_equal_eager_attention_to_its_float32_softmax(kind):
    lm = tiny(kind)
    assert_close(Policy(lm)(GROUPS)[0], separate(with_attention(lm, "eager")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", range(3))
def test_a_group_does_not_depend_on_its_batch(index):
    """Alone, together and in reverse order a group has the same values: 1e-12, for matrix products round by shape."""
    policy = Policy(tiny())
    first = [0, 2, 5][index]
    alone_BT = policy([GROUPS[index]])[0]
    B, T = alone_BT.shape
    assert_close(policy(GROUPS)[0][first : first + B, :T], alone_BT, **EXACT)
    first = [4, 1, 0][index]
    assert_close(policy(GROUPS[::-1])[0][first : first + B, :T], alone_BT, **EXACT)


def test_an_answer_does_not_see_its_neighbours():
    """d logp(first answer) / d token is 0 for every token of the other answers, so changing them changes nothing."""
    policy = Policy(tiny())
    before = policy([Group([1, 2], [[3, 4, 5], [6, 7]])])[0]
    after = policy([Group([1, 2], [[3, 4, 5], [8, 9, 10, 11]])])[0]
    assert_close(before[0], after[0, :3], **EXACT)


def test_a_prompt_is_computed_once_and_the_head_sees_answers_only(monkeypatch):
    """Stream: prompts 1 + 9 + 2 and answers 5 + 10 + 5 = 32 tokens; head: one row per answer token = 20."""
    lm, tokens, rows, whole = tiny(), [], [], Policy.head
    lm.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    monkeypatch.setattr(Policy, "head", lambda *args: rows.append(len(args[1])) or whole(*args))
    Policy(lm)(GROUPS)
    assert (tokens, rows) == ([32], [20])


@KINDS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_activation_checkpointing_gives_the_same_gradients(kind):
    """Attention runs twice (forward, and again in backward); keyword arguments such as the layout survive."""
    lm = tiny(kind)
    expected = gradients(lm, (Policy(lm)(GROUPS)[0] * weights_B6()).sum())
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.train()
    calls = []
    lm.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss = (Policy(lm)(GROUPS)[0] * weights_B6()).sum()
    assert len(calls) == 1
    for name, gradient in gradients(lm, loss).items():
        assert_close(gradient, expected[name], **EXACT)
    assert len(calls) == 2


# Log-probs and entropies


@KINDS
def test_heads_spread_as_on_a_gpu_change_nothing(kind, monkeypatch):
    """Values and gradients to 1e-12; 4 query heads over 2 key/value heads."""
    whole = model.masked_attention
    found = []
    for spread in (False, True):
        monkeypatch.setattr(model, "masked_attention", lambda *args, s=spread, **_: whole(*args, spread=s))
        lm = tiny(kind)
        logp_BT, _ = Policy(lm)(GROUPS)
        found.append((logp_BT.detach(), gradients(lm, (weights_B6() * logp_BT).sum())))
    assert_close(found[0], found[1], **EXACT)


def test_log_probs_by_hand_and_zero_off_the_answer():
    """1 -> 0 (.25) or 3; 3 -> 0 or 2 (.5); 0 -> 0 (.125) or 2. Token 0 is a token like another (think pad == eos == 0):
    answer 0: ln .25 = -1.386294 and nothing after it; answer 3 0 0 2: ln .75, ln .5, ln .125, ln .875 =
    -.287682, -.693147, -2.079442, -.133531."""
    lm = chain({1: {0: 0.25, 3: 0.75}, 3: {0: 0.5, 2: 0.5}, 0: {0: 0.125, 2: 0.875}})
    logp_BT, entropy_BT = Policy(lm)([Group([9, 0, 1], [[0], [3, 0, 0, 2]])])
    expected = [[-1.386294361, 0, 0, 0], [-0.287682072, -0.693147181, -2.079441542, -0.133531393]]
    assert_close(logp_BT, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert logp_BT[0, 1:].tolist() == entropy_BT[0, 1:].tolist() == [0, 0, 0]
    assert gradients(lm, logp_BT[0, 0])["lm_head.weight"].abs().max() > 0.1  # the stop token is trained
    lm.zero_grad()
    assert all(not g.any() for g in gradients(lm, Policy(lm)([Group([1], [[0], [3, 0]])])[0][0, 1:].sum()).values())


def test_entropy_by_hand():
    """(.5, .25, .25): .5 ln 2 + .5 ln 4 = 1.5 ln 2 = 1.039721. A certain token: 0. Uniform: ln 97 = 4.574711."""
    lm = chain({1: {2: 0.5, 3: 0.25, 4: 0.25}, 2: {5: 1.0}})
    _, entropy_BT = Policy(lm)([Group([1], [[2, 5, 6]])])
    expected = torch.tensor([[1.0397207708, 0.0, 4.5747109785]], dtype=torch.float64)
    assert_close(entropy_BT, expected, rtol=0, atol=1e-9)
    assert not entropy_BT.requires_grad  # a measurement


def test_temperature_divides_the_logits():
    """(.5, .25, .25) at T = .5: squares .25, .0625, .0625 of sum .375 = 2/3, 1/6, 1/6; entropy .867563.
    At T = 2: roots .707107, .5, .5 of sum 1.707107: .414214, .292893, .292893; entropy 1.084392."""
    policy = Policy(chain({1: {2: 0.5, 3: 0.25, 4: 0.25}}))
    groups = [Group([1], [[2], [3]])]
    for temperature, logp, entropy in [
        (0.5, [-0.4054651081, -1.7917594692], 0.8675632284),
        (2.0, [-0.8813735870, -1.2279471773], 1.0843916958),
    ]:
        logp_BT, entropy_BT = policy(groups, temperature=temperature)
        assert_close(logp_BT[:, 0], torch.tensor(logp, dtype=torch.float64), rtol=0, atol=1e-9)
        assert_close(entropy_BT[:, 0], torch.tensor([entropy] * 2, dtype=torch.float64), rtol=0, atol=1e-9)


@TIES
def test_head_in_chunks_equals_the_head_at_once(tied, monkeypatch):
    """20 answer tokens, 3 rows of 97 float32 logits per chunk; see also test_head.py."""
    lm = tiny(tied=tied)
    at_once = Policy(lm)(GROUPS)
    expected = gradients(lm, (at_once[0] * weights_B6()).sum())
    monkeypatch.setattr(model, "HEAD_BYTES", 3 * 97 * 4 + 4)
    chunked = Policy(lm)(GROUPS)
    for ours, theirs in zip(chunked, at_once, strict=True):
        assert_close(ours, theirs, **EXACT)
    for name, gradient in gradients(lm, (chunked[0] * weights_B6()).sum()).items():
        assert_close(gradient, expected[name], **EXACT)
    with torch.no_grad():
        assert_close(Policy(lm)(GROUPS)[0], at_once[0], **EXACT)


def test_a_vocabulary_wider_than_the_limit_still_gets_a_row(monkeypatch):
    policy = Policy(tiny())
    expected = policy(GROUPS)[0]
    monkeypatch.setattr(model, "HEAD_BYTES", 1)
    assert_close(policy(GROUPS)[0], expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_scores_in_float32(dtype):
    """Weights and logits are rounded, log-softmax is not: a distribution's log-probs still sum to 1 to float32."""
    lm = tiny(initializer_range=0.1)
    expected = Policy(lm)(GROUPS)[0]
    logp_BT, entropy_BT = Policy(lm.to(dtype))(GROUPS)
    assert logp_BT.dtype == entropy_BT.dtype == torch.float32
    assert (logp_BT - expected).abs().mean() < {torch.bfloat16: 0.05, torch.float32: 1e-5}[dtype]
    total = Policy(lm)([Group([1, 2], [[token] for token in range(V)])])[0].exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


# The attention as transformers sees it


@KINDS
def test_without_a_layout_it_is_a_plain_causal_lm(kind):
    lm = tiny(kind)
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    plain = with_attention(lm, "sdpa")(ids, use_cache=False).logits
    assert_close(lm(ids, use_cache=False).logits, plain, **EXACT)


def test_caches_and_masks_are_refused():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="layout"):
        attention(torch.nn.Module(), q, k, k, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="layout"):
        tiny().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)  # its second step has a cache


@pytest.mark.parametrize(
    "groups",
    [[], [Group([], [[1]])], [Group([1], [])], [Group([1], [[2], []])]],
    ids=["none", "prompt", "n=0", "answer"],
)
def test_empty_groups_are_refused(groups):
    with pytest.raises(ValueError, match="at least one token"):
        Policy(tiny())(groups)


def test_pad_is_on_the_right():
    assert pad([[1, 2, 3], [0], range(4, 6)], value=9).tolist() == [[1, 2, 3], [0, 9, 9], [4, 5, 9]]


def test_a_small_model_computes_on_one_thread_unless_told_otherwise(monkeypatch):
    """Also on a machine with many: a second thread costs such a model more than it brings."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    model.few_threads(Policy(tiny()))
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    model.few_threads(Policy(tiny()))
    assert asked == [1]
    monkeypatch.setattr(model, "ONE_THREAD_BELOW", 1000)
    model.few_threads(Policy(tiny()))
    assert asked == [1]


def test_frozen_copy_is_apart_and_without_gradients():
    policy = Policy(tiny())
    other = policy.frozen_copy()
    before = policy(GROUPS)[0].detach()
    with torch.no_grad():
        policy.lm.model.norm.weight.mul_(2)
    assert torch.equal(other(GROUPS)[0], before)
    assert not any(p.requires_grad for p in other.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert not torch.equal(policy(GROUPS)[0], before)


# Folders


@KINDS
@TIES
def test_export_reloads_in_plain_transformers_with_equal_logits(kind, tied, tmp_path):
    """Equal to the last bit, with the same attention on both sides. Nothing in the folder names our attention.

    Both sides are copies, for the last bit of a matrix product also depends on where the weights lie in memory, and
    safetensors maps them from the file at any offset.
    """
    lm = tiny(kind, tied=tied)
    Policy(lm).export(tmp_path, tokenizer())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert reloaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    ours, theirs = (with_attention(exact_norms(m), "sdpa")(ids).logits for m in (lm, reloaded))
    assert torch.equal(ours, theirs)
    assert all(ATTENTION not in file.read_text() for file in tmp_path.glob("*.json"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a mapping)
    assert (reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()) is tied


def test_export_writes_the_tokenizer_with_its_chat_template(folder):
    messages = [{"role": "w1", "content": "w2 w3"}]
    before, after = tokenizer(), load_tokenizer(folder)
    assert after.chat_template == before.chat_template
    for tok in (after, AutoTokenizer.from_pretrained(folder)):
        ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == [94, 1, 2, 3, 95, 94, 96]
        assert (tok.eos_token_id, tok.pad_token_id) == (95, 93)


def test_load_gives_the_weights_in_the_type_asked_for(folder):
    policy = Policy.load(folder)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in Policy.load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert torch.equal(policy.lm.lm_head.weight, tiny().lm_head.weight.float())
    assert policy.device == torch.device("cpu")
    assert_close(policy(GROUPS)[0].double(), Policy(tiny())(GROUPS)[0], rtol=0, atol=1e-3)


def test_stop_tokens_come_from_config_generation_config_and_tokenizer(folder):
    """config 7; generation_config [8, 9] beside sampling settings; tokenizer 95 (<|im_end|>). Pad (93) is none."""
    assert eos_ids(folder, tokenizer()) == {7, 95}
    sampling = {"temperature": 0.1, "top_k": 1, "top_p": 0.5, "repetition_penalty": 9.0, "pad_token_id": 93}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9], **sampling}))
    assert eos_ids(folder, tokenizer()) == {7, 8, 9, 95}
    (folder / "generation_config.json").unlink()
    assert eos_ids(folder, tokenizer()) == {7, 95}


def test_a_model_without_stop_token_is_a_users_mistake(tmp_path):
    nothing = tokenizer()
    nothing.eos_token = None
    Policy(tiny()).export(tmp_path, nothing)
    with pytest.raises(UserError, match="end-of-sequence"):
        eos_ids(tmp_path, nothing)


def test_folders_that_cannot_be_opened_are_a_users_mistake(folder, tmp_path):
    """Each error is one line that names the folder and the mend."""
    (tmp_path / "empty").mkdir()
    calls = [
        (tmp_path / "nowhere", Policy.load),
        (tmp_path / "empty", Policy.load),
        (tmp_path / "nowhere", load_tokenizer),
        (tmp_path / "nowhere", lambda path: eos_ids(path, tokenizer())),
    ]
    for path, call in calls:
        with pytest.raises(UserError) as caught:
            call(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        Policy.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Policy.load(folder)


def test_a_tokenizer_without_chat_template_is_a_users_mistake(tmp_path):
    base = tokenizer()
    base.chat_template = None
    base.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)
