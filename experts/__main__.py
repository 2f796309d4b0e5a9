"""The commands of the expert M_e (Eq. 4).

    python -m experts personas --data meld=data/meld --expert URL --expert_model NAME --out personas.jsonl
    python -m experts gold --data meld=data/meld --expert DIR --out gold.jsonl
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import tyro

import data
from common.draws import first_shuffled
from common.errors import UserError, command
from common.files import Record, jsonl, write_atomically
from common.flags import Pairs, roots
from common.hub import enough_memory
from corpora import loading
from corpora.dialogue import SPLITS, Turn
from data import Failure, Sample
from experts.asking import KEPT, Expert, Settings, ask, ask_drawn, beside, open_experts
from experts.cache import Cache, open_cache
from experts.contracts import gold_chat, parse_gold, parse_personas, persona_chat, reason_counts, speakers

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Asking(Settings):
    """The flags that both commands share: those of `Settings` say how to ask, these say whom, about what, and how much."""

    data: Pairs  # NAME=DIR of a dataset; repeatable.
    expert: Pairs  # Endpoint (https://host/v1) or Hugging Face folder; repeatable.
    out: Path  # File to write; failures are listed beside it, in FILE.failed.
    expert_model: Pairs = ()  # Model name at an endpoint, one per URL, in order.
    price: Pairs = ()  # PROMPT,ANSWER: price of a million tokens, one an --expert, in order; the cost line then shows money.
    cache: Path | None = None  # Answers that are there already. Default: FILE.cache.
    limit: int = 0  # Prompts of each dataset and split: first N of a seeded shuffle; 0 = all.

    def check(self) -> None:
        """Raise `UserError` for numbers that cannot be."""
        at_least_0 = min(self.temperature, self.limit, self.retries) >= 0
        if not at_least_0 or min(self.max_new_tokens, self.concurrency, self.timeout) <= 0:
            raise UserError("--temperature, --limit and --retries must be at least 0; all other numbers at least 1")

    def drawn(self, splits: Sequence[str], read: Callable[[str, str, str], Sequence[Item]]) -> list[Item]:
        """--limit of what `read` (of dataset, folder, split) finds in every dataset and split; all of it for 0."""
        return [
            item
            for name, root in roots(self.data).items()
            for split in splits
            for item in first_shuffled(read(name, root, split), self.limit, f"{self.seed}/expert/{name}/{split}")
        ]

    @contextmanager
    def experts(self) -> Iterator[tuple[list[Expert], Cache]]:
        """The experts, and the cache of what they have answered already."""
        found = open_experts(self.expert, self.expert_model, self.price)
        with open_cache(self.cache or beside(self.out, "cache")) as cache:
            yield found, cache


@dataclass(frozen=True, kw_only=True)
class PersonasCommand(Asking):
    """Describe every speaker in a sentence: the file for --personas (Eq. 4, Table 4)."""

    scope: Literal["none", "context", "dialogue"] = "none"
    """The --persona_scope of the run that the file is for. none: train dialogues. context: also the context of each dev and
    test sample. dialogue: also dev and test dialogues, as the paper (D28)."""


@dataclass(frozen=True, kw_only=True)
class GoldCommand(Asking):
    """Soft weights around the dataset's label (D14). A sample without a valid answer gets no line and so keeps its label."""

    split: tuple[Literal["train", "dev", "test"], ...] = ("train",)  # Splits to weigh.


def person_questions(command: PersonasCommand) -> list[tuple[str, tuple[Turn, ...]]]:
    """What is to be described: the name that its personas are filed under, and the turns that may be seen."""

    def shown(name: str, root: str, split: str) -> list[tuple[str, tuple[Turn, ...]]]:
        if split == "train" or command.scope == "dialogue":
            found = [(dialogue.key, dialogue.turns) for dialogue in loading.load(name, root, split)]
        else:
            found = [(sample.id, sample.context) for sample in data.read_samples(name, root, split)]
        return [(key, turns) for key, turns in found if speakers(turns)]

    return command.drawn(("train",) if command.scope == "none" else SPLITS, shown)


def gold_questions(command: GoldCommand) -> list[Sample]:
    """Samples with one label; gold that is soft already needs no expert."""
    return command.drawn(command.split, lambda *place: [x for x in data.read_samples(*place) if len(x.gold) == 1])


def personas(command: tyro.conf.OmitArgPrefixes[PersonasCommand]) -> None:
    """Describe every speaker in a sentence: the file for --personas (Eq. 4, Table 4)."""
    command.check()
    asked = person_questions(command)
    rows, failed = list[Record](), list[Record]()
    with command.experts() as (experts, cache):
        for expert in experts:  # D28: every expert describes every speaker
            replies = ask(expert, [persona_chat(turns, expert.control) for _, turns in asked], command, cache)
            for (key, turns), reply in zip(asked, replies, strict=True):
                read, mark = parse_personas(reply, speakers(turns)), {"dialogue": key, "expert": expert.name}
                if isinstance(read, Failure):
                    failed.append(mark | vars(read))
                else:
                    rows += [{**mark, "speaker": n, "persona": p, "theme": read.theme} for n, p in read.personas.items()]
    write(command.out, rows, failed, len(asked) * len(experts), f"{len(rows)} personas")


def gold(command: tyro.conf.OmitArgPrefixes[GoldCommand]) -> None:
    """Soft weights around the dataset's label: the file for --gold (D14)."""
    command.check()
    samples = gold_questions(command)
    with command.experts() as (experts, cache):
        replies = ask_drawn(experts, {x.id: partial(gold_chat, x) for x in samples}, command, cache)
    rows, failed = list[Record](), list[Record]()
    for sample in samples:
        read = parse_gold(replies[sample.id], sample.labels, next(iter(sample.gold)))
        if isinstance(read, Failure):
            failed.append({"id": sample.id} | vars(read))
        else:
            rows.append({"id": sample.id, "weights": read})
    write(command.out, rows, failed, len(samples), f"{len(rows)} samples with weights")


def write(out: Path, rows: Sequence[Record], failed: Sequence[Record], asked: int, what: str) -> None:
    """Write the result and the failures, and say how many there are. Raises `UserError` where no answer is valid."""
    write_atomically(out, jsonl(rows))
    write_atomically(beside(out, "failed"), jsonl(failed))
    reasons, valid = reason_counts(row["reason"] for row in failed), asked - len(failed)
    print(f"{valid} of {asked} answers valid ({valid / max(asked, 1):.1%}), {what} in {out}")
    if failed:
        print(f"invalid: {reasons}; listed in {beside(out, 'failed')}")
    if asked and not valid:
        raise UserError(f"no answer is valid ({reasons}; the first: {failed[0]['detail']}): take another --expert")


def main() -> int:
    """Run a command: personas or gold; see `common.errors.command` for the exit status."""
    commands: dict[str, Callable[..., None]] = {"personas": personas, "gold": gold}
    run = partial(tyro.extras.subcommand_cli_from_dict, commands, prog="python -m experts", description=__doc__)
    return command(enough_memory()(run), kept=KEPT)


if __name__ == "__main__":
    sys.exit(main())
