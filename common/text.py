"""One line of text, whatever somebody wrote."""

import unicodedata

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
