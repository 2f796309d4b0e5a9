"""Dialogues, samples, prompts, the answer parser, and the new samples that self-play makes (Eqs. 5-7). No torch here.

    python data.py download --to data
    python data.py stats --data meld=data/meld --data emorynlp=data/emorynlp [--tokenizer DIR]
    python data.py audit --data meld=data/meld --data emorynlp=data/emorynlp [--json]

A `Dialogue` is read from a file. Each of its labelled turns becomes a `Sample`: a context C that ends with the turn to
recognise, somebody who answers, and gold weights. `encode` makes its prompt, `parse_output` reads an answer, `select`
and `new_sample` turn the best answer into another sample.
"""

import ast
import csv
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weights = Mapping[str, float]  # emotion -> weight > 0; they need not sum to 1, Eq. (9) normalises
Personas = Mapping[str, Mapping[str, tuple[str, ...]]]  # dialogue key -> speaker -> a sentence of each expert

SPLITS = ("train", "dev", "test")
LABELS: Mapping[str, tuple[str, ...]] = {
    "meld": ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    "emorynlp": ("joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared"),
    "iemocap": ("happy", "sad", "neutral", "angry", "excited", "frustrated"),
}


class UserError(Exception):
    """A user's mistake. Its text is one line: where, what, and how to mend it."""


def refuse(error: UserError | OSError) -> int:
    """Say in one line on stderr what a user has to mend, or which file cannot be used. Returns the exit status, 2."""
    file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    print(f"error: {getattr(error, 'strerror', None) or error}{file}", file=sys.stderr)
    return 2


JOINERS = "\u200c\u200d"  # invisible, but part of some spellings and emoji


def clean(text: str) -> str:
    """One line: Unicode's whitespace and line breaks become single spaces, other invisible characters go.

    Every turn passes through here, the model's own replies too: none can begin a second line of the history.
    """
    spaced = " ".join(text.split())
    if spaced.isprintable():
        return spaced
    shown = (c for c in spaced if c in JOINERS or unicodedata.category(c) not in {"Cc", "Cf", "Cs"})
    return " ".join("".join(shown).split()).strip(" " + JOINERS)


@dataclass(frozen=True)
class Turn:
    """One utterance. `label` is None where nobody annotated it; `id` is the file's own utterance id."""

    speaker: str
    text: str
    label: Weights | None = None
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "speaker", clean(self.speaker))
        object.__setattr__(self, "text", clean(self.text))


@dataclass(frozen=True)
class Dialogue:
    """Turns in conversation order. `id` is unique within a split; `personas` is a user's own character sheet."""

    id: str
    dataset: str
    split: str
    turns: tuple[Turn, ...]
    personas: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """dataset/split/id, because ids start again in every split."""
        return f"{self.dataset}/{self.split}/{self.id}"


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
    """A context C whose last turn is to be recognised, the responder, and gold weights. Children: <parent>+<iteration>."""

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
    """An answer with rule(.) = 0. Reasons: unfinished too_long think dictionary trailing keys last_emotions label weight
    my_emotions my_output duplicate."""

    reason: str
    detail: str


# Reading files

TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {  # file of a split, columns that together number a dialogue
    "meld": ("{}_sent_emo.csv", ("Dialogue_ID",)),
    "emorynlp": ("emorynlp_{}_final.csv", ("Season", "Episode", "Scene_ID")),
}
CP1252 = dict(zip(range(0x91, 0x98), "‘’“”•–—", strict=True))  # older copies hold these as control characters
DIALOGUE = '{"id": "d1", "turns": [{"speaker": "Ann", "text": "Hi.", "label": "joy" or {"joy": 0.7, ...} or null}]}'


def load(
    dataset: str,
    root: str | Path,
    split: str,
    *,
    context: Literal["labelled", "all"] = "labelled",
    soft_labels: bool = False,
) -> list[Dialogue]:
    """The dialogues of one split: `meld` and `emorynlp` from the CSV files of declare-lab/MELD, `iemocap` from its official
    release or the folder around it (D22), any other name from {train,dev,test}.jsonl in `root`, a dialogue a line as in
    DIALOGUE, with "personas": {name: sentence} if there are any.

    `context` is for IEMOCAP: drop unlabelled turns as benchmarks do, or keep them. `soft_labels`: annotators' votes as
    gold (D14); JSONL labels may be soft anyway. Raises UserError that names file and line.
    """
    if split not in SPLITS or not re.fullmatch(r"[\w.-]+", dataset):
        raise UserError(f"{dataset}/{split}: splits are {', '.join(SPLITS)}; names have letters, digits, '.', '_', '-'")
    if dataset == "iemocap":
        import iemocap

        return iemocap.load(root, split, context=context, soft_labels=soft_labels)
    if dataset not in TABLES:
        return _jsonl(dataset, Path(root), split, label_set(dataset, root))
    with_votes([dataset], soft_labels)
    return _table(dataset, Path(root), split)


def with_votes(datasets: Iterable[str], wanted: bool) -> dict[str, bool]:
    """Which datasets take votes as gold if they are wanted: all but those of CSV files. Raises UserError if none has any."""
    having = {name: wanted and name not in TABLES for name in datasets}
    if wanted and not any(having.values()):
        raise UserError(f"--soft_labels: the {', '.join(having)} files hold no votes; give --gold FILE or leave it out")
    return having


def label_set(dataset: str, root: str | Path) -> tuple[str, ...]:
    """The labels in their order: of the known datasets, else labels.json (a list), else the sorted ones of train.jsonl."""
    path = Path(root) / "labels.json"
    if dataset in LABELS:
        return LABELS[dataset]
    if not path.exists():
        turns = [turn for d in _jsonl(dataset, Path(root), "train", None) for turn in d.turns]
        return tuple(sorted({label for turn in turns for label in turn.label or ()}))
    with _reading(str(path), 'a list such as ["joy", "anger"]'):
        names = _json(_text(path))
        if not isinstance(names, list) or len(set(names)) < len(names):
            raise ValueError("no list, or a label twice")
        return tuple(_weights(dict.fromkeys(names, 1.0)))


UNREADABLE = (
    *(csv.Error, AttributeError, TypeError, ValueError, ArithmeticError, SyntaxError),
    *(RecursionError, MemoryError),
)


@contextmanager
def _reading(where: str, shape: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line: where, what, and the shape that is expected."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing; expected {shape}") from None
    except UNREADABLE as error:
        raise UserError(f"{where}: {str(error)[:400]}; expected {shape}") from None


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        names = f"{', '.join(LABELS)}, or any other name for a folder of JSONL files"
        raise UserError(f"{path}: {error.strerror}; check NAME=DIR (NAME is {names})") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file in that encoding") from None
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        raise UserError(f"{path}:{line}: a zero byte, which no text has; the file is damaged, or its encoding not UTF-8")
    return text


def _json(text: str) -> Any:
    """A JSON value. ValueError too for an object with a key twice: which of the two is meant, nobody knows."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key twice among {', '.join(key for key, _ in pairs)!r:.80}")
        return found

    return json.loads(text, object_pairs_hook=once)


def _fields(row: Any, known: Iterable[str]) -> None:
    """ValueError for a field that is not known: a label under a misspelt name would be a turn without one."""
    if isinstance(row, dict) and (others := [name for name in row if name not in known]):
        raise ValueError(f"unknown field {others[0]!r:.60}")


def _records(path: Path, shape: str, build: Callable[[str], tuple[Any, Any]], skip: int = 0) -> dict[Any, Any]:
    """The keys and values that `build` makes of the lines of a file."""
    found: dict[Any, Any] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if number > skip and line.strip():
            with _reading(f"{path}:{number}", shape):
                key, value = build(line)
                if key in found:
                    raise ValueError(f"{key!r} a second time")
                found[key] = value
    if not found:
        raise UserError(f"{path}: nothing in it; expected {shape}")
    return found


def _jsonl(dataset: str, root: Path, split: str, labels: Sequence[str] | None) -> list[Dialogue]:
    def turn(row: Any, number: int) -> Turn:
        _fields(row, ("speaker", "text", "label"))
        speaker, text, label = _shown(row["speaker"]), _shown(row["text"]), row["label"]
        label = None if label is None else _weights({label: 1.0} if isinstance(label, str) else label, labels)
        return Turn(speaker, text, label, str(number))

    def dialogue(line: str) -> tuple[str, Dialogue]:
        row = _json(line)
        _fields(row, ("id", "turns", "personas"))
        if not re.fullmatch(r"[\w.:-]+", row["id"]):  # sample ids add "/" and "+"
            raise ValueError(f"the id {row['id']!r} has other signs than letters, digits and . _ : -")
        turns, given = tuple(turn(t, i) for i, t in enumerate(row["turns"])), row.get("personas")
        sheet = {clean(name): clean(_shown(text)) for name, text in ({} if given is None else given).items()}
        if not turns or len(sheet) < len(given or ()):
            raise ValueError("no turns, or a persona twice")
        return row["id"], Dialogue(row["id"], dataset, split, turns, sheet)

    return list(_records(root / f"{split}.jsonl", DIALOGUE, dialogue).values())


def _table(dataset: str, root: Path, split: str) -> list[Dialogue]:
    name, columns = TABLES[dataset]
    path = root / name.format(split)
    shape = f"a row of {dataset} as in declare-lab/MELD"
    with _reading(f"{path}:1", f"the header of {dataset} as in declare-lab/MELD"):
        header = next(csv.reader(_text(path).split("\n")[:1], strict=True))
        for column in (*columns, "Utterance_ID", "Utterance", "Speaker", "Emotion"):
            if header.count(column) != 1:
                raise ValueError(f"the column {column!r} is {'missing' if column not in header else 'there twice'}")

    def turn(line: str) -> tuple[tuple[str, int], Turn]:
        fields = next(csv.reader([line], strict=True))  # no field of these files holds a line break
        if len(fields) != len(header):
            raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        scene, number = "_".join(str(_number(row[column])) for column in columns), _number(row["Utterance_ID"])
        speaker = _speakers(row["Speaker"]) if dataset == "emorynlp" else _shown(row["Speaker"])
        label = _weights({row["Emotion"]: 1.0}, LABELS[dataset])
        return (scene, number), Turn(speaker, _shown(row["Utterance"]), label, str(number))

    turns = _records(path, shape, turn, skip=1)
    scenes: dict[str, list[Turn]] = {scene: [] for scene, _ in turns}
    # Utterance ids order the turns but do not count them: lines are missing.
    for scene, number in sorted(turns, key=lambda key: int(key[1])):
        scenes[scene].append(turns[scene, number])
    return [Dialogue(scene, dataset, split, tuple(found)) for scene, found in scenes.items()]


def _speakers(cell: str) -> str:
    names = ast.literal_eval(cell) if len(cell) < 500 else None
    if not isinstance(names, list) or not names:
        raise ValueError(f"the speakers {cell[:40]!r} are not a list such as ['Monica Geller']")
    return " and ".join(_shown(name) for name in names)


def _number(cell: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", cell):  # int() would take "1 " and "1_0" too
        raise ValueError(f"{cell!r:.60} where a number is needed")
    return int(cell)


def _shown(text: Any) -> str:
    if not isinstance(text, str) or not clean(text):
        raise ValueError(f"{text!r:.60} where a text is needed")
    return text.translate(CP1252)


def _weights(raw: Mapping[Any, Any], labels: Sequence[str] | None = None) -> dict[str, float]:
    if odd := [weight for weight in raw.values() if type(weight) not in (int, float)]:
        raise ValueError(f"weight {odd[0]!r:.60} is no number")
    weights = {name.strip().lower(): float(weight) for name, weight in raw.items()}
    for name, weight in weights.items():
        if not re.fullmatch(r"[^\W_][\w -]*", name) or name not in (labels or weights):
            raise ValueError(f"unknown label {name!r}" + (f", known are {' '.join(labels)}" if labels else ""))
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {weight} of {name!r} is not above 0")
    if not 0 < len(weights) == len(raw):
        raise ValueError("no label, or one twice")
    return weights


# From dialogues to samples

GROUP = re.compile(
    r"#?all#?|both|every(one|body)|(the )?(guys|girls|kids|others|crowd)|.+\b(friends|sisters)|.+ (and|&) .+", re.IGNORECASE
)


def is_group(name: str) -> bool:
    """Whether a name stands for several people, who cannot answer as one."""
    return GROUP.fullmatch(name) is not None


def samples(
    dialogues: Iterable[Dialogue],
    labels: Sequence[str],
    *,
    personas: Personas | None = None,
    persona_scope: Literal["none", "context", "dialogue"] = "none",
) -> list[Sample]:
    """One original sample a labelled turn, id <dialogue key>/<utterance id>.

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


def stable_hash(text: str) -> int:
    """A number that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def read_personas(path: str | Path) -> Personas:
    """Personas of Eq. (4) from JSONL rows {"dialogue": "meld/train/703", "speaker", "persona", "expert"}."""
    fields = ("expert", "dialogue", "speaker")
    shape = '{"dialogue": "meld/train/703", "speaker": "Joey", "persona": "...", "expert": "..."}'

    def sentence(line: str) -> tuple[tuple[str, ...], str]:
        row = _json(line)
        return tuple(clean(_shown(row[name])) for name in fields), clean(_shown(row["persona"]))

    rows = _records(Path(path), shape, sentence)
    found: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for (_, dialogue, speaker), persona in sorted(rows.items()):
        found[dialogue][speaker] = (*found[dialogue].get(speaker, ()), persona)
    return dict(found)


def read_gold(path: str | Path) -> dict[str, dict[str, float]]:
    """Gold weights that replace the files' own (D14), from JSONL rows {"id": sample id, "weights": {label: weight}}."""
    shape = '{"id": "meld/train/703/6", "weights": {"neutral": 0.85, "surprise": 0.45}}'

    def weights(line: str) -> tuple[str, dict[str, float]]:
        row = _json(line)
        return _shown(row["id"]), _weights(row["weights"])

    return _records(Path(path), shape, weights)


def with_gold(samples: Iterable[Sample], gold: Mapping[str, Weights]) -> list[Sample]:
    """The samples with other gold. Raises UserError for an id that no sample has, and for an unknown label."""
    known = {sample.id: sample for sample in samples}
    for key, weights in gold.items():
        if key not in known or not weights.keys() <= set(known[key].labels):
            labels = f"{', '.join(weights)}: labels are {', '.join(known[key].labels)}" if key in known else "no such sample"
            raise UserError(f"--gold: {key}: {labels}")
    return [replace(s, gold=dict(gold[s.id])) if s.id in gold else s for s in known.values()]


def shared_lines(dialogues: Iterable[Dialogue], others: Iterable[Dialogue]) -> dict[str, Counter[str]]:
    """Dialogue key -> key of another dialogue -> how many different long lines both have."""
    heard = defaultdict(set)
    for d in others:
        for line in _long_lines(d):
            heard[line].add(d.key)
    return {d.key: Counter(key for line in _long_lines(d) for key in heard[line] - {d.key}) for d in dialogues}


def overlap(train: Iterable[Dialogue], test: Iterable[Dialogue]) -> set[str]:
    """Keys of train dialogues that share two or more lines of six or more words with one test dialogue (D24).

    The other way round, the test dialogues that share as much with one train dialogue: those that are not clean.
    """
    shared = shared_lines(train, test)
    return {key for key, counts in shared.items() if max(counts.values(), default=0) >= 2}


def drop_overlap(train: Sequence[Dialogue], test: Iterable[Dialogue]) -> list[Dialogue]:
    """The train dialogues that `overlap` does not name."""
    gone = overlap(train, test)
    return [d for d in train if d.key not in gone]


def long_line(text: str) -> str | None:
    """The words of a line without case and punctuation, if there are at least six."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return " ".join(words) if len(words) >= 6 else None


def _long_lines(dialogue: Dialogue) -> set[str]:
    return {line for turn in dialogue.turns if (line := long_line(turn.text))}


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
    with _reading(str(path), 'an object such as {"user": "{history} ..."}'):
        prompts = Prompts(**_json(_text(Path(path))))
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
    """One `Name: text` a line. The first colon of a line ends the name."""
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


def encode(tokenizer: "PreTrainedTokenizerBase", sample: Sample, prompts: Prompts) -> tuple[list[int], str]:
    """Prompt ids by the tokenizer's own chat template, and the think block that the template leaves open, else ""."""
    return render(tokenizer, messages(sample, prompts, control_tokens(tokenizer)))


def render(tokenizer: "PreTrainedTokenizerBase", made: list[dict[str, str]]) -> tuple[list[int], str]:
    """`encode` for messages that are made already. Raises `UserError` where there is no chat template."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use a chat (instruct) model")
    # A template that does not know enable_thinking ignores it.
    text = str(tokenizer.apply_chat_template(made, tokenize=False, add_generation_prompt=True, enable_thinking=True))
    opened = re.search(r"<think>\s*\Z", text)
    return list(tokenizer.encode(text, add_special_tokens=False)), opened[0] if opened else ""


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], eos_ids: Iterable[int], prefix: str) -> str:
    """The text to parse: `prefix` and the answer with its special tokens, all but the one final EOS."""
    kept = list(ids[:-1] if ids and ids[-1] in set(eos_ids) else ids)
    return prefix + str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# The answer parser: Extract(.) of Eq. (6) and rule(.) of Eq. (8), D8

MAX_BYTES = 64 * 1024
KEYS = ("last_emotions", "my_emotions", "my_output")
THINK = re.compile(r"\s*+<think>(.*?)</think>", re.DOTALL)
# Possessive repeats (*+ and ++) never go back over what they took: linear on every text.
STRING = re.compile(r"""\s*+('(?:[^'\\\r\n]|\\.)*+'|"(?:[^"\\\r\n]|\\.)*+")""")
WORD = re.compile(r"""\s*+([^\s'"{}:,]++)""")
SIGN, OPEN, CLOSE, COLON = map(re.compile, (r"\s*+(\S)", r"\s*+({)", r"\s*+(})", r"\s*+(:)\s*+"))
NUMBER = re.compile(r"((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
ESCAPES = dict(zip("\\'\"/abfnrtv", "\\'\"/\a\b\f\n\r\t\v", strict=True))


class _Broken(Exception):
    """Reason and detail of a `Failure`."""


class _Scanner:
    """A cursor that reads Python or JSON strings, numbers and dictionaries; each step moves on or ends the reading."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position = text, position

    def take(self, pattern: re.Pattern[str], what: str, reason: str = "dictionary") -> str:
        """What `pattern` finds here. Fails for `reason`; at the end of the text and at an open quote, as `dictionary`."""
        match = pattern.match(self.text, self.position)
        if not match:
            sign = SIGN.match(self.text, self.position)
            cut = sign is None or (pattern is STRING and sign[1] in "'\"")
            raise _Broken("dictionary" if cut else reason, f"{what} expected at character {self.position}")
        self.position = match.end()
        return match[1]

    def skip(self, sign: str) -> bool:
        """Whether the next sign is this one; it is passed then."""
        match = SIGN.match(self.text, self.position)
        if match and match[1] == sign:
            self.position = match.end()
        return match is not None and match[1] == sign

    def string(self, reason: str = "dictionary") -> str:
        """The next string: what it stands for."""
        text = ESCAPE.sub(_unescaped, self.take(STRING, "a string", reason)[1:-1])
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON may write one character as two halves
        except UnicodeDecodeError:
            raise _Broken("dictionary", "half a surrogate pair") from None

    def entries(self, reason: str = "dictionary") -> Iterator[str]:
        """The keys of the next dictionary. Whoever takes a key has to read its value before taking the next."""
        self.take(OPEN, "{", reason)
        while not self.skip("}"):
            key = self.string()
            self.take(COLON, ":")
            yield key
            if not self.skip(","):
                self.take(CLOSE, "}")
                return


def _unescaped(match: re.Match[str]) -> str:
    code = int(match[1] or match[2] or match[3] or "110000", 16)
    if code < 0x110000:
        return chr(code)
    if match[4] not in ESCAPES:
        raise _Broken("dictionary", f"unknown escape {match[0]}")
    return ESCAPES[match[4]]


def _emotions(scanner: _Scanner, key: str, labels: Sequence[str] | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in scanner.entries(reason=key):
        emotion = name.lower()
        if emotion in found:
            raise _Broken("duplicate", f"{name[:40]!r} a second time")
        if not clean(name) or (labels is not None and emotion not in labels):
            raise _Broken(key if labels is None else "label", f"{name[:40]!r} is not a label")
        word = scanner.take(WORD, "a number", reason="weight")
        if len(word) > 40 or not NUMBER.fullmatch(word) or not 0.1 <= float(word) <= 1:
            raise _Broken("weight", f"{word[:40]!r} is not a decimal number from 0.1 to 1")
        found[emotion] = float(word)
        if len(found) > 3:
            raise _Broken(key, "more than three emotions")
    if not found:
        raise _Broken(key, "no emotion")
    return found


def parse_output(text: str, labels: Sequence[str], *, finished: bool = True) -> Output | Failure:
    """Read one answer: think block, dictionary, nothing else (D8). Never raises, never evaluates; linear, at most 64 KiB.

    `labels` in lower case; `finished`: the answer ended with EOS. A failure names the first thing wrong from the left.
    """
    try:
        return _parse(text, labels, finished)
    except _Broken as broken:
        return Failure(*broken.args)


def _parse(text: str, labels: Sequence[str], finished: bool) -> Output:
    if not finished:
        raise _Broken("unfinished", "cut off before the end of the answer")
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise _Broken("too_long", f"more than {MAX_BYTES} bytes")
    think = THINK.match(text)
    if not think or not clean(think[1]):
        raise _Broken("think", "no <think> block, or a blank one, at the beginning")
    scanner = _Scanner(text, think.end())
    found: dict[str, Any] = {}
    spans = {}
    for key in scanner.entries():
        if key in found or key not in KEYS:
            raise _Broken("duplicate" if key in found else "keys", f"{key[:40]!r}")
        start = scanner.position
        if key == "my_output":
            found[key] = scanner.string(reason=key)
        else:
            found[key] = _emotions(scanner, key, labels if key == "last_emotions" else None)
        spans[key] = (start, scanner.position)
    if len(found) < len(KEYS):
        raise _Broken("keys", f"no {', '.join(key for key in KEYS if key not in found)}")
    if not clean(found["my_output"]):
        raise _Broken("my_output", "a blank answer")
    if SIGN.match(text, scanner.position):
        raise _Broken("trailing", f"text after the dictionary, from character {scanner.position}")
    return Output(reasoning=think[1], spans=spans, **found)


def parse_strings(text: str) -> dict[str, str] | Failure:
    """One dictionary of strings and nothing else. Never raises, never evaluates."""
    found: dict[str, str] = {}
    scanner = _Scanner(text, 0)
    try:
        for key in scanner.entries():
            if key in found:
                raise _Broken("duplicate", f"{key[:40]!r} a second time")
            found[key] = scanner.string()
        return found if not SIGN.match(text, scanner.position) else Failure("trailing", "text after the dictionary")
    except _Broken as broken:
        return Failure(*broken.args)


def parse_weights(text: str, labels: Sequence[str]) -> dict[str, float] | Failure:
    """One dictionary as `last_emotions` and nothing else (D8). Never raises, never evaluates."""
    scanner = _Scanner(text, 0)
    try:
        found = _emotions(scanner, "last_emotions", labels)
        return found if not SIGN.match(text, scanner.position) else Failure("trailing", "text after the dictionary")
    except _Broken as broken:
        return Failure(*broken.args)


def format_output(reasoning: str, last_emotions: Weights, my_emotions: Weights, my_output: str) -> str:
    """The canonical text of an answer; `parse_output` gives the parts back. ValueError if the reasoning is not possible."""
    if not clean(reasoning) or "</think>" in reasoning:
        raise ValueError("the reasoning must be a text without </think>")
    last, mine = ({emotion: float(w) for emotion, w in weights.items()} for weights in (last_emotions, my_emotions))
    return f"<think>{reasoning}</think>\n{dict(zip(KEYS, (last, mine, my_output), strict=True))!r}"


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
    sample: Sample,
    parses: Sequence[Output | Failure],
    rewards: Sequence[float],
    iteration: int,
    *,
    keep_reward: float,
    fits: Callable[[Sample], bool],
) -> Selection:
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


def dataset_target(sample: Sample) -> str | None:
    """The templated answer that the cold start `dataset` teaches: format, not insight (D17). None without a next turn.

    Half of the samples show a second emotion, that of the nearest earlier turn that differs, so that the format has room.
    """
    if sample.following is None or sample.following.label is None:
        return None
    last, mine = _top(sample.gold), _top(sample.following.label)
    earlier = (emotion for turn in reversed(sample.context[:-1]) for emotion in list(_top(turn.label or {}))[:1])
    second = next((emotion for emotion in earlier if emotion not in last), None)
    if len(last) == 1 and second and stable_hash(sample.id) % 2:
        last = {**dict.fromkeys(last, 0.8), second: 0.3}
    reasoning = f"The last speaker shows {' and '.join(last)}. I feel {' and '.join(mine)} and say so."
    return format_output(reasoning, last, mine, sample.following.text)


def _top(weights: Weights) -> dict[str, float]:
    """The three heaviest emotions, heaviest first, with weights that the format admits."""
    scale = max(1.0, *weights.values(), 0.0)
    heaviest = sorted(weights, key=lambda emotion: -weights[emotion])[:3]
    return {emotion: max(0.1, round(weights[emotion] / scale, 2)) for emotion in heaviest}


def sample_record(sample: Sample) -> dict[str, Any]:
    """The sample as JSON values."""
    return asdict(sample)


def sample_from_record(record: Mapping[str, Any]) -> Sample:
    """The sample that `sample_record` wrote."""
    turns = tuple(Turn(**turn) for turn in record["context"])
    following = Turn(**record["following"]) if record["following"] else None
    responder, labels = Responder(**record["responder"]), tuple(record["labels"])
    return Sample(**{**record, "context": turns, "following": following, "responder": responder, "labels": labels})


def main() -> None:
    """Run a command: stats, download or audit."""
    import corpora

    corpora.main()


if __name__ == "__main__":
    main()
