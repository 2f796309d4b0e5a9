"""Rollouts: n answers to each prompt, sampled in batches from scratch.

The n answers share their prompt: its keys and values are computed and stored once per group, each answer's own beside them.
A decode step scores an answer's token against both blocks and joins them before one softmax. Finished answers leave the
matrix products at once, and the place of a finished group goes to the next prompt (continuous batching).

Random numbers are counter-based: answer a's token at position t to a prompt is decided by a hash of (seed, step, sample id,
a, t), so neither batch, order, memory budget nor number of ranks changes an answer. `minimal.generate_naive` is the clear
version.

Shapes: N tokens of a stream, P groups, G most rows of a group, R rows (unfinished answers), S prompt tokens, T answer
tokens, Z = S + T, H query heads, K key/value heads, Q = H / K, D head width, V vocabulary, X blocks of C tokens of it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from common.draws import Key, uniforms
from common.errors import UserError
from data import Completion
from engine.cache import DecodeLayout, DecodeRows, GroupCache, PrefillLayout, Size, bucket, doubled, largest
from engine.fast import Capture, Recorder, Step, float32_logits, packed_weights
from model import ATTENTION, Group, Policy, check_length, pad

AHEAD = 64  # random numbers of a row that lie on the device
BLOCK = 128  # tokens of the vocabulary in one entry of the sampler's coarse CDF
MAX_ROWS = 256  # answers decoded together: the rate still rises up to here
PREFILL_TOKENS = 12_400  # prompt tokens computed together (Table 12: max_num_batched_tokens)


def draw_in_blocks(logits_RV: Tensor, temperature: float, uniform_R: Tensor) -> Tensor:
    """One token per row by inverse CDF, and its log-prob under the distribution it was drawn from: `minimal.draw`.

    In half of its time: one CDF over blocks of the vocabulary, one inside the block that is hit, one buffer. Without a look
    at any value, so a GPU goes on: [R, 3] in float64, which holds them exactly: token, log-prob, and 0 where the largest
    logit is NaN or infinite and the other two mean nothing.
    """
    weight_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
    peak_R1 = weight_RV.amax(-1, keepdim=True)
    weight_RV.sub_(peak_R1).div_(temperature or 1.0).exp_()
    if rest := -weight_RV.shape[1] % BLOCK:
        weight_RV = F.pad(weight_RV, (0, rest))
    weight_RXC = weight_RV.unflatten(1, (-1, BLOCK))
    cdf_RX = rising_sums(weight_RXC.sum(-1))
    if temperature == 0:
        token_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        aim_R1 = uniform_R.to(cdf_RX.dtype)[:, None] * cdf_RX[:, -1:]
        block_R1 = locate(cdf_RX, aim_R1)
        before_R1 = F.pad(cdf_RX, (1, 0)).gather(1, block_R1)
        inside_RC = weight_RXC.take_along_dim(block_R1[..., None], 1)[:, 0]
        token_R1 = block_R1 * BLOCK + locate(rising_sums(inside_RC), aim_R1 - before_R1)
        token_R1 = token_R1.clamp(max=logits_RV.shape[1] - 1)  # beyond it lies only what NaN finds
    score_R1 = (logits_RV.gather(1, token_R1) - peak_R1) / (temperature or 1.0)
    logp_R1 = score_R1 - cdf_RX[:, -1:].log()
    return torch.cat([x_R1.double() for x_R1 in (token_R1, logp_R1, peak_R1.isfinite())], dim=1)


def rising_sums(weight_RX: Tensor) -> Tensor:
    """Sums from the left that rise at entries with a weight and nowhere else.

    The scan of a GPU adds in no fixed order: its sums may fall, or rise by a last bit where there is no weight.
    """
    return torch.where(weight_RX > 0, weight_RX.cumsum(-1), 0).cummax(-1).values


def locate(cdf_RX: Tensor, aim_R1: Tensor) -> Tensor:
    """The first entry of each row that lies above the aim: never one of weight 0, and one also where the aim is the end.

    Among NaN, any entry: an index outside would stop a GPU before the host could say why.
    """
    last_R1 = cdf_RX[:, -1:]
    below_R1 = torch.minimum(aim_R1, torch.nextafter(last_R1, torch.zeros_like(last_R1)))
    found_R1: Tensor = torch.searchsorted(cdf_RX, below_R1, right=True)
    return found_R1.clamp(max=cdf_RX.shape[1] - 1)


def generate(
    model: Policy | PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Collection[int],
    keys: Sequence[Key],
    kv_budget: int | None = None,
    progress: bool = False,
    record: Capture | None = None,
) -> list[list[Completion]]:
    """Sample n answers to each prompt; the answers of prompt i are element i.

    `keys` names each prompt's random streams. `kv_budget` (bytes, None = no limit) is never exceeded by keys and values:
    over it, the youngest group is dropped and queued again, and its streams redraw the same answers. `record`
    (`engine.fast.cuda_graphs()`) records decode steps and replays them; the cache then grows by doubling. Nothing outlives
    the call. Raises ValueError for empty prompts or settings out of range, `UserError` if one group does not fit the budget
    or the model's positions, FloatingPointError for logits that are NaN or infinite.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0 or len(keys) != len(prompts) or not all(map(len, prompts)):
        raise ValueError("generate needs n >= 1, max_new_tokens >= 1, temperature >= 0, for each prompt a key and tokens")
    if isinstance(model, Policy):
        check_length(model, [Group(prompt, [range(max_new_tokens)]) for prompt in prompts])
    lm = model.lm if isinstance(model, Policy) else model
    bar = tqdm(total=n * len(prompts), disable=not progress, unit="answer")
    with torch.no_grad(), group_attention(lm), float32_logits(lm), packed_weights(lm), bar:
        engine = Engine(lm, n, max_new_tokens, temperature, frozenset(eos_ids), kv_budget, record)
        return engine.run([Job(i, tuple(p), k) for i, (p, k) in enumerate(zip(prompts, keys, strict=True))], bar)


@contextmanager
def group_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Let a model that was opened with another attention use ours for the length of a call."""
    before = lm.config._attn_implementation
    if before == ATTENTION:
        yield
        return
    lm.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt in the queue."""

    index: int
    prompt: tuple[int, ...]
    key: Key


@dataclass(eq=False)
class Row:
    """An answer on its way. All of its tokens but the last are in the cache. `ahead_A` decides its next tokens."""

    job: Job
    answer: int
    ahead_A: Tensor
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """The groups being decoded. `groups` and `rows` stand in the order of the cache's slots and rows."""

    def __init__(
        self, lm: PreTrainedModel, n: int, max_new: int, temperature: float, eos: frozenset[int], budget: int | None,
        record: Capture | None,
    ) -> None:
        """Nothing is computed yet."""
        self.lm, self.n, self.max_new, self.temperature, self.eos, self.budget = lm, n, max_new, temperature, eos, budget
        self.cache = GroupCache(lm)
        step: Step = partial(decode, lm, self.cache, temperature)
        self.decode: Step = Recorder(step, self.cache, n, record) if record else step
        self.doubles = record is not None  # each growth ends recordings; without them hidden columns cost more than it
        self.most: Size = (0, 0, 0, 0)
        self.groups: list[Job] = []
        self.rows: list[Row] = []
        self.moving: DecodeRows | None = None  # `rows` on the device, while they only move on
        self.done: dict[tuple[int, int], Completion] = {}
        self.clock = itertools.count()
        self.born: dict[int, int] = {}  # when a job was last admitted
        self.hold = False  # after a drop: admit nobody until a group has finished

    def run(self, jobs: list[Job], bar: Any) -> list[list[Completion]]:
        """Answer every job."""
        for job in jobs:
            self.check_fits(job)
        self.most = largest(len(jobs), self.n, MAX_ROWS, max([0, *(len(job.prompt) for job in jobs)]), self.max_new)
        queue = deque(sorted(jobs, key=lambda job: len(job.prompt)))  # side by side, prompts are padded to the longest
        tokens = 0
        while queue or self.rows:
            self.admit(queue)
            for row in self.retire():
                answer = Completion(tuple(row.ids), tuple(row.logprobs), row.ids[-1] in self.eos)
                self.done[row.job.index, row.answer] = answer
                tokens += len(row.ids)
                bar.update()
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
            if self.rows:
                self.make_room(queue)
                self.step()
        return [[self.done[job.index, answer] for answer in range(self.n)] for job in jobs]

    def check_fits(self, job: Job) -> None:
        """Raise `UserError` if the group of this job could not be finished even alone."""
        need = self.cache.cost((1, bucket(len(job.prompt)), self.n, bucket(self.max_new)))
        if self.budget is not None and need > self.budget:
            what = f"{self.n} answers of {self.max_new} tokens to a prompt of {len(job.prompt)}"
            raise UserError(f"kv_budget of {self.budget:,} bytes: {what} need {need:,}; raise --kv_budget or lower --n")

    def fits(self, size: Size) -> bool:
        """Whether a capacity keeps to the budget."""
        return self.budget is None or self.cache.cost(size) <= self.budget

    def needed(self, groups: Sequence[Job], rows: int) -> Size:
        """The capacity for these groups and so many rows, one more token each."""
        longest = max((len(row.ids) for row in self.rows), default=1)
        return len(groups), bucket(max(len(job.prompt) for job in groups)), rows, bucket(longest)

    def admit(self, queue: deque[Job]) -> None:
        """Take prompts from the queue while rows and budget allow, compute them, and draw the first token of each answer."""
        new: list[Job] = []
        while queue and not self.hold and (not (self.groups or new) or len(self.rows) + self.n * (len(new) + 1) <= MAX_ROWS):
            need = self.needed([*self.groups, *new, queue[0]], len(self.rows) + self.n * (len(new) + 1))
            if self.capacity(need) is None:
                break
            new.append(queue.popleft())
        while new:
            pack = [new.pop(0)]
            while new and (len(pack) + 1) * max(len(job.prompt) for job in [*pack, new[0]]) <= PREFILL_TOKENS:
                pack.append(new.pop(0))
            self.prefill(pack)

    def prefill(self, jobs: list[Job]) -> None:
        """Compute prompts in one stream, keep their keys and values, start their answers."""
        first = len(self.groups)
        self.groups += jobs
        self.born |= {job.index: next(self.clock) for job in jobs}
        size = self.capacity(self.needed(self.groups, len(self.rows) + self.n * len(jobs)))
        assert size is not None  # `admit` looked
        self.cache.resize(size)
        lengths = [len(job.prompt) for job in jobs]
        ends = list(itertools.accumulate(lengths))
        prompt_PS = pad([range(end - length, end) for end, length in zip(ends, lengths, strict=True)])
        back = [row * prompt_PS.shape[1] + s for row, length in enumerate(lengths) for s in range(length)]
        layout = PrefillLayout(self.cache, self.on_device(prompt_PS), self.tensor(back), first)
        positions = [s for length in lengths for s in range(length)]
        ids = [token for job in jobs for token in job.prompt]
        hidden_ND = hidden_states(self.lm, self.tensor(ids), self.tensor(positions), layout)
        logits_PV = self.lm.get_output_embeddings()(hidden_ND[self.tensor([end - 1 for end in ends])])
        starts = [(p, a) for p, job in enumerate(jobs) for a in range(self.n) if (job.index, a) not in self.done]
        rows = [Row(jobs[p], a, self.numbers(jobs[p], a, 0)) for p, a in starts]
        self.rows += rows
        self.moving = None
        first_R = self.on_device(torch.stack([row.ahead_A[0] for row in rows]))
        self.extend(rows, draw_in_blocks(logits_PV[self.tensor([p for p, _ in starts])], self.temperature, first_R))

    def step(self) -> None:
        """One more token for every row. Most steps send nothing to the device: the rows there move on by themselves."""
        self.moving = self.moving or self.to_move()
        self.extend(self.rows, self.decode(self.moving))

    def to_move(self) -> DecodeRows:
        """The rows as they are now, on the device."""
        slot = {job.index: p for p, job in enumerate(self.groups)}
        members: list[list[int]] = [[] for _ in self.groups]
        columns = []
        for r, row in enumerate(self.rows):
            group = members[p := slot[row.job.index]]
            columns.append((p, len(group), len(row.job.prompt), row.ids[-1], len(row.ids) - 1))
            group.append(r)
        group_R, member_R, prompt_R, ids_R, length_R = self.tensor(list(zip(*columns, strict=True)))
        row_PG, uniform_RA = self.on_device(pad(members)), self.on_device(torch.stack([row.ahead_A for row in self.rows]))
        return DecodeRows(row_PG, group_R, member_R, prompt_R, ids_R, length_R, uniform_RA)

    def extend(self, rows: Sequence[Row], drawn_R3: Tensor) -> None:
        """Give each row the token that was drawn for it. Here, once per step, the host waits for the device."""
        there_R3 = drawn_R3.to("cpu", non_blocking=True)  # from CUDA into pinned memory
        for row in rows:  # meanwhile
            if (end := len(row.ids) + 1) % AHEAD == 0:
                row.ahead_A, self.moving = self.numbers(row.job, row.answer, end), None
        if drawn_R3.is_cuda:
            torch.cuda.current_stream(drawn_R3.device).synchronize()
        for row, (token, logp, finite) in zip(rows, there_R3.tolist(), strict=True):
            if not finite:
                raise FloatingPointError("a logit is NaN or infinite")
            row.ids.append(int(token))
            row.logprobs.append(logp)

    def numbers(self, job: Job, answer: int, start: int) -> Tensor:
        """The random numbers of the tokens from `start` on, as far as they may be needed."""
        drawn = range(start, min(start + AHEAD, self.max_new)) if self.temperature else ()
        numbers = uniforms(job.key, answer, drawn)
        return torch.tensor([*numbers, *[0.0] * (AHEAD - len(numbers))])

    def retire(self) -> list[Row]:
        """Take finished answers out, and groups without answers; the last ones move into their places."""
        finished = [row for row in self.rows if row.ids[-1] in self.eos or len(row.ids) == self.max_new]
        for row in finished:
            self.remove(row)
        alive = {row.job.index for row in self.rows}
        for job in [job for job in self.groups if job.index not in alive]:
            swap_out(self.groups, job, self.cache.move_group)
            self.hold = False
        return finished

    def remove(self, row: Row) -> None:
        """Take an answer out; the last one moves into its place."""
        swap_out(self.rows, row, self.cache.move_row)
        self.moving = None

    def make_room(self, queue: deque[Job]) -> None:
        """Capacity for one more token per row; over the budget, the youngest group goes back to the queue."""
        while (size := self.capacity(self.needed(self.groups, len(self.rows)))) is None:
            job = max(self.groups, key=lambda job: self.born[job.index])
            queue.appendleft(job)
            for row in [row for row in self.rows if row.job is job]:
                self.remove(row)
            swap_out(self.groups, job, self.cache.move_group)
            self.hold = True
        if size != self.cache.size:
            self.cache.resize(size)
            self.moving = None

    def capacity(self, need: Size) -> Size | None:
        """The capacity to move to: today's if enough, else doubled or grown, else as tight as the need; None over budget."""
        grown: Size = tuple(map(max, need, self.cache.size))  # type: ignore[assignment]
        sizes = [doubled(self.cache.size, need, self.most)] * self.doubles + [grown, need]
        return next((size for size in sizes if self.fits(size)), None)

    def tensor(self, numbers: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        """Numbers where the weights are."""
        return self.on_device(torch.tensor(numbers))

    def on_device(self, x: Tensor) -> Tensor:
        """`x` where the weights are. A GPU fetches it from pinned memory while Python goes on."""
        device = self.cache.like.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def hidden_states(lm: PreTrainedModel, ids_N: Tensor, positions_N: Tensor, layout: PrefillLayout | DecodeLayout) -> Tensor:
    """Hidden states [N, D] of a stream of tokens."""
    body: Any = lm.base_model
    given = {"input_ids": ids_N[None], "position_ids": positions_N[None], "use_cache": False, "layout": layout}
    hidden_1ND: Tensor = body(**given).last_hidden_state
    return hidden_1ND[0]


def decode(lm: PreTrainedModel, cache: GroupCache, temperature: float, rows: DecodeRows) -> Tensor:
    """One step: the next token of every row, as `draw_in_blocks` gives it. The rows move on."""
    hidden_RD = hidden_states(lm, rows.ids_R, rows.positions_R, rows.layout(cache))
    logits_RV: Tensor = lm.get_output_embeddings()(hidden_RD)
    drawn_R3 = draw_in_blocks(logits_RV, temperature, rows.uniform_R)
    rows.advance(drawn_R3[:, 0])
    return drawn_R3


def swap_out(items: list[Any], item: Any, move: Callable[[int, int], None]) -> None:
    """Remove an item; the last one takes its place, here and in the cache."""
    index, last = items.index(item), len(items) - 1
    if index != last:
        move(last, index)
        items[index] = items[last]
    items.pop()
