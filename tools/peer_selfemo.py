"""Ours as a side of tools.bench: `rollout.generate`, and line 9 of Algorithm 1 as `selfemo.update` does it."""

import os
from collections.abc import Sequence
from typing import Any, cast

import torch

import selfemo
from config import Config
from data import Failure, Sample, Selection
from model import Policy, quiet_transformers
from rollout import Completion, generate
from runs import Learner, ScoredGroup
from tools.peer import Found, Job, serve, timed
from world import Answer


def open_side(model: str, dtype: str) -> Any:
    """Open the policy."""
    quiet_transformers()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    opened = Policy.load(model, getattr(torch, dtype))

    def run(job: Job) -> Found:
        if job["task"] == "rollout":
            seconds, groups = timed(lambda: rollout(opened, job))
            return {"seconds": seconds, "tokens": sum(len(c.ids) for group in groups for c in group)}
        return step(opened, job)

    return run


def rollout(policy: Policy, job: Job) -> list[list[Completion]]:
    """Answers of full length."""
    keys = [(0, 0, str(i)) for i in range(len(job["prompts"]))]
    settings = {"n": job["n"], "max_new_tokens": job["max_new_tokens"], "kv_budget": job["kv_mib"] * 2**20 or None}
    return generate(policy, job["prompts"], temperature=1.0, eos_ids=(), keys=keys, **settings)


def step(policy: Policy, job: Job) -> Found:
    """A whole RL step with one mini-batch: rollout, reference log-probs, gradient, AdamW."""
    cfg = Config(n=job["n"], micro_batch=job["micro_batch"], mini_batch_prompts=len(job["prompts"]))
    learner = Learner(torch.optim.AdamW(policy.parameters(), lr=1e-6, **selfemo.ADAMW), policy.frozen_copy())
    generate_s, groups = timed(lambda: rollout(policy, job))
    scored = [scored_group(ids, group) for ids, group in zip(job["prompts"], groups, strict=True)]
    score_s, scores = timed(lambda: score(learner, scored, cfg))

    def update() -> None:
        selfemo.mini_batch(policy, learner, scored, scores, cfg)
        learner.optimizer.step()

    update_s, _ = timed(update)
    tokens = sum(len(c.ids) for group in groups for c in group)
    parts = {"generate_s": generate_s, "score_s": score_s, "update_s": update_s}
    return {"seconds": sum(parts.values()), "tokens": tokens, **parts}


def score(learner: Learner, scored: Sequence[ScoredGroup], cfg: Config) -> selfemo.Scores:
    """Log-probs before the update: the reference's. The update finds the policy's own, as in the first of every RL step."""
    assert learner.reference is not None
    return selfemo.Scores(None, selfemo.logprobs(learner.reference, [s.group for s in scored], cfg))


def scored_group(ids: Sequence[int], group: Sequence[Completion]) -> ScoredGroup:
    """A group as the update wants it; the advantages are any numbers that differ."""
    answers = tuple(Answer(c.ids, c.logprobs, c.finished, "", Failure("unfinished", "")) for c in group)
    values = tuple(float(i % 3 - 1) for i in range(len(group)))
    sample = cast(Sample, None)  # the update looks at tokens and advantages alone
    return ScoredGroup(sample, tuple(ids), answers, values, {}, values, values, Selection(None, "off", None))


if __name__ == "__main__":
    serve(["torch", "transformers"], open_side)
