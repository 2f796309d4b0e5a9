"""A scored group, and the line of rollouts/*.jsonl that an audit recomputes it from."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import data
from common.errors import UserError
from common.files import Record, numbered
from corpora.dialogue import Turn
from data import Completion, Failure, Output, Responder, Sample, Selection
from model import Group
from training.task import Example, Task


@dataclass(frozen=True)
class ScoredGroup:
    """The n answers to one prompt with everything Eqs. 8-13 say about them."""

    sample: Sample
    prompt_ids: tuple[int, ...]
    answers: tuple[Completion, ...]
    rewards: tuple[float, ...]
    core: Mapping[str, float]
    consistencies: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def group(self) -> Group:
        """What the policy is trained on: token ids, never text."""
        return Group(self.prompt_ids, [answer.ids for answer in self.answers])


def parse_record(parse: Output | Failure) -> Record:
    """What a rollout record says of a parsed answer, its three keys in the answer's own order; `reason` is null where the
    rule holds."""
    if isinstance(parse, Failure):
        return {"reason": parse.reason, "detail": parse.detail}
    said = {"last_emotions": dict(parse.last_emotions), "my_emotions": dict(parse.my_emotions), "my_output": parse.my_output}
    order = sorted(said, key=lambda key: parse.spans.get(key, (0, 0)))
    return {"reason": None, **{key: said[key] for key in order}}


def group_record(
    scored: ScoredGroup, selection: Selection, *, step: int, iteration: int, lam: float, version: int
) -> Record:
    """The line of rollouts/*.jsonl for one group; floats keep their float64 repr, `sha256` covers the rest of the line."""
    sample = scored.sample
    columns = zip(scored.answers, scored.rewards, scored.consistencies, scored.advantages, strict=True)
    answers = [
        {
            "index": index, "ids": list(answer.ids), "text": answer.text, "finished": answer.finished,
            "logprobs": list(answer.logprobs), "parse": parse_record(answer.parse),
            "reward": reward, "consistency": consistency, "advantage": advantage,
        }
        for index, (answer, reward, consistency, advantage) in enumerate(columns)
    ]  # fmt: skip
    record: Record = {
        "step": step, "iteration": iteration, "sample_id": sample.id, "dataset": sample.dataset, "origin": sample.origin,
        "parent": sample.parent, "depth": sample.depth, "responder": asdict(sample.responder), "labels": list(sample.labels),
        "gold": dict(sample.gold), "prompt_ids": list(scored.prompt_ids), "lam": lam, "core": dict(scored.core),
        "weights_version": version, "answers": answers, "selected": selection.index, "why": selection.why,
    }  # fmt: skip
    return {**record, "sha256": digest(record)}


def buffer_record(kept: Example) -> Record:
    """The line of buffer.jsonl for a kept answer."""
    ids = {"prompt_ids": list(kept.prompt_ids), "ids": list(kept.ids)}
    child = kept.child and sample_record(kept.child)
    return {"iteration": kept.iteration, "sample_id": kept.sample_id, **ids, "child": child}


def buffer_from_record(record: Mapping[str, Any]) -> Example:
    """The kept answer that `buffer_record` wrote."""
    ids, child = (tuple(record["prompt_ids"]), tuple(record["ids"])), sample_from_record(record["child"])
    return Example(record["sample_id"], *ids, record["iteration"], child)


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, its own `sha256` left out."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sample_record(sample: Sample) -> dict[str, Any]:
    """The sample as JSON values."""
    return asdict(sample)


def sample_from_record(record: Mapping[str, Any]) -> Sample:
    """The sample that `sample_record` wrote."""
    turns = tuple(Turn(**turn) for turn in record["context"])
    following = Turn(**record["following"]) if record["following"] else None
    responder, labels = Responder(**record["responder"]), tuple(record["labels"])
    return Sample(**{**record, "context": turns, "following": following, "responder": responder, "labels": labels})


# Prompts rendered again


def check_prompts(task: Task, out: Path, settings: Record) -> None:
    """Raise `UserError` where the prompts of a task are not those of the run in `out`, which has kept these settings.

    They are not if the data, --prompts, the template or the tokenizer has changed since. A run of an earlier version kept no
    SHA-256 of its prompts: then those that it has recorded decide.
    """
    kept = settings.get("prompt_sums")
    if kept == task.prompt_sums:
        return
    mend = "restore the tokenizer, data and --prompts that it began with (and --date), or give another --out"
    samples = {sample.id: sample for sample in task.originals}
    for name, ids in recorded_prompts(out):
        if name in samples and (said := parted(task.tokenizer, ids, task.encode(samples[name])[0])):
            raise UserError(f"{out}: the prompt of {name} has changed: {said}; {mend}")
    if kept is not None:
        same = kept.items() if isinstance(kept, dict) else ()
        changed = [split for split, found in task.prompt_sums.items() if (split, found) not in same]
        raise UserError(f"{out}: prompts of {', '.join(changed)} have changed since the run began (SHA-256); {mend}")


def recorded_prompts(out: Path) -> Iterator[tuple[str, list[int]]]:
    """(sample id, token ids of its prompt), as a run has written them down, one by one."""
    for path in (out / "cold_start.jsonl", *sorted((out / "rollouts").glob("*.jsonl"))):
        for _, record in numbered(path):
            yield record["sample_id"], record["prompt_ids"]


def parted(tokenizer: Any, recorded: Sequence[int], now: Sequence[int], around: int = 30) -> str:
    """Where a prompt differs from the recorded one, in words; "" where they are the same tokens."""
    if list(recorded) == list(now):
        return ""
    was, text = (data.answer_text(tokenizer, ids, (), "") for ids in (recorded, now))
    at = len(commonprefix([was, text]))
    if was == text:
        return f"the same text has other token ids, {len(recorded)} and now {len(now)}"
    shown = slice(max(0, at - around), at + around)
    return f"{was[shown]!r} was recorded, now it is {text[shown]!r}"
