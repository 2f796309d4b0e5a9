"""Panels of lines over a number, each with the 95 % t interval of its mean over seeds as a band."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from analysis.compare import t_interval
from tools.charts import BOTTOM, LEFT, RIGHT, TOP, nice_ticks
from tools.pictures import grid, sheet

Points = Mapping[str, Sequence[tuple[float, Sequence[float]]]]  # of each line: a place, and the values of all seeds there


def bands_svg(title: str, panels: Mapping[str, Points], axis: str) -> str:
    """A whole picture, from the lines of every panel by its heading. The first panel names all lines. `axis`: what x is."""
    names = list(next(iter(panels.values())))
    drawn = [band_panel(heading, names, points, axis) for heading, points in panels.items()]
    said = ". ".join(f"{heading}, over {axis}: {spoken(points)}" for heading, points in panels.items())
    return sheet(title, names, drawn, f"{said}. Each with its 95 % t interval over seeds, where there are several.")


def spoken(points: Points) -> str:
    """The means of a panel in words, with the ends of their intervals."""

    def number(values: Sequence[float]) -> str:
        mean, low, high = t_interval(values)
        return f"{mean:.3g}" if math.isnan(low) else f"{mean:.3g} ({low:.3g} to {high:.3g})"

    return "; ".join(f"{name} " + ", ".join(f"{number(v)} at {x:g}" for x, v in own) for name, own in points.items() if own)


def band_panel(heading: str, names: Sequence[str], points: Points, axis: str) -> list[str]:
    """Means with dots, and their bands behind them. Raises ValueError for a panel without a value."""
    means = {name: [(x, *t_interval(values)) for x, values in own] for name, own in points.items()}
    flat = [number for own in means.values() for _, *three in own for number in three if not math.isnan(number)]
    places = sorted({x for own in means.values() for x, *_ in own})
    ticks = nice_ticks(min(flat), max(flat))
    room = places[-1] - places[0] or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + 8 + (RIGHT - LEFT - 16) * (x - places[0]) / room
        return round(across, 1), round(BOTTOM - (BOTTOM - TOP) * (y - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    def path(found: Sequence[tuple[float, float]]) -> str:
        return " ".join("{:g},{:g}".format(*at(x, y)) for x, y in found)

    out = [f'<text class="h" x="{LEFT}" y="{TOP - 9}">{escape(heading)}</text>']
    out += grid((at(places[0], tick)[1], f"{tick:g}") for tick in ticks)
    shown = places[:: math.ceil(len(places) / 8)]
    out += [f'<text class="x" x="{at(x, ticks[0])[0]}" y="{BOTTOM + 14}">{x:g}</text>' for x in shown]
    out.append(f'<text class="x" x="{(LEFT + RIGHT) / 2:g}" y="{BOTTOM + 27}">{escape(axis)}</text>')
    for i, own in ((names.index(name), own) for name, own in means.items() if own):
        out.append(f'<g class="c{i % 5}">')
        if not any(math.isnan(low) for *_, low, _ in own):
            edge = [(x, high) for x, _, _, high in own] + [(x, low) for x, _, low, _ in reversed(own)]
            out.append(f'<polygon points="{path(edge)}" fill="currentColor" opacity=".13"/>')
        out.append(f'<polyline points="{path([(x, mean) for x, mean, *_ in own])}"/>')
        out += ['<circle cx="{:g}" cy="{:g}" r="3"/>'.format(*at(x, mean)) for x, mean, *_ in own] + ["</g>"]
    return out
