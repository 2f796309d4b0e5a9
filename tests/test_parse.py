"""The answer parser (D8): one case per line, then properties on arbitrary text."""

import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from common.text import clean
from data import Failure, Output, format_output, parse_output
from training.coldstart import double_quoted

LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
REASONS = "unfinished too_long think dictionary trailing keys last_emotions label weight my_emotions my_output duplicate"
NO_WEIGHTS = (
    "0 0.0 0.09 1.01 2 -0.5 +0.5 nan inf NaN Infinity 1e999 1e-999 0x1 1_0 0.5_0 0b1 01 1j True true None null '0.5' \"1\" "
    "[0.5] (0.5) {'a':1} 1/2 0.5f ٠.٥ . e-1 0.1.1 1e 0,5 half 0.50000000000000000000000000000000000000000000"
)
THINK = "<think>Because.</think>"
REST = "'my_emotions': {'joy': 0.6}, 'my_output': 'Yeah.'}"


def answer(last="{'joy': 0.8}", mine="{'joy': 0.6}", reply="'Yeah.'", think=THINK):
    return f"{think}{{'last_emotions': {last}, 'my_emotions': {mine}, 'my_output': {reply}}}"


def reason(text, **options):
    parse = parse_output(text, LABELS, **options)
    return parse.reason if isinstance(parse, Failure) else None


def test_answer_a_of_table_8():
    text = (
        "<think>Joey is startled.\nStill, it passed.</think>"
        "{'last_emotions': {'neutral': 0.8, 'surprise': 0.6}, 'my_emotions': {'joy': 0.6, 'curiosity': 0.5}, "
        "'my_output': \"Yeah, that sounds intense\"}"
    )
    parse = parse_output(text, LABELS)
    assert isinstance(parse, Output)
    assert parse.reasoning == "Joey is startled.\nStill, it passed."
    assert parse.last_emotions == {"neutral": 0.8, "surprise": 0.6}
    assert parse.my_emotions == {"joy": 0.6, "curiosity": 0.5}
    assert parse.my_output == "Yeah, that sounds intense"
    assert {key: text[a:b] for key, (a, b) in parse.spans.items()} == {
        "last_emotions": "{'neutral': 0.8, 'surprise': 0.6}",
        "my_emotions": "{'joy': 0.6, 'curiosity': 0.5}",
        "my_output": '"Yeah, that sounds intense"',
    }


def test_spans_leave_blanks_out():
    text = THINK + "\n{ 'my_output' :\n 'é\\n' , 'last_emotions': { 'joy' : 1 } , 'my_emotions' : {'fear':.5}\n}\n"
    parse = parse_output(text, LABELS)
    values = ["'é\\n'", "{ 'joy' : 1 }", "{'fear':.5}"]
    assert [text[slice(*parse.spans[key])] for key in ("my_output", "last_emotions", "my_emotions")] == values


@pytest.mark.parametrize(
    "text",
    [
        answer(),
        "  \n" + answer(think="<think>\nWell.\n</think>\n\n") + "\n ",
        answer(think="<think>One <think> more</think>"),
        answer(reply="'</think>'"),
        answer(last="{'JOY': 1, 'Fear': 0.1}"),
        answer(last='{"joy": 0.8}', reply='"Yeah."'),
        answer(last="{'joy': 0.8,}"),
        answer(last="{'joy': 1, 'fear': 1.0, 'anger': 0.1}"),
        answer(mine="{'curiosity': 0.5, 'deep regret': .5}"),
        f"{THINK}{{{REST[:-1]}, 'last_emotions': {{'joy': 1}}}}",
        f"{THINK}{{{REST[:-1]}, 'last_emotions': {{'joy': 1}},\n}}",
    ],
)
def test_valid(text):
    assert reason(text) is None


@pytest.mark.parametrize(
    "literal, weight", [("1", 1.0), ("1.0", 1.0), ("1.", 1.0), (".5", 0.5), ("0.85", 0.85), ("1e-1", 0.1), ("0.1", 0.1)]
)
def test_weight(literal, weight):
    assert parse_output(answer(last=f"{{'joy': {literal}}}"), LABELS).last_emotions == {"joy": weight}


@pytest.mark.parametrize("literal", NO_WEIGHTS.split())
@pytest.mark.parametrize("part", ["last", "mine"])
def test_no_weight(literal, part):
    assert reason(answer(**{part: f"{{'joy': {literal}}}"})) == "weight"


@pytest.mark.parametrize(
    "literal, reply",
    [
        ("'It\\'s'", "It's"),
        ('"It\'s"', "It's"),
        ("'\"'", '"'),
        (r'"a\/b"', "a/b"),
        (r"'\\'", "\\"),
        (r"'\x41\u0042\U00000043'", "ABC"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r"'a\tb\nc'", "a\tb\nc"),
        ("'a\tb'", "a\tb"),
        ("'{}:,'", "{}:,"),
        ("'😀 \u2028 ’'", "😀 \u2028 ’"),
        ("'True'", "True"),
    ],
)
def test_reply(literal, reply):
    assert parse_output(answer(reply=literal), LABELS).my_output == reply


@pytest.mark.parametrize(
    "expected, text",
    [
        ("think", ""),
        ("think", "{'last_emotions': {'joy': 1}, " + REST),
        ("think", "Well. " + answer()),
        ("think", answer(think="<think></think>")),
        ("think", answer(think="<think> \n\u2028\u200b </think>")),
        ("think", answer(think="<think>Because.")),
        ("think", answer(think="Because.</think>")),
        ("think", answer(think="<THINK>Because.</THINK>")),
        ("dictionary", THINK),
        ("dictionary", answer(think=THINK + "```python\n") + "\n```"),
        ("dictionary", answer(think=THINK + "Here: ")),
        ("dictionary", answer(think=THINK + THINK)),
        ("dictionary", f"{THINK}[{answer(think='')}]"),
        ("dictionary", answer()[:-1]),
        ("dictionary", answer()[:-2]),
        ("dictionary", THINK + "{'last_emotions'"),
        ("dictionary", THINK + "{'last_emotions':"),
        ("dictionary", THINK + "{'last_emotions': {'joy':"),
        ("dictionary", THINK + "{'last_emotions': {'joy': 1"),
        ("dictionary", THINK + "{'last_emotions': {'joy' 1}, " + REST),
        ("dictionary", THINK + "{'last_emotions': {joy: 1}, " + REST),
        ("dictionary", THINK + "{'last_emotions': {'joy'}, " + REST),
        ("dictionary", THINK + "{'last_emotions' {'joy': 1}, " + REST),
        ("dictionary", THINK + "{'last_emotions': {'joy': 1} " + REST),
        ("dictionary", THINK + "{'last_emotions': {'joy': 1},, " + REST),
        ("dictionary", THINK + "{, 'last_emotions': {'joy': 1}, " + REST),
        ("dictionary", THINK + "{‘last_emotions’: {‘joy’: 1}, " + REST),
        ("dictionary", THINK + "{last_emotions: {'joy': 1}, " + REST),
        ("dictionary", answer(reply="'It's'")),
        ("dictionary", answer(reply="'a' 'b'")),
        ("dictionary", answer(reply="'''a'''")),
        ("dictionary", answer(reply=r"'\d'")),
        ("dictionary", answer(reply=r"'\N{DASH}'")),
        ("dictionary", answer(reply=r"'\07'")),
        ("dictionary", answer(reply=r"'\x4'")),
        ("dictionary", answer(reply=r"'\U00110000'")),
        ("dictionary", answer(reply=r"'\ud800'")),
        ("dictionary", answer(reply=r"'\ude00\ud83d'")),
        ("dictionary", answer(reply="'\ud800'")),
        ("dictionary", answer(reply="'a\nb'")),
        ("trailing", answer() + "."),
        ("trailing", answer() + "<|im_end|>"),
        ("trailing", answer() + answer(think="")),
        ("trailing", answer() + "}"),
        ("keys", THINK + "{}"),
        ("keys", THINK + "{'last_emotions': {'joy': 1}}"),
        ("keys", answer()[:-1] + ", 'why': 'so'}"),
        ("keys", answer().replace("my_output", "my_Output")),
        ("keys", answer().replace("my_output", " my_output")),
        ("duplicate", answer()[:-1] + ", 'my_output': 'No.'}"),
        ("duplicate", answer(last="{'joy': 1, 'joy': 1}")),
        ("duplicate", answer(last="{'joy': 1, 'Joy': 1}")),
        ("duplicate", answer(mine="{'awe': 1, 'AWE': 1}")),
        ("last_emotions", answer(last="{}")),
        ("last_emotions", answer(last="'joy'")),
        ("last_emotions", answer(last="None")),
        ("last_emotions", answer(last="'joy", reply="1")),
        ("last_emotions", answer(last="[{'joy': 1}]")),
        ("last_emotions", answer(last="{'joy': 1, 'fear': 1, 'anger': 1, 'disgust': 1}")),
        ("label", answer(last="{'happy': 1}")),
        ("label", answer(last="{'': 1}")),
        ("label", answer(last="{'joy ': 1}")),
        ("label", answer(last="{'joy': 1, 'curiosity': 1}")),
        ("my_emotions", answer(mine="{}")),
        ("my_emotions", answer(mine="['joy']")),
        ("my_emotions", answer(mine="{'a': 1, 'b': 1, 'c': 1, 'd': 1}")),
        ("my_emotions", answer(mine="{' ': 1}")),
        ("my_output", answer(reply="''")),
        ("my_output", answer(reply="' \\n\\u200b\u2029'")),
        ("my_output", answer(reply="None")),
        ("my_output", answer(reply="5")),
        ("my_output", answer(reply="{'joy': 1}")),
        ("my_output", answer(reply="f'Yeah.'")),
        ("my_output", answer(reply="__import__('os')")),
    ],
)
def test_failure(expected, text):
    assert reason(text) == expected


def test_no_reason_is_left_out():
    """Every reason is met above or below."""
    met = {m.args[1][i][0] for m in test_failure.pytestmark for i in range(len(m.args[1]))}
    assert met | {"unfinished", "too_long", "weight"} == set(REASONS.split())


def test_an_answer_cut_off_fails_even_if_its_text_is_whole():
    assert reason(answer(), finished=False) == "unfinished"


def test_the_limit_counts_bytes():
    """64 KiB = 65,536 bytes; a euro sign is 3 of them."""
    shell = len(answer(reply="''"))
    room = 65_536 - shell
    assert reason(answer(reply=f"'{'a' * room}'")) is None
    assert reason(answer(reply=f"'{'a' * (room + 1)}'")) == "too_long"
    assert reason(answer(reply=f"'{'€' * (room // 3)}'")) is None
    assert reason(answer(reply=f"'{'€' * (room // 3 + 1)}'")) == "too_long"


MARKS = "{}:,'\"\\ \n[]()0."
WORDS = "<think> </think> 'last_emotions' \"my_emotions\" 'my_output' 'joy' joy 0.5 \\u é"


PIECES = st.lists(st.sampled_from([*MARKS, *WORDS.split(), THINK, "\ud83d"]), max_size=40)


@settings(deadline=None)
@given(st.text() | PIECES.map("".join), st.booleans())
@example(THINK + "{'last_emotions': {'joy': " + "9" * 5000, True)
@example(THINK + "{'last_emotions': " * 3000, True)
@example(THINK + "{'my_output': '\\U99999999'}", True)
def test_any_text_gives_an_output_or_a_named_failure(text, thinking):
    parse = parse_output(THINK + text if thinking else text, LABELS)
    assert isinstance(parse, Output) or parse.reason in REASONS.split()


PLAIN = st.text(st.characters(exclude_categories=["Cs"])).filter(clean)
LAST = st.dictionaries(st.sampled_from(LABELS), st.floats(0.1, 1), min_size=1, max_size=3)
MINE = st.dictionaries(
    PLAIN.map(str.lower).filter(lambda name: name == name.lower()), st.floats(0.1, 1), min_size=1, max_size=3
)


@settings(deadline=None)
@given(PLAIN.filter(lambda text: "</think>" not in text), LAST, MINE, PLAIN, st.sampled_from([repr, double_quoted]))
def test_round_trip(reasoning, last, mine, reply, quoted):
    parse = parse_output(format_output(reasoning, last, mine, reply, quoted=quoted), LABELS)
    assert isinstance(parse, Output)
    assert (parse.reasoning, parse.last_emotions, parse.my_emotions, parse.my_output) == (reasoning, last, mine, reply)
    assert list(parse.my_emotions) == list(mine)


@settings(deadline=None)
@given(LAST, MINE, PLAIN)
def test_json_reads_like_python(last, mine, reply):
    fields = json.dumps({"last_emotions": last, "my_emotions": mine, "my_output": reply})
    assert parse_output(THINK + fields, LABELS).my_output == reply


@settings(deadline=None)
@given(LAST, PLAIN, st.data())
def test_spans_hold_the_values(last, reply, draw):
    text = format_output("Because.", last, last, reply)
    spans = parse_output(text, LABELS).spans
    assert text[slice(*spans["my_output"])] == repr(reply)
    assert text[slice(*spans["last_emotions"])] == repr(last)
    cut = draw.draw(st.integers(0, len(text) - 1))
    assert isinstance(parse_output(text[:cut], LABELS), Failure)  # no beginning of an answer is an answer


def test_format_output():
    text = format_output("He fell.", {"joy": 0.8, "fear": 1}, {"awe": 0.25}, "It's")
    assert text == (
        "<think>He fell.</think>\n"
        "{'last_emotions': {'joy': 0.8, 'fear': 1.0}, 'my_emotions': {'awe': 0.25}, 'my_output': \"It's\"}"
    )


@pytest.mark.parametrize("reasoning", ["", " \n", "a</think>b"])
def test_format_output_refuses_a_reasoning_that_cannot_be_read_back(reasoning):
    with pytest.raises(ValueError):
        format_output(reasoning, {"joy": 1}, {"joy": 1}, "Yeah.")


def steps(text):
    """Lines of data.py that reading this text runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == data.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parse_output(text, LABELS)
    finally:
        sys.settrace(before)
    return count


HOSTILE = [
    *("{", "[", "'", '"', "\\", ":", ",", " ", "\u2028", "-", "9", "<think>", "</think>", "{'", "{'a':", "{'my_output':"),
    *("{'last_emotions':{", "{'last_emotions':{'joy':", "'joy':1,", "\\'", "\\u0041", "1+", "a/", "{}", "'a' ", "},"),
]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("start", ["", "<think>", THINK, THINK + "{'my_output': '", THINK + "{'last_emotions': {'joy': "])
def test_hostile_text_is_read_in_linear_steps(piece, start):
    """Twice the text takes at most twice the steps. What a step does inside `re` is linear by possessive repeats: without
    them the longest texts here would not end."""
    longest = 65_536 - len(start)
    whole = piece * (longest // len(piece.encode()))
    half = whole[: len(whole) // 2]
    assert steps(start + whole) <= 2 * steps(start + half) + 100
