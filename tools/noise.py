"""The study `noise` of tools.ablate: does the consensus of Eqs. 11-13 help where labels are wrong?

Twelve rows: a share of 0, .2 or .4 of the training labels is wrong (--label_noise), with lambda as in the paper or 0, with
self-play or without. Runs of one seed have the same wrong labels, so they are compared seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.compare import t_interval
from analysis.consensus import NAMES
from tools.bands import Points, bands_svg

Row = tuple[str, str, tuple[str, ...]]  # name, title, flags
Numbers = Mapping[str, Any]  # the record of a row: name, seeds and, by name, the values of all seeds
RATES = (0.0, 0.2, 0.4)
SIDES = {  # name -> title, flags
    "full": ("SELF-EMO", ()),
    "no_self_grpo": ("lambda 0", ("--self_grpo", "false")),
    "no_self_play": ("no self-play", ("--self_play", "false")),
    "no_self_emo": ("lambda 0, no self-play", ("--self_grpo", "false", "--self_play", "false")),
}
EFFECTS = {  # title -> row, and the row that it is compared with
    "lambda, with self-play": ("full", "no_self_grpo"),
    "lambda, without self-play": ("no_self_play", "no_self_emo"),
    "self-play, with lambda": ("full", "no_self_play"),
    "self-play, with lambda 0": ("no_self_grpo", "no_self_emo"),
}
METRICS = {"acc": "Acc.", "iou": "IOU"}


def named(side: str, rate: float) -> str:
    """The name of a row, also of its runs' folders."""
    return f"{side}_{round(100 * rate):02d}"


def rows() -> list[Row]:
    """The twelve rows, noise by noise."""
    return [
        (named(side, rate), f"{title}, noise {rate:g}", (*flags, "--label_noise", str(rate)))
        for rate in RATES
        for side, (title, flags) in SIDES.items()
    ]


def score_names(records: Sequence[Numbers]) -> dict[str, str]:
    """Heading -> name of the test scores that rows have, averaged over datasets where there are several."""
    names = {name for record in records for name in record["scores"] if name.startswith("test/")}
    sets = sorted({name.split("/")[1] for name in names})
    one = "average" if "average" in sets else next(iter(sets), "")
    own = {s: s.removeprefix(one).replace("@", "T=") for s in sets if s.partition("@")[0] == one}
    found = {f"{title} {more}".strip(): f"test/{s}/{key}" for s, more in own.items() for key, title in METRICS.items()}
    return {heading: name for heading, name in found.items() if name in names}


def percent(number: Mapping[str, Any] | None) -> str:
    """A mean as per cent, and the sample standard deviation over seeds; a dash for None."""
    if number is None:
        return "-"
    return f"{100 * number['mean']:.1f}" + ("" if number["std"] is None else f" +- {100 * number['std']:.1f}")


def table(records: Sequence[Numbers]) -> list[list[str]]:
    """Cells of the table in per cent, the head first: test scores, then what the consensus did."""
    columns = score_names(records) | {title: f"consensus/{name}" for name, title in NAMES.items()}
    lines = [["", "seeds", *columns]]
    for record in records:
        cells = [percent(record["scores"].get(name)) for name in columns.values()]
        lines.append([record["title"], str(len(record["seeds"])), *cells])
    return lines


def by_seed(record: Numbers, name: str) -> dict[int, float]:
    """A score of a row, seed -> value."""
    return dict(zip(record["seeds"], record["scores"][name]["values"], strict=True)) if name in record["scores"] else {}


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """a - b for every seed that both have."""
    return {seed: value - b[seed] for seed, value in a.items() if seed in b}


def effects(records: Sequence[Numbers]) -> list[dict[str, Any]]:
    """What lambda and self-play change at each noise, and how much more than without noise: differences by seed.

    One entry per comparison: `title`, and by the heading of each score `values`, their `mean` and its 95 % t interval
    (`low`, `high`; None for one seed). A comparison without a common seed is left out.
    """
    known, found = {record["name"]: record for record in records}, []
    names = score_names(records)
    for title, sides in EFFECTS.items():
        changes = {rate: changed(known, sides, rate, names) for rate in RATES}
        entries = {f"{title}, noise {rate:g}": change for rate, change in changes.items()}
        for rate in RATES[1:]:
            more = {heading: difference(values, changes[0.0][heading]) for heading, values in changes[rate].items()}
            entries[f"{title}, noise {rate:g} less noise 0"] = more
        for name, entry in entries.items():
            numbers = {heading: summary(list(values.values())) for heading, values in entry.items() if values}
            found += [{"title": name, "scores": numbers}] if numbers else []
    return found


def changed(
    known: Mapping[str, Numbers], sides: tuple[str, str], rate: float, names: Mapping[str, str]
) -> dict[str, dict[int, float]]:
    """Heading -> seed -> score of the first side less that of the second, at a noise."""
    rows = [known.get(named(side, rate)) for side in sides]
    pairs = {heading: [by_seed(row, name) if row else {} for row in rows] for heading, name in names.items()}
    return {heading: difference(mine, theirs) for heading, (mine, theirs) in pairs.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values with mean and interval, as JSON has them."""
    mean, low, high = t_interval(values)
    ends = {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}
    return {"values": list(values), "mean": mean, **ends}


def effects_table(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table of effects in points of a per cent, the head first."""
    headings = list(dict.fromkeys(heading for entry in found for heading in entry["scores"]))
    lines = [["difference by seed, 95 % t interval", *headings]]
    for entry in found:
        cells = [entry["scores"].get(heading) for heading in headings]
        lines.append([entry["title"], *("-" if cell is None else signed(cell) for cell in cells)])
    return lines


def signed(number: Mapping[str, Any]) -> str:
    """A difference in points of a per cent with its interval, as +1.2 [-0.3, +2.7]."""
    mean, *ends = (
        f"{round(100 * number[name], 1) + 0.0:+.1f}" for name in ("mean", "low", "high") if number[name] is not None
    )
    return f"{mean} [{', '.join(ends)}]" if ends else mean


PANELS = ("order", "right_by_reward", "right_by_consistency", "right_by_vote")


def picture(records: Sequence[Numbers]) -> str:
    """Test scores and what the consensus did over the share of wrong labels, one line per side."""
    known = {record["name"]: record for record in records}
    panels: dict[str, Points] = {}
    for heading, name in (score_names(records) | {NAMES[name]: f"consensus/{name}" for name in PANELS}).items():
        lines: dict[str, list[tuple[float, list[float]]]] = {title: [] for title, _ in SIDES.values()}
        for side, (title, _) in SIDES.items():
            for rate in RATES:
                values = [*by_seed(known[named(side, rate)], name).values()] if named(side, rate) in known else []
                lines[title] += [(100 * rate, values)] if values else []
        panels |= {heading[0].upper() + heading[1:]: lines} if any(lines.values()) else {}
    return bands_svg("Wrong training labels: consensus and self-play", panels, "wrong training labels, %")
