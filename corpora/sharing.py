"""Lines that dialogues of different splits share (D24)."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from common.text import bare, words
from corpora.dialogue import Dialogue


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


def long_line(text: str) -> str | None:
    """The words of a line (`common.text.words`) without case and punctuation, if there are at least six."""
    found = words(bare(text))
    return " ".join(found) if len(found) >= 6 else None


def _long_lines(dialogue: Dialogue) -> set[str]:
    return {line for turn in dialogue.turns if (line := long_line(turn.text))}
