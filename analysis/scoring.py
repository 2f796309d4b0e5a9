"""What `python evaluate.py score` scores: its flags, the samples to answer, and the answers of every model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import data
from analysis.table1 import Answers, asked, endpoints, generated
from common.draws import first_shuffled
from common.errors import UserError
from common.flags import Dtype, Pairs, Switch
from common.hub import openable
from common.template import day
from corpora.loading import Context, load, read_gold, read_personas, with_votes
from corpora.sharing import overlap
from data import Sample, Scope
from experts.asking import Settings
from training.task import with_gold


@dataclass(frozen=True)
class ScoreCommand:
    """Let a model answer every sample of a split once and score the answers.

    Where the train splits of all --data can be read, a row `clean` stands beside each: the same answers without dialogues
    that share two or more lines of six or more words with one dialogue of those train splits (D24).
    """

    model: Pairs
    """Hugging Face folder of a chat model, trained here or not (zero-shot), or an endpoint (https://host/v1). Repeatable:
    then the mean and the sample standard deviation stand beside."""
    data: Pairs  # NAME=DIR of a dataset; repeatable: then an average stands beside.
    model_name: Pairs = ()  # Model name at an endpoint, one per URL, in order; keys as in `python -m experts`.
    split: Literal["train", "dev", "test"] = "test"  # Split to answer.
    limit: int | None = None  # Samples of each dataset: the first of a seeded shuffle. Default, and 0: all.
    temperature: float = 0.0  # 0 is greedy.
    max_new_tokens: int = 8192  # Longest answer, in tokens (Table 12); a longer one is cut and so fails the rule.
    seed: tuple[int, ...] = (0,)
    """Of the sampling, one or several (--seed 0 1 2); the first also of the shuffle and the bootstrap."""
    date: str = ""  # That the chat template of a folder shows, YYYY-MM-DD; default: today. Endpoints have their own.
    concurrency: int = 8  # Requests to an endpoint under way at once.
    cache: Path | None = None  # Answers of endpoints that are there already. Default: FILE.cache beside --out.
    table: Literal["text", "markdown", "latex"] | None = None  # Print accuracy and W-F1 of all models as Table 1 has them.
    kv_budget: int | None = None  # Bytes for keys and values. Default: half of the device's memory (Table 12).
    dtype: Dtype = "auto"  # In which a folder computes; auto: bfloat16 on a GPU, float32 on a CPU (see selfemo.py --help).
    lenient: tyro.conf.FlagConversionOff[Switch] = False
    """Show beside the strict reading what accepting the last dictionary anywhere in an answer would score."""
    out: Path | None = None
    """Write every answer, its reading and its score there (JSONL); of several models or seeds in FILE-1, FILE-2, ..."""
    baseline: Path | None = None
    """Answers another model wrote with --out: paired comparison (exact McNemar test, bootstrap interval)."""
    gold: Path | None = None  # JSONL of sample id and weights that replace the gold labels.
    prompts: Path | None = None  # JSON that replaces the prompts.
    context: Context = "labelled"  # Turns of IEMOCAP in the context: labelled ones as the benchmarks, or all.
    soft_labels: tyro.conf.FlagConversionOff[Switch] = False  # Annotators' votes as gold, where a release has them (D14).
    personas: Path | None = None  # Personas to show (JSONL of `python -m experts`).
    persona_scope: Scope = "none"  # Which of them dev and test show (D28).


def datasets_of(command: ScoreCommand) -> dict[str, list[Sample]]:
    """The samples to score, dataset by dataset, in the order of the files."""
    chosen = {}
    gold = read_gold(command.gold) if command.gold else {}
    known = read_personas(command.personas) if command.personas else None
    votes = with_votes(dict.fromkeys(entry.partition("=")[0] for entry in command.data), command.soft_labels)
    for entry in command.data:
        name, _, root = entry.partition("=")
        if not root or name in chosen:
            raise UserError(f"--data {entry}: give NAME=DIR, every name once")
        samples = data.read_samples(
            name, root, command.split, context=command.context, soft_labels=votes[name], personas=known,
            persona_scope=command.persona_scope,
        )  # fmt: skip
        mine = {key: weights for key, weights in gold.items() if key.startswith(f"{name}/{command.split}/")}
        samples = with_gold(samples, mine) if mine else samples
        chosen[name] = first_shuffled(samples, command.limit or 0, f"{command.seed[0]}/{name}")
        if not chosen[name]:
            raise UserError(f"--data {entry}: the {command.split} split has no labelled turn to score")
    if gold and not any(key.startswith(f"{name}/{command.split}/") for key in gold for name in chosen):
        raise UserError(f"{command.gold}: no id belongs to the {command.split} split of {', '.join(chosen)}")
    return chosen


def unclean(command: ScoreCommand) -> set[str] | None:
    """Keys of the dialogues that are not clean; None for the train split itself, and where a train split is missing."""
    roots = [entry.partition("=")[::2] for entry in command.data]
    try:
        train, scored = ([d for name, root in roots for d in load(name, root, s)] for s in ("train", command.split))
    except UserError:
        return None
    return overlap(scored, train) if command.split != "train" else None


def all_answers(
    command: ScoreCommand, datasets: Mapping[str, Sequence[Sample]]
) -> Iterator[tuple[tuple[str, int, str | None], Answers]]:
    """(model, seed, date that its prompts show) and answers; what is wrong with the flags is said before the first."""
    date = day(command.date)  # one for all models, however long they take
    places, cache = endpoints(command.model, command.model_name), command.cache
    if len(command.seed) > 1 and command.temperature == 0:
        raise UserError("several --seed with --temperature 0: greedy answers know no seed; give a temperature")
    if places and cache is None:
        if command.out is None:
            raise UserError("--model URL: give --out FILE or --cache FILE, where answers that cost are kept")
        cache = command.out.with_name(f"{command.out.name}.cache")
    for folder in set(command.model) - set(places):
        openable(folder)
    prompts = data.read_prompts(command.prompts) if command.prompts else data.DEFAULT
    for model in command.model:
        for seed in command.seed:
            settings = Settings(command.temperature, command.max_new_tokens, seed, command.concurrency, date=date)
            if model in places and cache is not None:
                yield (places[model].name, seed, None), asked(places[model], datasets, prompts, settings, cache)
            else:
                answers, shown = generated(model, datasets, prompts, settings, command.kv_budget, command.dtype)
                yield (model, seed, shown), answers
