"""Hostile answers and files: hypothesis, and a seeded loop over what `python -m tests.fuzz` runs at length."""

import json
import os
import random
import time

import fuzz
import pytest
from fuzz import GOOD, LABELS, THINK, TOKENS, broken, cases, check, expected, try_case
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
from common.errors import UserError
from corpora import loading
from data import format_output

MORE = int(os.environ.get("FUZZ", "1"))  # FUZZ=100: a hundred times as many
SETTINGS = settings(deadline=None, max_examples=200 * MORE, suppress_health_check=list(HealthCheck))

# Answers


def test_the_second_reading_by_hand():
    """GOOD[0] in D8's words: `Fear` is `fear`, .3 is a decimal, 1 lies in [0.1, 1], `\\u00e9` is Python's and JSON's é."""
    assert expected(GOOD[0], LABELS) == fuzz.Valid("Because.", {"joy": 0.8, "fear": 0.3}, {"awe": 1.0}, "It's é.")
    assert expected(GOOD[1], LABELS) == fuzz.Valid("Because.", {"anger": 1.0}, {"x": 0.1}, "a/b 😀")
    assert list(expected(GOOD[2], LABELS).last_emotions) == ["joy", "fear", "disgust"]
    assert all(map(check, GOOD))


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.8", "0.0999"), ("'It", "'It\n"), ("\\u00e9", "\\x4"), ("\\u00e9", "\\d"),
        ("0.8", "1.01"), ("0.8", "True"), ("0.8", "'0.8'"), ("0.8", "nan"), ("0.8", "08"), ("0.8", "+.8"),
        ("0.8", "[0.8]"), ("'joy'", "'glee'"), ("'joy'", "'FEAR'"), ("'joy'", "joy"), ("'my_output'", "'output'"),
        ("'It\\'s \\u00e9.'", "' '"), ("'It\\'s \\u00e9.'", "5"), ("'It\\'s \\u00e9.'", "'a' 'b'"), ("'It\\'s", "'It's"),
        ("Because.", ""), ("<think>", "So: <think>"), ("</think>", "</think>```python\n"), ("{'awe': 1}", "{}"),
        ("{'awe': 1}", "{'a': 1, 'b': 1, 'c': 1, 'd': 1}"), ("{'awe': 1}", "{'awe': 1, 'AWE': 1}"), ("1}", "1}}"),
        ("'my_emotions'", "'my_output': 'x', 'my_emotions'"), ("'my_emotions'", ", 'my_emotions'"), ("\\u00e9", "\\ud800"),
    ],
)  # fmt: skip
def test_both_readings_refuse_what_d8_refuses(old, new):
    assert old in GOOD[0]
    assert expected(GOOD[0].replace(old, new), LABELS) is None
    assert not check(GOOD[0].replace(old, new))


def test_both_readings_know_the_limit_and_the_end():
    assert not check(GOOD[0], finished=False)
    assert check(GOOD[0] + " " * (65_536 - len(GOOD[0])))
    assert not check(GOOD[0] + " " * (65_537 - len(GOOD[0])))


NAMES = [*LABELS, "Joy", "FEAR", "awe", "deep regret", "K", "İ", "ß", "ẞ", "\u200d", "", " "]
NAME = st.sampled_from(NAMES) | st.text(max_size=9)
NUMBER = st.one_of(
    st.floats(0.1, 1).map(repr),
    st.floats().map(repr),
    st.integers().map(str),
    st.sampled_from(["1", "1.", ".5", "0.1", "0.09999999999999999999", "1.0000000000000000001", "1e-1", "1E0", "10e-2"]),
    st.sampled_from(["0x1", "1_0", "True", "null", "'1'", "01", "00.5", "١"]),
    st.integers(1, 6000).map(lambda n: "9" * n),
    st.integers(1, 60).map(lambda n: "0.5" + "0" * n),
)
QUOTED = st.one_of(
    st.text(max_size=30).map(repr),
    st.text(max_size=30).map(json.dumps),
    st.text(max_size=30).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.lists(st.sampled_from([*"ab'\"\\/\n é", "\\n", "\\u0041", "\\x41", "\\x4", "\\ud83d", "\\ude00", "\\d"]), max_size=9)
    .map("".join).flatmap(lambda inside: st.sampled_from([f"'{inside}'", f'"{inside}"'])),
)  # fmt: skip
SPACE = st.sampled_from(["", "", "", " ", "\n", "\t", "\u2028", "\u00a0", "\x0c"])


@st.composite
def dictionaries(draw, keys, values, most):
    """A dictionary, seldom a proper one: keys twice, commas too many or too few, blanks of every kind."""
    size = draw(st.integers(0, most))
    entries = [f"{draw(SPACE)}{draw(keys)}{draw(SPACE)}:{draw(SPACE)}{draw(values)}" for _ in range(size)]
    return "{" + draw(st.sampled_from([",", ",", ",", ",,", ""])).join(entries) + draw(st.sampled_from(["", "", ","])) + "}"


EMOTIONS = dictionaries(NAME.map(repr), NUMBER, 4)
WEIGHTS = dictionaries(st.sampled_from(LABELS).map(repr), st.floats(0.1, 1).map(repr), 3)


@st.composite
def answers(draw):
    """The shape of an answer with something odd in any place, or nowhere."""
    parts = {
        "last_emotions": draw(WEIGHTS | WEIGHTS | EMOTIONS),
        "my_emotions": draw(WEIGHTS | EMOTIONS),
        "my_output": draw(QUOTED),
    }
    keys = draw(st.permutations(list(parts)))
    if draw(st.integers(0, 4)) == 0:
        keys[draw(st.integers(0, 2))] = draw(st.sampled_from([*parts, "why", "My_output"]))
    sign = draw(st.sampled_from("'\""))
    body = ",".join(f"{draw(SPACE)}{sign}{key}{sign}{draw(SPACE)}:{draw(SPACE)}{parts.get(key, '1')}" for key in keys)
    reasoning = draw(st.sampled_from(["Because.", "<think>", "\u200b", " ", "{'a': 1}"]) | st.text(max_size=20))
    return f"{draw(SPACE)}<think>{reasoning}</think>{draw(SPACE)}{{{body}}}{draw(SPACE)}"


@SETTINGS
@given(answers())
@example(THINK + "{" * 30_000)
@example(THINK + "{'last_emotions': {'joy': " + "1" * 60_000 + "}}")
@example("<think>" * 8_000 + "x</think>")
def test_an_answer_is_valid_where_d8_says_so_and_says_what_it_says(text):
    check(text)


@SETTINGS
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.sampled_from(TOKENS)), max_size=4),
)
def test_a_valid_answer_with_pieces_put_in_or_taken_out(text, changes):
    for at, gone, piece in changes:
        text = text[:at] + piece + text[at + gone :]
    check(text)


@SETTINGS
@given(st.binary(max_size=60))
def test_what_the_tool_makes_of_bytes(raw):
    check(*fuzz.answer_of(raw))


@settings(deadline=None, max_examples=60 * MORE, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*TOKENS, *"{}[]:,'\"\\ \n0.x"]), st.sampled_from(["", "<think>", THINK, *GOOD]), st.booleans())
def test_no_text_takes_long(piece, start, close):
    """64 KiB are read in a few milliseconds; 2 s would be a thousand times as long, a quadratic reading ten thousand."""
    size = {part: len(part.encode(errors="surrogatepass")) for part in (start, piece)}
    text = start + piece * ((65_000 - size[start]) // size[piece])
    began = time.process_time()
    data.parse_output(text + "'}}" * close, LABELS)
    assert time.process_time() - began < 2


@SETTINGS
@given(
    st.text(min_size=1).filter(lambda text: not fuzz.blank(text) and "</think>" not in text),
    st.dictionaries(st.sampled_from(LABELS), st.floats(0.1, 1), min_size=1, max_size=3),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not fuzz.blank(text)),
)
def test_what_is_written_is_accepted_by_both(reasoning, weights, reply):
    assert check(format_output(reasoning, weights, weights, reply))


# Files

CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_read_and_both_readings_agree(tmp_path, name):
    case = CASES[name]
    case.write(tmp_path)
    found = case.load(tmp_path)
    assert found and found == case.plainly(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_refused_or_read_as_it_is(tmp_path, name):
    """100 files, each broken in one to three ways; `python -m tests.fuzz` tries as many as you like."""
    outcomes = [try_case(CASES[name], tmp_path, random.Random(f"{name}/{i}")) for i in range(100 * MORE)]
    assert {"read", "refused"} == set(outcomes)


def test_every_way_to_break_a_file_breaks_some():
    rng, raw = random.Random(0), fuzz.DIALOGUES.encode()
    made = [broken(raw, rng) for _ in range(500)]
    assert len(set(made)) > 300 and made.count(raw) < 30


def loaded(tmp_path, name, file, text):
    """What a loader says of one changed file of a case."""
    case = CASES[name]
    case.write(tmp_path, {file: text})
    with pytest.raises(UserError) as error:
        case.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


MELD, TRAIN = fuzz.MELD, fuzz.DIALOGUES


@pytest.mark.parametrize(
    "name, file, text, said",
    [
        # an exception of another kind
        ("meld", "train_sent_emo.csv", "x" * 140_000 + MELD, "sent_emo.csv:1: field larger than field limit"),
        ("own", "train.jsonl", TRAIN.replace("0.35", "1" + "0" * 400), ":1: int too large to convert to float"),
        ("gold", "gold.jsonl", fuzz.GOLD.replace("0.45", "1" + "0" * 400), ":1: int too large to convert to float"),
        # nothing where there should be something
        ("meld", "train_sent_emo.csv", "", "sent_emo.csv:1: the column 'Dialogue_ID' is missing"),
        ("meld", "train_sent_emo.csv", MELD.split("\n")[0], "sent_emo.csv: nothing in it"),
        ("meld", "train_sent_emo.csv", MELD.replace("\n", "\r"), "sent_emo.csv:1: new-line character"),
        ("own", "train.jsonl", "\n", "train.jsonl: nothing in it"),
        ("gold", "gold.jsonl", "", "gold.jsonl: nothing in it"),
        ("own", "train.jsonl", '{"id": "d1", "turns": ""}', ":1: no turns"),
        # a label that nobody would miss
        ("own", "train.jsonl", TRAIN.replace('"label": "Joy"', '"labfl": "Joy"'), ":2: unknown field 'labfl'"),
        ("own", "train.jsonl", TRAIN.replace(', "label": "Joy"', ""), ":2: 'label' is missing"),
        ("own", "train.jsonl", TRAIN.replace('"Joy"', '"Joy", "label": "anger"'), ":2: a key twice among"),
        ("own", "train.jsonl", TRAIN.replace('"anger": 0.35', '"sadness": 0.35'), ":1: a key twice among"),
        ("own", "train.jsonl", TRAIN.replace("0.35", '"0.35"'), ":1: weight '0.35' is no number"),
        ("own", "train.jsonl", TRAIN.replace("0.35", "true"), ":1: weight True is no number"),
        ("own", "train.jsonl", TRAIN.replace('"personas"', '"persooas"'), ":1: unknown field 'persooas'"),
        ("own", "train.jsonl", TRAIN.replace('a worrier"', 'a worrier", "Bo ": "calm"'), "a persona twice"),
        ("own", "train.jsonl", TRAIN.replace('{"Bo": "a worrier"}', "[]"), ":1: 'list' object has no"),
        ("own", "labels.json", '"joy anger sadness surprise"', "labels.json: no list, or a label twice"),
        ("own", "labels.json", '["joy", "joy", "anger", "sadness", "surprise"]', "labels.json: no list, or a label twice"),
        ("personas", "p.jsonl", fuzz.PERSONAS.replace('"Ann"', '" "', 1), ":1: ' ' where a text is needed"),
        # a number that only int() takes for one
        ("meld", "train_sent_emo.csv", MELD.replace("positive,10,", "positive,1 ,"), ":5: '1 ' where a number is needed"),
        ("meld", "train_sent_emo.csv", MELD.replace("positive,10,", "positive,1_0,"), ":5: '1_0' where a number is needed"),
        ("meld", "train_sent_emo.csv", MELD.replace("positive,10,", "positive,-1,"), ":5: '-1' where a number is needed"),
        ("meld", "train_sent_emo.csv", MELD.replace("Season", "Emotion"), ":1: the column 'Emotion' is there twice"),
        ("meld", "train_sent_emo.csv", MELD.replace("Utterance,", '"Utterance,', 1), ".csv:1: unexpected end of data"),
        # bytes that no text has
        ("meld", "train_sent_emo.csv", MELD.replace("Well", "We\0l"), "sent_emo.csv:4: a zero byte"),
        ("own", "train.jsonl", TRAIN.encode("utf-16-le"), "train.jsonl:1: a zero byte"),
    ],
)
def test_what_was_let_through_once(tmp_path, name, file, text, said):
    """Each of these was read as if nothing were wrong, or ended in a traceback."""
    assert said in loaded(tmp_path, name, file, text)


def test_a_personas_line_break_is_gone_when_it_is_read(tmp_path):
    """It used to stay until the responder was made."""
    (tmp_path / "labels.json").write_text(CASES["own"].files["labels.json"])
    (tmp_path / "train.jsonl").write_text(TRAIN.replace("a worrier", "\\u2028a\\nworrier"))
    assert loading.load("own", tmp_path, "train")[0].personas == {"Bo": "a worrier"}


TALK = "Session1/dialog/{}/Ses01F_impro99.txt"


@pytest.mark.parametrize(
    "part, old, new, said",
    [
        ("transcriptions", "Ses01F_impro99_M000", "Tes01F_impro99_M000", r":2: 'Tes01F_impro99_M000 [007.9000-010.0000]"),
        ("transcriptions", "[010.1000-", "(010.1000-", r":4: 'Ses01F_impro99_MXX0 (010"),
        ("transcriptions", "Um.", "U\0m.", ":4: a zero byte"),
        ("EmoEvaluation", "[6.1000 -", "{6.1000 -", ":3: '{6.1000 - 8.2000]"),
        ("EmoEvaluation", "Ses01F_impro99_F000", "Ses01F_impro99_F00" + "0" * 140_000, "no line for F0000000"),
        ("EmoEvaluation", "neu", "neu" * 50_000, ":3: unknown emotion 'neuneu"),
    ],
)
def test_what_iemocap_let_through_once(tmp_path, part, old, new, said):
    file = TALK.format(part)
    text = CASES["iemocap"].files[file]
    assert said in loaded(tmp_path, "iemocap", file, text.replace(old, new, 1))


@pytest.mark.parametrize("empty", [("transcriptions", "EmoEvaluation"), ("EmoEvaluation",)])
def test_an_empty_file_of_iemocap_is_named(tmp_path, empty):
    CASES["iemocap"].write(tmp_path, {TALK.format(part): "" for part in empty})
    with pytest.raises(UserError, match=rf"{empty[0]}/Ses01F_impro99.txt: not one turn in it; unpack the release again"):
        loading.load("iemocap", tmp_path, "train")
