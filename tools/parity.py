"""Our loss against TRL's own, on groups that a run recorded: same answers, advantages, log-probs and weights.

    python -m tools.parity RUN --peer trl=/venvs/trl/bin/python

`GRPOTrainer._compute_loss` runs in the peer's interpreter. First it gets log-probs in float64 in the place of its forward,
so that loss and gradient must agree to rounding wherever both mean the same. Then its own forward takes part, which computes
log-probs in float32, and the gradient by weight is compared with that of `selfemo.mini_batch`.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

import grpo
import selfemo
from analysis.audit import rollouts
from common.errors import UserError, command
from common.files import Record, read_json, write_atomically
from common.flags import Pairs, pairs
from data import Completion, Sample
from engine import batches
from model import Group, Policy
from tools.ablate import text
from tools.bench import Settings, Side
from training.coldstart import adamw
from training.config import Config
from training.folder import Learner
from training.records import ScoredGroup


@dataclass(frozen=True)
class Setting:
    """One way to take the loss, in our words and in TRL's; `why` is empty where both mean the same."""

    loss_mean: Literal["token", "sequence"]
    ratio: Literal["token", "sequence"]
    loss_type: str
    clip_eps: float = 0.2
    beta: float = 0.001
    micro_batches: int = 1
    kl_ratio: bool = False  # TRL's use_bias_correction_kl, which it sets by itself
    why: str = ""


BIAS = "TRL's default multiplies each token's KL by its ratio; ours, as VeRL, which the paper trains with, does not"
LENGTH = "TRL divides the log-ratio of a sequence by its length; Eq. 14 does not"
MEANS = "TRL's bnpo takes the mean of each micro-batch, then the mean of these"
SETTINGS = (
    *(Setting("token", "token", "bnpo", eps, beta) for eps, beta in product((0.2, 0.05), (0.0, 0.001, 0.1))),
    *(Setting("sequence", "token", "grpo", eps, beta) for eps, beta in product((0.2, 0.05), (0.0, 0.001, 0.1))),
    Setting("token", "token", "dapo"),
    Setting("token", "token", "dapo", micro_batches=2),
    Setting("sequence", "token", "grpo", micro_batches=2),
    Setting("token", "token", "bnpo", beta=0.1, kl_ratio=True, why=BIAS),
    Setting("token", "token", "bnpo", micro_batches=2, why=MEANS),
    Setting("sequence", "sequence", "grpo", why=LENGTH),
    Setting("token", "sequence", "bnpo", why=LENGTH),
)


@dataclass(frozen=True)
class Parity:
    """Compare our loss and its gradient with TRL's own on recorded groups, and print a table."""

    run: tyro.conf.Positional[Path]  # Folder of a finished run, whose data and start model are still there.
    peer: Pairs = ()  # trl=PYTHON, the interpreter that has TRL.
    groups: int = 4  # Groups of the last RL step. 32 answers of SmolLM2-135M fill 20 GB on TRL's side: take 1 there.
    json: Path | None = None  # Also write all rows here.
    record: Path | None = None
    """A file of inputs and TRL's numbers for them, such as tests/trl.json: ask TRL again and write its numbers anew."""


@dataclass(frozen=True)
class Answers:
    """Answers to prompts with everything a loss needs, one row per answer, as long as it is."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    advantages: Sequence[float]
    logp: Sequence[Sequence[float]]
    old: Sequence[Sequence[float]]
    ref: Sequence[Sequence[float]]
    groups: Sequence[Group] = field(default_factory=list)


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one float64 tensor, 0 behind their ends."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


def ours(given: Answers, setting: Setting) -> tuple[float, Tensor]:
    """Our loss, Eq. 14 and the KL, and its gradient by log-prob: (loss, gradient_BT)."""
    logp_BT = padded(given.logp).requires_grad_()
    lengths = [len(row) for row in given.logp]
    weight_BT = grpo.token_weights(lengths, setting.loss_mean, max(lengths))
    adv_B = torch.tensor(given.advantages, dtype=torch.float64)
    eps, ratio = setting.clip_eps, setting.ratio
    loss, _ = grpo.policy_loss(logp_BT, padded(given.old), adv_B, weight_BT, clip_eps=eps, ratio=ratio)
    total = loss + setting.beta * (weight_BT * grpo.low_var_kl(logp_BT, padded(given.ref))).sum()
    (gradient_BT,) = torch.autograd.grad(total, logp_BT)
    return total.item(), gradient_BT


def asked(given: Answers, setting: Setting) -> dict[str, Any]:
    """The job of the peer: the same in TRL's words."""
    words = {"loss_type": setting.loss_type, "level": setting.ratio, "clip_eps": setting.clip_eps, "beta": setting.beta}
    rows = {name: getattr(given, name) for name in ("advantages", "logp", "old", "ref")}
    return {**words, **rows, "micro_batches": setting.micro_batches, "kl_ratio": setting.kl_ratio}


def apart(a: Tensor, b: Tensor) -> float:
    """How far two tensors are apart: |a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def compared(given: Answers, setting: Setting, theirs: Mapping[str, Any]) -> Record:
    """One row: both losses, how far they are apart, and the gradients by log-prob, relative to TRL's."""
    loss, gradient_BT = ours(given, setting)
    difference = abs(loss - theirs["loss"]) / abs(theirs["loss"])
    gradient = apart(gradient_BT, padded(theirs["gradient"]))
    return {**asdict(setting), "ours": loss, "trl": theirs["loss"], "loss_apart": difference, "gradient_apart": gradient}


def table(rows: Sequence[Record]) -> list[list[str]]:
    """For people."""
    lines = [["mean", "ratio", "TRL's", "clip", "beta", "micro-batches", "ours", "TRL", "loss apart", "gradient apart", ""]]
    for r in rows:
        first = [r["loss_mean"], r["ratio"], r["loss_type"], f"{r['clip_eps']:g}", f"{r['beta']:g}", str(r["micro_batches"])]
        numbers = [f"{r['ours']:.9f}", f"{r['trl']:.9f}", f"{r['loss_apart']:.1e}", f"{r['gradient_apart']:.1e}"]
        lines.append([*first, *numbers, r["why"]])
    return lines


# The answers of a run


def recorded(run: Path, groups: int) -> Answers:
    """The first groups of a run's last step. They are learned by the final model; the reference is the start model.

    Both have moved away from the policy that answered, so that ratios are clipped on both sides. Raises `UserError`.
    """
    records = [record for _, record in rollouts(run)]
    last = [r for r in records if r["step"] == records[-1]["step"]][:groups]
    asked = [Group(r["prompt_ids"], [a["ids"] for a in r["answers"]]) for r in last]
    lengths = [len(ids) for group in asked for ids in group.answers]

    def rows(model: Path) -> list[list[float]]:
        logp_BT = batches.logprobs(Policy.load(model, torch.float64), asked, micro_batch=8, temperature=1.0)
        return [row[:n].tolist() for row, n in zip(logp_BT, lengths, strict=True)]

    return Answers(
        prompts=[group.prompt_ids for group in asked for _ in group.answers],
        answers=[ids for group in asked for ids in group.answers],
        advantages=[a["advantage"] for r in last for a in r["answers"]],
        logp=rows(run / "model"), old=[a["logprobs"] for r in last for a in r["answers"]],
        ref=rows(Path(read_json(run / "config.json")["model"])), groups=asked,
    )  # fmt: skip


def by_weights(run: Path, given: Answers, peer: Side) -> Record:
    """Loss and gradient by weight, each with its own forward in float32: `selfemo.mini_batch` and TRL."""
    policy, cfg = Policy.load(run / "model", torch.float32), Config(loss_mean="token", kl_coef=0.1)
    learner, rows = Learner(adamw(policy, 0.0), None), iter(zip(given.answers, given.advantages, strict=True))
    scored = []
    for group in given.groups:
        answers, adv = zip(*(next(rows) for _ in group.answers), strict=True)
        completions = tuple(Completion(tuple(ids), (), True) for ids in answers)
        scored.append(ScoredGroup(cast(Sample, None), tuple(group.prompt_ids), completions, adv, {}, adv, adv))
    old_BT, ref_BT = padded(given.old).float(), padded(given.ref).float()
    values, _ = selfemo.mini_batch(policy, learner, scored, old_BT, ref_BT, cfg)
    clipped = min(1.0, 1.0 / values["grad_norm"])  # `mini_batch` leaves the clipped gradient
    ours = {name.removeprefix("lm."): p.grad for name, p in policy.named_parameters() if p.grad is not None}
    with tempfile.TemporaryDirectory() as folder:
        job = {**asked(given, Setting("token", "token", "bnpo", beta=cfg.kl_coef)), "save": f"{folder}/gradient.safetensors"}
        said = peer.run({**job, "prompts": given.prompts, "answers": given.answers})
        theirs = load_file(job["save"])
    both = [(ours[name].flatten(), clipped * theirs[name].flatten()) for name in theirs]
    gradient = apart(*(torch.cat(side).double() for side in zip(*both, strict=True)))
    loss = values["loss/policy"] + cfg.kl_coef * values["loss/kl"]
    difference = abs(loss - said["loss"]) / abs(said["loss"])
    return {"ours": loss, "trl": said["loss"], "loss_apart": difference, "gradient_apart": gradient}


def standard_deviations(run: Path, groups: int) -> float:
    """The largest change of an advantage where 1e-4 is added to the standard deviation, as in TRL, instead of our 1e-6."""
    found = []
    for _, record in list(rollouts(run))[-groups:]:
        values = [answer["reward"] for answer in record["answers"]]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        mine = grpo.advantages([values], [[0.0] * len(values)], 0.0)[0].tolist()
        found += [abs((v - mean) / (std + 1e-4) - a) for v, a in zip(values, mine, strict=True)]
    return float(max(found))


# The command


def answers_of(record: Record) -> Answers:
    """The inputs of a file of TRL's numbers."""
    return Answers([], [], **{name: record[name] for name in ("advantages", "logp", "old", "ref")})


def parity(args: Parity) -> None:
    """Ask and print."""
    peers = pairs("peer", args.peer)
    if list(peers) != ["trl"]:
        raise UserError("give --peer trl=PYTHON, the interpreter of an environment with TRL")
    with ExitStack() as stack:
        peer = Side("trl-loss", peers["trl"], Settings(model=str(args.run / "model"), dtype="float32", threads=1), stack)
        if args.record:
            write_atomically(args.record, json.dumps(asked_again(read_json(args.record), peer), indent=1) + "\n")
        given = recorded(args.run, args.groups)
        rows = [compared(given, setting, peer.run(asked(given, setting))) for setting in SETTINGS]
        weights = by_weights(args.run, given, peer)
    lengths = [len(row) for row in given.logp]
    weight_BT = grpo.token_weights(lengths, "token", max(lengths))
    cut = grpo.clamped_share(padded(given.logp), padded(given.ref), weight_BT).item()
    print(f"{len(given.answers)} answers, {sum(lengths)} tokens; {peer.versions}")
    print(f"share of tokens whose KL ours cuts (TRL does not): {cut:.4f}\n{text(table(rows))}")
    print(
        "each with its own forward in float32, token mean, clip 0.2, beta 0.1: loss {ours:.7f} and {trl:.7f}, "
        "{loss_apart:.1e} apart; gradient by weight {gradient_apart:.1e} apart".format(**weights)
    )
    print(f"1e-4 beside the standard deviation, as in TRL: {standard_deviations(args.run, args.groups):.1e} in an advantage")
    if args.json:
        found: Record = {"versions": peer.versions, "rows": rows, "by_weights": weights, "kl_cut": cut}
        write_atomically(args.json, json.dumps(found, indent=1) + "\n")


def asked_again(kept: Record, peer: Side) -> Record:
    """The content of a file of TRL's numbers, with the numbers that TRL says now."""
    said = [peer.run(asked(answers_of(kept), Setting(**row["setting"]))) for row in kept["rows"]]
    rows = [{**row, "loss": now["loss"], "gradient": now["gradient"]} for row, now in zip(kept["rows"], said, strict=True)]
    return {**kept, "versions": peer.versions, "rows": rows}


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    return command(lambda: parity(tyro.cli(Parity, args=list(argv), use_underscores=True)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
