"""The pictures of the documents: drawn from the numbers beside them, where points lie by hand, what is said of alarms."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import lines, status_of

from common.errors import UserError
from tools import pictures
from tools.alarms import alarms
from tools.pictures import PICTURES, UNITS, Picture, ablations_svg, curves_svg, growth_panel, growth_svg

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "curves"
SVG = "{http://www.w3.org/2000/svg}"


def numbers(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_pictures_are_those_of_the_numbers(tmp_path):
    """`python -m tools.pictures curves` draws them again."""
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert pictures.main(["curves", "--folder", str(tmp_path)]) == 0
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
        width, height = map(int, root.get("viewBox").split()[2:])
        for group in [root, *root.findall(f"{SVG}g")]:
            shift, down = map(int, re.match(r"translate\((\d+) (\d+)", group.get("transform", "translate(0 0")).groups())
            for text in group.findall(f"{SVG}text"):
                assert 9 <= down + float(text.get("y")) <= height - 4, (picture.name, text.text)
                kinds, x = text.get("class", "").split(), shift + float(text.get("x"))
                long = len(text.text or "") * (8 if "h" in kinds else 7)
                before = long if "y" in kinds else long / 2 if kinds in (["x"], ["stage"]) else 0
                assert x - before >= 0 and x - before + long <= width, (picture.name, text.text)
        for metric, heading in picture.panels.items():
            assert 8 * len(heading) + 7 * len(metric) * (len(picture.panels) > 1) <= 364, heading


def test_both_axes_of_every_panel_have_a_title():
    """What the upright one counts stands above its numbers; one panel each."""
    text = (FOLDER / "rate.svg").read_text(encoding="utf-8")
    assert re.findall(r'<text x="8" y="15.0">(.*?)</text>', text) == [
        "ratio", "nats per token", "share of answers", "reward", "nats per token", "share of samples",
    ]  # fmt: skip
    for picture in PICTURES:
        assert set(picture.panels) <= set(UNITS)
        drawn = (FOLDER / f"{picture.name}.svg").read_text(encoding="utf-8")
        assert drawn.count(">RL steps done</text>") == len(picture.panels)


RAISED = re.compile(r"^- Alarms(?:, [^:]+)?: (.+?)\. +<!-- (\S+) -->$", re.MULTILINE)


def test_the_page_names_the_alarms_that_each_run_raises():
    """ "Alarms, 31 tokens: **title**, **title**." or "none", with the name of the numbers behind it."""
    said = RAISED.findall((ROOT / "docs" / "curves.md").read_text(encoding="utf-8"))
    assert len(said) >= 8 and any(titles == "none" for titles, _ in said)
    for titles, name in said:
        raised = [alarm.title for alarm in alarms(numbers(name)["lines"]) if alarm.raised]
        assert raised == re.findall(r"\*\*(.+?)\*\*", titles), name


def test_every_set_of_numbers_is_drawn():
    used = {name for picture in PICTURES for members in picture.runs.values() for name in members}
    assert used == {path.stem for path in FOLDER.glob("*.json")}


# Drawing curves


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
    text = curves_svg(picture, {"a": run([0.0] * 4), "b": run([1.0] * 4)})
    assert points(text, "")[0].split()[0] == "150.2,119"
    assert [row.split()[0] for row in points(text, "thin")] == ["150.2,24", "150.2,214"]
    assert points(text, "level") == []


def test_a_level_is_drawn_through_and_a_run_that_ended_early_stops():
    picture = Picture("p", "P", {"a": ("a",), "b": ("b",)}, {"m": "M"}, {"limit": 0.5})
    short = run([1.0, 1.0])
    text = curves_svg(picture, {"a": run([0.0] * 4), "b": short})
    assert [len(row.split()) for row in points(text, "")] == [2, 4]  # the last line is drawn first
    assert {xy.partition(",")[2] for xy in points(text, "level")[0].split()} == {"119"}


def test_names_are_escaped():
    text = curves_svg(Picture("p", "a < b", {"x & y": ("a",)}, {"m": "<m>"}), {"a": run([0.0, 1.0, 0.0, 1.0])})
    assert ElementTree.fromstring(text).find(f"{SVG}title").text == "a < b"


def test_numbers_are_taken_over_from_a_run(finished, tmp_path, capsys):
    """RL lines and evaluations before test, four digits, without clocks; pictures need all their numbers."""
    assert pictures.kept(finished)["lines"][0]["when"] == "start"
    found, logged = pictures.kept(finished), lines(finished / "metrics.jsonl")
    assert [x["step"] for x in found["lines"] if x["phase"] == "rl"] == [0, 1, 2, 3, 4, 5]
    first = next(x for x in logged if x["phase"] == "rl")
    kept = next(x for x in found["lines"] if x["phase"] == "rl")
    assert kept["grad_norm"] == pytest.approx(first["grad_norm"], rel=5e-4) and len(repr(kept["grad_norm"])) < 10
    assert "time/update_s" in first and "time/update_s" not in kept
    assert not any(x.get("when") == "test" for x in found["lines"])
    assert [a.title for a in alarms([kept])] == [a.title for a in alarms([first])]
    assert pictures.main(["curves", "--folder", str(tmp_path), "--keep", f"toy-0={finished}"]) == 2
    assert "toy-1.json" in capsys.readouterr().err and (tmp_path / "toy-0.json").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"S": 1, "iterations": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="holds no metrics"):
        pictures.kept(tmp_path / "empty")


# Drawing growth and ablations


def row(side, name, tokens_per_s, peak_mib=100, **sizes):
    work = {"name": name, "prompts": 8, "n": 8, "prompt_tokens": 180, "max_new_tokens": 64, "kv_mib": 0, **sizes}
    return {"side": side, "workload": work, "tokens_per_s": tokens_per_s, "peak_mib": peak_mib}


def table(**scores):
    return {"rows": [{"title": t, "scores": {"test/toy/acc": {"values": v}}} for t, v in scores.items()]}


def test_points_lie_where_their_numbers_say():
    """8, 32, 128 from x = 52 to 400, logarithmic: 32 in the middle, 226. 0 to 200 from y = 214 to 24: 100 at 119."""
    out = growth_panel("tokens/s", ["ours"], {"ours": [(8, 100), (32, 200), (128, 0)]})
    assert '<polyline points="52,119 226,24 400,214"/>' in out[-1]


def test_growth_has_a_panel_an_axis_and_memory_where_it_matters():
    rows = [row("selfemo", "n-1", 50, n=1), row("vllm", "n-1", 40, n=1), row("selfemo", "n-32", 600, n=32)]
    rows += [row("selfemo", "kv_mib-64", 300, 700, kv_mib=64), row("selfemo", "kv_mib-512", 400, 1200, kv_mib=512)]
    root = ElementTree.fromstring(growth_svg(rows))
    said = root.find(f"{SVG}desc").text
    assert said == (
        "tokens/s, over answers to a prompt: selfemo 50 at 1, 600 at 32; vllm 40 at 1. "
        "tokens/s, over MiB for keys and values: selfemo 300 at 64, 400 at 512. "
        "peak memory, MiB, over MiB for keys and values: selfemo 700 at 64, 1,200 at 512."
    )


def test_ablations_show_every_seed_and_their_mean():
    """Seeds .5, .6, .7: mean .6. Ticks .5 to .7: x from 210 to 820, so rings at 210, 515, 820 and the dot at 515."""
    drawn = ablations_svg(table(full=[0.5, 0.6, 0.7]))
    assert re.findall(r'<circle cx="([\d.]+)" cy="50" r="([\d.]+)"', drawn) == [
        ("210.0", "3.5"), ("515.0", "3.5"), ("820.0", "3.5"), ("515.0", "4.5"),
    ]  # fmt: skip
    assert "full 0.600 (0.500, 0.600, 0.700)" in drawn


def test_titles_stay_text():
    ElementTree.fromstring(ablations_svg(table(**{"<b>&": [0.1, 0.2]})))


def test_nothing_to_draw_is_a_users_mistake():
    for rows in ([], [row("selfemo", "step", 1)]):
        with pytest.raises(UserError, match="no row of growth"):
            growth_svg(rows)
    with pytest.raises(UserError, match="no row has"):
        ablations_svg(table())


def test_the_command_line(tmp_path, capsys):
    """A picture per subcommand; without one, or without the file, status 2."""
    table_file, out = tmp_path / "ablate.json", tmp_path / "ablations.svg"
    table_file.write_text(json.dumps(table(full=[0.5, 0.6])))
    assert pictures.main(["ablations", str(table_file), "--out", str(out)]) == 0
    assert out.read_text().startswith("<svg")
    assert pictures.main(["growth", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert status_of(lambda: pictures.main([])) == 2
