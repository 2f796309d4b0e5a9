"""The toy world's commands: build it, and what its runs are held against.

    python -m toy build
    python -m toy baselines     the majority class and the surface reader
    python -m toy gold_sft      SFT on gold answers with equal compute
    python -m toy soft_gold FILE    gold of two readers who disagree, for --gold
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

import data
import evaluate
from common.draws import shuffled
from common.errors import command
from common.files import jsonl, write_atomically
from common.hub import quiet_transformers
from corpora.dialogue import Weights
from model import Group, Policy
from toy.base import END, build, learn
from toy.world import gold_target, surface_reader
from training import task
from training.config import PRESETS


def baselines(root: Annotated[Path, tyro.conf.Positional] = Path("data/toy")) -> None:
    """Print what the majority class and the surface reader score on dev and test.

    Args:
        root: Folder of the toy world; built there if it is missing.
    """
    if not (root / "world").exists():
        build(root)
    for split in ("dev", "test"):
        samples = data.read_samples("toy", root / "world", split)
        read = [data.Output("", dict(surface_reader(sample)), {}, "", {}) for sample in samples]
        for name, scores in (("majority", evaluate.majority(samples)), ("surface reader", evaluate.score(samples, read))):
            numbers = scores.metrics()
            print(f"{split} ({len(samples)} samples), {name}: accuracy {numbers['acc']:.3f}, IOU {numbers['iou']:.3f}")


def gold_sft(root: Annotated[Path, tyro.conf.Positional] = Path("data/toy"), seed: int = 0) -> None:
    """Print what the base model scores on dev and test after learning gold answers, as many as the RL stages learn from.

    Args:
        root: Folder of the toy world; built there if it is missing.
        seed: Of the order of the samples.
    """
    if not (root / "base").exists():
        build(root)
    cfg = replace(PRESETS["toy"], model=str(root / "base"), data=(f"toy={root / 'world'}",), seed=seed)
    here, policy = task.open_task(cfg), Policy.load(cfg.model)
    updates, size = cfg.iterations * here.S * cfg.batch_prompts // cfg.mini_batch_prompts, cfg.mini_batch_prompts * cfg.n
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0.01)
    order = itertools.chain.from_iterable(shuffled(here.originals, f"{seed}/{epoch}") for epoch in itertools.count())
    for _ in range(updates):
        batch = list(itertools.islice(order, size))
        groups = [Group(here.encode(x)[0], [here.tokenizer.encode(gold_target(x) + END)]) for x in batch]
        learn(policy, optimizer, groups)
    splits = {"dev": here.dev, "test": here.test}
    for (split, samples), temperature in itertools.product(splits.items(), (0.0, 1.0)):
        answers = task.answer(here, policy, samples, n=1, temperature=temperature, step=task.EVALUATION)
        numbers = evaluate.score(samples, [group[0].parse for group in answers]).metrics()
        shown = f"accuracy {numbers['acc']:.3f}, IOU {numbers['iou']:.3f}, rule {numbers['rule_rate']:.3f}"
        print(f"{split} ({len(samples)}), gold SFT, {updates} updates of {size}, temperature {temperature:g}: {shown}")


def soft_gold(file: tyro.conf.Positional[Path], root: Annotated[Path, tyro.conf.Positional] = Path("data/toy")) -> None:
    """Write the softest gold of the toy: for each training sample the mean of its gold and what the surface reader reads.

    So would two annotators label, one who knows the world and one who looks at the last utterance alone. Where they differ
    the second one's emotion may become the heaviest, and there may be four, one more than an answer may name.

    Args:
        file: JSONL file to write, for --gold.
        root: Folder of the toy world; built there if it is missing.
    """
    if not (root / "world").exists():
        build(root)
    samples = data.read_samples("toy", root / "world", "train")
    write_atomically(file, jsonl([{"id": s.id, "weights": halves(s.gold, surface_reader(s))} for s in samples]))
    print(f"{file}: gold weights of {len(samples)} samples")


def halves(a: Weights, b: Weights) -> Weights:
    """The mean of two readings, the emotions of the first one first."""
    return {emotion: round((a.get(emotion, 0.0) + b.get(emotion, 0.0)) / 2, 6) for emotion in {**a, **b}}


def main() -> int:
    """Run a command: build, baselines, gold_sft or soft_gold; see `common.errors.command` for the exit status."""
    quiet_transformers()
    known = (build, baselines, gold_sft, soft_gold)
    commands: dict[str, Callable[..., None]] = {function.__name__: function for function in known}
    return command(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m toy", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
