"""Two systems on the same samples, or two sides of a pair: exact tests, bootstrap and t intervals."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import Record, read_lines
from data import Sample

Built = TypeVar("Built")


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of so uneven a split if both were equally likely; 1 where nothing was decided."""
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2 ** (wins + losses)))


def interval(wins: int, losses: int, rest: int, *, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of (wins - losses)/all; a pair counts +1, -1 or 0, so drawing n is one multinomial draw."""
    n = wins + losses + rest
    counts = np.random.default_rng(seed).multinomial(n, [wins / n, losses / n, rest / n], size=draws)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[int, int, float]:
    """(only a right, only b right, exact two-sided p) of two systems on the same samples; p = 1 without a difference."""
    pairs = Counter(zip(correct_a, correct_b, strict=True))
    b, c = pairs[True, False], pairs[False, True]
    return b, c, sign_test(b, c)


def paired_interval(
    correct_a: Sequence[bool], correct_b: Sequence[bool], *, seed: int = 0, draws: int = 10_000
) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b and its 95 % bootstrap interval over pairs: (difference, low, high)."""
    b, c, _ = mcnemar(correct_a, correct_b)
    n = len(correct_a)
    return (b - c) / n, *interval(b, c, n - b - c, seed=seed, draws=draws)


def f1_scores(counts_DC: NDArray[Any], gold_C: Sequence[str], pred_C: Sequence[str | None]) -> NDArray[Any]:
    """Accuracy, weighted and macro F1 of D sets of samples at once, (D, 3), as evaluate.py computes them one by one.

    `counts_DC`: how many samples of each set are of kind c, with gold `gold_C[c]` and prediction `pred_C[c]`.
    """
    names = sorted({*gold_C, *pred_C} - {None}, key=str)
    gold_CK, pred_CK = (np.array([[x == name for name in names] for x in side], float) for side in (gold_C, pred_C))
    real_DK, named_DK, hit_DK = counts_DC @ gold_CK, counts_DC @ pred_CK, counts_DC @ (gold_CK * pred_CK)
    f1_DK, n_D = 2 * hit_DK / np.maximum(real_DK + named_DK, 1), counts_DC.sum(-1)
    macro_D = f1_DK.sum(-1) / (real_DK + named_DK > 0).sum(-1)
    return np.stack([hit_DK.sum(-1) / n_D, (real_DK * f1_DK).sum(-1) / n_D, macro_D], -1)


def f1_differences(
    gold: Sequence[str], a: Sequence[str | None], b: Sequence[str | None], *, seed: int = 0, draws: int = 10_000
) -> list[tuple[float, float, float]]:
    """Accuracy, weighted and macro F1 of a minus those of b, each with its 95 % bootstrap interval over the samples.

    Samples of the same gold and predictions are alike, so drawing all n again is one multinomial draw.
    """
    (gold_C, a_C, b_C), n_C = zip(*(kinds := Counter(zip(gold, a, b, strict=True))), strict=True), [*kinds.values()]
    drawn_DC = np.random.default_rng(seed).multinomial(len(gold), np.array(n_C) / len(gold), size=draws)
    counts_DC = np.vstack([n_C, drawn_DC])
    difference_D3 = f1_scores(counts_DC, gold_C, a_C) - f1_scores(counts_DC, gold_C, b_C)
    ends_23 = np.quantile(difference_D3[1:], [0.025, 0.975], axis=0)
    return [(float(x), float(low), float(high)) for x, low, high in zip(difference_D3[0], *ends_23, strict=True)]


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few independent values, such as differences by seed, and its 95 % t interval: (mean, low, high).

    NaN for the ends of the interval of fewer than two values.
    """
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = t_quantile(n - 1) * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def t_quantile(freedom: int, share: float = 0.95, parts: int = 20_000) -> float:
    """The x for which Student's t lies between -x and x with probability `share`.

    With x = sqrt(freedom) tan(a) its density is cos(a)^(freedom - 1), which is summed up to the share of what there is.
    """
    angles = (np.arange(parts) + 0.5) * (math.pi / 2 / parts)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    return float(math.sqrt(freedom) * np.tan(np.interp(share * mass[-1], mass, angles + math.pi / 4 / parts)))


def scored_rows(path: Path, build: Callable[[Record], Built]) -> list[Built]:
    """What `build` makes of the rows that evaluate.py score --out wrote. Raises `UserError` for any other file."""
    try:
        found = [build(row) for row in read_lines(path)]
    except (LookupError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} does not hold answers of evaluate.py score --out: {error}") from None
    if not found:
        raise UserError(f"{path} is missing or empty: give what evaluate.py score --out wrote")
    return found


def read_baseline(path: Path, datasets: Mapping[str, Sequence[Sample]]) -> dict[str, bool]:
    """Sample id -> right or wrong, from another model's --out. Raises `UserError` if a sample is missing in it."""
    correct = dict(scored_rows(path, lambda row: (row["id"], row["correct"] is True)))
    missing = [sample.id for samples in datasets.values() for sample in samples if sample.id not in correct]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} samples, the first {missing[0]}: score both on the same --data")
    return correct


def baseline_dates(path: Path) -> set[str]:
    """The dates that the prompts of another model's --out show; none where its chat template shows none."""
    return {str(date) for date in scored_rows(path, lambda row: row.get("date")) if date is not None}


def compared(ours: Sequence[bool], theirs: Sequence[bool], seed: int) -> dict[str, float]:
    """The paired comparison of two systems that were right or wrong on the same samples."""
    names = ("only_this", "only_baseline", "mcnemar_p", "acc_difference", "low", "high")
    return dict(zip(names, (*mcnemar(ours, theirs), *paired_interval(ours, theirs, seed=seed)), strict=True))
