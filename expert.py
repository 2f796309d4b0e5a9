"""The expert M_e (Eq. 4): another model that describes speakers (Table 4), weighs gold labels and answers prompts (Table 5).

    python expert.py personas --data meld=data/meld --expert URL --expert_model NAME --out personas.jsonl
    python expert.py gold --data meld=data/meld --expert DIR --out gold.jsonl
    python selfemo.py --cold_start expert --expert URL --expert_model NAME ...

How an expert is asked, and that nothing is asked twice, is in asking.py.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

import data
from asking import KEPT, THINK, Chat, Reply, Settings, Unanswered, ask, ask_drawn, open_cache, open_experts
from config import Pairs, pairs
from data import Failure, Sample, Turn, UserError, refuse

if TYPE_CHECKING:
    from world import World

Row = dict[str, Any]

LONGEST = 500  # characters of a persona sentence: it stands in every prompt of its speaker

# Personas: the contract of Table 4 in our words (D16)


def speakers(turns: Iterable[Turn]) -> list[str]:
    """Who is to be described: everybody but groups, in order of appearance."""
    return [name for name in dict.fromkeys(turn.speaker for turn in turns) if not data.is_group(name)]


def theme_key(names: Sequence[str]) -> str:
    """The key of the theme, another one where a speaker has that name."""
    return "Theme" if "Theme" not in names else "Theme of all"


def persona_chat(turns: Sequence[Turn], control: Sequence[str] = ()) -> Chat:
    """P_extrac: describe every speaker in a sentence, and name the theme."""
    names = speakers(turns)
    theme = theme_key(names)
    shape = json.dumps(dict.fromkeys([*names, theme], "..."), ensure_ascii=False, indent=1)
    system = (
        "You study how people talk and can tell from a conversation what kind of people they are. The lines are all you "
        "know: make nothing up, and where they leave something open, say that it is open."
    )
    user = (
        f"{data.history(turns, control)}\n\n"
        f"Who are these speakers: {data.safe(', '.join(names), control)}? First write down what the lines show of each: "
        "temperament; age, as a span of years; gender; schooling and way of thinking; manner of speaking; mood, and "
        "attitude towards the others. Keep the speakers apart: what fits anybody says nothing.\n"
        "Then end with one code block that holds one dictionary, and write nothing after it. Its keys are the names exactly "
        f"as they stand above and {theme!r}. A name's value is a single dense sentence that joins your findings on that "
        f"speaker; the value of {theme!r} says what the conversation is about beneath its surface, and who is at odds over "
        f"what:\n```python\n{data.safe(shape, control)}\n```"
    )
    return data.chat(system, user)


@dataclass(frozen=True)
class Portrait:
    """Sentences by speaker, and the theme of the dialogue."""

    personas: Mapping[str, str]
    theme: str


def last_block(reply: Reply | Unanswered) -> str | Failure:
    """The inside of the code block that ends an answer."""
    if isinstance(reply, Unanswered):
        return Failure("unanswered", reply.why)
    if not reply.finished:
        return Failure("unfinished", "cut off before the end of the answer")
    if len(reply.text.encode(errors="surrogatepass")) > data.MAX_BYTES:
        return Failure("too_long", f"more than {data.MAX_BYTES} bytes")
    body, fence, rest = reply.text.rstrip().rpartition("```")
    _, opening, block = body.rpartition("```")
    tag, _, inside = block.partition("\n")
    if rest or not fence or not opening or tag.strip().lower() not in ("", "python", "json"):
        return Failure("block", "no code block at the end")
    return inside


def parse_personas(reply: Reply | Unanswered, names: Sequence[str]) -> Portrait | Failure:
    """Read an expert's answer: exactly these names and the theme, a sentence each, no two alike. Never raises.

    Reasons: unanswered unfinished too_long block, those of a dictionary (see `data.Failure`), names, sentence, theme.
    """
    inside = last_block(reply)
    found = inside if isinstance(inside, Failure) else data.parse_strings(inside)
    if isinstance(found, Failure):
        return found
    said = {key: data.clean(value) for key, value in found.items()}
    theme = said.pop(theme_key(names), "")
    if said.keys() != set(names):
        odd = sorted(said.keys() ^ set(names))
        return Failure("names", f"{odd[0][:40]!r} is {'missing' if odd[0] in names else 'nobody here'}")
    for name, sentence in said.items():
        if not (len(sentence.split()) >= 3 and len(sentence) <= LONGEST and re.search(r"\w", sentence)):
            return Failure("sentence", f"that of {name[:40]!r} has under 3 words or over {LONGEST} characters")
    if len(set(said.values())) < len(said):
        return Failure("sentence", "the same one for two speakers")
    if not re.search(r"\w", theme) or len(theme) > LONGEST:
        return Failure("theme", f"missing, empty, or over {LONGEST} characters")
    return Portrait({name: said[name] for name in names}, theme)


# Gold: soft weights around the label of the dataset (D14)


def gold_chat(sample: Sample, control: Sequence[str] = ()) -> Chat:
    """Ask how strongly the last line shows its label and, at most, two more."""
    label = next(iter(sample.gold))
    system = "You judge which emotions a line of a conversation shows, and how strongly. You go by the lines alone."
    user = (
        f"{data.history(sample.context, control)}\n\n"
        f"Annotators heard {label!r} in the last line. Think about what else its speaker shows there, if anything. Then end "
        "with one code block that holds one dictionary, and write nothing after it. Its keys are one to three of these "
        f"emotions: {', '.join(sample.labels)}. Its values are weights from 0.1 to 1; they need not sum to 1. {label!r} is "
        "one of the keys and weighs more than any other; name another one only if it really is there:\n"
        f"```python\n{{{label!r}: ...}}\n```"
    )
    return data.chat(system, user)


def parse_gold(reply: Reply | Unanswered, labels: Sequence[str], label: str) -> dict[str, float] | Failure:
    """Read an expert's weights: up to three known labels from 0.1 to 1, the dataset's own heaviest. Never raises."""
    inside = last_block(reply)
    found = inside if isinstance(inside, Failure) else data.parse_weights(inside, labels)
    if isinstance(found, Failure):
        return found
    if any(weight >= found.get(label, 0) for name, weight in found.items() if name != label):
        return Failure("own_label", f"{label!r} is not the heaviest")
    return found


# Cold start: the expert answers the training prompts itself (Table 5, D17)


def taught_ids(world: "World", sample: Sample, reply: Reply | Unanswered) -> tuple[int, ...] | Failure:
    """An expert's answer as tokens of the policy with its stop token, if what they say keeps the rule."""
    if isinstance(reply, Unanswered):
        return Failure("unanswered", reply.why)
    prefix = world.encode(sample)[1]
    # Where the policy's template opens the think block, the answer begins inside of it.
    text = THINK.sub("", reply.text, count=1) if prefix and THINK.match(reply.text) else reply.text
    ids = world.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) >= world.cfg.max_new_tokens:
        return Failure("too_long", f"{len(ids)} tokens and the stop token")
    if (world.eos | set(world.tokenizer.all_special_ids)) & set(ids):
        return Failure("control", "a control token inside")
    answer = (*ids, world.stop)
    said = data.answer_text(world.tokenizer, answer, world.eos, prefix)
    parse = data.parse_output(said, sample.labels, finished=reply.finished)
    return parse if isinstance(parse, Failure) else answer


def cold_start_answers(world: "World") -> list[tuple[Sample, tuple[int, ...]]]:
    """Training samples and an expert's answers that keep the rule; of several experts each sample draws one.

    The answers are kept in expert.jsonl of the run. Raises `UserError` where none is valid.
    """
    cfg = world.cfg
    experts, settings = open_experts(cfg.expert, cfg.expert_model), Settings(cfg.temperature, cfg.max_new_tokens, cfg.seed)
    path, samples = Path(cfg.out) / "expert.jsonl", world.originals
    with open_cache(path) as cache:
        chat = lambda i, control: data.messages(samples[i], world.prompts, control)  # noqa: E731
        replies = ask_drawn(experts, [sample.id for sample in samples], chat, settings, cache)
    read = [(sample, taught_ids(world, sample, reply)) for sample, reply in zip(samples, replies, strict=True)]
    kept = [(sample, ids) for sample, ids in read if not isinstance(ids, Failure)]
    reasons = reason_counts([ids for _, ids in read if isinstance(ids, Failure)])
    dropped = f"; dropped: {reasons}" * bool(reasons)
    print(f"expert: {len(kept)} of {len(samples)} answers keep the rule{dropped}", flush=True)
    if not kept:
        raise UserError(f"the expert keeps the rule in none of its answers ({reasons}), see {path}: take another --expert")
    return kept


def reason_counts(failures: Iterable[Failure]) -> str:
    """Why answers were dropped, the most frequent reason first."""
    return ", ".join(f"{reason} {n}" for reason, n in Counter(x.reason for x in failures).most_common())


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
    from world import first_shuffled

    found = []
    for name, root in pairs("data", command.data).items():
        for split in data.SPLITS if command.scope != "none" else ("train",):
            dialogues = data.load(name, root, split)
            if split == "train" or command.scope == "dialogue":
                shown = [(d.key, d.turns) for d in dialogues]
            else:
                shown = [(s.id, s.context) for s in data.samples(dialogues, data.label_set(name, root))]
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
    from world import first_shuffled

    found: list[Sample] = []
    for name, root in pairs("data", command.data).items():
        for split in command.split:
            made = data.samples(data.load(name, root, split), data.label_set(name, root))
            hard = [sample for sample in made if len(sample.gold) == 1]
            found += first_shuffled(hard, command.limit, f"{command.seed}/expert/{name}/{split}")
    return found


def beside(path: Path, ending: str) -> Path:
    """A file next to --out."""
    return path.with_name(f"{path.name}.{ending}")


def write(out: Path, rows: Sequence[Row], failed: Sequence[tuple[Row, Failure]], asked: int, what: str) -> None:
    """Write the result and the failures, and say how many there are. Raises `UserError` where no answer is valid."""
    from runs import jsonl, write_atomically

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
    """Run a command. 0: done; 2: a mistake of the user's, in one line; 130: stopped, the same command goes on."""
    try:
        tyro.extras.subcommand_cli_from_dict({"personas": personas, "gold": gold}, description=__doc__)
    except UserError as error:
        return refuse(error)
    except OSError as error:
        print(f"error: {error.strerror or error} ({error.filename or 'no file'}); {KEPT}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {KEPT}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
