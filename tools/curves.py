"""The pictures of docs/curves.md, docs/smollm2.md and README: learning curves of runs, good and broken, as SVG.

    python -m tools.curves                             draw docs/curves/*.svg again from docs/curves/*.json
    python -m tools.curves --keep truncation=RUN ...   first take over what is drawn of a run's metrics.jsonl

The pictures follow the reader's light or dark scheme and carry their own background. Geometry is that of tools.charts.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import tyro

from common.errors import UserError, command
from common.files import Record, read_json, read_lines, write_atomically
from common.flags import Pairs, pairs
from tools.charts import HEIGHT, LEFT, RIGHT, WIDTH, Chart, Drawing, Series, Timeline, average, draw
from tools.report import place

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "curves"
DROPPED = re.compile(
    r"(time|memory|rollout|buffer)/|policy/kl_cold_start|(ratio/max|clip_frac)/by|.*(f1|entropy/\w+)$|eval/self|test/"
)


@dataclass(frozen=True)
class Curves:
    """Draw the pictures of the documents."""

    keep: Pairs = ()
    """NAME=RUN, repeatable: take over the metrics of a run as docs/curves/NAME.json."""
    folder: Path = FOLDER
    """Where the numbers and the pictures lie."""


@dataclass(frozen=True)
class Picture:
    """One SVG: panels side by side, a metric each, with the same lines in all.

    `runs`: what a line is called -> the runs it is the mean of; several are also drawn one by one, thin.
    `levels`: horizontal lines in all panels.
    """

    name: str
    title: str
    runs: Mapping[str, tuple[str, ...]]
    panels: Mapping[str, str]  # metric -> heading
    levels: Mapping[str, float] | None = None


TOY = ("toy-0", "toy-1", "toy-2")
CONTROL = ("control-0", "control-1", "control-2")
ACCURACY, IOU = {"eval/toy/acc": "Accuracy on dev, greedy"}, {"eval/toy/iou": "IOU on dev, greedy"}
REWARD, RULE = {"reward/mean": "Reward (Eq. 8)"}, {"rule/rate": "Answers that keep the rule"}
CORE = {"consistency/core_on_gold": "Consensus on gold"}
AGREE, ENTRIES = {"consistency/mean": "Consistency (Eq. 12)"}, {"answer/entries": "Emotions an answer"}
ENTROPY = {"policy/entropy": "Token entropy, nats"}
PICTURES = (
    Picture(
        "learning", "Accuracy on dev of the toy, three seeds", {"SELF-EMO": TOY, "control: RL rate 0": CONTROL},
        {"eval/toy/acc": "Accuracy on dev, greedy; thin: each seed"},
        {"gold SFT": 0.809, "surface reader": 0.500, "majority class": 0.345},
    ),
    Picture(
        "good", "A good run, three seeds", {"SELF-EMO, three seeds": TOY},
        ACCURACY | IOU | REWARD | CORE | ENTRIES | ENTROPY,
    ),
    Picture(
        "hacking", "Reward hacking: padding", {"lambda 1 from the start": ("lambda-one",), "lambda 0": ("lambda-zero",)},
        ENTRIES | {"answer/min_share": "Smallest share in an answer"} | AGREE | REWARD | IOU | ACCURACY,
    ),
    Picture(
        "consensus", "A wrong consensus, and back", {"lambda 5": ("consensus",), "lambda 0": ("alone",)},
        AGREE | CORE | {"consistency/zero_std": "Groups of equal consistency"} | ENTRIES | IOU | ACCURACY,
    ),
    Picture(
        "truncation", "Truncation", {"31 tokens": ("limit-31",), "36 tokens": ("limit-36",), "80 tokens": ("one",)},
        {"answer/truncated": "Answers cut off", "answer/tokens": "Tokens an answer"} | ENTRIES | RULE | REWARD | ACCURACY,
    ),
    Picture(
        "variance", "Zero variance", {"temperature 0.05": ("cold",), "temperature 1": ("one",)},
        {"reward/zero_std": "Groups of equal reward", "grad_norm": "Gradient norm"} | ENTROPY | ACCURACY,
    ),
    Picture(
        "rate", "A learning rate that is too high", {"rate 3e-3": ("hot",), "rate 3e-4": ("one",)},
        {"ratio/max": "Largest ratio", "policy/kl": "KL to the reference, nats"} | RULE | REWARD | ENTROPY | ACCURACY,
    ),
    Picture(
        "smollm2", "SmolLM2-135M on MELD and EmoryNLP", {"SELF-GRPO": ("smollm2-self",), "GRPO": ("smollm2-plain",)},
        RULE | REWARD | {"answer/top_emotion": "Emotion named most, share"}
        | {"reward/zero_std": "Groups of equal reward"} | ENTROPY | {"answer/tokens": "Tokens an answer"},
    ),
)  # fmt: skip


# Numbers


def kept(run: Path) -> Record:
    """What is drawn of a run, and what its alarms look at, rounded to four digits."""
    config = read_json(run / "config.json")
    found = []
    for line in read_lines(run / "metrics.jsonl"):
        if line["phase"] in ("rl", "eval") and line.get("when") != "test":
            found.append({name: rounded(value) for name, value in line.items() if not DROPPED.match(name)})
    if not found:
        raise UserError(f"{run} holds no metrics")
    return {"S": config["S"], "iterations": config["iterations"], "lines": found}


def rounded(value: Any) -> Any:
    """Four significant digits of every float."""
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def chart(picture: Picture, metric: str, runs: Mapping[str, Record]) -> Chart:
    """One panel: a series a line of the picture, then thin ones a single run, then levels."""
    first = runs[next(iter(picture.runs.values()))[0]]
    time = Timeline(first["S"], first["iterations"])
    lines = [line for line in first["lines"] if metric in line]
    where = [(line["phase"], line["step"], line.get("when")) for line in lines]
    each = {name: [values(runs[run], metric, where) for run in members] for name, members in picture.runs.items()}
    series = [Series(name, tuple(map(average, zip(*rows, strict=True)))) for name, rows in each.items()]
    series += [Series(f"{name}, one seed", row) for name, rows in each.items() if len(rows) > 1 for row in rows]
    series += [Series(name, (value,) * len(lines)) for name, value in (picture.levels or {}).items()]
    parts = tuple(line["iteration"] * (line["phase"] == "rl") for line in lines)
    words = tuple(line.get("when", f"step {line['step'] + 1}") for line in lines)
    at = tuple(place(line, time) for line in lines)
    return Chart(metric, metric if len(picture.panels) > 1 else "", picture.panels[metric], at, words, parts, tuple(series))


def values(run: Record, metric: str, where: Sequence[tuple[str, int, str | None]]) -> tuple[float | None, ...]:
    """A metric of a run at the lines of another one; None where it has none."""
    found = {(x["phase"], x["step"], x.get("when")): x[metric] for x in run["lines"] if metric in x}
    return tuple(found.get(key) for key in where)


# Drawing

STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #4d555d; }
.h { font-size: 12.5px; font-weight: 600; fill: #1d2125; } .m { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.y { text-anchor: end; } .x, .stage { text-anchor: middle; } .stage { font-size: 9.5px; }
.page { fill: #fbfaf8; } .band { fill: #eceef1; } .grid { stroke: #d3d7db; stroke-width: .7; }
polyline { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; }
.thin { stroke-width: .9; opacity: .55; } .level { stroke-width: 1.2; } circle { fill: currentColor; }
.c0 { color: #0b5fa5; } .c1 { color: #b4530a; } .c2 { color: #0a7a55; } .c3 { color: #a03f7d; } .c4 { color: #50606e; }
.c1 polyline { stroke-dasharray: 7 3; } .c2 polyline { stroke-dasharray: 2 3; } .c3 polyline { stroke-dasharray: 9 3 2 3; }
.c4 polyline { stroke-dasharray: 4 2; } .c1 .thin { stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) { text { fill: #aeb6be; } .h { fill: #e7e9eb; } .page { fill: #14171a; }
.band { fill: #23282d; } .grid { stroke: #3a4147; } .c0 { color: #7cb8f2; } .c1 { color: #f0a35e; } .c2 { color: #5fd0a5; }
.c3 { color: #e58fc4; } .c4 { color: #b6c3cf; } }
"""


def svg(picture: Picture, runs: Mapping[str, Record]) -> str:
    """The picture, panels two a row."""
    first = runs[next(iter(picture.runs.values()))[0]]
    time = Timeline(first["S"], first["iterations"])
    drawings = [draw(chart(picture, metric, runs), time) for metric in picture.panels]
    columns, names = min(2, len(drawings)), [*picture.runs, *(picture.levels or {})]
    out, top = legend(names, columns * WIDTH)
    height = top + HEIGHT * math.ceil(len(drawings) / columns)
    spoken = " ".join(d.chart.spoken() for d in drawings)
    for i, drawing in enumerate(drawings):
        out.append(f'<g transform="translate({i % columns * WIDTH} {top + i // columns * HEIGHT})">')
        out += [*panel(drawing, names, len(picture.runs)), "</g>"]
    return page(picture.title, spoken, columns * WIDTH, height, out)


def page(title: str, said: str, width: int, height: int, parts: Sequence[str]) -> str:
    """A whole SVG; what it shows is also said in `desc`, for those who do not see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    names = f"<title>{escape(title)}</title><desc>{escape(said)}</desc><style>{STYLE}</style>"
    ground = f'<rect class="page" width="{width}" height="{height}" rx="8"/>'
    return "\n".join([head, names, ground, *parts, "</svg>", ""])


def legend(names: Sequence[str], width: int) -> tuple[list[str], int]:
    """The key of all lines, wrapped, and the height that it takes."""
    out, x, y = [], LEFT, 20
    for i, name in enumerate(names):
        wide = 44 + round(6.2 * len(name))
        if x > LEFT and x + wide > width:
            x, y = LEFT, y + 16
        out.append(f'<g class="c{i % 5}"><polyline points="{x},{y - 4} {x + 24},{y - 4}"/></g>')
        out.append(f'<text x="{x + 30}" y="{y}">{escape(name)}</text>')
        x += wide
    return out, y + 8


def panel(drawing: Drawing, names: Sequence[str], runs: int) -> list[str]:
    """One chart within its box."""
    chart, bottom, ceiling = drawing.chart, drawing.y_ticks[0][0], drawing.y_ticks[-1][0]
    out = []
    for i, (left, width, name) in enumerate(drawing.stages):
        if i % 2 == 0:
            out.append(f'<rect class="band" x="{left}" y="{ceiling}" width="{width}" height="{bottom - ceiling}"/>')
        out.append(f'<text class="stage" x="{left + width / 2:g}" y="{bottom + 12}">{name}</text>')
    for y, name in drawing.y_ticks:
        out.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text class="y" x="{LEFT - 5}" y="{y + 4}">{name}</text>')
    for x, name in drawing.x_ticks:
        out.append(f'<text class="x" x="{x}" y="{bottom + 24}">{name}</text>')
    out.append(f'<text class="h" x="{LEFT}" y="{ceiling - 9}">{escape(chart.text)}</text>')
    if chart.title:
        out.append(f'<text class="y m" x="{RIGHT}" y="{ceiling - 9}">{escape(chart.title)}</text>')
    for line in reversed(drawing.lines):  # the main ones on top
        name = line.name.removesuffix(", one seed")
        kind = "thin" if name != line.name else "level" if names.index(name) >= runs else ""
        out.append(f'<g class="c{names.index(name) % 5}">')
        out += [f'<polyline class="{kind}" points="{points}"/>' for points in line.paths]
        if not kind and len(line.dots) <= 12:
            out += [f'<circle cx="{x:g}" cy="{y:g}" r="3"/>' for x, y, _ in line.dots]
        out.append("</g>")
    return out


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def work() -> None:
        args = tyro.cli(Curves, args=list(argv), use_underscores=True)
        for name, run in pairs("keep", args.keep).items():
            found = kept(Path(run))
            lines = ",\n".join(json.dumps(line) for line in found.pop("lines"))
            write_atomically(args.folder / f"{name}.json", f'{json.dumps(found)[:-1]}, "lines": [\n{lines}\n]}}\n')
        for picture in PICTURES:
            names = [name for members in picture.runs.values() for name in members]
            runs = {name: read_json(args.folder / f"{name}.json") for name in names}
            write_atomically(args.folder / f"{picture.name}.svg", svg(picture, runs))
            print(f"drew {args.folder / picture.name}.svg")

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
