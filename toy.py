"""The toy world: short invented dialogues, a small tokenizer, and a base model that reads emotions superficially.

Village talk. A host and a guest share a tie to somebody absent (fond or sore); the guest brings news of that person,
sometimes takes the news back, and the host reacts. What anybody feels follows from news x tie, so the same "No way."
is joy in one dialogue and anger in the next. Whether a feeling shows, and what the guest says at the end, depends on
the speaker's persona. Doubtful turns have two gold emotions.

The base model stands for a pretrained one: it mostly writes the format of Table 5, and six of ten of the answers that it
has learnt come from `surface_reader`, which looks at the last utterance alone and cannot know the tie.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import data
from model import Group, Policy

LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
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
    Persona("a worrier who whispers and expects the worst", "Not so loud,", "Oh dear.", False, "fear", ("neutral", "sadness")),
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
        "{x} inherited a vineyard.",
        "{x} was picked for the choir.",
    ),
    "bad": (
        "{x} was fired this morning.",
        "{x} lost the court case.",
        "{x} broke an arm.",
        "{x} crashed the new van.",
        "{x} failed the last exam.",
        "{x} was dropped from the team.",
    ),
    "threat": (
        "{x} is out on thin ice.",
        "{x} is lost in the snow.",
        "{x} sailed into the storm.",
        "{x} is stuck in the old mine.",
    ),
    "gross": (
        "{x} found a rat in the soup.",
        "{x} served mouldy bread.",
        "{x} fell into the dung heap.",
        "{x} ate a raw snail.",
    ),
    "odd": (
        "{x} wears a crown to work.",
        "{x} painted the cow blue.",
        "{x} now speaks in rhymes.",
        "{x} adopted nine parrots.",
    ),
    "routine": (
        "{x} went to the post office.",
        "{x} is parking the car.",
        "{x} changed a light bulb.",
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
    first = max(heard, key=lambda emotion: heard[emotion])
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


def _read(text: str) -> dict[str, float]:
    for emotion, lines in PLAIN.items():
        if any(line in text for line in lines):
            return {emotion: 1.0}
    if any(text.endswith(twist) for twist in TWISTS):
        return {"surprise": 1.0}
    if any(text.startswith(persona.opener) and not persona.shows for persona in PERSONAS):
        return {"neutral": 1.0}
    for news, events in EVENTS.items():
        if any(event.removeprefix("{x} ") in text for event in events):
            return feel(news, "fond", clear=True)
    for persona in PERSONAS:
        if persona.answer in text:
            return {persona.own: 1.0}
    return {"surprise": 0.65, "joy": 0.35} if text in CRIES else {"surprise": 1.0}


def surface_reader(sample: data.Sample) -> Mapping[str, float]:
    """What the base model's teacher reads: cues of the last utterance alone, blind to tie, persona and history."""
    return _read(sample.context[-1].text)


def _situation(context: Sequence[data.Turn]) -> str:
    """The tie and the news as they stand after the last turn."""
    told = " ".join(turn.text for turn in context)
    tie = next(tie for tie, lines in TIES.items() if any(part in told for line in lines for part in line.split("{x}") if len(part) > 2))
    news = next(news for news, lines in EVENTS.items() if any(line.removeprefix("{x}") in told for line in lines))
    if any(twist in told for twist in TWISTS):
        news = UNDONE[news]
    return f"{tie} tie, {news} news"


def _thought(sample: data.Sample) -> str:
    """Why the last speaker feels so, for somebody who knows the world."""
    *before, last = sample.context
    persona = CHARACTERS[last.speaker]
    if last.text.startswith(persona.answer):
        assert before[-1].label is not None
        return f"answers {next(iter(before[-1].label))}"
    return _situation(sample.context) if persona.shows or not last.text.startswith(persona.opener) else "keeps it in"


def target(sample: data.Sample, reading: Mapping[str, float], thought: str) -> str:
    """An answer with this reading of the last speaker, and the real next turn (else the persona's) as the reply."""
    follow = sample.following
    persona = CHARACTERS[str(sample.responder.name)]
    mine, words = answer(persona, reading), persona.answer
    if follow is not None and follow.label is not None:
        mine, words = dict(follow.label), follow.text
    last = sample.context[-1].speaker
    return data.format_output(f"{last}: {thought}, so {next(iter(reading))}.", dict(reading), mine, words)


def gold_target(sample: data.Sample) -> str:
    """The answer that a perfect reader would give: the target of the gold-SFT baseline."""
    return target(sample, sample.gold, _thought(sample))


def broken(text: str, way: int) -> str:
    """The same answer with one of four slips against the format."""
    dictionary = text[text.index("{") :]
    slips = (
        text.removesuffix("}"),
        text.replace(dictionary, f"```\n{dictionary}\n```"),
        text.replace("</think>", "", 1),
        f"{text}\nThat is all.",
    )
    return slips[way % len(slips)]


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = "<|im_start|>", "<|im_end|>"
SLIPS = 0.13


def _tokenizer(prompts: Sequence[str], answers: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE; sentences that stand in every prompt are one token each, so that a prompt is mostly dialogue."""
    sentences = [set(re.split(r"(?<=[.:])|\n", prompt)) for prompt in prompts]
    fixed = sorted((s for s in set.intersection(*sentences) if len(s) > 12), key=len, reverse=True)
    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[A-Za-z_']+|[0-9.]+|[^A-Za-z0-9]+"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(fixed),
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    known = re.compile("|".join(map(re.escape, fixed)))
    core.train_from_iterator([known.sub("\n", text) for text in (*prompts, *answers)], trainer)
    core.add_tokens([AddedToken(text, normalized=False) for text in fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, extra_special_tokens=[START], chat_template=TEMPLATE
    )


VOCABULARY = 700


def lesson(sample: data.Sample, rng: random.Random) -> str:
    """One answer to learn from: the surface reader's or the gold one, now and then with a slip."""
    surface = rng.random() < SURFACE
    reading = dict(surface_reader(sample) if surface else sample.gold)
    thought = "by the words" if surface else _thought(sample)
    if len(reading) == 1 and rng.random() < SECOND:
        reading = {**{e: 0.8 for e in reading}, rng.choice([e for e in LABELS if e not in reading]): 0.3}
    text = target(sample, reading, thought)
    return broken(text, rng.randrange(4)) if rng.random() < SLIPS else text


SURFACE = 0.6
SECOND = 0.3


def _write_world(root: Path, seed: int) -> None:
    root.mkdir(parents=True)
    for split, rows in world(seed).items():
        (root / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (root / "labels.json").write_text(json.dumps(LABELS), encoding="utf-8")


def _new_model(vocabulary: int, end: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, initializer_range=0.05, max_position_embeddings=512,
        eos_token_id=end, pad_token_id=end, bos_token_id=None,
    )
    config._attn_implementation = "selfemo"
    return Qwen3ForCausalLM(config)


def _teach(policy: Policy, lessons: Iterator[Group], steps: int, batch: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        groups = [next(lessons) for _ in range(batch)]
        logp_BT, _ = policy(groups)
        loss = -logp_BT.sum() / sum(len(answer) for group in groups for answer in group.answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
