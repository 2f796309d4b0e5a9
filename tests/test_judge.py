"""The judge: pairs of answers, both orders, the control, verdicts, counts; judges that follow a script."""

import json
import os
import re
import sys

import pytest
from conftest import lines, status_of
from endpoint import completion, serving

import evaluate
from analysis import judge, pairing
from analysis.judge import QUESTIONS, interval, judge_chat, outcome, parse_verdict, sign_test, tally, trials
from analysis.pairing import Pair, Said, paired, span
from common.errors import UserError
from corpora.dialogue import Turn
from data import Failure, Output, Responder, Sample
from experts.asking import Endpoint, Reply, Settings, Unanswered, ask


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between a test and its own server, and no key of whoever runs the tests."""
    monkeypatch.setenv("NO_PROXY", "*")
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


def sample(number=0, name="Ann", persona="a shy baker", kind="next", dataset="world"):
    turns = (Turn("Bo", f"Line {number}."), Turn("Cy", "Well?"))
    return Sample(f"{dataset}/train/d{number}/1", dataset, turns, Responder(name, persona, kind), ("joy",), {"joy": 1.0})


def said(reply, where="x", of=None, **feels):
    return Said(where, of or sample(), Output("I wonder.", {"joy": 1.0}, feels or {"joy": 0.5, "hope": 1.0}, reply, {}))


def pair(early="Hm.", late="Oh, how lovely!", of=None):
    return Pair(said(early, "early one", of), said(late, "late one", of), "prompt")


# Statistics


def test_sign_test_by_hand():
    """8 wins, 2 losses: 2 * (1 + 10 + 45)/1024 = .109375. 5 against 0: 2/32. Even, and nothing at all: 1."""
    assert sign_test(8, 2) == sign_test(2, 8) == 0.109375
    assert sign_test(5, 0) == 0.0625
    assert sign_test(3, 3) == sign_test(0, 0) == 1.0


def test_interval_holds_ties_in():
    """100 pairs, 30 won, 10 lost: mean .2, variance (.4 - .04)/100, deviation .06: about .2 -+ .1176."""
    low, high = interval(30, 10, 60)
    assert low == pytest.approx(0.0824, abs=0.02) and high == pytest.approx(0.3176, abs=0.02)
    assert interval(4, 0, 0) == (1.0, 1.0) and interval(0, 0, 7) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "is_"),
    [
        ("late", "late", "win"), ("early", "early", "loss"), ("tie", "tie", "tie"), ("late", "early", "flip"),
        ("early", "late", "flip"), ("tie", "late", "flip"), ("early", "tie", "flip"), (None, "late", "invalid"),
        ("tie", None, "invalid"),
    ],
)  # fmt: skip
def test_outcome_of_two_orders(first, second, is_):
    assert outcome(first, second) == is_


# Verdicts


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1. Shy.\n2. ...\nVerdict: A", "A"),
        ("Verdict: A\nOn second thought:\nVerdict: b\n", "B"),
        ("**Verdict: Tie**", "tie"),
        ('<think>A?</think>\n"verdict: answer_B"', "B"),
    ],
)
def test_the_last_line_is_the_verdict(text, verdict):
    assert parse_verdict(Reply(text, True, (1, 1))) == verdict


@pytest.mark.parametrize("text", ["", "A", "Verdict: C", "Verdict: A or B", "Verdict: A\nThat is all.", "Verdict: Ann"])
def test_no_verdict(text):
    assert parse_verdict(Reply(text, True, (1, 1))).reason == "verdict"


def test_cut_and_missing_answers_are_no_verdict():
    assert parse_verdict(Reply("Verdict: A", False, (1, 1))).reason == "unfinished"
    assert parse_verdict(Unanswered("HTTP 500")) == Failure("unanswered", "HTTP 500")


# What a judge sees


def test_a_pair_is_shown_in_both_orders_and_against_itself_for_both_questions():
    made = trials([pair(), pair()])
    assert len(made) == 12
    assert [(t.number, t.sides) for t in made[:6]] == [
        (0, ("early", "late")), (0, ("late", "early")), (0, ("late", "late")),
        (1, ("early", "late")), (1, ("late", "early")), (1, ("early", "early")),
    ]  # fmt: skip
    assert [t.question for t in made] == ["self_emotion"] * 6 + ["expression"] * 6


def test_the_prompt_shows_everything_but_which_is_which():
    first, second = (judge_chat(trial)[1]["content"] for trial in trials([pair()])[:2])
    for part in ("Person: Ann", "a shy baker", "Bo: Line 0.\nCy: Well?", "I wonder.", "joy 0.5, hope 1"):
        assert part in first
    assert QUESTIONS["self_emotion"] in first
    assert first.count("a shy baker") == 1
    assert first.index("Hm.") < first.index("lovely") and second.index("Hm.") > second.index("lovely")
    swapped = re.sub("Hm.|Oh, how lovely!", lambda m: {"Hm.": "Oh, how lovely!"}.get(m[0], "Hm."), first)
    assert swapped == second
    assert not re.search(r"early|\blater?\b|train/d0", first + judge_chat(trials([pair()])[0])[0]["content"])


def test_answers_to_two_prompts_bring_their_own_situations():
    two = Pair(said("Hm.", of=sample(1)), said("Ha!", of=sample(2)), "persona")
    shown = judge_chat(trials([two])[0])[1]["content"]
    order = ["Situation of answer A", "Line 1.", "Situation of answer B", "Line 2.", "Answer A\n", "Hm.", "Answer B", "Ha!"]
    places = [shown.index(x) for x in order]
    assert places == sorted(places)


def test_control_tokens_in_answers_are_broken_up():
    shown = judge_chat(trials([pair(late="Ha! <|im_end|>")])[0], ["<|im_end|>"])[1]["content"]
    assert "<|im_end|>" not in shown and "< |im_end|>" in shown


# Pairs


def test_pairs_share_the_prompt_else_the_persona_else_the_kind_and_nothing_is_used_twice():
    """d0 is in both. Early d1 and late d5 have one persona; early d2 or d3 and late d6 only a kind; the other is left."""
    early = [said("e", f"e{i}", sample(i, persona=p)) for i, p in enumerate(("p", "q", "r", None))]
    late = [said("l", "l0", sample(0, persona="p")), said("l", "l5", sample(5, persona="q")),
            said("l", "l6", sample(6, persona="s")), said("l", "l7", sample(7, persona="r", kind="later")),
            said("l", "l8", sample(8, persona=None, dataset="other"))]  # fmt: skip
    found = {(p.early.where, p.late.where, p.match) for p in paired(early, late, 0)}
    assert {("e0", "l0", "prompt"), ("e1", "l5", "persona")} < found and len(found) == 3
    ((third, partner, match),) = found - {("e0", "l0", "prompt"), ("e1", "l5", "persona")}
    assert third in ("e2", "e3") and (partner, match) == ("l6", "kind")
    assert [p.match for p in paired(early, late, 0)] == ["prompt", "persona", "kind"]


@pytest.mark.parametrize(("text", "steps"), [("3", [3]), ("0-2", [0, 1, 2])])
def test_span(text, steps):
    assert list(span(text, "--early")) == steps


@pytest.mark.parametrize("text", ["", "x", "2-1", "-1", "1-"])
def test_no_span(text):
    with pytest.raises(UserError, match="FIRST-LAST"):
        span(text, "--early")


def test_an_answer_is_drawn_among_the_valid_ones():
    good = "<think>x</think>{'last_emotions': {'joy': 1.0}, 'my_emotions': {'joy': 1.0}, 'my_output': 'Yes.'}"
    texts = ["no", "no", good, "no"]
    answers = [{"index": i, "text": text, "finished": True, "parse": {"reason": None if text == good else "think"}}
               for i, text in enumerate(texts)]  # fmt: skip
    record = {"step": 7, "sample_id": "world/train/d0/1", "labels": ["joy"], "answers": answers}
    known = {"world/train/d0/1": sample()}
    found = pairing.drawn(record, known, 0)
    assert (found.where, found.output.my_output) == ("world/train/d0/1, step 7, answer 2", "Yes.")
    assert pairing.drawn({**record, "answers": answers[:2]}, known, 0) is None
    with pytest.raises(UserError, match="--data NAME=DIR"):
        pairing.drawn(record, {}, 0)


# Scripted judges


def parts(body):
    """The two replies that a request shows."""
    return re.findall(r"^Says: (.*)$", body["messages"][1]["content"], re.MULTILINE)


def always_a(body, number):
    return completion("A speaks first.\nVerdict: A")


def longer(body, number):
    a, b = map(len, parts(body))
    return completion(f"{a} and {b} letters.\nVerdict: " + ("tie" if a == b else "A" if a > b else "B"))


def fickle(body, number):
    """Answers what the longer-judge does, but forgets the verdict where answer A is the shorter one."""
    a, b = map(len, parts(body))
    return completion("Hm.") if a < b else longer(body, number)


def judged(answer, found):
    pytest.importorskip("openai")

    with serving(answer) as server:
        cache = type("Cache", (), {"known": {}, "add": lambda self, key, expert, reply: self.known.update({key: reply})})()
        return list(judge.asked([Endpoint("m", server.url)], found, Settings(0.0, 50), cache))


def counts(rows, question="expression"):
    found = tally([row for row in rows if row["question"] == question])
    return [found[x] for x in ("win", "loss", "tie", "flip", "invalid")], found["control"]


PAIRS = [pair(f"No {i}.", f"Oh yes, number {i}!") for i in range(3)]
PAIRS += [pair("A long early line.", "Short."), pair("Same.", "Same.")]


def test_a_judge_that_always_says_a_flips_every_pair_and_the_control_shows_it():
    rows = judged(always_a, PAIRS)
    assert len(rows) == 5 * 2 * 3
    assert counts(rows) == ([0, 0, 0, 5, 0], {"A": 5, "B": 0, "tie": 0, "invalid": 0})


def test_a_judge_that_likes_length_gives_wins_losses_and_ties_and_none_in_the_control():
    """Three late lines are longer, one is shorter, one equal: difference (3 - 1)/5, p of 3 against 1: 2 * 5/16 = .625."""
    rows = judged(longer, PAIRS)
    assert counts(rows) == ([3, 1, 1, 0, 0], {"A": 0, "B": 0, "tie": 5, "invalid": 0})
    found = tally([row for row in rows if row["question"] == "self_emotion"])
    assert (found["pairs"], found["difference"], found["p"]) == (5, 0.4, 0.625)
    assert found["low"] < 0.4 < found["high"]
    first = rows[0]
    assert (first["a"], first["b"], first["verdict"], first["prefers"]) == ("early", "late", "B", "late")
    assert first["text"] == "5 and 17 letters.\nVerdict: B" and (first["early"], first["late"]) == ("early one", "late one")


def test_half_a_verdict_is_none():
    rows = judged(fickle, PAIRS)
    assert counts(rows)[0] == [0, 0, 1, 0, 4]
    assert [row["reason"] for row in rows if row["verdict"] is None][0] == "verdict: the last line is 'Hm.'"
    everything = tally([{**row, "prefers": None} for row in rows])
    assert (everything["difference"], everything["low"], everything["p"]) == (None, None, 1.0)


def test_invalid_pairs_are_no_part_of_the_difference():
    """Two wins, a loss, and a pair with half a verdict: (2 - 1)/3."""
    sides = [("late", "late"), ("late", "late"), ("early", "early"), ("late", None)]
    rows = [{"pair": i, "a": a, "b": b, "verdict": None, "prefers": x}
            for i, pair in enumerate(sides) for (a, b), x in zip(judge.SIDES, pair, strict=True)]  # fmt: skip
    found = tally(rows)
    assert (found["pairs"], found["invalid"], found["difference"]) == (4, 1, pytest.approx(1 / 3))


def test_the_table_counts_matches_apart():
    rows = judged(longer, [*PAIRS, Pair(said("Hm."), said("Hm, no."), "persona")])
    text, numbers = judge.table(rows, 0)
    assert [(n["question"], n["match"], n["pairs"], n["win"]) for n in numbers[:3]] == [
        ("self_emotion", "all", 6, 4), ("self_emotion", "prompt", 5, 3), ("self_emotion", "persona", 1, 1),
    ]  # fmt: skip
    assert text.splitlines()[2].split()[:9] == ["m", "self_emotion", "prompt", "5", "3", "1", "1", "0", "0"]


# The command


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "judge", *map(str, words)])
    status = status_of(evaluate.main)
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("error: ")]


def test_a_run_is_judged_by_two_judges_once(monkeypatch, capsys, finished, tmp_path):
    """Steps 0-2 against 3-5 of the small whole run. The second call asks nobody: everything is in the cache."""
    pytest.importorskip("openai")
    out = tmp_path / "v.jsonl"
    with serving(lambda body, n: longer(body, n) if body["model"] == "long" else always_a(body, n)) as server:
        judges = [w for name in ("long", "first") for w in ("--judge", server.url, "--judge_name", name)]
        words = [finished, "--early", "0-2", "--late", "3-5", *judges, "--out", out, "--limit", "8"]
        code, said_first, _ = command(monkeypatch, capsys, *words)
        requests = len(server.seen)
        again = command(monkeypatch, capsys, *words)
        assert len(server.seen) == requests
    numbers = json.loads(said_first.splitlines()[-1])["judged"]
    assert code == again[0] == 0 and json.loads(again[1].splitlines()[-1])["judged"] == numbers
    rows = lines(out)
    assert len(rows) == 2 * 8 * 2 * 3 and {row["judge"] for row in rows} == {"long", "first"}
    steps = [[int(re.search(r"step (\d+)", row[side])[1]) for row in rows] for side in ("early", "late")]
    assert max(steps[0]) < 3 <= min(steps[1])
    assert rows[0]["match"] == "prompt" and rows[0]["early"].split(",")[0] == rows[0]["late"].split(",")[0]
    assert all(n["pairs"] == n["flip"] for n in numbers if n["judge"] == "first")
    assert all(n["invalid"] == n["flip"] == 0 for n in numbers if n["judge"] == "long")
    assert "without a valid answer: " in said_first


def test_two_models_answer_the_same_prompts(monkeypatch, capsys, place, tmp_path):
    """A model against itself: sampled answers are the same, so a judge of length ties everywhere."""
    pytest.importorskip("openai")
    heat = []
    monkeypatch.setattr(pairing, "ask", lambda *asked: heat.append(asked[2].temperature) or ask(*asked))
    words = ["--early", place.root / "base", "--late", place.root / "base", "--data", f"tiny={place.root / 'world'}",
             "--prompts", place.root / "prompts.json", "--max_new_tokens", "24", "--limit", "5"]  # fmt: skip
    with serving(longer) as server:
        judges = ["--judge", server.url, "--judge_name", "m", "--out", tmp_path / "v.jsonl"]
        code, said_, _ = command(monkeypatch, capsys, *words, *judges)
    numbers = json.loads(said_.splitlines()[-1])["judged"]
    assert heat == [1.0, 1.0]  # the answers are sampled, the judge is greedy
    assert code == 0 and [n["tie"] for n in numbers] == [n["pairs"] for n in numbers] and numbers[0]["pairs"] >= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--early", "0", "--late", "1", "--judge", "x"), "give RUN with steps, or two models"),
        (("RUN", "--early", "3", "--late", "3", "--judge", "BASE"), "must end before"),
        (("RUN", "--early", "0", "--late", "99", "--judge", "BASE"), "no rollouts of steps 99: its last is 5"),
        (("RUN", "--early", "0", "--late", "5", "--judge", "https://h/v1"), "1 --judge, 1 of them URLs, and 0 --judge_name"),
        (("/nowhere", "--early", "0", "--late", "5", "--judge", "BASE"), "/nowhere"),
        (("RUN", "--early", "0", "--late", "5", "--judge", "BASE", "--limit", "-1"), "--limit"),
    ],
)
def test_a_users_mistake_is_one_line(monkeypatch, capsys, place, finished, words, message):
    named = {"RUN": finished, "BASE": place.root / "base"}
    code, _, errors = command(monkeypatch, capsys, *(named.get(word, word) for word in words))
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (finished / "judge.jsonl").exists()
