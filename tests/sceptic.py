"""Eqs. 8-13 once more, by somebody who trusts nobody: only the standard library, only the file of `audit --csv`."""

import csv
import statistics
import sys

Row = dict[str, str]


def shares(row: Row, kind: str, labels: list[str]) -> dict[str, float]:
    raw = {e: float(row[f"{kind} {e}"]) for e in labels if row[f"{kind} {e}"]}
    return {e: raw[e] / sum(raw.values()) for e in raw}


def z(values: list[float]) -> list[float]:
    return [(x - statistics.mean(values)) / (statistics.stdev(values) + 1e-6) for x in values]


def mistakes(path: str) -> list[tuple[str, ...]]:
    """(step, sample, answer, what is written otherwise) of every number that a group does not add up to."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = [name[5:] for name in rows[0] if name.startswith("gold ")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    found: list[tuple[str, ...]] = []
    for row in rows:
        groups.setdefault((row["step"], row["group"], row["lam"]), []).append(row)
    for (step, _, lam), part in groups.items():
        gold, says = shares(part[0], "gold", labels), [shares(row, "says", labels) for row in part]
        mass = {e: sum(s.get(e, 0) for s in says) for e in labels}
        named = {e: n for e in labels if (n := sum(e in s for s in says))}
        core = sorted(named, key=lambda e: (-round(mass[e], 9), -named[e], e))[:3]
        overlap = [sum(min(s.get(e, 0), gold.get(e, 0)) for e in labels) for s in says]  # the larger ones: 2 less that
        r = [round(o / (2 - o) + 0.1, 12) if row["rule"] == "1" else 0.0 for o, row in zip(overlap, part, strict=True)]
        r2 = [sum(e in s for e in core) / 3 for s in says]
        A = [a + float(lam) * b for a, b in zip(z(r), z(r2), strict=True)]
        for row, *numbers in zip(part, r, r2, A, strict=True):
            for name, value in zip(("reward", "consistency", "advantage"), numbers, strict=True):
                if abs(float(row[name]) - value) > 1e-6:
                    found.append((step, row["sample_id"], row["answer"], name))
    return found


if __name__ == "__main__":
    print(*mistakes(sys.argv[1]), sep="\n")
