"""The toy world: short invented dialogues, a small tokenizer, and a base model that reads emotions superficially.

Village talk. A host and a guest share a tie to somebody absent (fond or sore); the guest brings news of that person,
sometimes takes the news back, and the host reacts. What anybody feels follows from news x tie, so the same "No way."
is joy in one dialogue and anger in the next. Whether a feeling shows, and what the guest says at the end, depends on
the speaker's persona. Doubtful turns have two gold emotions.

The base model stands for a pretrained one: it mostly writes the format of Table 5, and six of ten of the answers that it
has learnt come from `surface_reader`, which looks at the last utterance alone and cannot know the tie.
"""

import itertools
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import data
import evaluate
from config import PRESETS
from model import ATTENTION, Group, Policy, few_threads, quiet_transformers
from world import EVALUATION, open_world, shuffled
from world import answer as answers_of

LABELS = data.LABELS["meld"]
SIZES = {"train": 320, "dev": 120, "test": 120}  # dialogues; about 3.9 samples each


@dataclass(frozen=True)
class Persona:
    """A kind of character: how it brings news, how it answers, whether its own feelings show, and what it answers with.

    Its answer feels what the other one feels if that is in `shares`, else `own`.
    """

    sheet: str
    opener: str
    answer: str
    shows: bool
    own: str
    shares: tuple[str, ...]


PERSONAS = (
    Persona("a gentle soul who feels with everybody", "Listen, dear,", "Come here, you.", True, "sadness", LABELS),
    Persona("a joker who laughs most things away", "Get this,", "Ha, what a tale!", True, "joy", ("surprise",)),
    Persona("a hothead who takes things personally", "Hear this,", "Now you say it!", True, "anger", ("joy", "neutral")),
    Persona(
        "a worrier who whispers and expects the worst", "Not so loud,", "Oh dear.", False, "fear", ("neutral", "sadness")
    ),
    Persona("a calm clerk who keeps feelings private", "For the record,", "I see.", False, "neutral", ()),
    Persona("a fussy critic with a delicate nose", "As I feared,", "How typical.", False, "disgust", ("joy", "neutral")),
)
NAMES = ("Mira", "Oskar", "Lena", "Tobias", "Ines", "Pavel", "Greta", "Hugo", "Selma", "Ruben", "Noor", "Felix")
CHARACTERS: Mapping[str, Persona] = {name: PERSONAS[i % len(PERSONAS)] for i, name in enumerate(NAMES)}

TIES: Mapping[str, tuple[str, ...]] = {
    "fond": (
        "We both owe {x} so much.",
        "You and I grew up with {x}.",
        "{x} has always stood by us.",
        "I miss our evenings with {x}.",
    ),
    "sore": (
        "{x} still owes us an apology.",
        "{x} told lies about us both.",
        "We are done with {x}.",
        "{x} never paid us back.",
    ),
}
EVENTS: Mapping[str, tuple[str, ...]] = {
    "good": (
        "{x} won the harbour race.",
        "{x} got the big promotion.",
        "{x} sold a first painting.",
        "{x} passed the pilot exam.",
    ),
    "bad": (
        "{x} was fired this morning.",
        "{x} lost the court case.",
        "{x} broke an arm.",
        "{x} crashed the new van.",
    ),
    "threat": (
        "{x} is out on thin ice.",
        "{x} is lost in the snow.",
        "{x} sailed into the storm.",
    ),
    "gross": (
        "{x} found a rat in the soup.",
        "{x} served mouldy bread.",
        "{x} ate a raw snail.",
    ),
    "odd": (
        "{x} wears a crown to work.",
        "{x} painted the cow blue.",
        "{x} adopted nine parrots.",
    ),
    "routine": (
        "{x} went to the post office.",
        "{x} is parking the car.",
        "{x} moved lunch to noon.",
    ),
}
ODDS = {"good": 25, "bad": 25, "threat": 16, "gross": 10, "odd": 12, "routine": 12}
UNDONE = {"good": "bad", "bad": "good", "threat": "good"}  # what news becomes when it is taken back
TWISTS = ("no, they took it back.", "wait, it was all undone.", "sorry, it was just a rumour.")
FEELINGS: Mapping[tuple[str, str], tuple[str, str]] = {  # (news, tie) -> first and second emotion
    ("good", "fond"): ("joy", "surprise"),
    ("bad", "fond"): ("sadness", "anger"),
    ("threat", "fond"): ("fear", "sadness"),
    ("gross", "fond"): ("disgust", "surprise"),
    ("odd", "fond"): ("surprise", "joy"),
    ("routine", "fond"): ("neutral", "joy"),
    ("good", "sore"): ("anger", "sadness"),
    ("bad", "sore"): ("joy", "surprise"),
    ("threat", "sore"): ("neutral", "fear"),
    ("gross", "sore"): ("disgust", "joy"),
    ("odd", "sore"): ("surprise", "anger"),
    ("routine", "sore"): ("neutral", "anger"),
}
CRIES = ("Oh my god.", "No way.", "Well, well.", "Are you sure?", "What a day.", "Look at that.")
PLAIN: Mapping[str, tuple[str, ...]] = {  # words that name their emotion
    "neutral": ("Fine, noted.", "All the same to me."),
    "surprise": ("I never saw that coming!", "That is news to me!"),
    "fear": ("My hands are shaking.", "I will not sleep tonight."),
    "sadness": ("That breaks my heart.", "I could cry."),
    "joy": ("That makes my day!", "I could dance!"),
    "disgust": ("My stomach turns.", "How vile."),
    "anger": ("That makes my blood boil!", "How dare they!"),
}


def feel(news: str, tie: str, *, clear: bool) -> dict[str, float]:
    """Gold emotions of somebody who has heard the news: two where the words leave room for doubt."""
    first, second = FEELINGS[news, tie]
    return {first: 1.0} if clear else {first: 0.65, second: 0.35}


def answer(persona: Persona, heard: Mapping[str, float]) -> dict[str, float]:
    """What a persona feels when it answers somebody who feels `heard`."""
    first = evaluate.top_label(heard)
    return {first if first in persona.shares else persona.own: 1.0}


Line = dict[str, object]  # a turn of the JSONL format: speaker, text, label


def _dialogue(rng: random.Random) -> list[Line]:
    host, guest, absent = rng.sample(NAMES, 3)
    tie = rng.choice(tuple(TIES))
    news = rng.choices(tuple(ODDS), tuple(ODDS.values()))[0]
    turns: list[Line] = [{"speaker": host, "text": rng.choice(TIES[tie]).format(x=absent), "label": None}]
    turns.append(_tell(guest, rng.choice(EVENTS[news]).format(x=absent), news, tie))
    turns.append(_react(rng, host, news, tie))
    if news in UNDONE and rng.random() < 0.65:
        news = UNDONE[news]
        turns.append(_tell(guest, rng.choice(TWISTS), news, tie))
        turns.append(_react(rng, host, news, tie))
    turns.append(_reply(rng, guest, turns[-1]["label"]))  # type: ignore[arg-type]
    return turns


def _tell(speaker: str, text: str, news: str, tie: str) -> Line:
    persona = CHARACTERS[speaker]
    label = feel(news, tie, clear=False) if persona.shows else {"neutral": 1.0}
    return {"speaker": speaker, "text": f"{persona.opener} {text}", "label": label}


def _react(rng: random.Random, speaker: str, news: str, tie: str) -> Line:
    clear = CHARACTERS[speaker].shows and rng.random() < 0.6
    label = feel(news, tie, clear=clear)
    return {"speaker": speaker, "text": rng.choice(PLAIN[next(iter(label))] if clear else CRIES), "label": label}


def _reply(rng: random.Random, speaker: str, heard: Mapping[str, float]) -> Line:
    persona = CHARACTERS[speaker]
    label = answer(persona, heard)
    words = [persona.answer]
    if rng.random() < 0.5:
        words.append(rng.choice(PLAIN[next(iter(label))]))
    return {"speaker": speaker, "text": " ".join(words), "label": label}


def mask(text: str) -> str:
    """The text with every name of the world replaced by one sign."""
    return re.sub("|".join(NAMES), "_", text)


def world(seed: int) -> dict[str, list[dict[str, object]]]:
    """The dialogues of every split as rows of the JSONL format; no two begin alike once names are masked."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < sum(SIZES.values()):
        turns = _dialogue(rng)
        sheets = {str(t["speaker"]): CHARACTERS[str(t["speaker"])].sheet for t in turns}
        opening = mask(f"{turns[0]['text']} {turns[1]['text']}")
        rows.setdefault(opening, {"turns": turns, "personas": sheets})
    queue = iter(rng.sample(list(rows.values()), len(rows)))
    return {split: [{"id": f"d{n}", **next(queue)} for n in range(size)] for split, size in SIZES.items()}


# Readers: who they are follows from what they look at


def _fits(line: str, text: str) -> bool:
    return all(part in text for part in line.split("{x}"))


def _find(table: Mapping[str, Sequence[str]], text: str) -> str | None:
    return next((key for key, lines in table.items() if any(_fits(line, text) for line in lines)), None)


def _surface(text: str) -> dict[str, float]:
    plain, news = _find(PLAIN, text), _find(EVENTS, text)
    if plain:
        return {plain: 1.0}
    if "feared" in text:
        return {"fear": 1.0}
    if any(text.startswith(p.opener) and not p.shows for p in PERSONAS) and news:
        return {"neutral": 1.0}
    if news:
        return feel(news, "fond", clear=True)
    own = next((p.own for p in PERSONAS if text.startswith(p.answer)), None)
    if own:
        return {own: 1.0}
    return {"surprise": 0.65, "joy": 0.35}


def surface_reader(sample: data.Sample) -> Mapping[str, float]:
    """What the base model's first teacher reads: cues of the last utterance alone. It knows neither tie nor history."""
    return _surface(sample.context[-1].text)


def _thought(sample: data.Sample) -> str:
    """Why the last speaker feels so, in the words of somebody who knows the world."""
    *before, last = sample.context
    persona = CHARACTERS[last.speaker]
    if last.text.startswith(persona.answer):
        return f"heard: {evaluate.top_label(before[-1].label or {})}"
    if last.text.startswith(persona.opener) and not persona.shows:
        return "keeps it in"
    told = " ".join(turn.text for turn in sample.context)
    tie, news = _find(TIES, told), _find(EVENTS, told)
    if any(twist in told for twist in TWISTS):
        news = UNDONE[news or ""]
    return f"{tie} tie, {news} news"


def _target(sample: data.Sample, reading: Mapping[str, float], thought: str) -> str:
    """An answer with this reading; the reply is the real next turn, or what the persona would say where there is none."""
    persona = CHARACTERS[sample.responder.name or ""]
    mine, words = answer(persona, reading), persona.answer
    if sample.following is not None and sample.following.label is not None:
        mine, words = dict(sample.following.label), sample.following.text
    reasoning = f"{sample.context[-1].speaker}: {thought}: {evaluate.top_label(reading)}."
    return data.format_output(reasoning, reading, mine, words)


def gold_target(sample: data.Sample) -> str:
    """The answer of a perfect reader to an original sample: what the gold-SFT baseline learns."""
    return _target(sample, sample.gold, _thought(sample))


# The base model's lessons

SURFACE = 0.6  # share of lessons by the surface reader; the others are gold
SECOND = 0.2  # share of sure readings that get a doubtful second emotion: the format has room for it
SLIPS = 0.1  # share of lessons that break the format, as a pretrained model's answers do


def _lesson(sample: data.Sample, rng: random.Random) -> str:
    surface = rng.random() < SURFACE
    reading = dict(surface_reader(sample) if surface else sample.gold)
    if len(reading) == 1 and rng.random() < SECOND:
        reading = {emotion: 0.8 for emotion in reading} | {rng.choice([e for e in LABELS if e not in reading]): 0.3}
    text = _target(sample, reading, "by the words" if surface else _thought(sample))
    return _slip(text, rng) if rng.random() < SLIPS else text


def _slip(text: str, rng: random.Random) -> str:
    """The same answer with one of four faults."""
    start = text.index("{")
    return rng.choice(
        (
            text.removesuffix("}"),
            f"{text[:start]}```\n{text[start:]}\n```",
            text.replace("</think>", "", 1),
            f"{text}\nThat is all.",
        )
    )


# Tokenizer and model

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 900
STEPS, GROUPS, ANSWERS, LR = 540, 4, 2, 4e-3  # of the base model's training: groups a step, answers a group


def _tokenizer(prompts: Sequence[str], answers: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that may merge across words; lines that stand in every prompt are one token each."""
    fixed = sorted(set.intersection(*(set(prompt.splitlines()) for prompt in prompts)) - {""})
    chunks = pre_tokenizers.Split(Regex(r"[A-Za-z_][A-Za-z_ ]*|[0-9.]+|[^A-Za-z0-9]+"), behavior="isolated")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [chunks, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(fixed),
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    known = re.compile("|".join(map(re.escape, fixed)))
    core.train_from_iterator([known.sub("", text) for text in (*prompts, *answers)], trainer)
    core.add_tokens([AddedToken(line, normalized=False) for line in fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, extra_special_tokens=[START], chat_template=TEMPLATE
    )


def _new_policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    end = tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.09,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation=ATTENTION,  # type: ignore[call-arg]
    )
    return Policy(Qwen3ForCausalLM(config))


def _teach(policy: Policy, lessons: Iterator[Group], steps: int) -> None:
    """Supervised training, the learning rate rising over a tenth of the steps and then falling to 0."""
    few_threads(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
    for _ in range(steps):
        _learn(policy, optimizer, list(itertools.islice(lessons, GROUPS)))
        schedule.step()


def _learn(policy: Policy, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> None:
    """One supervised update: mean over the tokens of all answers."""
    logp_BT, _ = policy(groups)
    optimizer.zero_grad()
    (-logp_BT.sum() / sum(len(answer) for group in groups for answer in group.answers)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def _lessons(samples: Sequence[data.Sample], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[Group]:
    """Groups to learn, without end."""
    prompts = {sample.id: data.encode(tokenizer, sample, data.DEFAULT)[0] for sample in samples}
    while True:
        for sample in rng.sample(samples, len(samples)):
            texts = [_lesson(sample, rng) + END for _ in range(ANSWERS)]
            yield Group(prompts[sample.id], [tokenizer.encode(text) for text in texts])


# Building


def _write_world(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for split, rows in world(seed).items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(LABELS) + "\n", encoding="utf-8")


def _write_base(folder: Path, samples: Sequence[data.Sample], seed: int, steps: int = STEPS) -> None:
    rng = random.Random(seed)
    prompts = ["\n".join(m["content"] for m in data.messages(sample, data.DEFAULT)) for sample in samples]
    tokenizer = _tokenizer(prompts, [_lesson(sample, rng) for sample in samples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = _new_policy(tokenizer)
    _teach(policy, _lessons(samples, tokenizer, rng), steps)
    policy.export(folder, tokenizer)


def untaught(folder: Path) -> None:
    """Write a model of the toy world's size after one lesson: for work where only speed matters."""
    aside = folder.parent / "world"
    _write_world(aside, 0)
    _write_base(folder, _samples(aside, "train"), 0, steps=1)


def _samples(folder: Path, split: str) -> list[data.Sample]:
    return data.samples(data.load("toy", folder, split), data.label_set("toy", folder))


def build(root: Path = Path("data/toy"), *, seed: int = 0) -> None:
    """Write root/world (JSONL dialogues) and root/base (Hugging Face folder), the same ones for the same seed.

    Takes about 40 s on one core. Written aside and renamed, so that what stands under these names is whole.
    """
    root.mkdir(parents=True, exist_ok=True)
    aside = root / f".building-{os.getpid()}"
    try:
        _write_world(aside / "world", seed)
        _write_base(aside / "base", _samples(aside / "world", "train"), seed)
        for name in ("world", "base"):
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(aside / name, root / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def baselines(root: Annotated[Path, tyro.conf.Positional] = Path("data/toy")) -> None:
    """Print what the majority class and the surface reader score on dev and test.

    Args:
        root: Folder of the toy world; built there if it is missing.
    """
    if not (root / "world").exists():
        build(root)
    for split in ("dev", "test"):
        samples = _samples(root / "world", split)
        read = [data.Output("", dict(surface_reader(sample)), {}, "", {}) for sample in samples]
        for name, scores in (("majority", evaluate.majority(samples)), ("surface reader", evaluate.score(samples, read))):
            numbers = scores.metrics()
            print(f"{split} ({len(samples)} samples), {name}: accuracy {numbers['acc']:.3f}, IOU {numbers['iou']:.3f}")


def gold_sft(root: Annotated[Path, tyro.conf.Positional] = Path("data/toy"), seed: int = 0) -> None:
    """Print what the base model scores on dev and test after learning gold answers, as many as the RL stages learn from.

    Args:
        root: Folder of the toy world; built there if it is missing.
        seed: Of the order of the samples.
    """
    if not (root / "base").exists():
        build(root)
    cfg = replace(PRESETS["toy"], model=str(root / "base"), data=(f"toy={root / 'world'}",), seed=seed)
    here, policy = open_world(cfg), Policy.load(cfg.model)
    updates, size = cfg.iterations * here.S * cfg.batch_prompts // cfg.mini_batch_prompts, cfg.mini_batch_prompts * cfg.n
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0.01)
    order = itertools.chain.from_iterable(shuffled(here.originals, f"{seed}/{epoch}") for epoch in itertools.count())
    for _ in range(updates):
        batch = list(itertools.islice(order, size))
        groups = [Group(here.encode(x)[0], [here.tokenizer.encode(gold_target(x) + END)]) for x in batch]
        _learn(policy, optimizer, groups)
    splits = {"dev": here.dev, "test": here.test}
    for (split, samples), temperature in itertools.product(splits.items(), (0.0, 1.0)):
        answers = answers_of(here, policy, samples, n=1, temperature=temperature, step=EVALUATION)
        numbers = evaluate.score(samples, [group[0].parse for group in answers]).metrics()
        shown = f"accuracy {numbers['acc']:.3f}, IOU {numbers['iou']:.3f}, rule {numbers['rule_rate']:.3f}"
        print(f"{split} ({len(samples)}), gold SFT, {updates} updates of {size}, temperature {temperature:g}: {shown}")


def main() -> None:
    """Command line: build, baselines or gold_sft. A user's mistake is one line, exit code 2."""
    quiet_transformers()
    try:
        commands = {"build": build, "baselines": baselines, "gold_sft": gold_sft}
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except data.UserError as error:
        sys.exit(data.refuse(error))


if __name__ == "__main__":
    main()
