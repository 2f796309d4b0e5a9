"""`python -m tools.paired`: models on the same samples, by the rule and in the text, pair by pair."""

import json
import math

import numpy as np
import pytest
from conftest import status_of
from hypothesis import given
from hypothesis import strategies as st

from analysis.compare import f1_differences, f1_scores
from common.errors import UserError
from evaluate import accuracy, macro_f1, weighted_f1
from tools import paired

WHOLE = "<think>Hm.</think>{{'last_emotions': {}, 'my_emotions': {{'joy': 1.0}}, 'my_output': 'Oh.'}}"


def row(number, gold, named, text=None, iou=0.0):
    """What `score --out` keeps of one answer that names these emotions, or of one that breaks the rule."""
    parse = {"reason": None, "last_emotions": named} if named else {"reason": "unfinished", "detail": "no end"}
    said = {"text": text or WHOLE.format(named), "parse": parse, "predicted": max(named, key=named.get, default=None)}
    return {"id": f"world/test/{number}/0", "gold": {gold: 1.0}, **said, "iou": iou}


def write(path, rows):
    path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    """Four samples, gold joy, joy, fear, anger, in two orders. Before: joy; a broken answer that says joy; anger; anger and
    fear. After: joy; joy; fear; fear."""
    before = [
        row(0, "joy", {"joy": 1.0}, iou=1.0), row(1, "joy", {}, "The last speaker shows joy and joy and"),
        row(2, "fear", {"anger": 1.0}), row(3, "anger", {"anger": 0.6, "fear": 0.4}, iou=0.5),
    ]  # fmt: skip
    said = ((3, "anger", "fear"), (0, "joy", "joy"), (1, "joy", "joy"), (2, "fear", "fear"))
    after = [row(i, gold, {named: 1.0}, iou=float(gold == named)) for i, gold, named in said]
    return write(tmp_path / "before.jsonl", before), write(tmp_path / "after.jsonl", after)


def test_scores_and_differences_of_four_samples_by_hand(files):
    """Strict, before: right are the first and the last, .5. F1 of joy: 2 * 1 / (1 named + 2 gold) = 2/3, of fear 0, of anger
    2 * 1 / (2 + 1) = 2/3; macro 4/9; weighted (2 * 2/3 + 0 + 2/3) / 4 = 1/2. In the text the broken answer is right too:
    .75, joy 1, macro (1 + 0 + 2/3) / 3 = 5/9, weighted (2 + 0 + 2/3) / 4 = 2/3.
    After, both: .75; joy 1, fear 2 * 1 / (2 + 1) = 2/3, anger 0; macro 5/9, weighted (2 + 2/3) / 4 = 2/3.
    Right only after, strict: the broken answer and fear; only before: anger. In the text: fear against anger.
    IOU before (1 + 0 + 0 + .5) / 4; valid 3 of 4; emotions named by the valid ones (1 + 1 + 2) / 3."""
    found = paired.compare(files)["world"]
    before, after = found["models"].values()
    assert found["samples"] == 4
    assert before["strict"] == pytest.approx({"accuracy": 0.5, "W-F1": 0.5, "macro F1": 4 / 9})
    assert before["in the text"] == pytest.approx({"accuracy": 0.75, "W-F1": 2 / 3, "macro F1": 5 / 9})
    assert after["strict"] == after["in the text"] == pytest.approx({"accuracy": 0.75, "W-F1": 2 / 3, "macro F1": 5 / 9})
    assert (before["iou"], before["valid"], before["emotions"]) == (0.375, 0.75, pytest.approx(4 / 3))
    assert (before["gold_most"], before["share_of_it_in_gold"], before["in_the_text"]) == ("joy", 0.5, 0.5)
    ((name, pair),) = found["pairs"].items()
    assert name == f"{files[0]} -> {files[1]}"
    strict, text = pair["strict"], pair["in the text"]
    assert (strict["only_after"], strict["only_before"], strict["p"]) == (2, 1, 1.0)
    assert (text["only_after"], text["only_before"], text["p"]) == (1, 1, 1.0)
    assert [strict[k][0] for k in ("accuracy", "W-F1", "macro F1")] == pytest.approx([1 / 4, 1 / 6, 1 / 9])
    assert [text[k][0] for k in ("accuracy", "W-F1", "macro F1")] == pytest.approx([0, 0, 0])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (WHOLE.format("{'fear': 0.3, 'joy': 0.8}"), "fear"),  # the first, not the heaviest
        ("He shows joy.</think>{'last_emotions': {'anger': 1.0}, 'my_em", "anger"),  # the dictionary before the text
        ("The speaker shows joy.</think>{'last_emotions': {'rage': 1.0}}", "joy"),  # no label there
        ('{"last_emotions":{"joy":1}}', "joy"),
        ("joyful, fearsome; then fear", "fear"),  # whole words alone
        ("nothing of the kind", None),
        ("", None),
    ],
)
def test_the_first_emotion_that_an_answer_names(text, label):
    assert paired.first_named(text, ["anger", "fear", "joy"]) == label


def test_a_label_may_hold_signs_of_a_regular_expression():
    assert paired.first_named("he is a+b", ["(c", "a+b"]) == "a+b"


NAMES = st.sampled_from(("joy", "fear", "anger"))
SAMPLES = st.lists(st.tuples(NAMES, NAMES | st.none(), NAMES | st.none()), min_size=1, max_size=20)


KINDS = st.lists(st.tuples(NAMES, NAMES | st.none(), st.integers(0, 3)), min_size=1)


@given(KINDS.filter(lambda kinds: any(times for *_, times in kinds)))
def test_counted_scores_are_those_of_evaluate(kinds):
    """Some kinds of sample are not drawn at all; a class that then occurs nowhere is not part of macro F1."""
    gold, pred, times = (list(side) for side in zip(*kinds, strict=True))
    drawn_gold, drawn_pred, _ = zip(*[kind for kind in kinds for _ in range(kind[2])], strict=True)
    clear = [score(gold=drawn_gold, pred=drawn_pred) for score in (accuracy, weighted_f1, macro_f1)]
    assert f1_scores(np.array([times]), gold, pred)[0] == pytest.approx(clear)


@given(SAMPLES)
def test_differences_turn_with_the_sides_and_do_not_care_for_order(samples):
    gold, a, b = (list(side) for side in zip(*samples, strict=True))
    found = f1_differences(gold, a, b, draws=200)
    for (x, low, high), (y, *_) in zip(found, f1_differences(gold, b, a, draws=200), strict=True):
        assert x == pytest.approx(-y) and -1 <= low <= high <= 1
    back = f1_differences(gold[::-1], a[::-1], b[::-1], draws=200)
    assert [x for x, *_ in back] == pytest.approx([x for x, *_ in found])
    assert f1_differences(gold, a, a, draws=200) == [(0.0, 0.0, 0.0)] * 3


def test_the_interval_is_that_of_samples_drawn_again():
    """100 samples: both models have 70 right, a 20 more. The standard error of the difference .2 is sqrt((.2 - .2^2) / 100)
    = .04, so the interval is about .2 +- 1.96 * .04 = .122 to .278. With one class W-F1 is 2 * accuracy / (1 + accuracy):
    .7 -> .8235, .9 -> .9474."""
    gold, a, b = ["joy"] * 100, ["joy"] * 90 + [None] * 10, ["joy"] * 70 + [None] * 30
    (x, low, high), (w, w_low, w_high), _ = f1_differences(gold, a, b)
    assert (x, low, high) == pytest.approx((0.2, 0.122, 0.278), abs=0.011)
    assert w == pytest.approx(0.9474 - 0.8235, abs=1e-4) and 0.05 < w_low < w < w_high < 0.2


def test_only_samples_that_all_files_have_are_compared(files, tmp_path):
    part = write(tmp_path / "part.jsonl", [row(2, "fear", {"fear": 1.0}), row(9, "joy", {"joy": 1.0})])
    for order in ([*files, part], [files[0], part, files[1]], [part, *files]):
        found = paired.compare(order)["world"]
        assert found["samples"] == 1 and len(found["pairs"]) == 3


def test_datasets_stand_apart(files, tmp_path):
    both = []
    for path in files:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        again = [x | {"id": "other/test/0/0"} for x in rows if x["id"] == "world/test/0/0"]
        both.append(write(tmp_path / f"two-{path.name}", rows + again))
    gold = [paired.shared(both)[name][0][0].gold for name in ("world", "other")]
    assert gold == ["joy", "joy"] and paired.compare(both[:1] + [files[0]]).keys() == {"world"}


def test_what_cannot_be_compared_is_said_in_one_line(files, tmp_path):
    other = write(tmp_path / "other.jsonl", [row(7, "joy", {"joy": 1.0})])
    turned = write(tmp_path / "turned.jsonl", [row(0, "fear", {"joy": 1.0})])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "world/test/0/0"}\n', encoding="utf-8")
    for wrong, said in (
        ([files[0], other], "no sample is in all of"), ([files[0], turned], "world/test/0/0 has another gold label"),
        ([files[0], broken], "does not hold answers"), ([files[0], tmp_path / "none.jsonl"], "missing or empty"),
        ([files[0], files[0]], "two or more files"), (files[:1], "two or more files"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            paired.compare(wrong)


def test_the_command_prints_two_tables_and_all_numbers(files, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paired", *map(str, files)])
    assert status_of(paired.main) == 0
    out = capsys.readouterr().out
    assert "| world, 4 | accuracy |" in out and "joy (gold 50.0)" in out
    assert f"| {files[0]} | 50.0 | 50.0 | 44.4 | 37.5 | 75.0 | 1.33 | 75.0 | 66.7 | 55.6 | 50.0 |" in out
    assert f"| {files[0]} -> {files[1]}, strict | 2 / 1, p = 1 | +0.250 [" in out
    number = json.loads(out.splitlines()[-1])["world"]["pairs"][f"{files[0]} -> {files[1]}"]["strict"]["macro F1"][0]
    assert math.isclose(number, 1 / 9)
