"""Properties of Eqs. 9-14 that hold for any input; needs `hypothesis` (requirements-dev.txt)."""

import pytest
import torch

from grpo import CORE_SIZE, advantages, consistency, core_emotions, iou, policy_loss, token_weights

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install -r requirements-dev.txt")
from hypothesis import given, settings
from hypothesis import strategies as st

EMOTIONS = st.sampled_from(["joy", "anger", "fear", "sadness", "surprise", "disgust", "neutral"])
WEIGHTS = st.dictionaries(EMOTIONS, st.floats(1e-6, 1e6), min_size=1, max_size=5)
GROUPS = st.lists(st.none() | WEIGHTS, min_size=2, max_size=8)


@given(WEIGHTS, WEIGHTS)
def test_iou_is_symmetric_and_between_0_and_1(p, q):
    assert iou(p, q) == iou(q, p)
    assert 0 <= iou(p, q) <= 1
    assert iou(p, p) == 1


@given(WEIGHTS, WEIGHTS, st.floats(1e-3, 1e3))
def test_iou_knows_only_shares(p, q, scale):
    assert iou({emotion: weight * scale for emotion, weight in p.items()}, q) == pytest.approx(iou(p, q), abs=1e-9)


@given(GROUPS)
def test_consistency_counts_thirds(group):
    assert set(consistency(group)) <= {0.0, 1 / 3, 2 / 3, 1.0}
    assert all(value == 0 for value, answer in zip(consistency(group), group, strict=True) if answer is None)


@given(GROUPS, st.randoms(use_true_random=False))
def test_core_is_a_distribution_that_ignores_the_order_of_answers(group, random):
    core = core_emotions(group)
    assert len(core) <= CORE_SIZE
    assert not core or sum(core.values()) == pytest.approx(1, abs=1e-12)
    assert list(core.values()) == sorted(core.values(), reverse=True)
    mixed = list(group)
    random.shuffle(mixed)
    assert list(core_emotions(mixed).items()) == list(core.items())


@given(st.lists(st.floats(0, 1.1), min_size=2, max_size=8), st.floats(0, 1))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(rewards, lam):
    adv = advantages([rewards], [[1 / 3] * len(rewards)], lam)[0]
    assert adv.sum().item() == pytest.approx(0, abs=1e-9)
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert all(adv[a] <= adv[b] for a, b in zip(order, order[1:], strict=False))


@settings(deadline=None)  # the first backward of a process takes a second
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=8),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["token", "sequence"]),
    st.integers(0, 10_000),
    st.data(),
)
def test_loss_and_gradient_do_not_depend_on_the_cut_into_micro_batches(lengths, ratio, mean, seed, data):
    """Loss, gradient, ratio/mean and clip_frac of the parts add up to those of the whole; ratio/max is the maximum."""
    cut = data.draw(st.integers(1, len(lengths) - 1))
    generator = torch.Generator().manual_seed(seed)
    logp_BT, old_BT = -torch.rand(2, len(lengths), 6, generator=generator, dtype=torch.float64)
    adv_B = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    weight_BT = token_weights(lengths, mean, 6)
    assert weight_BT.sum().item() == pytest.approx(1, abs=1e-12)

    def run(rows):
        logp = logp_BT[rows].clone().requires_grad_()
        loss, metrics = policy_loss(logp, old_BT[rows], adv_B[rows], weight_BT[rows], clip_eps=0.2, ratio=ratio)
        loss.backward()
        return loss.detach(), logp.grad, metrics

    whole, parts = run(slice(None)), [run(slice(None, cut)), run(slice(cut, None))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole[1], torch.cat([parts[0][1], parts[1][1]]), rtol=0, atol=1e-12)
    for name in ("ratio/mean", "clip_frac"):
        torch.testing.assert_close(whole[2][name], parts[0][2][name] + parts[1][2][name], rtol=0, atol=1e-12)
    assert whole[2]["ratio/max"] == max(part[2]["ratio/max"] for part in parts)
