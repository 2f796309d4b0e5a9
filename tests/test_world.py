"""A run over datasets with different labels, and gold from votes where a release has them."""

import json

import pytest
from test_iemocap import release

import data
from common.errors import UserError
from corpora.dialogue import SPLITS
from data import Output, Responder
from training import task
from training.config import Config, parse
from training.task import Buffer, Example

SETS = {"calm": ("calm", "upset"), "wide": ("joy", "anger", "fear")}


@pytest.fixture
def folders(tmp_path):
    """`calm`: 4 dialogues of one labelled turn; `wide`: 12, with three other labels."""
    for name, labels in SETS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.json").write_text(json.dumps(labels))
        turns = [{"speaker": "Ann", "text": "Hi.", "label": labels[0]}, {"speaker": "Bo", "text": "Ho.", "label": None}]
        for split in SPLITS:
            rows = [{"id": f"d{i}", "turns": turns} for i in range({"calm": 4, "wide": 12}[name])]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(folders, **more):
    return Config(data=tuple(f"{name}={folders / name}" for name in SETS), **{"batch_prompts": 4, **more})


def test_every_prompt_lists_the_labels_of_its_own_dataset(folders):
    samples = task.read_splits(settings(folders))["train"]
    assert {(s.dataset, s.labels) for s in samples} == set(SETS.items())
    listed = {(s.dataset, data.messages(s, data.DEFAULT)[0]["content"].partition("Emotions: ")[2]) for s in samples}
    assert listed == {("calm", "calm, upset."), ("wide", "joy, anger, fear.")}


def test_prompts_are_drawn_by_size_of_dataset_and_a_resumed_run_draws_the_same(folders):
    """16 samples, 4 per step: four steps take each once, 4 of calm and 12 of wide. Step 2 needs no step before it."""
    cfg = settings(folders)
    buffer = Buffer(tuple(task.read_splits(cfg)["train"]))
    steps = [[s.id for s in buffer.draw(1, step, cfg)] for step in range(4)]
    drawn = [name for step in steps for name in step]
    assert len(set(drawn)) == 16 and sum(name.startswith("calm/") for name in drawn) == 4
    assert sorted(drawn) != drawn and any(len({name[:4] for name in step}) == 2 for step in steps)
    again = Buffer(tuple(task.read_splits(cfg)["train"]))
    assert [s.id for s in again.draw(1, 2, cfg)] == steps[2]
    assert [s.id for s in again.draw(1, 2, settings(folders, seed=1))] != steps[2]


def test_shares_are_said(folders):
    """4 and 12 of 16 samples: 25 % and 75 %."""
    said = task.mixture_line(task.read_splits(settings(folders))["train"])
    expected = "calm 25.0 % (4 samples, 2 labels), wide 75.0 % (12 samples, 3 labels)"
    assert said == f"prompts are drawn by size of dataset, seeded: {expected}"
    evenly = task.mixture_line(task.read_splits(settings(folders))["train"], even_labels=True)
    assert evenly == f"prompts are drawn by size of dataset, evenly over its labels, seeded: {expected}"


def test_new_samples_keep_their_datasets_labels(folders):
    """`joy` is a label of `wide` alone: the same answer makes a new sample there and none of `calm` (D9)."""
    cfg = settings(folders)
    originals = {s.dataset: s for s in task.read_splits(cfg)["train"]}
    answer = Output("So.", {"joy": 1.0}, {"joy": 0.8}, "Fine.", {})
    assert data.new_sample(originals["calm"], answer, 1) == "label"
    child = data.new_sample(originals["wide"], answer, 1)
    assert (child.dataset, child.labels, child.gold) == ("wide", ("joy", "anger", "fear"), {"joy": 0.8})
    assert child.responder == Responder("Ann", None, "swap")
    other = data.new_sample(originals["calm"], Output("So.", {"calm": 1.0}, {"upset": 1.0}, "Fine.", {}), 1)
    kept = [Example(s.parent, (1,), (2,), 1, s) for s in (child, other)]
    drawn = Buffer(tuple(originals.values())).add(kept).draw(2, 0, cfg)
    assert {(s.dataset, s.labels) for s in drawn} == set(SETS.items())
    assert sorted(s.origin for s in drawn) == ["original", "original", "synthetic", "synthetic"]


def test_votes_are_gold_where_a_release_has_them(folders):
    """M000 of the invented release has votes .25, .25, .5; `calm` has none and stays as it is."""
    root = release(folders / "IEMOCAP_full_release")
    cfg = Config(data=(f"iemocap={root}", f"calm={folders / 'calm'}"), soft_labels=True)
    gold = {s.id: s.gold for s in task.read_splits(cfg)["train"]}
    assert gold["iemocap/train/Ses01F_impro99/M000"] == {"neutral": 0.25, "angry": 0.25, "frustrated": 0.5}
    assert gold["calm/train/d0/0"] == {"calm": 1.0}
    with pytest.raises(UserError, match="--soft_labels: the meld files hold no votes"):
        task.read_splits(Config(data=("meld=nowhere",), soft_labels=True))


def test_context_all_reaches_the_samples(folders):
    """F001 is the fifth turn said and the third labelled one."""
    root = release(folders / "IEMOCAP_full_release")
    for context, turns in (("labelled", 3), ("all", 5)):
        samples = task.read_splits(Config(data=(f"iemocap={root}",), context=context))["train"]
        assert [len(s.context) for s in samples if s.id.endswith("impro99/F001")] == [turns]


def test_of_two_presets_the_last_one_counts_however_it_is_written():
    """The toy has two iterations, `small` one."""
    assert parse(["--preset=small", "--preset", "toy"]).iterations == 2
    assert parse(["--preset", "toy", "--preset=small"]).iterations == 1
