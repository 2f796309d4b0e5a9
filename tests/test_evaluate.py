"""Metrics worked by hand, then held against scikit-learn; the lenient reading; entropies of the parts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import lines, status_of
from endpoint import completion, serving
from test_iemocap import release

import evaluate
from analysis import scoring
from analysis.compare import mcnemar, paired_interval, read_baseline
from analysis.table1 import rendered, spread, summary
from common.errors import UserError
from corpora.dialogue import Turn
from data import Failure, Output, Responder, Sample, heaviest
from evaluate import (
    accuracy,
    class_scores,
    macro_f1,
    majority,
    parse_lenient,
    report,
    score,
    span_entropies,
    weighted_f1,
)
from experts import asking

ROOT = Path(__file__).resolve().parent.parent

LABELS = ("neutral", "joy", "anger")
GOLD = ["neutral", "neutral", "neutral", "joy", "joy", "anger"]
PRED = ["neutral", "neutral", "joy", "joy", None, "neutral"]


def sample(number=0, gold=None, labels=LABELS):
    return Sample(
        id=f"world/test/{number}/1",
        dataset="world",
        context=(Turn("Ann", "Hello."), Turn("Bo", "Well.")),
        responder=Responder("Ann", None, "next"),
        labels=labels,
        gold=gold or {"joy": 1.0},
    )


def output(**last):
    return Output("because", last, {"joy": 1.0}, "Hm.", {})


def answer(last="{'joy': 0.8, 'anger': 0.2}", before="<think>because</think>", after=""):
    return f"{before}{{'last_emotions': {last}, 'my_emotions': {{'joy': 1.0}}, 'my_output': 'Hm.'}}{after}"


# Metrics


def test_accuracy_counts_a_missing_answer_as_wrong():
    """Right: two neutral and one joy of six."""
    assert accuracy(gold=GOLD, pred=PRED) == 0.5


def test_class_scores():
    """Neutral: named 3, real 3, hits 2: 2/3 each. Joy: named 2, real 2, hit 1. Anger: never named, 0/0 is 0."""
    assert class_scores("neutral", gold=GOLD, pred=PRED) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert class_scores("joy", gold=GOLD, pred=PRED) == (0.5, 0.5, 0.5)
    assert class_scores("anger", gold=GOLD, pred=PRED) == (0.0, 0.0, 0.0)
    assert class_scores("joy", gold=["joy", "joy", "anger"], pred=["joy", None, "anger"]) == (1.0, 0.5, 2 / 3)


def test_weighted_and_macro_f1():
    """(3 * 2/3 + 2 * 1/2 + 1 * 0)/6 = 1/2 and (2/3 + 1/2 + 0)/3 = .388889."""
    assert weighted_f1(gold=GOLD, pred=PRED) == pytest.approx(0.5, abs=1e-12)
    assert macro_f1(gold=GOLD, pred=PRED) == pytest.approx(0.388889, abs=1e-6)


def test_macro_f1_counts_a_class_that_only_the_model_names_and_no_class_that_nobody_names():
    """Gold joy, joy; named joy, anger: joy F1 2/3, anger 0: 1/3. Fear and neutral occur nowhere and do not count."""
    assert macro_f1(gold=["joy", "joy"], pred=["joy", "anger"]) == pytest.approx(1 / 3, abs=1e-12)


def test_gold_and_predictions_cannot_be_swapped():
    """F1 weighted by the support of the wrong side is another number, a known fault elsewhere, so both are keywords.
    Gold joy 1, anger 2, always named joy: F1 of joy 2/4, weight 1/3: 1/6. The other way round joy weighs 3/3: 1/2."""
    with pytest.raises(TypeError):
        weighted_f1(GOLD, PRED)  # type: ignore[misc]
    assert weighted_f1(gold=["joy", "joy", "anger"], pred=["joy", "anger", "anger"]) == pytest.approx(2 / 3)
    assert weighted_f1(gold=["joy", "anger", "anger"], pred=["joy", "joy", "joy"]) == pytest.approx(1 / 6)
    assert weighted_f1(gold=["joy", "joy", "joy"], pred=["joy", "anger", "anger"]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", range(20))
def test_f1_equals_scikit_learn(seed):
    """Random labels with misses; a miss is a class of its own that gold never has."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: requirements-extra.txt")
    import random

    draw = random.Random(seed)
    gold = draw.choices(LABELS, weights=[6, 3, 1], k=40)
    pred = draw.choices([*LABELS, None], weights=[5, 3, 1, 1], k=40)
    named = [p or "(none)" for p in pred]
    present = sorted({*gold, *pred} - {None})
    assert weighted_f1(gold=gold, pred=pred) == pytest.approx(
        metrics.f1_score(gold, named, average="weighted", zero_division=0), abs=1e-12
    )
    assert macro_f1(gold=gold, pred=pred) == pytest.approx(
        metrics.f1_score(gold, named, labels=present, average="macro", zero_division=0), abs=1e-12
    )
    assert accuracy(gold=gold, pred=pred) == pytest.approx(metrics.accuracy_score(gold, named), abs=1e-12)


def test_mcnemar_is_the_exact_binomial():
    """Only a right 1 time, only b 5 times: 2 * (C(6,0) + C(6,1))/64 = 14/64. No difference: p 1. 3 against 3: 1."""
    a = [True] * 1 + [False] * 5 + [True] * 4
    b = [False] * 1 + [True] * 5 + [True] * 4
    assert mcnemar(a, b) == (1, 5, 0.21875)
    assert mcnemar(b, a) == (5, 1, 0.21875)
    assert mcnemar(a, a) == (0, 0, 1.0)
    assert mcnemar([True] * 3 + [False] * 3, [False] * 3 + [True] * 3) == (3, 3, 1.0)


def test_mcnemar_of_thousands_does_not_overflow():
    """0 against 2,000: 2/2^2000 = 2^-1999, which a float cannot hold: 0, and no error. 1,000 against 1,000: 1."""
    assert mcnemar([False] * 2000, [True] * 2000) == (0, 2000, 0.0)
    assert mcnemar([True, False] * 1000, [False, True] * 1000)[2] == 1.0


def test_paired_interval():
    """100 pairs, a right alone in 30, b alone in 10: +.2; variance (.4 - .04)/100, sd .06: about .2 -+ 1.96 * .06."""
    a = [True] * 30 + [False] * 10 + [True] * 60
    b = [False] * 30 + [True] * 10 + [True] * 60
    difference, low, high = paired_interval(a, b)
    assert difference == 0.2
    assert low == pytest.approx(0.0824, abs=0.02) and high == pytest.approx(0.3176, abs=0.02)
    assert paired_interval(a, b) == paired_interval(a, b)
    assert paired_interval(a, b, seed=1, draws=100) != paired_interval(a, b, seed=2, draws=100)
    assert paired_interval(a, a) == (0.0, 0.0, 0.0)


def test_the_heaviest_entry_counts_and_the_first_of_equals():
    assert heaviest({"joy": 0.2, "anger": 0.7, "fear": 0.5}) == "anger"
    assert heaviest({"joy": 0.5, "anger": 0.5}) == "joy"
    assert heaviest({"anger": 0.5, "joy": 0.5}) == "anger"


def test_score_of_four_answers():
    """Gold joy .65 anger .35 is joy. Answers: the same; anger 1 (IOU .35/1.65); failed twice, once for each reason.
    Accuracy 1/4; IOU (1 + .212121 + 0 + 0)/4 = .303030; valid 2 of 4; W-F1: joy 3 real, named 1, hit 1: 2/4 = .5,
    neutral 1 real: 0; (3 * .5)/4 = .375; macro over joy, neutral, anger: .5/3."""
    soft = {"joy": 0.65, "anger": 0.35}
    samples = [sample(0, soft), sample(1, soft), sample(2, soft), sample(3, {"neutral": 1.0})]
    parses = [output(joy=1.3, anger=0.7), output(anger=1.0), Failure("think", ""), Failure("dictionary", "")]
    scores = score(samples, parses)
    assert scores.metrics("eval/world/") == {
        "eval/world/acc": 0.25,
        "eval/world/wf1": pytest.approx(0.375),
        "eval/world/macro_f1": pytest.approx(1 / 6),
        "eval/world/iou": pytest.approx(0.303030, abs=1e-6),
        "eval/world/rule_rate": 0.5,
    }
    assert scores.correct == [True, False, False, False]
    assert dict(scores.confusion()["joy"]) == {"neutral": 0, "joy": 1, "anger": 1, None: 1}


def test_majority_baseline():
    """Always joy: right where soft gold is .65 joy and where it is all joy; IOU .65/1.35, 1, 0 for neutral: .493827."""
    found = majority([sample(0, {"joy": 0.65, "anger": 0.35}), sample(1, {"joy": 1.0}), sample(2, {"neutral": 1.0})])
    assert found.metrics()["acc"] == pytest.approx(2 / 3)
    assert found.metrics()["iou"] == pytest.approx(0.493827, abs=1e-6)


def test_table_shows_every_class_and_every_reason():
    parses = [output(joy=1.0), output(anger=1.0), Failure("think", ""), Failure("think", ""), Failure("label", "")]
    lines = score([sample(i) for i in range(5)], parses).table().splitlines()
    assert lines[0].split() == ["gold", "n", "P", "%", "R", "%", "F1", "%", "|", *LABELS, "(none)"]
    assert lines[2].split() == ["joy", "5", "100.00", "20.00", "33.33", "|", "0", "1", "1", "3"]
    assert lines[4] == "no valid output: 3 of 5 (think 2, label 1)"
    assert score([sample()], [output(joy=1.0)]).table().splitlines()[-1] == "no valid output: 0 of 1"


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="nothing to score"):
        score([], [])


# Reports and comparisons


def test_report_averages_datasets_and_shows_majority_and_lenient_beside():
    """a: one of two right (the second is fenced, which only the lenient reading forgives); b: one of one: (.5 + 1)/2."""
    fenced = answer(before="<think>because</think>```python\n", after="\n```")
    datasets = {"a": [sample(0), sample(1)], "b": [sample(2)]}
    answers = {"a": [(answer(), True), (fenced, True)], "b": [(answer(), True)]}
    text, numbers = report(datasets, answers, lenient=True)
    rows = numbers["scores"]
    assert [name for name in rows] == ["a", "b", "average", "a, majority", "a, lenient", "b, majority", "b, lenient"]
    assert [rows[name]["acc"] for name in ("a", "b", "average", "a, lenient")] == [0.5, 1.0, 0.75, 1.0]
    assert numbers["samples"] == {"a": 2, "b": 1}
    assert "no valid output: 1 of 2 (dictionary 1)" in text
    assert json.loads(json.dumps(numbers)) == numbers
    assert "average" not in report({"b": datasets["b"]}, answers)[1]["scores"]


def test_report_scores_the_clean_part_beside_the_whole():
    """a: right, wrong, right, and the wrong one is not clean: 2/3 of all, 2/2 of the clean ones. b: nothing is clean."""
    datasets = {"a": [sample(i) for i in range(3)], "b": [sample(3)]}
    answers = {"a": [(answer(), True), (answer("{'anger': 1.0}"), True), (answer(), True)], "b": [(answer(), True)]}
    unclean = {"world/test/1", "world/test/3", "world/test/99"}
    text, numbers = report(datasets, answers, unclean=unclean)
    rows = numbers["scores"]
    assert list(rows) == ["a", "b", "average", "a, clean", "a, majority", "b, majority"]
    assert (rows["a"]["acc"], rows["a, clean"]["acc"]) == (pytest.approx(2 / 3), 1.0)
    assert numbers["samples"] == {"a": 3, "b": 1} and numbers["clean_samples"] == {"a": 2}
    assert "a, clean" in text
    rows = report(datasets, answers, unclean=set())[1]["scores"]
    assert rows["average, clean"] == rows["average"] and rows["a, clean"] == rows["a"]
    assert report(datasets, answers)[1]["clean_samples"] == {}


def test_report_reads_a_cut_answer_as_a_failure():
    assert report({"a": [sample()]}, {"a": [(answer(), False)]})[1]["scores"]["a"]["rule_rate"] == 0.0


def test_report_compares_with_a_baseline_by_sample_id():
    """Ours: right, right, wrong. Theirs: wrong, right, right."""
    samples = [sample(i) for i in range(3)]
    answers = [(answer(), True), (answer(), True), (answer("{'anger': 1.0}"), True)]
    theirs = {"world/test/2/1": True, "world/test/0/1": False, "world/test/1/1": True}
    compared = report({"a": samples}, {"a": answers}, baseline=theirs)[1]["compared"]["a"]
    assert (compared["only_this"], compared["only_baseline"], compared["mcnemar_p"]) == (1, 1, 1.0)
    assert compared["acc_difference"] == 0.0 and compared["low"] < 0 < compared["high"]


def test_read_baseline_wants_every_sample(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "world/test/0/1", "correct": true}\n', encoding="utf-8")
    assert read_baseline(path, {"a": [sample(0)]}) == {"world/test/0/1": True}
    with pytest.raises(UserError, match="lacks 1 samples, the first world/test/5/1"):
        read_baseline(path, {"a": [sample(0), sample(5)]})
    for text in ("no json\n", "[1]\n", '{"id": 1}\n'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="does not hold answers"):
            read_baseline(path, {"a": [sample(0)]})


def test_summary_is_in_percent():
    row = {"acc": 0.6774, "wf1": 0.67, "macro_f1": 0.5, "iou": 0.41, "rule_rate": 1.0}
    assert summary({"meld": row}).splitlines()[1].split() == ["meld", "67.74", "67.00", "50.00", "41.00", "100.00"]


# The lenient reading


@pytest.mark.parametrize(
    "text",
    [
        answer(before=""),
        answer(before="```json\n", after="\n```"),
        answer(after=" I hope {this} helps."),
        answer("{'anger': 1.0}") + "\nNo: " + answer(before=""),
        answer(before="<think>{a {b} c"),
    ],
)
def test_lenient_takes_the_last_dictionary_that_keeps_the_contract(text):
    assert isinstance(parse_lenient(text, LABELS), Output)
    assert parse_lenient(text, LABELS).last_emotions == {"joy": 0.8, "anger": 0.2}


def test_lenient_still_fails_what_breaks_the_contract():
    for text in ("", "{", "}{", answer("{'rage': 1.0}"), answer("{'joy': 2.0}"), "{'last_emotions': {'joy': 1.0}}"):
        assert isinstance(parse_lenient(text, LABELS), Failure)


# Entropies of the three parts


class Letters:
    """A tokenizer of byte pieces. A character cut in the middle decodes to one U+FFFD a byte, as byte fallback does."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        raw = b"".join(self.pieces[i] for i in ids)
        text = raw.decode(errors="ignore")
        return text + "\ufffd" * (len(raw) - len(text.encode()))


def test_task_entropies_align_characters_with_tokens():
    """Text ab{x}{yz}"q": parts {x} = chars 2-5, {yz} = 5-9, "q" = 9-12, after a prefix of two. Tokens: `a`, `b{`, `x}{`,
    `yz`, `}"q`, `"`, end. A token counts for every part it wrote in: {x} from tokens 1, 2; {yz} from 2, 3, 4; "q" 4, 5."""
    tokenizer = Letters([b"a", b"b{", b"x}{", b"yz", b'}"q', b'"', b"<end>"])
    entropies = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    spans = {"last_emotions": (4, 7), "my_emotions": (7, 11), "my_output": (11, 14)}
    means = span_entropies(entropies, range(7), tokenizer, "PP", spans)
    assert means == {"recognition": 3.0, "self_emotion": 28 / 3, "response": 24.0}


def test_task_entropies_survive_characters_split_over_tokens():
    """An emoji of four bytes, a byte per token, before the part: the half-read ones must not shift it."""
    tokenizer = Letters([bytes([b]) for b in "😀".encode()] + [b"{x", b"}"])
    means = span_entropies([0, 0, 0, 0, 3.0, 5.0], range(6), tokenizer, "", {"my_emotions": (1, 4)})
    assert means == {"self_emotion": 4.0}


# The command


@pytest.fixture
def folder(tmp_path):
    """A random model, two data folders of three labelled turns each, and prompts its tokenizer knows no word of."""
    lm = tiny.tiny()
    lm.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(str(tmp_path / "model"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.json").write_text('["neutral", "joy"]', encoding="utf-8")
        turns = [{"speaker": s, "text": "w1", "label": label} for s, label in (("x", "joy"), ("y", "joy"), ("x", "neutral"))]
        for split in ("train", "dev", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps({"id": "d", "turns": turns}) + "\n", encoding="utf-8")
    return tmp_path


def command(monkeypatch, capsys, folder, *arguments):
    words = ["score", "--model", folder / "model", "--data", f"a={folder / 'a'}", "--max_new_tokens", "3", *arguments]
    return run(monkeypatch, capsys, *words)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    status = status_of(evaluate.main)
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("error: ")]


def test_a_model_of_nans_is_one_line(monkeypatch, capsys, folder):
    lm = tiny.tiny()
    for parameter in lm.parameters():
        parameter.data.fill_(math.nan)
    lm.save_pretrained(folder / "model")
    code, _, errors = command(monkeypatch, capsys, folder)
    assert code == 2 and errors == [f"error: {folder / 'model'}: a logit is NaN or infinite; take another model"]


def test_the_command_scores_a_model_and_pairs_it_with_its_own_answers(monkeypatch, capsys, folder):
    """A random model names no emotion: nothing right, the majority 2/3 right. Against itself: no difference, p = 1."""
    both = ("--data", f"b={folder / 'b'}", "--out", folder / "out.jsonl", "--lenient", "true")
    code, out, _ = command(monkeypatch, capsys, folder, *both)
    numbers = json.loads(out.splitlines()[-1])
    assert code == 2 and numbers["samples"] == numbers["clean_samples"] == {"a": 3, "b": 3}
    assert numbers["scores"]["average"]["acc"] == 0.0 and numbers["scores"]["a, majority"]["acc"] == pytest.approx(2 / 3)
    assert "no valid output: 3 of 3" in out and "a, lenient" in out
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [f"{name}/test/d/{i}" for name in "ab" for i in range(3)]
    assert all(row["predicted"] is None and row["correct"] is False and row["parse"]["reason"] for row in rows)
    code, out, _ = command(monkeypatch, capsys, folder, "--baseline", folder / "out.jsonl", "--limit", "2")
    numbers = json.loads(out.splitlines()[-1])
    assert code == 2 and numbers["samples"] == {"a": 2} and numbers["compared"]["a"]["mcnemar_p"] == 1.0


def test_what_is_clean_depends_on_the_train_splits_of_all_the_data(folder):
    """a/test has d, which shares its two long lines with b/train alone, and e, which shares one of them."""
    long = ["We never said that it was easy.", "Now the kettle is cold again, Ann."]

    def write(name, split, **dialogues):
        rows = [
            {"id": key, "turns": [{"speaker": "Ann", "text": text, "label": "joy"} for text in texts]}
            for key, texts in dialogues.items()
        ]
        path = folder / name / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("a", "test", d=long, e=long[:1])
    write("b", "train", x=[text.upper() for text in long])
    pairs = tuple(f"{name}={folder / name}" for name in "ab")
    command = scoring.ScoreCommand(model="", data=pairs)
    assert scoring.unclean(command) == {"a/test/d"}
    assert scoring.unclean(scoring.ScoreCommand(model="", data=pairs[:1])) == set()
    assert scoring.unclean(scoring.ScoreCommand(model="", data=pairs, split="train")) is None
    (folder / "b/train.jsonl").unlink()
    assert scoring.unclean(command) is None


def test_context_and_votes_of_iemocap_reach_the_samples(tmp_path):
    """Of the invented release's first dialogue, F001 is the third labelled turn and the fifth of all."""
    pairs = (f"iemocap={release(tmp_path / 'IEMOCAP_full_release')}",)
    for options, turns, gold in (
        ({}, 3, {"happy": 1.0}),
        ({"context": "all", "soft_labels": True}, 5, {"happy": 0.5, "sad": 0.5}),
    ):
        command = scoring.ScoreCommand(model="", data=pairs, split="train", **options)
        chosen = next(s for s in scoring.datasets_of(command)["iemocap"] if s.id.endswith("impro99/F001"))
        assert (len(chosen.context), chosen.gold) == (turns, gold)


def test_limit_takes_the_same_samples_every_time_and_gold_replaces_labels(folder):
    fields = {"model": "", "data": (f"a={folder / 'a'}",)}
    first = scoring.datasets_of(scoring.ScoreCommand(**fields, limit=2))["a"]
    assert first == scoring.datasets_of(scoring.ScoreCommand(**fields, limit=2))["a"] and len(first) == 2
    seeds = [scoring.datasets_of(scoring.ScoreCommand(**fields, limit=2, seed=(i,)))["a"] for i in range(9)]
    ids = [[sample.id for sample in drawn] for drawn in seeds]
    assert any(drawn != ids[0] for drawn in ids) and all(drawn == sorted(drawn) for drawn in ids)
    (folder / "gold.jsonl").write_text('{"id": "a/test/d/1", "weights": {"neutral": 1.0}}\n', encoding="utf-8")
    replaced = scoring.datasets_of(scoring.ScoreCommand(**fields, gold=folder / "gold.jsonl"))["a"]
    assert [sample.gold for sample in replaced] == [{"joy": 1.0}, {"neutral": 1.0}, {"neutral": 1.0}]
    with pytest.raises(UserError, match="no id belongs to the dev split of a"):
        scoring.datasets_of(scoring.ScoreCommand(**fields, split="dev", gold=folder / "gold.jsonl"))


def test_several_models_and_seeds_are_scored_with_mean_and_spread(monkeypatch, capsys, folder):
    """Two folders, two seeds: four lines, four files. A random model has 0 everywhere, so the spread is 0, too."""
    more = ("--model", folder / "model", "--seed", "3", "4", "--temperature", "1", "--table", "markdown", "--limit", "2")
    code, out, (error,) = command(monkeypatch, capsys, folder, *more, "--out", folder / "scores.jsonl")
    numbers = json.loads(out.splitlines()[-1])
    assert code == 2 and all(f"seed {n}: none of 2 answers is valid" in error for n in (3, 4)) and "scores-4.jsonl" in error
    assert [run["seed"] for run in numbers["runs"]] == [3, 4, 3, 4]
    assert numbers["mean"]["a"]["acc"] == numbers["std"]["a"]["acc"] == 0.0
    texts = [[row["text"] for row in lines(folder / f"scores-{n}.jsonl")] for n in (1, 2, 3, 4)]
    assert texts[0] == texts[2] != texts[1] == texts[3]
    assert out.splitlines()[-2] == "| mean +- std | 0.00 +- 0.00 | 0.00 +- 0.00 |"


@pytest.mark.parametrize(("given", "computes"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")])
def test_the_model_computes_in_the_type_that_is_asked_for(monkeypatch, capsys, folder, given, computes):
    """As a run with the same --dtype does in its evaluations."""
    if torch.cuda.is_available():
        pytest.skip("auto is bfloat16 on a GPU")
    seen, real = [], asking.generate
    monkeypatch.setattr(asking, "generate", lambda policy, *a, **kw: seen.append(policy.lm.dtype) or real(policy, *a, **kw))
    command(monkeypatch, capsys, folder, *given)
    assert {str(dtype) for dtype in seen} == {f"torch.{computes}"}


def test_an_endpoint_is_scored_once(monkeypatch, capsys, folder):
    """It says joy to two samples that are joy and one that is neutral: 2/3. The second call asks nothing."""
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(lambda body, number: completion(answer("{'joy': 1.0}"))) as server:
        words = ["score", "--model", server.url, "--model_name", "m", "--data", f"a={folder / 'a'}"]
        ends = [run(monkeypatch, capsys, *words, "--out", folder / "o.jsonl") for _ in range(2)]
        assert len(server.seen) == 3 and server.seen[0]["temperature"] == 0.0
    for code, out, _ in ends:
        numbers = json.loads(out.splitlines()[-1])
        assert code == 0 and numbers["model"] == "m" and numbers["scores"]["a"]["acc"] == pytest.approx(2 / 3)
    assert [row["predicted"] for row in lines(folder / "o.jsonl")] == ["joy"] * 3 and (folder / "o.jsonl.cache").exists()


def test_a_sample_without_an_answer_is_no_wrong_answer(monkeypatch, capsys, folder):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "*")
    refused = (500, b"", {"x-should-retry": "false"})
    with serving(lambda body, number: refused if number == 2 else completion(answer("{'joy': 1}"))) as server:
        words = ["score", "--model", server.url, "--model_name", "m", "--data", f"a={folder / 'a'}", "--cache", folder / "c"]
        code, _, errors = run(monkeypatch, capsys, *words)
        assert code == 2 and "1 samples have no answer (HTTP 500" in errors[0]
        assert run(monkeypatch, capsys, *words)[0] == 0 and len(server.seen) == 4


def test_a_sample_that_is_refused_for_good_is_not_promised_to_be_asked_again(monkeypatch, capsys, folder):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "*")
    refused = (400, {"error": {"message": "too long"}}, {})
    with serving(lambda body, number: refused if number == 2 else completion(answer())) as server:
        words = ["score", "--model", server.url, "--model_name", "m", "--data", f"a={folder / 'a'}", "--cache", folder / "c"]
        code, _, (error,) = run(monkeypatch, capsys, *words)
    assert code == 2 and "(HTTP 400: too long): it will be refused again" in error and "asks for those again" not in error


def test_no_valid_answer_at_all_is_said_with_the_reason_and_the_scores_are_there(monkeypatch, capsys, folder):
    """Of three answers two lack the think block, and one names no label: accuracy 0, but not for want of feeling."""
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "*")
    said = ("Sure! Here it is.", answer("{'pride': 1.0}"), "Sure!")
    with serving(lambda body, number: completion(said[number - 1])) as server:
        words = ["score", "--model", server.url, "--model_name", "m", "--data", f"a={folder / 'a'}", "--out", folder / "o"]
        code, out, (error,) = run(monkeypatch, capsys, *words, "--concurrency", "1")
    assert code == 2 and json.loads(out.splitlines()[-1])["scores"]["a"]["acc"] == 0.0 and len(lines(folder / "o")) == 3
    assert error.startswith("error: m: none of 3 answers is valid, most often for 'think' (2), such as a/test/d/0: no <th")
    assert "begins with 'Sure! Here it is.'" in error and error.endswith(f"see {folder / 'o'}")


RUNS = [{"a": {"acc": 0.5, "wf1": 0.4}, "average": {"acc": 0.7, "wf1": 0.2}},
        {"a": {"acc": 0.6, "wf1": 0.4}, "average": {"acc": 0.7, "wf1": 0.3}}]  # fmt: skip


def test_mean_and_spread_by_hand():
    """.5 and .6: mean .55, deviation sqrt(2 * .05^2/1) = .070711. A row that one run lacks is left out."""
    means, stds = spread([{**RUNS[0], "a, clean": {"acc": 1.0, "wf1": 1.0}}, RUNS[1]])
    assert means["a"] == pytest.approx({"acc": 0.55, "wf1": 0.4}) and stds["a"]["acc"] == pytest.approx(0.070711, abs=1e-6)
    assert list(means) == list(stds) == ["a", "average"]


def test_table_1_in_three_forms():
    shown = rendered("markdown", ["x|y", "z"], RUNS, ["a", "average"]).splitlines()
    assert shown[0] == "|  | a Acc. | a W-F1 | AVG Acc. | AVG W-F1 |"
    assert shown[2] == r"| x\|y | 50.00 | 40.00 | 70.00 | 20.00 |"
    assert shown[4] == "| mean +- std | 55.00 +- 7.07 | 40.00 +- 0.00 | 70.00 +- 0.00 | 25.00 +- 7.07 |"
    assert len(rendered("markdown", ["z"], RUNS[1:], ["a"]).splitlines()) == 3
    shown = rendered("latex", ["x_y", "50%"], RUNS, ["a"]).splitlines()
    assert shown[0] == r"\begin{tabular}{lrr}" and shown[4] == r"x\_y & 50.00 & 40.00 \\" and shown[5].startswith(r"50\% &")
    assert shown[6] == r"mean $\pm$ std & 55.00 $\pm$ 7.07 & 40.00 $\pm$ 0.00 \\"
    assert rendered("text", ["z"], RUNS[1:], ["a"]).splitlines() == ["  a Acc. a W-F1", "z  60.00  40.00"]


def test_personas_of_a_file_are_shown_and_kept(monkeypatch, folder):
    person = {"dialogue": "a/test/d", "speaker": "y", "persona": "a calm clerk", "expert": "e"}
    (folder / "p.jsonl").write_text(json.dumps(person) + "\n", encoding="utf-8")
    fields = {"model": (), "data": (f"a={folder / 'a'}",), "personas": folder / "p.jsonl"}
    shown = scoring.datasets_of(scoring.ScoreCommand(**fields, persona_scope="dialogue"))["a"]
    rows = evaluate.prediction_rows(shown, [(answer(), True)] * 3)
    assert [row["persona"] for row in rows] == ["a calm clerk", None, "a calm clerk"]
    hidden = scoring.datasets_of(scoring.ScoreCommand(**fields))["a"]
    assert {sample.responder.persona for sample in hidden} == {None}


@pytest.mark.parametrize("words", [("--model", "m"), ("--data", "a=b"), ()])
def test_nothing_to_score_or_to_score_on(monkeypatch, capsys, words):
    code, _, errors = run(monkeypatch, capsys, "score", *words)
    assert code == 2 and errors == ["error: give --model and --data NAME=DIR"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "0", "1"), "greedy answers know no seed"),
        (("--model", "https://h/v1"), "1 --model, 1 of them URLs, and 0 --model_name"),
        (("--model_name", "m"), "0 --model, 0 of them URLs, and 1 --model_name"),
        (("--model", "https://h/v1", "--model_name", "m"), "give --out FILE or --cache FILE"),
        (("--data", "b"), "give NAME=DIR"),
        (("--data", "a=elsewhere"), "every name once"),
        (("--data", "b=/nowhere/at/all"), "/nowhere/at/all"),
        (("--out", "/nowhere/at/all/out.jsonl"), "/nowhere/at/all does not exist"),
        (("--baseline", "/nowhere/answers.jsonl"), "/nowhere/answers.jsonl is missing or empty"),
        (("--prompts", "/nowhere/prompts.json"), "/nowhere/prompts.json does not exist"),
        (("--model", "/nowhere/model"), "/nowhere/model"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(monkeypatch, capsys, folder, arguments, message):
    code, _, errors = command(monkeypatch, capsys, folder, *arguments)
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_the_command_says_its_scores_and_nothing_of_the_library(place):
    """In a process of its own: the suite has silenced transformers already."""
    root = place.root
    flags = ["--model", root / "base", "--data", f"tiny={root / 'world'}", "--prompts", root / "prompts.json"]
    command = [sys.executable, "evaluate.py", "score", *map(str, flags), "--limit", "2", "--max_new_tokens", "24"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("Loading")) == (0, 0), done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == {"tiny": 2}
