"""The pictures of the documents as SVG: learning curves of runs, what growth costs, and the rows of Table 2.

    python -m tools.pictures curves                             draw docs/curves/*.svg again from docs/curves/*.json
    python -m tools.pictures curves --keep truncation=RUN ...   first take over what is drawn of a run's metrics.jsonl
    python -m tools.pictures growth docs/speed/growth.jsonl     docs/speed/growth.svg from the rows of tools.bench growth
    python -m tools.pictures ablations DIR/ablate.json          docs/ablations.svg from the table of tools.ablate

The pictures follow the reader's light or dark scheme, carry their own background, and say their numbers as text.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import tyro

from common.errors import UserError, command
from common.files import Record, read_json, read_lines, write_atomically
from common.flags import Pairs, pairs
from tools.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Drawing, Series, Timeline, average, draw, nice_ticks

DOCS = Path(__file__).resolve().parent.parent / "docs"
DROPPED = re.compile(
    r"(time|memory|rollout|buffer)/|policy/kl_cold_start|(ratio/max|clip_frac)/by|.*(f1|entropy/\w+)$|eval/self|test/"
)


# Learning curves


@dataclass(frozen=True)
class Picture:
    """One SVG: panels side by side, one metric in each, with the same lines in all.

    `runs`: what a line is called -> the runs it is the mean of; several are also drawn one by one, thin.
    `levels`: horizontal lines in all panels.
    """

    name: str
    title: str
    runs: Mapping[str, tuple[str, ...]]
    panels: Mapping[str, str]  # metric -> heading
    levels: Mapping[str, float] = field(default_factory=dict)

    def timeline(self, runs: Mapping[str, Record]) -> Timeline:
        """The time axis of its first run, which is that of all."""
        first = runs[next(iter(self.runs.values()))[0]]
        return Timeline(first["S"], first["iterations"])


TOY = tuple(f"toy-{seed}" for seed in range(5))
CONTROL = ("control-0", "control-1", "control-2")
ACCURACY, IOU = {"eval/toy/acc": "Accuracy on dev, greedy"}, {"eval/toy/iou": "IOU on dev, greedy"}
REWARD, RULE = {"reward/mean": "Reward (Eq. 8)"}, {"rule/rate": "Answers that keep the rule"}
CORE = {"consistency/core_on_gold": "Consensus on gold"}
AGREE, ENTRIES = {"consistency/mean": "Consistency (Eq. 12)"}, {"answer/entries": "Emotions per answer"}
ENTROPY = {"policy/entropy": "Token entropy"}
UNITS = {  # what the upright axis of a metric counts
    "eval/toy/acc": "share of samples", "eval/toy/iou": "IOU", "reward/mean": "reward", "rule/rate": "share of answers",
    "consistency/core_on_gold": "share of groups", "consistency/mean": "consistency", "answer/entries": "emotions",
    "policy/entropy": "nats per token", "answer/min_share": "share of weight", "consistency/zero_std": "share of groups",
    "answer/truncated": "share of answers", "answer/tokens": "tokens", "reward/zero_std": "share of groups",
    "grad_norm": "norm", "ratio/max": "ratio", "policy/kl": "nats per token", "answer/top_emotion": "share of answers",
}  # fmt: skip
PICTURES = (
    Picture(
        "learning", "Accuracy on dev of the toy", {"SELF-EMO, five seeds": TOY, "control: RL rate 0, three seeds": CONTROL},
        {"eval/toy/acc": "Accuracy on dev, greedy; thin: each seed"},
        {"gold SFT": 0.809, "surface reader": 0.500, "majority class": 0.345},
    ),
    Picture(
        "good", "A good run, five seeds", {"SELF-EMO, five seeds": TOY},
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
        {"answer/truncated": "Answers cut off", "answer/tokens": "Tokens per answer"} | ENTRIES | RULE | REWARD | ACCURACY,
    ),
    Picture(
        "variance", "Zero variance", {"temperature 0.05": ("cold",), "temperature 1": ("one",)},
        {"reward/zero_std": "Groups of equal reward", "grad_norm": "Gradient norm"} | ENTROPY | ACCURACY,
    ),
    Picture(
        "rate", "A learning rate that is too high", {"rate 3e-3": ("hot",), "rate 3e-4": ("one",)},
        {"ratio/max": "Largest ratio", "policy/kl": "KL to the reference"} | RULE | REWARD | ENTROPY | ACCURACY,
    ),
    Picture(
        "smollm2", "SmolLM2-135M on MELD and EmoryNLP", {"SELF-GRPO": ("smollm2-self",), "GRPO": ("smollm2-plain",)},
        RULE | REWARD | {"answer/top_emotion": "Emotion named most"}
        | {"reward/zero_std": "Groups of equal reward"} | ENTROPY | {"answer/tokens": "Tokens per answer"},
    ),
)  # fmt: skip


def kept(run: Path) -> Record:
    """What is drawn of a run, and what its alarms look at, rounded to four digits."""
    config = read_json(run / "config.json")
    found = []
    for line in read_lines(run / "metrics.jsonl"):
        if line["phase"] in ("rl", "eval") and line.get("when") != "test":
            drawn = json.dumps({name: value for name, value in line.items() if not DROPPED.match(name)})
            found.append(json.loads(drawn, parse_float=lambda digits: float(f"{float(digits):.4g}")))
    if not found:
        raise UserError(f"{run} holds no metrics")
    return {"S": config["S"], "iterations": config["iterations"], "lines": found}


def chart(picture: Picture, metric: str, runs: Mapping[str, Record]) -> Chart:
    """One panel: a series per line of the picture, then thin ones per single run, then levels."""
    first = runs[next(iter(picture.runs.values()))[0]]
    lines = [line for line in first["lines"] if metric in line]
    each = {name: [values(runs[run], metric, lines) for run in members] for name, members in picture.runs.items()}
    series = [Series(name, tuple(map(average, zip(*rows, strict=True)))) for name, rows in each.items()]
    series += [Series(f"{name}, one seed", row) for name, rows in each.items() if len(rows) > 1 for row in rows]
    series += [Series(name, (value,) * len(lines)) for name, value in picture.levels.items()]
    title = metric if len(picture.panels) > 1 else ""
    found = Chart.over_time(metric, title, picture.panels[metric], lines, series, picture.timeline(runs))
    return replace(found, unit=UNITS.get(metric, metric))


def values(run: Record, metric: str, lines: Sequence[Record]) -> tuple[float | None, ...]:
    """A metric of a run at the lines of another one; None where it has none."""

    def key(line: Record) -> tuple[str, int, str | None]:
        return line["phase"], line["step"], line.get("when")

    found = {key(line): line[metric] for line in run["lines"] if metric in line}
    return tuple(found.get(key(line)) for line in lines)


def curves_svg(picture: Picture, runs: Mapping[str, Record]) -> str:
    """A picture from the numbers of its runs."""
    drawings = [draw(chart(picture, metric, runs), picture.timeline(runs)) for metric in picture.panels]
    names = [*picture.runs, *picture.levels]
    panels = [curves_panel(drawing, names, len(picture.runs)) for drawing in drawings]
    return sheet(picture.title, names, panels, " ".join(drawing.chart.spoken() for drawing in drawings), above=15, below=12)


def curves_panel(drawing: Drawing, names: Sequence[str], runs: int) -> list[str]:
    """One chart within its box."""
    chart, bottom, ceiling = drawing.chart, drawing.y_ticks[0][0], drawing.y_ticks[-1][0]
    out = []
    for i, (left, width, name) in enumerate(drawing.stages):
        if i % 2 == 0:
            out.append(f'<rect class="band" x="{left}" y="{ceiling}" width="{width}" height="{bottom - ceiling}"/>')
        out.append(f'<text class="stage" x="{left + width / 2:g}" y="{bottom + 12}">{name}</text>')
    out += grid(drawing.y_ticks)
    for x, name in drawing.x_ticks:
        out.append(f'<text class="x" x="{x}" y="{bottom + 24}">{name}</text>')
    out.append(f'<text class="x" x="{(LEFT + RIGHT) / 2:g}" y="{bottom + 37}">RL steps done</text>')
    out.append(f'<text x="8" y="{ceiling - 9}">{escape(chart.unit)}</text>')
    out.append(f'<text class="h" x="{LEFT}" y="{ceiling - 25}">{escape(chart.text)}</text>')
    if chart.title:
        out.append(f'<text class="y m" x="{RIGHT}" y="{ceiling - 25}">{escape(chart.title)}</text>')
    for line in reversed(drawing.lines):  # the main ones on top
        name = line.name.removesuffix(", one seed")
        kind = "thin" if name != line.name else "level" if names.index(name) >= runs else ""
        out.append(f'<g class="c{names.index(name) % 5}">')
        out += [f'<polyline class="{kind}" points="{points}"/>' for points in line.paths]
        if not kind and len(line.dots) <= 12:
            out += [f'<circle cx="{x:g}" cy="{y:g}" r="3"/>' for x, y, _ in line.dots]
        out.append("</g>")
    return out


# What growth costs

AXES = {
    "prompts": "prompts", "n": "answers to a prompt", "prompt_tokens": "tokens of a prompt",
    "max_new_tokens": "tokens of an answer", "kv_mib": "MiB for keys and values",
}
MEMORY = ("prompts", "kv_mib")  # axes that also get a panel of memory
Points = Mapping[str, Sequence[tuple[float, float]]]  # of each side


def growth_svg(rows: Sequence[Record]) -> str:
    """Panels of tokens/s, and of memory where it matters, over each axis that grows; one line per side."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    panels: dict[str, Points] = {}
    for axis, words in AXES.items():
        own = [row for row in rows if row["workload"]["name"].rpartition("-")[0] == axis]
        measures = {"tokens_per_s": "tokens/s", **({"peak_mib": "peak memory, MiB"} if axis in MEMORY else {})}
        for measure, unit in measures.items() if own else ():
            points = {s: [(r["workload"][axis], r[measure]) for r in own if r["side"] == s] for s in sides}
            panels[f"{unit}, over {words}"] = points
    if not panels:
        raise UserError("no row of growth: give what `python -m tools.bench growth --out FILE` wrote")
    drawn = [growth_panel(heading, sides, points) for heading, points in panels.items()]
    said = ". ".join(f"{heading}: {spoken(points)}" for heading, points in panels.items())
    return sheet("What growth costs", sides, drawn, f"{said}.")


def spoken(points: Points) -> str:
    """The numbers of a panel in words."""
    return "; ".join(f"{name} " + ", ".join(f"{y:,.0f} at {x:,}" for x, y in own) for name, own in points.items() if own)


def growth_panel(heading: str, names: Sequence[str], points: Points) -> list[str]:
    """Lines over a logarithmic axis, from 0 upwards."""
    places = sorted({x for own in points.values() for x, _ in own})
    ticks = nice_ticks(0, max(y for own in points.values() for _, y in own))
    low, high = math.log(places[0]), math.log(places[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        along = (math.log(x) - low) / (high - low) if high > low else 0.5
        return round(LEFT + 8 + (RIGHT - LEFT - 16) * along, 1), round(BOTTOM - (BOTTOM - TOP) * y / ticks[-1], 1)

    out = [f'<text class="h" x="{LEFT}" y="{TOP - 9}">{escape(heading)}</text>']
    out += grid((at(places[0], tick)[1], f"{tick:g}") for tick in ticks)
    out += [f'<text class="x" x="{at(place, 0)[0]}" y="{BOTTOM + 14}">{place:,}</text>' for place in places]
    for i, name in enumerate(names):
        drawn = [at(x, y) for x, y in points[name]]
        line = " ".join(f"{x:g},{y:g}" for x, y in drawn)
        dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="3"/>' for x, y in drawn)
        out.append(f'<g class="c{i % 5}"><polyline points="{line}"/>{dots}</g>')
    return out


# Ablations

ACC = "test/toy/acc"


def ablations_svg(table: Record) -> str:
    """One line per row of Table 2: every seed as a ring, their mean as a dot, one sample standard deviation to each side."""
    rows = [(row["title"], row["scores"][ACC]["values"]) for row in table["rows"] if ACC in row.get("scores", {})]
    if not rows:
        raise UserError(f"no row has {ACC}")
    width, first, last, step = 2 * WIDTH, 210, 2 * WIDTH - 20, 24
    found = [value for _, values in rows for value in values]
    ticks = nice_ticks(min(found), max(found))

    def x(value: float) -> float:
        return round(first + (last - first) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    bottom = 40 + step * len(rows)
    out = ['<text class="h" x="14" y="20">Accuracy on the toy\'s test set: seeds, mean, standard deviation</text>']
    for tick in ticks:
        out.append(f'<path class="grid" d="M{x(tick)} 32V{bottom}"/>')
        out.append(f'<text class="x" x="{x(tick)}" y="{bottom + 14}">{tick:g}</text>')
    for i, (title, values) in enumerate(rows):
        y, mean = 50 + step * i, statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rings = "".join(f'<circle cx="{x(v)}" cy="{y}" r="3.5" style="fill: none; stroke: currentColor"/>' for v in values)
        out.append(f'<text class="y" x="{first - 12}" y="{y + 4}">{escape(title)}</text><g class="c{int(i > 0)}">')
        ends = x(max(ticks[0], mean - spread)), x(min(ticks[-1], mean + spread))
        out.append(f'<path d="M{ends[0]} {y}H{ends[1]}" stroke="currentColor"/>')
        out.append(f'{rings}<circle cx="{x(mean)}" cy="{y}" r="4.5"/></g>')
    said = "; ".join(f"{title} {statistics.fmean(v):.3f} ({', '.join(f'{one:.3f}' for one in v)})" for title, v in rows)
    return page("Ablations of the toy", f"{said}.", width, bottom + 26, out)


# What all pictures share

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


def sheet(
    title: str, names: Sequence[str], panels: Sequence[Sequence[str]], said: str, *, above: int = 0, below: int = 0
) -> str:
    """A whole SVG of panels, two per row, under one key of all lines. `above`, `below`: more room for each panel."""
    columns, height = min(2, len(panels)), above + HEIGHT + below
    out, top = legend(names, columns * WIDTH)
    for i, panel in enumerate(panels):
        out += [f'<g transform="translate({i % columns * WIDTH} {top + above + i // columns * height})">', *panel, "</g>"]
    return page(title, said, columns * WIDTH, top + height * math.ceil(len(panels) / columns), out)


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


def grid(ticks: Iterable[tuple[float, str]]) -> list[str]:
    """Lines across a panel, each with its number on the left."""
    return [
        f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text class="y" x="{LEFT - 5}" y="{y + 4}">{name}</text>'
        for y, name in ticks
    ]


# The commands


def curves(keep: Pairs = (), folder: Path = DOCS / "curves") -> None:
    """Draw the learning curves of the documents from the numbers beside them.

    Args:
        keep: NAME=RUN, repeatable: take over the metrics of a run as NAME.json.
        folder: Where the numbers and the pictures lie.
    """
    for name, run in pairs("keep", keep).items():
        found = kept(Path(run))
        lines = ",\n".join(json.dumps(line) for line in found.pop("lines"))
        write_atomically(folder / f"{name}.json", f'{json.dumps(found)[:-1]}, "lines": [\n{lines}\n]}}\n')
    for picture in PICTURES:
        names = [name for members in picture.runs.values() for name in members]
        runs = {name: read_json(folder / f"{name}.json") for name in names}
        write_atomically(folder / f"{picture.name}.svg", curves_svg(picture, runs))
        print(f"drew {folder / picture.name}.svg")


def growth(rows: tyro.conf.Positional[Path], out: Path = DOCS / "speed" / "growth.svg") -> None:
    """Draw what growth costs.

    Args:
        rows: JSON lines of `tools.bench growth`.
        out: The picture.
    """
    write_atomically(out, growth_svg(read_lines(rows)))


def ablations(table: tyro.conf.Positional[Path], out: Path = DOCS / "ablations.svg") -> None:
    """Draw the rows of Table 2.

    Args:
        table: ablate.json of `tools.ablate`.
        out: The picture.
    """
    write_atomically(out, ablations_svg(read_json(table)))


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    commands: dict[str, Callable[..., None]] = {"curves": curves, "growth": growth, "ablations": ablations}
    return command(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=list(argv), description=__doc__))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
