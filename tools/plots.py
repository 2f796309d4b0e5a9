"""The pictures of docs/speed.md and of the ablations: what growth costs, and how rows of Table 2 compare, as SVG.

    python -m tools.plots --growth docs/speed/growth.jsonl     rows of tools.bench growth
    python -m tools.plots --ablate runs/ablate/ablate.json     the table of tools.ablate

Style and key are those of tools.curves; next to them the numbers stand as text.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import tyro

from common.errors import UserError, command
from common.files import Record, read_json, read_lines, write_atomically
from tools.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, nice_ticks
from tools.curves import legend, page

DOCS = Path(__file__).resolve().parent.parent / "docs"
AXES = {
    "prompts": "prompts",
    "n": "answers to a prompt",
    "prompt_tokens": "tokens of a prompt",
    "max_new_tokens": "tokens of an answer",
    "kv_mib": "MiB for keys and values",
}
ACC = "test/toy/acc"
MEMORY = ("prompts", "kv_mib")  # axes that also get a panel of memory
Points = Mapping[str, Sequence[tuple[float, float]]]  # of each side


@dataclass(frozen=True)
class Plots:
    """Draw the pictures of speed and ablations."""

    growth: str = ""
    """JSON lines of `tools.bench growth`, drawn as docs/speed/growth.svg."""
    ablate: str = ""
    """ablate.json of `tools.ablate`, drawn as docs/ablations.svg."""
    folder: Path = DOCS
    """Where pictures go."""


def growth(rows: Sequence[Record]) -> str:
    """Panels of tokens/s, and of memory where it matters, over each axis that grows; one line a side."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    panels = []
    for axis, words in AXES.items():
        own = [row for row in rows if row["workload"]["name"].rpartition("-")[0] == axis]
        measures = {"tokens_per_s": "tokens/s", **({"peak_mib": "peak memory, MiB"} if axis in MEMORY else {})}
        for measure, unit in measures.items() if own else ():
            points = {s: [(r["workload"][axis], r[measure]) for r in own if r["side"] == s] for s in sides}
            panels.append((f"{unit}, over {words}", points))
    if not panels:
        raise UserError("no row of growth: give what `python -m tools.bench growth --out FILE` wrote")
    return drawing("What growth costs", sides, panels)


def drawing(title: str, names: Sequence[str], panels: Sequence[tuple[str, Points]]) -> str:
    """Panels, two a row, under one key."""
    keys, top = legend(names, 2 * WIDTH)
    height = top + HEIGHT * math.ceil(len(panels) / 2)
    out = []
    for i, (heading, points) in enumerate(panels):
        out.append(f'<g transform="translate({i % 2 * WIDTH} {top + i // 2 * HEIGHT})">')
        out += [*panel(heading, names, points), "</g>"]
    said = ". ".join(f"{heading}: {spoken(points)}" for heading, points in panels)
    return page(title, f"{said}.", 2 * WIDTH, height, [*keys, *out])


def panel(heading: str, names: Sequence[str], points: Points) -> list[str]:
    """Lines over a logarithmic axis, from 0 upwards."""
    places = sorted({x for own in points.values() for x, _ in own})
    ticks = nice_ticks(0, max(y for own in points.values() for _, y in own))
    low, high = math.log(places[0]), math.log(places[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        along = (math.log(x) - low) / (high - low) if high > low else 0.5
        return round(LEFT + 8 + (RIGHT - LEFT - 16) * along, 1), round(BOTTOM - (BOTTOM - TOP) * y / ticks[-1], 1)

    out = [f'<text class="h" x="{LEFT}" y="{TOP - 9}">{escape(heading)}</text>']
    for tick in ticks:
        y = at(places[0], tick)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text class="y" x="{LEFT - 5}" y="{y + 4}">{tick:g}</text>')
    out += [f'<text class="x" x="{at(place, 0)[0]}" y="{BOTTOM + 14}">{place:,}</text>' for place in places]
    for i, name in enumerate(names):
        drawn = [at(x, y) for x, y in points[name]]
        line = " ".join(f"{x:g},{y:g}" for x, y in drawn)
        dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="3"/>' for x, y in drawn)
        out.append(f'<g class="c{i % 5}"><polyline points="{line}"/>{dots}</g>')
    return out


def spoken(points: Points) -> str:
    """The numbers of a panel in words."""
    return "; ".join(f"{name} " + ", ".join(f"{y:,.0f} at {x:,}" for x, y in own) for name, own in points.items() if own)


def ablations(table: Record) -> str:
    """One line a row of Table 2: every seed as a ring, their mean as a dot, one sample standard deviation to each side."""
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


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def work() -> None:
        args = tyro.cli(Plots, args=list(argv), use_underscores=True)
        if not (args.growth or args.ablate):
            raise UserError("give --growth FILE or --ablate FILE")
        if args.growth:
            write_atomically(args.folder / "speed" / "growth.svg", growth(read_lines(Path(args.growth))))
        if args.ablate:
            write_atomically(args.folder / "ablations.svg", ablations(read_json(Path(args.ablate))))

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
