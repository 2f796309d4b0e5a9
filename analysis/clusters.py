"""Kinds of personas and what each of them earns (Tables 3, 6 and 7, Fig. 4).

    python evaluate.py personas --personas personas.jsonl --plot personas.svg
    python evaluate.py personas --run RUN --scores ours.jsonl --scores theirs.jsonl [--encoder DIR] [--json]

Names are masked, descriptions become vectors (analysis/vectors.py), HDBSCAN groups them, and a group is named by the words
that it has more often than the rest. What HDBSCAN leaves alone is the class `noise`, never dropped.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from analysis.audit import rollouts
from analysis.compare import scored_rows
from analysis.pairing import span
from analysis.vectors import Floats, encoder_vectors, flat, sklearn, tfidf_vectors
from common.errors import UserError
from common.files import Record, write_atomically
from common.flags import Pairs
from common.text import bare, is_blankless, is_wordy, words
from corpora import loading
from grpo import iou
from training.folder import undamaged

Earned = list[tuple[str | None, float]]  # persona that the prompt of an answer showed, IOU of the answer
NOISE = -1
MASK = "someone"
SHOWN = 12  # clusters in Fig. 4
LARGEST_NAME = 4  # words


@dataclass(frozen=True)
class Description:
    """One persona sentence of a speaker."""

    dialogue: str
    speaker: str
    text: str


@dataclass(frozen=True)
class Cluster:
    """A kind of persona: its number (0 is the largest, NOISE the rest), its name, its descriptions by index."""

    number: int
    name: str
    members: tuple[int, ...]


# Descriptions, and what each of them earns


def from_file(path: Path) -> list[Description]:
    """Every sentence of a personas file. Raises `UserError`."""
    found = loading.read_personas(path)
    return [Description(d, name, text) for d, sheet in found.items() for name, texts in sheet.items() for text in texts]


def from_run(records: Sequence[Record]) -> list[Description]:
    """Persona sentences of the responders of a run, one per dialogue and speaker."""
    found = []
    for record in records:
        who, dialogue = record["responder"], record["sample_id"].partition("+")[0].rpartition("/")[0]
        if who["persona"]:
            found.append(Description(dialogue, who["name"] or "", who["persona"]))
    return list(dict.fromkeys(found))


def run_ious(records: Sequence[Record]) -> Earned:
    """What the answers of a run earn: IOU with the gold, 0 where the rule failed."""
    return [
        (r["responder"]["persona"], 0.0 if a["parse"]["reason"] else iou(a["parse"]["last_emotions"], r["gold"]))
        for r in records
        for a in r["answers"]
    ]


def score_ious(path: Path) -> Earned:
    """What the answers that `evaluate.py score --out` kept earn. Raises `UserError`."""
    return scored_rows(path, lambda row: (row["persona"], float(row["iou"])))


# Clusters


def masked(descriptions: Sequence[Description]) -> list[str]:
    """Sentences with the names of their dialogue's speakers taken out, whole or in part."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for one in descriptions:
        names[one.dialogue] |= {one.speaker, *filter(is_name, one.speaker.split())}
    return [mask(one.text, names[one.dialogue]) for one in descriptions]


def is_name(part: str) -> bool:
    """Whether a part of a speaker's name stands for the person: longer than two characters, and not in small letters."""
    return len(part) > 2 and part[0].isalpha() and not part[0].islower()  # most scripts have no capitals


def mask(text: str, names: Set[str]) -> str:
    """A sentence with whole names replaced; longer names first. In scripts without blanks a name ends anywhere."""
    known = "|".join(re.escape(name) for name in sorted(names - {""}, key=lambda name: (-len(name), name)))
    going_on = "".join(re.escape(c) for c in sorted(set(text)) if (is_wordy(c) or c == "_") and not is_blankless(c))
    edges = (f"(?<![{going_on}])", f"(?![{going_on}])") if going_on else ("", "")
    return re.sub(f"(?:{known})".join(edges), MASK, text) if known else text


def grouped(vectors: Floats, least: int) -> list[int]:
    """HDBSCAN's group of each vector; NOISE for those in none."""
    if len(vectors) < max(least, 2):
        return [NOISE] * len(vectors)
    return [int(x) for x in sklearn().cluster.HDBSCAN(min_cluster_size=least, copy=True).fit_predict(vectors)]


def telling(text: str, stop: Set[str]) -> set[str]:
    """Words that say something: of three letters or more, or of scripts without blanks (`common.text.words`)."""
    found = {word for word in words(bare(text, " ")) if len(word) >= 3 or is_blankless(word[0])}
    return {word for word in found if word[0].isalpha() and word not in stop}


def name_of(members: Sequence[int], said: Sequence[Set[str]]) -> str:
    """The words that members use and others do not: share of members that have a word times log of how rare it is at all."""
    inside, everywhere = (Counter(w for one in part for w in one) for part in ([said[i] for i in members], said))
    weight = {w: n / len(members) * math.log(len(said) / everywhere[w]) for w, n in inside.items()}
    best = sorted((w for w in weight if weight[w] > 0), key=lambda w: (-weight[w], w))[:LARGEST_NAME]
    return " ".join(best) or "unnamed"


def clusters(texts: Sequence[str], vectors: Floats, least: int) -> list[Cluster]:
    """Clusters of texts, the largest first, and NOISE last where something was left alone."""
    stop = sklearn().feature_extraction.text.ENGLISH_STOP_WORDS | {MASK}
    said = [telling(text, stop) for text in texts]
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(grouped(vectors, least)):
        members[group].append(i)
    noise = members.pop(NOISE, [])
    ordered = sorted(members.values(), key=lambda found: (-len(found), found))
    found = [Cluster(n, name_of(group, said), tuple(group)) for n, group in enumerate(ordered)]
    return [*found, Cluster(NOISE, "noise", tuple(noise))] if noise else found


# What each cluster earns


def earned(found: Sequence[Cluster], descriptions: Sequence[Description], ious: Earned) -> dict[int, tuple[float, int]]:
    """Cluster -> (mean IOU, answers). Answers whose prompt showed no known persona are left out."""
    number = {descriptions[i].text: cluster.number for cluster in found for i in cluster.members}
    values: defaultdict[int, list[float]] = defaultdict(list)
    for persona, value in ious:
        if persona in number:
            values[number[persona]].append(value)
    return {cluster: (math.fsum(part) / len(part), len(part)) for cluster, part in values.items()}


def rows(found: Sequence[Cluster], sources: Mapping[str, Mapping[int, tuple[float, int]]]) -> list[dict[str, Any]]:
    """Tables 6 and 7 with Table 3 beside: size of each cluster; by source its mean IOU (None: no answers) and answers."""
    listed = []
    for x in found:
        mine = {source: values.get(x.number, (None, 0)) for source, values in sources.items()}
        ious, answers = ({source: pair[i] for source, pair in mine.items()} for i in (0, 1))
        listed.append({"cluster": x.number, "name": x.name, "size": len(x.members), "iou": ious, "answers": answers})
    return listed


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text; IOU in percent, the number of answers behind it."""
    shown = [f"{'':>5} {'size':>6}  {'cluster':44}" + "".join(f" {Path(name).stem[:18]:>18}" for name in lines[0]["iou"])]
    for row in lines:
        pairs = zip(row["iou"].values(), row["answers"].values(), strict=True)
        cells = "".join(f" {'-' if x is None else f'{100 * x:.2f} % ({n})':>18}" for x, n in pairs)
        number = "" if row["cluster"] == NOISE else row["cluster"]
        shown.append(f"{number:>5} {row['size']:6d}  {row['name'][:44]:44}{cells}".rstrip())
    return "\n".join(shown)


# Fig. 4


def draw(found: Sequence[Cluster], places: Floats, path: Path) -> None:
    """The map as PNG or SVG; colour and shape both tell clusters apart. Raises `UserError` without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -r requirements-extra.txt") from None
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for x in sorted(found, key=lambda x: x.number):  # noise below
        at = places[list(x.members)]
        noise = x.number == NOISE
        look: dict[str, Any] = {"marker": "x" if noise else "osD^v<>pPh8*"[x.number], "s": 14 if noise else 26}
        axes.scatter(*at.T, color="0.7" if noise else colormaps["tab20"](x.number), label=label(x), **look)
        if not noise:
            axes.annotate(str(x.number), tuple(np.median(at, axis=0)), weight="bold", ha="center", va="center")
    axes.set(xticks=[], yticks=[], title="Persona descriptions, the largest clusters (t-SNE)")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def label(x: Cluster) -> str:
    """The number, name and size of a cluster."""
    return f"{x.name} ({len(x.members)})" if x.number == NOISE else f"{x.number} {x.name} ({len(x.members)})"


def in_words(found: Sequence[Cluster], places: Floats) -> str:
    """The map for those who do not see it: clusters, sizes, and which other centre is nearest."""
    centre = {x.number: np.median(places[list(x.members)], axis=0) for x in found if x.number != NOISE}
    lines = ["Map of persona descriptions: each point is one, each colour and shape a cluster; axes have no unit."]
    for x in found:
        away = {n: float(np.linalg.norm(at - centre[x.number])) for n, at in centre.items() if x.number not in (n, NOISE)}
        lines.append(label(x) + (f"; nearest: {min(away, key=lambda n: away[n])}" if away else ""))
    return "\n".join(lines) + "\n"


# The command


@dataclass(frozen=True)
class PersonasCommand:
    """Which descriptions, how they are grouped, and what is written."""

    run: Path | None = None  # Run whose responders' personas are taken, and what its answers to them earned.
    personas: Path | None = None  # Personas to take instead (JSONL of `python -m experts`).
    scores: Pairs = ()  # Answers of evaluate.py score --out, repeatable: what they earn by persona (Table 3).
    steps: str = ""  # Only answers of these RL steps of the run: STEP or FIRST-LAST, from 0 as in rollouts/.
    encoder: str = ""  # Hugging Face folder of a text encoder. Default: TF-IDF and SVD.
    min_cluster_size: int = 0  # Least descriptions of a cluster; 0 = a 300th of all, at least 5.
    plot: Path | None = None
    """PNG or SVG of the 12 largest clusters (Fig. 4); what it shows stands in words beside it, in a file ending in .txt."""
    seed: int = 0  # Of SVD and map.
    json: tyro.conf.FlagCreatePairsOff[bool] = False  # One JSON object instead of the table.


def personas_command(command: tyro.conf.OmitArgPrefixes[PersonasCommand]) -> int:
    """Group persona descriptions and show what answers earn by group (Tables 3, 6, 7, Fig. 4)."""
    if command.plot and command.plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {command.plot}: give a file that ends in .png or .svg")
    records = [record for _, record in rollouts(undamaged(command.run))] if command.run else []
    described = from_file(command.personas) if command.personas else from_run(records)
    if not described:
        raise UserError("there are no personas: give --personas FILE, or --run of a run that had some")
    steps = span(command.steps, "--steps") if command.steps else None
    taken = {"run": run_ious([r for r in records if steps is None or r["step"] in steps])} if command.run else {}
    taken |= {path: score_ious(Path(path)) for path in command.scores}
    texts, least = masked(described), command.min_cluster_size or max(5, len(described) // 300)
    vectors = encoder_vectors(texts, command.encoder) if command.encoder else tfidf_vectors(texts, command.seed)
    found = clusters(texts, vectors, least)
    lines = rows(found, {source: earned(found, described, ious) for source, ious in taken.items()})
    if command.plot:
        shown = [x for x in found if x.number < SHOWN]
        points = [i for x in shown for i in x.members]
        places = np.full((len(texts), 2), np.nan)
        places[points] = flat(vectors[points], command.seed)
        draw(shown, places, command.plot)
        write_atomically(command.plot.with_suffix(".txt"), in_words(shown, places))
    what = command.encoder or "TF-IDF and SVD"
    count = f"{len(described)} descriptions, {sum(x.number != NOISE for x in found)} clusters of {least} or more by {what}"
    print(json.dumps({"descriptions": len(described), "clusters": lines}) if command.json else f"{table(lines)}\n{count}")
    return 0
