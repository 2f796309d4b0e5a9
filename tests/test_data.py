"""Loaders, samples, personas, prompts, selection and new samples."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
from common.errors import UserError
from common.text import clean
from corpora import loading, sharing
from corpora.dialogue import LABELS, SPLITS, Dialogue, Turn, is_group
from data import DEFAULT, Failure, Output, Prompts, Responder, Sample
from training import coldstart
from training.records import sample_from_record, sample_record
from training.task import with_gold

REAL = Path(__file__).parents[1] / "../shared/data"
needs_csv = pytest.mark.skipif(not REAL.exists(), reason="the CSV files of MELD and EmoryNLP are not beside the repository")
MELD = LABELS["meld"]

MELD_HEAD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\r\n"
EMORY_HEAD = "Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode,Start_Time,End_Time\n"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def meld(folder, *rows, split="train", head=MELD_HEAD):
    lines = (f'1,"{text}",{who},{label},-,{d},{u},1,1,-,-\r\n' for d, u, who, text, label in rows)
    return write(folder / f"{split}_sent_emo.csv", head + "".join(lines)).parent


def jsonl(folder, *rows, split="train"):
    return write(folder / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)).parent


def row(id="d1", *turns, **more):
    keys = ("speaker", "text", "label")
    return {"id": id, "turns": [dict(zip(keys, t, strict=True)) for t in turns or [("Ann", "Hi.", "joy")]], **more}


def talk(*speakers, dataset="meld", split="train", personas=None, label="joy"):
    turns = tuple(Turn(name, f"Line {i}.", {label: 1.0}, str(i)) for i, name in enumerate(speakers))
    return Dialogue("7", dataset, split, turns, personas or {})


def sample(*speakers, **changes):
    made = data.samples([talk(*(speakers or ("Ann", "Bo")))], MELD)[-1]
    return replace(made, **{"responder": Responder("Ann", None, "prev"), **changes})


def output(mine=None, reply="Oh.", last=None):
    return Output("Because.", last or {"joy": 1.0}, mine or {"fear": 0.5}, reply, {})


# Loading


@needs_csv
@pytest.mark.parametrize(
    "dataset, split, dialogues, turns, labels",
    [  # the tables of declare-lab/MELD; the paper's section 4.1 has the same sizes
        ("meld", "train", 1038, 9989, (4710, 1205, 268, 683, 1743, 271, 1109)),
        ("meld", "dev", 114, 1109, (470, 150, 40, 111, 163, 22, 153)),
        ("meld", "test", 280, 2610, (1256, 281, 50, 208, 402, 68, 345)),
        ("emorynlp", "train", 659, 7551, (1677, 785, 638, 2485, 474, 551, 941)),
        ("emorynlp", "dev", 89, 954, (205, 97, 82, 322, 51, 70, 127)),
        ("emorynlp", "test", 79, 984, (217, 86, 111, 288, 70, 96, 116)),
    ],
)
def test_the_real_files(dataset, split, dialogues, turns, labels):
    read = loading.load(dataset, REAL / dataset, split)
    named = [label for d in read for turn in d.turns for label in turn.label]
    assert (len(read), len(named)) == (dialogues, turns)
    assert tuple(named.count(label) for label in LABELS[dataset]) == labels
    ids = [s.id for s in data.samples(read, LABELS[dataset])]
    assert len(ids) == len(set(ids)) == turns
    assert all(turn.text.isprintable() and turn.speaker for d in read for turn in d.turns)


@needs_csv
def test_a_dialogue_of_the_paper():
    """Table 8: MELD train 703, seven lines, Monica answers Joey; the ids of its lines have no gap."""
    dialogue = next(d for d in loading.load("meld", REAL / "meld", "train") if d.id == "703")
    asked = data.samples([dialogue], MELD)[6]
    assert asked.id == "meld/train/703/6"
    assert [turn.speaker for turn in asked.context] == ["Monica", "Angela", "Bob", "Monica", "Joey", "Monica", "Joey"]
    assert (asked.context[1].text, asked.gold, asked.responder.name) == ("Brooklyn Heights.", {"neutral": 1.0}, "Monica")


@needs_csv
def test_responder_kinds_of_the_real_files(monkeypatch):
    """Counted from the files by another script that let groups respond: 6942, 1593, 1231, 223."""
    dialogues = loading.load("meld", REAL / "meld", "train")

    def kinds():
        found = [s.responder.kind for s in data.samples(dialogues, MELD)]
        return [found.count(kind) for kind in ("next", "later", "prev", "none")]

    assert kinds() == [6904, 1616, 1245, 224]
    monkeypatch.setattr(data, "is_group", lambda name: False)
    assert kinds() == [6942, 1593, 1231, 223]


def test_meld_rows(tmp_path):
    rows = [(3, 5, "Bo", "It\u2019s  on,\u2028 us.", "Joy"), (3, 2, "Ann", "He\x92s ok", "fear"), (0, 0, "Cy", "Hi", "fear")]
    first, second = loading.load("meld", meld(tmp_path, *rows), "train")
    assert (first.key, second.key) == ("meld/train/3", "meld/train/0")
    assert [(t.id, t.speaker, t.text, t.label) for t in first.turns] == [
        ("2", "Ann", "He’s ok", {"fear": 1.0}),
        ("5", "Bo", "It’s on, us.", {"joy": 1.0}),
    ]
    assert [s.id for s in data.samples([first], MELD)] == ["meld/train/3/2", "meld/train/3/5"]


def test_ids_start_again_in_every_split(tmp_path):
    for split in SPLITS:
        meld(tmp_path, (0, 0, "Ann", "Hi.", "joy"), split=split)
    keys = {d.key for split in SPLITS for d in loading.load("meld", tmp_path, split)}
    assert keys == {"meld/train/0", "meld/dev/0", "meld/test/0"}


def test_emorynlp_rows(tmp_path):
    rows = ["Hi.,['Ann'],Joyful,2,7,1,3,-,-", "Ho!,\"['Ann', 'Bo']\",Mad,2,9,1,3,-,-", "Ah.,['#ALL#'],Sad,2,1,2,3,-,-"]
    write(tmp_path / "emorynlp_dev_final.csv", EMORY_HEAD + "\n".join(rows))
    first, second = loading.load("emorynlp", tmp_path, "dev")
    assert (first.id, second.id) == ("1_3_2", "2_3_2")
    assert [(t.id, t.speaker) for t in first.turns] == [("7", "Ann"), ("9", "Ann and Bo")]
    assert [t.label for t in first.turns] == [{"joyful": 1.0}, {"mad": 1.0}]
    assert is_group(second.turns[0].speaker)


def test_jsonl_rows(tmp_path):
    turns = [("Ann", "So\u2028 it is.", {"Joy": 0.65, "fear": 0.35}), ("Bo", "Hm.", None), ("Ann", "Yes.", "anger")]
    jsonl(tmp_path, row("d1", *turns, personas={"Bo": "a calm\nclerk"}), row("d2"))
    first, second = loading.load("mine", tmp_path, "train")
    assert [(t.text, t.label) for t in first.turns] == [
        ("So it is.", {"joy": 0.65, "fear": 0.35}),
        ("Hm.", None),
        ("Yes.", {"anger": 1.0}),
    ]
    assert loading.label_set("mine", tmp_path) == ("anger", "fear", "joy")
    made = data.samples([first, second], loading.label_set("mine", tmp_path))
    assert [s.id for s in made] == ["mine/train/d1/0", "mine/train/d1/2", "mine/train/d2/0"]
    assert made[0].gold == {"joy": 0.65, "fear": 0.35}
    assert made[0].responder == Responder("Bo", "a calm clerk", "next")
    assert [len(s.context) for s in made] == [1, 3, 1]  # unlabelled turns stay in the context


def test_labels_json_fixes_the_label_set_and_its_order(tmp_path):
    jsonl(tmp_path, row("d1", ("Ann", "Hi.", "joy")))
    write(tmp_path / "labels.json", '["Joy", "deep regret"]')
    assert loading.label_set("mine", tmp_path) == ("joy", "deep regret")
    write(tmp_path / "labels.json", '["fear"]')
    with pytest.raises(UserError, match=r"train.jsonl:1: unknown label 'joy', known are fear"):
        loading.load("mine", tmp_path, "train")


def test_a_bom_is_no_part_of_the_first_column(tmp_path):
    text = "\ufeffUtterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\nHi.,Ann,joy,0,0"
    write(tmp_path / "train_sent_emo.csv", text)
    assert loading.load("meld", tmp_path, "train")[0].turns[0].text == "Hi."


@pytest.mark.parametrize(
    "line, message",
    [
        ('1,"Hi.",Ann,happy,-,0,0,1,1,-,-', r":2: unknown label 'happy', known are neutral"),
        ('1,"Hi.",Ann,joy,-,zero,0,1,1,-,-', r":2: 'zero' where a number is needed"),
        ('1,"Hi.",Ann,joy,-,0', r":2: 6 fields where the header has 11"),
        ('1,Hi, you.,Ann,joy,-,0,0,1,1,-,-', r":2: 12 fields where the header has 11"),
        ('1,"Hi.",,joy,-,0,0,1,1,-,-', r":2: '' where a text is needed"),
        ('1,"\u2028",Ann,joy,-,0,0,1,1,-,-', r":2: '\\u2028' where a text is needed"),
        ('1,"Hi.,Ann,joy,-,0,0,1,1,-,-', r":2: unexpected end of data"),
        ('1,"Hi.",Ann,joy,-,0,0,1,1,-,-\n1,"Ho.",Ann,joy,-,0,0,1,1,-,-', r":3: \('0', 0\) a second time"),
        (b'1,"Hi\x92",Ann,joy,-,0,0,1,1,-,-', r":2: not UTF-8; save"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    write(tmp_path / "dev_sent_emo.csv", MELD_HEAD.encode() + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(UserError, match=message) as error:
        loading.load("meld", tmp_path, "dev")
    assert "\n" not in str(error.value) and "dev_sent_emo.csv" in str(error.value)


@pytest.mark.parametrize("cell", ["Ann", "[]", "['Ann'", "[1]", "{'Ann'}", "['Ann'].pop()", "[" * 300, "['']"])
def test_a_speaker_cell_is_a_list_of_names(tmp_path, cell):
    write(tmp_path / "emorynlp_dev_final.csv", EMORY_HEAD + f'Hi.,"{cell}",Mad,1,1,1,1,-,-\n')
    with pytest.raises(UserError, match=r"emorynlp_dev_final.csv:2: .*; expected"):
        loading.load("emorynlp", tmp_path, "dev")


def test_a_missing_column_and_a_missing_file_are_named(tmp_path):
    meld(tmp_path, (0, 0, "Ann", "Hi.", "joy"), head=MELD_HEAD.replace("Speaker", "Name"))
    with pytest.raises(UserError, match="'Speaker' is missing"):
        loading.load("meld", tmp_path, "train")
    with pytest.raises(UserError, match="test_sent_emo.csv: No such file or directory; check NAME=DIR"):
        loading.load("meld", tmp_path, "test")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r":2: .*; expected \{\"id\""),
        ("[" * 100_000, ":2: .*recursion"),
        ("[]", ":2: "),
        ('{"id": "d2"}', ":2: 'turns' is missing"),
        ('{"id": 5, "turns": []}', ":2: "),
        ('{"id": "a/b", "turns": []}', ":2: the id 'a/b' has"),
        ('{"id": "\\ud800", "turns": []}', r":2: the id '\\ud800' has"),
        ('{"id": "a+1", "turns": []}', r":2: the id 'a\+1' has"),
        (json.dumps(row("d1")), ":2: 'd1' a second time"),
        ('{"id": "d2", "turns": [{"speaker": "Ann"}]}', ":2: 'text' is missing"),
        ('{"id": "d2", "turns": [{"speaker": "Ann", "text": 5}]}', ":2: 5 where a text is needed"),
        ('{"id": "d2", "turns": [{"speaker": "Ann", "text": "Hi", "label": {"joy": 0}}]}', ":2: weight 0.0 of 'joy'"),
        ('{"id": "d2", "turns": [{"speaker": "Ann", "text": "Hi", "label": {"joy": NaN}}]}', ":2: weight nan of 'joy'"),
        ('{"id": "d2", "turns": [{"speaker": "A", "text": "Hi", "label": {"a": 1, "A": 1}}]}', ":2: no label, or one twice"),
        ('{"id": "d2", "turns": [{"speaker": "Ann", "text": "Hi", "label": {}}]}', ":2: no label"),
        ('{"id": "d2", "turns": [{"speaker": "Ann", "text": "Hi", "label": "</think>"}]}', ":2: unknown label"),
        ('{"id": "d2", "turns": [[]]}', ":2: list indices must be"),
        ('{"id": "d2", "turns": [{"speaker": "A", "text": "Hi", "label": 5}]}', ":2: 'int' object has no"),
        ('{"id": "d2", "turns": [], "personas": {"Ann": null}}', ":2: None where a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    write(tmp_path / "train.jsonl", json.dumps(row("d1")) + "\n" + line)
    with pytest.raises(UserError, match=message) as error:
        loading.load("mine", tmp_path, "train")
    assert "\n" not in str(error.value)


def test_other_mistakes_of_the_caller(tmp_path):
    with pytest.raises(UserError, match="splits are train, dev, test"):
        loading.load("meld", tmp_path, "valid")
    with pytest.raises(UserError, match="names have letters"):
        loading.load("a/b", tmp_path, "train")
    with pytest.raises(UserError, match="Ask for IEMOCAP"):
        loading.load("iemocap", tmp_path, "train")
    with pytest.raises(UserError, match="--soft_labels: the meld files hold no votes"):
        loading.load("meld", tmp_path, "train", soft_labels=True)
    assert loading.load("mine", jsonl(tmp_path, row()), "train", soft_labels=True)[0].key == "mine/train/d1"


# Samples


GROUPS = "All,#ALL#,Both,Everyone,The Guys,Ross and Rachel,Joey & Ross,Her-Friends"
SINGLE = "Allan,Sandy,Mr. Heckles,Guy #1,Joey/Drake,Anderson,Fireman No. 1,and Bo"


@pytest.mark.parametrize("name", GROUPS.split(","))
def test_groups(name):
    assert is_group(name)


@pytest.mark.parametrize("name", SINGLE.split(","))
def test_no_groups(name):
    assert not is_group(name)


@pytest.mark.parametrize(
    "speakers, turn, name, kind",
    [
        ("Ann Bo", 0, "Bo", "next"),
        ("Ann Ann Bo", 0, "Bo", "later"),
        ("Cy Ann Ann Bo", 1, "Bo", "later"),
        ("Cy Bo Ann", 2, "Bo", "prev"),
        ("Cy Bo Ann Ann", 2, "Bo", "prev"),
        ("Ann Ann", 0, None, "none"),
        ("Ann All Bo", 0, "Bo", "later"),
        ("Bo All Ann", 2, "Bo", "prev"),
        ("All Ann All", 1, None, "none"),
        ("Ann All", 1, "Ann", "prev"),
        ("All Ann", 0, "Ann", "next"),
    ],
)
def test_responder(speakers, turn, name, kind):
    made = data.samples([talk(*speakers.split())], MELD)[turn]
    assert (made.responder.name, made.responder.kind) == (name, kind)
    assert made.following == (made_next(speakers, turn) if kind == "next" else None)
    assert [t.speaker for t in made.context] == speakers.split()[: turn + 1]


def made_next(speakers, turn):
    return talk(*speakers.split()).turns[turn + 1]


def test_personas_see_the_whole_dialogue_so_dev_and_test_go_without():
    """D28, with a file that describes Bo for a train and a test dialogue, and once from a context only."""
    filed = {key: {"Bo": (said,)} for key, said in (("meld/train/7", "a"), ("meld/test/7", "b"), ("meld/test/7/0", "c"))}

    def persona(split, **options):
        return data.samples([talk("Ann", "Bo", split=split)], MELD, personas=filed, **options)[0].responder.persona

    assert [persona("train", persona_scope=scope) for scope in ("none", "context", "dialogue")] == ["a", "a", "a"]
    assert [persona("test", persona_scope=scope) for scope in ("none", "context", "dialogue")] == [None, "c", "b"]
    assert persona("test") is None


def test_a_character_sheet_serves_every_split_and_comes_first():
    dialogue = talk("Ann", "Bo", split="test", personas={"Bo": "a clerk"})
    filed = {"meld/test/7": {"Bo": ("b",), "Ann": ("d",)}}
    made = data.samples([dialogue], MELD, personas=filed, persona_scope="dialogue")
    assert made[0].personas == {"Bo": "a clerk", "Ann": "d"}
    assert data.samples([dialogue], MELD)[0].responder.persona == "a clerk"


def test_a_sample_draws_one_expert_for_all_speakers(tmp_path):
    """The last bit of the first 8 bytes of sha256(id), ids meld/train/7/0 to 15: 1000 1011 0101 1010; experts in the order
    of their names, whatever the file's order."""
    rows = [
        {"dialogue": "meld/train/7", "speaker": who, "persona": f"{who} by {expert}", "expert": expert}
        for expert in ("two", "one")
        for who in ("Ann", "Bo")
    ]
    filed = loading.read_personas(write(tmp_path / "p.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))
    assert filed == {"meld/train/7": {"Ann": ("Ann by one", "Ann by two"), "Bo": ("Bo by one", "Bo by two")}}
    made = data.samples([talk(*["Ann", "Bo"] * 8)], MELD, personas=filed)
    drawn = [{text.split()[-1] for text in s.personas.values()} for s in made]
    assert all(len(experts) == 1 for experts in drawn)
    assert "".join("".join(experts)[0] for experts in drawn) == "tooototoototooto"


def test_gold_from_a_file(tmp_path):
    path = write(tmp_path / "gold.jsonl", '{"id": "meld/train/7/1", "weights": {"Neutral": 0.85, "fear": 0.25}}\n\n')
    first, second = with_gold(data.samples([talk("Ann", "Bo")], MELD), loading.read_gold(path))
    assert (first.gold, second.gold) == ({"joy": 1.0}, {"neutral": 0.85, "fear": 0.25})


@pytest.mark.parametrize(
    "gold, message",
    [
        ({"meld/train/7/9": {"joy": 1.0}}, "meld/train/7/9: no such sample"),
        ({"meld/train/7/1": {"happy": 1.0}}, "meld/train/7/1: happy: labels are neutral, surprise"),
    ],
)
def test_gold_must_belong_to_a_sample(gold, message):
    with pytest.raises(UserError, match=message):
        with_gold(data.samples([talk("Ann", "Bo")], MELD), gold)


def test_gold_twice_for_a_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gold.jsonl:2: 'a' a second time"):
        loading.read_gold(write(tmp_path / "gold.jsonl", '{"id": "a", "weights": {"joy": 1}}\n' * 2))


LONG = ("We were on a break, you know!", "How many cups of tea is that?", "The lobster is waiting for you downstairs.")


def lines(id, *texts, split="train"):
    return Dialogue(id, "meld", split, tuple(Turn("Ann", text) for text in texts))


def test_overlap_takes_two_long_lines_of_one_dialogue():
    """D24: short lines do not count, nor one line said twice, nor two lines of two different test dialogues."""
    test = [lines("t1", LONG[0], LONG[1], "Oh no."), lines("t2", LONG[2])]
    train = [
        lines("both", "WE WERE on a break -- you know", "x", LONG[1].upper()),
        lines("one", LONG[0], "Oh no."),
        lines("twice", LONG[0], LONG[0]),
        lines("apart", LONG[0], LONG[2]),
        lines("short", "Oh no.", "Oh no.", "We were on a break"),
    ]
    assert sharing.overlap(train, test) == {"meld/train/both"}
    assert [d.id for d in train if d.key not in sharing.overlap(train, test)] == ["one", "twice", "apart", "short"]
    assert sharing.overlap(test, train) == {"meld/train/t1"}  # the test dialogues that are not clean


SPELT = ["खुशी", "மகிழ்ச்சி", "ความสุข", "སྐྱོ་བ", "خوش\u200cحال", "שִׂמְחָה", "l'ennui", "tủi thân", "iğrenme"]


@pytest.mark.parametrize("label", SPELT)
def test_a_label_is_read_in_every_script_and_however_it_is_typed(tmp_path, label):
    """In the file of train with its accents apart (NFD), in that of test joined (NFC), in an answer apart again."""
    apart, joined = (unicodedata.normalize(form, label) for form in ("NFD", "NFC"))
    for split, name in (("train", apart), ("test", joined)):
        turns = [{"speaker": "x", "text": "y", "label": name}]
        write(tmp_path / f"{split}.jsonl", json.dumps({"id": "d", "turns": turns}))
    assert loading.label_set("mine", tmp_path) == (joined,)
    (found,) = data.read_samples("mine", tmp_path, "test")
    assert found.gold == {joined: 1.0}
    said = data.parse_output(data.format_output("t", {apart: 1.0}, {apart.upper(): 0.5}, "r"), found.labels)
    assert said.last_emotions == {joined: 1.0} and said.my_emotions == {joined: 0.5}


@pytest.mark.parametrize("label", ["joy, anger", "joy;", "'joy'", "\u0301joy", "joy/anger", "{labels}", "joy\u200b", "-"])
def test_what_is_no_label(tmp_path, label):
    write(tmp_path / "train.jsonl", json.dumps({"id": "d", "turns": [{"speaker": "x", "text": "y", "label": label}]}))
    with pytest.raises(UserError, match="train.jsonl:1: unknown label"):
        loading.label_set("mine", tmp_path)


def test_names_of_datasets_and_dialogues_have_marks_and_personas_find_them(tmp_path):
    """The same id with accents apart in one file and joined in the other, and so the speaker."""
    apart = unicodedata.normalize("NFD", "cảnh-दृश्य")
    turns = [{"speaker": unicodedata.normalize("NFD", n), "text": "y", "label": "joy"} for n in ("Thảo", "Bo")]
    write(tmp_path / "train.jsonl", json.dumps({"id": apart, "turns": turns}))
    person = {"dialogue": "हिन्दी/train/cảnh-दृश्य", "speaker": "Thảo", "persona": "calm", "expert": "e"}
    personas = loading.read_personas(write(tmp_path / "p.jsonl", json.dumps(person)))
    first, second = data.read_samples("हिन्दी", tmp_path, "train", personas=personas)
    assert (second.responder.name, second.responder.persona) == ("Thảo", "calm")
    gold = write(tmp_path / "g.jsonl", json.dumps({"id": f"हिन्दी/train/{apart}/0", "weights": {"joy": 0.5}}))
    assert with_gold([first, second], loading.read_gold(gold))[0].gold == {"joy": 0.5}


ZH = ("你昨天为什么没有来？", "我的手机没有电了，对不起。", "好吧。")


def test_overlap_counts_every_letter_of_a_script_without_blanks():
    """D24: lines of 9 and 11 letters are long ones, one of 2 is not; commas and blanks between do not matter."""
    test = [lines("t", *ZH)]
    train = [lines("both", "你昨天为什么 没有来!", ZH[1].replace("，", "")), lines("one", ZH[0], ZH[2], ZH[2] * 2)]
    assert sharing.overlap(train, test) == {"meld/train/both"}
    assert sharing.long_line(ZH[0]) == "你 昨 天 为 什 么 没 有 来" and sharing.long_line(ZH[2]) is None


def test_overlap_finds_a_line_that_is_typed_in_another_way():
    """Accents joined or apart, letters of double width. The texts of a `Turn` are joined already; bare lines are tried."""
    line = "Hôm nay trời đẹp quá bạn ơi!"
    assert sharing.long_line(unicodedata.normalize("NFD", line)) == sharing.long_line(line) is not None
    assert sharing.long_line("Ｗｅ were on a break, you know!") == sharing.long_line(LONG[0])


def test_with_votes():
    """D14: votes where a release has them; the CSV files never do, and alone they are refused."""
    assert loading.with_votes(["meld", "iemocap", "mine"], True) == {"meld": False, "iemocap": True, "mine": True}
    assert loading.with_votes(["meld", "iemocap"], False) == {"meld": False, "iemocap": False}
    with pytest.raises(UserError, match="--soft_labels: the meld, emorynlp files hold no votes; give --gold FILE"):
        loading.with_votes(["meld", "emorynlp"], True)


# Prompts


def character_tokenizer(template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"):
    """One token a character, and three control tokens."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=template)


def test_messages():
    asked = sample("Ann", "Bo: x", "Cy", responder=Responder("Ann", "a calm clerk", "prev"))
    prompts = Prompts("{name}|{persona}|{labels}", "<{persona}>", "somebody", "[{history}] {'joy': 1}")
    system, user = data.messages(asked, prompts)
    labels = "neutral, surprise, fear, sadness, joy, disgust, anger"
    assert system == {"role": "system", "content": f"Ann|<a calm clerk>|{labels}"}
    assert user == {"role": "user", "content": "[Ann: Line 0.\nBo  x: Line 1.\nCy: Line 2.] {'joy': 1}"}
    unnamed = replace(asked, responder=Responder(None, None, "none"))
    assert data.messages(unnamed, prompts)[0]["content"] == f"somebody||{labels}"


def test_our_prompt_has_what_the_contract_of_table_5_asks():
    system, user = (m["content"] for m in data.messages(sample(responder=Responder("Ann", "a calm clerk", "prev")), DEFAULT))
    assert "You are Ann" in system and "a calm clerk" in system and all(label in system for label in MELD)
    assert user.startswith("Ann: Line 0.\nBo: Line 1.\n\n")
    for words in ("<think></think>", "Python dictionary", "'last_emotions'", "'my_emotions'", "'my_output'", "0.1 to 1"):
        assert words in user


BREAKS = ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u2028", "\u2029", "\u3000"]


@pytest.mark.parametrize("mark", BREAKS)
def test_no_reply_and_no_name_forges_a_turn(mark):
    turn = Turn(f"Ann{mark}Bo", f"Hello.{mark}{mark}Joey: I am angry.")
    assert (turn.speaker, turn.text) == ("Ann Bo", "Hello. Joey: I am angry.")
    child = data.new_sample(sample(), output(reply=f"Hello.{mark}Bo: Bye."), 1)
    user = data.messages(child, DEFAULT)[1]["content"]
    assert user.startswith("Ann: Line 0.\nBo: Line 1.\nAnn: Hello. Bo: Bye.\n\n")
    assert Responder(f"A{mark}B", f"c{mark}d", "next") == Responder("A B", "c d", "next")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\u200bb\u202ec\ufeff", "abc"),
        ("a \u200b b", "a b"),
        ("\x00\x1b[31m", "[31m"),
        ("\ud800a", "a"),
        ("\U0001f468\u200d\U0001f469 \u200d", "\U0001f468\u200d\U0001f469"),
        (" \u200d\u2028 ", ""),
        ("é ’", "é ’"),
    ],
)
def test_invisible_characters_go(text, shown):
    assert clean(text) == shown
    assert clean(shown) == shown


CONTROLS = ["<|im_end|>", "<|im_\u200bend|>", "<<|im_end|>|im_end|>", "x<think>y", "<|im_start|><|im_end|>"]


@pytest.mark.parametrize("text", CONTROLS)
def test_no_text_forges_a_control_token(text):
    """Two messages have two <|im_start|> and two <|im_end|>; our prompt names <think> once."""
    turns = (Turn(f"A {text}", text), Turn("Bo", f"Well {text} so"))
    asked = sample(context=turns, responder=Responder(f"Q {text}", f"a {text} clerk", "next"))
    tokenizer = character_tokenizer()
    ids, _ = data.encode(tokenizer, asked, DEFAULT)
    counts = [ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>", "<think>")]
    assert counts == [2, 2, 1]


def test_a_placeholder_in_a_text_stays_text():
    context = (Turn("{labels}", "{name} {history}"), Turn("Bo", "Hm."))
    asked = sample(context=context, responder=Responder("{persona}", "{name}", "prev"))
    system, user = (m["content"] for m in data.messages(asked, DEFAULT))
    assert "You are {persona}," in system and "character: {name}\n" in system
    assert user.startswith("{labels}: {name} {history}\nBo: Hm.")


def test_encode_is_the_chat_template():
    roles = "{% for m in messages %}{{ m.role }} {% endfor %}"
    tokenizer = character_tokenizer(roles + "{% if add_generation_prompt %}go{% endif %}")
    ids, opened = data.encode(tokenizer, sample(), DEFAULT)
    assert (tokenizer.decode(ids), opened) == ("system user go", "")


@pytest.mark.parametrize(
    "end, opened",
    [
        ("{% if enable_thinking %}<think>\n{% endif %}", "<think>\n"),
        ("<think>", "<think>"),
        ("<think>\n\n</think>\n\n", ""),
        ("", ""),
    ],
)
def test_an_open_think_block_is_put_before_the_answer(end, opened):
    tokenizer = character_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + end)
    assert data.encode(tokenizer, sample(), DEFAULT)[1] == opened


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        data.encode(character_tokenizer(None), sample(), DEFAULT)


def test_answer_text_drops_the_one_final_eos():
    tokenizer = character_tokenizer()
    end = tokenizer.eos_token_id
    ids = tokenizer.encode("<think>so it 's .", add_special_tokens=False)
    assert data.answer_text(tokenizer, [*ids, end], {end, 5}, "") == "<think>so it 's ."
    assert data.answer_text(tokenizer, [*ids, end, end], {end}, "") == "<think>so it 's .<|im_end|>"
    assert data.answer_text(tokenizer, [end, *ids], {end}, "<think>\n") == "<think>\n<|im_end|><think>so it 's ."
    assert data.answer_text(tokenizer, [], {end}, "") == ""


def test_prompts_from_a_file(tmp_path):
    path = write(tmp_path / "p.json", '{"user": "{history}\\nGo.", "listener": "nobody"}')
    prompts = data.read_prompts(path)
    assert (prompts.user, prompts.listener, prompts.system) == ("{history}\nGo.", "nobody", DEFAULT.system)


BAD_PROMPTS = ["[]", '{"user": "Go."}', '{"users": "{history}"}', '{"user": 5}', '{"listener": "{name}"}', "{"]


@pytest.mark.parametrize("text", BAD_PROMPTS)
def test_bad_prompts_are_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"p\.json: "):
        data.read_prompts(write(tmp_path / "p.json", text))


# Selection and new samples


def test_best_is_the_first_of_highest_reward():
    parses = [Failure("think", ""), output(), output(), output()]
    assert data.best(parses, [0, 0.5, 0.9, 0.9]) == 2
    assert data.best(parses[:1], [0]) is None


@pytest.mark.parametrize(
    "parses, rewards, fits, index, why",
    [
        ([output(), output()], [0.6, 0.59], True, 0, "kept"),
        ([output(), output()], [0.1, 0.59], True, None, "reward"),
        ([Failure("keys", "")] * 2, [0.0, 0.0], True, None, "rule"),
        ([output({"curiosity": 1.0}), output()], [1.1, 1.0], True, None, "label"),
        ([output(), output()], [0.9, 1.1], False, None, "length"),
        ([Failure("keys", ""), output()], [0.0, 1.1], True, 1, "kept"),
    ],
)
def test_select(parses, rewards, fits, index, why):
    chosen = data.select(sample(), parses, rewards, 2, keep_reward=0.6, fits=lambda child: fits)
    assert (chosen.index, chosen.why, chosen.child is not None) == (index, why, index is not None)


def test_select_without_a_named_responder():
    lone = sample("Ann", "Ann", responder=Responder(None, None, "none"))
    assert data.select(lone, [output()], [1.1], 1, keep_reward=0.6, fits=bool) == data.Selection(None, "responder", None)


def test_new_sample():
    """Eq. 7: C_new = C and r, Label_new = Label_s; Bo, just recognised, answers next with its own persona (D10)."""
    parent = sample(personas={"Ann": "a", "Bo": "b"}, responder=Responder("Ann", "a", "next"), following=Turn("Ann", "No."))
    child = data.new_sample(parent, output({"fear": 0.5, "joy": 0.25}, "Made\nup."), 3)
    assert child == Sample(
        id="meld/train/7/1+3",
        dataset="meld",
        context=(*parent.context, Turn("Ann", "Made up.", {"fear": 0.5, "joy": 0.25})),
        responder=Responder("Bo", "b", "swap"),
        labels=MELD,
        gold={"fear": 0.5, "joy": 0.25},
        personas={"Ann": "a", "Bo": "b"},
        following=None,
        origin="synthetic",
        parent="meld/train/7/1",
        iteration=3,
        depth=1,
    )
    grandchild = data.new_sample(child, output(), 4)
    assert (grandchild.id, grandchild.root, grandchild.depth) == ("meld/train/7/1+3+4", "meld/train/7/1", 2)
    assert (grandchild.context[-1].speaker, grandchild.responder) == ("Bo", Responder("Ann", "a", "swap"))
    assert parent.context == sample().context


@pytest.mark.parametrize(
    "mine, gold",
    [  # D9: what is outside the label set goes, and the sample too unless half of the weight stays
        ({"joy": 0.6, "curiosity": 0.5}, {"joy": 0.6}),
        ({"joy": 0.5, "curiosity": 0.5}, {"joy": 0.5}),
        ({"joy": 0.4, "curiosity": 0.5}, None),
        ({"joy": 0.3, "fear": 0.3, "awe": 0.5}, {"joy": 0.3, "fear": 0.3}),
        ({"curiosity": 1.0}, None),
    ],
)
def test_feelings_outside_the_label_set(mine, gold):
    child = data.new_sample(sample(), output(mine), 1)
    assert child == "label" if gold is None else child.gold == gold


@pytest.mark.parametrize(
    "speakers, name, swapped",
    [
        ("Ann Bo", "Ann", "Bo"),
        ("Cy Bo All", "Bo", "Cy"),  # a group was recognised: somebody else who can answer
        ("Cy Bo All", "Dee", "Bo"),
        ("All Both", "Ann", None),
        ("Ann All", "Ann", None),
    ],
)
def test_roles_swap(speakers, name, swapped):
    child = data.new_sample(sample(*speakers.split(), responder=Responder(name, None, "next")), output(), 1)
    assert (child if swapped is None else child.responder.name) == (swapped or "responder")


def targets(**changes):
    """The target of 20 samples that differ in their id: gold joy (the file said sadness) after fear and joy, then anger."""
    context = (Turn("Bo", "So.", {"fear": 1.0}), Turn("Ann", "Oh.", {"joy": 1.0}), Turn("Bo", "Hm.", {"sadness": 1.0}))
    made = sample(context=context, gold={"joy": 1.0}, following=Turn("Ann", "It's\u2028no.", {"anger": 1.0}))
    parses = [data.parse_output(coldstart.dataset_target(replace(made, id=f"x/{i}", **changes)), MELD) for i in range(20)]
    assert all(isinstance(parse, Output) for parse in parses)
    return parses


def test_dataset_target():
    """D17: gold, the real next turn and its label; half of the samples get .3 from the nearest earlier turn that differs."""
    seen = [parse.last_emotions for parse in targets()]
    assert {json.dumps(weights) for weights in seen} == {'{"joy": 1.0}', '{"joy": 0.8, "fear": 0.3}'}
    assert 5 <= seen.count({"joy": 1.0}) <= 15
    assert {(parse.my_output, *parse.my_emotions.items()) for parse in targets()} == {("It's no.", ("anger", 1.0))}


@pytest.mark.parametrize(
    ("reply", "written"),
    [("No.", '"No."'), ("I don't.", '"I don\'t."'), ('He said "no".', '"He said \\"no\\"."'), ("C:\\", '"C:\\\\"')],
)
def test_the_reply_of_a_dataset_target_stands_in_double_quotes_whatever_is_in_it(reply, written):
    """The quote comes first. Where single ones are usual, SmolLM2-135M goes on with an apostrophe: 'I don't know.'"""
    text = coldstart.dataset_target(sample(following=Turn("Ann", reply, {"anger": 1.0})))
    assert text.endswith(f"'my_emotions': {{'anger': 1.0}}, 'my_output': {written}}}")
    assert data.parse_output(text, MELD).my_output == reply


def test_dataset_target_of_soft_gold():
    """Votes 6, 3, 2, 1, 1: the heaviest three over 6, so that 1 is the largest weight; small weights rise to 0.1."""
    votes = {"neutral": 1, "fear": 3.0, "joy": 6.0, "anger": 2.0, "sadness": 1.0}
    assert {json.dumps(p.last_emotions) for p in targets(gold=votes)} == {'{"joy": 1.0, "fear": 0.5, "anger": 0.33}'}
    soft = {"joy": 0.65, "fear": 0.35}
    assert {json.dumps(p.last_emotions) for p in targets(gold=soft)} == {'{"joy": 0.65, "fear": 0.35}'}
    assert {json.dumps(p.last_emotions) for p in targets(gold={"joy": 0.96, "fear": 0.04})} == {'{"joy": 0.96, "fear": 0.1}'}


def test_no_dataset_target_without_a_labelled_next_turn():
    assert coldstart.dataset_target(sample()) is None
    assert coldstart.dataset_target(sample(following=Turn("Ann", "No.", None))) is None


def test_records():
    parent = sample(personas={"Bo": "b"}, following=Turn("Ann", "Real.", {"joy": 1.0}))
    for made in (parent, data.new_sample(parent, output(), 3)):
        assert sample_from_record(json.loads(json.dumps(sample_record(made)))) == made
