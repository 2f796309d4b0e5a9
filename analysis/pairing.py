"""Which answers are compared (Fig. 3): those a run recorded at an early and a late step, or those of two models.

A pair is one early and one late answer to the same prompt, where both steps answered it; else of the same persona, dataset
and kind of responder; else of the same dataset and kind. Each answer stands in one pair at most.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from analysis.audit import rollouts
from analysis.totals import rl_step
from common.draws import shuffled, stable_hash
from common.errors import UserError
from common.files import Record, read_json, read_lines
from common.flags import pairs
from data import Failure, Output, Prompts, Sample
from experts.asking import Settings, ask, open_experts
from experts.cache import Cache
from experts.responses import Reply, Unanswered
from training.config import of_run
from training.folder import undamaged
from training.records import sample_from_record
from training.task import read_samples


@dataclass(frozen=True)
class Said:
    """A valid answer: which one it is, what it answers, and how it reads."""

    where: str
    sample: Sample
    output: Output


@dataclass(frozen=True)
class Pair:
    """Two answers to compare, and what their prompts share."""

    early: Said
    late: Said
    match: str


def span(text: str, flag: str) -> range:
    """Steps of STEP or FIRST-LAST, both counted from 0 as in rollouts/. Raises `UserError`."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not steps:
        raise UserError(f"{flag} {text}: give a step or FIRST-LAST, such as 0 or 0-9")
    return steps


def known_samples(run: Path, moved: Sequence[str]) -> dict[str, Sample]:
    """Every sample of a run by id: originals from the data of its config (or of `moved`), the others as it made them."""
    cfg = of_run(read_json(run / "config.json"))
    split = read_samples(cfg, pairs("data", moved or cfg.data))
    made = [sample_from_record(row["child"]) for row in read_lines(run / "buffer.jsonl")]
    return {sample.id: sample for part in (*split.values(), made) for sample in part}


def drawn(record: Record, samples: Mapping[str, Sample], seed: int) -> Said | None:
    """One of a group's valid answers, by hash; None where none is valid. Raises `UserError` for a sample that is unknown."""
    valid = [answer for answer in record["answers"] if answer["parse"]["reason"] is None]
    if not valid:
        return None
    name = record["sample_id"]
    if name not in samples:
        raise UserError(f"{name} is not in the data of this run: say with --data NAME=DIR where that is now")
    answer = valid[stable_hash(f"{seed}/judge/{record['step']}/{name}") % len(valid)]
    output = data.parse_output(answer["text"], record["labels"], finished=answer["finished"])
    if isinstance(output, Failure):
        where = f"{name}, {rl_step(record['step'])}, answer {answer['index']}"
        raise UserError(f"{where} is not what the run read: see its audit")
    return Said(f"{name}, step {record['step']}, answer {answer['index']}", samples[name], output)


MATCHES: Mapping[str, Callable[[Sample], object]] = {
    "prompt": lambda sample: sample.id,
    "persona": lambda sample: (sample.dataset, sample.responder.kind, sample.responder.persona or sample.id),
    "kind": lambda sample: (sample.dataset, sample.responder.kind),
}


def paired(early: Sequence[Said], late: Sequence[Said], seed: int) -> list[Pair]:
    """Pairs by a seeded draw, those that share most first; each answer is used once, the rest stays out."""
    found: list[Pair] = []
    firsts, seconds = shuffled(early, f"{seed}/judge/early"), shuffled(late, f"{seed}/judge/late")
    for match, key in MATCHES.items():
        waiting: defaultdict[object, list[Said]] = defaultdict(list)
        for said in seconds:
            waiting[key(said.sample)].append(said)
        left = []
        for said in firsts:
            partners = waiting[key(said.sample)]
            if partners:
                found.append(Pair(said, partners.pop(0), match))
            else:
                left.append(said)
        firsts, seconds = left, [said for partners in waiting.values() for said in partners]
    return found


def recorded(run: Path, early: str, late: str, *, moved: Sequence[str] = (), seed: int = 0) -> tuple[list[Pair], str]:
    """Pairs from the rollouts of a run at steps (`span`) early and late, and a line on what had no valid answer.

    `moved`: NAME=DIR of its data, where that is not as its config says. Raises `UserError`.
    """
    first, last = span(early, "--early"), span(late, "--late")
    if first[-1] >= last[0]:
        raise UserError(f"--early {early} must end before --late {late} begins")
    groups = [record for _, record in rollouts(undamaged(run))]
    found = [[record for record in groups if record["step"] in steps] for steps in (first, last)]
    if not all(found):
        raise UserError(f"{run} has no rollouts of steps {late if found[0] else early}: its last is {groups[-1]['step']}")
    samples = known_samples(run, moved)
    sides = [[drawn(record, samples, seed) for record in part] for part in found]
    before, after = ([said for said in side if said] for side in sides)
    return paired(before, after, seed), missing(sides, "groups")


def answered(
    models: Sequence[str], samples: Sequence[Sample], prompts: Prompts, settings: Settings, cache: Cache
) -> tuple[list[Pair], str]:
    """Pairs of what two models (folders) answer to the same samples, and a line on what is not valid. Raises `UserError`."""
    sides = []
    for place in models:
        (model,) = open_experts([place], flags=("--early and --late", "model name"))
        chats = [data.messages(sample, prompts, model.control) for sample in samples]
        replies = ask(model, chats, settings, cache)
        sides.append([read_answer(place, sample, reply) for sample, reply in zip(samples, replies, strict=True)])
    return [Pair(a, b, "prompt") for a, b in zip(*sides, strict=True) if a and b], missing(sides, "answers")


def read_answer(model: str, sample: Sample, reply: Reply | Unanswered) -> Said | None:
    """A model's answer, if it keeps the rule."""
    if isinstance(reply, Unanswered):
        return None
    output = data.parse_output(reply.text, sample.labels, finished=reply.finished)
    return Said(f"{sample.id}, {model}", sample, output) if isinstance(output, Output) else None


def missing(sides: Sequence[Sequence[Said | None]], what: str) -> str:
    """What cannot be compared: early, then late."""
    named = zip(("early", "late"), sides, strict=True)
    counts = (f"{side.count(None)} of {len(side)} {name} {what}" for name, side in named)
    return f"without a valid answer: {', '.join(counts)}"
