"""Micro-batches: what goes through the model at once. How a mini-batch is cut changes memory and time, never the result."""

from collections.abc import Iterator, Sequence

from config import Config
from model import Group

MICRO_TOKENS = 32_768  # of a micro-batch at most, so that long answers cannot fill the memory; one answer always fits


def micro_batches(groups: Sequence[Group], size: int, most: int = MICRO_TOKENS) -> Iterator[list[Group]]:
    """Groups in their order, at most `size` answers and `most` tokens at once.

    A group stays whole if it can; one that is too large is cut and its prompt repeated.
    """
    part: list[Group] = []
    for group in groups:
        answers = list(group.answers)
        while answers:
            fit = fitting(group.prompt_ids, answers, size - answers_of(part), most - tokens_of(part))
            if part and fit < min(len(answers), size):
                yield part
                part = []
            else:
                part.append(Group(group.prompt_ids, answers[: max(fit, 1)]))
                answers = answers[max(fit, 1) :]
    if part:
        yield part


def fitting(prompt: Sequence[int], answers: Sequence[Sequence[int]], count: int, tokens: int) -> int:
    """How many of the first answers fit beside their prompt."""
    tokens -= len(prompt)
    for fit, answer in enumerate(answers[:count]):
        tokens -= len(answer)
        if tokens < 0:
            return fit
    return min(count, len(answers))


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
