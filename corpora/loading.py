"""The dialogues of a split, from MELD, EmoryNLP, IEMOCAP or JSON lines; personas and gold weights from JSON lines."""

import ast
import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.text import clean, made_of
from corpora import iemocap
from corpora.dialogue import LABELS, SPLITS, Dialogue, Turn
from corpora.strict import emotion_weights, file_text, json_value, known_fields, needed_text, reading, records, whole_number

Context = Literal["labelled", "all"]  # turns of IEMOCAP in a context: those that benchmarks label, or all
Personas = Mapping[str, Mapping[str, tuple[str, ...]]]  # dialogue key -> speaker -> a sentence of each expert


TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {  # file of a split, columns that together number a dialogue
    "meld": ("{}_sent_emo.csv", ("Dialogue_ID",)),
    "emorynlp": ("emorynlp_{}_final.csv", ("Season", "Episode", "Scene_ID")),
}
DIALOGUE = '{"id": "d1", "turns": [{"speaker": "Ann", "text": "Hi.", "label": "joy" or {"joy": 0.7, ...} or null}]}'


def load(
    dataset: str, root: str | Path, split: str, *, context: Context = "labelled", soft_labels: bool = False
) -> list[Dialogue]:
    """The dialogues of one split: `meld` and `emorynlp` from the CSV files of declare-lab/MELD, `iemocap` from its official
    release or the folder around it (D22), any other name from {train,dev,test}.jsonl in `root`, a dialogue per line as in
    DIALOGUE, with "personas": {name: sentence} if there are any.

    `context` is for IEMOCAP: drop unlabelled turns as benchmarks do, or keep them. `soft_labels`: annotators' votes as
    gold (D14); JSONL labels may be soft anyway. Raises UserError that names file and line.
    """
    if split not in SPLITS or not made_of(dataset, ".-_"):
        raise UserError(f"{dataset}/{split}: splits are {', '.join(SPLITS)}; names have letters, digits, '.', '_', '-'")
    if dataset == "iemocap":
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
    with reading(str(path), 'a list such as ["joy", "anger"]'):
        names = json_value(file_text(path))
        if not isinstance(names, list) or len(set(names)) < len(names):
            raise ValueError("no list, or a label twice")
        return tuple(emotion_weights(dict.fromkeys(names, 1.0)))


def _jsonl(dataset: str, root: Path, split: str, labels: Sequence[str] | None) -> list[Dialogue]:
    def turn(row: Any, number: int) -> Turn:
        known_fields(row, ("speaker", "text", "label"))
        speaker, text, label = needed_text(row["speaker"]), needed_text(row["text"]), row["label"]
        label = None if label is None else emotion_weights({label: 1.0} if isinstance(label, str) else label, labels)
        return Turn(speaker, text, label, str(number))

    def dialogue(line: str) -> tuple[str, Dialogue]:
        row = json_value(line)
        known_fields(row, ("id", "turns", "personas"))
        if not isinstance(row["id"], str) or not made_of(row["id"], "._:-"):  # sample ids add "/" and "+"
            raise ValueError(f"the id {row['id']!r} has other signs than letters, digits and . _ : -")
        turns, given = tuple(turn(t, i) for i, t in enumerate(row["turns"])), row.get("personas")
        sheet = {clean(name): clean(needed_text(text)) for name, text in ({} if given is None else given).items()}
        if not turns or len(sheet) < len(given or ()):
            raise ValueError("no turns, or a persona twice")
        return row["id"], Dialogue(row["id"], dataset, split, turns, sheet)

    return list(records(root / f"{split}.jsonl", DIALOGUE, dialogue).values())


def _table(dataset: str, root: Path, split: str) -> list[Dialogue]:
    name, columns = TABLES[dataset]
    path = root / name.format(split)
    shape = f"a row of {dataset} as in declare-lab/MELD"
    with reading(f"{path}:1", f"the header of {dataset} as in declare-lab/MELD"):
        header = next(csv.reader(file_text(path).split("\n")[:1], strict=True))
        for column in (*columns, "Utterance_ID", "Utterance", "Speaker", "Emotion"):
            if header.count(column) != 1:
                raise ValueError(f"the column {column!r} is {'missing' if column not in header else 'there twice'}")

    def turn(line: str) -> tuple[tuple[str, int], Turn]:
        fields = next(csv.reader([line], strict=True))  # no field of these files holds a line break
        if len(fields) != len(header):
            raise ValueError(f"{len(fields)} fields where the header has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        scene, number = "_".join(str(whole_number(row[column])) for column in columns), whole_number(row["Utterance_ID"])
        speaker = _speakers(row["Speaker"]) if dataset == "emorynlp" else needed_text(row["Speaker"])
        label = emotion_weights({row["Emotion"]: 1.0}, LABELS[dataset])
        return (scene, number), Turn(speaker, needed_text(row["Utterance"]), label, str(number))

    turns = records(path, shape, turn, skip=1)
    scenes: dict[str, list[Turn]] = {scene: [] for scene, _ in turns}
    # Utterance ids order the turns but do not count them: lines are missing.
    for scene, number in sorted(turns, key=lambda key: int(key[1])):
        scenes[scene].append(turns[scene, number])
    return [Dialogue(scene, dataset, split, tuple(found)) for scene, found in scenes.items()]


def _speakers(cell: str) -> str:
    names = ast.literal_eval(cell) if len(cell) < 500 else None
    if not isinstance(names, list) or not names:
        raise ValueError(f"the speakers {cell[:40]!r} are not a list such as ['Monica Geller']")
    return " and ".join(needed_text(name) for name in names)


def read_personas(path: str | Path) -> Personas:
    """Personas of Eq. (4) from JSONL rows {"dialogue": "meld/train/703", "speaker", "persona", "expert"}."""
    fields = ("expert", "dialogue", "speaker")
    shape = '{"dialogue": "meld/train/703", "speaker": "Joey", "persona": "...", "expert": "..."}'

    def sentence(line: str) -> tuple[tuple[str, ...], str]:
        row = json_value(line)
        return tuple(clean(needed_text(row[name])) for name in fields), clean(needed_text(row["persona"]))

    rows = records(Path(path), shape, sentence)
    found: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for (_, dialogue, speaker), persona in sorted(rows.items()):
        found[dialogue][speaker] = (*found[dialogue].get(speaker, ()), persona)
    return dict(found)


def read_gold(path: str | Path) -> dict[str, dict[str, float]]:
    """Gold weights that replace the files' own (D14), from JSONL rows {"id": sample id, "weights": {label: weight}}."""
    shape = '{"id": "meld/train/703/6", "weights": {"neutral": 0.85, "surprise": 0.45}}'

    def weights(line: str) -> tuple[str, dict[str, float]]:
        row = json_value(line)
        return clean(needed_text(row["id"])), emotion_weights(row["weights"])

    return records(Path(path), shape, weights)
