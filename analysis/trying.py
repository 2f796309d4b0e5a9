"""One dialogue at a time: a model answers it n times, and what Algorithm 1 says about the answers stands beside them.

The command is `python evaluate.py try MODEL`.
"""

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tyro

import data
from common.errors import UserError
from common.flags import Pairs, pairs
from common.hub import openable
from common.text import clean, small
from corpora.dialogue import LABELS, Turn, is_group
from data import Failure, Output, Responder, Sample, Selection
from experts.asking import Settings, open_local
from grpo import advantages, consistency, core_emotions, reward

Parse = Output | Failure
Answering = Callable[[Sample], list[tuple[str, bool]]]  # the texts of the n answers, and whether each ended by itself
NARROWEST = 24  # columns; a terminal that says less is not believed


@dataclass(frozen=True)
class TryCommand:
    """Let a model answer one dialogue several times, and show what each answer earns and what selection makes of them.

    The dialogue comes from stdin, one `Name: text` per line; in a terminal an empty line ends it.
    """

    model: tyro.conf.Positional[str]  # Hugging Face folder of a chat model, such as runs/toy/model.
    responder: str = ""  # Who answers. Default: the latest speaker who is not the last one.
    gold: Pairs = ()
    """What the last speaker feels, EMOTION=WEIGHT, repeatable. Without it there is no reward, and the most consistent answer
    stands in for the best one."""
    persona: Pairs = ()  # NAME=TEXT: the persona of a speaker, repeatable.
    labels: str = "meld"  # Label set: meld, emorynlp, iemocap, or names with commas between them.
    n: int = 8  # Answers.
    depth: int = 1  # Turns: from the second one on, the model answers the dialogue that selection made (Eq. 7).
    lam: float = 0.5  # Lambda of Eq. 13: 0 as at the beginning of a run, nearly 1 as at its end.
    keep_reward: float = 0.6  # Least reward of an answer that becomes a new sample (D11).
    temperature: float = 1.0  # Of the sampling.
    max_new_tokens: int = 512  # Longest answer, in tokens.
    seed: int = 0  # Of the sampling.
    date: str = ""  # That the chat template of a folder shows, YYYY-MM-DD; default: today.


@dataclass(frozen=True)
class Tried:
    """The answers to one sample, their numbers (rewards only where there is gold), and what selection says."""

    sample: Sample
    parses: tuple[Parse, ...]
    rewards: tuple[float, ...] | None
    core: Mapping[str, float]
    consistencies: tuple[float, ...]
    advantages: tuple[float, ...]
    selection: Selection


# Reading what the user gives


def read_dialogue(raw: bytes) -> tuple[Turn, ...]:
    """The turns of a text with one `Name: text` per line. Raises `UserError` with the line for one that is none."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the dialogue is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    turns = []
    for number, line in enumerate(text.split("\n"), 1):
        name, colon, said = line.partition(":")
        turn = Turn(name, said)
        if line.strip() and not (colon and turn.speaker and turn.text):
            raise UserError(f"line {number} of the dialogue, {line.strip()[:40]!r}, is not `Name: text`")
        turns += [turn] if line.strip() else []
    if not turns:
        raise UserError("the dialogue is empty: type or pipe lines of the form `Name: text`")
    return tuple(turns)


def from_stdin() -> bytes:
    """All of stdin; of a terminal, up to the first empty line."""
    if sys.stdin is None:  # closed
        return b""
    if not sys.stdin.isatty():
        return sys.stdin.buffer.read()
    print("One `Name: text` per line, and an empty line at the end:", file=sys.stderr, flush=True)
    lines = []
    while (line := sys.stdin.buffer.readline()).strip():
        lines.append(line)
    return b"".join(lines)


def sample_of(command: TryCommand, turns: Sequence[Turn]) -> Sample:
    """The sample of a dialogue. Raises `UserError` for a responder, gold, personas or labels that do not fit it."""
    labels = LABELS.get(command.labels) or tuple(dict.fromkeys(small(name.strip()) for name in command.labels.split(",")))
    if "" in labels:
        raise UserError(f"--labels {command.labels}: give {', '.join(LABELS)}, or names with commas between them")
    personas, last = pairs("persona", command.persona), turns[-1].speaker
    others = [t.speaker for t in reversed(turns) if t.speaker != last and not is_group(t.speaker)]
    name = command.responder.strip() or next(iter(others), None)
    if name == last or (name and is_group(name)):
        why = "nobody answers their own turn" if name == last else "a group cannot answer"
        raise UserError(f"--responder {name}: {why}")
    if unknown := set(personas) - {*(t.speaker for t in turns), name}:
        raise UserError(f"--persona names {', '.join(sorted(unknown))}, who is not in the dialogue")
    gold = {small(emotion): weight(emotion, value) for emotion, value in pairs("gold", command.gold).items()}
    if unknown := set(gold) - set(labels):
        raise UserError(f"--gold names {', '.join(sorted(unknown))}: labels are {', '.join(labels)}")
    responder = Responder(name, personas.get(name or ""), "prev" if name else "none")
    return Sample("try", "try", tuple(turns), responder, labels, gold, personas)


def weight(emotion: str, value: str) -> float:
    """A gold weight. Raises `UserError`."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--gold {emotion}={value}: give a weight above 0, such as {emotion}=0.7")
    return number


def check(command: TryCommand) -> None:
    """Raise `UserError` for numbers that cannot work."""
    least = {"n": 2, "depth": 1, "max_new_tokens": 1, "lam": 0, "temperature": 0, "keep_reward": 0}
    for name, low in least.items():
        if not low <= getattr(command, name) < math.inf:
            raise UserError(f"--{name} is {getattr(command, name)}: it must be at least {low}")


# Trying


def tried(sample: Sample, texts: Sequence[tuple[str, bool]], command: TryCommand, turn: int) -> Tried:
    """Eqs. 6-13 and lines 13-14 for the answers to one sample."""
    parses = tuple(data.parse_output(text, sample.labels, finished=finished) for text, finished in texts)
    predictions = [parse.last_emotions if isinstance(parse, Output) else None for parse in parses]
    r2 = consistency(predictions)
    rewards = tuple(reward(prediction, sample.gold) for prediction in predictions) if sample.gold else None
    # Without gold all rewards count as equal, which leaves the second term of Eq. (13).
    adv = tuple(advantages([rewards or [0.0] * len(parses)], [r2], command.lam)[0].tolist())
    chosen = data.select(
        sample, parses, rewards or r2, turn, keep_reward=command.keep_reward if rewards else 0.0, fits=lambda child: True
    )
    return Tried(sample, parses, rewards, core_emotions(predictions), tuple(r2), adv, chosen)


def conversation(sample: Sample, answers: Answering, command: TryCommand) -> Iterator[Tried]:
    """Turn after turn, as long as selection makes a new sample and `--depth` allows (Eq. 7)."""
    for turn in range(1, command.depth + 1):
        found = tried(sample, answers(sample), command, turn)
        yield found
        if found.selection.child is None:
            return
        sample = found.selection.child


def answering(command: TryCommand) -> Answering:
    """The model of a folder, opened once. Raises `UserError` where that cannot be."""
    tokenizer = openable(command.model)
    settings = Settings(command.temperature, command.max_new_tokens, command.seed, date=command.date)
    replies_to = open_local(command.model, tokenizer)

    def answers(sample: Sample) -> list[tuple[str, bool]]:
        encoded = data.encode(tokenizer, sample, data.DEFAULT, settings.date)
        names = [f"{sample.id}/{i}" for i in range(command.n)]
        return [(reply.text, reply.finished) for reply in replies_to([encoded] * command.n, names, settings)]

    return answers


# Showing


def said(emotions: Mapping[str, float]) -> str:
    """Emotions with their weights."""
    return ", ".join(f"{emotion} {value:.2f}" for emotion, value in emotions.items()) or "none"


def folded(text: str, width: int, first: str = "", later: str | None = None) -> str:
    """A text in lines of at most `width` columns, the lines after the first one begun with `later`.

    What moves a cursor goes: a model may write anything.
    """
    rest = " " * len(first) if later is None else later
    return textwrap.fill(clean(text), width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or first


WHY = {
    "rule": "no answer is valid", "reward": "the best reward is below --keep_reward",
    "label": "too much of what its speaker feels lies outside the label set (D9)",
    "responder": "nobody is there who could answer next (D10)",
}  # fmt: skip


def shown(found: Tried, width: int) -> Iterator[str]:
    """The lines of one turn: the dialogue, a table of the answers, and what selection makes of them."""
    sample, who = found.sample, found.sample.responder
    for line in sample.context:
        yield folded(f"{line.speaker}: {line.text}", width, "", "    ")
    persona = f", {who.persona}" if who.persona else ""
    gold = f"gold {said(sample.gold)}" if sample.gold else "no gold, so no rewards"
    yield folded(f"{who.name or 'A listener'}{persona}, answers; {gold}", width, "  ", "    ")
    yield folded(f"core emotions (Eq. 11): {said(found.core)}", width, "  ", "    ")
    head = f"{'':3}{'reward':>7}{'consist.':>9}{'advant.':>9}  last speaker feels"
    yield from [head] if width >= len(head) else []
    for i, parse in enumerate(found.parses):
        r = f"{found.rewards[i]:.3f}" if found.rewards else "-"
        numbers = (r, f"{found.consistencies[i]:.3f}", f"{found.advantages[i]:+.3f}")
        mark = "*" if i == found.selection.index else " "
        feels = said(parse.last_emotions) if isinstance(parse, Output) else f"rule failed: {parse.reason}"
        if width >= len(head):
            row = f"{i:>2}{mark}{numbers[0]:>7}{numbers[1]:>9}{numbers[2]:>9}  "
            yield folded(feels, width, row)
        else:
            yield folded(f"{i}{mark} r {numbers[0]}, r2 {numbers[1]}, A {numbers[2]}: {feels}", width, "", "   ")
        if isinstance(parse, Output):
            details = {"thinks": parse.reasoning, "feels": said(parse.my_emotions), "says": parse.my_output}
        else:
            details = {"because": parse.detail}
        for name, text in details.items():
            yield folded(f"{name}: {text}", width, "   ", "     ")
    yield from outcome(found, width)


def outcome(found: Tried, width: int) -> Iterator[str]:
    """What selection makes of the answers."""
    child = found.selection.child
    if child is None:
        yield folded(f"No new sample: {WHY.get(found.selection.why, found.selection.why)}.", width)
        return
    how = "the first of the highest reward" if found.rewards else "the first of the most consistent ones"
    yield folded(f"Answer {found.selection.index} (*) is kept, {how}. The new sample (Eq. 7) ends with", width)
    turn = child.context[-1]
    yield folded(f"{turn.speaker}: {turn.text}", width, "  + ", "    ")
    yield folded(f"label {said(child.gold)}; {child.responder.name} answers next", width, "    ", "    ")


def try_command(command: tyro.conf.OmitArgPrefixes[TryCommand]) -> int:
    """Answer one dialogue and show what comes of it."""
    check(command)
    sample = sample_of(command, read_dialogue(from_stdin()))
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    for turn, found in enumerate(conversation(sample, answering(command), command), 1):
        title = [f"Turn {turn} of at most {command.depth}"] if command.depth > 1 else []
        print("\n".join([*title, *shown(found, width), ""]), flush=True)
    return 0
