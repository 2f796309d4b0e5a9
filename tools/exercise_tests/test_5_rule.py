"""Eq. 6 and the rule of Eq. 8 (D8): which answers are valid, and what they say."""

import pytest

from data import Failure, Output, parse_output

exercise = pytest.mark.exercise

LABELS = ("neutral", "joy", "fear")
THINK = "<think>He won.</think>\n"
GOOD = THINK + "{'last_emotions': {'joy': 0.8, 'neutral': 0.2}, 'my_emotions': {'hope': 1}, 'my_output': 'Well done!'}"
JSON = GOOD.replace("'", '"')
LAST = "{'joy': 0.8, 'neutral': 0.2}"


@exercise("data._parse")
def test_a_valid_answer_is_read() -> None:
    """Reasoning, both emotions, the reply, and where the three values stand in the text."""
    found = parse_output(GOOD, LABELS)
    assert isinstance(found, Output), f"this answer keeps the rule, and you said {found}:\n{GOOD}"
    assert found.reasoning == "He won.", "the reasoning is what stands between <think> and </think>"
    assert found.last_emotions == {"joy": 0.8, "neutral": 0.2}, "last_emotions is read as a dictionary of floats"
    assert found.my_emotions == {"hope": 1.0}, "my_emotions may lie outside the label set (D9)"
    assert found.my_output == "Well done!", "my_output is the string without its quotes"
    said = {key: GOOD[start:end] for key, (start, end) in found.spans.items()}
    assert said == {"last_emotions": LAST, "my_emotions": "{'hope': 1}", "my_output": "'Well done!'"}, (
        "spans: for each key, where its value begins and ends in the text"
    )


@exercise("data._parse")
@pytest.mark.parametrize("text", [JSON, f"\n {GOOD} \n", GOOD.replace("'my_output'", " 'my_output' ")])
def test_valid_in_other_clothes(text: str) -> None:
    """JSON's double quotes, and white space around anything, are fine."""
    found = parse_output(text, LABELS)
    assert isinstance(found, Output), f"this answer keeps the rule too, and you said {found}:\n{text}"


BROKEN = [  # what is done to the valid answer, the reason that it fails for, and why
    (GOOD.removeprefix(THINK), "think", "there is no think block"),
    (GOOD.replace("He won.", " "), "think", "the think block is blank"),
    (f"So: {GOOD}", "think", "text stands before the think block"),
    (THINK + "```python\n" + GOOD.removeprefix(THINK) + "\n```", "dictionary", "a code fence is not a dictionary (D8)"),
    (GOOD.removesuffix("}"), "dictionary", "the dictionary is not closed"),
    (GOOD + " Bye.", "trailing", "text stands after the dictionary"),
    (GOOD.replace("'my_output': 'Well done!'", ""), "keys", "a key is missing"),
    (GOOD.replace("{'last", "{'mood': 1, 'last"), "keys", "there is a key that nobody asked for"),
    (GOOD.replace("'my_emotions'", "'last_emotions'"), "duplicate", "the same key stands there twice"),
    (GOOD.replace("Well done!", "  "), "my_output", "the reply is blank"),
]


@exercise("data._parse")
@pytest.mark.parametrize(("text", "reason", "why"), BROKEN, ids=[why for _, _, why in BROKEN])
def test_the_form_is_kept_or_not(text: str, reason: str, why: str) -> None:
    """One thing is wrong with each of these."""
    found = parse_output(text, LABELS)
    assert isinstance(found, Failure), f"this should fail, because {why}:\n{text}"
    assert found.reason == reason, f"this fails because {why}: the reason is {reason!r}:\n{text}"


@exercise("data._parse")
def test_an_answer_that_was_cut_off() -> None:
    """It ended at the limit and not with an end-of-sequence token; or it is far too long."""
    found = parse_output(GOOD, LABELS, finished=False)
    assert isinstance(found, Failure) and found.reason == "unfinished", "finished=False: the reason is 'unfinished'"
    long = parse_output(GOOD.replace("done", "done" * 20_000), LABELS)
    assert isinstance(long, Failure) and long.reason == "too_long", "more than MAX_BYTES bytes: the reason is 'too_long'"


WEIGHTS = [  # what stands for last_emotions, the reason that it fails for, and why
    ("{}", "last_emotions", "there is no emotion"),
    ("{'joy': 0.4, 'fear': 0.3, 'neutral': 0.2, 'Joy ': 0.1}", "label", "'Joy ' with a blank is not a label"),
    ("{'awe': 0.9}", "label", "awe is not in the label set"),
    ("{'joy': 0.8, 'Joy': 0.2}", "duplicate", "joy stands there twice: names are compared without case"),
    ("{'joy': 0.05}", "weight", "weights begin at .1, or padding with tiny ones would pay"),
    ("{'joy': 1.5}", "weight", "weights end at 1"),
    ("{'joy': '0.8'}", "weight", "a weight in quotes is a string"),
    ("{'joy': True}", "weight", "True is not a decimal number"),
    ("{'joy': -0.8}", "weight", "a weight is positive"),
]


@exercise("data.read_emotions")
@pytest.mark.parametrize(("emotions", "reason", "why"), WEIGHTS, ids=[why for _, _, why in WEIGHTS])
def test_emotions_that_are_none(emotions: str, reason: str, why: str) -> None:
    """One thing is wrong with each of these."""
    text = GOOD.replace(LAST, emotions)
    found = parse_output(text, LABELS)
    assert isinstance(found, Failure), f"{emotions} should fail, because {why}"
    assert found.reason == reason, f"{emotions} fails because {why}: the reason is {reason!r}"


@exercise("data.read_emotions")
def test_emotions_that_are_read() -> None:
    """Names in lower case, in their order; .1 and 1 are allowed; three are."""
    found = parse_output(GOOD.replace(LAST, "{'Fear': 1, 'JOY': 0.1, 'neutral': 1e-1}"), LABELS)
    assert isinstance(found, Output), f"three emotions with weights from .1 to 1 are fine, and you said {found}"
    assert list(found.last_emotions.items()) == [("fear", 1.0), ("joy", 0.1), ("neutral", 0.1)], (
        "names come in lower case, in the order of the answer, and weights are floats"
    )


@exercise("data.read_emotions")
def test_at_most_three() -> None:
    """Four feelings of one's own are one too many; the reason is the name of the key."""
    four = "{'hope': 0.4, 'awe': 0.3, 'zeal': 0.2, 'calm': 0.1}"
    found = parse_output(GOOD.replace("{'hope': 1}", four), LABELS)
    assert isinstance(found, Failure) and found.reason == "my_emotions", (
        "four emotions are too many, and the reason is the key where they stand: my_emotions"
    )
