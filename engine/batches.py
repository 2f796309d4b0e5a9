"""Micro-batches: what goes through the model at once. A mini-batch is what one optimizer step learns from; how it is cut
into micro-batches changes memory and time, never the result.

Shapes: B answers and T tokens of the longest, as in model.py; M micro-batches, X numbers that are measured of each.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.processes import divide, rank, size, summed
from model import Group, Policy

MICRO_TOKENS = 32_768  # most tokens of a micro-batch, so that long answers cannot fill the memory; one answer always fits


@dataclass(frozen=True)
class MicroBatch:
    """Groups that are computed together: micro-batch `number` of `of`, with the answers `rows` of the mini-batch.

    The loss is multiplied by `scale`. That is the number of ranks (processes), because FSDP averages gradients over them. It
    is 0 where a rank has no work left and computes the cheapest micro-batch once more, to keep in step with the others; what
    it measures is then not `counted`.
    """

    number: int
    of: int
    groups: list[Group]
    rows: slice
    scale: float

    @property
    def counted(self) -> bool:
        """Whether this rank's result is the one that counts: it is not a repetition to keep in step."""
        return self.scale > 0


def my_micro_batches(groups: Sequence[Group], most_rows: int, most: int = MICRO_TOKENS) -> Iterator[MicroBatch]:
    """The micro-batches that this rank computes. Every rank gets the same number of them, or FSDP would hang."""
    parts = list(micro_batches(groups, most_rows, most))
    ends = list(itertools.accumulate(map(answers_of, parts)))
    costs = [tokens_of(part) for part in parts]
    divided = divide(costs, size())
    mine, idle = divided[rank()], min(range(len(parts)), key=lambda i: costs[i])
    for turn in range(max(map(len, divided))):
        i, scale = (mine[turn], float(size())) if turn < len(mine) else (idle, 0.0)
        yield MicroBatch(i, len(parts), parts[i], slice(ends[i] - answers_of(parts[i]), ends[i]), scale)


@torch.no_grad()
def logprobs(policy: Policy, groups: Sequence[Group], *, micro_batch: int, temperature: float) -> Tensor:
    """logp_BT of every answer under the policy as it stands, on every rank; 0 behind an answer's end, float32 at least."""
    lengths = [len(answer) for group in groups for answer in group.answers]
    dtype = torch.promote_types(policy.lm.dtype, torch.float32)
    logp_BT = torch.zeros(len(lengths), max(lengths), dtype=dtype, device=policy.device)
    for part in my_micro_batches(groups, micro_batch):
        found_BT = policy(part.groups, temperature=temperature)[0]
        if part.counted:
            logp_BT[part.rows, : found_BT.shape[1]] = found_BT
    return summed(logp_BT)


def on_host(found: Sequence[tuple[MicroBatch, Mapping[str, Tensor]]]) -> list[dict[str, float]]:
    """The scalars measured in every micro-batch, those of all ranks, on every rank; copied from the device all at once."""
    names, (first, scalars) = list(found[0][1]), found[0]
    table_MX = torch.zeros(first.of, len(names), dtype=torch.float64, device=scalars[names[0]].device)
    for part, values in found:
        if part.counted:
            table_MX[part.number] = torch.stack([values[name].detach().double() for name in names])
    return [dict(zip(names, row, strict=True)) for row in summed(table_MX).tolist()]


def micro_batches(groups: Sequence[Group], rows: int, most: int = MICRO_TOKENS) -> Iterator[list[Group]]:
    """Groups in their order, at most `rows` answers and `most` tokens at once, padding and repeated prompts counted.

    A group stays whole if it can; one that is too large is cut and its prompt repeated.
    """
    part: list[Group] = []
    for group in groups:
        answers = list(group.answers)
        while answers:
            fit = fitting(part, Group(group.prompt_ids, answers), rows, most)
            if part and fit < min(len(answers), rows):
                yield part
                part = []
            else:
                part.append(Group(group.prompt_ids, answers[: max(fit, 1)]))
                answers = answers[max(fit, 1) :]
    if part:
        yield part


def fitting(part: Sequence[Group], group: Group, rows: int, most: int) -> int:
    """How many of a group's first answers still fit into a part.

    Attention lays out answers x (longest prompt + longest answer) tokens, padding included; that is what `most` bounds.
    """
    prompt = max(len(g.prompt_ids) for g in (*part, group))
    longest = max((len(answer) for g in part for answer in g.answers), default=0)
    count = answers_of(part)
    for fit, answer in enumerate(group.answers):
        longest = max(longest, len(answer))
        if count + fit + 1 > rows or (count + fit + 1) * (prompt + longest) > most:
            return fit
    return len(group.answers)


def answers_of(part: Sequence[Group]) -> int:
    """Answers in a micro-batch."""
    return sum(len(group.answers) for group in part)


def tokens_of(part: Sequence[Group]) -> int:
    """Tokens that a micro-batch computes."""
    return sum(len(ids) for group in part for ids in (group.prompt_ids, *group.answers))


def longest_micro_batch(prompt_tokens: int, answer_tokens: int, n: int, micro_batch: int) -> list[Group]:
    """The micro-batch of most tokens where all groups have n answers, and prompts and answers have these lengths."""
    group = Group([0] * prompt_tokens, [[0] * answer_tokens] * n)
    return max(micro_batches([group] * -(-micro_batch // n), micro_batch), key=tokens_of)
