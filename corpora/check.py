"""Hold data against the sizes and files of the paper: the command `python data.py audit`."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.files import sha256
from common.flags import Pairs, roots
from common.text import JOINERS
from corpora import iemocap, loading, sharing
from corpora.dialogue import SPLITS, Dialogue, is_group
from corpora.download import FILES
from corpora.loading import TABLES

# Of train, dev and test in the paper, section 4.1: samples, dialogues.
SIZES = {"meld": (9989, 1109, 2610), "emorynlp": (7551, 954, 984), "iemocap": (5163, 647, 1623)}
DIALOGUES = {"meld": (1038, 114, 280), "emorynlp": (659, 89, 79), "iemocap": (108, 12, 31)}
LABEL_COUNTS: Mapping[str, tuple[tuple[int, ...], ...]] = {  # labels in the order of corpora.dialogue.LABELS
    "meld": ((4710, 1205, 268, 683, 1743, 271, 1109), (470, 150, 40, 111, 163, 22, 153), (1256, 281, 50, 208, 402, 68, 345)),
    "emorynlp": ((1677, 785, 638, 2485, 474, 551, 941), (205, 97, 82, 322, 51, 70, 127), (217, 86, 111, 288, 70, 96, 116)),
    "iemocap": ((451, 771, 1221, 831, 593, 1296), (53, 68, 103, 102, 149, 172), (144, 245, 384, 170, 299, 381)),
}


@dataclass(frozen=True)
class Check:
    """One row of the audit: what was found in each split, and what had to be found, if anything had to."""

    what: str
    found: Mapping[str, int | str]
    expected: Mapping[str, int | str] | None = None
    detail: str = ""

    @property
    def status(self) -> str:
        """`ok` or `differs`; `info` where nothing is expected."""
        return "info" if self.expected is None else "ok" if self.found == self.expected else "differs"


Corpus = Mapping[str, Sequence[Dialogue]]  # split -> dialogues
AsJson = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="json")]


def audit(data: Pairs, as_json: AsJson = False) -> Iterator[str]:
    """Hold data against the paper's sizes and the known files, and show what a reader of results should know.

    Args:
        data: NAME=DIR of a dataset; repeatable.
        as_json: One JSON object instead of tables.
    """
    folders = roots(data)
    corpora = {name: {split: loading.load(name, root, split) for split in SPLITS} for name, root in folders.items()}
    checks = {name: checks_of(name, root, corpora[name]) for name, root in folders.items()}
    shared, everything = shared_lines(corpora), [c for found in checks.values() for c in found]
    train, test = ([d for corpus in corpora.values() for d in corpus[split]] for split in ("train", "test"))
    dropped, unclean = sharing.overlap(train, test), sharing.overlap(test, train)
    overlaps = {
        name: {
            "train dialogues": len(corpus["train"]),
            "dropped by --drop_overlap": sum(d.key in dropped for d in corpus["train"]),
            "test samples": labelled(corpus["test"]),
            "clean test samples": labelled(d for d in corpus["test"] if d.key not in unclean),
        }
        for name, corpus in corpora.items()
    }
    if as_json:
        rows = {
            name: {c.what: {"found": c.found, "expected": c.expected, "status": c.status, "detail": c.detail} for c in found}
            for name, found in checks.items()
        }
        yield json.dumps({"checks": rows, "shared_lines": shared, "overlap": overlaps})
        return
    for name, found in checks.items():
        yield from check_table(name, found)
    yield from shared_table(shared)
    for name, numbers in overlaps.items():
        yield f"{name}: " + ", ".join(f"{what} {n}" for what, n in numbers.items())
    yield "checks: " + ", ".join(f"{status} {sum(c.status == status for c in everything)}" for status in ("ok", "differs"))


def checks_of(name: str, root: str, corpus: Corpus) -> list[Check]:
    """The rows of one dataset; what is expected is known for `meld`, `emorynlp` and `iemocap` alone."""
    nothing = dict.fromkeys(SPLITS, 0)
    sizes, dialogues, counts = (by_split(known.get(name)) for known in (SIZES, DIALOGUES, LABEL_COUNTS))
    rows = [
        Check("samples", {split: labelled(found) for split, found in corpus.items()}, sizes),
        Check("dialogues", {split: len(found) for split, found in corpus.items()}, dialogues),
    ]
    names = loading.label_set(name, root)
    tops = {
        split: Counter(max(t.label, key=t.label.__getitem__) for d in found for t in d.turns if t.label)
        for split, found in corpus.items()
    }
    for i, label in enumerate(names):
        wanted = {split: numbers[i] for split, numbers in counts.items()} if counts else None
        rows.append(Check(f"label {label}", {split: tops[split][label] for split in SPLITS}, wanted))
    rows += iemocap_checks(root, corpus) if name == "iemocap" else file_checks(name, Path(root))
    texts = {split: "\n".join(map(_read, files(name, root, split))) for split in SPLITS}
    odd = {split: odd_characters(text) for split, text in texts.items()}
    beyond = {split: Counter(c for c in text if not c.isascii()) for split, text in texts.items()}
    total = sum(beyond.values(), Counter[str]())
    shown = ", ".join(f"U+{ord(c):04X} {n}" for c, n in total.most_common(4))
    rows += [
        Check("odd characters", {split: found.total() for split, found in odd.items()}, nothing, _names(odd)),
        Check("characters beyond ASCII", {split: found.total() for split, found in beyond.items()}, None, shown),
        *hole_checks(name, corpus),
    ]
    speakers = {split: Counter(turn.speaker for d in found for turn in d.turns) for split, found in corpus.items()}
    groups = {split: Counter({k: n for k, n in c.items() if is_group(k)}) for split, c in speakers.items()}
    lone = {split: sum(len({t.speaker for t in d.turns}) == 1 for d in found) for split, found in corpus.items()}
    twins = {split: repeats(found) for split, found in corpus.items()}
    pairs_shown = ", ".join(f"{split} {a} and {b}" for split, found in twins.items() for a, b in found)
    return [
        *rows,
        Check("dialogues of one speaker", lone, None),
        Check("turns of group speakers", {split: found.total() for split, found in groups.items()}, None, _names(groups)),
        Check("dialogues that repeat another", {split: len(found) for split, found in twins.items()}, None, pairs_shown),
    ]


def by_split(values: Sequence[Any] | None) -> dict[str, Any] | None:
    """Values of train, dev, test by their names."""
    return None if values is None else dict(zip(SPLITS, values, strict=True))


def labelled(dialogues: Iterable[Dialogue]) -> int:
    """Turns with a label, that is samples."""
    return sum(turn.label is not None for d in dialogues for turn in d.turns)


def files(name: str, root: str, split: str) -> list[Path]:
    """The files that hold the texts of a split."""
    if name == "iemocap":
        return [source.spoken for source in iemocap.sources(root) if source.split == split]
    return [Path(root) / (TABLES[name][0] if name in TABLES else "{}.jsonl").format(split)]


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="replace")


def odd_characters(text: str) -> Counter[str]:
    """Signs of a wrong encoding: controls, invisible and undecodable characters, UTF-8 that was read as another encoding."""
    suspects = {c for c in set(text) if c == "\ufffd" or unicodedata.category(c) in {"Cc", "Cf", "Cn", "Co", "Cs"}}
    found = Counter({f"U+{ord(c):04X}": text.count(c) for c in suspects - set("\r\n\t" + JOINERS)})
    return found + Counter(re.findall(r"â€|[ÂÃ][\x80-\xbf]", text))


def file_checks(name: str, root: Path) -> list[Check]:
    """SHA-256 of the pinned files, first 12 digits; line ends."""
    if name not in TABLES:
        return []
    pinned = {remote.path: remote.sha256[:12] for remote in FILES}
    names = {split: TABLES[name][0].format(split) for split in SPLITS}
    found = {split: sha256(root / file)[:12] for split, file in names.items()}
    ends = {split: "CRLF" if b"\r\n" in (root / file).read_bytes() else "LF" for split, file in names.items()}
    expected = {split: pinned[f"{name}/{file}"] for split, file in names.items()}
    return [Check("SHA-256 of the file", found, expected), Check("line ends", ends, None)]


def iemocap_checks(root: str, corpus: Corpus) -> list[Check]:
    """The self-check of the whole release, and what else is known of it."""
    found = {split: Counter[str]() for split in SPLITS}
    for source in iemocap.sources(root):
        found[source.split].update(iemocap.survey(source))
    known = {
        "promoted to happy": by_split((51, 1, 1)), "rated but not spoken": by_split((0, 0, 0)),
        "undecided with a majority": by_split((0, 0, 0)), "votes of an unknown name": by_split((0, 0, 0)),
    }
    rated = sum(counts["rated turns"] for counts in found.values())
    verdict, digest = iemocap.self_check(d for dialogues in corpus.values() for d in dialogues)
    return [
        Check("self-check", {"all": verdict}, {"all": "passed"}, digest),
        Check("rated turns of the release", {"all": rated}, {"all": 10039}),
        *(Check(what, {split: found[split][what] for split in SPLITS}, known.get(what)) for what in iemocap.SURVEY),
    ]


def hole_checks(name: str, corpus: Corpus) -> list[Check]:
    """Turns that the history of a sample lacks: unlabelled ones, or numbers that the files skip."""
    if name not in TABLES:
        unlabelled = {split: sum(t.label is None for d in found for t in d.turns) for split, found in corpus.items()}
        return [] if name == "iemocap" else [Check("turns without a label", unlabelled, None)]
    numbers = {split: [[int(t.id) for t in d.turns] for d in found] for split, found in corpus.items()}
    first = 0 if name == "meld" else 1
    holes = {split: [ids[-1] - ids[0] + 1 - len(ids) for ids in found] for split, found in numbers.items()}
    late = {split: sum(ids[0] > first for ids in found) for split, found in numbers.items()}
    return [
        Check("dialogues with holes", {split: sum(n > 0 for n in found) for split, found in holes.items()}, None),
        Check("turns missing in holes", {split: sum(found) for split, found in holes.items()}, None),
        Check("dialogues that begin late", late, None),
    ]


def repeats(dialogues: Sequence[Dialogue]) -> list[tuple[str, str]]:
    """Pairs of dialogues of a split with two or more long lines in common (D24's measure)."""
    shared = sharing.shared_lines(dialogues, dialogues)
    ids = {d.key: d.id for d in dialogues}
    order = {d.key: i for i, d in enumerate(dialogues)}
    return [(ids[a], ids[b]) for a in ids for b, n in shared[a].items() if n >= 2 and order[a] < order[b]]


def shared_lines(corpora: Mapping[str, Corpus]) -> dict[str, dict[str, int]]:
    """Split -> split -> how many turns of six or more words of the first also stand, word for word, in the second.

    With itself: how many such turns it has.
    """
    lines = {
        f"{name}/{split}": [line for d in found for turn in d.turns if (line := sharing.long_line(turn.text))]
        for name, corpus in corpora.items()
        for split, found in corpus.items()
    }
    sets = {key: set(found) for key, found in lines.items()}
    return {a: {b: sum(line in sets[b] for line in lines[a]) for b in lines} for a in lines}


def check_table(name: str, checks: Sequence[Check]) -> Iterator[str]:
    """The rows of one dataset as text."""
    yield f"{name:30}" + "".join(f"{split:>14}" for split in SPLITS) + "  status"
    for check in checks:
        cells = [str(value) for value in check.found.values()]  # of train, dev, test, or one of all
        wanted = " ".join(str(value) for value in (check.expected or {}).values())
        status = {"ok": "ok", "info": "-", "differs": f"differs, expected {wanted}"}[check.status]
        row = f"{check.what:30}" + "".join(f"{cell:>14}" for cell in cells)
        yield f"{row:72}  {status}" + (f"  ({check.detail})" if check.detail else "")
    yield ""


def shared_table(shared: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Rows and columns are splits; a cell counts turns of the row that stand in the column."""
    yield "turns of six or more words that stand, word for word, in the split of the column too (itself: how many there are)"
    yield f"{'':16}" + "".join(f"{key:>16}" for key in shared)
    for key, row in shared.items():
        yield f"{key:16}" + "".join(f"{n:16d}" for n in row.values())
    yield ""


def _names(found: Mapping[str, Counter[str]]) -> str:
    total = sum(found.values(), Counter[str]())
    rest = len(total) - 4
    return ", ".join(f"{name} {n}" for name, n in total.most_common(4)) + (f" and {rest} more" if rest > 0 else "")
