"""What the consensus (Eqs. 11-13) did in a run: how often it changed the order of answers, and how often it was right."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
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
    "right_by_reward": "right answers ahead by reward",
    "right_by_consistency": "right answers ahead by Eq. 12",
    "right_by_consistency_alike": "right answers ahead by Eq. 12, as many emotions in both",
    "right_by_vote": "right answers ahead by vote",
    "right_by_advantage": "right answers ahead by advantage",
    "several": "answers with several emotions",
    "right_first": "right answers at the end of the first RL stage",
    "right_last": "right answers at the end of the last RL stage",
}


def consensus(run: Path) -> dict[str, float]:
    """The shares that `NAMES` names, over all groups that a run recorded. Raises `UserError` where run or data are missing.

    Gold is that of the data, or of --gold, without --label_noise. New samples have none but what the model said: they
    count for `order`, `reversed` and `several` alone.
    """
    cfg = replace(of_run(read_json(run / "config.json")), label_noise=0.0)
    found = read_samples(cfg, pairs("data", cfg.data))
    return shares([record for _, record in rollouts(run)], {s.id: s.gold for own in found.values() for s in own})


def shares(records: Sequence[Record], clean: Mapping[str, Weights]) -> dict[str, float]:
    """What `consensus` says, from rollout records and the clean gold of each original sample. Shares of nothing are 0."""
    original = [(set(r["core"]), heaviest(r["core"]), r, clean[r["sample_id"]]) for r in records if not r["depth"]]
    wrong = [heaviest(r["gold"]) != heaviest(gold) for _, _, r, gold in original]
    right = [top == heaviest(gold) for _, top, _, gold in original]
    opposed = [pair for _, _, r, gold in original for pair in right_and_wrong(r, heaviest(gold))]
    alike = [(a, b) for a, b in opposed if named(a) == named(b)]
    return {
        "order": mean(any(a != b for a, b in orders(r)) for r in records),
        "reversed": mean(any(a * b < 0 for a, b in orders(r)) for r in records),
        "on_gold": mean(right),
        "holds_gold": mean(set(gold) <= core for core, _, _, gold in original),
        "equals_gold": mean(set(gold) == core for core, _, _, gold in original),
        "wrong": mean(wrong),
        "on_gold_if_wrong": mean(r for r, w in zip(right, wrong, strict=True) if w),
        "right_by_reward": ahead(opposed, lambda a: a["reward"]),
        "right_by_consistency": ahead(opposed, lambda a: a["consistency"]),
        "right_by_consistency_alike": ahead(alike, lambda a: a["consistency"]),
        "right_by_vote": ahead(opposed, lambda a: a["votes"]),
        "right_by_advantage": ahead(opposed, lambda a: a["advantage"]),
        "several": mean(named(a) > 1 for r in records for a in valid(r)),
        "right_first": right_at_the_end(records, clean, min((r["iteration"] for r in records), default=0)),
        "right_last": right_at_the_end(records, clean, max((r["iteration"] for r in records), default=0)),
    }


def right_at_the_end(records: Sequence[Record], clean: Mapping[str, Weights], k: int) -> float:
    """Share of right answers to original samples in the second half of iteration k's RL steps; invalid ones are wrong."""
    own = [r for r in records if r["iteration"] == k]
    steps = sorted({r["step"] for r in own})
    late = [r for r in own if not r["depth"] and r["step"] in steps[len(steps) // 2 :]]
    said = [(a["parse"], heaviest(clean[r["sample_id"]])) for r in late for a in r["answers"]]
    return mean(parse["reason"] is None and heaviest(parse["last_emotions"]) == truth for parse, truth in said)


def valid(record: Record) -> list[Record]:
    """The answers of a group that keep the rule."""
    return [answer for answer in record["answers"] if answer["parse"]["reason"] is None]


def named(answer: Record) -> int:
    """How many emotions a valid answer recognises."""
    return len(answer["parse"]["last_emotions"])


def right_and_wrong(record: Record, truth: str) -> list[tuple[Record, Record]]:
    """All pairs of a right and a wrong answer of a group, valid both; each with its `votes`.

    Votes are the valid answers of the group with the same heaviest emotion: a plain majority vote, which the paper lacks.
    """
    said = [(heaviest(answer["parse"]["last_emotions"]), answer) for answer in valid(record)]
    votes = Counter(top for top, _ in said)
    right, wrong = ([{**a, "votes": votes[top]} for top, a in said if (top == truth) is side] for side in (True, False))
    return list(product(right, wrong))


def ahead(pairs: Sequence[tuple[Record, Record]], number: Callable[[Record], float]) -> float:
    """How often the first one of a pair has the greater number; a tie is half. At .5 it knows nothing of the truth."""
    return mean((number(a) > number(b)) + (number(a) == number(b)) / 2 for a, b in pairs)


def orders(record: Record) -> list[tuple[int, int]]:
    """For every pair of answers of a group: which is ahead by reward alone, which by advantage; 1, 0 (a tie) or -1."""
    both = [(answer["reward"], answer["advantage"]) for answer in record["answers"]]
    return [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in combinations(both, 2)]
