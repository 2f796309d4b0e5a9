"""What a server's response says: the answer with its think block, whether it was cut off, and its tokens.

The cache keeps responses, not what was made of them here: a better reading reads again what is paid for already.
"""

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from common.text import clean
from data import MAX_BYTES

Response = Mapping[str, Any]  # {"choices": [{"message", "finish_reason"}], "usage"}
THINK = re.compile(r"\s*<think>\s*")
LONGEST_WHY = 400  # characters of what a server says about a failure
CUT = (  # why an answer is not whole; after every other word, known or not, it has ended by itself
    *("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "max_length", "model_length"),
    *("model_context_window_exceeded", "content_filter", "content_filtered", "safety", "recitation", "blocklist"),
    *("prohibited_content", "spii"),
)
BROKEN = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")  # there is no answer: to be asked again
BESIDE = ("reasoning_content", "reasoning", "thinking", "thinking_blocks", "reasoning_details")  # where thoughts stand
INNER = ("text", "value", "thinking", "reasoning", "summary", "content", "parts", "refusal")  # of a part: where its text is

STOP = {  # statuses that every request of the job would get
    **{401: "check the key", 402: "the account is empty", 403: "check the key", 404: "check the URL and the model's name"},
    **{405: "check the URL", 410: "the model is gone, take another one"},
}
EMPTY = {"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"}  # what comes as 429 or 400 and lasts
UNSUPPORTED = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
PASSING = (408, 409, 425, 429)  # statuses under 500 that may be another one later


@dataclass(frozen=True)
class Reply:
    """An answer with its think block, whether it ended by itself, and its tokens: (prompt, answer).

    `response`: what it was read from, if that was small enough to be kept.
    """

    text: str
    finished: bool
    tokens: tuple[int, int]
    response: Response | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Unanswered:
    """A request that brought no answer. It is not in the cache: the same command asks again.

    `lasting`: the server refuses this request, and will refuse it again.
    """

    why: str
    lasting: bool = False


def read_completion(body: str) -> Reply | Unanswered:
    """What the body of a response says. Never raises."""
    try:
        return read_response(json.loads(body))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        return Unanswered(f"no chat completion ({what}): {complaint(body)}")


def read_response(response: Response) -> Reply | Unanswered:
    """What a response says. Raises ValueError, LookupError, TypeError or AttributeError for one that is no completion."""
    choice, usage = response["choices"][0], response.get("usage")
    message, word = choice["message"], choice.get("finish_reason")
    ended = str(word.get("type") if isinstance(word, dict) else word).lower()
    if ended in BROKEN or choice.get("error"):
        return Unanswered(f"the server broke off ({ended}): {complaint(json.dumps(choice))}")
    text = text_of(message)
    whole = text[: MAX_BYTES + 1].encode(errors="replace").decode()  # what is longer fails, and is not kept
    counts = usage if isinstance(usage, dict) else {}
    asked, said = (n if type(n := counts.get(name)) is int else 0 for name in ("prompt_tokens", "completion_tokens"))
    kept = {"choices": [{"message": message, "finish_reason": word}], "usage": usage}
    small = len(text) <= MAX_BYTES and len(json.dumps(kept)) <= 4 * MAX_BYTES
    return Reply(whole, ended not in CUT, (asked, said), kept if small else None)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, or with what words it refuses. Thoughts, in it or beside, are its think block."""
    thought, answer = split(message.get("content"))
    found = (thought, *(flat(message.get(name)) for name in BESIDE))  # a server may send them twice, under two names
    thought = re.sub(r"^\s*<think>|</think>\s*$", "", next(filter(str.strip, found), ""))
    answer = answer or flat(message.get("refusal"))
    return f"<think>{thought}</think>\n{answer}" if thought and not THINK.match(answer) else answer


def split(content: Any) -> tuple[str, str]:
    """Thought and answer of a content: a string, a part, a list of both, or null. Raises ValueError for any other one."""
    thought, answer, others = "", "", []
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        kind = str(part.get("type") or "text") if isinstance(part, dict) else "text" if isinstance(part, str) else "unknown"
        if "think" in kind or "reason" in kind:
            thought += flat(part)
        elif "text" in kind or kind == "refusal":
            answer += flat(part)
        else:
            others.append(kind)
    if others and not answer:
        raise ValueError(f"content of type {', '.join(others)}")
    return thought, answer


def flat(value: Any) -> str:
    """The text in a string, a part or a list of both; "" where there is none."""
    if isinstance(value, list):
        return "".join(map(flat, value))
    if isinstance(value, dict):
        return next(filter(None, (flat(value.get(name)) for name in INNER)), "")
    return value if isinstance(value, str) else ""


def as_response(reply: Reply) -> Response:
    """A response that says what a reply says: of a model that no server runs, and of what was too long to keep."""
    asked, said = reply.tokens
    choice = {"message": {"content": reply.text}, "finish_reason": "stop" if reply.finished else "length"}
    return {"choices": [choice], "usage": {"prompt_tokens": asked, "completion_tokens": said}}


def complaint(body: str) -> str:
    """What a server says about a failure, in one line: its message, else all that it sent."""
    return clean((message_in(body) or body)[: 10 * LONGEST_WHY])


def message_in(body: str) -> str:
    """The message of an error, as servers send it; "" where there is none."""
    try:
        row = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    error = row.get("error", row) if isinstance(row, dict) else None
    said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return said if isinstance(said, str) else ""


def mend_of(status: int, body: str, names: Set[str | None], param: str | None, temperature: float) -> str | None:
    """How to mend what a server refuses; None where the next request may fare better.

    `names`: the code and the type of the error; `param`: the parameter that it is about.
    """
    if status in (400, 422) and (param == "temperature" or "temperature" in message_in(body)):
        return f"it does not take temperature {temperature:g}: give another --temperature (judges have 0), or another model"
    if names & UNSUPPORTED:
        return "the model does not take what is asked of it, take another one"
    return STOP.get(402 if names & EMPTY else status)
