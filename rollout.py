"""Rollouts: n answers to each prompt, sampled in batches from scratch.

The n answers share their prompt: its keys and values are computed and stored once a group, each answer's own beside them.
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

from common.draws import Key, uniform
from common.errors import UserError
from data import Completion
from engine.cache import DecodeLayout, GroupCache, PrefillLayout, Size, bucket
from engine.fast import RecordedSteps, Recorder, Step, float32_logits, packed_weights
from model import ATTENTION, Group, Policy, check_length, pad

BLOCK = 128  # tokens of the vocabulary in one entry of the sampler's coarse CDF
MAX_ROWS = 256  # answers decoded together: the rate still rises up to here
PREFILL_TOKENS = 12_400  # prompt tokens computed together (Table 12: max_num_batched_tokens)


def draw_in_blocks(logits_RV: Tensor, temperature: float, uniform_R: Sequence[float]) -> tuple[list[int], list[float]]:
    """One token per row by inverse CDF, and its log-prob under the distribution it was drawn from: `minimal.draw`.

    In half of its time: one CDF over blocks of the vocabulary, one inside the block that is hit, one buffer. Raises
    FloatingPointError for logits that are NaN or infinite.
    """
    weight_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
    peak_R1 = weight_RV.amax(-1, keepdim=True)
    check_finite(peak_R1)
    weight_RV.sub_(peak_R1).div_(temperature or 1.0).exp_()
    if rest := -weight_RV.shape[1] % BLOCK:
        weight_RV = F.pad(weight_RV, (0, rest))
    weight_RXC = weight_RV.unflatten(1, (-1, BLOCK))
    cdf_RX = rising_sums(weight_RXC.sum(-1))
    if temperature == 0:
        token_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        aim_R1 = cdf_RX.new_tensor(uniform_R)[:, None] * cdf_RX[:, -1:]
        block_R1 = locate(cdf_RX, aim_R1)
        before_R1 = F.pad(cdf_RX, (1, 0)).gather(1, block_R1)
        inside_RC = weight_RXC.take_along_dim(block_R1[..., None], 1)[:, 0]
        token_R1 = block_R1 * BLOCK + locate(rising_sums(inside_RC), aim_R1 - before_R1)
    score_R1 = (logits_RV.gather(1, token_R1) - peak_R1) / (temperature or 1.0)
    logp_R1 = score_R1 - cdf_RX[:, -1:].log()
    return token_R1[:, 0].tolist(), logp_R1[:, 0].tolist()


def rising_sums(weight_RX: Tensor) -> Tensor:
    """Sums from the left that rise at entries with a weight and nowhere else.

    The scan of a GPU adds in no fixed order: its sums may fall, or rise by a last bit where there is no weight.
    """
    return torch.where(weight_RX > 0, weight_RX.cumsum(-1), 0).cummax(-1).values


def locate(cdf_RX: Tensor, aim_R1: Tensor) -> Tensor:
    """The first entry of each row that lies above the aim: never one of weight 0, and one also where the aim is the end."""
    last_R1 = cdf_RX[:, -1:]
    below_R1 = torch.minimum(aim_R1, torch.nextafter(last_R1, torch.zeros_like(last_R1)))
    found_R1: Tensor = torch.searchsorted(cdf_RX, below_R1, right=True)
    return found_R1


def check_finite(peak: Tensor) -> None:
    """Raise FloatingPointError where the largest logit of a row is NaN or infinite."""
    if not peak.isfinite().all():
        raise FloatingPointError("a logit is NaN or infinite")


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
    record: Recorder | None = None,
) -> list[list[Completion]]:
    """Sample n answers to each prompt; the answers of prompt i are element i.

    `keys` names each prompt's random streams. `kv_budget` (bytes, None = no limit) is never exceeded by keys and values:
    over it, the youngest group is dropped and queued again, and its streams redraw the same answers. `record`
    (`engine.fast.cuda_graph`) records decode steps and replays them. Nothing outlives the call. Raises ValueError for empty
    prompts or settings out of range, `UserError` if one group does not fit the budget or the model's positions.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0 or len(keys) != len(prompts) or not all(map(len, prompts)):
        raise ValueError("generate needs n >= 1, max_new_tokens >= 1, temperature >= 0, and a key and tokens a prompt")
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
    """An answer on its way. All of its tokens but the last are in the cache."""

    job: Job
    answer: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """The groups being decoded. `groups` and `rows` stand in the order of the cache's slots and rows."""

    def __init__(
        self, lm: PreTrainedModel, n: int, max_new: int, temperature: float, eos: frozenset[int], budget: int | None,
        record: Recorder | None,
    ) -> None:
        """Nothing is computed yet."""
        self.lm, self.n, self.max_new, self.temperature, self.eos, self.budget = lm, n, max_new, temperature, eos, budget
        self.cache = GroupCache(lm)
        step: Step = partial(next_logits, lm)
        self.decode: Step = RecordedSteps(step, self.cache, n, record) if record else step
        self.groups: list[Job] = []
        self.rows: list[Row] = []
        self.done: dict[tuple[int, int], Completion] = {}
        self.clock = itertools.count()
        self.born: dict[int, int] = {}  # when a job was last admitted
        self.hold = False  # after a drop: admit nobody until a group has finished

    def run(self, jobs: list[Job], bar: Any) -> list[list[Completion]]:
        """Answer every job."""
        for job in jobs:
            self.check_fits(job)
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
        ends = torch.tensor(lengths).cumsum(0)
        prompt_PS = pad([range(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)])
        back = [row * prompt_PS.shape[1] + s for row, length in enumerate(lengths) for s in range(length)]
        layout = PrefillLayout(self.cache, self.on_device(prompt_PS), self.on_device(torch.tensor(back)), first)
        positions = [s for length in lengths for s in range(length)]
        ids = [token for job in jobs for token in job.prompt]
        hidden_ND = hidden_states(self.lm, self.tensor(ids), self.tensor(positions), layout)
        logits_PV = self.lm.get_output_embeddings()(hidden_ND[self.on_device(ends - 1)])
        starts = [(p, a) for p, job in enumerate(jobs) for a in range(self.n) if (job.index, a) not in self.done]
        rows = [Row(jobs[p], a) for p, a in starts]
        self.rows += rows
        self.extend(rows, logits_PV[[p for p, _ in starts]])

    def step(self) -> None:
        """One more token for every row."""
        ids = [row.ids[-1] for row in self.rows]
        positions = [len(row.job.prompt) + len(row.ids) - 1 for row in self.rows]
        self.extend(self.rows, self.decode(self.tensor(ids), self.tensor(positions), self.layout()))

    def layout(self) -> DecodeLayout:
        """Where the rows stand in their groups, and what each of them sees."""
        slot = {job.index: p for p, job in enumerate(self.groups)}
        members: list[list[int]] = [[] for _ in self.groups]
        for r, row in enumerate(self.rows):
            members[slot[row.job.index]].append(r)
        place = {r: (p, g) for p, group in enumerate(members) for g, r in enumerate(group)}
        place_R2 = torch.tensor([place[r] for r in range(len(self.rows))])
        prompt_R1 = torch.tensor([[len(row.job.prompt)] for row in self.rows])
        length_R = torch.tensor([len(row.ids) - 1 for row in self.rows])
        _, S, _, T = self.cache.size
        hidden_RZ = torch.cat([torch.arange(S) >= prompt_R1, torch.arange(T) > length_R[:, None]], dim=1)
        hide_RZ = torch.zeros(hidden_RZ.shape, dtype=self.cache.like.dtype).masked_fill(hidden_RZ, -torch.inf)
        parts = (pad(members), place_R2[:, 0], place_R2[:, 1], length_R, hide_RZ[:, None, None])
        moved = [self.on_device(x) for x in parts]
        return DecodeLayout(self.cache, *moved)

    def extend(self, rows: Sequence[Row], logits_RV: Tensor) -> None:
        """Draw the next token of each row."""
        numbers = [uniform(row.job.key, row.answer, len(row.ids)) for row in rows] if self.temperature else []
        for row, token, logp in zip(rows, *draw_in_blocks(logits_RV, self.temperature, numbers), strict=True):
            row.ids.append(token)
            row.logprobs.append(logp)

    def retire(self) -> list[Row]:
        """Take finished answers out, and groups without answers; the last ones move into their places."""
        finished = [row for row in self.rows if row.ids[-1] in self.eos or len(row.ids) == self.max_new]
        for row in finished:
            swap_out(self.rows, row, self.cache.move_row)
        alive = {row.job.index for row in self.rows}
        for job in [job for job in self.groups if job.index not in alive]:
            swap_out(self.groups, job, self.cache.move_group)
            self.hold = False
        return finished

    def make_room(self, queue: deque[Job]) -> None:
        """Capacity for one more token a row; over the budget, the youngest group goes back to the queue."""
        while (size := self.capacity(self.needed(self.groups, len(self.rows)))) is None:
            job = max(self.groups, key=lambda job: self.born[job.index])
            queue.appendleft(job)
            for row in [row for row in self.rows if row.job is job]:
                swap_out(self.rows, row, self.cache.move_row)
            swap_out(self.groups, job, self.cache.move_group)
            self.hold = True
        self.cache.resize(size)

    def capacity(self, need: Size) -> Size | None:
        """The capacity to move to: today's if it is enough, else grown, else as tight as the need; None if over budget."""
        grown = tuple(map(max, need, self.cache.size))
        return next((size for size in (grown, need) if self.fits(size)), None)  # type: ignore[arg-type,return-value]

    def tensor(self, numbers: Sequence[int]) -> Tensor:
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


def next_logits(lm: PreTrainedModel, ids_R: Tensor, positions_R: Tensor, layout: DecodeLayout) -> Tensor:
    """Logits [R, V] after one more token of every row."""
    logits_RV: Tensor = lm.get_output_embeddings()(hidden_states(lm, ids_R, positions_R, layout))
    return logits_RV


def swap_out(items: list[Any], item: Any, move: Callable[[int, int], None]) -> None:
    """Remove an item; the last one takes its place, here and in the cache."""
    index, last = items.index(item), len(items) - 1
    if index != last:
        move(last, index)
        items[index] = items[last]
    items.pop()
