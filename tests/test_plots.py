"""The pictures of speed and ablations: where their points lie, by hand, and what they say to those who do not see them."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.errors import UserError
from tools import plots
from tools.plots import ablations, growth, panel

ROOT = Path(__file__).resolve().parent.parent


def row(side, name, tokens_per_s, peak_mib=100, **sizes):
    work = {"name": name, "prompts": 8, "n": 8, "prompt_tokens": 180, "max_new_tokens": 64, "kv_mib": 0, **sizes}
    return {"side": side, "workload": work, "tokens_per_s": tokens_per_s, "peak_mib": peak_mib}


def table(**scores):
    return {"rows": [{"title": t, "scores": {"test/toy/acc": {"values": v}}} for t, v in scores.items()]}


def test_points_lie_where_their_numbers_say():
    """8, 32, 128 from x = 52 to 400, logarithmic: 32 in the middle, 226. 0 to 200 from y = 214 to 24: 100 at 119."""
    out = panel("tokens/s", ["ours"], {"ours": [(8, 100), (32, 200), (128, 0)]})
    assert '<polyline points="52,119 226,24 400,214"/>' in out[-1]


def test_growth_has_a_panel_an_axis_and_memory_where_it_matters():
    rows = [row("selfemo", "n-1", 50, n=1), row("vllm", "n-1", 40, n=1), row("selfemo", "n-32", 600, n=32)]
    rows += [row("selfemo", "kv_mib-64", 300, 700, kv_mib=64), row("selfemo", "kv_mib-512", 400, 1200, kv_mib=512)]
    root = ElementTree.fromstring(growth(rows))
    said = root.find("{http://www.w3.org/2000/svg}desc").text
    assert said == (
        "tokens/s, over answers to a prompt: selfemo 50 at 1, 600 at 32; vllm 40 at 1. "
        "tokens/s, over MiB for keys and values: selfemo 300 at 64, 400 at 512. "
        "peak memory, MiB, over MiB for keys and values: selfemo 700 at 64, 1,200 at 512."
    )


def test_ablations_show_every_seed_and_their_mean():
    """Seeds .5, .6, .7: mean .6. Ticks .5 to .7: x from 210 to 820, so rings at 210, 515, 820 and the dot at 515."""
    drawn = ablations(table(full=[0.5, 0.6, 0.7]))
    assert re.findall(r'<circle cx="([\d.]+)" cy="50" r="([\d.]+)"', drawn) == [
        ("210.0", "3.5"), ("515.0", "3.5"), ("820.0", "3.5"), ("515.0", "4.5"),
    ]  # fmt: skip
    assert "full 0.600 (0.500, 0.600, 0.700)" in drawn


def test_titles_stay_text():
    ElementTree.fromstring(ablations(table(**{"<b>&": [0.1, 0.2]})))


def test_nothing_to_draw_is_a_users_mistake():
    for rows in ([], [row("selfemo", "step", 1)]):
        with pytest.raises(UserError, match="no row of growth"):
            growth(rows)
    with pytest.raises(UserError, match="no row has"):
        ablations(table())


def test_the_command_line(tmp_path, capsys):
    """A picture a flag; without a flag, or without the file, one line and status 2."""
    (tmp_path / "ablate.json").write_text(json.dumps(table(full=[0.5, 0.6])))
    assert plots.main(["--ablate", str(tmp_path / "ablate.json"), "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "ablations.svg").read_text().startswith("<svg")
    for argv in ([], ["--growth", str(tmp_path / "none")]):
        assert plots.main([*argv, "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
