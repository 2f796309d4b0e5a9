"""minimal.py is Algorithm 1 plainly; selfemo.py is the same, fast, on many processes and resumable. Here they are compared.

Both train the tiny world of conftest.py in float64, norms included: three iterations of three steps of two mini-batches. It
takes the third to draw a new sample that has replaced another. Eight original samples are fewer than an iteration draws.
"""

import itertools
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from conftest import LABELS, lines
from safetensors.torch import load_file
from test_ranks import run_on, said, whole_run
from tiny import answer_logprobs, exact_norms, gradients, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import minimal
from common.draws import distinct, first_shuffled, shuffled, uniform
from corpora.dialogue import Turn
from data import Completion, Failure, Output, Responder, Sample
from minimal import Settings, draw, generate_naive, prompt_stream, score, show, token_logprobs
from training.records import parse_record, sample_from_record

SETTINGS = Settings(
    seed=3, iterations=3, steps=3, batch_prompts=5, mini_batch_prompts=3, n=3, max_prompt_tokens=37, max_new_tokens=24,
    temperature=1.1, lr=1e-3, cold_start_lr=3e-4, sft_lr=5e-4, sft_batch=2, clip_eps=0.03, kl_coef=0.5, keep_reward=0.5,
)  # fmt: skip
ORIGINALS = 8


# The whole run


@pytest.fixture(scope="module")
def plain(place):
    """The steps (t, groups, selections) of minimal.py, and its weights before and after."""
    lm = exact_norms(AutoModelForCausalLM.from_pretrained(place.root / "base", dtype=torch.float64))
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    samples = data.read_samples("tiny", place.root / "world", "train")
    originals = first_shuffled(samples, ORIGINALS, f"{SETTINGS.seed}/originals")
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DEFAULT", data.read_prompts(place.root / "prompts.json"))
        tokenizer = AutoTokenizer.from_pretrained(place.root / "base")
        found = minimal.self_emo(lm, tokenizer, originals, SETTINGS, lambda *step: steps.append(step))
    assert found is lm
    return steps, before, lm.state_dict()


def drawn(steps):
    """Ids of the samples of each step."""
    return [[group.sample.id for group in groups] for _, groups, _ in steps]


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "two_ranks"])
def fast(request, place):
    """The folder of the run of selfemo.py with the same settings; one process is this one."""
    out = place.root / f"as-minimal-{request.param}"
    flags = {f"--{name}": value for name, value in asdict(SETTINGS).items()}
    few = {"--originals": ORIGINALS, "--eval_limit": 1, "--test_limit": 1, "--eval_every": 99, "--save_every": 99}
    more = list(itertools.chain.from_iterable({**flags, **few}.items()))
    if request.param == 1:
        status = [whole_run(place.argv(out, *more), "float64", f"{out}.log")]
    else:
        status = run_on(request.param, place, out, *more)
    assert status == [0] * request.param, said(out)
    return out


def by_step(steps):
    """What minimal.py found, as selfemo.py records it."""
    found = []
    for t, groups, selections in steps:
        for group, best in zip(groups, selections, strict=True):
            columns = (group.answers, group.rewards, group.consistencies, group.advantages)
            answers = [[list(a.ids), parse_record(a.parse), *numbers] for a, *numbers in zip(*columns, strict=True)]
            prompt_ids = group.prompt_ids
            core = list(group.core.items())
            found.append([t, group.sample.id, prompt_ids, dict(group.sample.gold), core, answers, best.index, best.why])
    return found


def recorded(out):
    """The same of the records of a run."""
    found = []
    for k in range(1, SETTINGS.iterations + 1):
        for r in lines(out / f"rollouts/iteration-{k}.jsonl"):
            answers = [[a[x] for x in ("ids", "parse", "reward", "consistency", "advantage")] for a in r["answers"]]
            core = list(r["core"].items())
            found.append([r["step"], r["sample_id"], r["prompt_ids"], r["gold"], core, answers, r["selected"], r["why"]])
    return found


def test_the_run_exercises_everything(plain):
    """What the comparison below rests on: without these it could be true of nothing."""
    steps, before, after = plain
    groups = [group for _, found, _ in steps for group in found]
    chosen = [best for _, _, found in steps for best in found]
    failures = {a.parse.reason for group in groups for a in group.answers if isinstance(a.parse, Failure)}
    assert {"unfinished", "think", "dictionary"} <= failures
    assert {"kept", "rule", "reward", "length"} <= {best.why for best in chosen}
    assert sum(len(set(group.advantages)) == SETTINGS.n for group in groups) > 9
    assert max(len(group.core) for group in groups) == len(LABELS)
    assert {group.sample.depth for group in groups} >= {0, 1, 2}
    ids = drawn(steps)
    first, later = ids[: SETTINGS.steps], ids[SETTINGS.steps :]
    assert max(Counter(itertools.chain(*first)).values()) >= 2  # through the buffer and on, in one iteration
    assert len(set(itertools.chain(*first))) < ORIGINALS  # one is too long
    assert any(len(set(step)) < len(step) for step in ids)  # through the buffer and on, in one step
    assert any("+2" in name for step in later for name in step)
    parents = [[b.child.parent for _, _, found in steps[k : k + 3] for b in found if b.child] for k in (0, 3)]
    assert max(Counter(parents[0]).values()) == 2  # kept twice in an iteration: the later answer counts
    assert set(parents[0]) & set(parents[1])  # kept in two iterations: the new sample replaces the old one
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.01


def test_clipping_and_kl_are_at_work(fast):
    """The loss is clipped and draws to the reference in RL; in fine-tuning some gradients are longer than 1."""
    found = lines(fast / "metrics.jsonl")
    highest = {name: max(line.get(name) or 0 for line in found) for name in ("clip_frac", "policy/kl", "grad_norm")}
    assert highest["clip_frac"] > 0.01
    assert highest["policy/kl"] > 1e-4
    assert highest["grad_norm"] > 1.1


def test_prompts_answers_rewards_advantages_and_choices_are_equal(plain, fast):
    """Exactly: token ids, and float64 numbers to the last bit."""
    ours, theirs = by_step(plain[0]), recorded(fast)
    assert len(ours) == len(theirs) == 45
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other


def test_kept_samples_are_equal(plain, fast):
    """Context, responder, gold, iteration and depth of every new sample, and the answer that it was made of."""
    kept = [
        [best.child, list(group.answers[best.index].ids)]
        for _, groups, selections in plain[0]
        for group, best in zip(groups, selections, strict=True)
        if best.child is not None
    ]
    theirs = [[sample_from_record(x["child"]), x["ids"]] for x in lines(fast / "buffer.jsonl")]
    assert len(kept) > 5
    assert kept == theirs


def test_weights_are_equal(plain, fast):
    """To 1e-9 after the last retraining."""
    theirs = load_file(fast / "model/model.safetensors")
    assert "model.embed_tokens.weight" in theirs
    for name, value in theirs.items():
        assert_close(plain[2][name], value, rtol=0, atol=1e-9)


# Its parts


PAIRS = [([1, 2, 3], (4, 5)), ([6], (7, 8, 9, 10)), ([2] * 9, (11,))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_a_padded_batch_are_those_of_each_row_alone(temperature):
    """Values and gradients in float64, to 1e-12; beyond the end of an answer they are 0."""
    lm = tiny(attention="sdpa")
    logp_BT = token_logprobs(lm, PAIRS, temperature)
    assert logp_BT.shape == (3, 4)
    alone = [answer_logprobs(lm, *pair, temperature) for pair in PAIRS]
    for row, expected in zip(logp_BT, alone, strict=True):
        assert_close(row[: len(expected)], expected, rtol=0, atol=1e-12)
        assert not row[len(expected) :].any()
    ours, theirs = gradients(lm, logp_BT.square().sum()), gradients(lm, sum(row.square().sum() for row in alone))
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_group_scored_by_hand():
    """Gold joy. {joy 1}, {joy .5, surprise .5}, {sadness 1}, None: IOU 1, .5/1.5, 0; core joy 1.5/3, sadness 1/3, surprise
    .5/3; they name 1, 2, 1, 0 of the three."""
    says = [{"joy": 1.0}, {"joy": 0.5, "surprise": 0.5}, {"sadness": 1.0}]
    parses = [*(Output("r", last, {"joy": 1.0}, "o", {}) for last in says), Failure("think", "")]
    answers = [Completion((2,), (-0.5,), True, "", parse) for parse in parses]
    sample = Sample("a", "w", (Turn("Ann", "Hi."),), Responder("Bo", None, "next"), LABELS, {"joy": 1.0})
    (group,) = score([sample], [[1]], [answers], 0.0)
    assert group.rewards == pytest.approx([1.1, 0.1 + 1 / 3, 0.1, 0])
    assert group.core == pytest.approx({"joy": 1 / 2, "sadness": 1 / 3, "surprise": 1 / 6})
    assert group.consistencies == pytest.approx([1 / 3, 2 / 3, 1 / 3, 0])
    mean, std = torch.tensor(group.rewards).mean().item(), torch.tensor(group.rewards).std().item()
    assert group.advantages == pytest.approx([(r - mean) / std for r in group.rewards], rel=1e-4)
    (late,) = score([sample], [[1]], [answers], 0.5)
    mean, std = 1 / 3, torch.tensor(group.consistencies).std().item()
    extra = [0.5 * (r2 - mean) / std for r2 in group.consistencies]
    assert late.advantages == pytest.approx([a + b for a, b in zip(group.advantages, extra, strict=True)], rel=1e-4)


def test_draw_by_hand():
    """(.2, .5, .3) cumulates to .2, .7, 1; at temperature 1/2 the squares .04, .25, .09 of .38 to .105, .763, 1."""
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().expand(3, 3)
    tokens, logprobs = draw(logits, 1.0, [0.1, 0.65, 0.75])
    assert (tokens, logprobs) == ([0, 1, 2], pytest.approx([-1.6094379, -0.6931472, -1.2039728]))
    assert draw(logits, 0.5, [0.1, 0.11, 0.77])[0] == [0, 1, 2]
    assert draw(logits, 0.0, [])[0] == [1, 1, 1]
    with pytest.raises(FloatingPointError):
        draw(torch.tensor([[0.0, float("nan")]]), 1.0, [0.5])


def test_generate_naive_takes_a_model_and_whoever_holds_one():
    lm = tiny(attention="sdpa")
    settings = {"n": 2, "max_new_tokens": 4, "temperature": 1.0, "eos_ids": {96}, "keys": [(0, 0, "a")]}
    (group,) = generate_naive(lm, [[1, 2]], **settings)
    assert [group] == generate_naive(Holder(lm), [[1, 2]], **settings)
    assert len({c.ids for c in group}) == 2
    for c in group:
        assert c.logprobs == pytest.approx(answer_logprobs(lm, [1, 2], c.ids).tolist())
        assert c.finished is (c.ids[-1] == 96)


class Holder(torch.nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm


def test_d7_prompts_come_once_an_epoch():
    """Three samples, seven draws: two epochs in two orders, and one draw of the third."""
    found = list(itertools.islice(prompt_stream("abc", 1, 0), 7))
    assert sorted(found[:3]) == sorted(found[3:6]) == ["a", "b", "c"]
    assert found[:3] == shuffled("abc", "0/prompts/1/0")
    assert found[:3] != list(itertools.islice(prompt_stream("abc", 2, 0), 3))


def test_draws_by_hand():
    """The first random numbers of answers 0 to 2 to the prompt (0, 0, "a"), and an id that comes again."""
    assert [uniform((0, 0, "a"), answer, 0) for answer in range(3)] == pytest.approx([0.328, 0.973, 0.395], abs=5e-4)
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a#1", "a#2"]
    assert first_shuffled("abcdef", 0, "x") == list("abcdef")
    assert first_shuffled("abcdef", 3, "x") == sorted(shuffled("abcdef", "x")[:3])


def test_a_group_on_the_blackboard(plain, capsys):
    """Its last lines, a row per answer with its numbers, the kept one marked, and the new sample."""
    pairs = [pair for _, groups, selections in plain[0] for pair in zip(groups, selections, strict=True)]
    group, best = next((g, b) for g, b in pairs if b.child and any(isinstance(a.parse, Failure) for a in g.answers))
    show(group, best)
    shown = capsys.readouterr().out
    rows = shown[shown.index("reward  consistency") :].splitlines()[1 : 1 + SETTINGS.n]
    for i, row in enumerate(rows):
        assert f"{group.rewards[i]:.3f}" in row
        assert f"{group.advantages[i]:+.3f}" in row
        assert ("kept" in row) is (i == best.index)
    assert group.sample.context[-1].text in shown
    assert best.child.context[-1].text in shown


def test_main_says_a_line_a_step_and_shows_a_group(place, capsys, monkeypatch):
    """On the tiny world, which lies in its folder as the toy world does in its own."""
    monkeypatch.setattr(data, "DEFAULT", data.read_prompts(place.root / "prompts.json"))
    minimal.main(place.root, replace(SETTINGS, iterations=1, steps=2, batch_prompts=2, temperature=1.0))
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[:2]] == ["RL step 1", "RL step 2"]
    assert "A group of the last step" in said
