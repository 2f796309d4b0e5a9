"""One dialogue at a time: its table worked by hand, the dialogue that grows, narrow terminals, and rubbish."""

import io
import sys

import pytest
from conftest import status_of

import data
import evaluate
from analysis import trying
from analysis.trying import TryCommand, conversation, read_dialogue, sample_of, shown

TEXT = b"Ann: I won.\n\nBo: And now?\n"
WORDS = "<think>why not</think>{{'last_emotions': {}, 'my_emotions': {{'joy': 0.6, 'awe': 0.2}}, 'my_output': '{}'}}"
SURE = (WORDS.format("{'joy': 1.0}", "Now we dance."), True)
TORN = (WORDS.format("{'joy': 0.5, 'anger': 0.5}", "Well."), True)
CUT = ("<think>so", False)


def command(*texts, **flags):
    """A command, its sample, and answers that are always the same."""
    made = TryCommand("m", **{"labels": "joy,anger,neutral", **flags})
    return made, sample_of(made, read_dialogue(TEXT)), lambda sample: list(texts)


def turns(*texts, **flags):
    made, sample, answers = command(*texts, **flags)
    return list(conversation(sample, answers, made))


def test_the_table_by_hand():
    """Gold joy: r 1 + .1, .5/1.5 + .1, 0. Core joy 1.5/2, anger .5/2, so r2 1/3, 2/3, 0.
    r: mean .511111, squares .346790 + .006049 + .261235, deviation .554109: 1.062768, -.140366, -.922402.
    r2: mean 1/3, deviation 1/3: 0, 1, -1. Half of that added: 1.063, .360, -1.422."""
    (found,) = turns(SURE, TORN, CUT, gold=("joy=1",))
    rows = [line for line in shown(found, 80) if line[:2].strip().isdecimal()]
    assert [row.split() for row in rows] == [
        ["0*", "1.100", "0.333", "+1.063", "joy", "1.00"],
        ["1", "0.433", "0.667", "+0.360", "joy", "0.50,", "anger", "0.50"],
        ["2", "0.000", "0.000", "-1.422", "rule", "failed:", "unfinished"],
    ]
    said = "\n".join(shown(found, 80))
    assert "core emotions (Eq. 11): joy 0.75, anger 0.25" in said
    assert "thinks: why not" in said and "feels: joy 0.60, awe 0.20" in said and "says: Now we dance." in said
    assert "  + Ann: Now we dance." in said.splitlines() and "    label joy 0.60; Bo answers next" in said.splitlines()


def test_without_gold_the_most_consistent_answer_stands_in():
    """Consistencies 1/3, 2/3, 0: answer 1. There is no reward, and the advantage is half of 0, 1, -1."""
    (found,) = turns(SURE, TORN, CUT)
    assert (found.rewards, found.selection.index) == (None, 1)
    assert found.advantages == pytest.approx([0, 0.5, -0.5], abs=1e-4)
    said = list(shown(found, 80))
    assert any(line.split()[:4] == ["1*", "-", "0.667", "+0.500"] for line in said)
    assert "the first of the most consistent ones" in " ".join(said)


def test_the_dialogue_grows():
    """Three turns: Ann, Bo and Ann answer in turn; from the second one on, gold is what the speaker before said it felt."""
    found = turns(SURE, TORN, gold=("joy=1",), depth=3, persona=("Ann=calm", "Bo=loud"))
    assert [len(turn.sample.context) for turn in found] == [2, 3, 4]
    assert [(t.sample.responder.name, t.sample.responder.persona) for t in found] == [
        ("Ann", "calm"), ("Bo", "loud"), ("Ann", "calm"),
    ]  # fmt: skip
    assert [turn.sample.gold for turn in found] == [{"joy": 1.0}, {"joy": 0.6}, {"joy": 0.6}]
    assert found[2].selection.child.context[-1].text == "Now we dance."


def test_it_ends_where_selection_makes_nothing():
    (found,) = turns(CUT, CUT, depth=3)
    assert list(shown(found, 80))[-1] == "No new sample: no answer is valid."
    (found,) = turns(TORN, CUT, gold=("joy=1",), depth=3)
    assert list(shown(found, 80))[-1] == "No new sample: the best reward is below --keep_reward."


def test_who_answers():
    """The latest other speaker; whoever is named; a listener, where one person speaks alone."""
    assert command(SURE)[1].responder.name == "Ann"
    assert command(SURE, responder="Cy")[1].responder.name == "Cy"
    alone = sample_of(TryCommand("m"), read_dialogue(b"Ann: Hello?"))
    assert (alone.responder.name, alone.responder.kind) == (None, "none")


@pytest.mark.parametrize("width", [24, 33, 48, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    long = (WORDS.format("{'joy': 0.5, 'anger': 0.4, 'neutral': 0.3}", "Well, " * 40 + "o" * 70), True)
    (found,) = turns(long, SURE, CUT, gold=("joy=0.7", "anger=0.2"))
    lines = [part for line in shown(found, width) for part in line.split("\n")]
    assert max(map(len, lines)) <= width
    assert "".join(lines).replace(" ", "").count("Well,") >= 40


def test_an_answer_cannot_move_the_cursor():
    (found,) = turns((SURE[0].replace("why not", "why\x1b[2J\rnot"), True), SURE)
    assert not any(c in "\x1b\r" for line in shown(found, 80) for c in line)


def piped(monkeypatch, capsys, raw, *flags):
    stdin = io.TextIOWrapper(io.BytesIO(raw))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "try", *map(str, flags)])
    status = status_of(evaluate.main)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("raw", "flags", "complaint"),
    [
        (b"", (), "the dialogue is empty"),
        (b"Ann: Hi.\nno colon here\n", (), "line 2 of the dialogue, 'no colon here', is not `Name: text`"),
        (b": Hi.\n", (), "line 1 of the dialogue"),
        (b"Ann: \xff\n", (), "is not UTF-8 (byte 5)"),
        (TEXT, ("--responder", "Bo"), "--responder Bo: nobody answers their own turn"),
        (TEXT, ("--responder", "All"), "--responder All: a group cannot answer"),
        (TEXT, ("--gold", "glee=1"), "--gold names glee: labels are neutral, surprise"),
        (TEXT, ("--gold", "joy=lots"), "--gold joy=lots: give a weight above 0"),
        (TEXT, ("--gold", "joy"), "--gold joy: give NAME=VALUE"),
        (TEXT, ("--persona", "Cy=shy"), "--persona names Cy, who is not in the dialogue"),
        (TEXT, ("--labels", "joy,,anger"), "--labels joy,,anger: give meld"),
        (TEXT, ("--n", "1"), "--n is 1: it must be at least 2"),
        (TEXT, ("--depth", "0"), "--depth is 0: it must be at least 1"),
        (TEXT, ("--lam", "nan"), "--lam is nan"),
        (TEXT, (), "nowhere/at/all does not exist"),
    ],
)
def test_rubbish_is_one_line(monkeypatch, capsys, raw, flags, complaint):
    status, out, err = piped(monkeypatch, capsys, raw, "nowhere/at/all", *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and complaint in err and err.count("\n") == 1


def test_a_model_answers_what_is_piped(place, monkeypatch, capsys):
    """The tiny model of the tests; the same command gives the same answers, another seed others."""
    monkeypatch.setattr(data, "DEFAULT", data.read_prompts(place.root / "prompts.json"))
    monkeypatch.setenv("COLUMNS", "100")
    flags = (place.root / "base", "--labels", "joy,anger,neutral", "--n", 3, "--max_new_tokens", 24, "--depth", 2)
    raw = b"Ann: I won the race.\nBo: It is Monday.\n"
    status, out, err = piped(monkeypatch, capsys, raw, *flags, "--gold", "neutral=1")
    assert (status, err) == (0, "")
    assert out.startswith("Turn 1 of at most 2\nAnn: I won the race.\nBo: It is Monday.\n")
    assert "core emotions" in out and "last speaker feels" in out
    assert piped(monkeypatch, capsys, raw, *flags, "--gold", "neutral=1")[1] == out
    assert piped(monkeypatch, capsys, raw, *flags, "--gold", "neutral=1", "--seed", 1)[1] != out


def test_in_a_terminal_an_empty_line_ends_the_dialogue(monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(TEXT))
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert trying.from_stdin() == b"Ann: I won.\n"
    assert "empty line" in capsys.readouterr().err
