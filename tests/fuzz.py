"""Hostile input: answers for `parse_output`, and files with something broken in them for the loaders.

    python -m tests.fuzz                                    20,000 broken files per loader
    python -m tests.fuzz --runs 2000 --seed 1 --only meld   fewer, others, of one loader

What an answer must give is said a second time here: `expected` reads D8 with Python's and JSON's own readers and shares
nothing with data.py but the limits. tests/test_fuzz.py has hypothesis look for answers on which the two differ.
The command breaks small valid files, one way or several (`broken`). A loader has to refuse them in one line, or to give what
the file says: `plainly` reads it a second time. tests/test_fuzz.py does the same in small.
"""

import ast
import csv
import io
import json
import random
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import data
from common.errors import UserError, command
from common.text import clean
from corpora import dialogue, iemocap, loading, strict
from corpora.dialogue import Dialogue
from data import MAX_BYTES, Output

LABELS = dialogue.LABELS["meld"]

# Answers: D8 a second time


@dataclass(frozen=True)
class Valid:
    """What a valid answer says."""

    reasoning: str
    last_emotions: dict[str, float]
    my_emotions: dict[str, float]
    my_output: str


def expected(text: str, labels: Sequence[str], finished: bool = True) -> Valid | None:
    """What D8 makes of an answer; None where it breaks the rule."""
    head, opened, rest = text.partition("<think>")
    reasoning, closed, rest = rest.partition("</think>")
    whole = finished and len(text.encode("utf-8", "surrogatepass")) <= 65_536
    if not (whole and opened and closed) or head.strip() or blank(reasoning):
        return None
    try:
        pairs = pairs_of("".join(rewritten(rest)))
        found = dict(pairs)
        last, mine, reply = (found[key] for key in ("last_emotions", "my_emotions", "my_output"))
        if len(pairs) != 3 or not isinstance(reply, str) or blank(reply):
            return None
        named = Valid(reasoning, emotions(last), emotions(mine), reply)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError):
        return None
    return named if set(named.last_emotions) <= set(labels) else None


def blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text)


def rewritten(text: str) -> Iterator[str]:
    """The signs, strings and numbers of a Python or JSON dictionary as JSON; numbers as ["their text"]. Or ValueError."""
    i = 0
    while i < len(text):
        if text[i] in "'\"":
            end = i + 1
            while end < len(text) and text[end] != text[i]:
                end += 2 if text[end] == "\\" else 1
            if end >= len(text):
                raise ValueError("an open string")
            yield json.dumps(spelled(text[i + 1 : end]))
            i = end
        elif text[i] == "," and text[i + 1 :].lstrip()[:1] == "}" and text[:i].rstrip()[-1:] not in ("{", ","):
            pass  # Python lets a dictionary end with a comma
        elif text[i] in "{}:,":
            yield text[i]
        elif not text[i].isspace():
            word = re.split(r"""[\s'"{}:,]""", text[i:], maxsplit=1)[0]
            yield json.dumps([word])
            i += len(word) - 1
        i += 1


def spelled(inside: str) -> str:
    """What the text between two quotes stands for: the escapes that Python or JSON knows, Unicode names and octals not."""
    parts, i = [], 0
    while i < len(inside):
        c, after = inside[i], inside[i + 1 : i + 2]
        if c == "\\" and after == "/":  # JSON's own
            parts.append("/")
        elif c == "\\" and (not after or after not in "\\'\"abfnrtvxuU"):
            raise ValueError("unknown escape")
        elif c == "\\":
            parts.append(c + after)
        elif c in "\r\n":
            raise ValueError("a line break")
        else:
            parts.append(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}")
        i += 2 if c == "\\" else 1
    value = str(json.loads(json.dumps(ast.literal_eval('"' + "".join(parts) + '"'))))  # joins the halves of a character
    value.encode()
    return value


def pairs_of(text: str) -> list[tuple[str, Any]]:
    """The entries of a JSON object, inner ones as lists of entries too; ValueError for anything else."""
    found = json.loads(text, object_pairs_hook=Entries)
    if not isinstance(found, Entries):
        raise ValueError("no dictionary")
    return found


class Entries(list[Any]):
    """The entries of a JSON object in order, equal keys kept."""


def emotions(entries: Any) -> dict[str, float]:
    """One to three emotions, none twice, each of a weight from .1 to 1. ValueError or TypeError for anything else."""
    if not isinstance(entries, Entries) or not 1 <= len(entries) <= 3:
        raise ValueError("not one to three emotions")
    found = {name.lower(): weight(word) for name, word in entries}
    if len(found) < len(entries) or any(map(blank, found)):
        raise ValueError("an emotion twice, or without a name")
    return found


def weight(word: Any) -> float:
    """The number that a decimal literal of Python or JSON stands for, at most 40 characters long."""
    if isinstance(word, Entries) or not isinstance(word, list):
        raise ValueError("no number")
    (text,) = word
    value = ast.literal_eval(text) if set(text) <= set("0123456789.eE+-") and text[:1] not in "+-" else None
    if not isinstance(value, int | float) or len(text) > 40 or re.match(r"0\d", text) or not 0.1 <= value <= 1:
        raise ValueError("no weight")
    return float(value)


def check(text: str, finished: bool = True) -> bool:
    """Whether an answer is valid. AssertionError where `parse_output` says otherwise, or what cannot be written again."""
    parse, wanted = data.parse_output(text, LABELS, finished=finished), expected(text, LABELS, finished)
    assert isinstance(parse, Output) == (wanted is not None), f"{text!r}: {parse} and not {wanted}"
    if not isinstance(parse, Output) or wanted is None:
        return False
    said = Valid(parse.reasoning, parse.last_emotions, parse.my_emotions, parse.my_output)
    assert said == wanted and list(said.my_emotions) == list(wanted.my_emotions), f"{text!r}: {said} and not {wanted}"
    again = data.format_output(said.reasoning, said.last_emotions, said.my_emotions, said.my_output)
    parse = data.parse_output(again, LABELS)
    if len(again.encode("utf-8", "surrogatepass")) <= MAX_BYTES:
        assert isinstance(parse, Output), f"{text!r}: written again it fails as {parse}"
        assert Valid(parse.reasoning, parse.last_emotions, parse.my_emotions, parse.my_output) == said, repr(text)
    return True


THINK = "<think>Because.</think>"
GOOD = (
    THINK + "{'last_emotions': {'joy': 0.8, 'Fear': .3}, 'my_emotions': {'awe': 1}, 'my_output': 'It\\'s \\u00e9.'}",
    THINK + '\n{"my_output": "a\\/b \\ud83d\\ude00", "my_emotions": {"x": 1e-1,}, "last_emotions": {"ANGER": 1.0}}\n',
    " <think>One <think> more</think> {'my_emotions' : {'a':.5, 'b': 1., 'c': 0.1},\n'my_output': '</think>',"
    "'last_emotions':{'joy':1,'fear':1,'disgust':1},}",
)
TOKENS = (
    *("{", "}", ":", ",", "'", '"', "\\", " ", "\n", "\r", "\t", "\u2028", "\u00a0", "\u200b", "\x00", "\ud83d", "\ude00"),
    *("<think>", "</think>", "<|im_end|>", "'last_emotions'", "'my_emotions'", "'my_output'", '"my_output"', "'joy'"),
    *("'JOY'", "'K'", "'\u0130'", "''", "'a'", "0.5", "1", "0.1", "0.09", "1.0000000000000001", "1e-1", ".", "1.", "01"),
    *("00.5", "1_0", "-1", "+1", "nan", "inf", "True", "None", "0x1", "1j", "1e999", "9" * 50, "\\u0041", "\\x41", "\\d"),
    *("\\ud83d", "\\ude00", "\\U0001f600", "\\U00110000", "\\N{DASH}", "\\/", "\\'", "\\\n", "#", "(", ")", "[", "]", "f"),
    *("'last_emotions': {'joy': 0.5}", "'my_emotions': {'awe': 1}", "'my_output': 'Oh.'", THINK, *GOOD),
)


def answer_of(raw: bytes) -> tuple[str, bool]:
    """(text, finished) that bytes stand for: themselves, with a think block before them, or a row of TOKENS."""
    mode, body = raw[:1] or b"\0", raw[1:]
    if mode[0] % 4 == 3:
        return "".join(TOKENS[b % len(TOKENS)] for b in body), True
    text = body.decode("utf-8", "surrogateescape")  # what is no UTF-8 becomes half a character
    return (THINK + text if mode[0] % 2 else text), mode[0] < 250


# Files: small valid ones, ways to break them, and a second reading

MELD = """\
Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime
1,"He left, then?",Ann,surprise,positive,0,0,1,2,"0:16:16,059","0:16:21,731"
2,"He said ""no"".",Bo,anger,negative,0,1,1,2,"0:16:21,940","0:16:23,442"
3,Well.,Ann Day,Neutral,neutral,0,3,1,2,"0:16:24,000","0:16:25,000"
4,"I\u2019m glad.",Cy,joy,positive,10,0,1,2,"0:00:01,000","0:00:02,000"
"""
EMORYNLP = """\
Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode,Start_Time,End_Time
"Hi, you.",['Ann Day'],Joyful,2,1,1,3,"00:16:16,059","00:16:21,731"
Ho!,"['Ann Day', 'Bo']",Mad,2,2,1,3,"00:16:22,059","00:16:23,731"
Ah.,['#ALL#'],Sad,10,1,1,3,"00:16:24,059","00:16:25,731"
"""
DIALOGUES = """\
{"id": "d1", "turns": [{"speaker": "Ann", "text": "He left.", "label": {"sadness": 0.65, "anger": 0.35}}, {"speaker": "Bo", \
"text": "Oh \\u00e9\\n no.", "label": "surprise"}, {"speaker": "Ann", "text": "Well.", "label": null}], \
"personas": {"Bo": "a worrier"}}
{"id": "d2", "turns": [{"speaker": "Bo", "text": "10 of 12?", "label": "Joy"}]}
"""
GOLD = """\
{"id": "own/train/d1/0", "weights": {"sadness": 0.85, "anger": 0.45}}
{"id": "own/train/d2/0", "weights": {"joy": 1}}
"""
PERSONAS = """\
{"dialogue": "own/train/d1", "speaker": "Ann", "persona": "One who knows.", "expert": "a"}
{"dialogue": "own/train/d1", "speaker": "Ann", "persona": "One who doubts.", "expert": "b"}
"""
SPOKEN = """\
{0}_F000 [006.1000-008.2000]: Did you, then?
{0}_M000 [007.9000-010.0000]: I did. [LAUGHTER]
F: [BREATHING]
{0}_MXX0 [010.1000-010.9000]: Um.
{0}_F001 [011.1000-012.9000]: Good.
"""
JUDGED = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.1000 - 8.2000]\t{0}_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral; Frustration;\t(an invented comment)
C-F1:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[11.1000 - 12.9000]\t{0}_F001\txxx\t[2.5000, 2.5000, 2.5000]
C-E2:\tHappiness;\t()
C-E3:\tSadness;\t()

[7.9000 - 10.0000]\t{0}_M000\tang\t[2.5000, 2.5000, 2.5000]
C-E2:\tAnger;\t()
C-E3:\tAnger;\t()

"""
TALK = tuple(f"Ses0{n}F_impro99" for n in iemocap.SESSIONS)
Reading = list[tuple[str, list[tuple[str, str, Any]]]]  # dialogues: id, (speaker, text, label) of every turn


@dataclass(frozen=True)
class Case:
    """Files of a loader by name, what it reads, and a second reading of the same; both give equal values."""

    files: dict[str, str]
    load: Callable[[Path], Any]
    plainly: Callable[[Path], Any]

    def write(self, folder: Path, changed: Mapping[str, str | bytes] | None = None) -> None:
        """Write the files into a folder; `changed`: other contents of some."""
        for name, content in {**self.files, **(changed or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def turns_of(dialogues: Sequence[Dialogue]) -> Reading:
    """What a loader found."""
    return [(d.id, [(t.speaker, t.text, t.label) for t in d.turns]) for d in dialogues]


def told(folder: Path, name: str) -> str:
    """A file as text. Raises ValueError for what no text file holds."""
    text = (folder / name).read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("a NUL")
    return text


def shown(text: Any) -> str:
    """A name or a line of a dialogue, not blank."""
    if not isinstance(text, str) or not clean(text):
        raise ValueError("no text")
    return clean(text.translate(strict.CP1252))


def digits(text: str) -> int:
    """A number written in digits alone."""
    if not re.fullmatch("[0-9]+", text):
        raise ValueError("no number")
    return int(text)


def plain_table(folder: Path, file: str, dataset: str, ids: Sequence[str]) -> Reading:
    """MELD or EmoryNLP by Python's csv over the whole file."""
    read = csv.reader(io.StringIO(told(folder, file), newline=""), strict=True)
    header, *rows = [row for row in read if row[1:] or "".join(row).strip()]  # blank lines are nothing
    if len(set(header)) < len(header) or not rows:
        raise ValueError("a column twice, or no row")
    found: dict[str, dict[int, tuple[str, str, Any]]] = {}
    for row in rows:
        cell = dict(zip(header, row, strict=True))
        label = cell["Emotion"].strip().lower()
        names = ast.literal_eval(cell["Speaker"]) if dataset == "emorynlp" else [cell["Speaker"]]
        turns = found.setdefault("_".join(str(digits(cell[name])) for name in ids), {})
        number = digits(cell["Utterance_ID"])
        if number in turns or label not in dialogue.LABELS[dataset] or not isinstance(names, list) or not names:
            raise ValueError("a turn twice, or no label of the set, or nobody")
        speaker = clean(" and ".join(shown(name) for name in names))
        turns[number] = (speaker, shown(cell["Utterance"]), {label: 1.0})
    return [(name, [turns[number] for number in sorted(turns)]) for name, turns in found.items()]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a key twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def rows_of(folder: Path, name: str) -> list[Any]:
    """The lines of a JSONL file, at least one."""
    rows = [json.loads(line, object_pairs_hook=once) for line in told(folder, name).split("\n") if line.strip()]
    if not rows:
        raise ValueError("nothing in it")
    return rows


def weighed(weights: Any) -> dict[str, float]:
    """Labels and weights above 0, no label twice."""
    found = {name.strip().lower(): float(value) for name, value in weights.items() if type(value) in (int, float)}
    if not found or len(found) < len(weights) or not all(0 < value < float("inf") for value in found.values()):
        raise ValueError("no weights")
    return found


def plain_jsonl(folder: Path) -> tuple[Reading, list[dict[str, str]]]:
    """Dialogues and personas of a folder of our own format."""
    known = json.loads(told(folder, "labels.json"))
    if not isinstance(known, list) or len(set(known)) < len(known):
        raise ValueError("no list")
    found: Reading = []
    sheets = []
    for row in rows_of(folder, "train.jsonl"):
        turns = []
        for turn in row["turns"]:
            speaker, text, label = (turn.pop(key) for key in ("speaker", "text", "label"))
            own = None if label is None else weighed({label: 1} if isinstance(label, str) else label)
            if turn or not {*(own or {})} <= {name.strip().lower() for name in known}:
                raise ValueError("another field, or no label of the set")
            turns.append((shown(speaker), shown(text), own))
        sheet = row.get("personas")
        sheets.append({clean(name): shown(text) for name, text in (sheet or {}).items()})
        if not turns or not isinstance(row["turns"], list) or set(row) - {"id", "turns", "personas"}:
            raise ValueError("no turn, or another field")
        if not isinstance(row["id"], str) or row["id"] in dict(found) or not (sheet is None or isinstance(sheet, dict)):
            raise ValueError("no id, one twice, or no personas")
        found.append((row["id"], turns))
    return found, sheets


def plain_iemocap(folder: Path) -> Reading:
    """The dialogue of session 1, sign by sign. What promotes an undecided turn is left to the audit of a whole release."""
    name, found = TALK[0], []
    for part in ("transcriptions", "EmoEvaluation"):
        found.append(decoded((folder / f"Session1/dialog/{part}/{name}.txt").read_bytes()).split("\n"))
    codes: dict[str, str | None] = {}
    texts: dict[str, str] = {}
    for line in found[1]:
        if f"{name}_" in line:
            turn, code, *_ = line.partition("]")[2].split()
            if not line.strip().startswith("[") or turn in codes:
                raise ValueError("no heading")
            codes[turn] = iemocap.CODES.get(code)
    for line in found[0]:
        turn, _, rest = line.partition("[")
        if re.fullmatch(rf"{name}_[FM](\d\d\d|XX\d+)", turn.strip()):  # turns of other dialogues are passed over
            texts[turn.strip()] = clean(rest.partition("]")[2].removeprefix(":"))
    if {turn for turn, label in codes.items() if label} - set(texts) or "\0" in "".join(sum(found, [])):
        raise ValueError("a turn is lost, or a NUL")
    labels = {turn: {label: 1.0} if label else None for turn, label in codes.items()}
    return [(name, [(f"Ses01_{turn[15]}", text, labels.get(turn)) for turn, text in texts.items()])]


def decoded(raw: bytes) -> str:
    """Bytes as UTF-8, or else as Latin-1."""
    try:
        return raw.decode("utf-8-sig")
    except ValueError:
        return raw.decode("latin-1")


def release(name: str) -> dict[str, str]:
    """Both files of a dialogue."""
    parts = {"transcriptions": SPOKEN, "EmoEvaluation": JUDGED}
    return {f"Session{name[4]}/dialog/{part}/{name}.txt": text.format(name) for part, text in parts.items()}


def cases() -> dict[str, Case]:
    """Every loader with files that it reads."""
    own = {"train.jsonl": DIALOGUES, "labels.json": '["joy", "anger", "sadness", "surprise"]'}
    tables = {"meld": (MELD, "train_sent_emo.csv"), "emorynlp": (EMORYNLP, "emorynlp_train_final.csv")}
    columns = {"meld": ("Dialogue_ID",), "emorynlp": ("Season", "Episode", "Scene_ID")}

    def table(name: str) -> Case:
        text, file = tables[name]
        return Case(
            {file: text},
            lambda folder: turns_of(loading.load(name, folder, "train")),
            lambda folder: plain_table(folder, file, name, columns[name]),
        )

    def ours(folder: Path) -> tuple[Reading, list[dict[str, str]]]:
        found = loading.load("own", folder, "train")
        return turns_of(found), [dict(d.personas) for d in found]

    def gold(folder: Path) -> Any:
        rows = [(row["id"], weighed(row["weights"])) for row in rows_of(folder, "gold.jsonl")]
        return once([(key, weights) for key, weights in rows if shown(key)])

    def personas(folder: Path) -> Any:
        keys = ("expert", "dialogue", "speaker")
        rows = [(*(shown(row[key]) for key in keys), shown(row["persona"])) for row in rows_of(folder, "p.jsonl")]
        once([(str(row[:3]), row) for row in rows])
        return sorted(row[1:] for row in rows)  # what an expert is called is not kept

    def described(folder: Path) -> Any:
        found = loading.read_personas(folder / "p.jsonl")
        return sorted((d, speaker, p) for d, speakers in found.items() for speaker, own in speakers.items() for p in own)

    return {
        **{name: table(name) for name in tables},
        "own": Case(own, ours, plain_jsonl),
        "gold": Case({"gold.jsonl": GOLD}, lambda folder: loading.read_gold(folder / "gold.jsonl"), gold),
        "personas": Case({"p.jsonl": PERSONAS}, described, personas),
        "iemocap": Case(
            {path: text for name in TALK for path, text in release(name).items()},
            lambda folder: turns_of(loading.load("iemocap", folder, "train", context="all"))[:1],
            plain_iemocap,
        ),
    }


ODD = [bytes([i]) for i in b"\0\xff\xc3\r\n\t\"',{}[\\_"] + [b"\xed\xa0\x80", "\u2028".encode()]
NUMBERS = [*b"-1 1e999 NaN Infinity 0 true null 1_0 [] {}".split(), b" 1", b'"1"', b"1" + b"0" * 400, b"9" * 5000]


def broken(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with one thing broken."""
    at, lines = rng.randrange(len(raw) + 1), raw[:3000].split(b"\n") + [raw[3000:]] * (len(raw) > 3000)
    i, j = (rng.randrange(len(lines)) for _ in range(2))
    number = rng.choice([*re.finditer(rb"[0-9][0-9.]*", raw[:3000]), None])
    field = rng.choice([*re.finditer(rb'"[^"]*": ("[^"]*"|[^ ,}\]]+),? ?|[^,\n]*,', raw[:3000]), None])
    match rng.randrange(14):
        case 0 | 1 | 2:
            return raw[: max(at - 1, 0)] + bytes(b ^ (1 << rng.randrange(8)) for b in raw[max(at - 1, 0) : at]) + raw[at:]
        case 3:
            return raw[:at]
        case 4:
            return raw[:at] + raw[at + rng.randrange(40) :]
        case 5:
            return b"\n".join([*lines[:i], lines[j], *lines[i:]])
        case 6:
            lines[i], lines[j] = lines[j], lines[i]
            return b"\n".join(lines)
        case 7:
            return raw[:at] + rng.choice(ODD) + raw[at:]
        case 8 if number:
            return raw[: number.start()] + rng.choice(NUMBERS) + raw[number.end() :]
        case 9 if field:
            return raw[: field.start()] + raw[field.end() :]
        case 10 if field:
            return raw[: field.end()] + field[0] + raw[field.end() :]
        case 11:
            return raw[:at] + rng.choice([b"x", b"[", b'"', b"\\"]) * 140_000 + raw[at:]
        case 12:
            return raw.decode("utf-8", "replace").encode(
                rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "cp1252"]), "replace"
            )
        case 13:
            return b"\n".join(lines[:i] + lines[i + 1 :])
    return raw.replace(b"\n", rng.choice([b"", b"\r\n", b"\r"]))


def try_case(case: Case, folder: Path, rng: random.Random) -> str:
    """Break a file of a case, once to three times, and load: "refused", or "read" where that is what the files say.

    AssertionError for anything else: silent acceptance, an error of more than a line, another exception.
    """
    name = rng.choice(list(case.files)[:2])  # the other three sessions of IEMOCAP stay whole
    raw = case.files[name].encode()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        raw = broken(raw, rng)
    case.write(folder, {name: raw})
    where = f"{name} = {raw[:1200]!r}"
    try:
        found = case.load(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"{where}: not one short line: {str(error)[:3000]}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__} {error}") from error
    try:
        wanted = case.plainly(folder)
    except (*strict.UNREADABLE, LookupError) as error:
        raise AssertionError(f"{where}: read as {found!r:.300}, but {type(error).__name__} {error}") from error
    assert found == wanted, f"{where}: read as {found!r:.300} and not {wanted!r:.600}"
    return "read"


def loaders(runs: int = 20_000, seed: int = 0, only: tuple[str, ...] = ()) -> int:
    """Break files for the loaders; exit status 1 where one is misread.

    Args:
        runs: Files per loader.
        seed: Of what is broken.
        only: Loaders by name. Default: all.
    """
    bad = 0
    for name, case in cases().items():
        if only and name not in only:
            continue
        outcomes: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for i in range(runs):
                try:
                    outcomes[try_case(case, Path(folder), random.Random(f"{seed}/{name}/{i}"))] += 1
                except AssertionError as found:
                    outcomes["wrong"] += 1
                    print(f"{name} {i}: {str(found)[:3000]}", flush=True)
        print(f"{name}: {', '.join(f'{what} {n}' for what, n in sorted(outcomes.items()))}", flush=True)
        bad += outcomes["wrong"]
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(command(lambda: tyro.cli(loaders, description=__doc__)))
