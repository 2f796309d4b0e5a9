"""What a run logs, as pure functions: of the rollout records it wrote, of its optimizer steps, of its new samples."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from common.text import small, words
from data import KEYS, Sample, heaviest
from grpo import iou, low_var_kl

Record = Mapping[str, Any]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else 0.0


def means(rows: Sequence[Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """Mean of every name over rows that all have it."""
    return {prefix + name: mean(row[name] for row in rows) for name in (rows[0] if rows else ())}


def rollout_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Everything about a step that its records say: rewards, consensus, rule, answers, selection."""
    answers = [a for r in records for a in r["answers"]]
    origins = {o: [a["reward"] for r in records if r["origin"] == o for a in r["answers"]] for o in ORIGINS}
    valid = [a["parse"] for a in answers if a["parse"]["reason"] is None]
    failed = Counter(a["parse"]["reason"] for a in answers if a["parse"]["reason"] is not None)
    shares = [[w / sum(p["last_emotions"].values()) for w in p["last_emotions"].values()] for p in valid]
    named, gold = Counter(heaviest(p["last_emotions"]) for p in valid), Counter(heaviest(r["gold"]) for r in records)
    return {
        "reward/mean": mean(a["reward"] for a in answers),
        **{f"reward/{origin}": mean(rewards) for origin, rewards in origins.items() if rewards},
        "reward/iou": mean(iou(a["parse"]["last_emotions"], r["gold"]) if a["parse"]["reason"] is None else 0.0
                           for r in records for a in r["answers"]),
        "reward/acc": mean(heaviest(a["parse"].get("last_emotions", {})) == heaviest(r["gold"])
                           for r in records for a in r["answers"]),
        "reward/zero_std": mean(all_equal(r, "reward") for r in records),
        "consistency/mean": mean(a["consistency"] for a in answers),
        "consistency/zero_std": mean(all_equal(r, "consistency") for r in records),
        "consistency/core_on_gold": mean(heaviest(r["core"]) == heaviest(r["gold"]) for r in records),
        "rule/rate": len(valid) / len(answers),
        **{f"rule/{reason}": n / len(answers) for reason, n in failed.items()},
        "answer/in_order": mean(tuple(parse)[-len(KEYS):] == KEYS for parse in valid),
        "answer/entries": mean(map(len, shares)),
        "answer/min_share": mean(map(min, shares)),
        "answer/top_emotion": max(named.values(), default=0) / max(1, len(valid)),
        "gold/top_emotion": max(gold.values()) / len(records),
        "answer/tokens": mean(len(a["ids"]) for a in answers),
        "answer/truncated": mean(not a["finished"] for a in answers),
        **keep_metrics(records),
    }


ORIGINS = ("original", "synthetic")


def keep_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Share of groups whose best answer was kept: over all, per gold label, depth and origin (D11)."""
    kept = [("buffer/keep_rate", r["selected"] is not None) for r in records]
    for r in records:
        for name in (f"label/{heaviest(r['gold'])}", f"depth/{r['depth']}", f"origin/{r['origin']}"):
            kept.append((f"buffer/keep_rate/{name}", r["selected"] is not None))
    names = sorted({name for name, _ in kept})
    depths = Counter(r["depth"] for r in records)
    return {name: mean(yes for n, yes in kept if n == name) for name in names} | {
        f"buffer/depth/{depth}": n / len(records) for depth, n in sorted(depths.items())
    }


def all_equal(record: Record, name: str) -> bool:
    """Whether all answers of a group got the same value: its term of Eq. 13 is then 0."""
    return len({a[name] for a in record["answers"]}) == 1


def added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Measurements of micro-batches as those of their mini-batch: sums over token weights, and `ratio/max` a maximum."""
    return {
        name: max(p[name] for p in parts) if name == "ratio/max" else math.fsum(p[name] for p in parts) for name in parts[0]
    }


def update_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mini-batches of one RL step: means (and the largest ratio), and ratio and clipping one by one.

    The first mini-batch has ratio 1 and nothing clipped: the policy has not moved since it was measured.
    """
    values: dict[str, Any] = means(parts)
    values["ratio/max"] = max(p["ratio/max"] for p in parts)
    for name in ("ratio/mean", "ratio/max", "clip_frac"):
        values[f"{name}/by_mini_batch"] = [p[name] for p in parts]
    return values


def logprob_metrics(old_N: Tensor, ref_N: Tensor, rollout: Sequence[Sequence[float]]) -> dict[str, float]:
    """KL of the policy to its reference before the update (k3, nats per token), and the gap between sampler and policy.

    `old_N`, `ref_N`: log-probs of the tokens of all answers in one row; `rollout`: those of the sampler by answer.
    """
    gap_N = (old_N - old_N.new_tensor([x for row in rollout for x in row])).abs()
    return {
        "policy/kl": kl(old_N, ref_N),
        "rollout/logp_gap_mean": gap_N.mean().item(),
        "rollout/logp_gap_max": gap_N.max().item(),
    }


def kl(old_N: Tensor, other_N: Tensor) -> float:
    """Mean k3 estimate of KL(policy || other) over the tokens of answers that the policy sampled."""
    return low_var_kl(old_N, other_N).mean().item()


def buffer_metrics(children: Sequence[Sample], originals: Sequence[Sample]) -> dict[str, float]:
    """What an iteration's new samples look like: labels against those of D0, and how alike their replies are."""
    if not children:
        return {"new/samples": 0}
    replies = [child.context[-1].text for child in children]
    labels, before = label_mass(children), label_mass(originals)
    lines = [words(small(reply)) for reply in replies]
    bigrams = [pair for line in lines for pair in zip(line, line[1:], strict=False)]
    return {
        "new/samples": len(children),
        "new/label_entropy": entropy(labels),
        "new/label_js": js_distance(labels, before),
        "new/top_reply": Counter(replies).most_common(1)[0][1] / len(replies),
        "new/distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
        "new/reply_words": mean(map(len, lines)),
        "new/names_label": mean(
            any(label in small(reply) for label in child.gold) for child, reply in zip(children, replies, strict=True)
        ),
    }


def label_mass(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of each emotion in the gold of samples, each sample with the same say."""
    mass: Counter[str] = Counter()
    for sample in samples:
        total = math.fsum(sample.gold.values())
        for emotion, weight in sample.gold.items():
            mass[emotion] += weight / total / len(samples)  # type: ignore[assignment]
    return dict(mass)


def entropy(shares: Mapping[str, float]) -> float:
    """Entropy in nats."""
    return -math.fsum(p * math.log(p) for p in shares.values() if p > 0)


def js_distance(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """Jensen-Shannon distance, 0 (equal) to 1 (disjoint): the root of the divergence in bits."""
    middle = {e: (p.get(e, 0.0) + q.get(e, 0.0)) / 2 for e in p.keys() | q.keys()}
    divergence = entropy(middle) - (entropy(p) + entropy(q)) / 2
    return math.sqrt(max(divergence, 0.0) / math.log(2))


def progress_line(t: int, T: int, values: Mapping[str, Any]) -> str:
    """What a person wants to see of an RL step."""
    shown = [f"{short} {values[name]:.3g}" for short, name in SHOWN.items() if name in values]
    return f"step {t + 1}/{T}  {'  '.join(shown)}"


SHOWN: Mapping[str, str] = {
    "reward": "reward/mean", "iou": "reward/iou", "acc": "reward/acc", "consistency": "consistency/mean",
    "rule": "rule/rate", "entropy": "policy/entropy", "kl": "policy/kl", "clip": "clip_frac",
    "tokens/s": "rollout/tokens_per_s",
}  # fmt: skip
