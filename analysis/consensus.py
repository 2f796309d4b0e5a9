"""What the consensus (Eqs. 11-13) did in a run: how often it changed the order of answers, and how often it was right."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from analysis.audit import rollouts
from common.files import Record, read_json
from common.flags import pairs
from corpora.dialogue import Weights
from data import heaviest
from training.config import of_run
from training.metrics import mean
from training.task import read_samples

NAMES: Mapping[str, str] = {
    "order": "Eq. 12 changes the order",
    "reversed": "Eq. 12 reverses a pair",
    "on_gold": "consensus on clean gold",
    "holds_gold": "clean gold in consensus",
    "equals_gold": "consensus equals clean gold",
    "wrong": "groups with a wrong label",
    "on_gold_if_wrong": "consensus on clean gold where the label is wrong",
}


def consensus(run: Path) -> dict[str, float]:
    """The shares that `NAMES` names, over all groups that a run recorded. Raises `UserError` where run or data are missing.

    Gold is that of the data without --label_noise. New samples have none but what the model said: they count for `order` and
    `reversed` alone.
    """
    cfg = replace(of_run(read_json(run / "config.json")), label_noise=0.0)
    found = read_samples(cfg, pairs("data", cfg.data))
    return shares([record for _, record in rollouts(run)], {s.id: s.gold for own in found.values() for s in own})


def shares(records: Sequence[Record], clean: Mapping[str, Weights]) -> dict[str, float]:
    """What `consensus` says, from rollout records and the clean gold of each original sample. Shares of nothing are 0."""
    original = [(set(r["core"]), heaviest(r["core"]), r, clean[r["sample_id"]]) for r in records if not r["depth"]]
    wrong = [heaviest(r["gold"]) != heaviest(gold) for _, _, r, gold in original]
    right = [top == heaviest(gold) for _, top, _, gold in original]
    return {
        "order": mean(any(a != b for a, b in orders(r)) for r in records),
        "reversed": mean(any(a * b < 0 for a, b in orders(r)) for r in records),
        "on_gold": mean(right),
        "holds_gold": mean(set(gold) <= core for core, _, _, gold in original),
        "equals_gold": mean(set(gold) == core for core, _, _, gold in original),
        "wrong": mean(wrong),
        "on_gold_if_wrong": mean(r for r, w in zip(right, wrong, strict=True) if w),
    }


def orders(record: Record) -> list[tuple[int, int]]:
    """For every pair of answers of a group: which is ahead by reward alone, which by advantage; 1, 0 (a tie) or -1."""
    both = [(answer["reward"], answer["advantage"]) for answer in record["answers"]]
    return [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in combinations(both, 2)]
