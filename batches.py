"""Micro-batches: what goes through the model at once. How a mini-batch is cut changes memory and time, never the result."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from config import Config
from model import Group
from ranks import gathered, turns

MICRO_TOKENS = 32_768  # of a micro-batch at most, so that long answers cannot fill the memory; one answer always fits
Value = TypeVar("Value")


def by_micro_batch(
    groups: Sequence[Group], size: int, compute: Callable[[list[Group], slice, float], Value], most: int = MICRO_TOKENS
) -> list[Value]:
    """What `compute` gives for every micro-batch, in their order, on every rank; the ranks share the work.

    It is called with a micro-batch, the rows of its answers among all answers, and the scale of its loss: a rank short of
    work computes a micro-batch again with scale 0, and that result is dropped (see `ranks.turns`).
    """
    parts = list(micro_batches(groups, size, most))
    ends = list(itertools.accumulate(map(answers_of, parts)))
    found = {}
    for i, scale in turns([tokens_of(part) for part in parts]):
        value = compute(parts[i], slice(ends[i] - answers_of(parts[i]), ends[i]), scale)
        if scale:
            found[i] = value
    return gathered(found)


def micro_batches(groups: Sequence[Group], size: int, most: int = MICRO_TOKENS) -> Iterator[list[Group]]:
    """Groups in their order, at most `size` answers and `most` tokens at once, padding and repeated prompts counted.

    A group stays whole if it can; one that is too large is cut and its prompt repeated.
    """
    part: list[Group] = []
    for group in groups:
        answers = list(group.answers)
        while answers:
            fit = fitting(part, Group(group.prompt_ids, answers), size, most)
            if part and fit < min(len(answers), size):
                yield part
                part = []
            else:
                part.append(Group(group.prompt_ids, answers[: max(fit, 1)]))
                answers = answers[max(fit, 1) :]
    if part:
        yield part


def fitting(part: Sequence[Group], group: Group, size: int, most: int) -> int:
    """How many of the first answers of a group fit beside a part: attention lays out answers x (prompt + answer), padded."""
    prompt = max(len(g.prompt_ids) for g in (*part, group))
    longest = max((len(answer) for g in part for answer in g.answers), default=0)
    count = answers_of(part)
    for fit, answer in enumerate(group.answers):
        longest = max(longest, len(answer))
        if count + fit + 1 > size or (count + fit + 1) * (prompt + longest) > most:
            return fit
    return len(group.answers)


def answers_of(part: Sequence[Group]) -> int:
    """Answers in a micro-batch."""
    return sum(len(group.answers) for group in part)


def tokens_of(part: Sequence[Group]) -> int:
    """Tokens that a micro-batch computes."""
    return sum(len(ids) for group in part for ids in (group.prompt_ids, *group.answers))


def longest_micro_batch(cfg: Config) -> list[Group]:
    """A micro-batch with prompts and answers as long as the settings allow."""
    group = Group([0] * cfg.max_prompt_tokens, [[0] * cfg.max_new_tokens] * cfg.n)
    return max(micro_batches([group] * -(-cfg.micro_batch // cfg.n), cfg.micro_batch), key=tokens_of)
