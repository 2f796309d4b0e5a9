"""What a reader of a run should stop at: each check looks at metrics.jsonl and says what it found and means.

"Early" and "late" are means over the first and the last fifth of the RL steps. Limits are rules of thumb; docs/runs.md says
what else to look at, docs/curves.md shows runs that raise them. Steps are counted from 1, as on the screen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
from analysis.compare import mcnemar
from common.files import numbered
from training.metrics import mean

Right = Mapping[tuple[str, str], Mapping[str, bool]]  # (eval/<set>, when) -> sample -> whether its answer was right
Found = tuple[bool, str]  # whether an alarm is raised, and what was measured


@dataclass(frozen=True)
class Alarm:
    """One check: whether it is raised, what was measured, and what that means."""

    title: str
    raised: bool
    found: str
    meaning: str


@dataclass(frozen=True)
class Course:
    """The RL lines of a run, and how a metric moved over them; its evaluations, and which of their answers were right."""

    lines: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]] = ()
    right: Right = field(default_factory=dict)
    prompts: int = 0  # an RL step; 0 if not known

    def early(self, name: str) -> float:
        """Mean over the first fifth of the lines that have it; 0 if none has."""
        values = [line[name] for line in self.lines if name in line]
        return mean(values[: max(1, len(values) // 5)])

    def late(self, name: str) -> float:
        """Mean over the last fifth."""
        return Course(self.lines[::-1]).early(name)

    def change(self, name: str) -> float:
        """Late minus early."""
        return self.late(name) - self.early(name)

    def moved(self, name: str) -> str:
        """Early and late value in words."""
        return f"{self.early(name):.3g} early, {self.late(name):.3g} late"


def alarms(lines: Sequence[Mapping[str, Any]], right: Right | None = None, prompts: int = 0) -> list[Alarm]:
    """All checks of a run's lines of metrics, those raised first; none of a run without an RL step."""
    rl, evals = ([line for line in lines if line["phase"] == phase] for phase in ("rl", "eval"))
    run = Course(rl, evals, right or {}, prompts)
    found = [Alarm(title, *check(run), meaning) for title, check, meaning in CHECKS] if rl else []
    return sorted(found, key=lambda alarm: not alarm.raised)


def right_answers(run: Path) -> Right:
    """Which answers of the evaluations on dev that a run keeps were right; nothing of a run that keeps none.

    Only those at the first temperature, and not the SELF-EMO split, whose gold the model itself has said.
    """
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for path in sorted((run / "evaluations").glob("iteration-*.jsonl")):
        for _, row in numbered(path):
            if plain(row["set"]):
                parse = data.parse_output(row["text"], row["labels"], finished=row["finished"])
                named = data.heaviest(parse.last_emotions) if isinstance(parse, data.Output) else None
                found.setdefault((row["set"], row["when"]), {})[row["sample_id"]] = named == data.heaviest(row["gold"])
    return found


def plain(name: str) -> bool:
    """Whether this is a set of dev at the first temperature."""
    return name.startswith("eval/") and "@" not in name and name != "eval/selfemo"


@dataclass(frozen=True)
class Fall:
    """Accuracy on a set at the end of what a stage has done so far, below the best that the same stage had before."""

    words: str
    points: float
    p: float | None  # exact and paired; None where the answers were not kept

    @property
    def raised(self) -> bool:
        """Too large and too one-sided for chance; untested, larger than chance makes likely on a few hundred samples."""
        return self.points > 0.08 if self.p is None else self.points > 0.02 and self.p < 0.05


def falls(run: Course) -> list[Fall]:
    """One per RL stage and set that has two evaluations, its start among them; points are negative where it rose."""
    found = []
    for k in dict.fromkeys(line["iteration"] for line in run.evals):
        stage = [line for line in run.evals if line["iteration"] == k and line["when"] not in (f"after SFT {k}", "test")]
        for name in dict.fromkeys(n.removesuffix("/acc") for line in stage for n in line if n.endswith("/acc")):
            points = [(line[f"{name}/acc"], line["when"]) for line in stage if f"{name}/acc" in line]
            if plain(name) and len(points) > 1:
                found.append(fall(run.right, name, max(points[:-1], key=lambda point: point[0]), points[-1]))
    return found


def fall(right: Right, name: str, best: tuple[float, str], last: tuple[float, str]) -> Fall:
    """One of them; `best`, `last`: accuracy and which evaluation."""
    words = f"{name.removeprefix('eval/')}: {best[0]:.3f} {best[1]}, {last[0]:.3f} {last[1]}"
    before, after = (right.get((name, when), {}) for _, when in (best, last))
    if not before or before.keys() != after.keys():
        return Fall(f"{words} (no answers were kept for a test)", best[0] - last[0], None)
    lost, won, p = mcnemar([before[i] for i in before], [after[i] for i in before])
    words += f" (of {len(before)} samples {lost} were lost and {won} won: p = {p:.2g}, exact paired test)"
    return Fall(words, best[0] - last[0], p)


def held_out(run: Course) -> Found:
    """Accuracy on dev that a stage had and lost again: the fall that is raised, else the largest one."""
    found = sorted(falls(run), key=lambda one: (one.raised, one.points), reverse=True)
    if not found:
        return False, "not measured: no RL stage has two evaluations on dev"
    said = [one.words for one in found if one.raised] or [found[0].words]
    return found[0].raised, f"accuracy on dev, best and last of a stage: {'; '.join(said)}"


def loss(run: Course) -> Found:
    """A loss of 0 is no fault; log-probs that are not the sampler's, or no gradient where rewards differ, are."""
    lines, first = run.lines, run.lines[0]
    off = max(abs(line["ratio/mean/by_mini_batch"][0] - 1) for line in lines)
    gap = max(line.get("rollout/logp_gap_mean", 0.0) for line in lines)
    still = sum(line["grad_norm"] == 0 and min(line["reward/zero_std"], line["consistency/zero_std"]) < 1 for line in lines)
    return off > 0.01 or gap > 0.1 or still > 0, (
        f"step {first['step'] + 1}: loss {first['loss/policy']:.3g}, gradient norm {first['grad_norm']:.3g}; the first "
        f"update of a step has a ratio at most {off:.1g} away from 1; log-probs differ from the sampler's by {gap:.1g} nats "
        f"on average at most; steps without a gradient although answers differ: {still}"
    )


def rule(run: Course) -> Found:
    """Answers that keep the rule, and what breaks it most."""
    reasons = sorted({n for line in run.lines for n in line if n.startswith("rule/") and n != "rule/rate"})
    shares = {name.removeprefix("rule/"): mean(line.get(name, 0.0) for line in run.lines) for name in reasons}
    most = ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1])[:3])
    found = f"share of answers that keep the rule: {run.moved('rule/rate')}; most frequent slips: {most or 'none'}"
    return run.late("rule/rate") < 0.5, found


def one_emotion(run: Course) -> Found:
    """The majority class for every prompt."""
    said, true = "answer/top_emotion", "gold/top_emotion"
    if not any(said in line for line in run.lines):
        return False, "not measured: the run is of an earlier version"
    return run.late(said) > max(0.75, run.late(true) + 0.25), (
        f"share of the emotion that is named most, among valid answers: {run.moved(said)}; of the most frequent gold "
        f"label among prompts: {run.moved(true)}"
    )


def synthetic(run: Course) -> Found:
    """What the model earns on prompts that it made itself."""
    both = Course([line for line in run.lines if "reward/synthetic" in line and "reward/original" in line])
    new, old = both.late("reward/synthetic"), both.late("reward/original")
    made = [new_prompts(line, run.prompts) for line in both.lines[-max(1, len(both.lines) // 5) :]]
    count = f" (over {sum(made)} of {run.prompts * len(made)} prompts)" if any(made) else ""
    found = f"late reward: synthetic prompts {new:.3g}{count}, original ones {old:.3g}"
    return new > old + 0.15, found if both.lines else "no synthetic prompt yet"


def new_prompts(line: Mapping[str, Any], prompts: int) -> int:
    """How many of an RL step's prompts the model made itself; 0 where it is not known."""
    return round(prompts * (1 - line.get("buffer/depth/0", 0.0))) if any(n.startswith("buffer/depth/") for n in line) else 0


CHECKS: tuple[tuple[str, Callable[[Course], Found], str], ...] = (  # title, check, what it means
    ("The loss is near 0 and the first ratio is 1", loss,
     "This is as it should be. Before the first update the policy has not moved since its log-probs were measured, so "
     "every ratio is 1 and nothing is clipped. The advantages of a group sum to 0 (Eq. 13), so the loss is 0 but for the "
     "lengths of the answers. Its gradient is not 0: it raises answers with a positive advantage and lowers the others. "
     "Watch rewards and evaluations, not the loss. It would be a fault if sampler and training disagreed (raised above .1 "
     "nats per token) or the gradient were 0 while answers differ."),
    ("Accuracy on dev holds within a stage", held_out,
     "Training rewards may rise while answers to dialogues that were not trained on get worse. The last evaluation of an RL "
     "stage is compared with the best one before it in the same stage, its start included, sample by sample. The best of "
     "several is a lucky one, so p is a little too small. Export an earlier checkpoint, stop earlier, lower lr. Raised when "
     "more than .02 are lost and p is below .05; without kept answers, above .08."),
    ("Answers end by themselves", lambda run: (
         max(run.early("answer/truncated"), run.late("answer/truncated")) > 0.1,
         f"share of answers cut at the limit: {run.moved('answer/truncated')}; of the loss weight: "
         f"{run.moved('loss/weight_truncated')}; mean length {run.moved('answer/tokens')} tokens"),
     "A cut answer breaks the rule, earns 0, and its tokens are still trained (D20). Many of them teach the model to be "
     "brief, whatever it says; after that none is cut any more, and nothing else shows it. Raise max_new_tokens, or cold "
     "start so that answers end. Raised above a tenth, early or late."),
    ("Answers keep the rule", rule,
     "An answer that breaks the rule earns nothing, whatever it recognised (Eq. 8). While most do, the reward teaches the "
     "format and little else. Take cold_start dataset, or allow longer answers. Raised below one half."),
    ("Rewards differ within a group", lambda run: (
         run.late("reward/zero_std") > 0.9, f"share of such groups: {run.moved('reward/zero_std')}"),
     "An advantage compares an answer with its group. Where all earn the same, all right or all wrong, the first term of "
     "Eq. 13 is exactly 0 and the group teaches nothing but consistency. Some is normal and grows with skill. Raised above "
     "nine tenths: harder data, more answers per prompt, or an earlier stop."),
    ("Consistency differs within a group", lambda run: (
         run.late("consistency/zero_std") > 0.9, f"share of such groups: {run.moved('consistency/zero_std')}"),
     "Where all answers of a group name equally many core emotions, the second term of Eq. 13 is 0 and SELF-GRPO is plain "
     "GRPO. With one label per sample as gold and one emotion per answer that is nearly always so (D14). Raised above nine "
     "tenths."),
    ("Groups agree on the gold emotion", lambda run: (
         run.change("consistency/core_on_gold") < -0.1 and run.change("consistency/mean") >= 0,
         f"groups whose consensus has the gold emotion in front: {run.moved('consistency/core_on_gold')}; consistency: "
         f"{run.moved('consistency/mean')}"),
     "Eq. 12 pays for agreeing with the group, true or not, and lambda gives that more and more weight. If agreement holds "
     "or rises while the consensus leaves gold, the group talks itself into something (PAPER.md works an example out). "
     "Stop earlier, or compare with self_grpo false. Raised when the second falls by more than a tenth."),
    ("Answers list only emotions that they mean", lambda run: (
         run.change("answer/entries") > 0.2 and run.change("answer/min_share") < 0,
         f"recognised emotions per answer: {run.moved('answer/entries')}; smallest share among them: "
         f"{run.moved('answer/min_share')}; lambda {run.early('lam'):.2f} to {run.late('lam'):.2f}"),
     "An answer that names one more core emotion, with a small weight, loses little IOU and gains a third of Eq. 12. From "
     "some lambda on that pays (PAPER.md has the arithmetic). The floor of 0.1 per weight (D8) makes it dearer, not "
     "impossible. Raised when answers have 0.2 entries more and their smallest share falls."),
    ("Answers name different emotions", one_emotion,
     "The most frequent label is right more often than any other guess, so its answers win in most groups, whatever was "
     "said. Once all answers of a group name it, they earn the same and nothing leads away again. Accuracy may have risen; "
     "macro F1 shows it. Stop earlier, cold start better, or draw the labels evenly. Raised above three quarters, and a "
     "quarter above gold."),
    ("The policy keeps some entropy", lambda run: (
         run.late("policy/entropy") < max(0.1 * run.early("policy/entropy"), 0.005),
         f"token entropy of the policy, nats: {run.moved('policy/entropy')}"),
     "The paper sees it fall, faster at first (Fig. 6a). When next to nothing is left, all answers to a prompt are the "
     "same and groups have nothing to compare. Lower lr, raise kl_coef. Raised below a tenth of the early value."),
    ("New samples earn no more than real ones", synthetic,
     "The label of a synthetic sample is what the model said it felt itself. If it earns far more there than on real "
     "dialogues, it grades its own taste. Read some of buffer.jsonl; see new/label_js. Raised above .15."),
    ("Few updates are clipped", lambda run: (
         run.late("clip_frac") > 0.5 or run.late("kl/clamped") > 0.01,
         f"loss weight that is clipped: {run.moved('clip_frac')}; largest ratio "
         f"{max(line['ratio/max'] for line in run.lines):.3g}; loss weight where the KL is cut: {run.moved('kl/clamped')}"),
     "Within a step the policy moves away from the one that sampled. Eq. 14 stops the gain outside 1 ± epsilon. Mostly "
     "clipped means that the learning rate is too high. Raised above one half, or where the KL is cut for a hundredth."),
)  # fmt: skip
