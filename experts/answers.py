"""The cold start from an expert's answers (Table 5, D17)."""

from functools import partial
from pathlib import Path

import data
from common.errors import UserError
from data import Failure, Sample
from experts.asking import Settings, ask_drawn, open_experts
from experts.cache import open_cache
from experts.contracts import reason_counts
from experts.responses import THINK, Reply, Unanswered
from training.task import Task


def taught_ids(task: Task, sample: Sample, reply: Reply | Unanswered) -> tuple[int, ...] | Failure:
    """An expert's answer as tokens of the policy with its stop token, if what they say keeps the rule."""
    if isinstance(reply, Unanswered):
        return Failure("unanswered", reply.why)
    _, prefix = task.encode(sample)
    # Where the policy's template opens the think block, the answer begins inside of it.
    text = THINK.sub("", reply.text, count=1) if prefix and THINK.match(reply.text) else reply.text
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) >= task.cfg.max_new_tokens:
        return Failure("too_long", f"{len(ids)} tokens and the stop token")
    if (task.eos | set(task.tokenizer.all_special_ids)) & set(ids):
        return Failure("control", "a control token inside")
    taught = (*ids, task.stop)
    said = data.answer_text(task.tokenizer, taught, task.eos, prefix)
    parse = data.parse_output(said, sample.labels, finished=reply.finished)
    return parse if isinstance(parse, Failure) else taught


def cold_start_answers(task: Task) -> list[tuple[Sample, tuple[int, ...]]]:
    """Training samples and an expert's answers that keep the rule; of several experts each sample draws one.

    The answers are kept in expert.jsonl of the run. Raises `UserError` where none is valid.
    """
    cfg = task.cfg
    experts = open_experts(cfg.expert, cfg.expert_model)
    settings = Settings(cfg.temperature, cfg.max_new_tokens, cfg.seed, date=cfg.date)
    path, samples = Path(cfg.out) / "expert.jsonl", task.originals
    with open_cache(path) as cache:
        replies = ask_drawn(experts, {x.id: partial(data.messages, x, task.prompts) for x in samples}, settings, cache)
    read = [(sample, taught_ids(task, sample, replies[sample.id])) for sample in samples]
    kept = [(sample, ids) for sample, ids in read if not isinstance(ids, Failure)]
    reasons = reason_counts(ids.reason for _, ids in read if isinstance(ids, Failure))
    dropped = f"; dropped: {reasons}" * bool(reasons)
    print(f"expert: {len(kept)} of {len(samples)} answers keep the rule{dropped}", flush=True)
    if not kept:
        raise UserError(f"the expert keeps the rule in none of its answers ({reasons}), see {path}: take another --expert")
    return kept
