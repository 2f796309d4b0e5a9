"""Wrong training labels: who gets which, what a run and its audit make of them, and the study of them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from analysis import audit
from analysis.compare import t_interval, t_quantile
from analysis.consensus import NAMES, consensus, shares
from common.errors import UserError
from common.flags import pairs
from corpora.dialogue import Turn
from data import Responder, Sample, heaviest
from tools import ablate, bands, noise
from training import config, task

LABELS = ("joy", "anger", "neutral")


def sample(gold, name="d0/0", context=(), following=None, labels=LABELS):
    return Sample(f"tiny/train/{name}", "tiny", context, Responder("Bo", None, "next"), labels, gold, following=following)


@pytest.mark.parametrize(
    ("chance", "place", "gold", "expected"),
    [
        (0.199, 0.49, {"joy": 0.75, "neutral": 0.25}, {"anger": 0.75, "neutral": 0.25}),
        (0.199, 0.5, {"joy": 0.75, "neutral": 0.25}, {"neutral": 0.75, "joy": 0.25}),
        (0.199, 0.5, {"joy": 0.2, "anger": 0.4}, {"joy": 0.2, "neutral": 0.4}),
        (0.199, 0.99, {"anger": 0.5, "joy": 0.5}, {"neutral": 0.5, "joy": 0.5}),
        (0.2, 0.49, {"joy": 1.0}, {"joy": 1.0}),
    ],
)
def test_the_heaviest_label_changes_places_with_another_one(monkeypatch, chance, place, gold, expected):
    """Rate .2. Other labels in their order: half of [0, 1) is the first one's. In a tie the first entry is the heaviest."""
    monkeypatch.setattr(task, "uniforms", lambda *_: [chance, place])
    found = task.mislabelled(sample(gold), 0.2, 0).gold
    assert (found, heaviest(found)) == (expected, next(e for e in expected if expected[e] == max(expected.values())))


def test_the_only_label_of_a_dataset_stays():
    assert task.mislabelled(sample({"joy": 1.0}, labels=("joy",)), 0.99, 0).gold == {"joy": 1.0}


def test_the_rate_is_the_share_of_wrong_labels_and_each_other_label_is_as_likely():
    """Of 4,000, 1,200 are expected: 29 is the standard deviation. Of 1,200, 600 to each other label: 17."""
    made = [sample({"anger": 1.0}, f"d{i}/0") for i in range(4000)]
    found = [heaviest(task.mislabelled(s, 0.3, 7).gold) for s in made]
    assert 1090 < 4000 - found.count("anger") < 1310
    assert 530 < found.count("joy") < 670


def test_what_is_wrong_at_a_rate_is_wrong_at_a_higher_one_and_another_seed_has_others():
    made = [sample({"anger": 1.0}, f"d{i}/0") for i in range(200)]
    some, more, other = (
        {s.id: task.mislabelled(s, rate, seed).gold for s in made} for rate, seed in ((0.2, 0), (0.4, 0), (0.2, 1))
    )
    wrong = {name for name, gold in some.items() if gold != {"anger": 1.0}}
    assert 20 < len(wrong) < 60 and {name: some[name] for name in wrong} == {name: more[name] for name in wrong}
    assert sum(gold != {"anger": 1.0} for gold in more.values()) > len(wrong)
    assert wrong != {name for name, gold in other.items() if gold != {"anger": 1.0}}


def read(place, *more):
    cfg = config.parse(place.argv("nowhere", *more))
    return task.read_samples(cfg, pairs("data", cfg.data))


def test_only_training_labels_are_wrong_and_a_turn_is_the_same_wherever_it_is_seen(place):
    """The last turn of a context is the sample's own; the one after it is the own turn of the next sample, if labelled."""
    clean, noisy = read(place), read(place, "--label_noise", 0.5)
    assert all(noisy["tiny", split] == clean["tiny", split] for split in ("dev", "test"))
    found = noisy["tiny", "train"]
    changed = [a.id for a, b in zip(found, clean["tiny", "train"], strict=True) if a.gold != b.gold]
    assert 4 < len(changed) < 20 and len(found) == 24
    gold = {s.id: s.gold for s in found}
    for s in found:
        dialogue = s.id.rpartition("/")[0]
        assert s.context[-1].label == s.gold
        assert all(turn.label == gold.get(f"{dialogue}/{i}") for i, turn in enumerate(s.context))
        assert s.following is None or s.following.label == gold.get(f"{dialogue}/{len(s.context)}")


def test_gold_from_a_file_is_noisy_too_and_the_one_hot_row_has_it_once(place, tmp_path):
    """The row's file holds the true labels: a label that was wrong in it as well could become right again."""
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps({"id": "tiny/train/d0/0", "weights": {"joy": 0.6, "anger": 0.4}}) + "\n")
    gold = {s.id: s.gold for s in read(place, "--gold", path, "--label_noise", 0.999)["tiny", "train"]}
    assert heaviest(gold["tiny/train/d0/0"]) != "joy" and sorted(gold["tiny/train/d0/0"].values()) == [0.4, 0.6]
    clean, noisy = (ablate.one_hot_gold(config.parse(place.argv("x", "--label_noise", rate))) for rate in (0, 0.5))
    assert clean == noisy


@pytest.mark.parametrize("rate", [-0.1, 1, "nan", "inf"])
def test_a_rate_outside_is_one_line(place, rate):
    with pytest.raises(UserError, match=r"--label_noise is .*: it is the share of wrong labels, at least 0 and below 1"):
        config.parse(place.argv("nowhere", "--label_noise", rate))


@pytest.fixture(scope="module")
def noisy_run(place):
    out = place.root / "noisy"
    assert place.run(out, "--label_noise", 0.5, "--iterations", 1)[0] == 0
    return out


def test_the_audit_derives_the_noisy_gold_from_the_data(noisy_run, tmp_path):
    """The run keeps its rate; with another one or another seed its gold is not that of the data."""
    settings = json.loads((noisy_run / "config.json").read_text())
    assert settings["label_noise"] == 0.5
    assert audit.audit(noisy_run).problems == ()
    shutil.copytree(noisy_run, tmp_path / "run")
    for other in ({"label_noise": 0.0}, {"seed": 1}):
        (tmp_path / "run" / "config.json").write_text(json.dumps({**settings, **other}))
        assert any(": gold: written " in problem for problem in audit.audit(tmp_path / "run").problems), other


# What the consensus did


BROKEN = {"reason": "think"}


def says(*emotions):
    return {"reason": None, "last_emotions": {emotion: 1.0 - i / 10 for i, emotion in enumerate(emotions)}}


def group(core, gold, rewards, advantages, depth=0, name="a", consistency=None, parses=None, step=0, iteration=1):
    numbers = zip(rewards, advantages, consistency or rewards, parses or [BROKEN] * len(rewards), strict=True)
    answers = [dict(zip(("reward", "advantage", "consistency", "parse"), row, strict=True)) for row in numbers]
    place = {"step": step, "iteration": iteration, "sample_id": name, "depth": depth}
    return {**place, "core": core, "gold": gold, "answers": answers}


def test_shares_of_groups_by_hand():
    """Four groups, three of them of originals.

    a: a tie becomes an order; the label is wrong, the consensus is on clean gold and holds it. b: two answers change
    places; the core is the two clean emotions, the lesser one first. c: a failed group with a wrong label. d: a new sample.
    """
    records = [
        group({"joy": 0.6, "anger": 0.4}, {"anger": 1.0}, [1.0, 0.5, 0.5], [0.9, 0.2, 0.1], name="a"),
        group({"anger": 0.6, "joy": 0.4}, {"joy": 0.7, "anger": 0.3}, [1.0, 0.5], [-0.1, 0.2], name="b"),
        group({}, {"anger": 1.0}, [0.0, 0.0], [0.0, 0.0], name="c"),
        group({"joy": 1.0}, {"joy": 1.0}, [1.0, 0.5], [0.3, 0.1], depth=1, name="d"),
    ]
    clean = {"a": {"joy": 1.0}, "b": {"joy": 0.7, "anger": 0.3}, "c": {"joy": 1.0}}
    assert shares(records, clean) == pytest.approx({
        "order": 1 / 2, "reversed": 1 / 4, "on_gold": 1 / 3, "holds_gold": 2 / 3, "equals_gold": 1 / 3, "wrong": 2 / 3,
        "on_gold_if_wrong": 1 / 2, "several": 0,
        **dict.fromkeys((name for name in NAMES if name.startswith("right_")), 0),
    })  # fmt: skip


def test_how_often_right_answers_are_ahead_by_hand():
    """Clean gold is joy. Three answers to the original name joy, joy and anger, and anger; the fourth breaks the rule.

    So there are two pairs of a right and a wrong answer. Reward: 1 > .5, .5 = .5: 1.5 of 2. Consistency: .5 = .5, .25 < .5:
    .5 of 2; only the first two name as many emotions: .5 of 1. Votes: 2 > 1, 2 > 1. Advantage: .2 < .3, .4 > .3: 1 of 2. The
    new sample, whose answer names two emotions, has no pair. Of four valid answers two name several emotions.
    """
    said = [says("joy"), says("joy", "anger"), says("anger"), BROKEN]
    records = [
        group({}, {"anger": 1.0}, [1.0, 0.5, 0.5, 0.0], [0.2, 0.4, 0.3, -1.0], consistency=[0.5, 0.25, 0.5, 0], parses=said),
        group({}, {"joy": 1.0}, [1.0], [0.0], depth=1, name="new", parses=[says("fear", "joy")]),
    ]
    found = shares(records, {"a": {"joy": 1.0}})
    numbers = ("reward", "consistency", "consistency_alike", "vote", "advantage")
    assert [found[f"right_by_{name}"] for name in numbers] == pytest.approx([3 / 4, 1 / 4, 1 / 2, 1, 1 / 2])
    assert found["several"] == 1 / 2


def test_right_answers_at_the_end_of_a_stage_by_hand():
    """Clean gold is joy. Of steps 0, 1 and 2 of the first stage the last two count: right, wrong; right, broken: 2 of 4.

    The last stage has one step: right, right, wrong: 2 of 3. Its new sample does not count.
    """
    yes, no = says("joy", "anger"), says("anger", "joy")
    first = [[no, no], [yes, no], [yes, BROKEN]]
    records = [group({}, {}, [0, 0], [0, 0], step=step, parses=said) for step, said in enumerate(first)]
    records.append(group({}, {}, [0] * 3, [0] * 3, step=3, iteration=2, parses=[yes, yes, no]))
    records.append(group({}, {}, [0], [0], step=3, iteration=2, depth=1, name="new", parses=[no]))
    found = shares(records, {"a": {"joy": 1.0}})
    assert (found["right_first"], found["right_last"]) == pytest.approx((1 / 2, 2 / 3))


def test_the_consensus_of_a_run_is_held_against_clean_gold(noisy_run, finished):
    assert consensus(finished)["wrong"] == 0 < consensus(noisy_run)["wrong"] < 1


# Intervals


def test_quantiles_of_students_t():
    """From tables: 12.706, 4.303, 2.776, 2.262 and, for 1,000, 1.962."""
    found = [t_quantile(n) for n in (1, 2, 4, 9, 1000)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.262, 1.962], abs=6e-4)


def test_a_t_interval():
    """1, 2, 3: mean 2, deviation 1, 4.303 / sqrt(3) = 2.484 to each side. One value has no interval."""
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    assert t_interval([5.0])[0] == 5 and all(math.isnan(end) for end in t_interval([5.0])[1:])


# The study


def test_the_twelve_rows():
    rows = {name: flags for name, _, flags in noise.rows()}
    assert len(rows) == 12
    assert rows["full_00"] == ("--label_noise", "0.0")
    assert rows["no_self_grpo_20"] == ("--self_grpo", "false", "--label_noise", "0.2")
    assert rows["no_self_emo_40"] == ("--self_grpo", "false", "--self_play", "false", "--label_noise", "0.4")


def record(name, values, seeds=(0, 1)):
    found = {"test/toy/acc": values, "consensus/order": [0.25] * len(values)} if values else {}
    scores = {score: ablate.spread(numbers) for score, numbers in found.items()}
    return {"name": name, "title": name, "seeds": list(seeds)[: len(values)], "scores": scores}


RECORDS = [
    record("full_00", [0.7, 0.8]), record("no_self_grpo_00", [0.6, 0.6]),
    record("full_40", [0.5, 0.6]), record("no_self_grpo_40", [0.2, 0.2]), record("no_self_play_40", []),
]  # fmt: skip


def test_effects_are_differences_by_seed_and_their_change_with_noise():
    """Lambda without noise: .1, .2. With .4: .3, .4. More than without: .2, .2. Mean .15, half width 12.706 x .05 = .635."""
    found = {entry["title"]: entry["scores"]["Acc."] for entry in noise.effects(RECORDS)}
    assert [title.removeprefix("lambda, with self-play, ") for title in found] == [
        "noise 0", "noise 0.4", "noise 0.4 less noise 0",
    ]  # fmt: skip
    plain, strong, more = found.values()
    assert plain["values"] == pytest.approx([0.1, 0.2]) and strong["values"] == pytest.approx([0.3, 0.4])
    assert more["values"] == pytest.approx([0.2, 0.2])
    assert (plain["low"], plain["high"]) == pytest.approx((0.15 - 0.635, 0.15 + 0.635), abs=1e-3)
    lines = noise.effects_table(noise.effects(RECORDS))
    assert lines[1] == ["lambda, with self-play, noise 0", "+15.0 [-48.5, +78.5]"]


def test_a_seed_that_only_one_row_has_is_left_out():
    found = noise.effects([record("full_00", [0.7, 0.8]), record("no_self_grpo_00", [0.6])])
    assert [entry["scores"]["Acc."]["values"] for entry in found] == [pytest.approx([0.1])]
    assert found[0]["scores"]["Acc."]["low"] is None


def test_the_table_of_the_study():
    head, first, *_, last = noise.table(RECORDS)
    assert head[:4] == ["", "seeds", "Acc.", "Eq. 12 changes the order"]
    assert first[:4] == ["full_00", "2", "75.0 +- 7.1", "25.0 +- 0.0"]
    assert last[:4] == ["no_self_play_40", "0", "-", "-"]


def test_the_picture_has_a_band_where_there_are_seeds_and_says_its_numbers():
    drawn = noise.picture(RECORDS)
    root = ElementTree.fromstring(drawn)
    assert drawn.count("<polygon") == 4  # two lines in each of two panels
    said = root.find("{http://www.w3.org/2000/svg}desc").text
    assert "SELF-EMO 0.75 (0.115 to 1.39) at 0, 0.55" in said and "lambda 0 0.6 (0.6 to 0.6) at 0, 0.2" in said
    alone = bands.bands_svg("x", {"p": {"a": [(0, [0.5]), (1, [0.7])]}}, "steps")
    assert "<polygon" not in alone and "a 0.5 at 0, 0.7 at 1" in alone


def test_places_of_a_band():
    """x 0 and 10 lie at 52 and 400, ticks from 0 to 1 at 214 and 24. Means .5, .5; all values equal, so no width."""
    drawn = bands.band_panel("h", ["a"], {"a": [(0, [0.0, 0.0]), (10, [1.0, 1.0])]}, "axis")
    assert '<polyline points="52,214 400,24"/>' in drawn
    assert any('points="52,214 400,24 400,24 52,214"' in line for line in drawn)


def test_the_study_measures_the_consensus_of_its_runs(place, finished, tmp_path, capsys, monkeypatch):
    """The finished run in the place of every one: the table, the effects (all 0) and the picture are written."""
    monkeypatch.setattr(ablate, "finished", lambda job: True)
    monkeypatch.setattr(ablate, "job", lambda args, extra, row, seed: made(row, seed, finished, place))
    rows = ("--rows", "full_00", "no_self_grpo_00", "--seeds", "2")
    assert ablate.main(["noise", "--out", str(tmp_path), *rows, "--", *place.argv("")[:-2]]) == 0
    found = json.loads((tmp_path / "ablate.json").read_text())
    assert [entry["scores"]["Acc."]["values"] for entry in found["effects"]] == [[0.0, 0.0]]
    assert found["rows"][0]["scores"]["consensus/order"]["mean"] == consensus(finished)["order"]
    assert "lambda, with self-play, noise 0" in capsys.readouterr().out
    ElementTree.fromstring((tmp_path / "noise.svg").read_text())


def made(row, seed, folder, place):
    argv = place.argv(folder)
    return ablate.Job(row, seed, Path(folder), tuple(argv), config.parse(argv))


def test_another_turn_of_the_dialogue_has_a_draw_of_its_own(monkeypatch):
    """A turn with an id is drawn by it, one without by its place; the sample's own by the sample's id."""
    seen = []
    monkeypatch.setattr(task, "uniforms", lambda key, *_: seen.append(key) or [0.9, 0.0])
    turns = (Turn("Ann", "a", {"joy": 1.0}, "u7"), Turn("Bo", "b", None), Turn("Ann", "c", {"joy": 1.0}))
    own = replace(sample({"joy": 1.0}, "d0/2"), context=turns, following=Turn("Bo", "d", {"joy": 1.0}))
    assert task.mislabelled(own, 0.5, 3) == own
    assert set(seen) == {(3, -4, f"tiny/train/d0/{name}") for name in ("u7", "2", "3")}
