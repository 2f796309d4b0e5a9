"""What a text is, in every script: one line of it, its words, and the forms in which texts and names are compared.

The rule for words is `words`; every count of words and every comparison of lines, names and labels comes here, because
blanks, `\\w` and `str.lower` know English: Chinese has no blanks, and `\\w` leaves out the vowel signs of Hindi.
"""

import unicodedata

JOINERS = "\u200c\u200d\u180e"  # invisible, but part of some spellings and emoji
INSIDE = "'’‐·־׳״་・"  # signs that stand inside of words: l'ennui, col·legi, ג׳ירפה, དགའ་བ
BLANKLESS = (  # how Unicode names the letters of scripts that are written without blanks
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "HENTAIGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO ", "YI SYLLABLE"),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE ", "TANGUT ", "NUSHU "),
)


def clean(text: str) -> str:
    """One line: Unicode's whitespace and line breaks become single spaces, other invisible characters go.

    Accents are joined to their letters (NFC), so that a text equals itself however it was typed. Every turn passes
    through here, the model's own replies too: none can begin a second line of the history.
    """
    spaced = " ".join(text.split())
    if not spaced.isprintable():
        shown = (c for c in spaced if c in JOINERS or unicodedata.category(c) not in {"Cc", "Cf", "Cs"})
        spaced = " ".join("".join(shown).split()).lstrip(" " + JOINERS)
        while spaced and spaced[-1] in " " + JOINERS and not is_mark(spaced[-2:-1]):  # Malayalam ends words in sign, joiner
            spaced = spaced[:-1]
    return unicodedata.normalize("NFC", spaced)


# Characters


def is_mark(c: str) -> bool:
    """Whether a character is a sign on the letter before it: an accent, a vowel sign, a tone. False for none."""
    return c != "" and unicodedata.category(c)[0] == "M"


def is_wordy(c: str) -> bool:
    """Whether words are made of a character: a letter, a digit, a mark, or a joiner between them."""
    return c.isalnum() or c in JOINERS or is_mark(c)


def is_blankless(c: str) -> bool:
    """Whether a letter belongs to a script that is written without blanks."""
    return c.isalnum() and not c.isascii() and unicodedata.name(c, "").startswith(BLANKLESS)


def made_of(text: str, signs: str) -> bool:
    """Whether a text is not empty and has nothing but letters, digits, marks, joiners and `signs`."""
    return text != "" and all(is_wordy(c) or c in signs for c in text)


# Words


def words(text: str) -> list[str]:
    """The words of a text: what stands between blanks; of a script that is written without blanks, each letter.

    Such a letter keeps its marks, and the punctuation around it is dropped: "iPhone很好。" has three words.
    """
    found = []
    for piece in text.split():
        found += split_letters(piece) if any(map(is_blankless, piece)) else [piece]
    return found


def split_letters(piece: str) -> list[str]:
    """The letters of scripts without blanks, one by one, and the words of other scripts between them."""
    found: list[str] = []
    open_word = after_letter = False
    for c in piece:
        alone = is_blankless(c)
        if (after_letter and is_mark(c)) or (open_word and c.isalnum() and not alone):
            found[-1] += c
        elif c.isalnum():
            found.append(c)
            open_word = not alone
        after_letter = is_wordy(c)
    return found


def bare(text: str, between: str = "") -> str:
    """A text as lines are compared: no case, no full-width and other compatibility forms (NFKC), no punctuation.

    `between`: what takes the place of a sign. Turkish dotted and dotless i are one letter, as their capitals lose the
    difference. What only chooses between two forms of a letter (joiners, variation selectors) goes.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.replace("i\u0307", "i").replace("ı", "i")
    seen = (c for c in folded if not is_form(c))
    return "".join(c if c.isalnum() or c == "_" or is_mark(c) else " " if c.isspace() else between for c in seen)


def is_form(c: str) -> bool:
    """Whether a character is invisible and only chooses how its neighbours look."""
    return c in JOINERS or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"


def small(name: str) -> str:
    """A label as labels are compared: in lower case, accents joined to their letters (NFC), I with a dot as i."""
    return unicodedata.normalize("NFC", name.lower()).replace("i\u0307", "i")
