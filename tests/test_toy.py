"""The toy world: what it promises about its dialogues, its readers, its tokenizer and its base model."""

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
from common.hub import eos_ids, load_tokenizer
from corpora import loading
from corpora.dialogue import Turn
from data import Failure, Output
from model import Group, Policy
from toy import base as toy_base
from toy import world
from toy.__main__ import soft_gold
from toy.world import LABELS

SPLITS = ("train", "dev", "test")
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parent.parent


def masked(text):
    """The text without names."""
    for name in world.NAMES:
        text = text.replace(name, "*")
    return text


def top(weights):
    return max(weights, key=weights.get)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The dialogues of three seeds."""
    root = tmp_path_factory.mktemp("toy")
    for seed in SEEDS:
        toy_base.write_world(root / str(seed), seed)
    return {seed: root / str(seed) for seed in SEEDS}


@pytest.fixture(scope="module")
def samples(folders):
    """Samples by seed and split, read as any other dataset is."""
    return {
        seed: {split: data.read_samples("toy", folder, split) for split in SPLITS}
        for seed, folder in folders.items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory, samples):
    """A base model after two steps: everything but what it knows."""
    folder = tmp_path_factory.mktemp("toy") / "base"
    toy_base.write_base(folder, samples[0]["train"][:40], 0, steps=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(samples):
    """The tokenizer as it is built, of prompts and gold answers."""
    train = samples[0]["train"]
    return toy_base.make_tokenizer(rendered(train), [world.gold_target(s) for s in train])


def rendered(samples):
    """System and user text of every sample's prompt."""
    return ["\n".join(m["content"] for m in data.messages(s, data.DEFAULT)) for s in samples]


# The world


def test_a_seed_decides_the_world(folders, tmp_path):
    """Byte for byte; another seed is another world."""
    toy_base.write_world(tmp_path / "again", 0)
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "labels.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[0] / name).read_bytes()
    assert (folders[0] / "train.jsonl").read_bytes() != (folders[1] / "train.jsonl").read_bytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_there_is_enough_of_it(samples, folders, seed):
    """A few hundred dialogues, at least 400 held-out samples in dev and in test, the seven labels in MELD's order."""
    sizes = {split: len(loading.load("toy", folders[seed], split)) for split in SPLITS}
    assert sizes == {"train": 320, "dev": 120, "test": 120}
    assert 1150 <= len(samples[seed]["train"]) <= 1300
    assert min(len(samples[seed]["dev"]), len(samples[seed]["test"])) >= 400
    assert json.loads((folders[seed] / "labels.json").read_text()) == [
        "neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger",
    ]  # fmt: skip
    assert {top(s.gold) for split in SPLITS for s in samples[seed][split]} == set(LABELS)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_held_out_was_seen_in_training(samples, seed):
    """No context of dev or test stands in train, nor one in the other, also with the names taken away."""
    contexts = [{masked("\n".join(t.text for t in s.context)) for s in samples[seed][split]} for split in SPLITS]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2] and not contexts[1] & contexts[2]


def test_the_split_is_a_fair_draw(samples):
    """Train and held-out have the same mix of labels: shares over three seeds differ by less than .04."""
    share = {
        split: Counter(top(s.gold) for seed in SEEDS for s in samples[seed][split]) for split in ("train", "test")
    }
    for label in LABELS:
        train, test = (share[split][label] / share[split].total() for split in ("train", "test"))
        assert abs(train - test) < 0.04


def test_the_last_utterance_does_not_decide(samples):
    """Every cry stands with four gold emotions at least, and the best reader of last utterances stays below 80 %.

    That reader knows, for every utterance of train without its names, the commonest gold emotion.
    """
    seen = defaultdict(Counter)
    for sample in samples[0]["train"]:
        seen[masked(sample.context[-1].text)][top(sample.gold)] += 1
    assert all(len(seen[cry]) >= 4 for cry in world.CRIES)
    test = [s for s in samples[0]["test"] if masked(s.context[-1].text) in seen]
    right = sum(seen[masked(s.context[-1].text)].most_common(1)[0][0] == top(s.gold) for s in test)
    assert len(test) > 400 and right / len(test) < 0.8


def test_the_whole_context_decides(samples):
    """The same dialogue without names, up to the same turn and by the same characters, has one gold label."""
    found = defaultdict(set)
    for split in SPLITS:
        for s in samples[0][split]:
            who = tuple(world.CHARACTERS[t.speaker].sheet for t in s.context)
            found[masked("\n".join(t.text for t in s.context)), who].add(json.dumps(s.gold, sort_keys=True))
    assert max(map(len, found.values())) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_gold_is_often_soft(samples, seed):
    """Between a third and a half of the utterances have two emotions, of weights .65 and .35 (else Eq. 12 is inert)."""
    train = samples[seed]["train"]
    assert {tuple(s.gold.values()) for s in train} == {(1.0,), (0.65, 0.35)}
    assert 1 / 3 < sum(len(s.gold) == 2 for s in train) / len(train) < 1 / 2


@pytest.mark.parametrize(
    ("news", "tie", "clear", "felt"),
    [
        ("good", "fond", True, {"joy": 1.0}),
        ("good", "sore", True, {"anger": 1.0}),
        ("bad", "sore", False, {"joy": 0.65, "surprise": 0.35}),
        ("threat", "fond", False, {"fear": 0.65, "sadness": 0.35}),
    ],
)
def test_feelings_by_hand(news, tie, clear, felt):
    assert world.feel(news, tie, clear=clear) == felt


@pytest.mark.parametrize(
    ("name", "heard", "felt"),
    [
        ("Mira", "fear", "fear"),  # the gentle soul shares everything
        ("Oskar", "fear", "joy"),  # the joker laughs
        ("Lena", "sadness", "anger"),  # the hothead
        ("Tobias", "sadness", "sadness"),  # the worrier shares sadness,
        ("Tobias", "joy", "fear"),  # and fears the rest
        ("Ines", "anger", "neutral"),  # the clerk
        ("Pavel", "surprise", "disgust"),  # the critic
        ("Greta", "anger", "anger"),  # the seventh name is a gentle soul again
    ],
)
def test_what_a_persona_answers_with(name, heard, felt):
    """The next turn depends on persona and emotion. The heavier of two heard emotions counts."""
    other = "neutral" if heard != "neutral" else "joy"
    assert world.answer(world.CHARACTERS[name], {other: 0.35, heard: 0.65}) == {felt: 1.0}


def test_sheets(samples):
    """Twelve characters with six sheets; a responder has the sheet of its name, in every split."""
    assert len(world.CHARACTERS) == 12 and len({p.sheet for p in world.CHARACTERS.values()}) == 6
    for split in SPLITS:
        for sample in samples[0][split]:
            assert sample.responder.persona == world.CHARACTERS[sample.responder.name].sheet
            assert sample.responder.name != sample.context[-1].speaker


# Readers


@pytest.mark.parametrize("seed", SEEDS)
def test_the_surface_reader_is_superficial(samples, seed):
    """Better than the majority class and far from right, on dev and test."""
    for split in ("dev", "test"):
        held_out = samples[seed][split]
        read = [Output("", dict(world.surface_reader(s)), {}, "", {}) for s in held_out]
        found = evaluate.score(held_out, read).metrics()["acc"]
        assert evaluate.majority(held_out).metrics()["acc"] + 0.1 < found
        assert 0.45 < found < 0.6


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No way.", {"surprise": 0.65, "joy": 0.35}),
        ("Get this, Lena won the harbour race.", {"joy": 1.0}),  # good news, whoever Lena is
        ("Hear this, Hugo broke an arm.", {"sadness": 1.0}),
        ("For the record, Hugo broke an arm.", {"neutral": 1.0}),  # the clerk's tone
        ("As I feared, Hugo won the harbour race.", {"fear": 1.0}),  # a word taken literally
        ("Get this, no, they took it back.", {"surprise": 0.65, "joy": 0.35}),
        ("Come here, you.", {"sadness": 1.0}),  # the gentle soul's own tone
        ("I see. I could dance!", {"joy": 1.0}),
    ],
)
def test_what_the_surface_reader_reads(samples, text, read):
    sample = samples[0]["test"][0]
    assert world.surface_reader(replace(sample, context=(Turn("Noor", text),))) == read


def test_the_surface_reader_is_blind_to_the_context(samples):
    """It says the same when everything before the last turn is taken away."""
    for sample in samples[0]["test"]:
        assert world.surface_reader(replace(sample, context=sample.context[-1:])) == world.surface_reader(sample)


@pytest.mark.parametrize("split", SPLITS)
def test_gold_targets_follow_the_rule(samples, split):
    """Every one parses, says gold, and answers with the real next turn and its label where there is one."""
    for sample in samples[0][split]:
        found = data.parse_output(world.gold_target(sample), sample.labels)
        assert isinstance(found, Output) and found.last_emotions == sample.gold
        if sample.following is not None:
            assert (found.my_output, found.my_emotions) == (sample.following.text, sample.following.label)
        else:
            persona = world.CHARACTERS[sample.responder.name]
            assert (found.my_output, found.my_emotions) == (persona.answer, world.answer(persona, sample.gold))


def test_a_thought_reads_the_context(samples):
    """The reading in a gold target's thought leads to the gold emotion by the table of feelings."""
    read = 0
    for sample in samples[0]["test"]:
        words = world.gold_target(sample).replace(":", "").replace(",", "").split()
        if "tie" in words and "news" in words:
            tie, news = words[words.index("tie") - 1], words[words.index("news") - 1]
            assert world.FEELINGS[news, tie][0] == top(sample.gold)
            read += 1
    assert read > 150


# The base model's lessons


def test_lessons_are_imperfect(samples):
    """Of 2,000 lessons a tenth breaks the rule, some list two emotions, and gold is the minority's."""
    rng = random.Random(0)
    unsure = [s for s in samples[0]["train"] if dict(world.surface_reader(s)) != s.gold]
    read = [(s, data.parse_output(toy_base.lesson(s, rng), s.labels)) for s in rng.choices(unsure, k=2000)]
    valid = [(s, p) for s, p in read if isinstance(p, Output)]
    assert 0.88 < len(valid) / len(read) < 0.92
    gold = sum(p.last_emotions == s.gold for s, p in valid) / len(valid)
    surface = sum(p.last_emotions == world.surface_reader(s) for s, p in valid) / len(valid)
    assert 0.3 < gold < 0.42 and 0.42 < surface < 0.62
    assert {len(p.last_emotions) for _, p in valid} == {1, 2}


def test_every_slip_breaks_the_rule(samples):
    """And they are four different ones."""
    sample = samples[0]["train"][0]
    broken = {toy_base.slip(world.gold_target(sample), random.Random(seed)) for seed in range(40)}
    found = [data.parse_output(text, sample.labels) for text in broken]
    assert len(broken) == 4 and all(isinstance(p, Failure) for p in found)


# Tokenizer and model


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_targets_survive_the_tokenizer(base, samples):
    """From text to ids with the stop token, and back as an answer is read."""
    tokenizer = load_tokenizer(base)
    for sample in samples[0]["test"][:100]:
        text = world.gold_target(sample)
        ids = tokenizer.encode(text + toy_base.END)
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert data.answer_text(tokenizer, ids, {tokenizer.eos_token_id}, "") == text


def test_prompts_and_answers_are_short(samples, tokenizer):
    """About 75 and 35 tokens, because the prompt's fixed lines are one token each."""
    test = samples[0]["test"]
    prompts = rendered(test)
    lengths = [len(data.encode(tokenizer, s, data.DEFAULT)[0]) for s in test]
    assert len(tokenizer) == 900 and 60 < sum(lengths) / len(lengths) < 85 and max(lengths) < 128
    assert 25 < sum(len(tokenizer.encode(world.gold_target(s))) for s in test) / len(test) < 42
    fixed = [line for line in prompts[0].splitlines() if all(line in p.splitlines() for p in prompts)]
    assert len(fixed) >= 4 and all(len(tokenizer.encode(line)) == 1 for line in fixed if line)


def test_the_chat_template(base):
    """Three roles, each between the two control tokens, and an open turn of the assistant."""
    chat = [{"role": "system", "content": "A."}, {"role": "user", "content": "B?"}]
    text = load_tokenizer(base).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nA.<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"


def test_the_base_model_opens(base, samples):
    """A Qwen3 of half a million to a million parameters, with the end of a turn as its stop token."""
    policy, tokenizer = Policy.load(base), load_tokenizer(base)
    assert policy.lm.config.model_type == "qwen3"
    assert eos_ids(base, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    sample = samples[0]["train"][0]
    logp_BT, _ = policy([Group(data.encode(tokenizer, sample, data.DEFAULT)[0], [tokenizer.encode("joy")])])
    assert torch.isfinite(logp_BT).all()


def test_size_of_the_model(tokenizer):
    """With the whole vocabulary of 900: 128 * 900 + 2 * (49,152 + 147,456 + 320) + 128 = 509,184 parameters.

    A layer: q and o 128 x 128, k and v 128 x 64, three matrices 128 x 384, norms 2 * 128 + 2 * 32.
    """
    policy = toy_base.new_policy(tokenizer)
    assert sum(p.numel() for p in policy.parameters()) == 509184


def test_a_seed_decides_the_base_model(base, samples, tmp_path):
    """Weights and tokenizer byte for byte, whatever the state of torch's generator, which is left as it was."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    toy_base.write_base(tmp_path / "again", samples[0]["train"][:40], 0, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    toy_base.write_base(tmp_path / "other", samples[0]["train"][:40], 1, steps=2)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_teaching_teaches(samples, tokenizer):
    """25 steps on one lesson make it the likely answer."""
    sample = samples[0]["train"][0]
    torch.manual_seed(0)
    policy = toy_base.new_policy(tokenizer)
    answer = tokenizer.encode(world.gold_target(sample) + toy_base.END)
    lesson = Group(data.encode(tokenizer, sample, data.DEFAULT)[0], [answer])
    start = policy([lesson])[0].sum().item() / len(answer)
    toy_base.teach(policy, iter([lesson] * 25 * toy_base.GROUPS), 25)
    assert start < -5 and policy([lesson])[0].sum().item() / len(answer) > -0.3


# Building


def test_build_writes_both_folders_or_neither(tmp_path, monkeypatch):
    """A base model that fails leaves the old files whole and nothing beside them; a second try replaces both."""

    def good(folder, samples, seed):
        folder.mkdir()
        (folder / "config.json").write_text(f"{seed} {len(samples) > 1000}")

    def bad(folder, samples, seed):
        folder.mkdir()
        raise RuntimeError("no space")

    root = tmp_path / "deep" / "toy"
    monkeypatch.setattr(toy_base, "write_base", good)
    toy_base.build(root)
    assert sorted(p.name for p in root.iterdir()) == ["base", "world"]
    assert (root / "base" / "config.json").read_text() == "0 True"
    world = (root / "world" / "train.jsonl").read_bytes()
    monkeypatch.setattr(toy_base, "write_base", bad)
    with pytest.raises(RuntimeError, match="no space"):
        toy_base.build(root, seed=1)
    assert sorted(p.name for p in root.iterdir()) == ["base", "world"]
    assert (root / "world" / "train.jsonl").read_bytes() == world
    monkeypatch.setattr(toy_base, "write_base", good)
    toy_base.build(root, seed=1)
    assert (root / "world" / "train.jsonl").read_bytes() != world
    assert (root / "base" / "config.json").read_text() == "1 True"


def test_baselines_command(folders, tmp_path):
    """Majority and surface reader, on dev and test, with numbers between 0 and 1."""
    root = tmp_path / "toy"
    root.mkdir()
    (root / "world").symlink_to(folders[0])
    command = [sys.executable, "-m", "toy", "baselines", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" (")[0] + line.split(")")[1].split(":")[0] for line in lines] == [
        "dev, majority", "dev, surface reader", "test, majority", "test, surface reader",
    ]  # fmt: skip
    scores = [tuple(float(part.split(" ")[-1]) for part in line.split(": ")[1].split(",")) for line in lines]
    assert all(0.25 < score < 0.65 for pair in scores for score in pair)
    assert scores[0] < scores[1] and scores[2] < scores[3]


def test_the_softest_gold_is_the_mean_of_two_readers(tmp_path):
    """Fear .65 and sadness .35 against "I could dance!", joy 1: .325, .175, .5. Neutral 1 against "Fine, noted.": 1."""
    said = [
        {"speaker": "Mira", "text": "Who is there?", "label": {"neutral": 1.0}},
        {"speaker": "Lena", "text": "I could dance!", "label": {"fear": 0.65, "sadness": 0.35}},
        {"speaker": "Mira", "text": "Fine, noted.", "label": {"neutral": 1.0}},
    ]
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "train.jsonl").write_text(json.dumps({"id": "d0", "turns": said}) + "\n")
    soft_gold(tmp_path / "gold.jsonl", tmp_path)
    found = loading.read_gold(tmp_path / "gold.jsonl")
    assert found["toy/train/d0/1"] == {"fear": 0.325, "sadness": 0.175, "joy": 0.5}
    assert found["toy/train/d0/2"] == {"neutral": 1.0}
