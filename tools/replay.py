"""One group of a run in the middle of its update: what Eq. 14 and the KL saw, and the gradients that autograd found.

    python -m tools.replay RUN SAMPLE --out DIR

The first iteration is trained again from RUN/cold_start and the answers that the run recorded, up to the mini-batch of
SAMPLE. DIR gets config.json, the group's record and update.json, all that `python evaluate.py audit DIR --show SAMPLE
--markdown true` needs. Every step is compared with the run: where the log-probs are not those it sampled with, it stops.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

import data
from analysis import audit
from common.errors import UserError, command
from common.files import Record, read_json, write_atomically
from common.hub import load_tokenizer, quiet_transformers
from data import Completion, Responder, Sample
from engine.shards import read_part, weights
from grpo import low_var_kl, policy_loss, token_weights
from model import Policy, few_threads
from selfemo import COLD_START_WEIGHTS, answer_tokens, logprobs, mini_batch
from training.coldstart import adamw
from training.config import Config, of_run
from training.folder import Learner
from training.records import ScoredGroup

GAP = 1e-3  # the most a log-prob of the replay may differ from the run's own
LIKELIEST = 6  # tokens shown of a distribution, beside those that were said


@dataclass(frozen=True)
class Replay:
    """Write down one group of a run in the middle of its update (Eq. 14)."""

    run: tyro.conf.Positional[Path]  # Folder of a run, on a CPU.
    sample: tyro.conf.Positional[str]  # Sample id, answered in iteration 1.
    out: Path  # Folder to write.


def scored(record: Record) -> ScoredGroup:
    """A recorded group as the update takes it: tokens and advantages; the rest is not looked at."""
    sample = Sample(record["sample_id"], record["dataset"], (), Responder("", None, "next"), (), record["gold"])
    answers = [Completion(tuple(a["ids"]), tuple(a["logprobs"]), a["finished"]) for a in record["answers"]]
    r, r2, A = (tuple(a[name] for a in record["answers"]) for name in ("reward", "consistency", "advantage"))
    return ScoredGroup(sample, tuple(record["prompt_ids"]), tuple(answers), r, {}, r2, A)


def replay(run: Path, sample_id: str) -> tuple[Record, Record]:
    """(record of the group, what its update saw). Raises `UserError` where the run cannot be followed."""
    cfg = of_run(read_json(run / "config.json"))
    records = [record for _, record in audit.rollouts(run) if record["iteration"] == 1]
    if sample_id not in (record["sample_id"] for record in records):
        raise UserError(f"{run} holds no answers to {sample_id!r} in iteration 1")
    tokenizer, policy = load_tokenizer(cfg.model), Policy.load(cfg.model)
    few_threads(policy)
    read_part(run / COLD_START_WEIGHTS, "weights", weights(policy))
    learner, gap = Learner(adamw(policy, cfg.lr), policy.frozen_copy()), 0.0
    assert learner.reference is not None
    for step, found in groupby(records, lambda record: record["step"]):
        group_records = list(found)
        groups = [scored(record) for record in group_records]
        parts = [groups[i : i + cfg.mini_batch_prompts] for i in range(0, len(groups), cfg.mini_batch_prompts)]
        before = [(logprobs(policy, part, cfg), logprobs(learner.reference, part, cfg)) for part in parts]
        for part, (old_BT, _) in zip(parts, before, strict=True):
            sampled_N = old_BT.new_tensor([x for g in part for a in g.answers for x in a.logprobs])
            gap = max(gap, (answer_tokens(old_BT, part) - sampled_N).abs().max().item())
        if gap > GAP:
            raise UserError(f"{run}: the replay leaves the run at RL step {step + 1}: a log-prob differs by {gap:.2g}")
        for number, (part, (old_BT, ref_BT)) in enumerate(zip(parts, before, strict=True)):
            if sample_id in (g.sample.id for g in part):
                record = next(r for r in group_records if r["sample_id"] == sample_id)
                seen = measured(policy, part, old_BT, ref_BT, cfg, sample_id, tokenizer)
                return record, {"mini_batch": number, "largest_gap": gap, **seen}
            mini_batch(policy, learner, part, old_BT, ref_BT, cfg)
            learner.apply()
    raise AssertionError("the sample is among the records")


class InSight(Policy):
    """A policy with its head written out: all logits at once, `seen`, and their gradients after a backward."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Nothing has been seen yet."""
        super().__init__(lm)
        self.seen: list[Tensor] = []

    def head(self, hidden_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Policy.head`."""
        logits_MV: Tensor = self.lm.get_output_embeddings()(hidden_MD)
        logits_MV.retain_grad()
        self.seen.append(logits_MV)
        logp_MV = (logits_MV / temperature).log_softmax(-1)
        return logp_MV.gather(-1, target_M[:, None])[:, 0], -(logp_MV.exp() * logp_MV).sum(-1)


def measured(
    policy: Policy, part: Sequence[ScoredGroup], old_BT: Tensor, ref_BT: Tensor, cfg: Config, sample_id: str, tokenizer: Any
) -> Record:
    """The loss of a mini-batch as `selfemo.mini_batch` has it, in one piece, and its gradients for the rows of one group."""
    shown = InSight(policy.lm)
    logp_BT, _ = shown([g.group for g in part], temperature=cfg.temperature)
    logp_BT.retain_grad()
    lengths = [len(a.ids) for g in part for a in g.answers]
    w_BT = token_weights(lengths, cfg.loss_mean, max(lengths)).to(logp_BT.dtype)
    adv_B = torch.tensor([a for g in part for a in g.advantages], dtype=torch.float64)
    loss, _ = policy_loss(logp_BT, old_BT, adv_B, w_BT, clip_eps=cfg.clip_eps, ratio=cfg.ratio)
    kl = (w_BT * low_var_kl(logp_BT, ref_BT)).sum()
    (loss + cfg.kl_coef * kl).backward()  # type: ignore[no-untyped-call]
    (logits_MV,) = shown.seen
    assert logp_BT.grad is not None and logits_MV.grad is not None
    place = next(i for i, g in enumerate(part) if g.sample.id == sample_id)
    own, rows = part[place], range(place * cfg.n, (place + 1) * cfg.n)
    columns = {"new": logp_BT.detach(), "old": old_BT, "ref": ref_BT, "gradient": logp_BT.grad}
    at = fork([a.ids for a in own.answers])
    flat = [sum(lengths[:row]) + at for row in rows]
    said = [a.ids[at] for a in own.answers]
    return {
        "prompt": data.answer_text(tokenizer, own.prompt_ids, (), ""),
        "pieces": [[tokenizer.decode([i]) for i in a.ids] for a in own.answers], "answers": len(lengths),
        "tokens": sum(lengths), "loss": loss.item(), "kl": kl.item(),
        **{name: [value_BT[row, : lengths[row]].tolist() for row in rows] for name, value_BT in columns.items()},
        "fork": {"token": at, **fork_logits(logits_MV.detach()[flat[0]], logits_MV.grad[flat].sum(0), said, tokenizer)},
    }


def fork(answers: Sequence[Sequence[int]]) -> int:
    """Position of the first token in which the answers of a group differ; up to there they share everything."""
    return next((t for t, column in enumerate(zip(*answers, strict=False)) if len(set(column)) > 1), 0)


def fork_logits(z_V: Tensor, gradient_V: Tensor, said: Sequence[int], tokenizer: Any) -> Mapping[str, Any]:
    """Logits at the fork, of the tokens that were said and of the likeliest others, with the gradient of all answers."""
    ids = list(dict.fromkeys([*said, *z_V.topk(LIKELIEST).indices.tolist()]))
    return {
        "pieces": [tokenizer.decode([i]) for i in ids], "said": [ids.index(i) for i in said],
        "logits": z_V[ids].tolist(), "logsumexp": z_V.logsumexp(0).item(), "vocabulary": len(z_V),
        "gradient": gradient_V[ids].tolist(),
        "gradient_of_the_others": (gradient_V.sum() - gradient_V[ids].sum()).item(),
    }


def main(argv: Sequence[str]) -> int:
    """Run the command line; see `common.errors.command` for the exit status."""

    def work() -> None:
        args = tyro.cli(Replay, args=list(argv), use_underscores=True)
        quiet_transformers()
        record, update = replay(args.run, args.sample)
        (args.out / "rollouts").mkdir(parents=True, exist_ok=True)
        config = read_json(args.run / "config.json")
        for name, value in (("config.json", config), ("update.json", update), ("rollouts/iteration-1.jsonl", record)):
            write_atomically(args.out / name, json.dumps(value, ensure_ascii=False) + "\n")
        print(f"wrote {args.out}; log-probs at most {update['largest_gap']:.1g} from the run's; it is worked out by: "
              f"python evaluate.py audit {args.out} --show {args.sample} --markdown true")  # fmt: skip

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
