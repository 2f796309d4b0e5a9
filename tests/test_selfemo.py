"""Algorithm 1: schedule, buffer, one RL step, supervised fine-tuning, and what a whole run on the tiny world must satisfy.

Gradients are compared in float64 on `tiny`. `place` and `finished` are in conftest.py.
"""

import itertools
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import LABELS as EMOTIONS
from conftest import PROMPTS, call, lines, results
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import answer_logprobs, gradients, tiny
from torch.testing import assert_close

import data
import evaluate
import grpo
import selfemo
from analysis import audit
from common import draws
from common.errors import UserError
from corpora.dialogue import Turn
from data import DEFAULT, Completion, Failure, Output, Responder, Sample, Selection
from engine import batches
from engine.shards import weights
from model import Group, Policy
from selfemo import mini_batch
from training import coldstart, config, folder, task
from training.config import Config
from training.folder import Learner, Position
from training.records import ScoredGroup, sample_from_record
from training.task import Buffer, Example, Task, open_task


def sample(name, **fields):
    context = (Turn("Ann", "I won."), Turn("Bo", "And now?"))
    made = Sample(f"w/train/{name}", "w", context, Responder("Ann", None, "prev"), EMOTIONS, {"joy": 1.0})
    return replace(made, **fields)


def world(n, **settings):
    """A world of n original samples without a tokenizer."""
    cfg = Config(**{"batch_prompts": 2, "iterations": 2, **settings})
    return Task(cfg, None, frozenset({9}), DEFAULT, tuple(sample(i) for i in range(n)), (), ())


def kept(sample_id, iteration, ids=(1, 9), prompt_ids=(5,)):
    child = sample("x", id=f"{sample_id}+{iteration}", parent=sample_id, iteration=iteration, origin="synthetic")
    return Example(sample_id, tuple(prompt_ids), tuple(ids), iteration, child)


# D7


def test_d7_steps_and_lambda():
    """5 originals, 2 per step: S = ceil(5/2) = 3; K = 2: T = 6; lambda = t/6."""
    w = world(5)
    assert w.S == 3
    assert [w.lam(t) for t in range(6)] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
    with pytest.raises(ValueError):
        w.lam(6)
    assert (world(4).S, world(1).S) == (2, 1)


def test_d7_steps_given():
    """S = 4, K = 2: T = 8."""
    assert world(5, steps=4).S == 4
    assert world(5, steps=4).lam(6) == 0.75


def test_d7_from_base_lambda_starts_again_in_every_iteration():
    """S = 3: 0, 1/3, 2/3, and the same again."""
    w = world(5, retrain_from="base")
    assert [w.lam(t) for t in range(6)] == [0, 1 / 3, 2 / 3, 0, 1 / 3, 2 / 3]


def test_d27_without_self_grpo_lambda_is_0():
    assert {world(5, self_grpo=False).lam(t) for t in range(6)} == {0.0}


def drawn(buffer, k, steps, cfg):
    return [[s.id[8:] for s in buffer.draw(k, step, cfg)] for step in range(steps)]


def test_d7_prompts_come_without_replacement_epoch_after_epoch():
    """5 samples, 2 per step: steps 0-4 are 10 draws, two epochs, the third step takes the last of one and the first of the
    other."""
    w = world(5)
    steps = drawn(Buffer(w.originals), 1, 5, w.cfg)
    assert [len(step) for step in steps] == [2, 2, 2, 2, 2]
    flat = [name for step in steps for name in step]
    assert sorted(flat[:5]) == sorted(flat[5:]) == ["0", "1", "2", "3", "4"]
    assert flat[:5] != flat[5:]


def test_even_labels_take_turns_within_a_dataset_and_leave_datasets_their_size():
    """w: 4 of joy, 1 of fear, 1 of anger; v: 2 of joy. Three epochs of 8 are 18 draws of w, 6 of each label, and 6 of v."""
    golds = ["joy", "joy", "fear", "joy", "anger", "joy"]
    w = world(6, even_labels=True)
    own = [replace(s, gold={label: 0.8, "disgust": 0.3}) for s, label in zip(w.originals, golds, strict=True)]
    other = [sample(i, id=f"v/train/{i}", dataset="v") for i in range(2)]
    buffer = Buffer((*own, *other))
    steps = [buffer.draw(1, step, w.cfg) for step in range(12)]
    drawn = [s for step in steps for s in step]
    assert {len(step) for step in steps} == {2}
    assert Counter((s.dataset, data.heaviest(s.gold)) for s in drawn) == {
        ("w", "joy"): 6, ("w", "fear"): 6, ("w", "anger"): 6, ("v", "joy"): 6,
    }  # fmt: skip
    of_w = [data.heaviest(s.gold) for s in drawn if s.dataset == "w"]
    rounds = [tuple(of_w[i : i + 3]) for i in range(0, 18, 3)]
    assert {frozenset(turn) for turn in rounds} == {frozenset(["joy", "fear", "anger"])} and len(set(rounds)) > 1
    joys = [s.id for s in drawn if s.dataset == "w" and data.heaviest(s.gold) == "joy"]
    assert len(set(joys[:4])) == 4  # without replacement until all have come
    assert buffer.draw(1, 7, w.cfg) == steps[7]
    assert [buffer.draw(1, step, replace(w.cfg, seed=1)) for step in range(12)] != steps
    assert [buffer.draw(2, step, w.cfg) for step in range(12)] != steps


def test_d7_a_step_wider_than_the_buffer_goes_through_it_more_than_once():
    """3 samples, 7 per step: two epochs and a third of the next; the next step goes on there."""
    w = world(3, batch_prompts=7)
    first, second = drawn(Buffer(w.originals), 1, 2, w.cfg)
    assert [sorted(part) for part in (first[:3], first[3:6], [first[6], *second[:2]], second[2:5])] == [["0", "1", "2"]] * 4


def test_order_of_prompts_depends_on_seed_and_iteration():
    w = world(30, batch_prompts=30)
    orders = [drawn(Buffer(w.originals), k, 1, replace(w.cfg, seed=seed))[0] for k, seed in ((1, 0), (2, 0), (1, 1), (1, 0))]
    assert orders[0] == orders[3]
    assert len(set(map(tuple, orders))) == 3


def test_d7_every_iteration_draws_from_the_beginning_of_its_own_buffer(monkeypatch):
    """3 samples, 2 per step: S = 2. RL steps 0 and 1 are draws 0 and 1 of iteration 1, 2 and 3 those of iteration 2."""
    asked = []
    names = ("cold_start", "rollout", "score", "update", "select", "write_down", "retrain", "finish")
    idle = {name: lambda *_: None for name in names}
    steps = {"rl_steps": lambda run, w, policy, k: iter([2 * k - 2, 2 * k - 1]), "keep": lambda *_: []}
    for name, stand_in in {**idle, **steps, "open_buffer": lambda run, w: Buffer(w.originals)}.items():
        monkeypatch.setattr(selfemo, name, stand_in)
    monkeypatch.setattr(Buffer, "draw", lambda buffer, k, step, cfg: asked.append((k, step)))
    selfemo.self_emo(None, world(3), None)
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 1)]


# D11, D27: the buffer


def test_d11_one_live_child_a_parent_the_newest_replaces():
    buffer = Buffer((sample("a"),)).add([kept("w/train/a", 1), kept("w/train/b", 1)]).add([kept("w/train/a", 2)])
    ids = [s.id for s in buffer.samples(3, 0)]
    assert ids == ["w/train/a", "w/train/b+1", "w/train/a+2"]


def test_d11_what_an_iteration_keeps_is_drawn_from_the_next():
    w = world(2)
    buffer = Buffer(w.originals).add([kept("w/train/0", 1)])
    assert len(buffer.samples(1, 0)) == 2
    assert len(buffer.samples(2, 0)) == 3
    assert sorted(drawn(buffer, 2, 3, w.cfg)[0] + drawn(buffer, 2, 3, w.cfg)[1])[:3] != ["0", "0", "1"]
    assert sorted(itertools.chain(*drawn(buffer, 2, 3, w.cfg))) == ["0", "0", "0+1", "0+1", "1", "1"]


def test_d11_a_sample_kept_twice_in_an_iteration_has_one_child():
    """The second epoch of an iteration may keep another answer to the same prompt: the later one counts."""
    early, late = kept("w/train/0", 1, ids=(1, 9)), kept("w/train/0", 1, ids=(2, 9))
    late = replace(late, child=replace(late.child, gold={"anger": 1.0}))
    (_, child) = Buffer((sample(0),)).add([early, late]).samples(2, 0)
    assert child.gold == {"anger": 1.0}


def test_d27_max_synthetic_keeps_the_newest():
    buffer = Buffer((sample("o"),), (kept("w/train/b", 1), kept("w/train/a", 2), kept("w/train/c", 1)))
    assert [s.id for s in buffer.samples(3, 1)] == ["w/train/o", "w/train/a+2"]
    assert [s.id for s in buffer.samples(3, 2)] == ["w/train/o", "w/train/c+1", "w/train/a+2"]
    assert [s.id for s in buffer.samples(2, 9)] == ["w/train/o", "w/train/b+1", "w/train/c+1"]


def test_adding_leaves_the_buffer_as_it_was():
    buffer = Buffer((sample("o"),))
    buffer.add([kept("w/train/o", 1)])
    assert buffer.kept == ()


def opened(place, *more):
    """Task and settings of a command line."""
    cfg = config.parse(place.argv("nowhere", *more))
    return open_task(cfg)


def test_limit_and_originals_take_a_seeded_choice_in_the_old_order(place):
    everything = [s.id for s in opened(place).originals]
    assert len(everything) == 24
    for flag, value in (("--limit", "tiny=7"), ("--originals", 7)):
        some = [s.id for s in opened(place, flag, value).originals]
        assert len(some) == 7
        assert some == [x for x in everything if x in some]
        assert some != everything[:7]
        assert some == [s.id for s in opened(place, flag, value).originals]
        assert some != [s.id for s in opened(place, flag, value, "--seed", 5).originals]


def test_limits_of_dev_and_test(place):
    w = opened(place, "--limit", "tiny=7", "--eval_limit", 5, "--test_limit", 0)
    assert (len(w.originals), len(w.dev), len(w.test)) == (7, 5, 9)


def test_prompts_over_the_limit_are_dropped_and_counted(place, capsys):
    lengths = sorted(len(opened(place).encode(s)[0]) for s in opened(place).originals)
    capsys.readouterr()
    w = opened(place, "--max_prompt_tokens", lengths[9])
    assert max(len(w.encode(s)[0]) for s in w.originals) == lengths[9]
    gone = 24 - len(w.originals)
    assert gone > 0
    assert f"train: {24 - gone} samples, {gone} over --max_prompt_tokens dropped" in capsys.readouterr().out
    assert w.S == 3


# D12, D13


@pytest.fixture
def taught(monkeypatch):
    """What `retrain` hands to `sft`."""
    found = []
    monkeypatch.setattr(coldstart, "sft", lambda run, task, policy, stage, examples, lr: found.append((stage, examples, lr)))
    return found


def desk(out=None, **position):
    """Stands for a run: takes notes."""
    run = SimpleNamespace(out=out, position=Position(**position), logged=[], files={}, said=[])

    def log(phase, iteration, values, step):
        run.logged.append((phase, iteration, values, step))
        return values

    run.log = log
    run.append = lambda name, records: run.files.setdefault(name, []).extend(records)
    run.say, run.note = run.said.append, lambda values: None

    def count_update():
        run.position = replace(run.position, updates=run.position.updates + 1)

    run.count_update = count_update
    return run


HISTORY = (
    kept("w/train/0", 1, ids=(1, 9), prompt_ids=(5,)),
    kept("w/train/1", 1, ids=(2, 9), prompt_ids=(6,)),
    kept("w/train/0", 2, ids=(3, 9), prompt_ids=(5,)),
    kept("w/train/0+1", 2, ids=(4, 9), prompt_ids=(7,)),
    kept("w/train/0", 2, ids=(8, 9), prompt_ids=(5,)),
)


def test_d12_current_learns_the_answers_of_this_iteration(taught):
    """Of iteration 2: the later one of the two for w/train/0, and the child's."""
    w = world(3, sft_lr=0.5)
    selfemo.retrain(desk(stage=4, step=1), w, None, Buffer(w.originals, HISTORY), 2)
    ((stage, examples, rate),) = taught
    assert (stage, rate) == (4, 0.5)
    learnt = [(x.sample_id, x.prompt_ids, x.ids) for x in examples]
    assert learnt == [("w/train/0", (5,), (8, 9)), ("w/train/0+1", (7,), (4, 9))]


def test_d12_base_learns_the_latest_answer_of_every_prompt_and_cold_start_targets_of_the_others(taught, tmp_path):
    """w/train/0 has a newer answer than its cold start's; w/train/2 has none but that one."""
    cold = [{"sample_id": f"w/train/{i}", "prompt_ids": [5 + i], "ids": [50 + i, 9]} for i in (0, 2)]
    (tmp_path / "cold_start.jsonl").write_text("".join(json.dumps(x) + "\n" for x in cold))
    w = world(3, retrain_from="base")
    selfemo.retrain(desk(tmp_path, stage=4, step=1), w, None, Buffer(w.originals, HISTORY), 2)
    ((_, examples, _),) = taught
    assert {x.sample_id: (x.prompt_ids, x.ids) for x in examples} == {
        "w/train/0": ((5,), (8, 9)),
        "w/train/1": ((6,), (2, 9)),
        "w/train/2": ((7,), (52, 9)),
        "w/train/0+1": ((7,), (4, 9)),
    }
    assert len(examples) == 4


def test_retraining_that_is_done_is_not_done_again(taught):
    w = world(3)
    selfemo.retrain(desk(stage=5), w, None, Buffer(w.originals, HISTORY), 2)
    assert taught == []


# Micro-batches


def groups_of(*sizes):
    """Groups whose answers are numbered through."""
    numbers = itertools.count()
    return [Group([90 + p], [[next(numbers)] for _ in range(size)]) for p, size in enumerate(sizes)]


def cut(groups, size):
    return [[(g.prompt_ids[0], [a[0] for a in g.answers]) for g in part] for part in batches.micro_batches(groups, size)]


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ((2, 2), 4, [[(90, [0, 1]), (91, [2, 3])]]),
        ((2, 2), 3, [[(90, [0, 1])], [(91, [2, 3])]]),  # a group that fits a part is not cut
        ((5,), 2, [[(90, [0, 1])], [(90, [2, 3])], [(90, [4])]]),
        ((3, 1), 2, [[(90, [0, 1])], [(90, [2]), (91, [3])]]),
        ((1, 1), 1, [[(90, [0])], [(91, [1])]]),
        ((), 4, []),
    ],
)
def test_micro_batches(sizes, most, expected):
    assert cut(groups_of(*sizes), most) == expected


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 12))
def test_micro_batches_hold_every_answer_once_and_in_order(sizes, most):
    groups = groups_of(*sizes)
    parts = cut(groups, most)
    assert [n for part in parts for _, answers in part for n in answers] == list(range(sum(sizes)))
    assert all(1 <= sum(len(answers) for _, answers in part) <= most for part in parts)
    owner = {n: g.prompt_ids[0] for g in groups for (n,) in g.answers}
    assert all(owner[n] == prompt for part in parts for prompt, answers in part for n in answers)


def test_micro_batches_hold_only_so_many_tokens():
    """A prompt of 3 and answers of 4 are laid out as 7 each: two of them are 14, a third would be 21. An answer that does
    not fit at all goes alone, and a short one beside a long one is padded: 2 x (1 + 50)."""
    groups = [Group([7, 7, 7], [[1] * 4, [2] * 4, [3] * 4]), Group([8], [[4] * 50, [5]])]
    parts = list(batches.micro_batches(groups, 16, 14))
    shape = [[(len(g.prompt_ids), len(g.answers)) for g in part] for part in parts]
    assert shape == [[(3, 2)], [(3, 1)], [(1, 1)], [(1, 1)]]
    assert [batches.tokens_of(part) for part in parts] == [11, 7, 51, 2]
    assert [batches.answers_of(part) for part in parts] == [2, 1, 1, 1]
    assert len(list(batches.micro_batches(groups[1:], 16, 102))) == 1
    assert len(list(batches.micro_batches(groups[1:], 16, 101))) == 2


def test_rows_and_results_of_micro_batches_cut_by_tokens_belong_together():
    """Answers 0-3 of one group and 4 of another, at most 14 tokens at once: rows 0-1, 2-3, 4."""
    groups = [Group([7, 7, 7], [[i] * 4 for i in range(4)]), Group([8, 8, 8], [[4] * 4])]
    seen = [
        (part.number, part.of, [a[0] for g in part.groups for a in g.answers], part.rows, part.scale, part.counted)
        for part in batches.my_micro_batches(groups, 16, 14)
    ]
    assert seen == [
        (0, 3, [0, 1], slice(0, 2), 1.0, True), (1, 3, [2, 3], slice(2, 4), 1.0, True), (2, 3, [4], slice(4, 5), 1.0, True),
    ]  # fmt: skip


# One mini-batch


END = 96  # the last token of every answer below, as a stop token that is also the padding token


def scored(name, advantages, lengths, *, cut_off=(), prompt=(1, 2, 3)):
    """A group of answers of given lengths; of their content only the tokens matter here."""
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    bodies = [torch.randint(0, 90, (length - 1,), generator=rng).tolist() for length in lengths]
    answers = [
        Completion((*body, END), (0.0,) * length, i not in cut_off)
        for i, (body, length) in enumerate(zip(bodies, lengths, strict=True))
    ]
    zeros = (0.0,) * len(answers)
    return ScoredGroup(sample(name), tuple(prompt), tuple(answers), zeros, {}, zeros, tuple(advantages))


BATCH = [
    scored("a", (1.25, -0.5, -0.75), (7, 4, 2)),
    scored("b", (0.4, 0.3, -0.7), (1, 9, 5), prompt=(4,), cut_off=(1,)),
    scored("c", (-1.0, 2.0, -1.0), (3, 3, 6), prompt=(6, 7, 8, 9, 10)),
]
CFG = Config(n=3, micro_batch=16, kl_coef=0.3, lr=1e-2, mini_batch_prompts=1, temperature=0.9)


@pytest.fixture
def policy():
    return Policy(tiny())


def measured(policy, batch, cfg, noise=0.3):
    """old_BT and ref_BT, log-probs that differ from the policy's, so that ratios leave the clip range."""
    logp_BT = selfemo.logprobs(policy, batch, cfg)
    rng = torch.Generator().manual_seed(5)
    return [logp_BT + noise * torch.randn(logp_BT.shape, generator=rng, dtype=logp_BT.dtype) for _ in range(2)]


def learner(policy, cfg, reference=None):
    return Learner(coldstart.adamw(policy, cfg.lr), reference)


def grads(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_micro_batches_change_neither_gradient_nor_metrics(policy, monkeypatch, ratio, loss_mean):
    monkeypatch.setattr(coldstart, "MAX_GRAD_NORM", 1e9)  # clipping would hide a wrong scale
    cfg = replace(CFG, ratio=ratio, loss_mean=loss_mean)
    scores = measured(policy, BATCH, cfg)
    found = []
    for size in (64, 1, 3, 8):
        values, _ = mini_batch(policy, learner(policy, cfg), BATCH, *scores, replace(cfg, micro_batch=size))
        found.append((values, grads(policy)))
    for values, gradient in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-12, abs=1e-12)
        assert_close(gradient, found[0][1], rtol=0, atol=1e-12)
    assert found[0][0]["clip_frac"] > 0
    assert found[0][0]["ratio/max"] > 1.2


def test_loss_of_a_mini_batch_by_hand(policy):
    """On policy: lengths 2, 4, 6 and advantages 1, 0, -1. Token mean -(2 - 6)/12 = 1/3, sequence mean 0."""
    batch = [scored("a", (1.0, 0.0, -1.0), (2, 4, 6))]
    scores = measured(policy, batch, CFG, noise=0)
    token, _ = mini_batch(policy, learner(policy, CFG), batch, *scores, CFG)
    assert token["loss/policy"] == pytest.approx(1 / 3, abs=1e-12)
    assert token["loss/kl"] == 0
    by_sequence = replace(CFG, loss_mean="sequence")
    values, _ = mini_batch(policy, learner(policy, CFG), batch, *scores, by_sequence)
    assert values["loss/policy"] == pytest.approx(0, abs=1e-12)


def test_truncated_share_of_the_loss_weight(policy):
    """Lengths 2, 4, 6, the last cut off: 6/12 of the tokens, a third of the answers. The weights sum to 1 (D20)."""
    batch = [scored("a", (1.0, 0.0, -1.0), (2, 4, 6), cut_off=(2,))]
    scores = measured(policy, batch, CFG, noise=0)
    for loss_mean, share in (("token", 0.5), ("sequence", 1 / 3)):
        for size in (1, 16):
            cfg = replace(CFG, loss_mean=loss_mean, micro_batch=size)
            values, _ = mini_batch(policy, learner(policy, CFG), batch, *scores, cfg)
            assert values["loss/weight_truncated"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("size", [2, 16])
def test_weights_sum_to_1_over_the_mini_batch_not_over_the_micro_batch(policy, monkeypatch, loss_mean, size):
    seen = []
    inner = grpo.policy_loss

    def spy(logp_BT, old_BT, adv_B, weight_BT, **settings):
        seen.append(weight_BT.sum().item())
        return inner(logp_BT, old_BT, adv_B, weight_BT, **settings)

    monkeypatch.setattr(grpo, "policy_loss", spy)
    cfg = replace(CFG, loss_mean=loss_mean, micro_batch=size)
    mini_batch(policy, learner(policy, cfg), BATCH, *measured(policy, BATCH, cfg), cfg)
    assert len(seen) == {2: 6, 16: 1}[size]
    assert math.fsum(seen) == pytest.approx(1, abs=1e-12)


def test_d6_the_kl_enters_the_loss_times_its_coefficient(policy, monkeypatch):
    """Gradients are linear in beta: g(.6) - g(.3) = g(.3) - g(0), and not 0. On policy for the ratio, off for the KL."""
    monkeypatch.setattr(coldstart, "MAX_GRAD_NORM", 1e9)
    scores = measured(policy, BATCH, CFG)
    found = []
    for beta in (0.0, 0.3, 0.6):
        mini_batch(policy, learner(policy, CFG), BATCH, *scores, replace(CFG, kl_coef=beta))
        found.append(torch.cat([g.flatten() for g in grads(policy).values()]))
    assert_close(found[2] - found[1], found[1] - found[0], rtol=0, atol=1e-12)
    assert (found[1] - found[0]).norm() > 1e-3


def test_d1_the_kl_draws_the_policy_to_the_reference(policy):
    """No advantage, the reference .5 nats above on every token: k3 = e^.5 - 1.5 = .148721, and a step raises the answers."""
    batch = [scored("a", (0.0, 0.0, 0.0), (4, 5, 6))]
    before_BT = selfemo.logprobs(policy, batch, CFG)
    teacher = learner(policy, replace(CFG, lr=1e-3))
    values, _ = mini_batch(policy, teacher, batch, before_BT, before_BT + 0.5, CFG)
    assert values["loss/kl"] == pytest.approx(0.148721, abs=1e-6)
    teacher.optimizer.step()
    assert ((selfemo.logprobs(policy, batch, CFG) - before_BT).sum(1) > 0).all()


def test_gradient_is_not_zero_where_the_loss_is(policy):
    """First update, equal lengths, advantages that sum to 0: loss 0, and yet there is something to learn."""
    batch = [scored("a", (1.0, 0.5, -1.5), (4, 4, 4))]
    values, _ = mini_batch(policy, learner(policy, CFG), batch, *measured(policy, batch, CFG, noise=0), CFG)
    assert abs(values["loss/policy"]) < 1e-12
    assert values["grad_norm"] > 0.1
    assert (values["ratio/mean"], values["ratio/max"], values["clip_frac"]) == pytest.approx((1, 1, 0), abs=1e-12)


def test_the_loss_is_descended(policy):
    """One step raises the probability of the answer with the positive advantage and lowers the other's (D1)."""
    batch = [scored("a", (1.0, -1.0, 0.0), (4, 4, 4))]
    before = measured(policy, batch, CFG, noise=0)
    teacher = learner(policy, replace(CFG, lr=1e-3))
    mini_batch(policy, teacher, batch, *before, CFG)
    teacher.optimizer.step()
    after = measured(policy, batch, CFG, noise=0)
    good, bad, _ = (after[0] - before[0]).sum(1).tolist()
    assert good > 0 > bad


def test_gradient_norm_is_clipped_at_1_and_logged_unclipped(policy):
    batch = [scored("a", (100.0, -100.0, 0.0), (4, 4, 4))]
    values, _ = mini_batch(policy, learner(policy, CFG), batch, *measured(policy, batch, CFG, noise=0), CFG)
    norm = torch.cat([g.flatten() for g in grads(policy).values()]).norm()
    assert values["grad_norm"] > 1
    assert norm == pytest.approx(1, abs=1e-5)


def test_gradients_of_one_mini_batch_do_not_leak_into_the_next(policy):
    scores = measured(policy, BATCH, CFG)
    teacher = learner(policy, CFG)
    for _ in range(2):
        mini_batch(policy, teacher, BATCH, *scores, CFG)
        norms = torch.cat([g.flatten() for g in grads(policy).values()]).norm()
    fresh = Policy(tiny())
    mini_batch(fresh, learner(fresh, CFG), BATCH, *scores, CFG)
    assert norms == pytest.approx(torch.cat([g.flatten() for g in grads(fresh).values()]).norm().item(), rel=1e-12)


# One RL step


def test_a_group_is_scored_by_hand(monkeypatch):
    """Gold joy. Recognised: joy; joy and anger by halves; nothing valid. Eqs. 8-10: 1 + .1; .5/1.5 + .1 = .433333; 0.
    Eq. 11: joy 1.5 of 2, anger .5 of 2. Eq. 12: 1/3, 2/3, 0. Eq. 13 at lambda .5: mean .511111, std sqrt(.614074/2) =
    .554109, so 1.062766, -.140365, -.922400; second term 0, 1, -1 (less 3e-6), halved. What the answers feel (anger) is
    the label of the new sample and earns nothing."""
    monkeypatch.setattr(Task, "encode", lambda w, sample: ([5, 6], ""))
    felt = {"anger": 1.0}
    parses = [Output("x", {"joy": 1.0}, felt, "Oh.", {}), Output("x", {"joy": 0.5, "anger": 0.5}, felt, "Hm.", {})]
    group = [Completion((1, END), (0.0, 0.0), True, "", parse) for parse in (*parses, Failure("think", ""))]
    (found,) = selfemo.score(world(1), [sample("a")], [group], 0.5)
    (chosen,) = selfemo.select(world(1), [found], 1)
    assert found.rewards == pytest.approx((1.1, 0.433333, 0.0), abs=1e-6)
    assert found.core == {"joy": 0.75, "anger": 0.25}
    assert found.consistencies == (1 / 3, 2 / 3, 0.0)
    assert found.advantages == pytest.approx((1.062766, 0.359633, -1.422399), abs=3e-6)
    assert (found.prompt_ids, chosen.index, chosen.child.gold) == ((5, 6), 0, felt)


def one_update(batch, cfg=CFG, k=1, t=0):
    """A policy after `update`, and the desk that took notes."""
    policy, run = Policy(tiny()), desk()
    w = Task(replace(cfg, batch_prompts=len(batch)), None, frozenset({END}), DEFAULT, (sample("a"),) * 6, (), ())
    run.learner = learner(policy, cfg, policy.frozen_copy())
    measured = selfemo.update(run, policy, batch, t, w.cfg)
    nothing = [Selection(None, "rule", None)] * len(batch)
    selfemo.write_down(run, w, policy, batch, nothing, measured, k, t)
    return policy, run


def test_first_mini_batch_has_ratio_1_and_the_next_ones_not():
    _, run = one_update(BATCH)
    ((phase, k, values, t),) = run.logged
    assert (phase, k, t) == ("rl", 1, 0)
    assert len(values["ratio/max/by_mini_batch"]) == 3
    assert values["ratio/mean/by_mini_batch"][0] == pytest.approx(1, abs=1e-12)
    assert values["ratio/max/by_mini_batch"][0] == pytest.approx(1, abs=1e-12)
    assert values["clip_frac/by_mini_batch"][0] == 0
    assert all(abs(x - 1) > 1e-3 for x in values["ratio/max/by_mini_batch"][1:])
    assert values["ratio/max"] == max(values["ratio/max/by_mini_batch"])
    assert run.position.updates == 3


def test_the_order_of_mini_batches_matters():
    forward, _ = one_update(BATCH[:2])
    backward, _ = one_update(BATCH[1::-1])
    again, _ = one_update(BATCH[:2])
    assert all(torch.equal(a, b) for a, b in zip(forward.parameters(), again.parameters(), strict=True))
    gap = max((a - b).abs().max().item() for a, b in zip(forward.parameters(), backward.parameters(), strict=True))
    assert gap > 1e-4


def test_one_mini_batch_does_not_care_about_the_order_of_its_prompts():
    cfg = replace(CFG, mini_batch_prompts=2)
    forward, run = one_update(BATCH[:2], cfg)
    backward, _ = one_update(BATCH[1::-1], cfg)
    assert run.position.updates == 1
    gap = max((a - b).abs().max().item() for a, b in zip(forward.parameters(), backward.parameters(), strict=True))
    assert gap < 1e-9


def test_old_log_probs_are_those_before_the_first_update_and_go_to_their_mini_batch(monkeypatch):
    """Also at a temperature: policy, old and reference log-probs all are of logits / 0.9."""
    seen = []
    inner = selfemo.mini_batch

    def spy(policy, teacher, batch, before_BT, ref_BT, cfg):
        values, old_BT = inner(policy, teacher, batch, before_BT, ref_BT, cfg)
        seen.append((before_BT, old_BT, ref_BT))
        return values, old_BT

    monkeypatch.setattr(selfemo, "mini_batch", spy)
    recorded = []
    monkeypatch.setattr(selfemo.metrics, "logprob_metrics", lambda old, ref, sampled: recorded.extend((old, ref)) or {})
    one_update(BATCH)
    lm, everything = tiny(), []
    assert [(before_BT == selfemo.NOT_MEASURED).all().item() for before_BT, _, _ in seen] == [True, False, False]
    for group, (before_BT, old_BT, ref_BT) in zip(BATCH, seen, strict=True):
        assert (before_BT == selfemo.NOT_MEASURED).all() or torch.equal(before_BT, old_BT)
        assert not old_BT.requires_grad and not ref_BT.requires_grad
        for answer, old_T, ref_T in zip(group.answers, old_BT, ref_BT, strict=True):
            expected = answer_logprobs(lm, group.prompt_ids, answer.ids, temperature=0.9)
            everything.append(expected)
            assert_close(old_T[: len(answer.ids)], expected, rtol=0, atol=1e-10)
            assert_close(ref_T[: len(answer.ids)], expected, rtol=0, atol=1e-10)
    for row_N in recorded:
        assert_close(row_N, torch.cat(everything), rtol=0, atol=1e-10)


def test_the_first_mini_batch_scores_itself_as_a_pass_of_its_own_would():
    """Without old log-probs its own forward gives them: the same numbers, loss and gradient."""
    results = []
    for known in (True, False):
        policy = Policy(tiny())
        old_BT, ref_BT = measured(policy, BATCH, CFG, noise=0)[0], measured(policy, BATCH, CFG)[1]
        before_BT = old_BT if known else torch.full_like(old_BT, selfemo.NOT_MEASURED)
        values, used_BT = mini_batch(policy, learner(policy, CFG), BATCH, before_BT, ref_BT, CFG)
        results.append((values, used_BT, [p.grad for p in policy.parameters()]))
    (values, logp, grads), (own_values, own_logp, own_grads) = results
    assert own_values == pytest.approx(values, abs=1e-12) and own_values["ratio/mean"] == 1
    for one, other in zip([*logp, *grads], [*own_logp, *own_grads], strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)
    assert max(g.abs().max().item() for g in grads) > 1e-3


def test_update_writes_a_record_a_group_with_the_version_of_the_weights():
    _, run = one_update(BATCH)
    records = run.files["rollouts/iteration-1.jsonl"]
    assert [r["sample_id"] for r in records] == ["w/train/a", "w/train/b", "w/train/c"]
    assert {r["weights_version"] for r in records} == {0}


def test_the_reference_is_the_policy_at_the_start_of_the_rl_stage_and_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "on_dev", lambda *_: None)
    learners = []

    def steps(run, policy, stage, total, make, save_every):
        learners.append(make())
        return iter([(0, learners[-1])])

    monkeypatch.setattr(selfemo, "stage_steps", steps)
    policy = Policy(tiny())
    cold = tmp_path / "cold_start/weights.safetensors"
    assert list(selfemo.rl_steps(desk(tmp_path, stage=1), world(5), policy, 1)) == [0]
    before = cold.read_bytes()
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    assert list(selfemo.rl_steps(desk(tmp_path, stage=3), world(5), policy, 2)) == [3]
    first, second = learners
    assert [torch.equal(*map(lambda p: next(p.parameters()), pair)) for pair in ((first.reference, policy),
            (second.reference, policy))] == [False, True]  # fmt: skip
    assert not any(p.requires_grad for p in second.reference.parameters())
    assert cold.read_bytes() == before  # the cold start's weights are those of iteration 1


def test_without_self_play_nothing_is_selected(monkeypatch):
    """The same answer is kept where self-play is on."""
    monkeypatch.setattr(Task, "encode", lambda w, sample: ([5, 6], ""))
    good = Completion((1, END), (0.0, 0.0), True, "", Output("x", {"joy": 1.0}, {"joy": 1.0}, "Oh.", {}))
    group = ScoredGroup(sample("a"), (5,), (good,), (1.1,), {}, (1 / 3,), (0.0,))
    assert [selfemo.select(world(3, self_play=on), [group], 1)[0].index for on in (True, False)] == [0, None]
    assert selfemo.select(world(3, self_play=False), [group], 1) == [Selection(None, "off", None)]


# Supervised fine-tuning


EXAMPLES = [Example("a", (1, 2, 3), (4, 5, END)), Example("b", (6,), (7, END)), Example("c", (8, 9), (10, 11, 12, 13, END))]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_sft_learns_every_answer_token_and_the_stop_token_and_no_prompt_token(policy, monkeypatch, size):
    """Loss: minus the mean log-prob of the 3 + 2 + 5 answer tokens, stop tokens among them, one by one by transformers."""
    monkeypatch.setattr(coldstart, "MAX_GRAD_NORM", 1e9)
    lm = tiny()
    loss = -sum(answer_logprobs(lm, x.prompt_ids, x.ids).sum() for x in EXAMPLES) / 10
    values = coldstart.sft_step(policy, learner(policy, CFG), EXAMPLES, replace(CFG, micro_batch=size))
    assert values["loss/sft"] == pytest.approx(loss.item(), rel=1e-12)
    expected = gradients(lm, loss)
    assert_close({k.removeprefix("lm."): v for k, v in grads(policy).items()}, expected, rtol=0, atol=1e-12)


def test_sft_takes_every_example_once_in_batches_of_sft_batch(monkeypatch, tmp_path):
    """5 examples, 2 per step: ceil(5/2) = 3 updates, the last one of a single example; stage 4 belongs to iteration 2."""
    seen = []

    def step(policy, teacher, batch, cfg):
        seen.append([x.sample_id for x in batch])
        return {"loss/sft": 0.0}

    monkeypatch.setattr(coldstart, "sft_step", step)
    monkeypatch.setattr(coldstart, "stage_steps", lambda r, p, s, total, make, e: ((i, make()) for i in range(total)))
    run = desk(stage=4)
    five = [Example(str(i), (1,), (2, END)) for i in range(5)]
    coldstart.sft(run, world(3, sft_batch=2), Policy(tiny()), 4, five, 1e-3)
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert sorted(itertools.chain(*seen)) == ["0", "1", "2", "3", "4"]
    assert [(phase, k, step) for phase, k, _, step in run.logged] == [("sft", 2, 0), ("sft", 2, 1), ("sft", 2, 2)]
    assert run.position.updates == 3


def test_every_stage_has_a_fresh_adamw_with_its_own_rate(place, tmp_path, monkeypatch):
    """Cold start, then RL and SFT of both iterations (D26). Weight decay .01, betas .9 and .999."""
    made = []
    inner = coldstart.adamw

    def spy(policy, lr):
        made.append(inner(policy, lr))
        assert made[-1].state == {}
        return made[-1]

    monkeypatch.setattr(coldstart, "adamw", spy)
    more = ("--lr", 1e-3, "--sft_lr", 2e-3, "--cold_start_lr", 3e-3, "--steps", 1, "--cold_start", "dataset")
    assert place.run(tmp_path / "run", *more)[0] == 0
    rates = [optimizer.param_groups[0]["lr"] for optimizer in made]
    assert rates[:5] == [3e-3, 1e-3, 2e-3, 1e-3, 2e-3]
    assert {(o.param_groups[0]["betas"], o.param_groups[0]["weight_decay"]) for o in made} == {((0.9, 0.999), 0.01)}


# D17


@pytest.fixture(scope="module")
def opened_place(place):
    w = opened(place)
    return w, Policy.load(place.root / "base")


def text_of(w, example):
    return data.answer_text(w.tokenizer, example.ids, w.eos, "")


def test_d17_self_takes_the_start_models_own_valid_answers_and_looks_at_no_gold(opened_place, tmp_path):
    w, policy = opened_place
    examples = coldstart.own_answers(folder.Run(tmp_path / "one", {}), w, policy)
    assert 10 < len(examples) < len(w.originals) == 24
    for x in examples:
        assert isinstance(data.parse_output(text_of(w, x), EMOTIONS), Output)
        assert x.ids[-1] in w.eos
    assert len({x.sample_id for x in examples}) == len(examples)
    other = replace(w, originals=tuple(replace(s, gold={"anger": 1.0}) for s in w.originals))
    assert coldstart.own_answers(folder.Run(tmp_path / "two", {}), other, policy) == examples


def test_d17_self_without_one_valid_answer_is_a_users_mistake(opened_place, tmp_path):
    w, policy = opened_place
    with pytest.raises(UserError, match="dataset"):
        coldstart.own_answers(folder.Run(tmp_path, {}), replace(w, cfg=replace(w.cfg, max_new_tokens=3)), policy)


def test_d17_dataset_teaches_gold_and_the_real_next_turn(opened_place):
    """Of four turns in each of 8 dialogues: turn 0 is followed by an unlabelled one, turn 3 by none, turn 1 has no label."""
    w, policy = opened_place
    w = replace(w, cfg=replace(w.cfg, max_new_tokens=60))
    examples = coldstart.templates(w, policy)
    by_id = {s.id: s for s in w.originals}
    assert sorted(x.sample_id for x in examples) == [f"tiny/train/d{i}/2" for i in range(8)]
    for x in examples:
        assert x.ids[-1] in w.eos
        assert list(x.prompt_ids) == w.encode(by_id[x.sample_id])[0]
        target = coldstart.dataset_target(by_id[x.sample_id])  # its double quotes are unknown to this tokenizer
        assert list(x.ids[:-1]) == w.tokenizer(target, add_special_tokens=False)["input_ids"]
        assert text_of(w, x).partition("'my_emotions'")[0] == target.partition("'my_emotions'")[0]
    assert coldstart.templates(replace(w, cfg=replace(w.cfg, max_new_tokens=5)), policy) == []


def test_a_target_ends_with_the_stop_token_of_the_chat(opened_place):
    """Qwen3 names two, 151645 of the chat and 151643 of plain text: the lower number is not the one to learn."""
    w, policy = opened_place
    own = w.tokenizer.eos_token_id
    assert own > 0
    two = replace(w, eos=frozenset({0, own}), cfg=replace(w.cfg, max_new_tokens=60))
    assert {x.ids[-1] for x in coldstart.templates(two, policy)} == {own}


def test_d17_none_learns_nothing(place, tmp_path):
    out = tmp_path / "run"
    assert place.run(out, "--cold_start", "none", "--iterations", 1, "--steps", 1, "--self_play", "false")[0] == 0
    assert (out / "cold_start.jsonl").read_text() == ""
    assert [m for m in lines(out / "metrics.jsonl") if "loss/sft" in m] == []
    assert [m["when"] for m in lines(out / "metrics.jsonl") if m["phase"] == "eval"][:2] == ["start", "after the cold start"]


# A whole run


def rl_lines(out):
    return [m for m in lines(out / "metrics.jsonl") if m["phase"] == "rl"]


def records(out):
    return [r for k in (1, 2) for r in lines(out / f"rollouts/iteration-{k}.jsonl")]


def test_the_schedule_of_a_run(finished):
    """S = 3, K = 2, T = 6; 5 prompts per step, 3 answers each; lambda = t/6."""
    config = json.loads((finished / "config.json").read_text())
    assert (config["S"], config["T"]) == (3, 6)
    assert [(m["step"], m["iteration"], m["lam"]) for m in rl_lines(finished)] == [
        (0, 1, 0.0), (1, 1, 1 / 6), (2, 1, 1 / 3), (3, 2, 0.5), (4, 2, 2 / 3), (5, 2, 5 / 6),
    ]  # fmt: skip
    by_step = itertools.groupby(records(finished), key=lambda r: (r["step"], r["iteration"], r["lam"], len(r["answers"])))
    assert [(*key, len(list(group))) for key, group in by_step] == [
        (0, 1, 0.0, 3, 5), (1, 1, 1 / 6, 3, 5), (2, 1, 1 / 3, 3, 5),
        (3, 2, 0.5, 3, 5), (4, 2, 2 / 3, 3, 5), (5, 2, 5 / 6, 3, 5),
    ]  # fmt: skip


def test_evaluations_before_and_after_every_stage_and_test_once(finished):
    said = [(m["when"], m["step"]) for m in lines(finished / "metrics.jsonl") if m["phase"] == "eval"]
    assert said == [
        ("start", 0), ("after the cold start", 0), ("after step 2", 2), ("after RL 1", 3), ("after SFT 1", 3),
        ("after step 4", 4), ("after RL 2", 6), ("after SFT 2", 6), ("test", 6),
    ]  # fmt: skip
    tests = [m["when"] for m in lines(finished / "metrics.jsonl") if any(name.startswith("test/") for name in m)]
    assert tests == ["test"]


def test_a_run_is_scored_on_dev_and_its_end_once_on_test(monkeypatch, tmp_path):
    """No look at test before the model is final."""
    seen = []

    def evaluation(run, w, policy, sets, k, t, name, when, temperatures):
        seen.append((name, when, temperatures, {label: [s.id for s in own] for label, own in sets.items()}))

    monkeypatch.setattr(evaluate, "on_sets", evaluation)
    monkeypatch.setattr(selfemo, "export", lambda *_: None)
    monkeypatch.setattr(selfemo, "stage_steps", lambda *_: iter([(0, None)]))
    w = replace(world(1), dev=(sample("x", id="w/dev/x"),), test=(sample("y", id="w/test/y"),))
    evaluate.between_steps(desk(), w, None, 1, 2)
    selfemo.finish(desk(tmp_path), w, None)
    dev, test, greedy = {"w": ["w/dev/x"]}, {"w": ["w/test/y"]}, (0.0,)
    on_dev = [("eval", "after step 2", greedy, dev), ("eval", "after SFT 2", greedy, dev)]
    assert seen == [*on_dev, ("test", "test", greedy, test)]


def test_between_steps_only_the_first_temperature_is_tried(monkeypatch, place, tmp_path):
    """Evaluations between steps draw a curve: dev at one temperature is enough, in a quarter of the time.

    Entropies are those of the answers at the first temperature, wherever there are two.
    """
    out, measured = tmp_path / "run", []

    def entropies(task, policy, samples, answers, prefix):
        measured.extend((prefix.removesuffix("/entropy/"), answer.text) for answer in answers)
        return {}

    monkeypatch.setattr(evaluate, "task_entropies", entropies)
    argv = place.argv(out, "--iterations", 1, "--steps", 2, "--eval_every", 1)
    assert call([*argv, "--eval_temperatures", "0", "1"])[0] == 0
    found = {m["when"]: m for m in lines(out / "metrics.jsonl") if m["phase"] == "eval"}
    for part in ("@1/acc", "eval/selfemo/"):
        without = [when for when, m in found.items() if when != "test" and not any(part in name for name in m)]
        assert set(without) - {"start"} == {"after step 1"}
    rows = [row for path in sorted((out / "evaluations").iterdir()) for row in lines(path)]
    assert measured == [(row["set"], row["text"]) for row in rows if "@" not in row["set"]] and len(measured) < len(rows)


def test_d6_kl_is_0_at_the_first_step_of_every_iteration_only(finished):
    kl = [m["policy/kl"] for m in rl_lines(finished)]
    assert [x == 0 for x in kl] == [True, False, False, True, False, False]


def test_the_weights_after_the_cold_start_take_no_second_copy_in_main_memory(place, tmp_path, monkeypatch):
    """The reference is offloaded, once per iteration; the cold weights, in iteration 2 at each evaluation, are not."""
    asked, inner = [], Policy.frozen_copy
    monkeypatch.setattr(Policy, "frozen_copy", lambda policy, *, offload=False: asked.append(offload) or inner(policy))
    assert place.run(tmp_path / "run", "--steps", 1, "--eval_every", 1, "--ref_offload", "true")[0] == 0
    assert asked == [True, True, False]


def test_d6_kl_to_the_cold_start_is_logged_too(finished):
    """Iteration 1: the reference is the cold start. Iteration 2: where dev is scored (t = 4), and then it is not 0."""
    found = [m.get("policy/kl_cold_start") for m in rl_lines(finished)]
    assert found[:3] == [m["policy/kl"] for m in rl_lines(finished)][:3]
    assert (found[3], found[5]) == (None, None)
    assert found[4] > 0


def test_every_root_is_a_train_dialogue_and_no_sample_of_the_selfemo_test_enters_the_buffer(finished):
    """D23, D24."""
    rows = lines(finished / "buffer.jsonl")
    roots = {row["child"]["id"].split("+")[0] for row in rows} | {r["sample_id"].split("+")[0] for r in records(finished)}
    assert rows
    assert {root.rsplit("/", 2)[0] for root in roots} == {"tiny/train"}
    frozen = lines(finished / "selfemo_test.jsonl")
    assert frozen
    test_ids = {x["id"] for x in frozen} | {x["parent"] for x in frozen}
    assert not test_ids & ({r["sample_id"] for r in records(finished)} | {x["child"]["id"] for x in rows})


def test_d23_the_selfemo_test_split_is_made_of_dev_once(finished, place):
    """At most one new sample per dev sample, by Eq. 7; scored from the cold start on, before and after every stage."""
    frozen = [sample_from_record(x) for x in lines(finished / "selfemo_test.jsonl")]
    dev = {s.id: s for s in opened(place).dev}
    assert [x.id for x in frozen] == [f"{x.parent}+0" for x in frozen]
    assert len({x.parent for x in frozen}) == len(frozen) <= len(dev)
    for x in frozen:
        assert x.context[:-1] == dev[x.parent].context
        assert (x.context[-1].speaker, x.gold) == (dev[x.parent].responder.name, x.context[-1].label)
        assert (x.origin, x.iteration, x.depth) == ("synthetic", 0, 1)
    scores = [m for m in lines(finished / "metrics.jsonl") if m["phase"] == "eval" and m["when"] != "test"]
    without = [m["when"] for m in scores if "eval/selfemo/iou" not in m]
    assert without == ["start", "after step 2", "after step 4"]


def test_kept_answers_are_recorded_with_the_ids_that_were_sampled(finished):
    """One line of buffer.jsonl a selected answer, in the order of the records; the child's last turn is its reply."""
    chosen = [r for r in records(finished) if r["selected"] is not None]
    rows = lines(finished / "buffer.jsonl")
    assert len(rows) == len(chosen) > 5
    for row, r in zip(rows, chosen, strict=True):
        answer = r["answers"][r["selected"]]
        assert (row["iteration"], row["sample_id"]) == (r["iteration"], r["sample_id"])
        assert (row["prompt_ids"], row["ids"]) == (r["prompt_ids"], answer["ids"])
        assert row["child"]["context"][-1]["text"] == answer["parse"]["my_output"]
        assert answer["reward"] == max(a["reward"] for a in r["answers"]) >= 0.5
        assert r["why"] == "kept"


def test_new_samples_are_drawn_in_the_next_iteration(finished):
    """The buffer is no ornament: iteration 2 answers prompts that iteration 1 made, and none of its own."""
    made = {row["child"]["id"] for row in lines(finished / "buffer.jsonl") if row["iteration"] == 1}
    drawn = {r["sample_id"] for r in records(finished) if r["origin"] == "synthetic"}
    assert drawn
    assert drawn <= made
    assert all(r["origin"] == "original" for r in lines(finished / "rollouts/iteration-1.jsonl"))


def test_weights_versions_count_optimizer_steps(finished):
    """18 valid answers of the cold start make 3 updates (6 per step); then two mini-batches per step (3 + 2 prompts)."""
    cold = len(lines(finished / "cold_start.jsonl"))
    first = math.ceil(cold / 6)
    versions = sorted({r["weights_version"] for r in lines(finished / "rollouts/iteration-1.jsonl")})
    assert versions == [first, first + 2, first + 4]


def test_the_returned_model_is_the_one_after_sft(finished):
    """Line 20. It opens in plain transformers and equals the last checkpoint."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(finished / "model")
    (last,) = (finished / "checkpoints").iterdir()
    assert_close(weights(Policy(lm)), load_file(last / "weights.safetensors"), rtol=0, atol=0)
    assert AutoModelForCausalLM.from_pretrained(finished / "model").config.model_type == "qwen3"


def test_a_run_passes_its_audit(finished, monkeypatch, capsys):

    assert audit.audit(finished).problems == ()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "audit", str(finished)])
    assert evaluate.main() == 0
    assert "0 differences" in capsys.readouterr().out


def test_d27_plain_grpo(place, tmp_path):
    """Both switches off: lambda 0 with consistency still logged, nothing selected, no retraining, T unchanged."""
    out = tmp_path / "run"
    more = ("--self_grpo", "false", "--self_play", "false", "--steps", 1)
    assert place.run(out, *more)[0] == 0
    assert json.loads((out / "config.json").read_text())["T"] == 2
    assert [(m["step"], m["lam"]) for m in rl_lines(out)] == [(0, 0.0), (1, 0.0)]
    assert all(m["consistency/mean"] > 0 for m in rl_lines(out))
    assert {(r["selected"], r["why"], r["origin"]) for r in records(out)} == {(None, "off", "original")}
    assert lines(out / "buffer.jsonl") == []
    assert [m["step"] for m in lines(out / "metrics.jsonl") if "loss/sft" in m and m["iteration"] > 0] == []
    assert audit.audit(out).problems == ()


@pytest.fixture(scope="module")
def from_base(place):
    """A run with --retrain_from base, and what each stage did to the weights."""
    out = place.root / "from_base"
    assert place.run(out, "--retrain_from", "base", "--steps", 2)[0] == 0
    return out


def test_d13_from_base_every_retraining_begins_at_the_start_model(from_base, place):
    """SFT 2 learns cold-start targets and kept answers; its first loss is the start model's, as the log says."""
    assert [m["lam"] for m in rl_lines(from_base)] == [0.0, 0.5, 0.0, 0.5]
    assert audit.audit(from_base).problems == ()
    w = opened(place)
    cold = {x["sample_id"]: x for x in lines(from_base / "cold_start.jsonl")}
    newest = cold | {x["sample_id"]: x for x in lines(from_base / "buffer.jsonl")}
    order = draws.shuffled([Example(k, x["prompt_ids"], x["ids"]) for k, x in newest.items()], "0/sft/4")
    policy = Policy.load(place.root / "base")
    loss = coldstart.sft_step(policy, learner(policy, CFG), order[:6], w.cfg)["loss/sft"]
    logged = [m["loss/sft"] for m in lines(from_base / "metrics.jsonl") if "loss/sft" in m and m["iteration"] == 2]
    assert len(logged) == math.ceil(len(newest) / 6)
    assert logged[0] == pytest.approx(loss, rel=1e-5)


def test_d27_from_base_without_self_play_keeps_what_rl_has_learnt(place, tmp_path):
    """Lines 12-18 are skipped, so line 18 must not put the start model back."""
    out = tmp_path / "run"
    more = ("--retrain_from", "base", "--self_play", "false", "--iterations", 1, "--steps", 1)
    assert place.run(out, *more)[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (place.root / "base", out / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


# NaN


def poisoned(nth, *, loss_too):
    """A policy_loss whose nth call has a gradient that is not a number."""
    inner, calls = grpo.policy_loss, itertools.count(1)

    def poison(logp_BT, *args, **settings):
        loss, found = inner(logp_BT, *args, **settings)
        if next(calls) == nth:
            loss = loss + (logp_BT.sum() * 0).sqrt() * (math.nan if loss_too else 1)  # sqrt: value 0, gradient 0 * inf
        return loss, found

    return poison


@pytest.mark.parametrize("loss_too", [True, False])
def test_a_nan_stops_the_run_names_step_and_samples_and_trains_nothing(place, finished, tmp_path, monkeypatch, loss_too):
    """Fourth forward of the RL stages: second mini-batch of RL step 2 (3 + 2 prompts of 3 answers: 5, 4; 5, 1 at most)."""
    out = tmp_path / "run"
    inner, calls = torch.optim.AdamW.step, itertools.count()

    def counted(self, *args):
        assert all(torch.isfinite(p.grad).all() for group in self.param_groups for p in group["params"])
        next(calls)
        return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "policy_loss", poisoned(8, loss_too=loss_too))
        patch.setattr(torch.optim.AdamW, "step", counted)
        status, _, complained = place.run(out, "--save_every", 1, "--micro_batch", 3)
    assert status == 3
    assert complained.count("\n") == 1
    assert "at RL step 2; prompts of the mini-batch" in complained
    expected = [r["sample_id"] for r in lines(finished / "rollouts/iteration-1.jsonl") if r["step"] == 1]
    assert complained.count("tiny/train/") == 3
    assert all(name in complained for name in expected[:3])
    cold = math.ceil(len(lines(out / "cold_start.jsonl")) / 6)
    assert next(calls) == cold + 2
    assert [r["step"] for r in lines(out / "rollouts/iteration-1.jsonl")] == [0] * 5


def test_the_advice_after_a_nan_can_be_followed(place, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "policy_loss", poisoned(1, loss_too=True))
        status, _, complained = place.run(out, "--iterations", 1, "--steps", 1)
    assert status == 3
    assert "lower --lr" in complained
    assert place.run(out, "--iterations", 1, "--steps", 1, "--lr", 1e-4, resume=True)[0] == 0


def test_after_a_nan_in_the_first_step_the_stage_begins_again(place, finished, tmp_path, monkeypatch):
    """The second mini-batch fails: the first one moved the policy, but the reference and the cold start's weights must not
    become those of a policy that has moved. Taken up again it is the run that never failed."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "policy_loss", poisoned(4, loss_too=True))  # three micro-batches in the first mini-batch
        assert place.run(out)[0] == 3
    assert place.run(out, resume=True)[0] == 0
    assert results(out) == results(finished)


STAGES = [(0, "RL step 1"), (5, "RL step 6"), (task.EVALUATION, "an evaluation"), (task.COLD_START, "the cold start")]


@pytest.mark.parametrize(("step", "when"), STAGES)
def test_logits_that_are_no_numbers_name_the_step_counted_from_1(monkeypatch, step, when):
    def overflow(*args, **kwargs):
        raise FloatingPointError("logits are not finite")

    monkeypatch.setattr(task, "generate", overflow)
    monkeypatch.setattr(Task, "encode", lambda self, one: ((5,), ""))
    with pytest.raises(task.NotFinite, match=rf"^logits are not finite at {when}; prompts: w/train/0$"):
        task.answer(world(1), Policy(tiny()), [sample(0)], n=2, temperature=1.0, step=step)


def test_a_model_of_nans_is_one_line(place, tmp_path):
    """Already the first evaluation finds it."""
    shutil.copytree(place.root / "base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    save_file({k: torch.full_like(v, math.nan) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    status, _, complained = place.run(tmp_path / "run", "--model", tmp_path / "base")
    assert status == 3
    assert complained.startswith("error: ") and complained.count("\n") == 1


def test_a_nan_in_supervised_fine_tuning_stops_the_run(place, tmp_path, monkeypatch):
    inner = coldstart.sft_step
    monkeypatch.setattr(coldstart, "sft_step", lambda *args: {**inner(*args), "grad_norm": math.inf})
    status, _, complained = place.run(tmp_path / "run")
    assert status == 3
    assert "grad_norm is not finite at fine-tuning step 1; " in complained
    assert complained.count("tiny/train/") == 6


# A user's mistakes

BROKEN = '{"id": "d0", "turns": [{"speaker": "Ann", "text": "Hi.", "label": "pride"}]}\n'
MISTAKES = {
    "no data folder": (("--data", "tiny=/nowhere"), "/nowhere"),
    "no data": (("--data", "tiny"), "NAME=DIR|NAME=VALUE"),
    "unknown limit": (("--limit", "meld=5"), "meld"),
    "limit of nothing": (("--limit", "tiny=0"), "positive"),
    "group of one": (("--n", 1), "--n"),
    "no model": (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
    "greedy rollouts": (("--temperature", 0), "--temperature"),
    "negative rate": (("--lr", -1), "--lr"),
    "no rate": (("--lr", "nan"), "--lr"),
    "prompts too long": (("--max_prompt_tokens", 2), "--max_prompt_tokens"),
    "no gold file": (("--gold", "/nowhere.jsonl"), "/nowhere.jsonl"),
    "no persona file": (("--personas", "/nowhere.jsonl"), "/nowhere.jsonl"),
    "no prompt file": (("--prompts", "/nowhere.json"), "/nowhere.json"),
    "no soft labels": (("--data", "meld=/nowhere", "--soft_labels", "true"), "soft_labels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_line_and_leaves_nothing_behind(place, tmp_path, name):
    more, said = MISTAKES[name]
    status, _, complained = place.run(tmp_path / "run", *more)
    assert status == 2
    assert complained.startswith("error: ")
    assert complained.count("\n") == 1
    assert re.search(said, complained)
    assert not (tmp_path / "run").exists()


def test_an_unknown_label_is_named_with_file_and_line(place, tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(BROKEN)
    (tmp_path / "labels.json").write_text(json.dumps(EMOTIONS))
    status, _, complained = place.run(tmp_path / "run", "--data", f"tiny={tmp_path}")
    assert status == 2
    assert "train.jsonl:1" in complained and "pride" in complained
    assert complained.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--learning_rate", "1"], ["--ratio", "letter"], ["--self_play", "maybe"], ["--n", "x"]])
def test_an_unknown_flag_or_value_ends_with_status_2_and_no_traceback(place, tmp_path, more):
    status, _, complained = call([*place.argv(tmp_path / "run"), *more])
    assert status == 2
    assert more[0] in complained
    assert "Traceback" not in complained
    assert not (tmp_path / "run").exists()


def test_a_model_without_weights_leaves_nothing_behind(place, tmp_path):
    shutil.copytree(place.root / "base", tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    status, _, complained = place.run(tmp_path / "run", "--model", tmp_path / "base")
    assert status == 2
    assert complained.startswith("error: ") and complained.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_d14_gold_for_train_replaces_the_files_own(place, tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id": "tiny/train/d0/0", "weights": {"joy": 0.65, "anger": 0.35}}\n')
    found = {s.id: s.gold for s in opened(place, "--gold", path).originals}
    assert found["tiny/train/d0/0"] == {"joy": 0.65, "anger": 0.35}
    assert [s.gold for s in opened(place, "--gold", path).dev] == [s.gold for s in opened(place).dev]


def test_d24_drop_overlap_drops_train_dialogues_that_share_lines_with_test(place, tmp_path):
    """Two more train dialogues of two samples: one shares its lines with test and goes, one with dev and stays."""
    rows = {}
    for split, words in (("test", ("work", "wrong")), ("dev", ("rain", "late"))):
        lines_of = [f"I never thought that this would {words[0]}.", f"Then you were {words[1]} about all of it."]
        turns = [{"speaker": who, "text": text, "label": "joy"} for who, text in zip(("Ann", "Bo"), lines_of, strict=True)]
        rows[split] = json.dumps({"id": f"like-{split}", "turns": turns}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(rows[split])
    (tmp_path / "train.jsonl").write_text(rows["test"] + rows["dev"] + (place.root / "world/train.jsonl").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(EMOTIONS))
    found = {}
    for switch in ("false", "true"):
        w = opened(place, "--data", f"tiny={tmp_path}", "--drop_overlap", switch)
        found[switch] = {s.id for s in w.originals}
    assert len(found["false"]) == 28
    assert found["false"] - found["true"] == {"tiny/train/like-test/0", "tiny/train/like-test/1"}


def test_the_tiny_prompts_are_those_that_the_runs_use(place):
    assert opened(place).prompts.system == PROMPTS["system"]
