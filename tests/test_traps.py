"""Faults that users of comparable programs reported, and that the tests beside this one do not cover yet."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import lines, results
from test_selfemo import CFG, END, desk, grads, kept, learner, measured, opened, sample, scored, world
from tiny import tiny

import selfemo
from model import Policy
from selfemo import mini_batch
from training import coldstart
from training.task import Buffer, answer


def test_the_sampling_temperature_is_in_every_log_prob(place, tmp_path):
    """Sampling at one temperature and scoring at another makes ratios of 2 on a policy that has not moved."""
    out = tmp_path / "run"
    assert place.run(out, "--temperature", 0.7, "--iterations", 1, "--steps", 1, "--cold_start", "none")[0] == 0
    (step,) = [m for m in lines(out / "metrics.jsonl") if m["phase"] == "rl"]
    assert step["rollout/logp_gap_max"] < 1e-4
    assert step["ratio/max/by_mini_batch"][0] == pytest.approx(1, abs=1e-5)
    assert step["policy/kl"] == 0


def test_a_stop_token_that_is_also_the_padding_token_is_trained():
    """Where padding is told by its value, an answer's own end counts as padding, and no model learns to stop."""
    policy = Policy(tiny())
    batch = [scored("a", (1.0, -1.0), (1, 6))]
    assert batch[0].answers[0].ids == (END,)
    scores = measured(policy, batch, CFG, noise=0)
    before = policy([batch[0].group])[0][0, 0].item()
    teacher = learner(policy, replace(CFG, lr=1e-3))
    mini_batch(policy, teacher, batch, *scores, CFG)
    teacher.optimizer.step()
    assert policy([batch[0].group])[0][0, 0].item() > before


def test_the_tokens_that_were_sampled_are_learnt_not_their_text(monkeypatch):
    """Decoding and encoding again is no identity: the retraining would learn tokens that the policy never wrote."""
    found = []
    monkeypatch.setattr(coldstart, "sft", lambda run, world, policy, stage, examples, lr: found.extend(examples))
    w = world(1)
    odd = (11, 12, 11, 11, 9)  # no tokenizer is at hand: nothing can be encoded again
    selfemo.retrain(desk(stage=2, step=1), w, None, Buffer(w.originals, (kept("w/train/0", 1, ids=odd),)), 1)
    assert [(x.sample_id, x.prompt_ids, x.ids) for x in found] == [("w/train/0", (5,), odd)]


def test_groups_without_spread_have_no_policy_gradient_but_still_feel_the_kl():
    """Equal rewards: advantage exactly 0. The KL moves the model all the same, which has to be known, and logged."""
    batch = [scored("a", (0.0, 0.0, 0.0), (4, 5, 6))]
    policy = Policy(tiny())
    scores = measured(policy, batch, CFG)
    logp_BT = selfemo.logprobs(policy, batch, CFG)
    assert mini_batch(policy, learner(policy, CFG), batch, scores[0], logp_BT, CFG)[0]["grad_norm"] < 1e-12
    assert mini_batch(policy, learner(policy, CFG), batch, *scores, CFG)[0]["grad_norm"] > 1e-3


def test_a_small_rate_still_moves_the_weights():
    """AdamW at 1e-6 in bf16 moves nothing. Weights are float32 wherever they are learnt."""
    policy = Policy(tiny().float())
    batch = [scored("a", (1.0, -1.0), (4, 5))]
    before = [p.detach().clone() for p in policy.parameters()]
    teacher = learner(policy, replace(CFG, lr=1e-6))
    mini_batch(policy, teacher, batch, *measured(policy, batch, CFG, noise=0), CFG)
    touched = torch.cat([(g != 0).flatten() for g in grads(policy).values()])
    teacher.optimizer.step()
    moved = torch.cat([(a != b).flatten() for a, b in zip(before, policy.parameters(), strict=True)])
    assert moved[touched].float().mean() > 0.9


def test_truncation_is_seen_and_pays_nothing(place, tmp_path):
    """A run whose every answer is cut off: it must say so, and keep nothing (D20)."""
    out = tmp_path / "run"
    more = ("--max_new_tokens", 4, "--iterations", 1, "--steps", 1, "--cold_start", "none")
    assert place.run(out, *more)[0] == 0
    (step,) = [m for m in lines(out / "metrics.jsonl") if m["phase"] == "rl"]
    assert (step["answer/truncated"], step["rule/unfinished"], step["reward/mean"], step["rule/rate"]) == (1, 1, 0, 0)
    assert step["loss/weight_truncated"] == pytest.approx(1, abs=1e-6)
    assert step["answer/tokens"] == 4
    assert lines(out / "buffer.jsonl") == []


def test_agreement_and_gold_are_logged_side_by_side(finished):
    """A consensus reward can rise while the model agrees with itself on nonsense."""
    names = {"consistency/mean", "consistency/zero_std", "consistency/core_on_gold", "reward/iou", "reward/mean"}
    steps = [m for m in lines(finished / "metrics.jsonl") if m["phase"] == "rl"]
    assert len(steps) == 6
    assert all(names <= m.keys() for m in steps)


def test_measuring_does_not_change_what_is_measured(place, finished, tmp_path):
    """Evaluations and checkpoints draw from no random stream of training, and leave nothing behind in the model."""
    out = tmp_path / "run"
    assert place.run(out, "--eval_every", 1000, "--save_every", 1000, "--eval_limit", 1, "--test_limit", 1)[0] == 0
    ours, theirs = results(out), results(finished)
    same = ["rollouts/iteration-1.jsonl", "rollouts/iteration-2.jsonl", "buffer.jsonl", "model/model.safetensors"]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_memory_settings_change_nothing_but_float_noise(place, finished, tmp_path):
    """Micro-batches and the memory for keys and values: the same answers, losses equal but for float32."""
    out, more = tmp_path / "run", ("--micro_batch", 2, "--kv_budget", 100_000)
    status, _, complained = place.run(out, *more)
    assert (status, complained) == (0, "")
    ours, theirs = (lines(folder / "rollouts/iteration-1.jsonl") for folder in (out, finished))
    assert [[a["ids"] for a in r["answers"]] for r in ours] == [[a["ids"] for a in r["answers"]] for r in theirs]
    ours, theirs = ([m for m in lines(folder / "metrics.jsonl") if m["phase"] == "rl"][:3] for folder in (out, finished))
    for name in ("loss/policy", "loss/kl", "grad_norm", "policy/entropy"):
        assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-2, abs=1e-4)


def test_a_prompt_drawn_twice_in_a_step_is_answered_twice(place):
    """A step that reaches into the next epoch may hold a prompt twice: on one random stream that is one group, twice."""
    w = opened(place)
    policy = Policy.load(place.root / "base")
    first, second = answer(w, policy, [w.originals[0]] * 2, n=4, temperature=1.0, step=0)
    assert [a.ids for a in first] != [a.ids for a in second]
    (alone,) = answer(w, policy, [w.originals[0]], n=4, temperature=1.0, step=0)
    assert [a.ids for a in alone] == [a.ids for a in first]


def test_the_same_prompt_is_answered_otherwise_in_every_step(place):
    """A stream that is seeded again and again repeats the same answers in every epoch."""
    w = opened(place)
    policy = Policy.load(place.root / "base")
    found = {tuple(a.ids for a in answer(w, policy, [w.originals[0]], n=4, temperature=1.0, step=t)[0]) for t in range(4)}
    assert len(found) == 4


def test_a_child_has_a_stream_of_its_own_and_learns_from_its_own_prompt(place):
    """Buffers that hold text but train on the parent's prompt look alive and are inert."""
    w = opened(place)
    parent = w.originals[0]
    child = replace(parent, id=f"{parent.id}+1", context=(*parent.context, parent.context[-1]))
    policy = Policy.load(place.root / "base")
    answers = answer(w, policy, [parent, child], n=3, temperature=1.0, step=0)
    first, second = selfemo.score(w, [parent, child], answers, 0.5)
    assert list(second.prompt_ids) == w.encode(child)[0] != list(first.prompt_ids)


def test_advantages_are_taken_within_a_group(place):
    """Normalising over the batch lets easy prompts crowd out hard ones: every group's advantages sum to 0."""
    w = opened(place)
    policy = Policy.load(place.root / "base")
    chosen = w.originals[:6]
    groups = selfemo.score(w, chosen, answer(w, policy, chosen, n=4, temperature=1.0, step=0), 0.5)
    assert any(any(g.advantages) for g in groups)
    assert [abs(math.fsum(g.advantages)) < 1e-9 for g in groups] == [True] * 6
    assert all(max(map(abs, g.advantages)) <= 1.5 + 0.75 + 1e-9 for g in groups)  # (n - 1)/sqrt(n) = 1.5 a term


def test_an_invalid_answer_earns_nothing_and_names_no_emotion(place):
    w = opened(place)
    policy = Policy.load(place.root / "base")
    w = replace(w, cfg=replace(w.cfg, max_new_tokens=4))
    (group,) = selfemo.score(w, w.originals[:1], answer(w, policy, w.originals[:1], n=3, temperature=1.0, step=0), 0.5)
    assert (group.rewards, group.consistencies, group.advantages, group.core) == ((0.0,) * 3, (0.0,) * 3, (0.0,) * 3, {})
    (chosen,) = selfemo.select(w, [group], 1)
    assert (chosen.index, chosen.why) == (None, "rule")


def test_synthetic_samples_share_the_label_set_of_their_root():
    assert sample("a").root == "w/train/a"
    assert sample("x", id="w/train/a+1+2").root == "w/train/a"
