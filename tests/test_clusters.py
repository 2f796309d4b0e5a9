"""Persona clusters: invented families are found, names do not count, what belongs nowhere is noise; what each earns."""

import json
import sys

import numpy as np
import pytest
import tiny
from conftest import lines, status_of

import evaluate
from analysis import clusters
from analysis.clusters import NOISE, Cluster, Description, earned, from_run, in_words, mask, masked, name_of, rows, run_ious
from analysis.vectors import encoder_vectors, flat, mean_pooled, tfidf_vectors, unit
from common.errors import UserError

pytest.importorskip("sklearn", reason="scikit-learn is not installed: requirements-extra.txt")

FAMILIES = (
    ("a calm patient clerk", "a patient calm voice", "calm and patient in a quarrel", "patient, calm, a quiet clerk"),
    ("a joker full of jokes", "jokes and laughs, a joker", "a joker who laughs at jokes", "jokes: a joker, he laughs"),
    ("worried, expects disaster", "expects disaster, a worried soul", "worried disaster thinker", "a worried disaster"),
)
OUTLIER = "collects antique accordions"
TEXTS = [text for texts in FAMILIES for text in texts] + [OUTLIER]
DESCRIBED = [Description(f"w/train/d{i}", "Ann", text) for i, text in enumerate(TEXTS)]


def found_in(texts, least=3):
    return clusters.clusters(texts, tfidf_vectors(texts, 0), least)


# Groups


def test_three_families_are_three_clusters_and_the_outlier_is_noise():
    found = found_in(TEXTS)
    assert [x.number for x in found] == [0, 1, 2, NOISE]
    assert {x.members for x in found} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12,)}
    assert found[-1] == Cluster(NOISE, "noise", (12,))
    names = {x.members[0]: set(x.name.split()) for x in found[:-1]}
    assert names[0] >= {"calm", "patient"} and names[4] >= {"joker", "jokes"} and names[8] >= {"worried", "disaster"}


def test_the_largest_cluster_comes_first():
    """Without the outlier, which is equally far from every family: with it, rounding would decide who gets it."""
    assert [len(x.members) for x in found_in([*TEXTS[:-1], "a calm patient man", "patient and calm"])] == [6, 4, 4]


def test_too_few_are_all_noise():
    assert found_in(["a calm clerk", "a loud joker"]) == [Cluster(NOISE, "noise", (0, 1))]


def test_a_name_is_made_of_words_that_others_lack():
    """Of 4 texts, members 0, 1: calm 2/2 log(4/2) = .69, shy and old 1/2 log 4 = .69 each, clerk in all: log 1 = 0."""
    said = [{"calm", "clerk", "shy"}, {"calm", "clerk", "old"}, {"loud", "clerk"}, {"loud", "clerk"}]
    assert name_of([0, 1], said) == "calm old shy"
    assert name_of([2, 3], said) == "loud"
    assert name_of([0], [{"clerk"}, {"clerk"}]) == "unnamed"


# Names


def test_names_are_masked_whole_and_in_part_but_not_inside_words():
    assert mask("Ann and Anna Bell; Ann's manner", {"Ann", "Anna Bell", "Anna"}) == "someone and someone; someone's manner"
    assert mask("A will of his own, says Will.", {"Will"}) == "A will of his own, says someone."
    assert mask("Annual joy, says JoAnn to Ann", {"Ann"}) == "Annual joy, says JoAnn to someone"
    assert mask("nobody is named", set()) == "nobody is named"


@pytest.mark.parametrize(
    ("text", "name", "shown"),
    [
        ("小明是一个温和的人", "小明", "someone是一个温和的人"),  # no blank shows where a name ends
        ("राम शांत है, रामू नहीं", "राम", "someone शांत है, रामू नहीं"),  # a vowel sign makes it another name
        ("สมชายใจเย็น", "สมชาย", "someoneใจเย็น"),
    ],
)
def test_names_are_masked_in_every_script(text, name, shown):
    assert mask(text, {name}) == shown


def test_parts_of_names_are_masked_where_there_are_no_capitals():
    rows = (("सीता देवी", "सीता शांत है"), ("the waiter", "nods at the door"))
    assert masked([Description("d", *row) for row in rows]) == ["someone शांत है", "nods at the door"]


def test_families_are_found_in_a_script_without_blanks():
    families = (("温和耐心的店员", "耐心温和的声音", "争吵中温和耐心", "耐心，温和，安静"),
                ("爱开玩笑逗乐", "开玩笑又大笑", "逗乐爱笑开玩笑", "开玩笑，逗乐，大笑"),
                ("担忧灾难发生", "总想灾难又担忧", "担忧的灾难论者", "灾难，担忧，害怕"))  # fmt: skip
    found = found_in([text for texts in families for text in texts])
    assert {x.members for x in found} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}
    assert {"温", "耐"} & set(found[0].name.split())


def test_every_dialogue_masks_its_own_speakers():
    rows = (("d1", "Dr. Bell", "Bell teases Ann"), ("d1", "Ann", "shy"), ("d2", "Bo", "Ann-like"))
    assert masked([Description(*row) for row in rows]) == ["someone teases someone", "shy", "Ann-like"]


def test_two_families_of_one_speaker_are_apart_and_one_family_of_many_speakers_is_not():
    """A name in every text of a family must not make the cluster: each family has one sentence and four names."""
    names = ("Zelda", "Yorick", "Xaver", "Wanda")
    one = [Description(f"d{i}", n, f"{n} is a calm patient clerk") for i, n in enumerate(names)]
    two = [Description(f"d{i}", n, f"{n} is a worried disaster") for i, n in enumerate(names)]
    found = found_in(masked([*one, *two]))
    assert {x.members for x in found} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert not {"zelda", "yorick", "xaver", "wanda", "someone"} & {word for x in found for word in x.name.split()}


# What they earn


def record(persona, *ious, sample_id="w/train/d1/0+2", name="Ann", step=0):
    """Gold is joy: an answer {joy 1} earns 1, {joy .5, anger .5} .5/1.5, a failed one 0."""
    parses = {1.0: {"joy": 1.0}, 0.5: {"joy": 0.5, "anger": 0.5}}
    answers = [{"parse": {"reason": None, "last_emotions": parses[x]} if x else {"reason": "think"}} for x in ious]
    return {"sample_id": sample_id, "step": step, "gold": {"joy": 1.0}, "answers": answers,
            "responder": {"name": name, "persona": persona, "kind": "next"}}  # fmt: skip


def test_mean_iou_of_a_cluster_by_hand():
    """calm: 1, 1/3 and a failure: 4/9 of 3 answers. worried: 1. A persona of no cluster, and none at all, do not count."""
    described = [Description("d", "a", "calm"), Description("d", "b", "worried"), Description("d", "c", "quiet")]
    found = [Cluster(0, "calm quiet", (0, 2)), Cluster(NOISE, "noise", (1,))]
    others = [record("worried", 1.0), record("odd", 1.0), record(None, 1.0)]
    ious = run_ious([record("calm", 1.0, 0.5), record("quiet", 0.0), *others])
    assert earned(found, described, ious) == {0: (pytest.approx(4 / 9), 3), NOISE: (1.0, 1)}
    listed = rows(found, {"run": earned(found, described, ious), "empty": {}})
    assert listed[0] == {"cluster": 0, "name": "calm quiet", "size": 2, "iou": {"run": pytest.approx(4 / 9), "empty": None},
                         "answers": {"run": 3, "empty": 0}}  # fmt: skip
    assert clusters.table(listed).splitlines()[1].split() == ["0", "2", "calm", "quiet", "44.44", "%", "(3)", "-"]


def test_a_run_describes_each_speaker_of_a_dialogue_once():
    seen = [record("calm", 1.0), record("calm", 0.5, sample_id="w/train/d1/3"), record("loud", 1.0, name="Bo")]
    seen += [record(None, 1.0), record("calm", 1.0, sample_id="w/train/d2/0")]
    assert from_run(seen) == [Description("w/train/d1", "Ann", "calm"), Description("w/train/d1", "Bo", "loud"),
                              Description("w/train/d2", "Ann", "calm")]  # fmt: skip


# Vectors and map


def test_the_mean_leaves_padding_out():
    """Rows (1, 0), (3, 0), padding (9, 9): mean (2, 0). Of length 1: (1, 0)."""
    hidden = np.array([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    assert mean_pooled(hidden, np.array([[1, 1, 0]])).tolist() == [[2.0, 0.0]]
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_an_encoder_gives_a_text_the_same_vector_in_any_company(tmp_path):
    tiny.tiny().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(str(tmp_path))
    alone = encoder_vectors(["w1 w2"], str(tmp_path))
    both = encoder_vectors(["w1 w2", "w3 w4 w5 w6 w7"], str(tmp_path), batch=2)
    assert np.allclose(alone[0], both[0], atol=1e-5) and not np.allclose(both[0], both[1], atol=1e-2)
    assert np.linalg.norm(both, axis=1) == pytest.approx([1, 1])
    with pytest.raises(UserError, match="cannot open the encoder"):
        encoder_vectors(["w1"], str(tmp_path / "nowhere"))


def test_texts_without_words_are_a_users_mistake():
    with pytest.raises(UserError, match="no words"):
        tfidf_vectors(["...", "the"], 0)


def test_the_map_keeps_neighbours_together():
    places = flat(np.array([[0.0, 0.0]] * 4 + [[5.0, 5.0]] * 4) + np.arange(16).reshape(8, 2) / 1e3, 0)
    apart = np.linalg.norm(places[:4].mean(0) - places[4:].mean(0))
    assert all(np.linalg.norm(places[i] - places[:4].mean(0)) < apart for i in range(4))
    assert flat(np.ones((2, 5)), 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_map_in_words_names_the_nearest():
    found = [Cluster(0, "calm", (0,)), Cluster(1, "loud", (1,)), Cluster(2, "shy", (2,)), Cluster(NOISE, "noise", (3,))]
    told = in_words(found, np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [0.0, 0.1]])).splitlines()
    assert told[1:] == ["0 calm (1); nearest: 1", "1 loud (1); nearest: 0", "2 shy (1); nearest: 1", "noise (1)"]


# The command


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "personas", *map(str, words)])
    status = status_of(evaluate.main)
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("error: ")]


def personas_file(path):
    listed = [{"dialogue": d.dialogue, "speaker": d.speaker, "persona": d.text, "expert": "a"} for d in DESCRIBED]
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_command_groups_a_file_and_draws_the_map(monkeypatch, capsys, tmp_path, ending):
    pytest.importorskip("matplotlib")
    scored = tmp_path / "ours.jsonl"
    answers = [{"persona": TEXTS[0], "iou": 0.25}, {"persona": None, "iou": 1.0}]
    scored.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    words = ["--personas", personas_file(tmp_path / "p.jsonl"), "--min_cluster_size", "3", "--scores", scored]
    code, out, _ = command(monkeypatch, capsys, *words, "--plot", tmp_path / f"map{ending}")
    assert code == 0 and "13 descriptions, 3 clusters of 3 or more by TF-IDF and SVD" in out
    assert out.splitlines()[0].split() == ["size", "cluster", "ours"] and "25.00 % (1)" in out
    assert (tmp_path / f"map{ending}").read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    told = (tmp_path / "map.txt").read_text(encoding="utf-8")
    assert "noise (1)" in told and told.count("nearest: ") == 3
    code, out, _ = command(monkeypatch, capsys, *words, "--json")
    found = json.loads(out)
    assert found["descriptions"] == 13 and [x["size"] for x in found["clusters"]] == [4, 4, 4, 1]


def test_the_command_reads_a_run(monkeypatch, capsys, finished):
    """Ann is calm and Bo loud in every dialogue of the small world, Cy has no persona: two clusters, no noise."""
    code, out, _ = command(monkeypatch, capsys, "--run", finished, "--min_cluster_size", "2", "--json")
    found = json.loads(out)["clusters"]
    assert code == 0 and {x["name"] for x in found} == {"calm", "loud"} and all(0 < x["iou"]["run"] < 1 for x in found)
    answers = sum(len(r["answers"]) for n in (1, 2) for r in lines(finished / f"rollouts/iteration-{n}.jsonl")
                  if r["responder"]["persona"])  # fmt: skip
    assert sum(x["answers"]["run"] for x in found) == answers
    late = command(monkeypatch, capsys, "--run", finished, "--min_cluster_size", "2", "--json", "--steps", "6")[1]
    last = [r for r in lines(finished / "rollouts/iteration-2.jsonl") if r["step"] == 5 and r["responder"]["persona"]]
    assert sum(x["answers"]["run"] for x in json.loads(late)["clusters"]) == 3 * len(last) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there are no personas"),
        (("--personas", "FILE", "--plot", "map.pdf"), "ends in .png or .svg"),
        (("--personas", "FILE", "--scores", "FILE"), "does not hold answers"),
        (("--personas", "FILE", "--scores", "/nowhere/s.jsonl"), "/nowhere/s.jsonl is missing or empty"),
        (("--personas", "/nowhere/p.jsonl"), "/nowhere/p.jsonl"),
        (("--run", "/nowhere"), "/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(monkeypatch, capsys, tmp_path, words, message):
    named = {"FILE": personas_file(tmp_path / "p.jsonl")}
    code, _, errors = command(monkeypatch, capsys, *(named.get(word, word) for word in words))
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(("package", "words"), [("sklearn", ()), ("matplotlib", ("--plot", "map.png"))])
def test_a_package_that_is_missing_is_named(monkeypatch, capsys, tmp_path, package, words):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    code, _, errors = command(monkeypatch, capsys, "--personas", personas_file(tmp_path / "p.jsonl"), *words)
    assert code == 2 and "requirements-extra.txt" in errors[0]
