"""Equations 8-14 worked by hand. The arithmetic is in the docstrings, the bodies hold literals only."""

import math

import pytest
import torch
from torch import Tensor

from grpo import (
    advantages,
    clamped_share,
    consistency,
    core_emotions,
    iou,
    lam,
    low_var_kl,
    normalised,
    policy_loss,
    reward,
    token_weights,
)

ANSWER_A = {"neutral": 0.8, "surprise": 0.6}
GOLD_A = {"neutral": 0.85, "surprise": 0.45, "fear": 0.25}
F64 = torch.float64


def t64(values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


# Eqs. (8)-(10)


def test_eq_10_on_answer_a_of_table_8():
    """Prediction .8, .6 -> .571429, .428571; gold .85, .45, .25 (sum 1.55) -> .548387, .290323, .161290.
    Minima .548387 + .290323 + 0 = .838710, maxima .571429 + .428571 + .161290 = 1.161290: .722222 = 13/18."""
    assert iou(ANSWER_A, GOLD_A) == pytest.approx(13 / 18, abs=1e-12)


def test_eq_10_on_answer_b_of_table_8():
    """The weights of answer B sum to .95 + .75 + .6 = 2.3, those of gold to 1.55.

    | emotion  | answer          | gold             | smaller | larger   |
    | surprise | .95/2.3 .413043 | .45/1.55 .290323 | .290323 | .413043  |
    | fear     | .75/2.3 .326087 | .25/1.55 .161290 | .161290 | .326087  |
    | disgust  | .60/2.3 .260870 | 0                | 0       | .260870  |
    | neutral  | 0               | .85/1.55 .548387 | 0       | .548387  |
    | sum      | 1               | 1                | .451613 | 1.548387 |

    IOU = .451613 / 1.548387 = .291667.
    """
    assert iou({"surprise": 0.95, "fear": 0.75, "disgust": 0.6}, GOLD_A) == pytest.approx(0.291667, abs=1e-6)


def test_eqs_8_to_10_on_table_10():
    """Gold disgust .85, sadness .4 (sum 1.25) -> .68, .32. Answer A: anger .6, sadness .4 share sadness alone with it:
    minimum .32, maxima .6 + .4 + .68 = 1.68; .32/1.68 = .190476, reward .290476. Answer B names neither: 0, .1."""
    gold = {"disgust": 0.85, "sadness": 0.4}
    assert iou({"anger": 0.6, "sadness": 0.4}, gold) == pytest.approx(0.190476, abs=1e-6)
    assert reward({"anger": 0.6, "sadness": 0.4}, gold) == pytest.approx(0.290476, abs=1e-6)
    assert (iou({"neutral": 0.8, "surprise": 0.3}, gold), reward({"neutral": 0.8, "surprise": 0.3}, gold)) == (0.0, 0.1)


def test_eq_10_has_its_ends_at_0_and_1():
    """Disjoint sets: 0/2. Equal shares, whatever the scale: 1/1. One of two halves right: .5/1.5."""
    assert iou({"joy": 1.0}, {"anger": 1.0}) == 0.0
    assert iou({"joy": 0.2, "fear": 0.2}, {"joy": 1.0, "fear": 1.0}) == 1.0
    assert iou({"joy": 1.0, "fear": 1.0}, {"joy": 1.0}) == pytest.approx(1 / 3, abs=1e-15)


def test_eq_9_on_the_gold_of_table_8():
    """.85 + .45 + .25 = 1.55: .85/1.55 = .548387, .45/1.55 = .290323, .25/1.55 = .161290. One weight alone is all: 1."""
    assert normalised(GOLD_A) == pytest.approx({"neutral": 0.548387, "surprise": 0.290323, "fear": 0.161290}, abs=1e-6)
    assert normalised({"joy": 0.1}) == {"joy": 1.0}


@pytest.mark.parametrize("bad", [{}, {"joy": 0.0}, {"joy": -0.1, "fear": 1.0}, {"joy": math.nan}, {"joy": math.inf}])
def test_weights_that_are_no_weights_raise(bad):
    for call in (lambda: iou(bad, {"joy": 1.0}), lambda: iou({"joy": 1.0}, bad), lambda: core_emotions([bad])):
        with pytest.raises(ValueError, match="positive"):
            call()


def test_eq_8_pays_a_tenth_for_the_rule_and_nothing_without_it():
    """.722222 + .1; a disjoint answer that follows the rule has 0 + .1; a failed one 0."""
    assert reward(ANSWER_A, GOLD_A) == pytest.approx(0.822222, abs=1e-6)
    assert reward({"joy": 1.0}, {"anger": 1.0}) == 0.1
    assert reward(None, GOLD_A) == 0.0


# Eqs. (11), (12)


def test_eq_11_and_12_on_a_group_of_four():
    """Sums: joy 1 + .5, sadness 1, surprise .5; of 3 in all: .5, 1/3, 1/6. Named core emotions: 1, 2, 1, 0 of 3."""
    group = [{"joy": 1.0}, {"joy": 0.5, "surprise": 0.5}, {"sadness": 1.0}, None]
    core = core_emotions(group)
    assert list(core) == ["joy", "sadness", "surprise"]
    assert list(core.values()) == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=1e-15)
    assert consistency(group) == [1 / 3, 2 / 3, 1 / 3, 0.0]


def test_eq_11_normalises_every_answer_before_it_votes():
    """{joy .9, surprise .8, neutral .7} -> .375, .333333, .291667; {sadness .2} -> 1. Raw sums would drop sadness.
    Core mass 1 + .375 + .333333 = 1.708333: .585366, .219512, .195122."""
    group = [{"joy": 0.9, "surprise": 0.8, "neutral": 0.7}, {"sadness": 0.2}]
    core = core_emotions(group)
    assert list(core) == ["sadness", "joy", "surprise"]
    assert list(core.values()) == pytest.approx([0.585366, 0.219512, 0.195122], abs=1e-6)
    assert consistency(group) == [2 / 3, 1 / 3]


def test_eq_11_breaks_ties_by_naming_answers_then_by_alphabet():
    """Mass 1 each: fear from two answers, anger and joy from one each: fear, anger, joy; sadness (.8) is fourth."""
    group = [{"joy": 1.0}, {"fear": 0.5, "sadness": 0.5}, {"fear": 5.0, "sadness": 3.0, "neutral": 2.0}, {"anger": 1.0}]
    assert list(core_emotions(group)) == ["fear", "anger", "joy"]
    assert list(core_emotions(group, k=1)) == ["fear"]


def test_eq_11_of_tenths_that_do_not_add_up_exactly_still_ties():
    """Ten times .1 beside three others is 1 only with an exact sum; b has 1 from one answer: a, named by ten, leads."""
    group = [{"a": 0.1, "c": 0.9}] * 10 + [{"b": 1.0}]
    assert list(core_emotions(group)) == ["c", "a", "b"]


def test_eq_12_divides_by_three_also_where_the_core_is_smaller():
    """A group that names one emotion only: 1/3 each, not 1."""
    assert consistency([{"joy": 1.0}, {"joy": 0.4}]) == [1 / 3, 1 / 3]


def test_a_group_that_failed_has_no_core_and_earns_nothing():
    assert core_emotions([None, None]) == {}
    assert consistency([None, None]) == [0.0, 0.0]


# Eq. (13)


def test_eq_13_on_a_group_of_four():
    """Mean of r: 1.8/4 = .45. Mean of r2: (1/3 + 2/3 + 1/3 + 0)/4 = 1/3. 1e-6 is added to both deviations (D5).

    | answer | r   | r - .45 | square | z = / .506624 | r2  | r2 - 1/3 | square | z2 = / .272167 | z + .5 * z2 |
    | first  | 1.1 | .65     | .4225  | 1.283003      | 1/3 | 0        | 0      | 0              | 1.283003    |
    | second | .6  | .15     | .0225  | .296078       | 2/3 | 1/3      | 1/9    | 1.224740       | .908448     |
    | third  | .1  | -.35    | .1225  | -.690848      | 1/3 | 0        | 0      | 0              | -.690848    |
    | fourth | 0   | -.45    | .2025  | -.888233      | 0   | -1/3     | 1/9    | -1.224740      | -1.500603   |
    | sum    | 1.8 | 0       | .77    |               | 4/3 | 0        | 2/9    |                | 0           |

    Deviations: sqrt(.77/3) = .506623 and sqrt((2/9)/3) = .272166.
    """
    adv = advantages(t64([[1.1, 0.6, 0.1, 0.0]]), t64([[1 / 3, 2 / 3, 1 / 3, 0.0]]), 0.5)
    assert adv.dtype == F64
    assert adv.tolist()[0] == pytest.approx([1.283003, 0.908448, -0.690848, -1.500603], abs=1e-6)


def test_eq_13_normalises_within_each_group():
    """Two groups, rewards (1, 0) and (.2, .1): mean in the middle, std = gap/sqrt(2): +-.707107 (- 1e-6 terms) both."""
    adv = advantages([[1.0, 0.0], [0.2, 0.1]], [[0.0, 0.0], [0.0, 0.0]], 1.0)
    assert adv.tolist()[0] == pytest.approx([0.707106, -0.707106], abs=2e-6)
    assert adv.tolist()[1] == pytest.approx([0.707097, -0.707097], abs=2e-6)


@pytest.mark.parametrize("value", [0.35, 0.1, 1.1, 1e-300, 0.8222222222222222])
@pytest.mark.parametrize("n", [2, 3, 7, 10, 49])
def test_equal_rewards_give_exactly_zero(value, n):
    """The rounded mean of n equal values may differ from them by one bit; divided by 1e-6 that would be learnt from."""
    assert advantages([[value] * n], [[1 / 3] * n], 0.7).tolist() == [[0.0] * n]


def test_eq_13_adds_the_two_terms_apart():
    """Equal rewards leave the second term alone: consistencies (2/3, 1/3), std .235702: .5/.707107 each side x .25."""
    adv = advantages([[0.6, 0.6]], [[2 / 3, 1 / 3]], 0.25)
    assert adv.tolist()[0] == pytest.approx([0.176776, -0.176776], abs=2e-6)


def test_a_group_of_one_has_no_advantage():
    with pytest.raises(ValueError, match="at least 2"):
        advantages([[1.0]], [[0.0]], 0.0)


def test_rewards_and_consistencies_must_pair_up():
    with pytest.raises(ValueError):
        advantages([[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0]], 0.0)
    with pytest.raises(ValueError):
        advantages([[1.0, 0.0]], [[0.0, 0.0, 0.0]], 0.0)


def test_eq_13_lambda_runs_from_0_to_just_below_1():
    """t = 0..T-1 of T (D7): 0, .25, .5, .75."""
    assert [lam(t, 4) for t in range(4)] == [0.0, 0.25, 0.5, 0.75]
    for t in (-1, 4):
        with pytest.raises(ValueError, match="not one of 0..3"):
            lam(t, 4)


PADDING = [{"joy": 1.0}] * 4 + [{"joy": 0.98, "surprise": 0.01, "neutral": 0.01}] * 2 + [{"sadness": 1.0}] * 2


@pytest.mark.parametrize(("lam_", "padder_wins"), [(0.0, False), (0.0396, False), (0.0398, True), (1.0, True)])
def test_property_padding_pays(lam_, padder_wins):
    """Gold joy. Core joy, sadness, neutral (.02 ties with surprise, n before s): exact answers name 1, padders 2.
    Rewards 1.1, .98/1.02 + .1 = 1.060784, .1, std .457179; consistencies 1/3, 2/3, 1/3, std .154303.
    The padder loses .039216/.457179 = .085777 and gains lambda/3/.154303 = 2.160247 lambda: even at .039707."""
    rewards = [reward(p, {"joy": 1.0}) for p in PADDING]
    assert rewards[4] == pytest.approx(1.060784, abs=1e-6)
    assert consistency(PADDING) == [1 / 3] * 4 + [2 / 3] * 2 + [1 / 3] * 2
    adv = advantages([rewards], [consistency(PADDING)], lam_)[0]
    assert (adv[4] > adv[0]).item() is padder_wins


@pytest.mark.parametrize(("lam_", "exact", "padded"), [(1.0, 0.0, 0.0), (0.5, 1.237437, -0.176777)])
def test_a_custom_of_padding_has_no_way_back_at_lambda_1(lam_, exact, padded):
    """Gold neutral. Seven say {neutral .8, joy .3}: IOU .727273/1.272727 = .571429, r .671429, r2 2/3; one says {neutral 1}:
    1.1, 1/3. One of eight that differs by g: mean off by g/8, deviation g/sqrt(8), so z = (7/8) sqrt(8) = 2.474874, the
    others -.353553. In r2 the same with the other sign. Lambda 1: 0. Lambda .5: half of each is left."""
    group = [{"neutral": 0.8, "joy": 0.3}] * 7 + [{"neutral": 1.0}]
    rewards = [reward(p, {"neutral": 1.0}) for p in group]
    assert [rewards[0], rewards[7]] == pytest.approx([0.671429, 1.1], abs=1e-6)
    assert consistency(group) == [2 / 3] * 7 + [1 / 3]
    adv = advantages([rewards], [consistency(group)], lam_)[0].tolist()
    assert adv == pytest.approx([padded] * 7 + [exact], abs=2e-5)


def test_property_wrong_consensus():
    """Gold is anger, and six of eight answers say joy .6, surprise .2, neutral .2. Sums of shares: joy 6 * .6 = 3.6; anger
    .8 + 1 = 1.8; neutral and surprise 6 * .2 = 1.2, where n comes before s; disgust .2. So the core is joy, anger, neutral.

    | answer                  | IOU           | r       | z         | named        | r2  | z2        | z + z2   |
    | six wrong ones          | 0/2           | .1      | -.526210  | joy, neutral | 2/3 | .540058   | .013848  |
    | {anger .8, disgust .2}  | .8/1.2 = 2/3  | .766667 | 1.157663  | anger        | 1/3 | -1.620175 | -.462512 |
    | {anger 1}               | 1/1           | 1.1     | 1.999599  | anger        | 1/3 | -1.620175 | .379425  |

    Mean of r 2.466667/8 = .308333, deviation .395911; mean of r2 4.666667/8 = .583333, deviation .154303; 1e-6 is added to
    both. At lambda 1 the six wrong answers are praised a little, and the nearly right one, {anger .8, disgust .2}, is
    blamed; {anger 1} is praised.
    """
    group = [{"joy": 0.6, "surprise": 0.2, "neutral": 0.2}] * 6 + [{"anger": 0.8, "disgust": 0.2}, {"anger": 1.0}]
    assert list(core_emotions(group)) == ["joy", "anger", "neutral"]
    adv = advantages([[reward(p, {"anger": 1.0}) for p in group]], [consistency(group)], 1.0)[0].tolist()
    assert adv[:6] == [adv[0]] * 6
    assert [adv[0], adv[6], adv[7]] == pytest.approx([0.014, -0.463, 0.379], abs=5e-4)


# Token weights (D3)


def test_token_weights_token_mean_and_sequence_mean():
    """Lengths 2 and 1. Token: 1/3 each. Sequence: 1/2 per answer, so 1/4 1/4 | 1/2."""
    assert token_weights([2, 1], "token", 3).tolist() == [[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]]
    assert token_weights([2, 1], "sequence", 3).tolist() == [[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]]


@pytest.mark.parametrize("lengths", [[], [2, 0], [4]])
def test_token_weights_refuses_empty_and_overlong_answers(lengths):
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        token_weights(lengths, "token", 3)


# Eq. (14)

# Answer 0 has advantage +1 and token ratios (1.5, 1); answer 1 has -1 and (.5). The last place is off the answer.
LOG_RATIO = [[math.log(1.5), 0.0], [math.log(0.5), math.nan]]
ADV = [1.0, -1.0]

EQ_14 = [
    # token ratio: gains min(1.5, 1.2) = 1.2 and 1, blame min(-.5, -.8) = -.8
    ("token", "token", -0.466667, [[0.0, -1 / 3], [0.0, 0.0]]),  # (1.2 + 1 - .8) / 3
    ("token", "sequence", -0.15, [[0.0, -0.25], [0.0, 0.0]]),  # 1.2/4 + 1/4 - .8/2
    # sequence ratio: 1.5 * 1 on both tokens of answer 0, clipped to 1.2; .5 on answer 1, -.8
    ("sequence", "token", -0.533333, [[0.0, 0.0], [0.0, 0.0]]),  # (1.2 + 1.2 - .8) / 3
    ("sequence", "sequence", -0.2, [[0.0, 0.0], [0.0, 0.0]]),  # 1.2/2 - .8/2
]


@pytest.mark.parametrize(("ratio", "mean", "expected", "gradient"), EQ_14)
def test_eq_14_value_and_gradient(ratio, mean, expected, gradient):
    """Only the token of ratio 1 is inside the clip range; its gradient is -weight * A * ratio. nan off the answer."""
    logp = t64(LOG_RATIO).requires_grad_()
    weight = token_weights([2, 1], mean, 2)
    loss, _ = policy_loss(logp, torch.zeros(2, 2, dtype=F64), t64(ADV), weight, clip_eps=0.2, ratio=ratio)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert logp.grad is not None
    assert logp.grad.tolist() == [pytest.approx(row, abs=1e-12) for row in gradient]


UNCLIPPED = [
    # Advantages +2, -3, all ratios inside eps .2: gradient of token j = -weight_j A ratio_j (token ratio)
    ("token", "token", [[-0.733333, -0.666667], [0.95, 0.0]]),  # -(1.1, 1)*2/3 and .95*3/3
    ("token", "sequence", [[-0.55, -0.5], [1.425, 0.0]]),  # -(1.1, 1)*2/4 and .95*3/2
    # sequence ratio 1.1 * 1: every token of answer 0 carries the gradient of both weights
    ("sequence", "token", [[-1.466667, -1.466667], [0.95, 0.0]]),  # -1.1*2*2/3
    ("sequence", "sequence", [[-1.1, -1.1], [1.425, 0.0]]),  # -1.1*2/2
]


@pytest.mark.parametrize(("ratio", "mean", "gradient"), UNCLIPPED)
def test_eq_14_gradient_inside_the_clip_range(ratio, mean, gradient):
    logp = t64([[math.log(1.1), 0.0], [math.log(0.95), 7.0]]).requires_grad_()
    weight = token_weights([2, 1], mean, 2)
    loss, metrics = policy_loss(logp, torch.zeros(2, 2, dtype=F64), t64([2.0, -3.0]), weight, clip_eps=0.2, ratio=ratio)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [pytest.approx(row, abs=1e-6) for row in gradient]
    assert metrics["clip_frac"].item() == 0.0


@pytest.mark.parametrize(
    ("ratio", "adv", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # gain above 1 + eps: clipped
        (1.5, -1.0, 1.5, 1.5),  # blame above 1 + eps: never clipped
        (0.5, 1.0, -0.5, -0.5),  # gain below 1 - eps: may come back
        (0.5, -1.0, 0.8, 0.0),  # blame already paid: clipped
        (50.0, -1.0, 50.0, 50.0),  # blame however large: no second clip (D4)
    ],
)
def test_eq_14_clipping_stops_gain_but_not_blame(ratio, adv, loss, gradient):
    logp = t64([[math.log(ratio)]]).requires_grad_()
    value, metrics = policy_loss(logp, t64([[0.0]]), t64([adv]), t64([[1.0]]), clip_eps=0.2)
    value.backward()
    assert logp.grad is not None
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert metrics["clip_frac"].item() == (1.0 if gradient == 0.0 else 0.0)


def test_eq_14_on_policy_the_loss_is_minus_the_mean_advantage_and_the_gradient_is_not_zero():
    """Advantages +1 and -1 with ratio 1 sum to loss 0, yet every token is pushed by -A/2."""
    logp = t64([[-1.0], [-2.0]]).requires_grad_()
    loss, metrics = policy_loss(logp, logp, t64([1.0, -1.0]), t64([[0.5], [0.5]]), clip_eps=0.2)
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad is not None and logp.grad.tolist() == [[-0.5], [0.5]]
    assert {name: value.item() for name, value in metrics.items()} == {"ratio/mean": 1, "ratio/max": 1, "clip_frac": 0}


def test_policy_loss_metrics():
    """Token ratios 1.5, 1, .5 with weight 1/3: mean 1, max 1.5; the 1.5 and the .5 are clipped: 2/3.
    Sequence ratios 1.5, .5: mean (1.5 + 1.5 + .5)/3 = 1.166667, all clipped."""
    weight = token_weights([2, 1], "token", 2)
    for ratio, mean, clipped in (("token", 1.0, 2 / 3), ("sequence", 1.166667, 1.0)):
        logp = t64(LOG_RATIO).requires_grad_()
        _, metrics = policy_loss(logp, torch.zeros(2, 2, dtype=F64), t64(ADV), weight, clip_eps=0.2, ratio=ratio)
        assert not any(value.requires_grad for value in metrics.values())
        assert metrics["ratio/mean"].item() == pytest.approx(mean, abs=1e-6)
        assert metrics["ratio/max"].item() == pytest.approx(1.5, abs=1e-12)
        assert metrics["clip_frac"].item() == pytest.approx(clipped, abs=1e-12)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_off_the_answer_reaches_neither_loss_nor_gradient(ratio, garbage):
    """Places of weight 0 hold padding. 0 * nan is nan, in the gradient too: mask them before any arithmetic."""
    clean, dirty = t64([[-1.0, 0.0], [-2.0, -1.0]]), t64([[-1.0, garbage], [-2.0, -1.0]])
    weight, adv = token_weights([1, 2], "token", 2), t64([1.0, -1.0])
    out = []
    for values in (clean, dirty):
        logp = values.clone().requires_grad_()
        loss, metrics = policy_loss(logp, values - 0.1 * (weight > 0), adv, weight, clip_eps=0.2, ratio=ratio)
        loss.backward()
        assert logp.grad is not None
        out.append((loss.item(), logp.grad.tolist(), [value.item() for value in metrics.values()]))
    assert out[0] == out[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
@pytest.mark.parametrize("adv", [-1.0, 1.0])
def test_an_extreme_ratio_gives_no_nan(dtype, gap, adv):
    """exp(1000) is inf, and the gradient of a clipped gain would be 0 * inf = nan."""
    logp = torch.tensor([[gap, -1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[0.0, -1.0]], dtype=dtype)
    loss, _ = policy_loss(logp, old, t64([adv]), token_weights([2], "token", 2), clip_eps=0.2)
    loss.backward()
    assert logp.grad is not None and loss.dtype == dtype
    assert loss.isfinite() and logp.grad.isfinite().all()
    assert logp.grad[0].tolist() == [0.0, -adv / 2]


def test_a_nan_on_the_answer_is_not_hidden():
    loss, _ = policy_loss(t64([[math.nan]]), t64([[0.0]]), t64([1.0]), t64([[1.0]]), clip_eps=0.2)
    assert loss.isnan()


def test_old_log_probs_take_no_gradient():
    old = t64([[0.0]]).requires_grad_()
    logp = t64([[0.05]]).requires_grad_()
    policy_loss(logp, old, t64([1.0]), t64([[1.0]]), clip_eps=0.2)[0].backward()
    assert old.grad is None and logp.grad is not None


def test_policy_loss_changes_no_argument_and_knows_two_ratios():
    args = [t64(LOG_RATIO), torch.zeros(2, 2, dtype=F64), t64(ADV), token_weights([2, 1], "token", 2)]
    before = [arg.clone() for arg in args]
    policy_loss(*args, clip_eps=0.2)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(args, before, strict=True))
    with pytest.raises(ValueError, match="token or sequence"):
        policy_loss(*args, clip_eps=0.2, ratio="word")


# k3


@pytest.mark.parametrize(
    ("d", "value", "gradient"),
    [
        (0.0, 0.0, 0.0),
        (0.1, 0.0051709, -0.1051709),  # e^.1 - 1.1; 1 - e^.1
        (0.5, 0.148721, -0.648721),  # 1.648721 - 1.5; 1 - 1.648721
        (-0.5, 0.106531, 0.393469),  # .606531 - .5; 1 - .606531
        (3.0, 10.0, 0.0),  # 20.09 - 4 = 16.09, cut
        (-11.5, 10.0, 0.0),  # 0 + 11.5 - 1 = 10.5, cut
    ],
)
def test_k3_value_and_gradient(d, value, gradient):
    """d = ref - logp; k3 = e^d - d - 1; its gradient in logp is 1 - e^d."""
    logp = t64([-1.0]).requires_grad_()
    k3 = low_var_kl(logp, t64([d - 1.0]))
    k3.sum().backward()
    assert logp.grad is not None
    assert k3.item() == pytest.approx(value, abs=1e-6)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [20.5, 100.0, 1e4, 1e30, math.inf])
def test_k3_is_cut_without_gradient_and_without_nan(dtype, gap):
    """Cutting only the output would leave 0 * exp(100) = 0 * inf = nan in the gradient (float32)."""
    for sign in (1, -1):
        logp = torch.tensor([-1.0], dtype=dtype, requires_grad=True)
        k3 = low_var_kl(logp, torch.tensor([sign * gap], dtype=dtype))
        k3.sum().backward()
        assert logp.grad is not None and k3.item() == 10.0 and logp.grad.item() == 0.0


def test_k3_reference_takes_no_gradient():
    ref = t64([0.0]).requires_grad_()
    logp = t64([-0.5]).requires_grad_()
    low_var_kl(logp, ref).sum().backward()
    assert ref.grad is None and logp.grad is not None


def test_clamped_share_is_the_weight_that_k3_cuts():
    """d = 3 and -30 are cut, 0 and 2 are not: weights .1 + .3."""
    logp, ref = t64([[0.0, 0.0, 0.0, 0.0]]), t64([[3.0, 0.0, 2.0, -30.0]])
    assert clamped_share(logp, ref, t64([[0.1, 0.2, 0.4, 0.3]])).item() == pytest.approx(0.4, abs=1e-12)
