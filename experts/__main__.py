"""The commands of the expert M_e (Eq. 4).

    python -m experts personas --data meld=data/meld --expert URL --expert_model NAME --out personas.jsonl
    python -m experts gold --data meld=data/meld --expert DIR --out gold.jsonl
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import data
from common.draws import first_shuffled
from common.errors import UserError, command
from common.files import jsonl, write_atomically
from common.flags import Pairs, pairs
from corpora import loading
from corpora.dialogue import SPLITS, Turn
from data import Failure, Sample
from experts.asking import KEPT, Settings, ask, ask_drawn, open_cache, open_experts
from experts.contracts import Row, gold_chat, parse_gold, parse_personas, persona_chat, reason_counts, speakers

# Commands


@dataclass(frozen=True)
class Asking:
    """What both commands ask for."""

    data: Pairs
    """NAME=DIR of a dataset; repeatable."""
    expert: Pairs
    """Endpoint (https://host/v1) or Hugging Face folder; repeatable."""
    out: Path
    """File to write; failures are listed beside it, in FILE.failed."""
    expert_model: Pairs = ()
    """Model name at an endpoint, one a URL, in order."""
    price: Pairs = ()
    """PROMPT,ANSWER: price of a million tokens, one an --expert, in order; the cost line then shows money."""
    cache: Path | None = None
    """Answers that are there already. Default: FILE.cache."""
    limit: int = 0
    """Prompts of each dataset and split: first N of a seeded shuffle; 0 = all."""
    temperature: float = 1.0
    """0 is greedy."""
    max_new_tokens: int = 2048
    """Longest answer, in tokens."""
    seed: int = 0
    """Of the shuffle and of a local expert; another seed asks anew."""
    concurrency: int = 8
    """Requests under way at once."""
    retries: int = 8
    """Of a request that failed on the way or at the server."""
    timeout: float = 300.0
    """Seconds a try may be silent."""

    def settings(self) -> Settings:
        """How to ask."""
        if not self.data:
            raise UserError("--data is missing: give NAME=DIR")
        how = (self.temperature, self.max_new_tokens, self.seed, self.concurrency, self.retries, self.timeout)
        if not (self.temperature >= 0 and self.limit >= 0 and self.retries >= 0) or min(how[1], how[3], how[5]) <= 0:
            raise UserError("--temperature, --limit and --retries must be at least 0; all other numbers at least 1")
        return Settings(*how)


@dataclass(frozen=True)
class PersonasCommand(Asking):
    """Describe every speaker in a sentence: the file for --personas (Eq. 4, Table 4)."""

    scope: Literal["none", "context", "dialogue"] = "none"
    """The --persona_scope of the run that the file is for. none: train dialogues. context: also the context of each dev and
    test sample. dialogue: also dev and test dialogues, as the paper (D28)."""


@dataclass(frozen=True)
class GoldCommand(Asking):
    """Soft weights around the dataset's label (D14). A sample without a valid answer gets no line and so keeps its label."""

    split: tuple[Literal["train", "dev", "test"], ...] = ("train",)
    """Splits to weigh."""


def person_questions(command: PersonasCommand) -> list[tuple[str, tuple[Turn, ...]]]:
    """What is to be described: the name that its personas are filed under, and the turns that may be seen."""

    found = []
    for name, root in pairs("data", command.data).items():
        for split in SPLITS if command.scope != "none" else ("train",):
            dialogues = loading.load(name, root, split)
            if split == "train" or command.scope == "dialogue":
                shown = [(d.key, d.turns) for d in dialogues]
            else:
                shown = [(s.id, s.context) for s in data.samples(dialogues, loading.label_set(name, root))]
            shown = [(key, turns) for key, turns in shown if speakers(turns)]
            found += first_shuffled(shown, command.limit, f"{command.seed}/expert/{name}/{split}")
    return found


def personas(command: tyro.conf.OmitArgPrefixes[PersonasCommand]) -> None:
    """Describe every speaker in a sentence: the file for --personas (Eq. 4, Table 4)."""
    settings, asked = command.settings(), person_questions(command)
    experts = open_experts(command.expert, command.expert_model, command.price)
    rows, failed = list[Row](), list[tuple[Row, Failure]]()
    with open_cache(command.cache or beside(command.out, "cache")) as cache:
        for expert in experts:  # D28: every expert describes every speaker
            replies = ask(expert, [persona_chat(turns, expert.control) for _, turns in asked], settings, cache)
            for (key, turns), reply in zip(asked, replies, strict=True):
                read, mark = parse_personas(reply, speakers(turns)), {"dialogue": key, "expert": expert.name}
                if isinstance(read, Failure):
                    failed.append((mark, read))
                else:
                    rows += [{**mark, "speaker": n, "persona": p, "theme": read.theme} for n, p in read.personas.items()]
    write(command.out, rows, failed, len(asked) * len(experts), f"{len(rows)} personas")


def gold(command: tyro.conf.OmitArgPrefixes[GoldCommand]) -> None:
    """Soft weights around the dataset's label: the file for --gold (D14)."""
    settings, samples = command.settings(), gold_questions(command)
    experts = open_experts(command.expert, command.expert_model, command.price)
    with open_cache(command.cache or beside(command.out, "cache")) as cache:
        chat = lambda i, control: gold_chat(samples[i], control)  # noqa: E731
        replies = ask_drawn(experts, [sample.id for sample in samples], chat, settings, cache)
    rows, failed = list[Row](), list[tuple[Row, Failure]]()
    for sample, reply in zip(samples, replies, strict=True):
        read = parse_gold(reply, sample.labels, next(iter(sample.gold)))
        if isinstance(read, Failure):
            failed.append(({"id": sample.id}, read))
        else:
            rows.append({"id": sample.id, "weights": read})
    write(command.out, rows, failed, len(samples), f"{len(rows)} samples with weights")


def gold_questions(command: GoldCommand) -> list[Sample]:
    """Samples with one label; gold that is soft already needs no expert."""

    found: list[Sample] = []
    for name, root in pairs("data", command.data).items():
        for split in command.split:
            made = data.samples(loading.load(name, root, split), loading.label_set(name, root))
            hard = [sample for sample in made if len(sample.gold) == 1]
            found += first_shuffled(hard, command.limit, f"{command.seed}/expert/{name}/{split}")
    return found


def beside(path: Path, ending: str) -> Path:
    """A file next to --out."""
    return path.with_name(f"{path.name}.{ending}")


def write(out: Path, rows: Sequence[Row], failed: Sequence[tuple[Row, Failure]], asked: int, what: str) -> None:
    """Write the result and the failures, and say how many there are. Raises `UserError` where no answer is valid."""

    write_atomically(out, jsonl(rows))
    write_atomically(beside(out, "failed"), jsonl([mark | vars(failure) for mark, failure in failed]))
    reasons = reason_counts(failure for _, failure in failed)
    valid = asked - len(failed)
    print(f"{valid} of {asked} answers valid ({valid / max(asked, 1):.1%}), {what} in {out}")
    if failed:
        print(f"invalid: {reasons}; listed in {beside(out, 'failed')}")
    if asked and not valid:
        raise UserError(f"no answer is valid ({reasons}): take another --expert")


def main() -> int:
    """Run a command: personas or gold; see `common.errors.command` for the exit status."""
    commands: dict[str, Callable[..., None]] = {"personas": personas, "gold": gold}
    return command(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__), kept=KEPT)


if __name__ == "__main__":
    sys.exit(main())
