"""What a run learns from and is measured on: samples, prompts and tokenizer, the replay buffer, and parsed answers."""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import data
from common.draws import distinct, first_shuffled, shuffled, uniforms
from common.errors import UserError
from common.files import read_json
from common.flags import number, pairs
from common.hub import eos_ids, load_tokenizer
from common.template import day, remarks
from corpora.dialogue import SPLITS, Turn, Weights
from corpora.loading import label_set, load, read_gold, read_personas, with_votes
from corpora.sharing import overlap
from data import Completion, Sample, heaviest
from engine.fast import cuda_graphs
from engine.processes import announce, device_memory, exchange, gathered, give_back_memory, rank, share
from grpo import lam
from model import Policy
from rollout import generate
from training.config import Config

EVALUATION, SELF_EMO_TEST, COLD_START, LABEL_NOISE = -1, -2, -3, -4  # for a step in keys of random streams elsewhere


class NotFinite(Exception):
    """A NaN or an infinity, with the step and the sample ids; nothing was trained on it."""


@dataclass(frozen=True)
class Task:
    """Everything a run reads: samples, tokenizer, prompts. `prompt_sums`: split -> SHA-256 of its prompts."""

    cfg: Config
    tokenizer: Any
    eos: frozenset[int]
    prompts: data.Prompts
    originals: tuple[Sample, ...]  # D0
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]
    prompt_sums: Mapping[str, str] = field(default_factory=dict)

    def encode(self, sample: Sample) -> tuple[list[int], str]:
        """Token ids of a sample's prompt, and how its answers begin if the template opened a think block."""
        return data.encode(self.tokenizer, sample, self.prompts, self.cfg.date)

    def fits(self, sample: Sample) -> bool:
        """Whether the prompt keeps to the limit."""
        return len(self.encode(sample)[0]) <= self.cfg.max_prompt_tokens

    @property
    def stop(self) -> int:
        """The stop token that ends a turn of the chat template: the tokenizer's own (Qwen3 has a second one for texts)."""
        own = self.tokenizer.eos_token_id
        return own if own in self.eos else min(self.eos)

    @property
    def S(self) -> int:
        """RL steps per iteration (D7)."""
        return self.cfg.steps or math.ceil(len(self.originals) / self.cfg.batch_prompts)

    def lam(self, t: int) -> float:
        """Lambda at RL step t of the run: t/T, or within the iteration if each starts from the base model (D7)."""
        if not self.cfg.self_grpo:
            return 0.0
        return lam(t % self.S, self.S) if self.cfg.retrain_from == "base" else lam(t, self.cfg.iterations * self.S)


@dataclass(frozen=True)
class Example:
    """An answer to learn: of the cold start (iteration 0), or kept by an iteration with the new sample d* it makes (Eq. 7).

    In training the prompt is masked and the stop token, the last of `ids`, is learned.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    iteration: int = 0
    child: Sample | None = None


@dataclass(frozen=True)
class Buffer:
    """The replay buffer: D0, and what selection has kept, in order. What iteration k keeps, k + 1 draws."""

    originals: tuple[Sample, ...]
    kept: tuple[Example, ...] = ()

    def samples(self, k: int, max_synthetic: int) -> list[Sample]:
        """D0 and the living synthetic samples at the start of iteration k: one per parent, the newest (D11)."""
        newest = {kept.sample_id: kept.child for kept in self.kept if kept.child and kept.iteration < k}
        children = sorted(newest.values(), key=lambda child: (child.iteration, child.id))
        return [*self.originals, *(children[-max_synthetic:] if max_synthetic else children)]

    def draw(self, k: int, step: int, cfg: Config) -> list[Sample]:
        """Line 6: the prompts of a step of iteration k, without replacement until the buffer is through (D7)."""
        samples, key = self.samples(k, cfg.max_synthetic), f"{cfg.seed}/prompts/{k}"
        stream = by_size = endless(samples, key)
        if cfg.even_labels:
            parts = {name: evenly(own, f"{key}/{name}") for name, own in group_by_dataset(samples).items()}
            stream = (next(parts[sample.dataset]) for sample in by_size)
        return list(itertools.islice(stream, step * cfg.batch_prompts, (step + 1) * cfg.batch_prompts))

    def add(self, kept: Sequence[Example]) -> "Buffer":
        """Line 15."""
        return replace(self, kept=(*self.kept, *kept))


def endless(samples: Sequence[Sample], key: str) -> Iterator[Sample]:
    """All samples in a seeded order, and then again and again in another one."""
    return itertools.chain.from_iterable(shuffled(samples, f"{key}/{epoch}") for epoch in itertools.count())


def evenly(samples: Sequence[Sample], key: str) -> Iterator[Sample]:
    """Class-balanced sampling: the heaviest gold labels take turns, in each round in another order, with the next sample of
    their own (Kang et al. 2020, arXiv 1910.09217). Rare ones come again sooner."""
    labels = sorted({heaviest(sample.gold) for sample in samples})
    own = {label: endless([s for s in samples if heaviest(s.gold) == label], f"{key}/{label}") for label in labels}
    return (next(own[label]) for turn in itertools.count() for label in shuffled(labels, f"{key} {turn}"))


def answer(
    task: Task, policy: Policy, samples: Sequence[Sample], *, n: int, temperature: float, step: int
) -> list[list[Completion]]:
    """Generate, decode and parse. `step` keys the random streams: a step >= 0 in training, below that in evaluation.

    The ranks divide the prompts and all get every answer. Raises `NotFinite` where the model's logits are not numbers.
    """
    encoded = [task.encode(sample) for sample in samples]
    keys = [(task.cfg.seed, step, key) for key in distinct([sample.id for sample in samples])]
    mine = share([len(ids) for ids, _ in encoded])
    try:
        found = generate(
            policy.sampler(), [encoded[i][0] for i in mine], n=n, max_new_tokens=task.cfg.max_new_tokens,
            temperature=temperature, eos_ids=task.eos, keys=[keys[i] for i in mine],
            kv_budget=task.cfg.kv_budget or device_memory(policy.device) // 2,
            progress=sys.stderr.isatty() and rank() == 0,
            record=cuda_graphs() if task.cfg.compile and policy.device.type == "cuda" else None,
        )
        trouble = ""
    except FloatingPointError as error:
        found, trouble = [], str(error)
    give_back_memory()
    if trouble := next(filter(None, exchange(trouble)), ""):
        stage = "the cold start" if step == COLD_START else "an evaluation"
        ids, when = [s.id for s in samples], f"RL step {step + 1}" if step >= 0 else stage
        shown = ", ".join(ids[:64]) + f" and {len(ids) - 64} more" * (len(ids) > 64)
        raise NotFinite(f"{trouble} at {when}; prompts: {shown}")
    own = {i * n + j: as_numbers(c) for i, group in zip(mine, found, strict=True) for j, c in enumerate(group)}
    rows = iter([from_numbers(numbers) for numbers in gathered(own)])
    return [
        [read(task, sample, prefix, completion) for completion in itertools.islice(rows, n)]
        for sample, (_, prefix) in zip(samples, encoded, strict=True)
    ]


def read(task: Task, sample: Sample, prefix: str, completion: Completion) -> Completion:
    """The completion with its text and what that says (Eq. 6). `prefix`: a think block that the template has begun."""
    text = data.answer_text(task.tokenizer, completion.ids, task.eos, prefix)
    return replace(completion, text=text, parse=data.parse_output(text, sample.labels, finished=completion.finished))


def as_numbers(completion: Completion) -> list[float]:
    """A completion as one row of numbers, as ranks exchange it."""
    return [completion.finished, *completion.ids, *completion.logprobs]


def from_numbers(numbers: Sequence[float]) -> Completion:
    """The completion that `as_numbers` wrote."""
    finished, *rest = numbers
    tokens = len(rest) // 2
    return Completion(tuple(map(int, rest[:tokens])), tuple(rest[tokens:]), bool(finished))


def open_task(cfg: Config) -> Task:
    """Read data, tokenizer and prompts, and say what there is; the settings of the task have a date in any case.

    Raises `UserError` for what is missing or wrong.
    """
    cfg = replace(cfg, date=date_of_run(cfg))
    splits = read_splits(cfg)
    tokenizer = load_tokenizer(cfg.model)
    prompts = data.read_prompts(Path(cfg.prompts)) if cfg.prompts else data.DEFAULT
    for line in remarks(tokenizer, cfg.date):
        announce(line)
    task = Task(cfg, tokenizer, eos_ids(cfg.model, tokenizer), prompts, (), (), ())
    found = {split: fitting_samples(task, samples) for split, samples in splits.items()}
    fitting = {split: own for split, (own, _) in found.items()}
    sums = {split: digest for split, (_, digest) in found.items()}
    if not fitting["train"]:
        raise UserError(f"no training prompt has at most {cfg.max_prompt_tokens} tokens: raise --max_prompt_tokens")
    for split, samples in splits.items():
        dropped = len(samples) - len(fitting[split])
        announce(f"{split}: {len(fitting[split])} samples" + f", {dropped} over --max_prompt_tokens dropped" * (dropped > 0))
    announce(mixture_line(fitting["train"], cfg.even_labels))
    described = sum(sample.responder.persona is not None for sample in fitting["train"])
    if cfg.personas or not described:
        none = "no personas given: prompts describe nobody (Eq. 4: python -m experts personas, then --personas)"
        announce(f"personas: {described} of {len(fitting['train'])} training prompts have one" if cfg.personas else none)
    if all(len(sample.gold) == 1 for sample in fitting["train"]):
        announce("gold is one label per sample: answers that all name it alone leave Eq. 12 nothing to compare (D14)")
    return replace(task, originals=fitting["train"], dev=fitting["dev"], test=fitting["test"], prompt_sums=sums)


def date_of_run(cfg: Config) -> str:
    """The date that the chat template sees in a run: --date, or what the run has kept, or today where rank 0 is."""
    config = Path(cfg.out) / "config.json"
    kept = read_json(config).get("date") if cfg.resume and config.exists() else ""
    return exchange(day(cfg.date or str(kept or "")))[0]


def fitting_samples(task: Task, samples: Iterable[Sample]) -> tuple[tuple[Sample, ...], str]:
    """The samples whose prompts keep to the limit, and the SHA-256 of these prompts."""
    kept, sums = list[Sample](), hashlib.sha256()
    for sample in samples:
        ids, _ = task.encode(sample)
        if len(ids) <= task.cfg.max_prompt_tokens:
            kept.append(sample)
            sums.update(json.dumps([sample.id, ids]).encode())
    return tuple(kept), sums.hexdigest()


def mixture_line(samples: Sequence[Sample], even_labels: bool = False) -> str:
    """How often each dataset is drawn: all samples in one seeded shuffle, so by size; each keeps its own labels."""
    labels = ", evenly over its labels" if even_labels else ""
    parts = [
        f"{name} {100 * len(own) / len(samples):.1f} % ({len(own)} samples, {len(own[0].labels)} labels)"
        for name, own in group_by_dataset(samples).items()
    ]
    return f"prompts are drawn by size of dataset{labels}, seeded: {', '.join(parts)}"


def read_splits(cfg: Config) -> dict[str, list[Sample]]:
    """The samples of every split over all datasets, limited as the settings say, by size and seeded."""
    roots = pairs("data", cfg.data)
    limits = {name: number(value) for name, value in pairs("limit", cfg.limit).items()}
    if unknown := set(limits) - set(roots):
        raise UserError(f"--limit names {', '.join(sorted(unknown))}, which is not among --data")
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for (name, split), samples in read_samples(cfg, roots).items():
        most = {"train": limits.get(name, 0), "dev": cfg.eval_limit, "test": cfg.test_limit}[split]
        splits[split] += first_shuffled(samples, most, f"{cfg.seed}/limit/{name}/{split}")
    return {**splits, "train": first_shuffled(splits["train"], cfg.originals, f"{cfg.seed}/originals")}


def read_samples(cfg: Config, roots: Mapping[str, str]) -> dict[tuple[str, str], list[Sample]]:
    """The samples of every (dataset, split), with the gold, its noise and the personas that the settings ask for."""
    keys = [(name, split) for name in roots for split in SPLITS]
    votes = with_votes(roots, cfg.soft_labels)
    personas = read_personas(Path(cfg.personas)) if cfg.personas else None
    loaded = {(n, s): load(n, roots[n], s, context=cfg.context, soft_labels=votes[n]) for n, s in keys}
    train, test = ([d for n in roots for d in loaded[n, split]] for split in ("train", "test"))
    gone = overlap(train, test) if cfg.drop_overlap else set()  # D24
    found = []
    for name, split in keys:
        kept, labels = [d for d in loaded[name, split] if d.key not in gone], label_set(name, roots[name])
        found += data.samples(kept, labels, personas=personas, persona_scope=cfg.persona_scope)
    if cfg.gold:
        found = with_gold(found, read_gold(Path(cfg.gold)))
    if cfg.label_noise:
        found = [mislabelled(s, cfg.label_noise, cfg.seed) if s.id.split("/")[1] == "train" else s for s in found]
    return {key: [sample for sample in found if sample.id.startswith(f"{key[0]}/{key[1]}/")] for key in keys}


def with_gold(samples: Iterable[Sample], gold: Mapping[str, Weights]) -> list[Sample]:
    """The samples with other gold. Raises UserError for an id that no sample has, and for an unknown label."""
    known = {sample.id: sample for sample in samples}
    for key, weights in gold.items():
        if key not in known or not weights.keys() <= set(known[key].labels):
            labels = f"{', '.join(weights)}: labels are {', '.join(known[key].labels)}" if key in known else "no such sample"
            raise UserError(f"--gold: {key}: {labels}")
    return [replace(s, gold=dict(gold[s.id])) if s.id in gold else s for s in known.values()]


def mislabelled(sample: Sample, rate: float, seed: int) -> Sample:
    """The sample as it would be if each label of its dialogue had been written down wrongly with chance `rate`.

    The heaviest label changes places with another one of the dataset, each of them as likely: soft gold stays as soft as it
    was, and accuracy counts exactly the changed ones as wrong (D15). A draw depends on nothing but seed and the id of the
    labelled turn: a turn is the same in all samples that show it, and what is wrong at one rate is wrong at a higher one.
    """
    dialogue = sample.id.rpartition("/")[0]

    def gold(weights: Weights, key: str) -> Weights:
        chance, place = uniforms((seed, LABEL_NOISE, key), 0, range(2))
        first = data.heaviest(weights)
        others = [label for label in sample.labels if label != first]
        if chance >= rate or not others:
            return weights
        other = others[int(place * len(others))]
        return {{first: other, other: first}.get(emotion, emotion): weight for emotion, weight in weights.items()}

    def heard(turn: Turn, place: int) -> Turn:
        return turn if turn.label is None else replace(turn, label=gold(turn.label, f"{dialogue}/{turn.id or place}"))

    following = sample.following and heard(sample.following, len(sample.context))
    context = tuple(heard(turn, i) for i, turn in enumerate(sample.context))
    return replace(sample, gold=gold(sample.gold, sample.id), context=context, following=following)


def group_by_dataset(samples: Sequence[Sample]) -> dict[str, Sequence[Sample]]:
    """Samples by dataset, in order."""
    return {name: [s for s in samples if s.dataset == name] for name in dict.fromkeys(s.dataset for s in samples)}
