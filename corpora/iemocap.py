"""IEMOCAP, read from the official release folder (D22). `corpora.loading.load("iemocap", ...)` is the way in.

    IEMOCAP_full_release/Session{1..5}/dialog/transcriptions/Ses01F_impro01.txt     who said what, in order
    IEMOCAP_full_release/Session{1..5}/dialog/EmoEvaluation/Ses01F_impro01.txt      how annotators heard each turn

The sizes of the paper, 5,163, 647 and 1,623, need more than a filter on the six classes: see `Rating.label`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from corpora.dialogue import LABELS, Dialogue, Turn
from corpora.strict import CP1252

SESSIONS = range(1, 6)
CODES = {"hap": "happy", "sad": "sad", "neu": "neutral", "ang": "angry", "exc": "excited", "fru": "frustrated"}
OTHER_CODES = ("sur", "fea", "dis", "oth", "xxx")  # turns that are no target; xxx: the annotators disagreed
VOTES = {  # what annotators wrote, in lower case
    "happiness": "happy", "sadness": "sad", "neutral": "neutral", "neutral state": "neutral", "anger": "angry",
    "excited": "excited", "frustration": "frustrated",
}
OTHER_VOTES = ("surprise", "fear", "disgust", "other")
DEV = (  # a tenth of sessions 1-4, once drawn at random and kept by every benchmark since
    *("Ses01M_impro01", "Ses01M_script03_1", "Ses02F_impro02", "Ses02F_impro07", "Ses02M_script01_2", "Ses03F_impro01"),
    *("Ses03M_impro02", "Ses03M_impro08a", "Ses03M_script02_2", "Ses03M_script03_2", "Ses04F_impro07", "Ses04F_script02_1"),
)
FINGERPRINT = "e4ef4b6bc63d155bafeec5d24f2fb895319aaa1693601bbf291c55ca41bdeb90"
REQUEST = (
    "Ask for IEMOCAP at https://sail.usc.edu/iemocap/ (nobody may pass it on) and give the folder that holds Session1 to "
    "Session5, each with dialog/transcriptions and dialog/EmoEvaluation"
)
AGAIN = "unpack the release again"
NAME = re.compile(r"Ses0[1-5][FM]_(?:impro|script)\w+")
SPOKEN = re.compile(r"(Ses\d\d[FM]_(?:impro|script)\w+)_([FM])(\d{3}|XX\d+)\s*\[[\d.\s-]+\]:?(.*)")
TIMES = re.compile(r"\[\d[\d.\s-]*\]")
JUDGED = re.compile(r"\[[\d.\s-]+\]\s+(Ses\w+)\s+(\w+)\s+\[")
VOTE = re.compile(r"C-([EFM])\d+:([^(]*)")


@dataclass(frozen=True)
class Rating:
    """What EmoEvaluation holds of a turn: the official code; every label that external annotators listed, in lower case;
    what the speaker listed in the self-evaluation, if there was one."""

    code: str
    votes: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def label(self) -> str | None:
        """The class, or None for a turn that is no target.

        The benchmarks have 53 more than the release has turns of the six classes. They are those without a majority that
        the speaker called happy and nothing else, and at least one annotator called happy too.
        """
        if self.code == "xxx" and self.own == ("happiness",) and "happiness" in self.votes:
            return "happy"
        return CODES.get(self.code)

    def soft(self) -> dict[str, float] | None:
        """Votes for the six classes as shares that sum to 1, in the order of the label set; one-hot if there is none."""
        if self.label is None:
            return None
        counts = Counter(VOTES[vote] for vote in self.votes if vote in VOTES)
        shares = {name: counts[name] / counts.total() for name in LABELS["iemocap"] if counts[name]}
        return shares or {self.label: 1.0}


@dataclass(frozen=True)
class Spoken:
    """One line of a transcription; `number` is the end of its id, F003 or MXX0, and begins with the speaker's letter."""

    number: str
    text: str


@dataclass(frozen=True)
class Source:
    """The two files of a dialogue, and its split."""

    name: str
    split: str
    spoken: Path
    judged: Path


def release(root: str | Path) -> Path:
    """The folder that holds Session1 to Session5: `root` or one right below it. Raises UserError if there is none."""
    root = Path(root)
    try:
        candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
        missing = {folder: _missing(folder) for folder in candidates}
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}. {REQUEST}") from None
    best = min(candidates, key=lambda folder: len(missing[folder]))
    if missing[best]:
        raise UserError(f"{best}: {', '.join(missing[best][:2])} is not there. {REQUEST}")
    return best


def _missing(folder: Path) -> list[str]:
    parts = (f"Session{n}/dialog/{part}" for n in SESSIONS for part in ("transcriptions", "EmoEvaluation"))
    return [part for part in parts if not (folder / part).is_dir()]


def sources(root: str | Path) -> list[Source]:
    """The dialogues of the release by name. Session 5 is test; dev is the fixed list; train is the rest of sessions 1-4."""
    folder = release(root)
    found = []
    for session in SESSIONS:
        dialog = folder / f"Session{session}/dialog"
        # Copies made by other systems leave "._Ses...": the pattern passes them over.
        paths = [p for part in ("transcriptions", "EmoEvaluation") for p in (dialog / part).glob(f"Ses0{session}*.txt")]
        names = sorted({path.stem for path in paths if NAME.fullmatch(path.stem)})
        if not names:
            raise UserError(f"{dialog / 'transcriptions'}: no file such as Ses0{session}F_impro01.txt; {AGAIN}")
        for name in names:
            split = "test" if session == 5 else "dev" if name in DEV else "train"
            # Sub-folders of EmoEvaluation hold single annotators' files: they are not needed.
            spoken, judged = (dialog / part / f"{name}.txt" for part in ("transcriptions", "EmoEvaluation"))
            found.append(Source(name, split, spoken, judged))
    return found


def read_spoken(source: Source) -> list[Spoken]:
    """The turns in the order of the file, which is that of the conversation: times overlap and run backwards.

    Lines without id and times, mostly breath and laughter, are passed over. Raises UserError for one that has only half of
    both, and for an id that comes twice.
    """
    found: dict[str, Spoken] = {}
    for number, line in _lines(source.spoken):
        match = SPOKEN.fullmatch(line)
        if not match and (line.startswith("Ses") or TIMES.search(line)):
            raise UserError(f"{source.spoken}:{number}: {line[:60]!r} is no turn with its id and times; {AGAIN}")
        if match and match[1] == source.name:
            spoken = Spoken(match[2] + match[3], match[4].strip())
            if spoken.number in found:
                raise UserError(f"{source.spoken}:{number}: {spoken.number[:60]} a second time; {AGAIN}")
            found[spoken.number] = spoken
    return list(found.values())


def read_judged(source: Source) -> dict[str, Rating]:
    """The rating of each turn, by the end of its id. The file is sorted by id, so it says nothing about the order.

    Raises UserError for a heading that cannot be read, an unknown code and an id that comes twice.
    """
    found: dict[str, Rating] = {}
    current, speaker = "", ""
    for number, line in _lines(source.judged):
        head, vote = JUDGED.match(line), VOTE.match(line)
        if not head and (line.startswith("[") or NAME.search(line)):
            raise UserError(f"{source.judged}:{number}: {line[:60]!r} is no heading of a turn; {AGAIN}")
        if head:
            current, speaker = head[1].removeprefix(f"{source.name}_"), head[1].rpartition("_")[2][:1]
            if head[2] not in CODES and head[2] not in OTHER_CODES:
                known = " ".join((*CODES, *OTHER_CODES))
                raise UserError(f"{source.judged}:{number}: unknown emotion {head[2]!r:.60}, known are {known}; {AGAIN}")
            if current in found:
                raise UserError(f"{source.judged}:{number}: {current[:60]} a second time; {AGAIN}")
            found[current] = Rating(head[2])
        elif vote and current:
            # An annotator may list several labels, or none: "Neutral; Frustration;".
            labels = tuple(label for label in (" ".join(part.split()).lower() for part in vote[2].split(";")) if label)
            now = found[current]
            if vote[1] == "E":
                found[current] = Rating(now.code, now.votes + labels, now.own)
            elif vote[1] == speaker:
                found[current] = Rating(now.code, now.votes, now.own + labels)
    return found


def dialogue(source: Source, *, context: Literal["labelled", "all"] = "labelled", soft_labels: bool = False) -> Dialogue:
    """One dialogue. Speakers are the release's ten actors, Ses01_F to Ses05_M; `id` of a turn is F003, M012 or MXX0.

    Raises UserError if a file is missing, or a turn that is a target was never spoken.
    """
    spoken, judged = read_spoken(source), read_judged(source)
    lost = [number for number in judged.keys() - {s.number for s in spoken} if judged[number].label]
    if lost:
        raise UserError(f"{source.spoken}: no line for {min(lost)[:60]}, to which EmoEvaluation gives a label; {AGAIN}")
    for path, found in ((source.spoken, spoken), (source.judged, judged)):
        if not found:
            raise UserError(f"{path}: not one turn in it; {AGAIN}")
    turns = []
    for said in spoken:
        rating = judged.get(said.number, Rating("xxx"))
        label = rating.soft() if soft_labels else {rating.label: 1.0} if rating.label else None
        if label or context == "all":
            # The letter in the id of the turn is the speaker; the one in Ses01F is who wore the markers.
            turns.append(Turn(f"{source.name[:5]}_{said.number[0]}", said.text.translate(CP1252), label, said.number))
    return Dialogue(source.name, "iemocap", source.split, tuple(turns))


def load(
    root: str | Path, split: str, *, context: Literal["labelled", "all"] = "labelled", soft_labels: bool = False
) -> list[Dialogue]:
    """The dialogues of a split; see `data.load`."""
    return [dialogue(s, context=context, soft_labels=soft_labels) for s in sources(root) if s.split == split]


def fingerprint(dialogues: Iterable[Dialogue]) -> str:
    """SHA-256 over every dialogue's name and number of labelled turns; of a whole release it must be FINGERPRINT."""
    counts = {d.id: sum(turn.label is not None for turn in d.turns) for d in dialogues}
    return hashlib.sha256("\n".join(f"{name} {counts[name]}" for name in sorted(counts)).encode()).hexdigest()


def self_check(dialogues: Iterable[Dialogue]) -> tuple[str, str]:
    """`passed` or `failed`, and the fingerprint of a whole release."""
    found = fingerprint(dialogues)
    return ("passed" if found == FINGERPRINT else "failed"), f"SHA-256 {found}"


SURVEY = (
    "rated turns", "promoted to happy", "turns without a class", "turns without a rating", "rated but not spoken",
    "undecided with a majority", "votes of an unknown name",
)  # fmt: skip


def survey(source: Source) -> Counter[str]:
    """Counts of one dialogue for an audit, under the names in SURVEY."""
    numbers, judged = [spoken.number for spoken in read_spoken(source)], read_judged(source)
    undecided = [rating for rating in judged.values() if rating.code == "xxx"]
    counts = {
        "rated turns": len(judged),
        "promoted to happy": sum(rating.label is not None for rating in undecided),
        "turns without a class": sum(number not in judged or judged[number].label is None for number in numbers),
        "turns without a rating": sum(number not in judged for number in numbers),
        "rated but not spoken": len(judged.keys() - set(numbers)),
        "undecided with a majority": sum(_majority(rating.votes) for rating in undecided),
        "votes of an unknown name": sum(v not in VOTES and v not in OTHER_VOTES for r in judged.values() for v in r.votes),
    }
    return Counter(counts)


def _majority(votes: Sequence[str]) -> bool:
    first, second = [*Counter(vote.removesuffix(" state") for vote in votes).most_common(2), ("", 0), ("", 0)][:2]
    return first[1] > second[1]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {AGAIN}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # the release is ASCII, but for what comments may hold
    if "\0" in text:
        where = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{where}: a zero byte, which no text has; {AGAIN}")
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.strip()
