"""Line charts as numbers: where lines, ticks and stages lie in the SVG that tools.report and tools.pictures draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.files import Record

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 408, 24, 214  # the plot within the drawing
MOST = 200  # points of a line; longer ones are averaged


@dataclass(frozen=True)
class Stage:
    """A stage of the run along the time axis, both ends in its units."""

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class Timeline:
    """The time axis: the RL steps of every iteration, and a slot for each fine-tuning, which has no RL steps."""

    steps: int  # S, RL steps per iteration
    iterations: int  # K

    @property
    def slot(self) -> float:
        """Width of a fine-tuning, in RL steps."""
        return 0.4 * self.steps

    @property
    def length(self) -> float:
        """Of the whole axis."""
        return self.iterations * self.steps + (self.iterations + 1) * self.slot

    def rl(self, iteration: int, step: float) -> float:
        """Where RL step `step` (counted through the run) of an iteration lies."""
        return step + iteration * self.slot

    def evaluation(self, when: str, iteration: int, step: int) -> float:
        """Where an evaluation lies, by its own words."""
        if when == "start":
            return 0.0
        if when == "after the cold start":
            return self.slot
        done, _, number = when.removeprefix("after ").partition(" ")
        return self.rl(int(number) + 1 if done == "SFT" else iteration, step)

    def place(self, line: Record) -> float:
        """Where a line of metrics lies; an RL step in the middle of its stretch."""
        if line["phase"] == "rl":
            return self.rl(line["iteration"], line["step"] + 0.5)
        return self.evaluation(line["when"], line["iteration"], line["step"])

    def stages(self) -> list[Stage]:
        """Cold start, then RL and fine-tuning of every iteration."""
        found = [Stage("cold", 0.0, self.slot)]
        for k in range(1, self.iterations + 1):
            first, last = self.rl(k, (k - 1) * self.steps), self.rl(k, k * self.steps)
            found += [Stage(f"RL {k}", first, last), Stage(f"SFT {k}", last, last + self.slot)]
        return found

    def ticks(self) -> list[tuple[float, str]]:
        """The RL steps done at the start of the run and at the end of every iteration; the next one starts with as many."""
        ends = [(1, 0), *((k, k * self.steps) for k in range(1, self.iterations + 1))]
        return [(self.rl(k, step), str(step)) for k, step in ends]


@dataclass(frozen=True)
class Series:
    """One line: its name, and a value at each place of the chart, None where it has none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Chart:
    """What a chart shows, before it has a size: places on the time axis with their names, and lines over them.

    `parts`: one number per place; a line is not drawn between places of different parts.
    """

    id: str
    title: str
    text: str
    places: tuple[float, ...]
    names: tuple[str, ...]
    parts: tuple[int, ...]
    series: tuple[Series, ...]
    unit: str = ""  # what the upright axis counts

    @classmethod
    def over_time(
        cls, key: str, title: str, text: str, lines: Sequence[Record], series: Sequence[Series], time: Timeline
    ) -> "Chart":
        """A chart over lines of metrics, RL steps or evaluations. The RL steps of two iterations are never joined."""
        words = (line.get("when", f"step {line['step'] + 1}") for line in lines)
        parts = (line["iteration"] * (line["phase"] == "rl") for line in lines)
        return cls(key, title, text, tuple(map(time.place, lines)), tuple(words), tuple(parts), tuple(series))

    def rows(self) -> list[list[str]]:
        """The same as a table: one line per place where something was measured."""
        columns = zip(*(s.values for s in self.series), strict=True)
        return [
            [name, *("" if v is None else f"{v:.4g}" for v in values)]
            for name, values in zip(self.names, columns, strict=True)
            if any(v is not None for v in values)
        ]

    def spoken(self) -> str:
        """The chart in a sentence: where each line begins and ends, its least and its greatest value."""
        lines = []
        for s in self.series:
            values = [v for v in s.values if v is not None]
            ends = f"{s.name} goes from {values[0]:.3g} to {values[-1]:.3g}"
            lines.append(f"{ends}, between {min(values):.3g} and {max(values):.3g}" if len(values) > 2 else ends)
        return f"{self.text} {'; '.join(lines)}."


@dataclass(frozen=True)
class Line:
    """One drawn line: points in the drawing, part by part, and what each says where there are few enough to point at."""

    name: str
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Drawing:
    """A chart with its places in the drawing."""

    chart: Chart
    lines: tuple[Line, ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    stages: tuple[tuple[float, float, str], ...]  # left, width, name; no name where it would not fit


def draw(chart: Chart, time: Timeline) -> Drawing:
    """Fit a chart into its drawing. Raises ValueError for a chart without a value."""
    chart = thinned(chart)
    values = [v for s in chart.series for v in s.values if v is not None]
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(place: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * place / time.length, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    lines = []
    for s in chart.series:
        points = list(zip(chart.parts, chart.places, chart.names, s.values, strict=True))
        dots = [(x(place), y(v), f"{s.name}, {name}: {v:.4g}") for _, place, name, v in points if v is not None]
        paths = (
            " ".join(f"{x(place):g},{y(v):g}" for own, place, _, v in points if own == part and v is not None)
            for part in dict.fromkeys(chart.parts)
        )
        lines.append(Line(s.name, tuple(filter(None, paths)), tuple(dots) if len(dots) <= 60 else ()))
    stages = [(x(s.first), round(x(s.last) - x(s.first), 1), s.name) for s in time.stages()]
    return Drawing(
        chart, tuple(lines), tuple((y(tick), f"{tick:.10g}") for tick in ticks),
        tuple((x(place), name) for place, name in time.ticks()),
        tuple((left, width, name if width >= 5.5 * len(name) else "") for left, width, name in stages),
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances around low to high, at most seven; from 0 if low is in the lower half of high."""
    if 0 <= low <= high / 2:
        low = 0.0
    if high - low < 1e-9:
        low, high = low - abs(low) / 10 - 1e-3 * (low != 0), high + abs(high) / 10 + 1e-3
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(chart: Chart) -> Chart:
    """A chart of at most `MOST` places: neighbours averaged, each named by the first and the last of them."""
    size = math.ceil(len(chart.places) / MOST)
    if size <= 1:
        return chart
    parts = [slice(i, i + size) for i in range(0, len(chart.places), size)]
    ends = [(chart.names[part][0], chart.names[part][-1]) for part in parts]
    return replace(
        chart,
        text=f"{chart.text} Each point is the mean of {size} steps.",
        places=tuple(sum(chart.places[part]) / len(chart.places[part]) for part in parts),
        names=tuple(a if a == b else f"{a} to {b}" for a, b in ends),
        parts=tuple(chart.parts[part][0] for part in parts),
        series=tuple(Series(s.name, tuple(average(s.values[part]) for part in parts)) for s in chart.series),
    )


def average(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there."""
    found = [v for v in values if v is not None]
    return math.fsum(found) / len(found) if found else None
