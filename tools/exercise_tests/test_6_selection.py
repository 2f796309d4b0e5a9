"""Algorithm 1, lines 13-15, and Eq. 7: the best answer becomes a new sample."""

import pytest
from pytest import approx

from corpora.dialogue import Turn
from data import Failure, Output, Responder, Sample, best, new_sample, select

exercise = pytest.mark.exercise

LABELS = ("neutral", "joy", "fear")
SAMPLE = Sample(
    id="toy/train/d1/1", dataset="toy", context=(Turn("Ann", "I passed!"), Turn("Bo", "And I did not.")),
    responder=Responder("Ann", "a kind one", "next"), labels=LABELS, gold={"fear": 1.0},
    personas={"Ann": "a kind one", "Bo": "a worrier"},
)  # fmt: skip
FAILED = Failure("think", "no think block")


def says(reply: str, **mine: float) -> Output:
    """A valid answer with this reply and these feelings of its own."""
    return Output("why not", {"fear": 1.0}, mine, reply, {})


KIND = says("Next time!", joy=0.6, fear=0.3)


@exercise("data.best")
def test_the_first_of_the_highest_reward() -> None:
    """Rewards .4, 1.1, 1.1, and a failure: index 1. Only valid answers count."""
    answers: list[Output | Failure] = [says("a", joy=1.0), says("b", joy=1.0), says("c", joy=1.0), FAILED]
    assert best(answers, [0.4, 1.1, 1.1, 0.0]) == 1, "answers 1 and 2 have the highest reward, and the first of them is best"
    assert best([FAILED, says("b", joy=1.0)], [0.0, 0.0]) == 1, "a failed answer is never the best one"
    assert best([FAILED, FAILED], [0.0, 0.0]) is None, "where every answer failed there is no best one: None"


@exercise("data.select")
def test_a_good_answer_is_kept() -> None:
    """Rewards .2 and .6: the second reaches the limit of .6."""
    found = select(SAMPLE, [says("Oh.", fear=1.0), KIND], [0.2, 0.6], 1, keep_reward=0.6, fits=lambda sample: True)
    assert (found.index, found.why) == (1, "kept"), "a reward of .6 reaches the limit of .6: answer 1 is kept"
    assert found.child is not None and found.child.context[-1].text == "Next time!", "its new sample ends with its reply"


@exercise("data.select")
@pytest.mark.parametrize(
    ("answers", "rewards", "fits", "why"),
    [
        ([FAILED, FAILED], [0.0, 0.0], True, "rule"),  # no valid answer
        ([KIND, FAILED], [0.59, 0.0], True, "reward"),  # the best one is not good enough
        ([says("Wow!", awe=0.9), FAILED], [1.1, 0.0], True, "label"),  # new_sample says that nothing is left of its feelings
        ([KIND, FAILED], [1.1, 0.0], False, "length"),  # the new prompt is too long
    ],
)
def test_why_nothing_is_kept(answers: list[Output | Failure], rewards: list[float], fits: bool, why: str) -> None:
    """Four reasons."""
    found = select(SAMPLE, answers, rewards, 1, keep_reward=0.6, fits=lambda sample: fits)
    assert (found.index, found.why, found.child) == (None, why, None), (
        f"nothing is kept here, and the reason is {why!r}: rule (no valid answer), reward (below keep_reward), label or "
        "responder (new_sample says so), length (the new sample does not fit)"
    )


@exercise("data.new_sample")
def test_the_dialogue_goes_on() -> None:
    """Eq. 7: the reply is the last turn, its speaker's feelings are the label, and Bo, who was just recognised, answers."""
    found = new_sample(SAMPLE, KIND, 2)
    assert isinstance(found, Sample), f"this answer makes a new sample, and you said {found!r}"
    assert [(turn.speaker, turn.text) for turn in found.context] == [
        ("Ann", "I passed!"), ("Bo", "And I did not."), ("Ann", "Next time!"),
    ], "Eq. 7: the new context is the old one with the reply as its last turn, said by the responder"  # fmt: skip
    assert found.gold == approx({"joy": 0.6, "fear": 0.3}), "Eq. 7: the new label is what the responder said it felt itself"
    assert (found.responder.name, found.responder.persona) == ("Bo", "a worrier"), (
        "D10: roles swap, so Bo answers next, with the persona of Bo"
    )
    assert found.id == "toy/train/d1/1+2", "the id is that of the parent, +, and the iteration"
    assert (found.origin, found.parent, found.iteration, found.depth) == ("synthetic", "toy/train/d1/1", 2, 1), (
        "a synthetic sample of iteration 2 whose parent is toy/train/d1/1, one turn deeper than it"
    )
    assert (SAMPLE.depth, len(SAMPLE.context)) == (0, 2), "the old sample stays as it was"


@exercise("data.new_sample")
def test_feelings_outside_the_label_set_are_dropped() -> None:
    """D9: joy .5 beside awe .4 keeps more than half of .9. Joy .4 beside awe .6 keeps less than half of 1."""
    found = new_sample(SAMPLE, says("Hm.", joy=0.5, awe=0.4), 1)
    assert isinstance(found, Sample) and found.gold == {"joy": 0.5}, "awe is not in the label set: joy .5 is left (D9)"
    assert new_sample(SAMPLE, says("Hm.", joy=0.4, awe=0.6), 1) == "label", (
        "joy has .4 of 1, less than half of the weight: then there is no new sample, and the reason is 'label' (D9)"
    )


@exercise("data.new_sample")
def test_somebody_must_be_there_to_answer() -> None:
    """A listener without a name says nothing that goes on; nor does a dialogue with nobody else in it."""
    nobody = Sample("toy/train/d2/0", "toy", (Turn("Ann", "Hello?"),), Responder(None, None, "none"), LABELS, {"fear": 1.0})
    assert new_sample(nobody, KIND, 1) == "responder", "the responder has no name: the reason is 'responder' (D10)"
    crowd = Sample("toy/train/d3/0", "toy", (Turn("All", "Hello!"),), Responder("Ann", None, "prev"), LABELS, {"joy": 1.0})
    assert new_sample(crowd, KIND, 1) == "responder", "a group ('All') never responds (is_group): the reason is 'responder'"
