"""What a reader of a run should stop at: each check looks at the RL lines of metrics.jsonl and says what it found and means.

"Early" and "late" are means over the first and the last fifth of the RL steps. Limits are rules of thumb; docs/runs.md says
what else to look at, docs/curves.md shows runs that raise them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.metrics import mean

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Alarm:
    """One check: whether it is raised, what was measured, and what that means."""

    title: str
    raised: bool
    found: str
    meaning: str


def alarms(lines: Lines) -> list[Alarm]:
    """All checks of a run's RL lines, those raised first; none of a run without an RL step."""
    checks = (
        loss, truncation, rule, zero_reward, zero_consistency, consensus, padding, one_emotion, entropy, synthetic, clipping
    )  # fmt: skip
    return sorted((check(lines) for check in checks), key=lambda alarm: not alarm.raised) if lines else []


def early(lines: Lines, name: str) -> float:
    """Mean over the first fifth of the lines that have it; 0 if none has."""
    values = [line[name] for line in lines if name in line]
    return mean(values[: max(1, len(values) // 5)])


def late(lines: Lines, name: str) -> float:
    """The same over the last fifth."""
    return early(lines[::-1], name)


def moved(lines: Lines, name: str) -> str:
    """Early and late value in words."""
    return f"{early(lines, name):.3g} early, {late(lines, name):.3g} late"


def loss(lines: Lines) -> Alarm:
    """A loss of 0 is no fault; log-probs that are not the sampler's, or no gradient where rewards differ, are."""
    ratios = [line["ratio/mean/by_mini_batch"][0] for line in lines]
    off = max(abs(ratio - 1) for ratio in ratios)
    gap = max(line.get("rollout/logp_gap_mean", 0.0) for line in lines)
    still = sum(line["grad_norm"] == 0 and min(line["reward/zero_std"], line["consistency/zero_std"]) < 1 for line in lines)
    first = lines[0]
    return Alarm(
        "The loss is near 0 and the first ratio is 1",
        off > 0.01 or gap > 0.1 or still > 0,
        f"step {first['step']}: loss {first['loss/policy']:.3g}, gradient norm {first['grad_norm']:.3g}; the first update "
        f"of a step has a ratio at most {off:.1g} away from 1; log-probs differ from the sampler's by {gap:.1g} nats on "
        f"average at most; steps without a gradient although answers differ: {still}",
        "This is as it should be. Before the first update the policy has not moved since its log-probs were measured, so "
        "every ratio is 1 and nothing is clipped. The advantages of a group sum to 0 (Eq. 13), so the loss is 0 but for "
        "the lengths of the answers. Its gradient is not 0: it raises answers with a positive advantage and lowers the "
        "others. Watch rewards and evaluations, not the loss. It would be a fault if sampler and training disagreed (raised "
        "above .1 nats a token) or the gradient were 0 while answers differ.",
    )


def truncation(lines: Lines) -> Alarm:
    """Answers cut at the limit."""
    return Alarm(
        "Answers cut off",
        max(early(lines, "answer/truncated"), late(lines, "answer/truncated")) > 0.1,
        f"share of answers cut at the limit: {moved(lines, 'answer/truncated')}; of the loss weight: "
        f"{moved(lines, 'loss/weight_truncated')}; mean length {moved(lines, 'answer/tokens')} tokens",
        "A cut answer breaks the rule, earns 0, and its tokens are still trained (D20). Many of them teach the model to "
        "be brief, whatever it says; after that none is cut any more, and nothing else shows it. Raise max_new_tokens, or "
        "cold start so that answers end. Raised above a tenth, early or late.",
    )


def rule(lines: Lines) -> Alarm:
    """Answers that keep the rule."""
    reasons = sorted({n for line in lines for n in line if n.startswith("rule/") and n != "rule/rate"})
    shares = {name.removeprefix("rule/"): mean(line.get(name, 0.0) for line in lines) for name in reasons}
    most = ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1])[:3])
    return Alarm(
        "The rule is broken",
        late(lines, "rule/rate") < 0.5,
        f"share of answers that keep the rule: {moved(lines, 'rule/rate')}; most frequent slips: {most or 'none'}",
        "An answer that breaks the rule earns nothing, whatever it recognised (Eq. 8). While most do, the reward teaches "
        "the format and little else. Take cold_start dataset, or allow longer answers. Raised below one half.",
    )


def zero_reward(lines: Lines) -> Alarm:
    """Groups that teach nothing."""
    return Alarm(
        "Groups whose answers all earn the same",
        late(lines, "reward/zero_std") > 0.9,
        f"share of such groups: {moved(lines, 'reward/zero_std')}",
        "An advantage compares an answer with its group. Where all earn the same, all right or all wrong, the first term "
        "of Eq. 13 is exactly 0 and the group teaches nothing but consistency. Some is normal and grows with skill. "
        "Raised above nine tenths: harder data, more answers a prompt, or an earlier stop.",
    )


def zero_consistency(lines: Lines) -> Alarm:
    """Eq. 12 without effect."""
    return Alarm(
        "Groups without a difference in consistency",
        late(lines, "consistency/zero_std") > 0.9,
        f"share of such groups: {moved(lines, 'consistency/zero_std')}",
        "Where all answers of a group name equally many core emotions, the second term of Eq. 13 is 0 and SELF-GRPO is "
        "plain GRPO. With one label a sample as gold and one emotion an answer that is nearly always so (D14). Raised "
        "above nine tenths.",
    )


def consensus(lines: Lines) -> Alarm:
    """More agreement, less truth."""
    agree, right = "consistency/mean", "consistency/core_on_gold"
    return Alarm(
        "The group agrees on the wrong emotion",
        late(lines, right) < early(lines, right) - 0.1 and late(lines, agree) >= early(lines, agree),
        f"groups whose consensus has the gold emotion in front: {moved(lines, right)}; consistency: {moved(lines, agree)}",
        "Eq. 12 pays for agreeing with the group, true or not, and lambda gives that more and more weight. If agreement "
        "holds or rises while the consensus leaves gold, the group talks itself into something (PAPER.md works an example "
        "out). Stop earlier, or compare with self_grpo false. Raised when the second falls by more than a tenth.",
    )


def padding(lines: Lines) -> Alarm:
    """More emotions an answer, each with less."""
    entries, least = "answer/entries", "answer/min_share"
    return Alarm(
        "Answers list more emotions than they mean",
        late(lines, entries) > early(lines, entries) + 0.2 and late(lines, least) < early(lines, least),
        f"recognised emotions an answer: {moved(lines, entries)}; smallest share among them: {moved(lines, least)}; lambda "
        f"{early(lines, 'lam'):.2f} to {late(lines, 'lam'):.2f}",
        "An answer that names one more core emotion, with a small weight, loses little IOU and gains a third of Eq. 12. "
        "From some lambda on that pays (PAPER.md has the arithmetic). The floor of 0.1 a weight (D8) makes it dearer, not "
        "impossible. Raised when answers have 0.2 entries more and their smallest share falls.",
    )


def one_emotion(lines: Lines) -> Alarm:
    """The majority class for every prompt."""
    said, true = "answer/top_emotion", "gold/top_emotion"
    found = (
        f"share of the emotion that is named most, among valid answers: {moved(lines, said)}; of the most frequent gold "
        f"label among prompts: {moved(lines, true)}"
    )
    return Alarm(
        "Most answers name one emotion",
        late(lines, said) > max(0.75, late(lines, true) + 0.25),
        found if any(said in line for line in lines) else "not measured: the run is of an earlier version",
        "The most frequent label is right more often than any other guess, so its answers win in most groups, whatever was "
        "said. Once all answers of a group name it, they earn the same and nothing leads away again. Accuracy may have "
        "risen; macro F1 shows it. Stop earlier, cold start better, or draw the labels evenly. Raised above three "
        "quarters, and a quarter above gold.",
    )


def entropy(lines: Lines) -> Alarm:
    """A policy that has stopped exploring."""
    name = "policy/entropy"
    return Alarm(
        "The entropy has collapsed",
        late(lines, name) < max(0.1 * early(lines, name), 0.005),
        f"token entropy of the policy, nats: {moved(lines, name)}",
        "The paper sees it fall, faster at first (Fig. 6a). When next to nothing is left, all answers to a prompt are the "
        "same and groups have nothing to compare. Lower lr, raise kl_coef. Raised below a tenth of the early value.",
    )


def synthetic(lines: Lines) -> Alarm:
    """The model grades its own taste."""
    both = [line for line in lines if "reward/synthetic" in line and "reward/original" in line]
    new, old = late(both, "reward/synthetic"), late(both, "reward/original")
    return Alarm(
        "New samples earn more than real ones",
        bool(both) and new > old + 0.15,
        f"late reward: synthetic prompts {new:.3g}, original ones {old:.3g}" if both else "no synthetic prompt yet",
        "The label of a synthetic sample is what the model said it felt itself. If it earns far more there than on real "
        "dialogues, it grades its own taste. Read some of buffer.jsonl; see new/label_js. Raised above .15.",
    )


def clipping(lines: Lines) -> Alarm:
    """Steps too large."""
    return Alarm(
        "Updates are clipped",
        late(lines, "clip_frac") > 0.5 or late(lines, "kl/clamped") > 0.01,
        f"loss weight that is clipped: {moved(lines, 'clip_frac')}; largest ratio {max(x['ratio/max'] for x in lines):.3g}; "
        f"loss weight where the KL is cut: {moved(lines, 'kl/clamped')}",
        "Within a step the policy moves away from the one that sampled. Eq. 14 stops the gain outside 1 ± epsilon. "
        "Mostly clipped means that the learning rate is too high. Raised above one half, or where the KL is cut for a "
        "hundredth.",
    )
