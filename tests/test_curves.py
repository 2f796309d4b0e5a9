"""The pictures of the documents: drawn from the numbers beside them, and what the page says of alarms is what they raise."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import lines

from common.errors import UserError
from tools import curves
from tools.alarms import alarms
from tools.curves import PICTURES, Picture, svg

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "curves"
SVG = "{http://www.w3.org/2000/svg}"


def numbers(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_pictures_are_those_of_the_numbers(tmp_path):
    """`python -m tools.curves` draws them again."""
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert curves.main(["--folder", str(tmp_path)]) == 0
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    assert set(drawn) == {f"{picture.name}.svg" for picture in PICTURES}


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_small_stands_alone_and_can_be_read_aloud(picture):
    path = FOLDER / f"{picture.name}.svg"
    assert path.stat().st_size < 60_000
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    tags = {"svg", "title", "desc", "style", "rect", "g", "polyline", "text", "path"}
    assert {x.tag.removeprefix(SVG) for x in root.iter()} - {"circle"} == tags
    assert root.find(f"{SVG}title").text == picture.title
    for name in picture.runs:
        assert f"{name} goes from" in root.find(f"{SVG}desc").text
    assert "http" not in re.sub(r"xmlns=\S+", "", path.read_text(encoding="utf-8"))
    page = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/curves.md", "docs/smollm2.md", "README.md"))
    assert re.search(
        rf"!\[[^\]]+\]\(curves/{picture.name}\.svg\)|curves/{picture.name}\.svg\" width=\"\d+\" alt=\"[^\"]+\"", page
    )


def test_every_text_of_a_picture_lies_inside_it():
    """Letters of 12.5 px bold are at most 8 px wide, the others 7. Ticks end at their x or stand around it."""
    for picture in PICTURES:
        root = ElementTree.fromstring((FOLDER / f"{picture.name}.svg").read_text(encoding="utf-8"))
        width = int(root.get("viewBox").split()[2])
        for group in [root, *root.findall(f"{SVG}g")]:
            shift = int(re.match(r"translate\((\d+)", group.get("transform", "translate(0"))[1])
            for text in group.findall(f"{SVG}text"):
                kinds, x = text.get("class", "").split(), shift + float(text.get("x"))
                long = len(text.text or "") * (8 if "h" in kinds else 7)
                before = long if "y" in kinds else long / 2 if kinds in (["x"], ["stage"]) else 0
                assert x - before >= 0 and x - before + long <= width, (picture.name, text.text)
        for metric, heading in picture.panels.items():
            assert 8 * len(heading) + 7 * len(metric) * (len(picture.panels) > 1) <= 364, heading


RAISED = re.compile(r"^- Alarms(?:, [^:]+)?: (.+?)\. +<!-- (\S+) -->$", re.MULTILINE)


def test_the_page_names_the_alarms_that_each_run_raises():
    """ "Alarms, 31 tokens: **title**, **title**." or "none", with the name of the numbers behind it."""
    said = RAISED.findall((ROOT / "docs" / "curves.md").read_text(encoding="utf-8"))
    assert len(said) >= 8 and any(titles == "none" for titles, _ in said)
    for titles, name in said:
        rl = [line for line in numbers(name)["lines"] if line["phase"] == "rl"]
        assert [alarm.title for alarm in alarms(rl) if alarm.raised] == re.findall(r"\*\*(.+?)\*\*", titles), name


def test_every_set_of_numbers_is_drawn():
    used = {name for picture in PICTURES for members in picture.runs.values() for name in members}
    assert used == {path.stem for path in FOLDER.glob("*.json")}


# Drawing


def run(values, T=4):
    """A run of one iteration with an RL metric and two evaluations."""
    rl = [{"phase": "rl", "iteration": 1, "step": i, "m": v} for i, v in enumerate(values)]
    evals = [
        {"phase": "eval", "iteration": 1, "step": step, "when": when, "e": 0.5}
        for step, when in ((0, "after the cold start"), (T, "after RL 1"))
    ]
    return {"S": T, "iterations": 1, "lines": [evals[0], *rl, evals[1]]}


def points(text, kind):
    return re.findall(rf'<polyline class="{kind}" points="([^"]+)"', text)


def test_the_mean_of_several_runs_is_drawn_thick_and_each_of_them_thin():
    """S = 4: cold start 1.6 wide, RL 4, fine-tuning 1.6, in all 7.2 on 364 px: step .5 lies at 44 + 364 * 2.1 / 7.2.
    Values 0 and 1 of two runs, mean .5: ticks 0 to 1 on 190 px down from 214: 214, 24 and 119.
    x = 150.2."""
    picture = Picture("p", "P", {"both": ("a", "b")}, {"m": "M"})
    text = svg(picture, {"a": run([0.0] * 4), "b": run([1.0] * 4)})
    assert points(text, "")[0].split()[0] == "150.2,119"
    assert [row.split()[0] for row in points(text, "thin")] == ["150.2,24", "150.2,214"]
    assert points(text, "level") == []


def test_a_level_is_drawn_through_and_a_run_that_ended_early_stops():
    picture = Picture("p", "P", {"a": ("a",), "b": ("b",)}, {"m": "M"}, {"limit": 0.5})
    short = run([1.0, 1.0])
    text = svg(picture, {"a": run([0.0] * 4), "b": short})
    assert [len(row.split()) for row in points(text, "")] == [2, 4]  # the last line is drawn first
    assert {xy.partition(",")[2] for xy in points(text, "level")[0].split()} == {"119"}


def test_names_are_escaped():
    text = svg(Picture("p", "a < b", {"x & y": ("a",)}, {"m": "<m>"}), {"a": run([0.0, 1.0, 0.0, 1.0])})
    assert ElementTree.fromstring(text).find(f"{SVG}title").text == "a < b"


def test_numbers_are_taken_over_from_a_run(finished, tmp_path, capsys):
    """RL lines and evaluations before test, four digits, without clocks; pictures need all their numbers."""
    assert curves.kept(finished)["lines"][0]["when"] == "start"
    found, logged = curves.kept(finished), lines(finished / "metrics.jsonl")
    assert [x["step"] for x in found["lines"] if x["phase"] == "rl"] == [0, 1, 2, 3, 4, 5]
    first = next(x for x in logged if x["phase"] == "rl")
    kept = next(x for x in found["lines"] if x["phase"] == "rl")
    assert kept["grad_norm"] == pytest.approx(first["grad_norm"], rel=5e-4) and len(repr(kept["grad_norm"])) < 10
    assert "time/update_s" in first and "time/update_s" not in kept
    assert not any(x.get("when") == "test" for x in found["lines"])
    assert [a.title for a in alarms([kept])] == [a.title for a in alarms([first])]
    assert curves.main(["--folder", str(tmp_path), "--keep", f"toy-0={finished}"]) == 2
    assert "toy-1.json" in capsys.readouterr().err and (tmp_path / "toy-0.json").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"S": 1, "iterations": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="holds no metrics"):
        curves.kept(tmp_path / "empty")
