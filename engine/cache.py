"""The group cache: keys and values of earlier tokens, kept so that sampling computes each once, and attention over them.

A group is a prompt with its answers: the prompt's keys and values are there once, those of each answer beside them. They lie
in dense tensors that grow by `BUCKET` tokens or more. `PrefillLayout` is the attention while prompts are read,
`DecodeLayout` while answers get their next token; both are given to `model.attention`.

Shapes: as in rollout.py. X stands for S, D or Z, Y for G * Q.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from common.head import product
from model import rectangle, shape

Size = tuple[int, int, int, int]  # capacity of a cache: groups, S tokens of a prompt, rows (answers), T tokens of an answer
BUCKET = 64  # the cache grows by this many tokens


def bucket(tokens: int) -> int:
    """`tokens` rounded up to a multiple of BUCKET."""
    return -(-tokens // BUCKET) * BUCKET


def doubled(size: Size, need: Size, most: Size) -> Size:
    """A capacity that holds `need`: each part of `size` that is too small doubles, but not beyond `most`."""
    sides = zip(size, need, most, strict=True)
    grown = (have if want <= have else max(want, min(2 * have, top)) for have, want, top in sides)
    return tuple(grown)  # type: ignore[return-value]


def largest(prompts: int, n: int, rows: int, S: int, T: int) -> Size:
    """The capacity that is always enough: for prompts of S tokens, n answers of T tokens each, `rows` of them at once.

    A group comes in when n rows are free. So there are most groups when each of the older ones has one row left.
    """
    groups = min(prompts, max(1, rows - n + 1))
    return groups, bucket(S), min(prompts * n, max(rows, n)), bucket(T)


def cache_bytes(config: PretrainedConfig, element_size: int, size: Size) -> int:
    """Bytes of keys and values with a capacity. While the cache grows, one layer is there twice; that is counted."""
    slots, S, rows, T = size
    L, K, D = shape(config)
    return (L + 1) * 2 * K * D * element_size * (slots * S + rows * T)


class GroupCache:
    """Keys and values of every layer: `prompt` [slots, K, S, D] once per group, `answer` [rows, K, T, D] beside them.

    The first `groups` slots and the first `rows` rows are in use. Bytes held never exceed `cost` of the capacity.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        """An empty cache for the layers of `lm`."""
        self.config: PretrainedConfig = lm.config
        self.layers, self.K, self.D = shape(self.config)
        self.like = next(lm.parameters())
        self.size = (0, 0, 0, 0)  # slots, S, rows, T
        self.version = 0  # how often the tensors have moved to other addresses
        self.prompt = [(self.zeros(0, 0), self.zeros(0, 0)) for _ in range(self.layers)]
        self.answer = [(self.zeros(0, 0), self.zeros(0, 0)) for _ in range(self.layers)]

    def zeros(self, rows: int, tokens: int) -> Tensor:
        """Zeros and not garbage: weight 0 times NaN would still be NaN."""
        return self.like.new_zeros(rows, self.K, tokens, self.D)

    def cost(self, size: Size) -> int:
        """Most bytes held with this capacity; see `cache_bytes`."""
        return cache_bytes(self.config, self.like.element_size(), size)

    def resize(self, size: Size) -> None:
        """Move to a new capacity, keeping what fits, one layer at a time."""
        if size == self.size:
            return
        slots, S, rows, T = size
        for layer in range(self.layers):
            self.prompt[layer] = tuple(self.moved(x, slots, S) for x in self.prompt[layer])  # type: ignore[assignment]
            self.answer[layer] = tuple(self.moved(x, rows, T) for x in self.answer[layer])  # type: ignore[assignment]
        self.version += 1
        self.size = size

    def moved(self, old: Tensor, rows: int, tokens: int) -> Tensor:
        """`old` cut or zero-padded to [rows, K, tokens, D]; itself where nothing changes."""
        if (old.shape[0], old.shape[2]) == (rows, tokens):
            return old
        new = self.zeros(rows, tokens)
        r, t = min(rows, old.shape[0]), min(tokens, old.shape[2])
        new[:r, :, :t] = old[:r, :, :t]
        return new

    def move_row(self, source: int, target: int) -> None:
        """Copy an answer over a finished one, so that the rows in use stay the first ones."""
        for pair in self.answer:
            for x in pair:
                x[target] = x[source]

    def move_group(self, source: int, target: int) -> None:
        """Copy a prompt over one whose answers are finished, so that the slots in use stay the first ones."""
        for pair in self.prompt:
            for x in pair:
                x[target] = x[source]


@dataclass(frozen=True)
class PrefillLayout:
    """Prompts attend to themselves, and their keys and values go into slots `first`, `first` + 1, ... of the cache."""

    cache: GroupCache
    prompt_PS: Tensor
    back_N: Tensor
    first: int

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `model.Layout`."""
        q, k, v = (rectangle(x, self.prompt_PS) for x in (q_NHD, k_NKD, v_NKD))
        P, S = self.prompt_PS.shape
        for kept, new in zip(self.cache.prompt[layer], (k, v), strict=True):
            kept[self.first : self.first + P, :, :S] = new
        out_PHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out_PHSD.transpose(1, 2).flatten(0, 1)[self.back_N]


@dataclass(frozen=True)
class DecodeLayout:
    """One new token of every row attends to its prompt and to its own answer so far.

    The tables are those of `DecodeRows`; `hide_R11Z` is -inf where a row must not look.

    Z is the whole capacity of the cache. What is not in use is hidden and not cut off: a CPU copies a block that is not
    dense before it multiplies in bf16, and that takes 2-5 x the product's own time.
    """

    cache: GroupCache
    row_PG: Tensor
    group_R: Tensor
    member_R: Tensor
    length_R: Tensor
    hide_R11Z: Tensor

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `model.Layout`. The prompt block is one matrix product per group, over all of its answers."""
        R, P = len(q_NHD), len(self.row_PG)
        keys_RKTD, values_RKTD = (x[:R] for x in self.cache.answer[layer])
        at = (torch.arange(R, device=q_NHD.device), slice(None), self.length_R)
        keys_RKTD[at], values_RKTD[at] = k_NKD, v_NKD
        keys_PKSD, values_PKSD = (x[:P] for x in self.cache.prompt[layer])
        q_RKQD = q_NHD.unflatten(1, (k_NKD.shape[1], -1))
        prompt_RKQS = self.by_row(product(self.by_group(q_RKQD), keys_PKSD.transpose(-1, -2)))
        own_RKQT = product(q_RKQD, keys_RKTD.transpose(-1, -2))
        scores_RKQZ = torch.add(self.hide_R11Z, torch.cat([prompt_RKQS, own_RKQT], dim=-1), alpha=scaling)  # in float32
        weights_RKQZ = scores_RKQZ.softmax(-1).to(values_RKTD.dtype)
        S = keys_PKSD.shape[2]
        prompt_RKQD = self.by_row(self.by_group(weights_RKQZ[..., :S]) @ values_PKSD)
        return (prompt_RKQD + weights_RKQZ[..., S:] @ values_RKTD).flatten(1, 2)

    def by_group(self, x_RKQX: Tensor) -> Tensor:
        """[R, K, Q, X] as [P, K, G * Q, X]."""
        heads_K1 = torch.arange(x_RKQX.shape[1], device=x_RKQX.device)[:, None]
        return x_RKQX[self.row_PG[:, None], heads_K1].flatten(2, 3)

    def by_row(self, x_PKYX: Tensor) -> Tensor:
        """[P, K, G * Q, X] back as [R, K, Q, X]."""
        x_PKGQX = x_PKYX.view(*x_PKYX.shape[:2], self.row_PG.shape[1], -1, x_PKYX.shape[-1])
        return x_PKGQX[self.group_R, :, self.member_R]


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """The unfinished answers, one per row, on the device of the weights.

    A decode step changes them in place; they are made anew when rows come or go. `row_PG` has the rows of each group
    (padding: row 0, never read back), `group_R` and `member_R` say where a row stands in `row_PG`. `prompt_R` is the length
    of a row's prompt, `ids_R` its last token, and `length_R` how many tokens of its answer are cached: all but the last.
    Column t % A of `uniform_RA` has the random number that decides token t of the answer.
    """

    row_PG: Tensor
    group_R: Tensor
    member_R: Tensor
    prompt_R: Tensor
    ids_R: Tensor
    length_R: Tensor
    uniform_RA: Tensor

    @property
    def positions_R(self) -> Tensor:
        """Positions of the last tokens, counted from the beginning of their prompts."""
        return self.prompt_R + self.length_R

    @property
    def uniform_R(self) -> Tensor:
        """The random numbers of the next tokens."""
        column_R1 = ((self.length_R + 1) % self.uniform_RA.shape[1])[:, None]
        return self.uniform_RA.gather(1, column_R1)[:, 0]

    def layout(self, cache: GroupCache) -> DecodeLayout:
        """The attention of one step: a row sees its prompt, its cached tokens and its last one."""
        _, S, _, T = cache.size
        s_S, t_T = (torch.arange(size, device=self.length_R.device) for size in (S, T))
        hidden_RZ = torch.cat([s_S >= self.prompt_R[:, None], t_T > self.length_R[:, None]], dim=1)
        hide_RZ = cache.like.new_zeros(hidden_RZ.shape).masked_fill(hidden_RZ, -torch.inf)
        return DecodeLayout(cache, self.row_PG, self.group_R, self.member_R, self.length_R, hide_RZ[:, None, None])

    def advance(self, token_R: Tensor) -> None:
        """One more token per row."""
        self.ids_R.copy_(token_R)
        self.length_R.add_(1)
