"""Rollouts against `generate_naive`, against transformers and by hand; memory budget, queue, random streams.

All in float64 with the norms kept in float64 (see `tiny.exact_norms`): token ids are equal, log-probs to 1e-12.
"""

import weakref
from collections import deque

import pytest
import torch
from tiny import V, chain, tiny, tokenizer, with_attention
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
from common.draws import uniform, uniforms
from common.errors import UserError
from engine import cache
from engine.cache import DecodeLayout, GroupCache
from minimal import draw, generate_naive
from model import ATTENTION, Group, Policy
from rollout import Completion, Engine, Job, draw_in_blocks, generate, locate, rising_sums

KINDS = pytest.mark.parametrize("kind", ["qwen3", "llama"])
EOS = frozenset(range(10, 22))  # 12 of 97 tokens: answers of about 8 tokens, some cut off
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [0, 0], [1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1], [96, 0, 96]]
KEYS = [(0, 3, f"meld/train/{i}") for i in range(len(PROMPTS))]
SETTINGS = {"n": 3, "max_new_tokens": 14, "temperature": 1.0, "eos_ids": EOS}
# Keys and values of `tiny` in float64: 2 (k, v) x 2 heads x 8 wide x 8 bytes = 256 bytes per token and layer; 2 layers
# and one more that is being moved while the cache grows: 768 bytes per token of capacity.
TOKEN = 768


def assert_same(ours, theirs):
    """Equal ids and endings, log-probs to 1e-12."""
    assert len(ours) == len(theirs)
    for group, expected in zip(ours, theirs, strict=True):
        assert [(c.ids, c.finished) for c in group] == [(c.ids, c.finished) for c in expected]
        for c, e in zip(group, expected, strict=True):
            assert c.logprobs == pytest.approx(e.logprobs, rel=0, abs=1e-12)


def again(compute):
    """What a CUDA graph does, on a CPU: fixed places are read, one place is written, nothing is returned."""
    out = compute().clone()

    def replay():
        out.copy_(compute())

    return replay, out


def in_blocks(logits, temperature, numbers):
    """`draw_in_blocks` with the arguments and the answer of `minimal.draw`."""
    drawn_R3 = draw_in_blocks(logits, temperature, torch.tensor(numbers, dtype=torch.float64))
    assert drawn_R3[:, 2].all()
    return drawn_R3[:, 0].long().tolist(), drawn_R3[:, 1].tolist()


class Spy:
    """What an engine did: tokens of every forward, groups come and dropped, bytes of keys and values held at once."""

    def __init__(self, monkeypatch):
        self.streams, self.rows, self.late, self.held, self.peak = [], [], 0, 0, 0
        self.came, self.drops, self.not_youngest, self.redone = [], 0, 0, 0
        forward, prefill, make_room, zeros = rollout.hidden_states, Engine.prefill, Engine.make_room, GroupCache.zeros

        def spy_forward(lm, ids, positions, layout):
            self.streams.append(len(ids))
            if isinstance(layout, DecodeLayout):
                self.rows.append(len(ids))
            return forward(lm, ids, positions, layout)

        def spy_prefill(engine, jobs):
            self.late += bool(engine.rows)  # a prompt comes in while answers of others are on their way
            self.came += jobs
            return prefill(engine, jobs)

        def spy_make_room(engine, queue):
            before, sizes = list(engine.groups), {j: sum(r.job is j for r in engine.rows) for j in engine.groups}
            make_room(engine, queue)
            gone = [job for job in before if job not in engine.groups]
            self.drops += len(gone)
            age = {job: i for i, job in enumerate(self.came)}  # of the last time that it came in
            self.not_youngest += set(gone) != set(sorted(before, key=age.__getitem__)[len(engine.groups) :])
            self.redone += sum(engine.n - sizes[job] for job in gone)  # finished answers that are drawn again

        def spy_zeros(cache, rows, tokens):
            made = zeros(cache, rows, tokens)
            self.held += made.nbytes
            self.peak = max(self.peak, self.held)
            weakref.finalize(made, self.freed, made.nbytes)
            return made

        for owner, name, spy in [
            (rollout, "hidden_states", spy_forward),
            (Engine, "prefill", spy_prefill),
            (Engine, "make_room", spy_make_room),
            (GroupCache, "zeros", spy_zeros),
        ]:
            monkeypatch.setattr(owner, name, spy)

    def freed(self, size):
        self.held -= size


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


# Parity


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_generate_equals_generate_naive(kind, temperature):
    """Seven prompts of 1 to 9 tokens, one of them twice, three answers each (greedy: one); some are cut off."""
    policy = Policy(tiny(kind))
    settings = {**SETTINGS, "n": 3 if temperature else 1, "temperature": temperature, "keys": KEYS}
    ours = generate(policy, PROMPTS, **settings)
    assert_same(ours, generate_naive(policy, PROMPTS, **settings))
    assert {c.finished for group in ours for c in group} == {True, False}


@KINDS
def test_greedy_equals_transformers(kind):
    """`generate(do_sample=False)` of the same model with sdpa and transformers' own cache, one prompt at a time."""
    lm = tiny(kind)
    plain = with_attention(lm, "sdpa")
    ours = generate(lm, PROMPTS, keys=KEYS, **{**SETTINGS, "n": 1, "temperature": 0.0, "max_new_tokens": 20})
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        theirs = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=20, eos_token_id=sorted(EOS), pad_token_id=0,
        )  # fmt: skip
        assert list(completion.ids) == theirs[0, len(prompt) :].tolist()


@KINDS
@pytest.mark.parametrize(("temperature", "scored_at"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_rollout_log_probs_are_those_of_the_policy(kind, temperature, scored_at):
    """Two code paths, decode with the cache and training's groups, one number. Greedy answers are scored at T = 1."""
    policy = Policy(tiny(kind))
    groups = generate(policy, PROMPTS, keys=KEYS, **{**SETTINGS, "temperature": temperature})
    packed = [Group(prompt, [c.ids for c in group]) for prompt, group in zip(PROMPTS, groups, strict=True)]
    logp_BT = policy(packed, temperature=scored_at)[0]
    for row, completion in zip(logp_BT.tolist(), [c for group in groups for c in group], strict=True):
        assert completion.logprobs == pytest.approx(row[: len(completion.ids)], rel=0, abs=1e-12)


def test_any_lengths_rows_and_budget_give_the_naive_answers():
    """Random prompts, n, limits, rows decoded together, cache steps and byte budgets from the tightest upwards."""
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is missing: pip install -r requirements-dev.txt")
    st = hypothesis.strategies
    policy, drops = Policy(tiny("llama", hidden_size=16, intermediate_size=16)), []

    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
    @hypothesis.given(
        prompts=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=1, max_size=4),
        n=st.integers(1, 3),
        limit=st.integers(1, 9),
        rows=st.sampled_from([64, 6, 1]),
        step=st.sampled_from([1, 3, 64]),
        ahead=st.sampled_from([1, 4, 64]),
        record=st.sampled_from([None, again]),
        slack=st.integers(0, 20) | st.none(),
    )
    @hypothesis.example(prompts=[[1, 2, 3]] * 4, n=3, limit=9, rows=64, step=1, ahead=4, record=None, slack=12)
    @hypothesis.example(prompts=[[1, 2, 3]] * 4, n=3, limit=9, rows=64, step=1, ahead=4, record=again, slack=12)
    def check(prompts, n, limit, rows, step, ahead, record, slack):
        settings = {**SETTINGS, "n": n, "max_new_tokens": limit, "eos_ids": {5, 6, 7}, "keys": KEYS[: len(prompts)]}
        longest, answers = (-(-tokens // step) * step for tokens in (max(map(len, prompts)), limit))
        budget = None if slack is None else TOKEN * (longest + n * answers + slack)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "MAX_ROWS", rows)
            patch.setattr(cache, "BUCKET", step)
            patch.setattr(rollout, "PREFILL_TOKENS", 7)
            patch.setattr(rollout, "AHEAD", ahead)
            spy = Spy(patch)
            ours = generate(policy, prompts, kv_budget=budget, record=record, **settings)
        assert_same(ours, generate_naive(policy, prompts, **settings))
        assert max(spy.rows, default=0) <= max(rows, n)
        assert budget is None or spy.peak <= budget
        drops.append(spy.drops)

    check()
    assert any(drops)


# Batch, order, budget, rows


@pytest.fixture(scope="module")
def everything():
    """A policy and what it answers to PROMPTS in one batch without limits."""
    policy = Policy(tiny())
    return policy, generate(policy, PROMPTS, keys=KEYS, **SETTINGS)


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [2, 5, 0], [4, 0], [1], [5]], ids=str)
def test_answers_do_not_depend_on_batch_and_order(everything, order):
    policy, whole = everything
    part = generate(policy, [PROMPTS[i] for i in order], keys=[KEYS[i] for i in order], **SETTINGS)
    assert_same(part, [whole[i] for i in order])


def test_fewer_answers_are_the_first_of_more(everything):
    """Streams are keyed by the answer's number, not by n."""
    policy, whole = everything
    assert_same(generate(policy, PROMPTS, keys=KEYS, **{**SETTINGS, "n": 1}), [group[:1] for group in whole])


@pytest.mark.parametrize(("rows", "most", "late"), [(1, 3, False), (3, 3, False), (4, 4, True), (7, 7, True)])
def test_finished_answers_make_room_for_the_next_prompt(everything, rows, most, late, monkeypatch, spy):
    """Continuous batching: at most `rows` answers at once (but one group of 3 always). With room for one group the next
    prompt waits for its last answer; with 4 it comes in when two of three are done."""
    policy, whole = everything
    monkeypatch.setattr(rollout, "MAX_ROWS", rows)
    assert_same(generate(policy, PROMPTS, keys=KEYS, **SETTINGS), whole)
    assert max(spy.rows) == most
    assert (spy.late > 0) is late


def test_prompts_are_computed_once_and_finished_answers_leave_at_once(everything, spy):
    """28 prompt tokens; then each answer's tokens but its last one, which nothing is predicted from. Nothing is padded:
    the streams of all forwards add up to exactly that."""
    policy, whole = everything
    generate(policy, PROMPTS, keys=KEYS, **SETTINGS)
    assert sum(map(len, PROMPTS)) == 28
    assert spy.streams[0] == 28
    assert sum(spy.streams) == 28 + sum(len(c.ids) - 1 for group in whole for c in group)
    assert spy.drops == 0


def test_long_batches_of_prompts_are_computed_in_parts(everything, monkeypatch, spy):
    """At most 8 prompt tokens at once, padding counted, the shortest first, a longer alone: 1 + 2 | 3 + 3 | 3 | 7 | 9."""
    policy, whole = everything
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 8)
    assert_same(generate(policy, PROMPTS, keys=KEYS, **SETTINGS), whole)
    assert spy.streams[:5] == [3, 6, 3, 7, 9]


def test_a_long_prompt_does_not_widen_the_cache_of_short_ones(monkeypatch):
    """One group at a time, prompts of 9, 2 and 5 tokens in buckets of 4: the cache has 4, then 8, then 12 columns."""
    monkeypatch.setattr(rollout, "MAX_ROWS", 1)
    monkeypatch.setattr(cache, "BUCKET", 4)
    widths, inner = [], GroupCache.resize

    def resize(self, size):
        widths.append(size[1])
        inner(self, size)

    monkeypatch.setattr(GroupCache, "resize", resize)
    prompts = [[1] * length for length in (9, 2, 5)]
    keys = [(0, 0, str(len(prompt))) for prompt in prompts]
    generate(Policy(tiny()), prompts, n=1, max_new_tokens=2, temperature=1.0, eos_ids=[], keys=keys)
    assert list(dict.fromkeys(widths)) == [4, 8, 12]


@pytest.mark.parametrize("tokens", [55, 60, 72, 90, 120])
def test_a_tight_budget_drops_the_youngest_group_and_redraws_its_answers(everything, tokens, monkeypatch, spy):
    """The longest prompt takes 12 tokens of capacity, its 3 answers of at most 14 tokens 16 each: 60 in steps of 4,
    12 + 42 = 54 in steps of 1. Up to a few groups' worth, groups must be dropped; held bytes stay within the budget."""
    policy, whole = everything
    monkeypatch.setattr(cache, "BUCKET", 1 if tokens == 55 else 4)
    assert_same(generate(policy, PROMPTS, keys=KEYS, kv_budget=TOKEN * tokens, **SETTINGS), whole)
    assert spy.drops > 0
    assert spy.not_youngest == 0
    assert 0 < spy.peak <= TOKEN * tokens
    assert spy.held == 0


def test_a_dropped_group_may_have_finished_answers(monkeypatch, spy):
    """They are drawn again, equal, and counted once."""
    policy = Policy(tiny())
    monkeypatch.setattr(cache, "BUCKET", 4)
    prompts, keys = [[1, 2, 3]] * 8, [(0, 0, str(i)) for i in range(8)]
    settings = {"n": 3, "max_new_tokens": 24, "temperature": 1.0, "eos_ids": EOS, "keys": keys}
    expected = generate(policy, prompts, **settings)
    assert spy.drops == 0
    assert_same(generate(policy, prompts, kv_budget=TOKEN * 110, **settings), expected)
    assert spy.redone > 0


def test_a_budget_too_small_for_one_group_is_a_users_mistake(monkeypatch, spy):
    """Prompt of 3 and two answers of 6 in steps of 1: 15 tokens x 768 = 11,520 bytes (prompt of 1: 9,984). The check
    comes before any work, also when the prompt that does not fit is the last one."""
    monkeypatch.setattr(cache, "BUCKET", 1)
    policy = Policy(tiny())
    settings = {"n": 2, "max_new_tokens": 6, "temperature": 1.0, "eos_ids": EOS}
    with pytest.raises(UserError) as caught:
        generate(policy, [[1], [1, 2, 3]], keys=KEYS[:2], kv_budget=11_519, **settings)
    assert spy.streams == []
    for part in ("11,519", "11,520", "2 answers of 6 tokens", "prompt of 3", "--kv_budget"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    generate(policy, [[1], [1, 2, 3]], keys=KEYS[:2], kv_budget=11_520, **settings)
    assert 0 < spy.peak <= 11_520


# What the host waits for


class Traffic(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, and what the host sends there."""

    def __init__(self):
        super().__init__()
        self.reads = self.sent = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.reads += name in ("tolist", "cpu", "numpy")
        self.sent += name in ("tensor", "as_tensor", "from_numpy", "new_tensor")
        return func(*args, **(kwargs or {}))


class Values(TorchDispatchMode):
    """Counts operators that wait because their result or its shape hangs on a value: `item`, `bool`, `nonzero`, masks."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.reads += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
        self.reads += any(isinstance(x, Tensor) and x.dtype == torch.bool for x in chosen)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("record", [None, again])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_step_waits_once_and_sends_nothing(temperature, record, monkeypatch):
    """Two groups of two answers of 24 tokens, none of which ends early. 24 times tokens come back: once of the prompts and
    23 times of steps. What goes to the device is as much with 24 tokens as with 8: it goes before the first step."""
    policy, found = Policy(tiny()), {}
    for limit in (24, 8):
        with Traffic() as traffic, Values() as values:
            settings = {"n": 2, "temperature": temperature, "eos_ids": (), "keys": KEYS[:2], "record": record}
            generate(policy, PROMPTS[:2], max_new_tokens=limit, **settings)
        found[limit] = (traffic.reads + values.reads, traffic.sent)
    assert found[24][0] == 24
    assert found[8] == (8, found[24][1])


def test_rows_that_come_and_go_cost_no_further_wait(monkeypatch, spy):
    """Seven prompts of three answers of up to 14 tokens, at most 4 rows: one wait a forward, of prompts or of a step."""
    monkeypatch.setattr(rollout, "MAX_ROWS", 4)
    with Traffic() as traffic, Values() as values:
        generate(Policy(tiny()), PROMPTS, keys=KEYS, **SETTINGS)
    assert spy.late > 0
    assert traffic.reads + values.reads == len(spy.streams)


@pytest.mark.parametrize("record", [None, again])
def test_random_numbers_are_renewed_in_time(record, monkeypatch):
    """Four at a time, of answers that begin at different steps: the 5th, the 9th and the 13th token take new ones."""
    monkeypatch.setattr(rollout, "AHEAD", 4)
    monkeypatch.setattr(rollout, "MAX_ROWS", 4)
    policy = Policy(tiny())
    ours = generate(policy, PROMPTS, keys=KEYS, record=record, **SETTINGS)
    assert_same(ours, generate_naive(policy, PROMPTS, keys=KEYS, **SETTINGS))
    assert max(len(c.ids) for group in ours for c in group) == 14


# Ends of answers


def test_the_end_token_belongs_to_the_answer():
    """1 -> 2 -> 5, each with probability 1, and 5 ends it: ids (2, 5), log-probs 0, finished. The 5 in or at
    the end of a prompt does not count."""
    lm = chain({1: {2: 1.0}, 2: {5: 1.0}, 5: {1: 1.0}})
    settings = {"n": 2, "max_new_tokens": 8, "temperature": 1.0, "eos_ids": {5}, "keys": KEYS[:2]}
    (first, _), (second, _) = generate(lm, [[5, 1], [1, 5]], **settings)
    assert first == Completion((2, 5), (0.0, 0.0), True)
    assert second == Completion((1, 2, 5), (0.0, 0.0, 0.0), True)


def test_answers_of_one_token_and_answers_cut_off():
    """1 -> 5 at once; 2 -> 3 -> 2 -> 3 without end; 4 -> 6 -> 5 ends with the last token that is allowed."""
    lm = chain({1: {5: 1.0}, 2: {3: 1.0}, 3: {2: 1.0}, 4: {6: 1.0}, 6: {5: 1.0}})
    settings = {"n": 1, "temperature": 0.0, "eos_ids": {5}, "keys": KEYS[:3]}
    answers = generate(lm, [[1], [2], [4]], max_new_tokens=2, **settings)
    assert [(c.ids, c.finished) for (c,) in answers] == [((5,), True), ((3, 2), False), ((6, 5), True)]
    answers = generate(lm, [[1], [2], [4]], max_new_tokens=1, **settings)
    assert [(c.ids, c.finished) for (c,) in answers] == [((5,), True), ((3,), False), ((6,), False)]


def test_every_stop_token_ends_an_answer():
    """1 -> 5 or 6, both stop (Qwen3 has two): every answer is one token, and over 16 answers both occur. With 5 alone,
    6 goes on (6 -> 5)."""
    lm = chain({1: {5: 0.5, 6: 0.5}, 6: {5: 1.0}})
    settings = {"n": 16, "max_new_tokens": 4, "temperature": 1.0, "keys": KEYS[:1]}
    (group,) = generate(lm, [[1]], eos_ids=[5, 6], **settings)
    assert {(c.ids, c.finished) for c in group} == {((5,), True), ((6,), True)}
    (group,) = generate(lm, [[1]], eos_ids={5}, **settings)
    assert {(c.ids, c.finished) for c in group} == {((5,), True), ((6, 5), True)}


def test_without_stop_tokens_every_answer_is_cut_off():
    answers = generate(tiny(), PROMPTS[:2], keys=KEYS[:2], **{**SETTINGS, "eos_ids": ()})
    assert {(len(c.ids), len(c.logprobs), c.finished) for group in answers for c in group} == {(14, 14, False)}


# Random streams


def test_uniform_is_pinned():
    """The first 6 hex digits of `printf %s 0/0/a/0/0 | b2sum -l 64` are 53f1cf = 5501391; over 2^24: .327908456325531.
    A run of another year or machine must draw the same tokens."""
    assert uniform((0, 0, "a"), 0, 0) == 0.327908456325531
    assert uniform((0, 0, "a"), 1, 0) == 0.9734720587730408
    assert uniform((0, 0, "a"), 0, 1) == 0.07109016180038452
    assert uniform((1, 0, "a"), 0, 0) == 0.680368959903717
    assert uniform((0, 1, "a"), 0, 0) == 0.33421874046325684
    assert uniform((0, 0, "b"), 0, 0) == 0.6886741518974304
    assert uniform((7, 3, "meld/train/703/6"), 2, 15) == 0.4327813386917114
    assert uniforms((0, 0, "a"), 0, range(2)) == [0.327908456325531, 0.07109016180038452]


def test_uniform_is_uniform_and_exact_in_float32():
    """10,000 draws in 10 bins: chi-square with 9 degrees of freedom stays below 27.9 (p = .001). 16 consecutive answers
    and positions are uncorrelated to .05."""
    draws = [uniform((0, 0, "x"), a, t) for a in range(100) for t in range(100)]
    assert all(0 <= u < 1 for u in draws)
    assert torch.tensor(draws, dtype=torch.float32).tolist() == draws
    counts = torch.histc(torch.tensor(draws, dtype=torch.float64), 10, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9
    square = torch.tensor(draws, dtype=torch.float64).view(100, 100) - 0.5
    assert abs((square[1:] * square[:-1]).mean() * 12) < 0.05
    assert abs((square[:, 1:] * square[:, :-1]).mean() * 12) < 0.05


def test_draw_by_hand():
    """Probabilities .2, .5, .3, so the steps end at .2, .7, 1: u = 0, .1, .19 -> 0; .21, .69 -> 1; .71, .999 -> 2."""
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().repeat(7, 1)
    tokens, logprobs = draw(logits, 1.0, [0.0, 0.1, 0.19, 0.21, 0.69, 0.71, 0.999])
    assert tokens == [0, 0, 0, 1, 1, 2, 2]
    ln = {0: -1.6094379124, 1: -0.6931471806, 2: -1.2039728043}
    assert logprobs == pytest.approx([ln[token] for token in tokens], abs=1e-9)


def test_draw_with_a_temperature():
    """(.5, .25, .25) at T = .5 is 2/3, 1/6, 1/6: u = .6 -> 0, .7 -> 1, .9 -> 2 (at T = 1: 1, 1, 2); log-probs are
    those of the distribution drawn from: ln 2/3, ln 1/6."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().repeat(3, 1)
    tokens, logprobs = draw(logits, 0.5, [0.6, 0.7, 0.9])
    assert tokens == [0, 1, 2]
    assert logprobs == pytest.approx([-0.4054651081, -1.7917594692, -1.7917594692], abs=1e-9)
    assert draw(logits, 1.0, [0.6, 0.7, 0.9])[0] == [1, 1, 2]


def test_temperature_0_takes_the_likeliest_token_and_its_log_prob_at_1():
    """(.2, .5, .3): token 1, ln .5. No random number is needed."""
    tokens, logprobs = draw(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log(), 0.0, [])
    assert (tokens, logprobs) == ([1], pytest.approx([-0.6931471806], abs=1e-9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_of_probability_0_is_never_drawn(dtype):
    """Only tokens 2 and 4 of six can come: u = 0 is not token 0, u next to .5 is not 3, u next to 1 is not 5.
    1 - 1e-12 is 1 in float32, where the last token must be found all the same."""
    hidden = float("-inf")
    logits = torch.tensor([[hidden, hidden, 0.0, hidden, 0.0, hidden]], dtype=dtype)
    numbers = [0.0, 0.25, 0.4999, 0.5001, 0.75, 1 - 2**-24, 1 - 1e-12]
    tokens, logprobs = draw(logits.repeat(7, 1), 1.0, numbers)
    assert tokens == [2, 2, 2, 4, 4, 4, 4]
    assert logprobs == pytest.approx([-0.6931471806] * 7, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_nan_logits_stop_the_rollout(temperature):
    """A diverged model must not be sampled from: in one row of two, -inf beside it is no error. The sampler in blocks says
    it in its third column, and its tokens are still some of the three, its blocks the one: a GPU would stop at others."""
    logits = torch.tensor([[0.0, float("-inf"), 1.0], [0.0, float("nan"), 1.0]])
    assert draw(logits[:1], temperature, [0.9])[0] == [2]
    with pytest.raises(FloatingPointError):
        draw(logits, temperature, [0.5, 0.5])
    drawn = draw_in_blocks(logits, temperature, torch.tensor([0.9, 0.5]))
    assert drawn[:, 2].tolist() == [1, 0]
    wrong = torch.tensor([[float("nan")] * 3, [float("-inf")] * 3, [float("inf"), 0.0, 0.0]])
    for found in (drawn, draw_in_blocks(wrong, temperature, torch.tensor([0.0, 0.5, 0.99]))):
        assert set(found[:, 0].tolist()) <= {0, 1, 2}
    assert found[:, 2].tolist() == [0, 0, 0]
    assert rollout.locate(wrong[:1], wrong[:1, :1]).item() in range(3)
    lm = tiny()
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError):
        generate(lm, PROMPTS, keys=KEYS, **{**SETTINGS, "temperature": temperature})


def test_a_sum_below_1_leaves_no_gap():
    """49,152 float32 probabilities do not add up to 1 exactly; u next to 1 must still find a token that can come."""
    for seed in range(5):
        logits = torch.randn(1, 49_152, generator=torch.Generator().manual_seed(seed))
        logits[:, -100:] = float("-inf")
        for number in (1 - 2**-24, 1 - 1e-12):
            (token,), (logp,) = draw(logits, 1.0, [number])
            assert 49_000 < token < 49_052
            assert -25 < logp < -5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("size", [1, 97, 128, 129, 3000])
def test_the_sampler_in_blocks_equals_the_clear_one(size, temperature):
    """float64, sharp logits, half of the tokens impossible, whole blocks of them too: equal tokens, log-probs to 1e-12.
    The arguments stay as they were."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(400, size, generator=generator, dtype=torch.float64)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = float("-inf")
    logits[:200, 128:2000] = float("-inf")
    logits[:, size // 2] = 0.0
    numbers = [uniform((0, 0, "b"), row, size) for row in range(398)] + [0.0, 1 - 2**-24]
    kept = logits.clone()
    tokens, logprobs = draw(logits, temperature, numbers)
    found, theirs = in_blocks(logits, temperature, numbers)
    assert found == tokens
    assert theirs == pytest.approx(logprobs, rel=0, abs=1e-12)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sampler_in_blocks_never_draws_a_token_of_probability_0(dtype):
    """Tokens 200 and 390 of 500 alone can come, in blocks 1 and 3 of 4; e^-30 beside them is lost in float32's sums."""
    logits = torch.full((1, 500), float("-inf"), dtype=dtype)
    logits[0, [200, 390]] = 0.0
    numbers = [0.0, 0.25, 0.4999, 0.5001, 0.75, 1 - 2**-24, 1 - 1e-12]
    assert in_blocks(logits.repeat(7, 1), 1.0, numbers)[0] == [200, 200, 200, 390, 390, 390, 390]
    logits[0, 450] = -30.0
    assert set(in_blocks(logits.repeat(7, 1), 1.0, numbers)[0]) <= {200, 390, 450}


def test_frequencies():
    """10,000 draws from (.2, .5, 0, .3): chi-square with 2 degrees of freedom stays below 13.8 (p = .001)."""
    logits = torch.tensor([[0.2, 0.5, 0.0, 0.3]], dtype=torch.float64).log().expand(10_000, 4)
    tokens, _ = draw(logits, 1.0, [uniform((0, 0, "f"), a, 0) for a in range(10_000)])
    count = [tokens.count(token) for token in range(4)]
    assert count[2] == 0
    assert sum((count[t] - e) ** 2 / e for t, e in ((0, 2000), (1, 5000), (3, 3000))) < 13.8


def test_answers_by_hand():
    """Key (0, 0, "a"), first numbers of its answers .328, .973, .395, .767, .935, .524. From 1: 2 (.2), 3 (.5), 4 (.3),
    steps at .2, .7, 1: answers 3, 4, 3, 4, 4, 3. From 3: 5 (.4) or 6 (.6); second number of answer 0 .071: 5, of
    answer 2 .736: 6. Log-probs ln .5 and ln .4 = -.693147, -.916291."""
    lm = chain({1: {2: 0.2, 3: 0.5, 4: 0.3}, 3: {5: 0.4, 6: 0.6}, 4: {5: 1.0}})
    settings = {"n": 6, "max_new_tokens": 2, "temperature": 1.0, "eos_ids": {5}, "keys": [(0, 0, "a")]}
    (group,) = generate(lm, [[1]], **settings)
    assert [c.ids[0] for c in group] == [3, 4, 3, 4, 4, 3]
    assert (group[0].ids, group[0].finished) == ((3, 5), True)
    assert (group[2].ids, group[2].finished) == ((3, 6), False)
    assert group[0].logprobs == pytest.approx([-0.6931471806, -0.9162907319], abs=1e-9)


def test_the_key_decides(everything):
    """PROMPTS 0 and 4 are equal and have different keys: other answers. The same key: the same answers. Within a group
    answers differ. Another step: other answers."""
    policy, whole = everything
    assert PROMPTS[0] == PROMPTS[4]
    assert {c.ids for c in whole[0]}.isdisjoint(c.ids for c in whole[4])
    assert len({c.ids for c in whole[0]}) == 3
    twice = generate(policy, [PROMPTS[0]] * 2, keys=[KEYS[0]] * 2, **SETTINGS)
    assert_same(twice, [whole[0]] * 2)
    (later,) = generate(policy, PROMPTS[:1], keys=[(0, 4, KEYS[0][2])], **SETTINGS)
    assert {c.ids for c in later}.isdisjoint(c.ids for c in whole[0])


# State


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_attention_of_the_model_comes_back(name, everything):
    """Also when the call fails; and a model opened with another attention gives the same answers meanwhile."""
    _, whole = everything
    lm = tiny(attention=name)
    assert_same(generate(lm, PROMPTS, keys=KEYS, **SETTINGS), whole)
    assert lm.config._attn_implementation == name
    with pytest.raises(UserError):
        generate(lm, PROMPTS, keys=KEYS, kv_budget=1, **SETTINGS)
    assert lm.config._attn_implementation == name
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(lm(ids).logits, with_attention(tiny(), name)(ids).logits)


def test_our_attention_stays_where_it_was(everything):
    policy, _ = everything
    generate(policy, PROMPTS[:1], keys=KEYS[:1], **SETTINGS)
    assert policy.lm.config._attn_implementation == ATTENTION


def test_a_second_call_repeats_the_first(everything):
    """To the last bit: the same shapes in the same order."""
    policy, whole = everything
    assert generate(policy, PROMPTS, keys=KEYS, **SETTINGS) == whole


def test_new_weights_make_new_answers_at_once():
    """No keys and values outlive a call: after an update the answers are those of the new weights, to 1e-12."""
    policy = Policy(tiny())
    settings = {**SETTINGS, "keys": KEYS[:3]}
    before = generate(policy, PROMPTS[:3], **settings)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    after = generate(policy, PROMPTS[:3], **settings)
    assert after != before
    assert_same(after, generate_naive(policy, PROMPTS[:3], **settings))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_mode_and_activation_checkpointing_do_not_disturb(everything):
    """As the training loop calls it: train mode, checkpointing on, gradients of the last step still there."""
    _, whole = everything
    lm = tiny().train()
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (loss,) = Policy(lm)([Group([1], [[2]])])[0].flatten()
    loss.backward()
    gradient = lm.model.norm.weight.grad.clone()
    assert_same(generate(lm, PROMPTS, keys=KEYS, **SETTINGS), whole)
    assert lm.training
    assert torch.is_grad_enabled()
    assert torch.equal(lm.model.norm.weight.grad, gradient)


def test_generation_config_changes_nothing(everything, tmp_path):
    """Sampling settings that a model brings along are not read (D19): set on the model, and in its folder."""
    _, whole = everything
    lm = tiny()
    lm.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=9.0, eos_token_id=[1, 2], max_length=3
    )
    assert_same(generate(lm, PROMPTS, keys=KEYS, **SETTINGS), whole)
    Policy(tiny()).export(tmp_path, tokenizer())
    settings = {**SETTINGS, "keys": KEYS, "max_new_tokens": 4}
    before = generate(Policy.load(tmp_path), PROMPTS, **settings)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.1, "top_k": 1}')
    assert generate(Policy.load(tmp_path), PROMPTS, **settings) == before


# Precision and use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rollouts_stay_near_the_policy(dtype):
    """The gap that every step logs: mean |rollout - policy| over tokens, bf16 below .05 nats, float32 below 1e-5."""
    policy = Policy(tiny(initializer_range=0.1).to(dtype))
    groups = generate(policy, PROMPTS, keys=KEYS, **SETTINGS)
    packed = [Group(prompt, [c.ids for c in group]) for prompt, group in zip(PROMPTS, groups, strict=True)]
    gaps = [
        abs(ours - theirs)
        for row, c in zip(policy(packed)[0].tolist(), [c for group in groups for c in group], strict=True)
        for ours, theirs in zip(c.logprobs, row[: len(c.ids)], strict=True)
    ]
    assert sum(gaps) / len(gaps) < {torch.bfloat16: 0.05, torch.float32: 1e-5}[dtype]


def test_completions_are_plain_numbers(everything):
    """They go into a JSON record: no tensors, as many log-probs as ids, every log-prob at most 0."""
    _, whole = everything
    for c in (c for group in whole for c in group):
        assert len(c.ids) == len(c.logprobs) <= 14
        assert {type(i) for i in c.ids} == {int}
        assert {type(x) for x in c.logprobs} == {float}
        assert max(c.logprobs) <= 0
        assert c.finished is (c.ids[-1] in EOS)
        assert not EOS.intersection(c.ids[:-1])


def test_progress_counts_answers_and_tokens(everything, capsys):
    policy, whole = everything
    generate(policy, PROMPTS, keys=KEYS, progress=True, **SETTINGS)
    shown = capsys.readouterr().err
    assert "21/21" in shown
    assert "tokens/s" in shown
    assert generate(policy, PROMPTS, keys=KEYS, **SETTINGS) == whole
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("call", [generate, generate_naive])
def test_no_prompts_no_answers(call):
    assert call(Policy(tiny()), [], keys=[], **SETTINGS) == []


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"keys": KEYS[:1]}, {"prompts": [[1], []]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_range_are_refused(wrong):
    given = {**SETTINGS, "keys": KEYS[:2], "prompts": PROMPTS[:2], **wrong}
    with pytest.raises(ValueError, match="generate needs"):
        generate(Policy(tiny()), **given)


def test_a_sliding_window_is_refused_and_leaves_the_model_as_it_was():
    lm = tiny("qwen3", attention="sdpa", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding_window"):
        generate(lm, PROMPTS[:1], keys=KEYS[:1], **SETTINGS)
    assert lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_and_softmax_are_float32_where_the_cache_is_bf16(dtype):
    """One decode step over a prompt of 30 tokens and answers of 40, scores some 4 apart, against float64's softmax over the
    same numbers. With scores in bf16 the result was .8 % off; rounded are now the weights (.17 %) and three sums."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    engine = Engine(tiny().to(dtype), 3, 60, 1.0, frozenset(), None, None)
    engine.prefill([Job(0, tuple(range(30)), (0, 0, "a"))])
    for row in engine.rows:
        row.ids = [1] * 41
    engine.make_room(deque())
    for keys, values in (engine.cache.prompt[0], engine.cache.answer[0]):
        keys.copy_(normal(*keys.shape))
        values.copy_(normal(*values.shape))
    q_RHD, k_RKD, v_RKD = 4 * normal(3, 4, 8), normal(3, 2, 8), normal(3, 2, 8)
    found_RHD = engine.to_move().layout(engine.cache).attend(0, q_RHD, k_RKD, v_RKD, 8**-0.5)
    (prompt_k, prompt_v), (own_k, own_v) = engine.cache.prompt[0], engine.cache.answer[0]
    exact = []
    for r in range(3):
        keys_HZD = torch.cat([prompt_k[0, :, :30], own_k[r, :, :41]], 1).double().repeat_interleave(2, 0)
        values_HZD = torch.cat([prompt_v[0, :, :30], own_v[r, :, :41]], 1).double().repeat_interleave(2, 0)
        scores_HZ = torch.einsum("hd,hzd->hz", q_RHD[r].double(), keys_HZD) * 8**-0.5
        exact.append(torch.einsum("hz,hzd->hd", scores_HZ.softmax(-1), values_HZD))
    off = (found_RHD.double() - torch.stack(exact)).norm() / torch.stack(exact).norm()
    assert off < {torch.float64: 1e-12, torch.bfloat16: 5e-3}[dtype]


def test_a_scan_out_of_order_never_finds_a_token_of_weight_0(monkeypatch):
    """A GPU's sums may rise where there is no weight, and fall: of weights 0, 1, 0, 2, 0 it might say .1, 1, 1.2, 2.9, 2.8.
    What counts is 0, 1, 1, 2.9, 2.9: an aim of 0 or .9 is entry 1, of 1.1, 2.85 or the end, 2.9, entry 3."""
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: torch.tensor([[0.1, 1.0, 1.2, 2.9, 2.8]]))
    sums = rising_sums(torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]))
    torch.testing.assert_close(sums, torch.tensor([[0.0, 1.0, 1.0, 2.9, 2.9]]))
    aims = torch.tensor([[0.0], [0.9], [1.1], [2.85], [2.9]])
    assert locate(sums.repeat(5, 1), aims)[:, 0].tolist() == [1, 1, 3, 3, 3]


def test_the_sampler_stands_a_scan_out_of_order(monkeypatch):
    """Sums with every second one a thousandth too large; of 500 tokens 7, 8, 9, 260 and 499 can come, and all of them do."""
    whole = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: whole(x, dim) + 1e-3 * (torch.arange(x.shape[dim]) % 2))
    logits = torch.full((1, 500), float("-inf"))
    logits[0, [7, 8, 9, 260, 499]] = 0.0
    numbers = [i / 5000 for i in range(5000)] + [1 - 2**-24]
    drawn_R3 = draw_in_blocks(logits.expand(5001, 500), 1.0, torch.tensor(numbers))
    assert set(drawn_R3[:, 0].tolist()) == {7, 8, 9, 260, 499}
