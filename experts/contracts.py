"""What an expert is asked and how its answers are read: personas (Table 4) and gold weights (D14), in our words (D16)."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import data
from common.scanner import SIGN, Broken, Scanner
from common.text import clean, words
from corpora.dialogue import Turn, is_group
from data import MAX_BYTES, Failure, Sample
from experts.asking import Chat
from experts.responses import Reply, Unanswered

Read = TypeVar("Read")
LONGEST = 500  # characters of a persona sentence: it stands in every prompt of its speaker


# How every answer is read


def whole_text(reply: Reply | Unanswered) -> str | Failure:
    """The text of an answer that ended by itself."""
    if isinstance(reply, Unanswered):
        return Failure("unanswered", reply.why)
    return reply.text if reply.finished else Failure("unfinished", "cut off before the end of the answer")


def last_block(reply: Reply | Unanswered) -> str | Failure:
    """The inside of the code block that ends an answer."""
    text = whole_text(reply)
    if isinstance(text, Failure):
        return text
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        return Failure("too_long", f"more than {MAX_BYTES} bytes")
    body, fence, rest = text.rstrip().rpartition("```")
    _, opening, block = body.rpartition("```")
    tag, _, inside = block.partition("\n")
    if rest or not fence or not opening or tag.strip().lower() not in ("", "python", "json"):
        return Failure("block", "no code block at the end")
    return inside


def read_alone(text: str | Failure, read: Callable[[Scanner], Read]) -> Read | Failure:
    """What `read` finds in a text that holds it and nothing else. Never raises, never evaluates; a failure stays one."""
    if isinstance(text, Failure):
        return text
    scanner = Scanner(text, 0)
    try:
        found = read(scanner)
    except Broken as broken:
        return Failure(*broken.args)
    return Failure("trailing", "text after the dictionary") if SIGN.match(text, scanner.position) else found


def reason_counts(reasons: Iterable[str]) -> str:
    """Why answers were dropped, the most frequent reason first."""
    return ", ".join(f"{reason} {n}" for reason, n in Counter(reasons).most_common())


# Personas: the contract of Table 4 in our words (D16)


def speakers(turns: Iterable[Turn]) -> list[str]:
    """Who is to be described: everybody but groups, in order of appearance."""
    return [name for name in dict.fromkeys(turn.speaker for turn in turns) if not is_group(name)]


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


def read_strings(scanner: Scanner) -> dict[str, str]:
    """The next dictionary of strings. Raises Broken for another one."""
    found: dict[str, str] = {}
    for key in scanner.entries():
        name = unicodedata.normalize("NFC", key)  # as `clean` writes the names that are asked about
        if name in found:
            raise Broken("duplicate", f"{key[:40]!r} a second time")
        found[name] = scanner.string()
    return found


def parse_personas(reply: Reply | Unanswered, names: Sequence[str]) -> Portrait | Failure:
    """Read an expert's answer: exactly these names and the theme, a sentence each, no two alike. Never raises.

    Reasons: unanswered unfinished too_long block, those of a dictionary (see `data.Failure`), names, sentence, theme.
    """
    found = read_alone(last_block(reply), read_strings)
    if isinstance(found, Failure):
        return found
    said = {key: clean(value) for key, value in found.items()}
    theme = said.pop(theme_key(names), "")
    if said.keys() != set(names):
        odd = sorted(said.keys() ^ set(names))
        return Failure("names", f"{odd[0][:40]!r} is {'missing' if odd[0] in names else 'nobody here'}")
    for name, sentence in said.items():
        if not (len(words(sentence)) >= 3 and len(sentence) <= LONGEST and re.search(r"\w", sentence)):
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
    found = read_alone(last_block(reply), lambda scanner: data.read_emotions(scanner, "last_emotions", labels))
    if isinstance(found, Failure):
        return found
    if any(weight >= found.get(label, 0) for name, weight in found.items() if name != label):
        return Failure("own_label", f"{label!r} is not the heaviest")
    return found
