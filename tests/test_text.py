"""Words, names and lines in every script: by hand, and the same text typed in two ways."""

import unicodedata

import pytest

from common.text import bare, clean, made_of, small, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I feel -- JOY.", ["I", "feel", "--", "JOY."]),  # as `str.split`
        ("", []),
        ("他很好。", ["他", "很", "好"]),
        ("iPhone很好。", ["iPhone", "很", "好"]),
        ("「はい」と 言う", ["は", "い", "と", "言", "う"]),
        ("コーヒー", ["コ", "ー", "ヒ", "ー"]),
        ("人々", ["人", "々"]),
        ("ที่นี่", ["ที่", "นี่"]),  # a consonant, a vowel sign and a tone, twice
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("好❤\ufe0f的", ["好", "的"]),  # the selector belongs to the heart
        ("मैं बहुत खुश हूँ।", ["मैं", "बहुत", "खुश", "हूँ।"]),
        ("나는 한국어를 해요", ["나는", "한국어를", "해요"]),
        ("شَمْسٌ جميلة", ["شَمْسٌ", "جميلة"]),
    ],
)
def test_words(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("We WERE on a break -- you know!", "we were on a break you know"),
        ("ＡＢＣ！", "abc"),
        ("İYİ KIZ", "iyi kız"),
        ("caf\u00e9", "CAFE\u0301"),
        ("می\u200cخواهم", "میخواهم"),
        ("ガ", "\uff76\uff9e"),  # full and half width
        ("葛\U000e0100城", "葛城"),
        ("你好，吗？", "你好吗"),
    ],
)
def test_lines_that_are_the_same(one, other):
    assert one != other
    assert bare(one).split() == bare(other).split()


def test_lines_that_are_not_the_same():
    """Vowel signs are part of a Hindi word: joy and a kind of person must not become one."""
    assert bare("खुशी") == "खुशी" != bare("खुश")
    assert bare("don't") == "dont" and bare("don't", " ") == "don t"


LABELS = [("JOY", "joy"), ("İğrenme", "iğrenme"), ("TỦI", "tủi"), ("ΦΌΒΟΣ", "φόβος")]


@pytest.mark.parametrize(("name", "shown"), LABELS)
def test_a_label_is_one_however_it_is_typed(name, shown):
    for form in ("NFC", "NFD"):
        assert small(unicodedata.normalize(form, name)) == unicodedata.normalize("NFC", shown)


def test_clean_joins_accents_and_keeps_the_joiners_of_spellings():
    """Persian has a joiner inside of words, old Malayalam spelling one behind the last sign of a word."""
    assert clean("cafe\u0301 ") == "caf\u00e9"
    assert clean("می\u200cخواهم") == "می\u200cخواهم"
    assert clean("അവന്\u200d ") == "അവന്\u200d"
    assert clean("Ann\u200d") == "Ann"


def test_made_of_letters_digits_and_marks():
    assert all(made_of(text, "_") for text in ("खुशी", "a_b", "7", "می\u200cخوا"))
    assert not any(made_of(text, "_") for text in ("", "a b", "a/b", "a\u200bb", "a❤"))
