"""Chat templates: what a tokenizer writes around the messages of a prompt. No torch here.

A template is somebody else's program: it may show today's date, know no system role, or fail. Here it sees a date that the
caller keeps, and what it is given reaches the prompt.
"""

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.text import clean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
TRIAL = ({"role": "system", "content": "TheSystemText"}, {"role": "user", "content": "TheUserText"})


def day(given: str = "") -> str:
    """A date as YYYY-MM-DD: today in local time for "". Raises `UserError` for other texts."""
    try:
        found = datetime.date.fromisoformat(given) if given else datetime.date.today()
    except ValueError:
        found = None
    if found is None or given not in ("", found.isoformat()):
        raise UserError(f"--date {given}: give a date as YYYY-MM-DD, such as 2026-01-31")
    return found.isoformat()


def render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, date: str = "") -> tuple[list[int], str]:
    """Prompt ids by the tokenizer's own chat template, and the think block that the template leaves open, else "".

    `date`: what the template is told when it asks for the date, YYYY-MM-DD; "" is today. Raises `UserError` where there is
    no template, or it fails.
    """
    text = written(tokenizer, messages, date)
    opened = re.search(r"<think>\s*\Z", text)
    return list(tokenizer.encode(text, add_special_tokens=False)), opened[0] if opened else ""


def written(tokenizer: "PreTrainedTokenizerBase", messages: Messages, date: str = "") -> str:
    """The text of a prompt. Where the template has no system role, the system text goes before that of the user."""
    return filled(tokenizer, messages if takes_system(tokenizer) else joined(messages), date)


def filled(tokenizer: "PreTrainedTokenizerBase", messages: Messages, date: str) -> str:
    """What the template makes of the messages as they are."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use a chat (instruct) model")
    # What tokenizer.apply_chat_template does, which lets nobody say what the time is.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # A template that does not know enable_thinking ignores it.
    known: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": True, "tools": None, "documents": None}
    known |= {"messages": [dict(message) for message in messages]}
    known |= {"strftime_now": datetime.datetime.fromisoformat(day(date)).strftime}
    try:
        template = _compile_jinja_template(tokenizer.get_chat_template())
        return str(template.render(**tokenizer.special_tokens_map, **known))
    except Exception as error:  # whatever somebody else's program raises
        why = f"the chat template fails ({type(error).__name__} {clean(str(error))[:200]})"
        raise UserError(f"{tokenizer.name_or_path}: {why}; mend it, or take another model") from error


def joined(messages: Messages) -> Messages:
    """The messages without a system message: its text stands before the first of the others, a blank line between them."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


@functools.lru_cache  # rendering the trial for every prompt costs as much as the prompt
def takes_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template writes a system text. Some raise an error at one, others leave it out without a word."""
    try:
        text = filled(tokenizer, TRIAL, "2000-01-01")
    except UserError:
        return False
    return TRIAL[0]["content"] in text or TRIAL[1]["content"] not in text


def shows_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template asks for the date."""
    return "strftime_now" in tokenizer.get_chat_template()


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `UserError` for a template that fails, or leaves out what it is given."""
    text = written(tokenizer, TRIAL, "2000-01-01")
    if not all(message["content"] in text for message in TRIAL):
        raise UserError(f"{tokenizer.name_or_path}: the chat template leaves out the text of a message; take another model")


def remarks(tokenizer: "PreTrainedTokenizerBase", date: str) -> list[str]:
    """What somebody should know about the prompts of a tokenizer, one line each."""
    name, said = tokenizer.name_or_path, []
    if not takes_system(tokenizer):
        said.append(f"{name}: the chat template has no system role: the system text goes before the user's")
    if shows_date(tokenizer):
        said.append(f"{name}: the chat template shows the date: {date} in every prompt")
    return said
