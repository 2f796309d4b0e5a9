"""SELF-EMO (arXiv:2604.18003v1), the reference implementation: Algorithm 1 from cold start to the returned policy.

    python selfemo.py --preset toy --out runs/toy           the whole paper on a laptop CPU, offline, in a few minutes
    python selfemo.py --preset small --model DIR ...        a small pretrained model on real data, on a CPU or one GPU
    torchrun --nproc_per_node 8 selfemo.py                  the paper's setting (Qwen3-8B, Table 12)

minimal.py is the same algorithm without what makes it fast, distributed and resumable: read it first. Here `self_emo` is
the loop, and the functions below it are its lines, in order. Equations are in grpo.py, prompts, parsing and selection in
data.py, sampling in rollout.py; what a run is, its folder, its stages and its cold start, is in training/.

Where the paper is silent or contradicts itself we decide; PAPER.md argues every decision (D1-D28). Measured in the toy, two
change its test accuracy most: retraining the start model in place of the model after RL (D13: -15.5 points) and one
importance ratio per answer in place of one per token (D2: +4.4 points).

Shapes: P prompts, B answers prompt-major, T answer tokens (right-padded), N the tokens of all answers in one row.
"""

import common  # noqa: F401  # isort: skip  its check of Python comes first
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import data
import evaluate
import grpo
from common.files import build_records, read_lines
from data import Completion, Output, Sample
from engine import batches, fsdp, processes, shards
from model import Policy
from training import coldstart, launch, metrics
from training.config import Config
from training.export import export
from training.folder import Learner, Run, stage_steps
from training.records import ScoredGroup, buffer_from_record, buffer_record, group_record
from training.task import Buffer, Example, Task, answer, group_by_dataset


def self_emo(run: Run, task: Task, policy: Policy) -> Policy:
    """Algorithm 1. The numbers on the right are its lines; a resumed run skips what is done."""
    cfg = task.cfg
    buffer = open_buffer(run, task)                                                      # 1: B <- D0
    cold_start(run, task, policy)                                                        # 3
    for k in range(1, cfg.iterations + 1):                                               # 4
        for t in rl_steps(run, task, policy, k):                                         # 5
            x = buffer.draw(k, t % task.S, cfg)                                          # 6
            y = rollout(run, task, policy, x, t)                                         # 7
            scored = score(task, x, y, task.lam(t))                                      # 8: Eqs. 8-13
            measured = update(run, policy, scored, t, cfg)                               # 9: Eq. 14
            chosen = select(task, scored, k)                                             # 12-14: Eq. 7
            buffer = buffer.add(keep(run, scored, chosen, k))                            # 15
            write_down(run, task, policy, scored, chosen, measured, k, t)
        retrain(run, task, policy, buffer, k)                                            # 17-18
    return finish(run, task, policy)                                                     # 20


# Lines 1 and 3


def open_buffer(run: Run, task: Task) -> Buffer:
    """Line 1, and what a resumed run had kept."""
    path = run.out / "buffer.jsonl"
    return Buffer(task.originals, tuple(build_records(path, read_lines(path), buffer_from_record)))


def cold_start(run: Run, task: Task, policy: Policy) -> None:
    """Line 3 (D17)."""
    if run.position.stage == COLD_START_STAGE:
        if run.position.step == 0:
            evaluate.on_dev(run, task, policy, 0, 0, "start")
        coldstart.sft(run, task, policy, COLD_START_STAGE, coldstart.examples(run, task, policy), task.cfg.cold_start_lr)


# A run is a row of stages: the cold start, RL and SFT of iteration 1, RL and SFT of iteration 2, ..., the end.
COLD_START_STAGE = 0


def rl_stage(k: int) -> int:
    """Number of the RL stage of iteration k."""
    return 2 * k - 1


def sft_stage(k: int) -> int:
    """Number of the SFT stage of iteration k."""
    return 2 * k


# Line 5


def rl_steps(run: Run, task: Task, policy: Policy, k: int) -> Iterator[int]:
    """The RL steps t of iteration k that are still to be done, with evaluations between them; `run.learner` learns."""
    cfg = task.cfg

    def make() -> Learner:
        if k == 1 and run.position.step == 0:
            shards.save_parts(run.out / COLD_START_WEIGHTS, {"weights": shards.weights(policy)})
        return Learner(coldstart.adamw(policy, cfg.lr), policy.frozen_copy(offload=cfg.ref_offload))  # D6

    for step, _ in stage_steps(run, policy, rl_stage(k), task.S, make, cfg.save_every):
        t = (k - 1) * task.S + step
        if step == 0:
            evaluate.on_dev(run, task, policy, k, t, "after the cold start" if k == 1 else f"after SFT {k - 1}")
        elif t % cfg.eval_every == 0:
            evaluate.between_steps(run, task, policy, k, t)
        yield t


COLD_START_WEIGHTS = "cold_start"  # folder of the run


# Line 7


def rollout(run: Run, task: Task, policy: Policy, samples: Sequence[Sample], t: int) -> list[list[Completion]]:
    """n answers to each prompt, at the training temperature."""
    started = time.monotonic()
    groups = answer(task, policy, samples, n=task.cfg.n, temperature=task.cfg.temperature, step=t)
    tokens = sum(len(a.ids) for group in groups for a in group)
    run.note({"rollout/tokens_per_s": tokens / (time.monotonic() - started), "time/rollout_s": time.monotonic() - started})
    return groups


# Line 8


def score(task: Task, samples: Sequence[Sample], groups: Sequence[Sequence[Completion]], lam: float) -> list[ScoredGroup]:
    """Rewards, consensus and advantages of every group (Eqs. 8-13)."""
    scored = []
    for sample, group in zip(samples, groups, strict=True):
        predictions = [a.parse.last_emotions if isinstance(a.parse, Output) else None for a in group]
        r = [grpo.reward(prediction, sample.gold) for prediction in predictions]
        core, r2 = grpo.core_emotions(predictions), grpo.consistency(predictions)
        A = grpo.advantages([r], [r2], lam)[0].tolist()
        ids = tuple(task.encode(sample)[0])
        scored.append(ScoredGroup(sample, ids, tuple(group), tuple(r), core, tuple(r2), tuple(A)))
    return scored


# Line 9


@dataclass(frozen=True)
class Measured:
    """What an update saw: numbers of each mini-batch, log-probs of all answer tokens before it, and of the reference."""

    mini_batches: list[dict[str, float]]
    old_N: Tensor
    ref_N: Tensor
    seconds: float


def update(run: Run, policy: Policy, scored: Sequence[ScoredGroup], t: int, cfg: Config) -> Measured:
    """Line 9: the optimizer steps of one RL step, one per mini-batch of prompts."""
    started, learner = time.monotonic(), run.learner
    assert learner is not None and learner.reference is not None
    parts = [scored[i : i + cfg.mini_batch_prompts] for i in range(0, len(scored), cfg.mini_batch_prompts)]
    ref = [logprobs(learner.reference, part, cfg) for part in parts]
    before = [torch.full_like(ref[0], NOT_MEASURED), *(logprobs(policy, part, cfg) for part in parts[1:])]
    values, old_N, ref_N = list[dict[str, float]](), list[Tensor](), list[Tensor]()
    for part, before_BT, ref_BT in zip(parts, before, ref, strict=True):
        measured, old_BT = mini_batch(policy, learner, part, before_BT, ref_BT, cfg)
        coldstart.check_finite(measured, f"RL step {t + 1}", [s.sample.id for s in part])
        learner.apply()
        run.count_update()
        values.append(measured)
        old_N.append(answer_tokens(old_BT, part))
        ref_N.append(answer_tokens(ref_BT, part))
    return Measured(values, torch.cat(old_N), torch.cat(ref_N), time.monotonic() - started)


def mini_batch(
    policy: Policy, learner: Learner, scored: Sequence[ScoredGroup], before_BT: Tensor, ref_BT: Tensor, cfg: Config
) -> tuple[dict[str, float], Tensor]:
    """Gradient of Eq. 14 + beta KL over one mini-batch of prompts, in micro-batches that only sum.

    Returns the measurements, and old_BT, the log-probs that the ratios were taken to.
    """
    lengths = [len(a.ids) for s in scored for a in s.answers]
    weight_BT = grpo.token_weights(lengths, cfg.loss_mean, max(lengths)).to(policy.device)
    truncated_B = torch.tensor([not a.finished for s in scored for a in s.answers], device=policy.device)
    adv_B = torch.tensor([a for s in scored for a in s.advantages], dtype=torch.float64, device=policy.device)
    old_BT, found = torch.zeros_like(ref_BT), []
    learner.optimizer.zero_grad(set_to_none=True)
    for part in batches.my_micro_batches([s.group for s in scored], cfg.micro_batch):
        logp_BT, entropy_BT = policy(part.groups, temperature=cfg.temperature)
        rows = (part.rows, slice(logp_BT.shape[1]))  # of this micro-batch, as long as its own longest answer
        ref, w = ref_BT[rows], weight_BT[rows].to(logp_BT.dtype)
        old = old_logprobs(before_BT[rows], logp_BT)
        loss, clipping = grpo.policy_loss(logp_BT, old, adv_B[part.rows], w, clip_eps=cfg.clip_eps, ratio=cfg.ratio)
        kl = (w * grpo.low_var_kl(logp_BT, ref)).sum()
        (part.scale * (loss + cfg.kl_coef * kl)).backward()  # D1
        measured = {
            "loss/policy": loss, "loss/kl": kl, "loss/weight_truncated": w[truncated_B[part.rows]].sum(),
            "kl/clamped": grpo.clamped_share(logp_BT, ref, w), "policy/entropy": (w * entropy_BT).sum(), **clipping,
        }
        found.append((part, {name: value.detach() for name, value in measured.items()}))  # or graphs would stay alive
        if part.counted:
            old_BT[rows] = old
    values = {**metrics.added(batches.on_host(found)), "grad_norm": fsdp.clip_gradients(policy, coldstart.MAX_GRAD_NORM)}
    return values, processes.summed(old_BT)


NOT_MEASURED = 1.0  # in place of a log-prob: none is above 0


def old_logprobs(before_BT: Tensor, logp_BT: Tensor) -> Tensor:
    """The log-probs under pi_old, the policy before the first optimizer step of this RL step; no gradient.

    They were measured then, but for the first mini-batch: the policy has not moved since, so its own forward gives them.
    That saves one of two scoring passes, a seventh of an RL step with one mini-batch.
    """
    return torch.where(before_BT == NOT_MEASURED, logp_BT.detach(), before_BT)


def logprobs(policy: Policy, scored: Sequence[ScoredGroup], cfg: Config) -> Tensor:
    """logp_BT of the answers under a policy as it stands, 0 off the answer."""
    groups = [s.group for s in scored]
    return batches.logprobs(policy, groups, micro_batch=cfg.micro_batch, temperature=cfg.temperature)


def answer_tokens(x_BT: Tensor, scored: Sequence[ScoredGroup]) -> Tensor:
    """What belongs to the tokens of the answers, in one row, without the padding."""
    length_B = torch.tensor([len(a.ids) for s in scored for a in s.answers], device=x_BT.device)
    return x_BT[torch.arange(x_BT.shape[1], device=x_BT.device) < length_B[:, None]]


# Lines 12-15


def select(task: Task, scored: Sequence[ScoredGroup], k: int) -> list[data.Selection]:
    """Lines 12-14: the best answer of every group, if it is good enough to become a new sample (Eq. 7, D11)."""
    if not task.cfg.self_play:
        return [data.Selection(None, "off", None)] * len(scored)
    keep_reward, fits = task.cfg.keep_reward, task.fits
    return [
        data.select(s.sample, [a.parse for a in s.answers], s.rewards, k, keep_reward=keep_reward, fits=fits) for s in scored
    ]


def keep(run: Run, scored: Sequence[ScoredGroup], chosen: Sequence[data.Selection], k: int) -> list[Example]:
    """Line 15: the kept answers of a step, also written to buffer.jsonl; drawn from the next iteration on."""
    kept = [
        Example(s.sample.id, s.prompt_ids, s.answers[c.index].ids, k, c.child)
        for s, c in zip(scored, chosen, strict=True)
        if c.index is not None and c.child is not None
    ]
    run.append("buffer.jsonl", [buffer_record(x) for x in kept])
    return kept


def write_down(
    run: Run, task: Task, policy: Policy, scored: Sequence[ScoredGroup], chosen: Sequence[data.Selection],
    measured: Measured, k: int, t: int,
) -> None:
    """The step's groups into rollouts/, its numbers into metrics.jsonl, and a line for the person who watches."""
    version = run.position.updates - len(measured.mini_batches)  # of the weights that answered
    pairs = zip(scored, chosen, strict=True)
    records = [group_record(s, c, step=t, iteration=k, lam=task.lam(t), version=version) for s, c in pairs]
    values = {
        **metrics.rollout_metrics(records), **metrics.update_metrics(measured.mini_batches),
        **metrics.logprob_metrics(measured.old_N, measured.ref_N, [a.logprobs for s in scored for a in s.answers]),
        "lam": task.lam(t), "time/update_s": measured.seconds,
    }
    if k == 1:
        values["policy/kl_cold_start"] = metrics.kl(measured.old_N, measured.ref_N)
    elif t % task.cfg.eval_every == 0:
        values["policy/kl_cold_start"] = metrics.kl(measured.old_N, cold_start_logprobs(run, policy, scored, task.cfg))
    values |= processes.peak_memory()
    run.append(f"rollouts/iteration-{k}.jsonl", records)
    run.say(metrics.progress_line(t, task.cfg.iterations * task.S, run.log("rl", k, values, t)))


def cold_start_logprobs(run: Run, policy: Policy, scored: Sequence[ScoredGroup], cfg: Config) -> Tensor:
    """Log-probs of all answer tokens under the weights that the cold start left (the reference of iteration 1)."""
    cold = policy.frozen_copy()  # where the gradients were: they are twice as large, and gone by now
    shards.read_part(shards.intact(run.out / COLD_START_WEIGHTS), "weights", shards.weights(cold))
    return answer_tokens(logprobs(cold, scored, cfg), scored)


# Lines 17-20


def retrain(run: Run, task: Task, policy: Policy, buffer: Buffer, k: int) -> None:
    """Lines 17-18: learn the answers that selection kept (D12, D13). Without self-play there are none (D27)."""
    from_base = task.cfg.retrain_from == "base"
    if run.position.stage > sft_stage(k):
        return
    if run.position.step == 0:
        evaluate.on_dev(run, task, policy, k, k * task.S, f"after RL {k}")
        new = [x.child for x in buffer.kept if x.iteration == k and x.child is not None]
        run.log("sft", k, metrics.buffer_metrics(new, task.originals), 0)
    newest = {x.sample_id: x for x in buffer.kept if x.iteration == k or from_base}
    if from_base and task.cfg.self_play:
        newest = {x.sample_id: x for x in coldstart.examples(run, task, policy)} | newest
    coldstart.sft(run, task, policy, sft_stage(k), list(newest.values()), task.cfg.sft_lr)


def finish(run: Run, task: Task, policy: Policy) -> Policy:
    """Line 20: the model after the last SFT; scored on dev and, once in a run, on test; exported and reloaded."""
    cfg, K, T = task.cfg, task.cfg.iterations, task.cfg.iterations * task.S
    nothing_to_learn = lambda: Learner(coldstart.adamw(policy, 0.0), None)  # noqa: E731
    for _ in stage_steps(run, policy, sft_stage(K) + 1, 1, nothing_to_learn, cfg.save_every):
        evaluate.on_dev(run, task, policy, K, T, f"after SFT {K}")
        evaluate.on_sets(run, task, policy, group_by_dataset(task.test), K, T, "test", "test", task.cfg.eval_temperatures)
        export(run.out / "model", policy, task.tokenizer)
    return policy


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status (see `training.launch.main`)."""
    return launch.main(argv, self_emo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
