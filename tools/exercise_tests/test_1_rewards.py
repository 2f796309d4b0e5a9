"""Eqs. 8-10: what an answer earns for its emotions."""

import math

import pytest
from pytest import approx

from grpo import iou, normalised, reward

exercise = pytest.mark.exercise


@exercise("grpo.normalised")
def test_weights_become_shares() -> None:
    """.6 + .2 = .8, so .6/.8 = .75 and .2/.8 = .25. One emotion alone has everything, whatever its weight."""
    assert normalised({"joy": 0.6, "fear": 0.2}) == approx({"joy": 0.75, "fear": 0.25}), (
        "Eq. 9: every weight is divided by the sum of the weights of its own answer, here .6 + .2 = .8"
    )
    assert normalised({"joy": 0.3}) == {"joy": 1.0}, "one emotion alone has the share 1, whatever its weight"


@exercise("grpo.normalised")
@pytest.mark.parametrize("bad", [{}, {"joy": 0.0}, {"joy": 1.0, "fear": -0.5}, {"joy": math.nan}, {"joy": math.inf}])
def test_weights_that_are_none_are_refused(bad: dict[str, float]) -> None:
    """No emotion, a weight of 0, a negative one, NaN and infinity have no shares."""
    try:
        found = normalised(bad)
    except ValueError:
        return
    pytest.fail(f"normalised({bad}) gave {found}: it should raise ValueError, because these weights have no shares")


@exercise("grpo.iou")
def test_overlap_of_two_emotions() -> None:
    """Shares .75, .25 against .5, .5: the smaller ones are .5 + .25 = .75, the larger ones .75 + .5 = 1.25, so .75/1.25."""
    found = iou({"anger": 0.6, "sadness": 0.2}, {"anger": 0.5, "sadness": 0.5})
    assert found == approx(0.6), (
        "Eq. 10: the smaller shares, .5 + .25 = .75, over the larger ones, .75 + .5 = 1.25, are .6. "
        "If you got .636364, you compared raw weights: Eq. 9 comes first"
    )


@exercise("grpo.iou")
def test_an_emotion_on_one_side_only_counts_among_the_larger_ones() -> None:
    """Joy 1 against joy .5, fear .25, anger .25: .5 + 0 + 0 over 1 + .25 + .25 is 1/3."""
    gold = {"joy": 0.5, "fear": 0.25, "anger": 0.25}
    why = "the sums of Eq. 10 run over all emotions that either side names, with 0 for the other side: .5 / 1.5"
    assert iou({"joy": 1.0}, gold) == approx(1 / 3), why
    assert iou(gold, {"joy": 1.0}) == approx(1 / 3), why + ", and so it is with the two sides swapped"


@exercise("grpo.iou")
def test_the_ends_are_0_and_1() -> None:
    """Nothing in common: 0/2. The same shares on another scale: 1/1."""
    assert iou({"joy": 1.0}, {"fear": 0.4}) == 0, "with no emotion in common all smaller shares are 0"
    assert iou({"joy": 0.2, "fear": 0.2}, {"joy": 0.7, "fear": 0.7}) == approx(1), "equal shares overlap wholly: 1"


@exercise("grpo.reward")
def test_a_tenth_for_the_rule() -> None:
    """The IOU of .6 from above, and .1. Nothing in common: 0 + .1. The rule failed: 0."""
    found = reward({"anger": 0.6, "sadness": 0.2}, {"anger": 0.5, "sadness": 0.5})
    assert found == approx(0.7), "Eq. 8: the IOU, here .6, and .1 more because the answer keeps the rule"
    assert reward({"joy": 1.0}, {"fear": 0.4}) == approx(0.1), "a wrong answer that keeps the rule still has its .1"
    assert reward(None, {"fear": 0.4}) == 0, "a prediction of None means that the rule failed: 0 and no bonus"
