"""What a run learns from and is measured on: samples, prompts and tokenizer, the replay buffer, and parsed answers."""

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import data
from config import Config, pairs
from data import Failure, Output, Sample, UserError
from fast import cuda_graph
from grpo import lam
from model import Policy, eos_ids, load_tokenizer
from ranks import announce, exchange, gathered, rank, ranks_here, share
from rollout import Completion, generate

EVALUATION, SELF_EMO_TEST, COLD_START = -1, -2, -3  # stand for a step in the keys of random streams outside of training
Item = TypeVar("Item")


class NotFinite(Exception):
    """A NaN or an infinity, with the step and the sample ids; nothing was trained on it."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer: token ids with the final EOS, log-probs (nats), the text that was parsed and what came of it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    text: str
    parse: Output | Failure


@dataclass(frozen=True)
class World:
    """Everything a run reads: samples, tokenizer, prompts."""

    cfg: Config
    tokenizer: Any
    eos: frozenset[int]
    prompts: data.Prompts
    originals: tuple[Sample, ...]  # D0
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def encode(self, sample: Sample) -> tuple[list[int], str]:
        """Token ids of a sample's prompt, and how its answers begin if the template opened a think block."""
        return data.encode(self.tokenizer, sample, self.prompts)

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
        """RL steps an iteration (D7)."""
        return self.cfg.steps or math.ceil(len(self.originals) / self.cfg.batch_prompts)

    def lam(self, t: int) -> float:
        """Lambda at RL step t of the run: t/T, or within the iteration if each starts from the base model (D7)."""
        if not self.cfg.self_grpo:
            return 0.0
        return lam(t % self.S, self.S) if self.cfg.retrain_from == "base" else lam(t, self.cfg.iterations * self.S)


@dataclass(frozen=True)
class Kept:
    """A kept answer: tokens for retraining, and the new sample d* made of it (Eq. 7)."""

    iteration: int
    sample_id: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    child: Sample


@dataclass(frozen=True)
class Buffer:
    """The replay buffer: D0, and what selection has kept, in order. What iteration k keeps, k + 1 draws."""

    originals: tuple[Sample, ...]
    kept: tuple[Kept, ...] = ()

    def samples(self, k: int, max_synthetic: int) -> list[Sample]:
        """D0 and the living synthetic samples at the start of iteration k: one a parent, the newest (D11)."""
        newest = {kept.sample_id: kept.child for kept in self.kept if kept.iteration < k}
        children = sorted(newest.values(), key=lambda child: (child.iteration, child.id))
        return [*self.originals, *(children[-max_synthetic:] if max_synthetic else children)]

    def draw(self, k: int, step: int, cfg: Config) -> list[Sample]:
        """Line 6: the prompts of a step of iteration k, without replacement until the buffer is through (D7)."""
        samples = self.samples(k, cfg.max_synthetic)
        first = step * cfg.batch_prompts
        epochs = range(first // len(samples), (first + cfg.batch_prompts - 1) // len(samples) + 1)
        order = [sample for epoch in epochs for sample in shuffled(samples, f"{cfg.seed}/prompts/{k}/{epoch}")]
        first -= epochs[0] * len(samples)
        return order[first : first + cfg.batch_prompts]

    def add(self, kept: Sequence[Kept]) -> "Buffer":
        """Line 15."""
        return replace(self, kept=(*self.kept, *kept))


def answer(
    world: World, policy: Policy, samples: Sequence[Sample], *, n: int, temperature: float, step: int
) -> list[list[Answer]]:
    """Generate, decode and parse. `step` keys the random streams: a step >= 0 in training, below that in evaluation.

    Raises `NotFinite` where the model's logits are not numbers.
    """
    encoded = [world.encode(sample) for sample in samples]
    keys = [(world.cfg.seed, step, key) for key in distinct([sample.id for sample in samples])]
    mine = share([len(ids) for ids, _ in encoded])
    try:
        found = generate(
            policy.sampler(),
            [encoded[i][0] for i in mine],
            n=n,
            max_new_tokens=world.cfg.max_new_tokens,
            temperature=temperature,
            eos_ids=world.eos,
            keys=[keys[i] for i in mine],
            kv_budget=world.cfg.kv_budget or device_memory(policy.device) // 2,
            progress=sys.stderr.isatty() and rank() == 0,
            record=cuda_graph if world.cfg.compile and policy.device.type == "cuda" else None,
        )
        trouble = ""
    except FloatingPointError as error:
        found, trouble = [], str(error)
    if trouble := next(filter(None, exchange(trouble)), ""):
        ids, when = [s.id for s in samples], f"RL step {step}" if step >= 0 else "an evaluation"
        shown = ", ".join(ids[:64]) + f" and {len(ids) - 64} more" * (len(ids) > 64)
        raise NotFinite(f"{trouble} at {when}; prompts: {shown}")
    own: dict[int, list[Any]] = {i: [[c.ids, c.logprobs, c.finished] for c in g] for i, g in zip(mine, found, strict=True)}
    groups = [[Completion(tuple(ids), tuple(logp), done) for ids, logp, done in group] for group in gathered(own)]
    answers = []
    for sample, (_, prefix), group in zip(samples, encoded, groups, strict=True):
        texts = [data.answer_text(world.tokenizer, c.ids, world.eos, prefix) for c in group]
        parses = [data.parse_output(x, sample.labels, finished=c.finished) for x, c in zip(texts, group, strict=True)]
        rows = zip(group, texts, parses, strict=True)
        answers.append([Answer(c.ids, c.logprobs, c.finished, text, parse) for c, text, parse in rows])
    return answers


def distinct(ids: Sequence[str]) -> list[str]:
    """Keys of random streams: an id that comes again in a step (D7's next epoch) gets a stream of its own."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return keys


def open_world(cfg: Config) -> World:
    """Read data, tokenizer and prompts, and say what there is. Raises `UserError` for what is missing or wrong."""
    splits = read_splits(cfg)
    tokenizer = load_tokenizer(cfg.model)
    prompts = data.read_prompts(Path(cfg.prompts)) if cfg.prompts else data.DEFAULT
    world = World(cfg, tokenizer, eos_ids(cfg.model, tokenizer), prompts, (), (), ())
    fitting = {split: tuple(filter(world.fits, samples)) for split, samples in splits.items()}
    if not fitting["train"]:
        raise UserError(f"no training prompt has at most {cfg.max_prompt_tokens} tokens: raise --max_prompt_tokens")
    for split, samples in splits.items():
        dropped = len(samples) - len(fitting[split])
        announce(f"{split}: {len(fitting[split])} samples" + f", {dropped} over --max_prompt_tokens dropped" * (dropped > 0))
    announce(shares(fitting["train"]))
    described = sum(sample.responder.persona is not None for sample in fitting["train"])
    if cfg.personas or not described:
        none = "no personas given: prompts describe nobody (Eq. 4: python expert.py personas, then --personas)"
        announce(f"personas: {described} of {len(fitting['train'])} training prompts have one" if cfg.personas else none)
    if all(len(sample.gold) == 1 for sample in fitting["train"]):
        announce("gold is one label a sample: answers that all name it alone leave Eq. 12 nothing to compare (D14)")
    return replace(world, originals=fitting["train"], dev=fitting["dev"], test=fitting["test"])


def shares(samples: Sequence[Sample]) -> str:
    """How often each dataset is drawn: all samples in one seeded shuffle, so by size; each keeps its own labels."""
    parts = [
        f"{name} {100 * len(own) / len(samples):.1f} % ({len(own)} samples, {len(own[0].labels)} labels)"
        for name, own in group_by_dataset(samples).items()
    ]
    return f"prompts are drawn by size of dataset, seeded: {', '.join(parts)}"


def read_splits(cfg: Config) -> dict[str, list[Sample]]:
    """The samples of every split over all datasets, limited as the settings say, by size and seeded."""
    roots = pairs("data", cfg.data)
    limits = {name: number(value) for name, value in pairs("limit", cfg.limit).items()}
    if unknown := set(limits) - set(roots):
        raise UserError(f"--limit names {', '.join(sorted(unknown))}, which is not among --data")
    splits: dict[str, list[Sample]] = {split: [] for split in data.SPLITS}
    for (name, split), samples in read_samples(cfg, roots).items():
        most = {"train": limits.get(name, 0), "dev": cfg.eval_limit, "test": cfg.test_limit}[split]
        splits[split] += first_shuffled(samples, most, f"{cfg.seed}/limit/{name}/{split}")
    return {**splits, "train": first_shuffled(splits["train"], cfg.originals, f"{cfg.seed}/originals")}


def read_samples(cfg: Config, roots: Mapping[str, str]) -> dict[tuple[str, str], list[Sample]]:
    """The samples of every (dataset, split), with the gold and the personas that the settings ask for."""
    keys = [(name, split) for name in roots for split in data.SPLITS]
    votes = data.with_votes(roots, cfg.soft_labels)
    load = {(n, s): data.load(n, roots[n], s, context=cfg.context, soft_labels=votes[n]) for n, s in keys}
    if cfg.drop_overlap:  # D24
        test = [dialogue for key in keys if key[1] == "test" for dialogue in load[key]]
        load |= {key: data.drop_overlap(load[key], test) for key in keys if key[1] == "train"}
    personas = data.read_personas(Path(cfg.personas)) if cfg.personas else None
    found = []
    for key in keys:
        labels = data.label_set(key[0], roots[key[0]])
        found += data.samples(load[key], labels, personas=personas, persona_scope=cfg.persona_scope)
    if cfg.gold:
        found = data.with_gold(found, data.read_gold(Path(cfg.gold)))
    return {key: [sample for sample in found if sample.id.startswith(f"{key[0]}/{key[1]}/")] for key in keys}


def number(value: str) -> int:
    """A positive number of a NAME=N flag. Raises `UserError`."""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--limit wants NAME=N with N a positive whole number, not {value!r}")
    return int(value)


def shuffled(items: Sequence[Item], key: str) -> list[Item]:
    """`items` in an order that depends on nothing but their number and `key`."""
    return random.Random(key).sample(list(items), len(items))


def first_shuffled(items: Sequence[Item], most: int, key: str) -> list[Item]:
    """The first `most` of a seeded shuffle, in their old order; all of them for 0."""
    chosen = sorted(shuffled(range(len(items)), key)[:most]) if most else range(len(items))
    return [items[i] for i in chosen]


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine for each of the processes on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here()


def group_by_dataset(samples: Sequence[Sample]) -> dict[str, Sequence[Sample]]:
    """Samples by dataset, in order."""
    return {name: [s for s in samples if s.dataset == name] for name in dict.fromkeys(s.dataset for s in samples)}
