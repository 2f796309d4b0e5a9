"""Supervised fine-tuning: the cold start (line 3, D17) and the retraining of lines 17-18 (D12, D13, D26)."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from common.draws import shuffled, stable_hash
from common.errors import UserError
from common.files import build_records, jsonl
from corpora.dialogue import Weights
from data import Output, Sample, format_output
from engine.batches import my_micro_batches, on_host
from engine.fsdp import clip_gradients, reopen
from engine.processes import rank, size
from experts import answers
from grpo import token_weights
from model import Group, Policy
from training import metrics
from training.config import Config
from training.folder import Learner, Run, made_once, stage_steps
from training.task import COLD_START, Example, NotFinite, Task, answer

MAX_GRAD_NORM = 1.0
ADAMW: Mapping[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01, "fused": True}  # one pass, no copies


# Line 3: what is learned


def examples(run: Run, task: Task, policy: Policy) -> list[Example]:
    """What the cold start learns, kept in cold_start.jsonl: one answer per original sample, where there is a valid one."""
    path = run.out / "cold_start.jsonl"

    def make() -> str:
        makers: Mapping[str, Callable[[Task, Policy], list[Example]]]
        makers = {"self": partial(own_answers, run), "dataset": templates, "expert": expert_answers}
        found = makers[task.cfg.cold_start](task, policy) if task.cfg.cold_start in makers else []
        run.say(f"cold start ({task.cfg.cold_start}): {len(found)} answers to {len(task.originals)} prompts")
        return jsonl([{"sample_id": x.sample_id, "prompt_ids": x.prompt_ids, "ids": x.ids} for x in found])

    read = lambda x: Example(x["sample_id"], tuple(x["prompt_ids"]), tuple(x["ids"]))  # noqa: E731
    found = build_records(path, made_once(path, make), read)
    if rank() == 0:
        shutil.rmtree(run.out / PARTS, ignore_errors=True)
    return found


PARTS, PART = "cold_start.parts", 512  # folder of the run; prompts of a part per rank, all that a stop can lose


def own_answers(run: Run, task: Task, policy: Policy) -> list[Example]:
    """The start model's own answers that keep the rule; gold is not looked at. Parts are kept, and not answered again."""
    answered: list[tuple[int, ...]] = []  # by prompt; () where the answer breaks the rule
    while left := task.originals[len(answered) :]:
        run.pause(policy)
        path = run.out / PARTS / f"{len(answered):06d}.jsonl"
        records = made_once(path, partial(own_part, task, policy, left[: PART * size()]))
        if not records:
            raise UserError(f"{path} is empty: delete it")
        answered += build_records(path, records, lambda x: tuple(x["ids"]))
    pairs = zip(task.originals, answered, strict=True)
    found = [Example(sample.id, tuple(task.encode(sample)[0]), ids) for sample, ids in pairs if ids]
    if not found:
        raise UserError("the start model keeps the rule in none of its answers: take --cold_start dataset")
    return found


def own_part(task: Task, policy: Policy, samples: Sequence[Sample]) -> str:
    """Own answers to some prompts as JSON lines, one per prompt."""
    groups = answer(task, policy, samples, n=1, temperature=task.cfg.temperature, step=COLD_START)
    return jsonl([{"ids": a.ids if isinstance(a.parse, Output) else ()} for (a,) in groups])


def templates(task: Task, policy: Policy) -> list[Example]:
    """Gold, the real next turn and its label in a template: teaches the format to a small model."""
    found = []
    for sample in task.originals:
        target = dataset_target(sample)
        if target is not None:
            prompt, prefix = task.encode(sample)
            ids = task.tokenizer(target.removeprefix(prefix), add_special_tokens=False)["input_ids"]
            found.append(Example(sample.id, tuple(prompt), (*ids, task.stop)))
    return [x for x in found if len(x.ids) <= task.cfg.max_new_tokens]


def expert_answers(task: Task, policy: Policy) -> list[Example]:
    """The expert's answers that keep the rule: the row "w/ COLD" of Table 2."""
    found = answers.cold_start_answers(task) if rank() == 0 else []  # asked, and paid for, once
    return [Example(s.id, tuple(task.encode(s)[0]), ids) for s, ids in found]


def dataset_target(sample: Sample) -> str | None:
    """The templated answer that the cold start `dataset` teaches: format, not insight (D17). None without a next turn.

    Half of the samples show a second emotion, that of the nearest earlier turn that differs, so that the format has room.
    """
    if sample.following is None or sample.following.label is None:
        return None
    last, mine = heaviest_three(sample.gold), heaviest_three(sample.following.label)
    earlier = (emotion for turn in reversed(sample.context[:-1]) for emotion in list(heaviest_three(turn.label or {}))[:1])
    second = next((emotion for emotion in earlier if emotion not in last), None)
    if len(last) == 1 and second and stable_hash(sample.id) % 2:
        last = {**dict.fromkeys(last, 0.8), second: 0.3}
    reasoning = f"The last speaker shows {' and '.join(last)}. I feel {' and '.join(mine)} and say so."
    return format_output(reasoning, last, mine, sample.following.text, quoted=double_quoted)


def double_quoted(text: str) -> str:
    """A string, always in double quotes. `repr` goes by whether an apostrophe will follow, which a model cannot know yet."""
    return json.dumps(text, ensure_ascii=False)


def heaviest_three(weights: Weights) -> dict[str, float]:
    """The three heaviest emotions, heaviest first, with weights that the format admits."""
    scale = max(1.0, *weights.values(), 0.0)
    heaviest = sorted(weights, key=lambda emotion: -weights[emotion])[:3]
    return {emotion: max(0.1, round(weights[emotion] / scale, 2)) for emotion in heaviest}


# Lines 17-18, and the training of line 3


def sft(run: Run, task: Task, policy: Policy, stage: int, examples: Sequence[Example], lr: float) -> None:
    """One epoch of supervised fine-tuning (D26), as stage number `stage` of the run."""
    cfg = task.cfg
    order = shuffled(examples, f"{cfg.seed}/sft/{stage}")

    def make() -> Learner:
        if stage > 0 and cfg.retrain_from == "base" and cfg.self_play and run.position.step == 0:
            reopen(policy, cfg.model)
        return Learner(adamw(policy, lr), None)

    for step, learner in stage_steps(run, policy, stage, math.ceil(len(order) / cfg.sft_batch), make, cfg.save_every):
        batch = order[step * cfg.sft_batch : (step + 1) * cfg.sft_batch]
        values = sft_step(policy, learner, batch, cfg)
        check_finite(values, f"fine-tuning step {step + 1}", [x.sample_id for x in batch])
        learner.apply()
        run.count_update()
        run.log("sft", stage // 2, values, step)


def sft_step(policy: Policy, learner: Learner, batch: Sequence[Example], cfg: Config) -> dict[str, float]:
    """Gradient of the mean negative log-prob of the tokens of a batch."""
    lengths = [len(x.ids) for x in batch]
    weight_BT = token_weights(lengths, "token", max(lengths)).to(policy.device)
    learner.optimizer.zero_grad(set_to_none=True)
    found = []
    for part in my_micro_batches([Group(x.prompt_ids, [x.ids]) for x in batch], cfg.micro_batch):
        logp_BT, _ = policy(part.groups)
        loss = -(weight_BT[part.rows, : logp_BT.shape[1]].to(logp_BT.dtype) * logp_BT).sum()
        (part.scale * loss).backward()  # type: ignore[no-untyped-call]
        found.append((part, {"loss/sft": loss.detach()}))
    return {**metrics.added(on_host(found)), "grad_norm": clip_gradients(policy, MAX_GRAD_NORM)}


def adamw(policy: Policy, lr: float) -> torch.optim.AdamW:
    """A fresh optimizer; every stage has its own (D26)."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, **ADAMW)


def check_finite(values: Mapping[str, float], when: str, ids: Sequence[str]) -> None:
    """Raise `NotFinite` before the optimizer would train on a NaN or an infinity."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"{', '.join(bad)} is not finite at {when}; prompts of the mini-batch: {', '.join(ids)}")
