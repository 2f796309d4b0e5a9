"""The toy world: short invented dialogues, and readers that see more or less of them.

Village talk. A host and a guest share a tie to somebody absent (fond or sore); the guest brings news of that person,
sometimes takes the news back, and the host reacts. What anybody feels follows from news x tie, so the same "No way."
is joy in one dialogue and anger in the next. Whether a feeling shows, and what the guest says at the end, depends on
the speaker's persona. Doubtful turns have two gold emotions.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import data
from corpora import dialogue
from corpora.dialogue import Turn

LABELS = dialogue.LABELS["meld"]
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
    Persona("a worrier who whispers and expects the worst", "Not so loud,", "Oh dear.", False, "fear",
            ("neutral", "sadness")),
    Persona("a calm clerk who keeps feelings private", "For the record,", "I see.", False, "neutral", ()),
    Persona("a fussy critic with a delicate nose", "As I feared,", "How typical.", False, "disgust", ("joy", "neutral")),
)  # fmt: skip
NAMES = ("Mira", "Oskar", "Lena", "Tobias", "Ines", "Pavel", "Greta", "Hugo", "Selma", "Ruben", "Noor", "Felix")
CHARACTERS: Mapping[str, Persona] = {name: PERSONAS[i % len(PERSONAS)] for i, name in enumerate(NAMES)}
TIES: Mapping[str, tuple[str, ...]] = {
    "fond": ("We both owe {x} so much.", "You and I grew up with {x}.", "{x} has always stood by us.",
             "I miss our evenings with {x}."),
    "sore": ("{x} still owes us an apology.", "{x} told lies about us both.", "We are done with {x}.",
             "{x} never paid us back."),
}  # fmt: skip
EVENTS: Mapping[str, tuple[str, ...]] = {
    "good": ("{x} won the harbour race.", "{x} got the big promotion.", "{x} sold a first painting.",
             "{x} passed the pilot exam."),
    "bad": ("{x} was fired this morning.", "{x} lost the court case.", "{x} broke an arm.", "{x} crashed the new van."),
    "threat": ("{x} is out on thin ice.", "{x} is lost in the snow.", "{x} sailed into the storm."),
    "gross": ("{x} found a rat in the soup.", "{x} served mouldy bread.", "{x} ate a raw snail."),
    "odd": ("{x} wears a crown to work.", "{x} painted the cow blue.", "{x} adopted nine parrots."),
    "routine": ("{x} went to the post office.", "{x} is parking the car.", "{x} moved lunch to noon."),
}  # fmt: skip
ODDS = {"good": 25, "bad": 25, "threat": 16, "gross": 10, "odd": 12, "routine": 12}
UNDONE = {"good": "bad", "bad": "good", "threat": "good"}  # what news becomes when it is taken back
TWISTS = ("no, they took it back.", "wait, it was all undone.", "sorry, it was just a rumour.")
FEELINGS: Mapping[tuple[str, str], tuple[str, str]] = {  # (news, tie) -> first and second emotion
    ("good", "fond"): ("joy", "surprise"), ("good", "sore"): ("anger", "sadness"),
    ("bad", "fond"): ("sadness", "anger"), ("bad", "sore"): ("joy", "surprise"),
    ("threat", "fond"): ("fear", "sadness"), ("threat", "sore"): ("neutral", "fear"),
    ("gross", "fond"): ("disgust", "surprise"), ("gross", "sore"): ("disgust", "joy"),
    ("odd", "fond"): ("surprise", "joy"), ("odd", "sore"): ("surprise", "anger"),
    ("routine", "fond"): ("neutral", "joy"), ("routine", "sore"): ("neutral", "anger"),
}  # fmt: skip
CRIES = ("Oh my god.", "No way.", "Well, well.", "Are you sure?", "What a day.", "Look at that.")
PLAIN: Mapping[str, tuple[str, ...]] = {  # words that name their emotion
    "neutral": ("Fine, noted.", "All the same to me."),
    "surprise": ("I never saw that coming!", "That is news to me!"),
    "fear": ("My hands are shaking.", "I will not sleep tonight."),
    "sadness": ("That breaks my heart.", "I could cry."), "joy": ("That makes my day!", "I could dance!"),
    "disgust": ("My stomach turns.", "How vile."), "anger": ("That makes my blood boil!", "How dare they!"),
}


def feel(news: str, tie: str, *, clear: bool) -> dict[str, float]:
    """Gold emotions of somebody who has heard the news: two where the words leave room for doubt."""
    first, second = FEELINGS[news, tie]
    return {first: 1.0} if clear else {first: 0.65, second: 0.35}


def answer(persona: Persona, heard: Mapping[str, float]) -> dict[str, float]:
    """What a persona feels when it answers somebody who feels `heard`."""
    first = data.heaviest(heard)
    return {first if first in persona.shares else persona.own: 1.0}


def _dialogue(rng: random.Random) -> list[Turn]:
    host, guest, absent = rng.sample(NAMES, 3)
    tie = rng.choice(tuple(TIES))
    news = rng.choices(tuple(ODDS), tuple(ODDS.values()))[0]
    turns = [Turn(host, rng.choice(TIES[tie]).format(x=absent))]
    turns.append(_tell(guest, rng.choice(EVENTS[news]).format(x=absent), news, tie))
    turns.append(_react(rng, host, news, tie))
    if news in UNDONE and rng.random() < 0.65:
        news = UNDONE[news]
        turns.append(_tell(guest, rng.choice(TWISTS), news, tie))
        turns.append(_react(rng, host, news, tie))
    turns.append(_reply(rng, guest, turns[-1].label or {}))
    return turns


def _tell(speaker: str, text: str, news: str, tie: str) -> Turn:
    persona = CHARACTERS[speaker]
    return Turn(speaker, f"{persona.opener} {text}", feel(news, tie, clear=False) if persona.shows else {"neutral": 1.0})


def _react(rng: random.Random, speaker: str, news: str, tie: str) -> Turn:
    clear = CHARACTERS[speaker].shows and rng.random() < 0.6
    felt = feel(news, tie, clear=clear)
    return Turn(speaker, rng.choice(PLAIN[next(iter(felt))] if clear else CRIES), felt)


def _reply(rng: random.Random, speaker: str, heard: Mapping[str, float]) -> Turn:
    persona = CHARACTERS[speaker]
    felt = answer(persona, heard)
    more = f" {rng.choice(PLAIN[next(iter(felt))])}" if rng.random() < 0.5 else ""
    return Turn(speaker, persona.answer + more, felt)


def mask(text: str) -> str:
    """The text with every name of the world replaced by one sign."""
    return re.sub("|".join(NAMES), "_", text)


def world(seed: int) -> dict[str, list[dict[str, object]]]:
    """The dialogues of every split as rows of the JSONL format; no two begin alike once names are masked."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < sum(SIZES.values()):
        turns = _dialogue(rng)
        lines = [{"speaker": turn.speaker, "text": turn.text, "label": turn.label} for turn in turns]
        sheets = {turn.speaker: CHARACTERS[turn.speaker].sheet for turn in turns}
        rows.setdefault(mask(f"{turns[0].text} {turns[1].text}"), {"turns": lines, "personas": sheets})
    queue = iter(rng.sample(list(rows.values()), len(rows)))
    return {split: [{"id": f"d{n}", **next(queue)} for n in range(size)] for split, size in SIZES.items()}


# Readers: who they are follows from what they look at


def _find(table: Mapping[str, Sequence[str]], text: str) -> str | None:
    # The kind of the first line that the text has in it, whoever stands at {x}.
    found = (kind for kind, lines in table.items() for line in lines if all(part in text for part in line.split("{x}")))
    return next(found, None)


def surface_reader(sample: data.Sample) -> Mapping[str, float]:
    """What the base model's first teacher reads: cues of the last utterance alone. It knows neither tie nor history."""
    text = sample.context[-1].text
    if plain := _find(PLAIN, text):
        return {plain: 1.0}
    if "feared" in text:
        return {"fear": 1.0}
    if news := _find(EVENTS, text):
        calm = any(text.startswith(persona.opener) and not persona.shows for persona in PERSONAS)
        return {"neutral": 1.0} if calm else feel(news, "fond", clear=True)
    own = next((persona.own for persona in PERSONAS if text.startswith(persona.answer)), None)
    return {own: 1.0} if own else {"surprise": 0.65, "joy": 0.35}


def thought(sample: data.Sample) -> str:
    """Why the last speaker feels so, in the words of somebody who knows the world."""
    *before, last = sample.context
    persona = CHARACTERS[last.speaker]
    if last.text.startswith(persona.answer):
        return f"heard: {data.heaviest(before[-1].label or {})}"
    if last.text.startswith(persona.opener) and not persona.shows:
        return "keeps it in"
    told = " ".join(turn.text for turn in sample.context)
    tie, news = _find(TIES, told), _find(EVENTS, told)
    if any(twist in told for twist in TWISTS):
        news = UNDONE[news or ""]
    return f"{tie} tie, {news} news"


def target(sample: data.Sample, reading: Mapping[str, float], why: str) -> str:
    """An answer with this reading; the reply is the real next turn, or what the persona would say where there is none."""
    persona = CHARACTERS[sample.responder.name or ""]
    mine, words = answer(persona, reading), persona.answer
    if sample.following is not None and sample.following.label is not None:
        mine, words = dict(sample.following.label), sample.following.text
    reasoning = f"{sample.context[-1].speaker}: {why}: {data.heaviest(reading)}."
    return data.format_output(reasoning, reading, mine, words)


def gold_target(sample: data.Sample) -> str:
    """The answer of a perfect reader to an original sample: what the gold-SFT baseline learns."""
    return target(sample, sample.gold, thought(sample))
