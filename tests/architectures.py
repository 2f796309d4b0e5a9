"""python -m tests.architectures [--write | --check]: which causal language models work; the table in docs/architectures.md.

Every class that transformers registers is built tiny and random from its own default configuration, opened as a user's
model is (`model.check_architecture`), and sampled from. It is either equal to transformers' eager attention to 1e-4 nats,
sampler included, or refused in one line. Takes two to three minutes.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.errors import UserError, command
from common.hub import unfit
from common.shrunk import FAR, NEAR, random_model, shrunk
from model import ATTENTION, Group, Policy, check_architecture
from rollout import generate

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
ROWS = "<!-- rows -->"
# Classes whose default configuration cannot be built as it stands: what their published models say.
NAMED: Mapping[str, Mapping[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
}
TRIED: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "`sliding_window: null`": {"sliding_window": None},
    "full attention in every layer": {"sliding_window": None, "layer_types": "full_attention"},
}


@dataclass(frozen=True)
class Row:
    """What came out for one class: "" where it works, else why not; the settings it needs and the longest text."""

    name: str
    reason: str
    needs: str = ""
    longest: int | None = None


def configuration(name: str, settings: Mapping[str, Any]) -> PretrainedConfig:
    """A class's default configuration with some settings of its published models and of our own."""
    kind: Any = CONFIG_MAPPING[name]
    named = NAMED.get(name, {})
    layers = getattr(kind(**named), "num_hidden_layers", 0)
    given = {key: [value] * layers if key == "layer_types" else value for key, value in settings.items()}
    return kind(**named, **given)  # type: ignore[no-any-return]


def tried(name: str) -> Row:
    """Open and sample one class; where it is refused, again without windows, and with nothing but full attention."""
    reason = ""
    for needs, settings in TRIED.items():
        try:
            config = configuration(name, settings)
            if why := unfit(config):
                raise UserError(why.partition(":")[0])
            longest = check_architecture(config, name)
            sampled(config, longest)
            return Row(name, "", needs, longest)
        except UserError as error:
            told = str(error).removeprefix(f"the model {name} ({config.model_type}) cannot share prompts: ")
            reason = reason or told.removesuffix("; docs/architectures.md lists the models that can")
        except Exception as error:  # a default configuration that its own class refuses
            reason = reason or f"its default configuration: {str(error).strip().splitlines()[-1].strip()}"
    return Row(name, re.sub(r"\s+", " ", reason)[:140])


@torch.no_grad()
def sampled(config: PretrainedConfig, longest: int | None) -> None:
    """Raise ValueError unless the sampler's log-probs are the policy's, to 1e-4 nats."""
    policy = Policy(random_model(shrunk(config, NEAR if longest is None else FAR), ATTENTION))
    prompts = [[5, 3, 8, 1], [7 * i * i % 89 for i in range(40)]]
    answers = generate(
        policy, prompts, keys=[(0, 0, "a"), (0, 0, "b")], n=2, max_new_tokens=20, temperature=1.0, eos_ids=frozenset()
    )
    logp_BT, _ = policy([Group(p, [a.ids for a in several]) for p, several in zip(prompts, answers, strict=True)])
    drawn = torch.tensor([answer.logprobs for several in answers for answer in several])
    if not (gap := (logp_BT - drawn).abs().max().item()) < 1e-4:
        raise UserError(f"the sampler's log-probs are {gap:.1g} nats off the policy's")


def page(rows: Iterable[Row]) -> Iterator[str]:
    """The two tables, in Markdown."""
    rows = list(rows)
    right = [row for row in rows if not row.reason]
    yield f"{len(right)} of {len(rows)} work, the others are refused (transformers {transformers.__version__})."
    yield from ("", "| works | condition |", "|---|---|")
    for row in right:
        limit = f"texts up to {row.longest:,} tokens (its configuration's positions)" if row.longest else ""
        yield f"| `{row.name}` | {', '.join(filter(None, (row.needs, limit)))} |"
    yield from ("", "| refused | reason, in the words of the error |", "|---|---|")
    for row in (row for row in rows if row.reason):
        yield f"| `{row.name}` | {row.reason.replace('|', '/')} |"


def main() -> int:
    """Print the tables, write them into the page, or fail where the page says something else."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    given = parser.parse_args()
    transformers.logging.set_verbosity(logging.CRITICAL + 1)  # a class says at length what it does not take
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = "\n".join(page(tried(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    if not (given.write or given.check):
        print(rows)
        return 0
    before = PAGE.read_text(encoding="utf-8")
    after = f"{before.partition(ROWS)[0]}{ROWS}\n\n{rows}\n"
    if given.write:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        print(f"{PAGE} is not what the models say: python -m tests.architectures --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
