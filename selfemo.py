"""SELF-EMO (arXiv:2604.18003v1), the reference implementation: Algorithm 1 from cold start to the returned policy.

    python selfemo.py --preset toy --out runs/toy           the whole paper on a laptop CPU, offline, in three minutes
    python selfemo.py --preset small --model DIR ...        a small pretrained model on real data, on a CPU or one GPU
    torchrun --nproc_per_node 8 selfemo.py                  the paper's setting (Qwen3-8B, Table 12)

Where the paper is silent or contradicts itself we decide; every decision (D1-D28) is a row of PAPER.md. The four that
change a number most: one ratio a token, not a sequence (D2); mean over the tokens of a mini-batch (D3); the sample standard
deviation + 1e-6 (D5); the cold start learns format from the model's own valid answers (D17).

Read `self_emo` first: it is Algorithm 1. Equations are in grpo.py, prompts and parsing in data.py, sampling in rollout.py.
Shapes: P prompts, B answers prompt-major, T answer tokens (right-padded).
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

import data
import evaluate
import expert
import metrics
import toy
from asking import open_experts
from batches import by_micro_batch
from config import MAY_DIFFER, PRESETS, Config, parse
from data import Output, Sample, UserError
from grpo import advantages, clamped_share, consistency, core_emotions, low_var_kl, policy_loss, reward, token_weights
from model import Group, Policy, few_threads, quiet_transformers
from plan import plan
from ranks import (
    PeerLost,
    announce,
    clip_gradients,
    compile_blocks,
    complain,
    exchange,
    open_policy,
    peak_memory,
    processes,
    rank,
    relaunch,
    reopen,
    wait,
)
from runs import (
    Learner,
    Record,
    Run,
    ScoredGroup,
    Stopped,
    each,
    group_record,
    made_once,
    open_run,
    read_lines,
    stage_steps,
)
from shards import intact, read_part, save_parts, weights
from sums import write_sums
from world import (
    COLD_START,
    EVALUATION,
    SELF_EMO_TEST,
    Answer,
    Buffer,
    Kept,
    NotFinite,
    World,
    answer,
    group_by_dataset,
    open_world,
    shuffled,
)


def self_emo(run: Run, world: World, policy: Policy) -> Policy:
    """Algorithm 1. The numbers on the right are its lines; a resumed run skips what is done."""
    cfg = world.cfg
    buffer = open_buffer(run, world)                                                     # 1: B <- D0
    cold_start(run, world, policy)                                                       # 3
    for k in range(1, cfg.iterations + 1):                                               # 4
        for t in rl_stage(run, world, policy, k):                                        # 5
            x = buffer.draw(k, t % world.S, cfg)                                         # 6
            y = rollout(run, world, policy, x, t)                                        # 7
            scored = score(world, x, y, world.lam(t), k)                                 # 8: Eqs. 8-13
            update(run, world, policy, scored, k, t)                                     # 9: Eq. 14
            buffer = buffer.add(select(run, scored, k))                                  # 12-15: Eq. 7
        retrain(run, world, policy, buffer, k)                                           # 17-18
    return finish(run, world, policy)                                                    # 20


# Line 7


def rollout(run: Run, world: World, policy: Policy, samples: Sequence[Sample], t: int) -> list[list[Answer]]:
    """n answers to each prompt, at the training temperature."""
    started = time.monotonic()
    groups = answer(world, policy, samples, n=world.cfg.n, temperature=world.cfg.temperature, step=t)
    tokens = sum(len(a.ids) for group in groups for a in group)
    run.note({"rollout/tokens_per_s": tokens / (time.monotonic() - started), "time/rollout_s": time.monotonic() - started})
    return groups


# Line 8


def score(
    world: World, samples: Sequence[Sample], answers: Sequence[Sequence[Answer]], weight: float, k: int
) -> list[ScoredGroup]:
    """Rewards, consensus and advantages of every group (Eqs. 8-13), and line 13's choice."""
    scored = []
    for sample, group in zip(samples, answers, strict=True):
        predictions = [a.parse.last_emotions if isinstance(a.parse, Output) else None for a in group]
        r = [reward(prediction, sample.gold) for prediction in predictions]
        r2 = consistency(predictions)
        A = advantages([r], [r2], weight)[0].tolist()
        selection = choose(world, sample, group, r, k)
        ids = tuple(world.encode(sample)[0])
        scored.append(
            ScoredGroup(sample, ids, tuple(group), tuple(r), core_emotions(predictions), tuple(r2), tuple(A), selection)
        )
    return scored


def choose(world: World, sample: Sample, group: Sequence[Answer], r: Sequence[float], k: int) -> data.Selection:
    """Lines 13-14: the best answer, if it is good enough to become a new sample (D11)."""
    if not world.cfg.self_play:
        return data.Selection(None, "off", None)
    parses = [answer.parse for answer in group]
    return data.select(sample, parses, r, k, keep_reward=world.cfg.keep_reward, fits=world.fits)


# Line 9


@dataclass(frozen=True)
class Scores:
    """Log-probs of every answer of a mini-batch, one tensor [tokens] an answer, none with a gradient.

    `old` is None in the first mini-batch of a step: the policy has not moved, so the update's own forward gives them. That
    saves one of two scoring passes, a seventh of an RL step with one mini-batch.
    """

    old: list[Tensor] | None
    ref: list[Tensor]


def update(run: Run, world: World, policy: Policy, scored: Sequence[ScoredGroup], k: int, t: int) -> None:
    """Line 9: the optimizer steps of one RL step, one a mini-batch of prompts; then everything is written down."""
    cfg, started, learner = world.cfg, time.monotonic(), run.learner
    groups = [s.group for s in scored]
    assert learner is not None and learner.reference is not None
    size, shift = cfg.mini_batch_prompts, cfg.mini_batch_prompts * cfg.n
    ref = logprobs(learner.reference, groups, cfg)
    later = logprobs(policy, groups[size:], cfg) if len(groups) > size else []
    cold = ref if k == 1 else cold_start_logprobs(run, policy, groups, cfg) if t % cfg.eval_every == 0 else None
    version = run.position.updates
    parts, old = list[dict[str, float]](), list[Tensor]()
    for first in range(0, len(scored), size):
        part = scored[first : first + size]
        rows = slice(first * cfg.n, (first + len(part)) * cfg.n)
        before = later[rows.start - shift : rows.stop - shift] if first else None
        values, logp = mini_batch(policy, learner, part, Scores(before, ref[rows]), cfg)
        check_finite(values, t, [s.sample.id for s in part])
        learner.apply()
        run.count_update()
        parts.append(values)
        old += before or logp
    records = [group_record(s, step=t, iteration=k, lam=world.lam(t), version=version) for s in scored]
    values = {
        **metrics.rollout_metrics(records),
        **metrics.update_metrics(parts),
        **metrics.logprob_metrics(old, ref, [a.logprobs for s in scored for a in s.answers]),
        **({} if cold is None else {"policy/kl_cold_start": metrics.kl(old, cold)}),
        "lam": world.lam(t),
        "time/update_s": time.monotonic() - started,
        "memory/peak_gb": peak_memory() / 1e9,
    }
    run.append(f"rollouts/iteration-{k}.jsonl", records)
    run.say(progress_line(t, world.cfg.iterations * world.S, run.log("rl", k, values, t)))


def cold_start_logprobs(run: Run, policy: Policy, groups: Sequence[Group], cfg: Config) -> list[Tensor]:
    """Log-probs under the weights that the cold start left (the reference of iteration 1)."""
    cold = policy.frozen_copy(offload=cfg.ref_offload)
    read_part(intact(run.out / COLD_START_WEIGHTS), "weights", weights(cold))
    return logprobs(cold, groups, cfg)


def mini_batch(
    policy: Policy, learner: Learner, scored: Sequence[ScoredGroup], scores: Scores, cfg: Config
) -> tuple[dict[str, float], list[Tensor]]:
    """Gradient of Eq. 14 + beta KL over one mini-batch of prompts, in micro-batches that only sum.

    Returns the measurements, and the policy's log-probs as it stands, one tensor [tokens] an answer.
    """
    groups = [s.group for s in scored]
    lengths = [len(answer.ids) for s in scored for answer in s.answers]
    weight_BT = token_weights(lengths, cfg.loss_mean, max(lengths)).to(policy.device)
    truncated_B = torch.tensor([not answer.finished for s in scored for answer in s.answers], device=policy.device)
    adv_B = torch.tensor([a for s in scored for a in s.advantages], dtype=torch.float64, device=policy.device)
    learner.optimizer.zero_grad(set_to_none=True)

    def compute(part: list[Group], rows: slice, scale: float) -> tuple[dict[str, float], list[list[float]]]:
        logp_BT, entropy_BT = policy(part, temperature=cfg.temperature)
        old_BT = logp_BT.detach() if scores.old is None else pad_sequence(scores.old[rows], batch_first=True)
        ref_BT = pad_sequence(scores.ref[rows], batch_first=True)
        w_BT = weight_BT[rows, : logp_BT.shape[1]].to(logp_BT.dtype)
        loss, found = policy_loss(logp_BT, old_BT, adv_B[rows], w_BT, clip_eps=cfg.clip_eps, ratio=cfg.ratio)
        kl = (w_BT * low_var_kl(logp_BT, ref_BT)).sum()
        (scale * (loss + cfg.kl_coef * kl)).backward()  # D1
        measured = {
            "loss/policy": loss,
            "loss/kl": kl,
            "loss/weight_truncated": w_BT[truncated_B[rows]].sum(),
            "kl/clamped": clamped_share(logp_BT, ref_BT, w_BT),
            "policy/entropy": (w_BT * entropy_BT).sum(),
            **found,
        }
        return {name: value.item() for name, value in measured.items()}, cut(logp_BT, part)

    found = by_micro_batch(groups, cfg.micro_batch, compute)
    values = {**metrics.added([sums for sums, _ in found]), "grad_norm": clip_gradients(policy, MAX_GRAD_NORM)}
    return values, on_device([rows for _, rows in found], policy)


def cut(logp_BT: Tensor, part: Sequence[Group]) -> list[list[float]]:
    """The log-probs of each answer without its padding."""
    answers = [answer for group in part for answer in group.answers]
    return [row[: len(answer)] for row, answer in zip(logp_BT.tolist(), answers, strict=True)]


def on_device(parts: Sequence[Sequence[Sequence[float]]], policy: Policy) -> list[Tensor]:
    """Log-probs of micro-batches as one tensor an answer, in float32 at least."""
    dtype = torch.promote_types(policy.lm.dtype, torch.float32)
    return [torch.tensor(row, dtype=dtype, device=policy.device) for part in parts for row in part]


MAX_GRAD_NORM = 1.0
COLD_START_WEIGHTS = "cold_start"
ADAMW: Mapping[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01, "fused": True}  # one pass, no copies


@torch.no_grad()
def logprobs(policy: Policy, groups: Sequence[Group], cfg: Config) -> list[Tensor]:
    """Log-probs of every answer under the policy as it stands, one tensor [tokens] an answer."""

    def compute(part: list[Group], rows: slice, scale: float) -> list[list[float]]:
        return cut(policy(part, temperature=cfg.temperature)[0], part)

    return on_device(by_micro_batch(groups, cfg.micro_batch, compute), policy)


def check_finite(values: Mapping[str, float], t: int, ids: Sequence[str]) -> None:
    """Raise `NotFinite` before the optimizer would train on a NaN or an infinity."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"{', '.join(bad)} is not finite at RL step {t}; prompts of the mini-batch: {', '.join(ids)}")


# Lines 12-15


def select(run: Run, scored: Sequence[ScoredGroup], k: int) -> list[Kept]:
    """The kept answers of a step, also written to buffer.jsonl; they are drawn from the next iteration on."""
    kept = [
        Kept(k, s.sample.id, s.prompt_ids, s.answers[s.selection.index].ids, s.selection.child)
        for s in scored
        if s.selection.index is not None and s.selection.child is not None
    ]
    run.append("buffer.jsonl", [{**vars(x), "child": data.sample_record(x.child)} for x in kept])
    return kept


def open_buffer(run: Run, world: World) -> Buffer:
    """Line 1, and what a resumed run had kept."""
    path = run.out / "buffer.jsonl"

    def kept(x: Record) -> Kept:
        child = data.sample_from_record(x["child"])
        return Kept(x["iteration"], x["sample_id"], tuple(x["prompt_ids"]), tuple(x["ids"]), child)

    return Buffer(world.originals, tuple(each(path, read_lines(path), kept)))


# Lines 3 and 17-18: supervised fine-tuning


@dataclass(frozen=True)
class Example:
    """One answer to learn: the prompt is masked, the stop token is learned."""

    sample_id: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


def cold_start(run: Run, world: World, policy: Policy) -> None:
    """Line 3 (D17)."""
    if run.position.stage == 0:
        if run.position.step == 0:
            evaluate_dev(run, world, policy, 0, 0, "start")
        sft(run, world, policy, 0, cold_examples(run, world, policy), world.cfg.cold_start_lr)


def cold_examples(run: Run, world: World, policy: Policy) -> list[Example]:
    """What the cold start learns, kept in cold_start.jsonl: one answer an original sample, where there is a valid one."""
    path = run.out / "cold_start.jsonl"

    def make() -> str:
        makers = {"self": own_answers, "dataset": templates, "expert": expert_answers}
        examples = makers[world.cfg.cold_start](world, policy) if world.cfg.cold_start in makers else []
        run.say(f"cold start ({world.cfg.cold_start}): {len(examples)} answers to {len(world.originals)} prompts")
        return "".join(json.dumps(asdict(x)) + "\n" for x in examples)

    read = lambda x: Example(x["sample_id"], tuple(x["prompt_ids"]), tuple(x["ids"]))  # noqa: E731
    return each(path, made_once(path, make), read)


def own_answers(world: World, policy: Policy) -> list[Example]:
    """The start model's own answers that keep the rule; gold is not looked at."""
    groups = answer(world, policy, world.originals, n=1, temperature=world.cfg.temperature, step=COLD_START)
    examples = [
        Example(sample.id, tuple(world.encode(sample)[0]), group[0].ids)
        for sample, group in zip(world.originals, groups, strict=True)
        if isinstance(group[0].parse, Output)
    ]
    if not examples:
        raise UserError("the start model keeps the rule in none of its answers: take --cold_start dataset")
    return examples


def templates(world: World, policy: Policy) -> list[Example]:
    """Gold, the real next turn and its label in a template: teaches the format to a small model."""
    examples = []
    for sample in world.originals:
        target = data.dataset_target(sample)
        if target is not None:
            prompt, prefix = world.encode(sample)
            ids = world.tokenizer(target.removeprefix(prefix), add_special_tokens=False)["input_ids"]
            examples.append(Example(sample.id, tuple(prompt), (*ids, world.stop)))
    return [x for x in examples if len(x.ids) <= world.cfg.max_new_tokens]


def expert_answers(world: World, policy: Policy) -> list[Example]:
    """The expert's answers that keep the rule: the row "w/ COLD" of Table 2."""
    found = expert.cold_start_answers(world) if rank() == 0 else []  # asked, and paid for, once
    return [Example(s.id, tuple(world.encode(s)[0]), ids) for s, ids in found]


def retrain(run: Run, world: World, policy: Policy, buffer: Buffer, k: int) -> None:
    """Lines 17-18: learn the answers that selection kept (D12, D13). Without self-play there are none (D27)."""
    if run.position.stage > 2 * k:
        return
    if run.position.step == 0:
        evaluate_dev(run, world, policy, k, k * world.S, f"after RL {k}")
        run.log("sft", k, metrics.buffer_metrics([x.child for x in buffer.kept if x.iteration == k], world.originals), 0)
    kept = [x for x in buffer.kept if x.iteration == k or world.cfg.retrain_from == "base"]
    newest = {x.sample_id: Example(x.sample_id, x.prompt_ids, x.ids) for x in kept}
    if world.cfg.retrain_from == "base" and world.cfg.self_play:
        newest = {x.sample_id: x for x in cold_examples(run, world, policy)} | newest
    sft(run, world, policy, 2 * k, list(newest.values()), world.cfg.sft_lr)


def sft(run: Run, world: World, policy: Policy, stage: int, examples: Sequence[Example], lr: float) -> None:
    """One epoch of supervised fine-tuning (D26), as stage number `stage` of the run."""
    cfg = world.cfg
    order = shuffled(examples, f"{cfg.seed}/sft/{stage}")

    def make() -> Learner:
        if stage > 0 and cfg.retrain_from == "base" and cfg.self_play and run.position.step == 0:
            reopen(policy, cfg.model)
        return Learner(adamw(policy, lr), None)

    for step, learner in stage_steps(run, policy, stage, math.ceil(len(order) / cfg.sft_batch), make, cfg.save_every):
        batch = order[step * cfg.sft_batch : (step + 1) * cfg.sft_batch]
        values = sft_step(policy, learner, batch, cfg)
        check_finite(values, step, [x.sample_id for x in batch])
        learner.apply()
        run.count_update()
        run.log("sft", stage // 2, values, step)


def sft_step(policy: Policy, learner: Learner, batch: Sequence[Example], cfg: Config) -> dict[str, float]:
    """Gradient of the mean negative log-prob of the tokens of a batch."""
    lengths = [len(x.ids) for x in batch]
    weight_BT = token_weights(lengths, "token", max(lengths)).to(policy.device)
    learner.optimizer.zero_grad(set_to_none=True)

    def compute(part: list[Group], rows: slice, scale: float) -> float:
        logp_BT, _ = policy(part)
        loss = -(weight_BT[rows, : logp_BT.shape[1]].to(logp_BT.dtype) * logp_BT).sum()
        (scale * loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    losses = by_micro_batch([Group(x.prompt_ids, [x.ids]) for x in batch], cfg.micro_batch, compute)
    return {"loss/sft": math.fsum(losses), "grad_norm": clip_gradients(policy, MAX_GRAD_NORM)}


def adamw(policy: Policy, lr: float) -> torch.optim.AdamW:
    """A fresh optimizer; every stage has its own (D26)."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, **ADAMW)


def rl_stage(run: Run, world: World, policy: Policy, k: int) -> Iterator[int]:
    """The RL steps t of iteration k that are still to be done, with evaluations between them; `run.learner` learns."""
    cfg = world.cfg

    def make() -> Learner:
        if k == 1 and run.position.step == 0:
            save_parts(run.out / COLD_START_WEIGHTS, {"weights": weights(policy)})
        return Learner(adamw(policy, cfg.lr), policy.frozen_copy(offload=cfg.ref_offload))  # D6

    for step, _ in stage_steps(run, policy, 2 * k - 1, world.S, make, cfg.save_every):
        t = (k - 1) * world.S + step
        if step == 0:
            evaluate_dev(run, world, policy, k, t, "after the cold start" if k == 1 else f"after SFT {k - 1}")
        elif t % cfg.eval_every == 0:
            evaluate_dev(run, world, policy, k, t, f"RL step {t}")
        yield t


def finish(run: Run, world: World, policy: Policy) -> Policy:
    """Line 20: the model after the last SFT; scored on dev and, once in a run, on test; exported and reloaded."""
    cfg = world.cfg
    T = cfg.iterations * world.S
    make = lambda: Learner(adamw(policy, 0.0), None)  # noqa: E731  (nothing is trained here)
    for _ in stage_steps(run, policy, 2 * cfg.iterations + 1, 1, make, cfg.save_every):
        evaluate_dev(run, world, policy, cfg.iterations, T, f"after SFT {cfg.iterations}")
        evaluation(run, world, policy, group_by_dataset(world.test), cfg.iterations, T, "test", "test")
        export(run.out / "model", policy, world.tokenizer)
    return policy


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """The policy as a Hugging Face folder, checked by opening it again. Raises RuntimeError if it says other things."""
    whole = policy.sampler()
    if rank() > 0:
        return
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    whole.export(aside, tokenizer)
    write_sums(aside)
    prompt, _ = data.render(tokenizer, [{"role": "user", "content": "Who is there?"}])
    group = [Group(prompt, [prompt[-1:]])]
    with torch.no_grad():
        again = Policy.load(aside, whole.lm.dtype, whole.device)
        same = torch.allclose(whole(group)[0], again(group)[0], atol=1e-4)
    if not same:  # a tolerance: kernels may differ in the last bits, and a finished run must not fail for them
        raise RuntimeError(f"{aside} does not reload with equal log-probs")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)


# Evaluation


def evaluate_dev(run: Run, world: World, policy: Policy, k: int, t: int, when: str) -> None:
    """Scores on dev and, once there is one, on the SELF-EMO test split (D23)."""
    sets = group_by_dataset(world.dev)
    if run.position.stage > 0:
        sets["selfemo"] = self_emo_test(run, world, policy)
    evaluation(run, world, policy, sets, k, t, "eval", when)


def evaluation(
    run: Run, world: World, policy: Policy, sets: Mapping[str, Sequence[Sample]], k: int, t: int, name: str, when: str
) -> None:
    """One line of metrics: every set at every temperature, `name/<set>/acc` and so on, `@T` beside the first one."""
    values: dict[str, Any] = {"when": when}
    for temperature in world.cfg.eval_temperatures:
        mark = "" if temperature == world.cfg.eval_temperatures[0] else f"@{temperature:g}"
        for label, samples in sets.items():
            if samples:
                answers = [g[0] for g in answer(world, policy, samples, n=1, temperature=temperature, step=EVALUATION)]
                scores = evaluate.score(samples, [a.parse for a in answers])
                values |= scores.metrics(f"{name}/{label}{mark}/")
                values |= task_entropies(world, policy, samples, answers, f"{name}/{label}{mark}/entropy/")
    run.log("eval", k, values, t)
    shown = [f"{n} {v:.3f}" for n, v in values.items() if n.endswith(("/acc", "/iou", "/rule_rate"))]
    run.say(f"{when}: {', '.join(shown)}")


@torch.no_grad()
def task_entropies(
    world: World, policy: Policy, samples: Sequence[Sample], answers: Sequence[Answer], prefix: str
) -> dict[str, float]:
    """Mean token entropies of recognition, self-emotion and response over the valid answers (Fig. 6b)."""
    pairs = [(world.encode(s), a) for s, a in zip(samples, answers, strict=True) if isinstance(a.parse, Output)]

    def compute(part: list[Group], rows: slice, scale: float) -> list[dict[str, float]]:
        _, entropy_BT = policy(part)
        return [
            evaluate.task_entropies(entropy_T, a.ids, world.tokenizer, encoded[1], a.parse.spans)
            for (encoded, a), entropy_T in zip(pairs[rows], entropy_BT.tolist(), strict=True)
            if isinstance(a.parse, Output)
        ]

    groups = [Group(prompt, [a.ids]) for (prompt, _), a in pairs]
    found = by_micro_batch(groups, world.cfg.micro_batch, compute) if groups else []
    return metrics.means([row for part in found for row in part], prefix)


def self_emo_test(run: Run, world: World, policy: Policy) -> list[Sample]:
    """The SELF-EMO test split: one valid answer to each dev sample made a new sample, once, after the cold start (D23)."""
    path = run.out / "selfemo_test.jsonl"

    def make() -> str:
        groups = answer(world, policy, world.dev, n=1, temperature=world.cfg.temperature, step=SELF_EMO_TEST)
        parsed = [(s, g[0].parse) for s, g in zip(world.dev, groups, strict=True)]
        made = [data.new_sample(s, parse, 0) for s, parse in parsed if isinstance(parse, Output)]
        children = [child for child in made if isinstance(child, Sample) and world.fits(child)]
        return "".join(json.dumps(data.sample_record(c), ensure_ascii=False) + "\n" for c in children)

    return each(path, made_once(path, make), data.sample_from_record)


def progress_line(t: int, T: int, values: Mapping[str, Any]) -> str:
    """What a person wants to see of an RL step."""
    shown = [f"{short} {values[name]:.3g}" for short, name in SHOWN.items() if name in values]
    return f"step {t + 1}/{T}  {'  '.join(shown)}"


SHOWN: Mapping[str, str] = {
    "reward": "reward/mean",
    "iou": "reward/iou",
    "acc": "reward/acc",
    "consistency": "consistency/mean",
    "rule": "rule/rate",
    "entropy": "policy/entropy",
    "kl": "policy/kl",
    "clip": "clip_frac",
    "tokens/s": "rollout/tokens_per_s",
}


def train(cfg: Config) -> bool:
    """One run from start to end, or from its newest checkpoint to the end. False: a signal stopped it and it is saved."""
    if cfg.model == PRESETS["toy"].model and exchange(not Path(cfg.model).exists())[0]:
        announce("building the toy world in data/toy (once)")
        if rank() == 0:
            toy.build()
        wait()
    quiet_transformers()
    if cfg.cold_start == "expert" and not (Path(cfg.out) / "cold_start.jsonl").exists():
        open_experts(cfg.expert, cfg.expert_model)  # what is wrong there is said before anything is written
    world = open_world(cfg)
    policy = open_policy(cfg.model, activation_checkpointing=cfg.activation_checkpointing)
    few_threads(policy)
    if cfg.compile:
        compile_blocks(policy)
    settings = {**asdict(cfg), "S": world.S, "T": cfg.iterations * world.S, "versions": versions()}
    run = open_run(Path(cfg.out), json.loads(json.dumps(settings)), resume=cfg.resume, may_differ=MAY_DIFFER)
    if run.loaded is not None:
        read_part(run.loaded, "weights", weights(policy))
        run.say(f"going on from {run.loaded}")
    with run.signals():
        try:
            self_emo(run, world, policy)
        except NotFinite:
            run.rescue(policy)
            raise
        except Stopped:
            return False
    run.say(f"done: the model is in {run.out / 'model'}; check the run with: python evaluate.py audit {run.out}")
    return True


def versions() -> dict[str, str]:
    """What the numbers of a run were made with."""
    names = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {**names, "threads": str(torch.get_num_threads())}


def main(argv: Sequence[str]) -> int:
    """Run the command line. 0: done, or saved after a signal; 2: a mistake of the user's; 3: a number was not finite."""
    again = relaunch(argv)
    try:
        cfg = parse(argv)
        if cfg.plan is not None:
            announce(plan(cfg))
            return 0
        with processes():
            finished = train(cfg)
        if not finished:
            announce(f"saved; go on with: {again}")
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"stopped at once; go on from the last checkpoint with: {again}")
        return 130
    except NotFinite as error:
        complain(f"error: {error}; nothing was trained on it; lower --lr and go on with: {again}")
        return 3
    except torch.OutOfMemoryError as error:
        complain(f"error: out of memory ({str(error).splitlines()[0]}); see --plan; then go on with: {again}")
        return 2
    except PeerLost as error:
        complain(f"error: {error}; go on from the last checkpoint with: {again}", lost=True)
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        complain(f"error: {error.strerror or error}{where}; the last checkpoint is whole: {again}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
