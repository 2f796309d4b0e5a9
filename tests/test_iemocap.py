"""IEMOCAP from an invented release in the formats of the real one: names of files are real, no line is."""

import hashlib
import re

import pytest

import data
from common.errors import UserError
from corpora import iemocap, loading
from corpora.dialogue import LABELS, SPLITS, Turn

HAPPY, SAD = "Happiness", "Sadness"
XXX = {"code": "xxx"}


def block(turn, code="neu", votes=("Neutral",) * 3, own=None, start="6.1000", end="8.2000"):
    """One rated turn as EmoEvaluation writes it; a vote of several labels is written "Neutral; Anger"."""
    lines = [f"[{start} - {end}]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]"]
    lines += [f"C-E{i}:\t{vote};\t(made up; Anger;)" for i, vote in zip((2, 3, 4), votes, strict=False)]
    letter = turn.rpartition("_")[2][0]
    if own is not None:
        lines.append(f"C-{letter}1:\t{own};\t()")
    return "\n".join([*lines, "A-E3:\tval 3; act 2; dom  2;\t()", f"A-{letter}1:\tval 3; act 2; dom  1;\t()"])


def add(root, name, spoken, ratings, eol="\n"):
    """One dialogue: `spoken` are lines of the transcription, `ratings` blocks, which the release sorts by id."""
    dialog = root / f"Session{name[4]}" / "dialog"
    for part in ("transcriptions", "EmoEvaluation"):
        (dialog / part).mkdir(parents=True, exist_ok=True)
    (dialog / "transcriptions" / f"{name}.txt").write_bytes(eol.join([*spoken, ""]).encode())
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "\n\n".join(sorted(ratings, key=turn_of)) + "\n\n"
    (dialog / "EmoEvaluation" / f"{name}.txt").write_bytes(text.replace("\n", eol).encode())
    return root


def turn_of(rating):
    return rating.split("\t")[1]


def said(turn, text, start="006.1000", end="008.2000"):
    return f"{turn} [{start}-{end}]: {text}"


def short(root, name, *codes):
    """A dialogue of one line a code, both speakers in turn."""
    ids = [f"{name}_{'FM'[i % 2]}{i // 2:03d}" for i in range(len(codes))]
    spoken = [said(turn, f"Line {i}.") for i, turn in enumerate(ids)]
    return add(root, name, spoken, [block(turn, code) for turn, code in zip(ids, codes, strict=True)])


def release(made):
    """Six dialogues: session 1 has one of dev and one of train, session 5 is test."""
    a = "Ses01F_impro99"
    add(
        made,
        a,
        [
            said(f"{a}_M000", "Did you call her?", "009.0000", "010.0000"),
            said(f"{a}_F000", "I did. [LAUGHTER]", "001.0000", "002.0000"),  # earlier by its time, later in the file
            "F: [BREATHING]",
            "",
            said(f"{a}_MXX0", "Um."),
            said(f"{a}_M001", "And she hung\x92s up?"),
            said(f"{a}_F001", "[BREATHING]"),
            said(f"{a}_F002", "At once."),
            said(f"{a}_M002", "Good."),
        ],
        [
            block(f"{a}_M000", "fru", ("Frustration", "Frustration; Anger", "Neutral state")),
            block(f"{a}_F000", "exc", ("Excited", "Excited", "Surprise"), own="Anger"),
            block(f"{a}_M001", "sur", ("Surprise",) * 3),
            block(f"{a}_F001", "xxx", (HAPPY, SAD, ""), own=HAPPY),
            block(f"{a}_F002", "sad", ("Fear", "Disgust", "Other")),
            block(f"{a}_M002", "ang", ("Anger; Neutral", "Anger", "Anger;Frustration")),
        ],
    )
    short(made, "Ses01M_impro01", "neu", "hap")
    short(made, "Ses02M_impro08b", "neu")
    short(made, "Ses03M_impro05a", "fea", "dis", "oth", "exc")
    short(made, "Ses04F_script02_2", "neu", "xxx")
    short(made, "Ses05M_script01_1b", "hap", "sad", "neu", "ang")
    return made


@pytest.fixture
def root(tmp_path):
    return release(tmp_path / "IEMOCAP_full_release")


def one(root, name="Ses01F_impro99", split="train", **options):
    return next(d for d in loading.load("iemocap", root, split, **options) if d.id == name)


def test_turns_stand_in_the_order_of_the_transcription_and_ratings_are_joined_by_id(root):
    found = one(root)
    assert found.key == "iemocap/train/Ses01F_impro99"
    assert found.turns == (
        Turn("Ses01_M", "Did you call her?", {"frustrated": 1.0}, "M000"),
        Turn("Ses01_F", "I did. [LAUGHTER]", {"excited": 1.0}, "F000"),
        Turn("Ses01_F", "[BREATHING]", {"happy": 1.0}, "F001"),
        Turn("Ses01_F", "At once.", {"sad": 1.0}, "F002"),
        Turn("Ses01_M", "Good.", {"angry": 1.0}, "M002"),
    )
    assert [s.id for s in data.samples([found], LABELS["iemocap"])][:2] == [
        "iemocap/train/Ses01F_impro99/M000",
        "iemocap/train/Ses01F_impro99/F000",
    ]


def test_context_all_keeps_turns_without_a_class_and_without_a_rating(root):
    """MXX0 was never rated, M001 is a surprise; the same five turns are samples."""
    found = one(root, context="all")
    assert [t.id for t in found.turns] == ["M000", "F000", "MXX0", "M001", "F001", "F002", "M002"]
    assert [t.label is None for t in found.turns] == [False, False, True, True, False, False, False]
    made = data.samples([found], LABELS["iemocap"])
    assert [s.id.rpartition("/")[2] for s in made] == ["M000", "F000", "F001", "F002", "M002"]
    assert [len(s.context) for s in made] == [1, 2, 5, 6, 7]
    assert made[2].context[3].text == "And she hung’s up?"


def test_soft_labels_are_shares_of_the_votes_for_the_six_classes(root):
    """M000: Frustration 2, Anger 1, Neutral state 1. F000: Excited 2 of 2; Surprise is no class, the own line no vote.
    F001: Happiness 1, Sadness 1, one annotator left it empty. F002: no vote for a class: the hard label. M002: Anger 3,
    Neutral 1, Frustration 1. What stands in the comment never counts."""
    found = {t.id: t.label for t in one(root, soft_labels=True).turns}
    assert found == {
        "M000": {"neutral": 0.25, "angry": 0.25, "frustrated": 0.5},
        "F000": {"excited": 1.0},
        "F001": {"happy": 0.5, "sad": 0.5},
        "F002": {"sad": 1.0},
        "M002": {"neutral": 0.2, "angry": 0.6, "frustrated": 0.2},
    }


@pytest.mark.parametrize(
    "code, votes, own, label",
    [
        ("xxx", (HAPPY, SAD, "Neutral"), HAPPY, "happy"),
        ("xxx", ("Excited; Happiness", SAD, "Neutral"), HAPPY, "happy"),
        ("xxx", ("Excited", SAD, "Neutral"), HAPPY, None),  # no annotator heard it
        ("xxx", (HAPPY, SAD, "Neutral"), None, None),  # no self-evaluation
        ("xxx", (HAPPY, SAD, "Neutral"), "Happiness; Excited", None),  # not happy alone
        ("xxx", (SAD, SAD, HAPPY), SAD, None),  # no other class is promoted
        ("xxx", (HAPPY, SAD, "Neutral"), "", None),
        ("oth", (HAPPY, "Other", "Other"), HAPPY, None),  # only undecided turns
        ("sad", (HAPPY, SAD, SAD), HAPPY, "sad"),
    ],
)
def test_promotion(root, code, votes, own, label):
    """Undecided turns become happy if the speaker said so and nothing else, and one annotator at least."""
    name = "Ses02F_impro99"
    add(root, name, [said(f"{name}_F000", "Well.")], [block(f"{name}_F000", code, votes, own)])
    turns = one(root, name, context="all").turns
    assert [t.label for t in turns] == [{label: 1.0} if label else None]


def test_the_other_actors_line_promotes_nobody(root):
    name = "Ses02F_impro99"
    rating = block(f"{name}_F000", "xxx", (HAPPY, SAD, "Neutral")) + f"\nC-M1:\t{HAPPY};\t()"
    add(root, name, [said(f"{name}_F000", "Well.")], [rating])
    assert one(root, name, context="all").turns[0].label is None


def test_splits_and_odd_names_of_dialogues(root):
    """Session 5 is test, twelve named dialogues of sessions 1 to 4 are dev; names may end in a letter."""
    found = {split: [d.id for d in loading.load("iemocap", root, split)] for split in SPLITS}
    assert found == {
        "train": ["Ses01F_impro99", "Ses02M_impro08b", "Ses03M_impro05a", "Ses04F_script02_2"],
        "dev": ["Ses01M_impro01"],
        "test": ["Ses05M_script01_1b"],
    }
    assert len(set(iemocap.DEV)) == 12
    turns = loading.load("iemocap", root, "test")[0].turns
    assert [t.speaker for t in turns] == ["Ses05_F", "Ses05_M", "Ses05_F", "Ses05_M"]
    labels = [next(iter(t.label)) for d in loading.load("iemocap", root, "test") for t in d.turns]
    assert labels == ["happy", "sad", "neutral", "angry"]
    assert loading.label_set("iemocap", root) == ("happy", "sad", "neutral", "angry", "excited", "frustrated")


def test_files_of_other_systems_and_of_single_annotators_are_passed_over(root):
    expected = loading.load("iemocap", root, "train")
    for part in ("transcriptions", "EmoEvaluation"):
        folder = root / "Session1/dialog" / part
        (folder / "._Ses01F_impro99.txt").write_bytes(b"\x00\x05\x16\x07")
        (folder / "._Ses01F_impro98.txt").write_bytes(b"\x00\x05\x16\x07")
        (folder / ".DS_Store").write_bytes(b"\x00")
        (folder / "README.txt").write_text("[1 - 2]\tnothing")
    for sub in ("Attribute", "Categorical", "Self-evaluation"):
        (root / "Session1/dialog/EmoEvaluation" / sub).mkdir()
        (root / f"Session1/dialog/EmoEvaluation/{sub}/Ses01F_impro99_e1.txt").write_text("Ses01F_impro99_F000 :Sadness; ()")
    assert loading.load("iemocap", root, "train") == expected


def test_the_folder_around_the_release_will_do(root):
    (root.parent / "another").mkdir()
    assert loading.load("iemocap", root.parent, "test") == loading.load("iemocap", root, "test")


@pytest.mark.parametrize("eol", ["\r\n", "\n"])
def test_line_ends_and_bytes_of_another_encoding(root, eol):
    """A comment that is not UTF-8 must not stop the reading; text in it is read byte by byte."""
    name = "Ses02F_impro99"
    rating = block(f"{name}_F000", "neu").replace("made up", "@@")
    add(root, name, [said(f"{name}_F000", "It@@s so."), said(f"{name}_M000", "Hm.")], [rating], eol)
    for path in root.glob(f"Session2/dialog/*/{name}.txt"):
        path.write_bytes(path.read_bytes().replace(b"@@", b"\x92"))
    assert one(root, name).turns == (Turn("Ses02_F", "It’s so.", {"neutral": 1.0}, "F000"),)
    assert one(root, name, context="all").turns[1] == Turn("Ses02_M", "Hm.", None, "M000")


def spoil(root, part, name, old, new):
    path = root / f"Session{name[4]}/dialog/{part}/{name}.txt"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "part, old, new, message",
    [
        ("EmoEvaluation", "\tneu\t", "\tfun\t", r"impro08b.txt:3: unknown emotion 'fun', known are hap sad"),
        ("EmoEvaluation", "_F000\tneu", "_F001\tneu", r"impro08b.txt: no line for F001, to which EmoEval"),
        ("EmoEvaluation", "[6.1000 - 8.2000]\t", "[6.1000 -", r"impro08b.txt:3: '\[6.1000 -.* is no heading of a turn"),
        ("transcriptions", ": Line", "x Line 0\nSes02M_impro08b_F000 [1.0-2.0]: Line", r"8b.txt:2: F000 a second"),
        ("transcriptions", "Ses02M", "Ses02F", r"impro08b.txt: no line for F000"),
    ],
)
def test_a_broken_file_is_named(root, part, old, new, message):
    spoil(root, part, "Ses02M_impro08b", old, new)
    with pytest.raises(UserError, match=message) as error:
        loading.load("iemocap", root, "train")
    assert "\n" not in str(error.value) and str(error.value).endswith("unpack the release again")


def test_a_turn_rated_twice_is_named(root):
    name = "Ses02M_impro08b"
    add(root, name, [said(f"{name}_F000", "Hm.")], [block(f"{name}_F000")] * 2)
    with pytest.raises(UserError, match=r"EmoEvaluation/Ses02M_impro08b.txt:\d+: F000 a second time"):
        loading.load("iemocap", root, "train")


@pytest.mark.parametrize("part", ["transcriptions", "EmoEvaluation"])
def test_a_missing_file_is_named(root, part):
    path = root / f"Session2/dialog/{part}/Ses02M_impro08b.txt"
    path.unlink()
    short(root, "Ses02F_impro01", "neu")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: No such file or directory; unpack"):
        loading.load("iemocap", root, "train")


def test_a_missing_session_is_one_line_that_says_where_to_get_it(root, tmp_path):
    (root / "Session3").rename(tmp_path / "elsewhere")
    for folder in (root, root.parent, root / "Session1", tmp_path / "nowhere", root / "Session1/dialog/nowhere"):
        with pytest.raises(UserError, match="Ask for IEMOCAP at https://sail.usc.edu/iemocap/") as error:
            loading.load("iemocap", folder, "test")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"IEMOCAP_full_release: Session3/dialog/transcriptions, Session3/\S+ is not"):
        loading.load("iemocap", root.parent, "test")


def test_an_empty_session_is_named(root):
    for path in root.glob("Session3/dialog/*/*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"Session3/dialog/transcriptions: no file such as Ses03F_impro01.txt"):
        loading.load("iemocap", root, "test")


def test_fingerprint(root):
    """Names in order, each with its labelled turns: 5, 2, 1, 1, 1 and 4."""
    text = (
        "Ses01F_impro99 5\nSes01M_impro01 2\nSes02M_impro08b 1\nSes03M_impro05a 1\nSes04F_script02_2 1\nSes05M_script01_1b 4"
    )
    everything = [d for split in ("test", "train", "dev") for d in loading.load("iemocap", root, split)]
    assert iemocap.fingerprint(everything) == hashlib.sha256(text.encode()).hexdigest()
    everything = [d for split in SPLITS for d in loading.load("iemocap", root, split, context="all", soft_labels=True)]
    assert iemocap.fingerprint(everything) == hashlib.sha256(text.encode()).hexdigest()


def test_survey(root):
    """Of seven turns MXX0 has no rating and M001 no class; F001 is promoted. A vote for Joy has no class and no meaning."""
    source = next(s for s in iemocap.sources(root) if s.name == "Ses01F_impro99")
    expected = dict.fromkeys(iemocap.SURVEY, 0)
    expected |= {"rated turns": 6, "promoted to happy": 1, "turns without a class": 2, "turns without a rating": 1}
    assert dict(iemocap.survey(source)) == expected
    name = "Ses02F_impro99"
    ratings = [
        block(f"{name}_F000", "xxx", (SAD, SAD, "Joy")),  # two of three agree: decided, whatever the file says
        block(f"{name}_F001", "xxx", (SAD, "Neutral", "Neutral state")),  # one class under two names
        block(f"{name}_F002", "xxx", (SAD, HAPPY, "")),
    ]
    add(root, name, [said(f"{name}_F000", "Well.")], ratings)
    found = iemocap.survey(next(s for s in iemocap.sources(root) if s.name == name))
    assert found["undecided with a majority"] == 2
    assert (found["votes of an unknown name"], found["rated but not spoken"], found["rated turns"]) == (1, 2, 3)
