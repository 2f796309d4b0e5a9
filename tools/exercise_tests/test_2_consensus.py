"""Eqs. 11 and 12: what a group agrees on, and what an answer earns for naming it."""

import pytest
from pytest import approx

from grpo import consistency, core_emotions

exercise = pytest.mark.exercise

# Shares: fear .9, anger .1 | fear .5, sadness .5 | anger .5, joy .5 | the rule failed
GROUP = [{"fear": 0.9, "anger": 0.1}, {"fear": 0.5, "sadness": 0.5}, {"anger": 0.4, "joy": 0.4}, None]


@exercise("grpo.core_emotions")
def test_the_three_heaviest() -> None:
    """Sums: fear .9 + .5 = 1.4; anger .1 + .5 = .6; joy .5 and sadness .5 tie, j comes first. Over 2.5: the core."""
    core = core_emotions(GROUP)
    why = "sums of the shares: fear 1.4, anger .6, joy .5, sadness .5. Joy and sadness tie, and the alphabet prefers joy"
    assert list(core) == ["fear", "anger", "joy"], why + ". The core is in this order, heaviest first"
    assert list(core.values()) == approx([0.56, 0.24, 0.2]), (
        "Eq. 11: the three sums are divided by what the three have together, 1.4 + .6 + .5 = 2.5"
    )


@exercise("grpo.core_emotions")
def test_every_answer_has_one_vote() -> None:
    """{joy .2} votes with share 1; 1, .9, .8 of 2.7 are .370370, .333333, .296296: sadness stays outside."""
    core = core_emotions([{"joy": 0.2}, {"anger": 1.0, "fear": 0.9, "sadness": 0.8}])
    assert list(core) == ["joy", "anger", "fear"], (
        "the weights of each answer are normalised first (Eq. 9): {joy .2} has the share 1. "
        "If joy is missing, you summed raw weights"
    )


@exercise("grpo.core_emotions")
def test_in_a_tie_more_voices_win() -> None:
    """Joy has 1 from one answer, zeal .5 + .5 from two: zeal comes first in spite of the alphabet."""
    core = core_emotions([{"joy": 1.0}, {"zeal": 0.5, "fear": 0.5}, {"zeal": 0.5, "anger": 0.5}])
    assert list(core) == ["zeal", "joy", "anger"], (
        "zeal and joy both have the sum 1; zeal is named by two answers and joy by one, so zeal leads. "
        "Only where that is equal too (anger, fear) does the alphabet decide"
    )
    assert core_emotions([None, None]) == {}, "where every answer failed there is no core: {}"


@exercise("grpo.consistency")
def test_core_emotions_named_over_three() -> None:
    """The core is fear, anger, joy. The answers name fear and anger; fear; anger and joy; nothing."""
    assert consistency(GROUP) == approx([2 / 3, 1 / 3, 2 / 3, 0]), (
        "Eq. 12: how many of fear, anger, joy an answer names, with whatever weight, over 3; a failed answer names none"
    )


@exercise("grpo.consistency")
def test_always_over_three() -> None:
    """A group that names joy alone has a core of one emotion; each answer still earns 1/3 and not 1."""
    assert consistency([{"joy": 1.0}, {"joy": 0.4}]) == approx([1 / 3, 1 / 3]), (
        "Eq. 12 divides by 3 also where the core is smaller: 1/3 each"
    )
