"""Samples, prompts, the answer parser, and the new samples that self-play makes (Eqs. 5-7). No torch here.

    python data.py download --to data
    python data.py stats --data meld=data/meld --data emorynlp=data/emorynlp [--tokenizer DIR]
    python data.py audit --data meld=data/meld --data emorynlp=data/emorynlp [--json]

corpora/ reads dialogues from files. Each of their labelled turns becomes a `Sample`: a context C that ends with the turn to
recognise, somebody who answers, and gold weights. `encode` makes its prompt, `parse_output` reads an answer, `select` and
`new_sample` turn the best answer into another sample.
"""

import common  # noqa: F401  # isort: skip  its check of Python comes first
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from common.draws import stable_hash
from common.errors import command
from common.flags import Pairs, roots
from common.scanner import NUMBER, SIGN, WORD, Broken, Scanner
from common.template import render
from common.text import clean, small, words
from corpora import iemocap
from corpora.check import audit
from corpora.dialogue import SPLITS, Dialogue, Turn, Weights, is_group
from corpora.download import download
from corpora.loading import Context, Personas, label_set, load
from corpora.strict import file_text, json_value, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scope = Literal["none", "context", "dialogue"]  # what the personas of dev and test were made from (D28)


@dataclass(frozen=True)
class Responder:
    """Who answers, with which persona PI (None: unknown), and how it was found: see `samples`, `new_sample`."""

    name: str | None
    persona: str | None
    kind: Literal["next", "later", "prev", "none", "swap"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", clean(self.name or "") or None)
        object.__setattr__(self, "persona", clean(self.persona or "") or None)


@dataclass(frozen=True)
class Sample:
    """A context C whose last turn is to be recognised, who answers it, and gold: its emotions with their weights.

    The id of a sample that self-play made is <parent>+<iteration>.
    """

    id: str
    dataset: str
    context: tuple[Turn, ...]
    responder: Responder
    labels: tuple[str, ...]
    gold: Weights
    personas: Mapping[str, str] = field(default_factory=dict)
    following: Turn | None = None  # the real next turn, where the responder speaks it
    origin: Literal["original", "synthetic"] = "original"
    parent: str | None = None
    iteration: int = 0
    depth: int = 0

    @property
    def root(self) -> str:
        """Id of the original sample that this one descends from."""
        return self.id.partition("+")[0]


@dataclass(frozen=True)
class Output:
    """A valid answer (Eq. 6): Prediction_o, Label_s, r. `spans`: character ranges of the three values in the text."""

    reasoning: str
    last_emotions: dict[str, float]
    my_emotions: dict[str, float]
    my_output: str
    spans: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Failure:
    """An answer that breaks the rule: rule(.) = 0 in Eq. 8. `reason` is one of unfinished too_long think dictionary trailing
    keys last_emotions label weight my_emotions my_output duplicate."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Completion:
    """A sampled answer: token ids with the end-of-sequence token, their log-probs (nats), whether it ended by itself.

    `text` and `parse` are there once it has been read: what was parsed, and what came of it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    text: str = ""
    parse: Output | Failure = Failure("unread", "not decoded yet")


def heaviest(weights: Weights) -> str:
    """The emotion with the largest weight, the first of them in a tie (D15); "" of nothing."""
    return max(weights, key=lambda emotion: weights[emotion], default="")


def read_samples(
    dataset: str,
    root: str | Path,
    split: str,
    *,
    context: Context = "labelled",
    soft_labels: bool = False,
    personas: Personas | None = None,
    persona_scope: Scope = "none",
) -> list[Sample]:
    """The original samples of one split of a dataset: `corpora.loading.load`, then `samples`. Raises `UserError`."""
    dialogues = load(dataset, root, split, context=context, soft_labels=soft_labels)
    return samples(dialogues, label_set(dataset, root), personas=personas, persona_scope=persona_scope)


def samples(
    dialogues: Iterable[Dialogue], labels: Sequence[str], *, personas: Personas | None = None, persona_scope: Scope = "none"
) -> list[Sample]:
    """One original sample per labelled turn, id <dialogue key>/<utterance id>.

    The responder is the next speaker if that is somebody else (`next`), else the next other speaker further on (`later`),
    else the nearest earlier one (`prev`), else nobody (`none`). Groups never respond.
    `personas` saw whole dialogues: they serve train, and dev and test only with persona_scope="dialogue", as in the paper;
    with "context" those that are filed under a sample's id serve it (D28). A dialogue's own sheet always serves.
    """
    made = []
    for d in dialogues:
        for i, turn in enumerate(d.turns):
            if turn.label is not None:
                key = f"{d.key}/{turn.id or i}"
                scope = "dialogue" if d.split == "train" else persona_scope
                filed = (personas or {}).get({"dialogue": d.key, "context": key}.get(scope, ""), {})
                # D28: several experts described every speaker, a sample draws one of them.
                sheet = {name: said[stable_hash(key) % len(said)] for name, said in filed.items()} | dict(d.personas)
                name, kind = _responder(d.turns, i)
                responder = Responder(name, sheet.get(name or ""), kind)
                follow = d.turns[i + 1] if kind == "next" else None
                context, gold = d.turns[: i + 1], dict(turn.label)
                made.append(Sample(key, d.dataset, context, responder, tuple(labels), gold, sheet, follow))
    return made


def _responder(turns: Sequence[Turn], i: int) -> tuple[str | None, Literal["next", "later", "prev", "none"]]:
    others = [j for j, t in enumerate(turns) if t.speaker != turns[i].speaker and not is_group(t.speaker)]
    after, before = [j for j in others if j > i], [j for j in others if j < i]
    if after:
        return turns[after[0]].speaker, "next" if after[0] == i + 1 else "later"
    return (turns[before[-1]].speaker, "prev") if before else (None, "none")


# Prompts: the contract of Table 5 in our words (D16)


@dataclass(frozen=True)
class Prompts:
    """P_gen. `persona` joins the system text where there is one; `listener` stands for a responder without a name."""

    system: str = (
        "You are {name}, taking part in a conversation.{persona}\n"
        "Infer the emotions, the personality and the thoughts behind the last line. Then decide what you feel yourself and "
        "answer in character.\n"
        "Emotions: {labels}."
    )
    persona: str = " Your character: {persona}"
    listener: str = "a listener"
    user: str = (
        "{history}\n\n"
        "Think about the last line inside <think></think>. After that write one Python dictionary and nothing else:\n"
        "'last_emotions': one to three emotions of the last speaker, each with a weight from 0.1 to 1;\n"
        "'my_emotions': one to three emotions that you feel, weighted likewise;\n"
        "'my_output': your answer."
    )


DEFAULT = Prompts()
PLACEHOLDER = re.compile(r"\{(name|persona|labels|history)\}")


def read_prompts(path: str | Path) -> Prompts:
    """Prompts from a JSON object with some of the texts of `Prompts`, each with the same placeholders as ours."""
    with reading(str(path), 'an object such as {"user": "{history} ..."}'):
        prompts = Prompts(**json_value(file_text(Path(path))))
        for name, ours in asdict(DEFAULT).items():
            needed = set(PLACEHOLDER.findall(ours))
            if set(PLACEHOLDER.findall(getattr(prompts, name))) != needed:
                raise ValueError(f"the placeholders of {name!r} must be: {', '.join(sorted(needed)) or 'none'}")
        return prompts


def _fill(template: str, **values: str) -> str:
    # In one pass: a placeholder written inside a value stays text.
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def chat(system: str, user: str) -> list[dict[str, str]]:
    """The two messages of a prompt."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def safe(text: str, control: Iterable[str]) -> str:
    """The text of a dialogue with the texts of control tokens broken up."""
    for token in control:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def history(turns: Iterable[Turn], control: Iterable[str]) -> str:
    """The turns as lines of `Name: text`. The first colon of a line ends the name."""
    return safe("\n".join(f"{turn.speaker.replace(':', ' ')}: {turn.text}" for turn in turns), control)


def messages(sample: Sample, prompts: Prompts, control: Sequence[str] = ()) -> list[dict[str, str]]:
    """System and user message of a sample. `control`: texts of control tokens, broken up where the dialogue has them."""
    who = sample.responder
    persona = _fill(prompts.persona, persona=safe(who.persona, control)) if who.persona else ""
    name = safe(who.name, control) if who.name else prompts.listener
    system = _fill(prompts.system, name=name, persona=persona, labels=", ".join(sample.labels))
    return chat(system, _fill(prompts.user, history=history(sample.context, control)))


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What `messages` breaks up for this tokenizer, longest first."""
    return sorted((token for token in tokenizer.get_added_vocab() if len(token.strip()) > 1), key=len, reverse=True)


def encode(tokenizer: "PreTrainedTokenizerBase", sample: Sample, prompts: Prompts, date: str = "") -> tuple[list[int], str]:
    """Prompt ids of a sample, and the think block that the template leaves open, else "": see `common.template.render`."""
    return render(tokenizer, messages(sample, prompts, control_tokens(tokenizer)), date)


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], eos_ids: Iterable[int], prefix: str) -> str:
    """The text to parse: `prefix` and the answer with its special tokens, all but the one final EOS."""
    kept = list(ids[:-1] if ids and ids[-1] in set(eos_ids) else ids)
    return prefix + str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# The answer parser: Extract(.) of Eq. (6) and rule(.) of Eq. (8), D8

MAX_BYTES = 64 * 1024
KEYS = ("last_emotions", "my_emotions", "my_output")
THINK = re.compile(r"\s*+<think>(.*?)</think>", re.DOTALL)


def read_emotions(scanner: Scanner, key: str, labels: Sequence[str]) -> dict[str, float]:
    """The next dictionary of one to three emotions, weights from 0.1 to 1 (D8), in lower case; those of `last_emotions` are
    among `labels`. Raises Broken for another one."""
    found: dict[str, float] = {}
    for name in scanner.entries(reason=key):
        emotion = small(name) if small(name) in labels else name.lower()
        if emotion in found:
            raise Broken("duplicate", f"{name[:40]!r} a second time")
        if not clean(name) or (key == "last_emotions" and emotion not in labels):
            raise Broken("label" if key == "last_emotions" else key, f"{name[:40]!r} is not a label")
        word = scanner.take(WORD, "a number", reason="weight")
        if len(word) > 40 or not NUMBER.fullmatch(word) or not 0.1 <= float(word) <= 1:
            raise Broken("weight", f"{word[:40]!r} is not a decimal number from 0.1 to 1")
        found[emotion] = float(word)
        if len(found) > 3:
            raise Broken(key, "more than three emotions")
    if not found:
        raise Broken(key, "no emotion")
    return found


def parse_output(text: str, labels: Sequence[str], *, finished: bool = True) -> Output | Failure:
    """Read one answer: think block, dictionary, nothing else (D8). Never raises, never evaluates; linear, at most 64 KiB.

    `labels` in lower case; `finished`: the answer ended with EOS. A failure names the first thing wrong from the left.
    """
    try:
        return _parse(text, labels, finished)
    except Broken as broken:
        return Failure(*broken.args)


def _parse(text: str, labels: Sequence[str], finished: bool) -> Output:
    if not finished:
        raise Broken("unfinished", "cut off before the end of the answer")
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise Broken("too_long", f"more than {MAX_BYTES} bytes")
    think = THINK.match(text)
    if not think or not clean(think[1]):
        raise Broken("think", "no <think> block, or a blank one, at the beginning")
    scanner = Scanner(text, think.end())
    found: dict[str, Any] = {}
    spans = {}
    for key in scanner.entries():
        if key in found or key not in KEYS:
            raise Broken("duplicate" if key in found else "keys", f"{key[:40]!r}")
        start = scanner.position
        if key == "my_output":
            found[key] = scanner.string(reason=key)
        else:
            found[key] = read_emotions(scanner, key, labels)
        spans[key] = (start, scanner.position)
    if len(found) < len(KEYS):
        raise Broken("keys", f"no {', '.join(key for key in KEYS if key not in found)}")
    if not clean(found["my_output"]):
        raise Broken("my_output", "a blank answer")
    if SIGN.match(text, scanner.position):
        raise Broken("trailing", f"text after the dictionary, from character {scanner.position}")
    return Output(reasoning=think[1], spans=spans, **found)


def format_output(
    reasoning: str, last_emotions: Weights, my_emotions: Weights, my_output: str, *, quoted: Callable[[str], str] = repr
) -> str:
    """The canonical text of an answer; `parse_output` gives the parts back. ValueError if the reasoning is not possible.

    `quoted` writes `my_output` as a Python string.
    """
    if not clean(reasoning) or "</think>" in reasoning:
        raise ValueError("the reasoning must be a text without </think>")
    last, mine = ({emotion: float(w) for emotion, w in weights.items()} for weights in (last_emotions, my_emotions))
    values = zip(KEYS, (repr(last), repr(mine), quoted(my_output)), strict=True)
    return f"<think>{reasoning}</think>\n{{{', '.join(f'{key!r}: {value}' for key, value in values)}}}"


# Selection and new samples (Algorithm 1, lines 13-15)


@dataclass(frozen=True)
class Selection:
    """The kept answer's index and the sample it makes, or None and None; why: kept rule reward label responder length."""

    index: int | None
    why: str
    child: Sample | None


def best(parses: Sequence[Output | Failure], rewards: Sequence[float]) -> int | None:
    """Line 13: index of the first answer of highest reward; None if none is valid."""
    valid = [i for i, parse in enumerate(parses) if isinstance(parse, Output)]
    return max(valid, key=lambda i: rewards[i], default=None)


def select(
    sample: Sample, parses: Sequence[Output | Failure], rewards: Sequence[float], iteration: int,
    *, keep_reward: float, fits: Callable[[Sample], bool],
) -> Selection:  # fmt: skip
    """Lines 13-14: the best answer, if its reward reaches `keep_reward` and its new sample `fits` the prompt limit (D11)."""
    index = best(parses, rewards)
    if index is None or not isinstance(output := parses[index], Output):
        return Selection(None, "rule", None)
    if rewards[index] < keep_reward:
        return Selection(None, "reward", None)
    child = new_sample(sample, output, iteration)
    if isinstance(child, str):
        return Selection(None, child, None)
    return Selection(index, "kept", child) if fits(child) else Selection(None, "length", None)


def new_sample(sample: Sample, output: Output, iteration: int) -> Sample | str:
    """The sample d* that an answer makes, or why it makes none: `label` or `responder`."""
    name = sample.responder.name
    # D10: roles swap. The one just recognised answers next, else the latest other one who can.
    others = (t.speaker for t in reversed(sample.context) if t.speaker != name and not is_group(t.speaker))
    swapped = next(others, None)
    if name is None or swapped is None:
        return "responder"
    # D9: feelings outside the label set are dropped, and the sample with them unless half of the weight stays.
    gold = {emotion: weight for emotion, weight in output.my_emotions.items() if emotion in sample.labels}
    if 2 * math.fsum(gold.values()) < math.fsum(output.my_emotions.values()):
        return "label"
    return replace(
        sample,
        id=f"{sample.id}+{iteration}",
        # Eq. (7): C_new = C with r as its last turn, Label_new = Label_s
        context=(*sample.context, Turn(name, output.my_output, gold)),
        gold=gold,
        responder=Responder(swapped, sample.personas.get(swapped), "swap"),
        following=None,
        origin="synthetic",
        parent=sample.id,
        iteration=iteration,
        depth=sample.depth + 1,
    )


# The commands


def stats(data: Pairs, tokenizer: str = "", context: Context = "labelled") -> Iterator[str]:
    """Count dialogues, samples, labels, responders and prompt lengths.

    Args:
        data: NAME=DIR of a dataset; repeatable.
        tokenizer: Hugging Face folder: count its tokens instead of words.
        context: Turns of IEMOCAP in the context: labelled ones as the benchmarks, or all.
    """
    opened = None
    if tokenizer:
        from common.hub import load_tokenizer  # torch comes with it

        opened = load_tokenizer(tokenizer)
    for name, root in roots(data).items():
        splits = {split: load(name, root, split, context=context) for split in SPLITS}
        for split, dialogues in splits.items():
            made = samples(dialogues, label_set(name, root))
            labels, kinds = Counter(heaviest(s.gold) for s in made), Counter(s.responder.kind for s in made)
            yield f"{name}/{split}: {len(dialogues)} dialogues, {len(made)} samples"
            yield "  labels: " + ", ".join(f"{label} {n}" for label, n in labels.most_common())
            yield "  responders: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
            texts = [" ".join(m["content"] for m in messages(s, DEFAULT)) for s in made]
            n = sorted(map(len, [encode(opened, s, DEFAULT)[0] for s in made] if opened else map(words, texts))) or [0]
            p50, p95 = (n[round(q * (len(n) - 1))] for q in (0.5, 0.95))
            what = "tokens" if opened else "words"
            yield f"  {what} per prompt: mean {statistics.fmean(n):.0f}, p50 {p50}, p95 {p95}, max {n[-1]}"
        if name == "iemocap":
            yield "iemocap: self-check {} ({})".format(*iemocap.self_check(d for split in splits.values() for d in split))


def main() -> int:
    """Run a command: stats, download or audit. See `common.errors.command` for the exit status."""
    commands: dict[str, Callable[..., Iterator[str]]] = {"stats": stats, "download": download, "audit": audit}

    def work() -> None:
        for line in tyro.extras.subcommand_cli_from_dict(commands, description=__doc__):
            print(line, flush=True)

    return command(work)


if __name__ == "__main__":
    sys.exit(main())
