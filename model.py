"""The policy: any Hugging Face causal LM, with an attention that lets the n answers to one prompt share that prompt.

A *group* is a prompt with its answers. A batch of groups is one packed stream of tokens without padding: first all prompts,
then all answers, group after group. Every linear layer sees each prompt once; only attention knows where a text ends.
`GroupLayout` is the plain form of this attention; engine.cascade computes the same without a mask.

Shapes: N tokens of the stream, first L of prompts, then M of answers; P groups (one prompt each), B answers (those of the
first prompt come first), S tokens of the longest prompt, T of the longest answer, Z = S + T, H query heads, K key/value
heads (each serves H / K query heads), D head width, V vocabulary. Where there is padding, it stands at the right.
"""

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from common.head import Head
from common.hub import check_model, read_config, user_errors
from common.shrunk import FAR, NEAR, Known, positions, random_model, shrunk

ATTENTION = "selfemo"  # the name under which transformers finds our attention
ONE_THREAD_BELOW = 10_000_000  # parameters
HEAD_BYTES = 2**26  # float32 logits that exist at once


class Layout(Protocol):
    """How the tokens of one stream attend to each other; passed to the model as the keyword `layout`."""

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """Attention of layer number `layer` over the stream; returns [N, H, D]."""
        ...


# Makes a layout from the lengths of the prompts, the lengths of the answers to each, and the device of the stream.
LayoutOf = Callable[[Sequence[int], Sequence[Sequence[int]], torch.device], Layout]


class Unlike(ValueError):
    """Why a model cannot share prompts."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in every layer: [1, H, N, D] in, [1, N, H, D] out.

    Without a layout it is plain causal attention over rows of one length, so `lm(input_ids)` means what it always means. Do
    not pass a 2-D padding mask: transformers drops it for attentions that it does not know, and it never arrives here. The
    model has put positions into queries and keys before. There is no dropout, because an answer has one probability. Raises
    `Unlike` for everything else that is asked of it: masks, caches, windows, soft caps, sinks, biases, chosen keys.
    """
    if asked := sorted(name for name, what in unknown.items() if what is not None and what is not False):
        raise Unlike(f"it asks its attention for {', '.join(asked)}, which group attention does not know")
    if attention_mask is not None or is_causal is False or query.shape[2] != key.shape[2]:
        raise Unlike("group attention is causal and takes neither masks nor transformers' caches: pass a layout")
    if layout is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer, q_NHD, k_NKD, v_NKD, scale)[None], None


AttentionInterface.register(ATTENTION, attention)


@dataclass(frozen=True)
class Group:
    """A prompt and its answers, as token ids. The end-of-sequence token belongs to the answer."""

    prompt_ids: Sequence[int]
    answers: Sequence[Sequence[int]]


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Rows of unequal length as one right-padded integer tensor [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class GroupLayout:
    """Training attention in two parts: prompts attend to themselves, then answers attend to their prompt and themselves.

    Each part lays its tokens out as a padded rectangle. `prompt_PS` and `answer_BT` say which stream position stands where
    in it (padding points at position 0 and is never read back), `owner_B` which group an answer belongs to, `mask_B1TZ` what
    an answer token sees, and `back_N` where each token of the stream lies in the two rectangles, flattened and joined.
    """

    prompt_PS: Tensor
    answer_BT: Tensor
    owner_B: Tensor
    mask_B1TZ: Tensor
    back_N: Tensor

    @classmethod
    def of(cls, prompts: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device) -> "GroupLayout":
        """The layout of a stream, from the lengths of its prompts and of the answers to each of them."""
        each = [length for group in answers for length in group]
        prompt_PS, answer_BT = pad(pieces(0, prompts)), pad(pieces(sum(prompts), each))
        owner_B = torch.tensor([index for index, group in enumerate(answers) for _ in group])
        S, T = prompt_PS.shape[1], answer_BT.shape[1]
        seen_PS = torch.arange(S) < torch.tensor(prompts)[:, None]
        causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
        mask_BTZ = torch.cat([seen_PS[owner_B][:, None].expand(-1, T, -1), causal_TT.expand(len(each), -1, -1)], dim=2)
        back_N = torch.tensor([*places(prompts, S), *(prompt_PS.numel() + place for place in places(each, T))])
        return cls(*(x.to(device) for x in (prompt_PS, answer_BT, owner_B, mask_BTZ[:, None], back_N)))

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `Layout`. The keys and values of a prompt are computed once, whatever the number of its answers."""
        pq, pk, pv = (rectangle(x, self.prompt_PS) for x in (q_NHD, k_NKD, v_NKD))
        prompt_PHSD = F.scaled_dot_product_attention(pq, pk, pv, is_causal=True, scale=scaling, enable_gqa=True)
        aq, ak, av = (rectangle(x, self.answer_BT) for x in (q_NHD, k_NKD, v_NKD))
        k_BKZD = torch.cat([pk.index_select(0, self.owner_B), ak], dim=2)
        v_BKZD = torch.cat([pv.index_select(0, self.owner_B), av], dim=2)
        answer_BHTD = masked_attention(aq, k_BKZD, v_BKZD, self.mask_B1TZ, scaling, spread=aq.is_cuda)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (prompt_PHSD, answer_BHTD)]
        return torch.cat(flat).index_select(0, self.back_N)


def masked_attention(
    q_BHTD: Tensor, k_BKZD: Tensor, v_BKZD: Tensor, mask_B1TZ: Tensor, scaling: float, *, spread: bool
) -> Tensor:
    """Attention under a mask. `spread` repeats each key/value head for its query heads, which changes no result.

    On CUDA, a mask together with `enable_gqa` (query heads that share key/value heads) makes PyTorch take its slow kernel,
    which holds all scores at once. With repeated heads it takes a fused one, which does not. Elsewhere repeating would only
    cost memory.
    """
    if spread:
        k_BKZD, v_BKZD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in (k_BKZD, v_BKZD))
    return F.scaled_dot_product_attention(q_BHTD, k_BKZD, v_BKZD, attn_mask=mask_B1TZ, scale=scaling, enable_gqa=not spread)


def rectangle(x_NHD: Tensor, index: Tensor) -> Tensor:
    """Tokens of the stream laid out as [rows, H, columns, D]; `index` [rows, columns] has the stream position of each."""
    return x_NHD.index_select(0, index.flatten()).view(*index.shape, *x_NHD.shape[1:]).transpose(1, 2)


def pieces(first: int, lengths: Sequence[int]) -> list[range]:
    """Stream positions of pieces of these lengths that follow each other from `first` on."""
    return list(itertools.starmap(range, itertools.pairwise(itertools.accumulate(lengths, initial=first))))


def places(lengths: Sequence[int], width: int) -> list[int]:
    """Where the tokens of right-padded rows lie in a rectangle of this width, counted row by row; padding left out."""
    return [row * width + column for row, length in enumerate(lengths) for column in range(length)]


@dataclass(frozen=True)
class Batch:
    """A packed stream and, for each of the M answer tokens, where it is predicted, what it is, and where it goes."""

    ids_N: Tensor
    positions_N: Tensor
    layout: Layout
    predict_M: Tensor  # stream position whose hidden state predicts the token: the prompt's last one for the first token
    target_M: Tensor
    slot_M: Tensor  # place in [B, T], counted row by row
    shape: tuple[int, int]  # (B, T)


def pack(groups: Sequence[Group], device: torch.device, layout_of: LayoutOf) -> Batch:
    """Lay out groups as one stream. Raises ValueError for an empty prompt, answer or list."""
    if not groups or any(not g.prompt_ids or not g.answers or not all(map(len, g.answers)) for g in groups):
        raise ValueError("every group needs a prompt and answers of at least one token")
    prompts = [len(g.prompt_ids) for g in groups]
    answers = [[len(answer) for answer in g.answers] for g in groups]
    each = [length for group in answers for length in group]
    ids = [i for g in groups for i in g.prompt_ids] + [i for g in groups for answer in g.answers for i in answer]
    positions = [position for length in prompts for position in range(length)]
    predict: list[int] = []
    L, T = len(positions), max(each)
    for end, prompt, group in zip(itertools.accumulate(prompts), prompts, answers, strict=True):
        for length in group:
            first = L + len(predict)
            predict += [end - 1, *range(first, first + length - 1)]
            positions += range(prompt, prompt + length)
    moved = [torch.tensor(x).to(device) for x in (ids, positions, predict, places(each, T))]
    ids_N, positions_N, predict_M, slot_M = moved
    return Batch(ids_N, positions_N, layout_of(prompts, answers, device), predict_M, ids_N[L:], slot_M, (len(each), T))


class Policy(nn.Module):
    """A causal LM as the policy pi_theta: log-probs of answers, given their prompts."""

    def __init__(self, lm: PreTrainedModel, layout_of: LayoutOf = GroupLayout.of) -> None:
        """Wrap `lm`, which must have been opened with our attention (see `load`)."""
        super().__init__()
        self.lm = lm
        self.longest: int | None = None  # most tokens of a text, or None without a limit: see `check_architecture`
        self.layout_of = layout_of

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32, device: str | torch.device = "cpu"
    ) -> "Policy":
        """Open a Hugging Face causal LM (folder or hub name); "auto" leaves weights in the type they are stored in.

        Raises `UserError` where the model cannot be opened, where weights are missing, and where sharing a prompt would
        change what it says (recurrent layers, scaled logits).
        """
        longest = check_architecture(read_config(path), path)
        check_model(Path(path))
        with user_errors(f"cannot open the model {path}"):
            opened: Any = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True, trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            lm, missing = opened[0], {*opened[1]["missing_keys"], *(name for name, *_ in opened[1]["mismatched_keys"])}
            if missing:
                raise ValueError(f"{len(missing)} weights are missing or not of the size in config.json: {min(missing)}")
            for parameter in lm.parameters():  # out of the mapped file: products depend, in the last bit, on alignment
                parameter.data = parameter.data.clone()
            policy = cls(lm).to(device)
            try:
                check_sharing(policy)
            except Unlike as error:
                raise UserError(f"the model {path} cannot share prompts: {error}") from error
        policy.longest = longest
        return policy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, groups: Sequence[Group], *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Token log-probs and entropies of every answer: logp_BT and entropy_BT in nats, 0 behind an answer's end.

        Both belong to the distribution that is sampled from, logits / temperature (D19). Each prompt is computed once. The
        entropy is a measurement and carries no gradient.
        """
        check_length(self, groups)
        batch = pack(groups, self.device, self.layout_of)
        body: Any = self.lm.base_model
        hidden_ND = body(
            input_ids=batch.ids_N[None], position_ids=batch.positions_N[None], use_cache=False, layout=batch.layout
        ).last_hidden_state[0]
        logp_M, entropy_M = self.head(hidden_ND.index_select(0, batch.predict_M), batch.target_M, temperature)
        B, T = batch.shape
        place = (batch.slot_M // T, batch.slot_M % T)
        return logp_M.new_zeros(B, T).index_put(place, logp_M), logp_M.new_zeros(B, T).index_put(place, entropy_M)

    def head(self, hidden_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies from hidden states, never with more than HEAD_BYTES of logits at once."""
        output = self.lm.get_output_embeddings()
        bias_V = getattr(output, "bias", None)
        apply: Any = Head.apply
        logp_M, entropy_M = apply(hidden_MD, output.weight, bias_V, target_M, temperature, HEAD_BYTES)
        return logp_M, entropy_M

    def sampler(self) -> "Policy":
        """The policy that `rollout.generate` samples from: this one; see engine.fsdp.ShardedPolicy for shards."""
        return self

    def frozen_copy(self, *, offload: bool = False) -> "Policy":
        """A copy of the weights without gradients: the reference of the KL term (D6).

        `offload` keeps a sharded copy in main memory between layers (see engine.fsdp); a whole policy lies there anyway.
        """
        return copy.deepcopy(self).requires_grad_(False)

    def export(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write an ordinary Hugging Face folder (weights as safetensors, config, tokenizer, chat template)."""
        self.lm.save_pretrained(str(path))
        tokenizer.save_pretrained(str(path))


def check_length(policy: Policy, groups: Sequence[Group]) -> None:
    """Raise `UserError` for a text that is too long for the model: see `check_architecture`."""
    tokens = max((len(g.prompt_ids) + max(map(len, g.answers), default=0) for g in groups), default=0)
    if policy.longest is not None and tokens > policy.longest:
        raise UserError(f"a text of {tokens} tokens: this model is right up to {policy.longest} (see `check_architecture`)")


# What can be opened: models whose log-probs with our attention are those with transformers' own


def shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Layers L, key/value heads K and head width D of a model: what a cache of its keys and values holds."""
    text: Any = config.get_text_config()
    K = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_hidden_layers), int(K), int(D)


def check_architecture(config: PretrainedConfig, path: str | Path, tokens: int = 0) -> int | None:
    """The longest text, in tokens, that gets the same log-probs whatever stands beside it; None without a limit.

    Raises `UserError` for an architecture that our attention cannot replace, and where texts of `tokens` are too long. The
    weights are not read: a tiny random model of the same architecture is compared, which takes a fraction of a second.
    """
    try:
        longest = _longest(Known(config.to_json_string(use_diff=False), config))
    except Exception as error:  # whatever a class of transformers raises: it cannot be shown to be right
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = first if isinstance(error, Unlike) else f"no tiny copy of it can be compared ({type(error).__name__}: {first})"
        refused = f"the model {path} ({config.model_type}) cannot share prompts: {why}"
        raise UserError(f"{refused}; docs/architectures.md lists the models that can") from error
    if longest is not None and tokens > longest:
        why = f"positions, or what they mean, change after {longest:,} tokens, and prompt and answer may have {tokens:,}"
        raise UserError(f"the model {path}: {why}: lower --max_prompt_tokens or --max_new_tokens")
    return longest


@cache
def _longest(known: Known) -> int | None:
    try:
        compare(shrunk(known.config, NEAR))
        return None
    except Exception:  # a table of positions that ends, or frequencies that change with the longest one: right up to there
        try:
            compare(shrunk(known.config, FAR))
        except IndexError as error:
            raise Unlike("its table of positions ends before anything can be compared") from error
        return positions(known.config)


@torch.no_grad()
def compare(config: PretrainedConfig) -> None:
    """Raise `Unlike` unless a random model of this shape has the log-probs that transformers' eager attention gives it.

    Eager attention is transformers' plain one. The answers share a prompt, alone and beside a longer one. Texts have up to
    52 tokens, which is longer than what `shrunk` leaves of windows and chunks.
    """
    eager = random_model(config)
    policy = Policy(copy.deepcopy(eager))
    policy.lm.set_attn_implementation(ATTENTION)
    check_layers(policy)
    tokens = [7 * i * i % min(89, config.get_text_config().vocab_size) for i in range(52)]
    short, long = Group(tokens[:5], [tokens[40:], tokens[43:]]), Group(tokens[:40], [tokens[40:], tokens[43:]])
    for groups in ([short, long], [short], [long]):
        check_close(policy, eager, groups, 1e-4)


def check_layers(policy: Policy) -> None:
    """Raise `Unlike` unless every layer calls our attention once, with keys and values as a cache holds them."""
    L, K, D = shape(policy.lm.config)
    seen = Seen([])
    body: Any = policy.lm.base_model
    body(input_ids=torch.tensor([[0, 1, 0]]), position_ids=torch.tensor([[0, 1, 2]]), use_cache=False, layout=seen)
    if [layer for layer, *_ in seen.calls] != list(range(L)):
        raise Unlike("not every layer calls our attention once, with a layout (it recurs, convolves, or knows only its own)")
    if {tuple(shapes) for _, *shapes in seen.calls} != {(K, D, K, D)}:
        raise Unlike("its layers do not all have the keys and values that its configuration names, of one width")


@dataclass(frozen=True)
class Seen:
    """A layout that notes the calls it gets: (layer, key heads, their width, value heads, their width)."""

    calls: list[tuple[int, int, int, int, int]]

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `Layout`."""
        self.calls.append((layer, *k_NKD.shape[1:], *v_NKD.shape[1:]))
        return q_NHD[..., : v_NKD.shape[-1]]


@torch.no_grad()
def check_sharing(policy: Policy) -> None:
    """Raise `Unlike` unless, with these weights, sharing a prompt changes no log-prob of transformers' eager attention.

    The answers are tokens that the model finds likely: in 16 bits an unlikely one may be rounded by more than the bound.
    """
    V = policy.lm.config.get_text_config().vocab_size
    prompt = [3 % V, 5 % V, 7 % V]

    def eager(ids: Tensor, **given: Any) -> Any:
        policy.lm.set_attn_implementation("eager")
        try:
            return policy.lm(ids, **given)
        finally:
            policy.lm.set_attn_implementation(ATTENTION)

    def likeliest(*answer: int) -> list[int]:
        ids_1N = torch.tensor([[*prompt, *answer]], device=policy.device)
        ids: list[int] = eager(ids_1N, use_cache=False).logits[0, -1].topk(2).indices.tolist()
        return ids

    first, second = likeliest()
    group = Group(prompt, [[first, likeliest(first)[0]], [second]])
    check_close(policy, eager, [group], 1e-3 if policy.lm.dtype.itemsize > 2 else 0.5)


def check_close(policy: Policy, plain: Any, groups: Sequence[Group], within: float) -> None:
    """Raise `Unlike` unless log-probs are at most `within` nats from those of `plain`, which sees answers one by one.

    NaN counts as equal to NaN.
    """
    logp_BT, _ = policy(groups)
    for row, (prompt, answer) in zip(logp_BT, [(g.prompt_ids, a) for g in groups for a in g.answers], strict=True):
        ids_1N = torch.tensor([[*prompt, *answer]], device=policy.device)
        logits_TV = plain(ids_1N, use_cache=False).logits[0, len(prompt) - 1 : -1].to(logp_BT.dtype)
        alone = logits_TV.log_softmax(-1).gather(1, ids_1N[0, len(prompt) :, None])[:, 0]
        if not torch.allclose(row[: len(answer)], alone, rtol=0, atol=within, equal_nan=True):
            gap = (row[: len(answer)] - alone).abs().max().item()
            raise Unlike(f"its log-probs are {gap:.1g} nats off transformers' eager attention")


def few_threads(policy: Policy) -> None:
    """Let a small model on a CPU compute on one thread, unless OMP_NUM_THREADS says otherwise.

    Its matrix products are over before a second thread has begun. Beside other work, waiting for it doubles the time.
    """
    small = sum(p.numel() for p in policy.parameters()) < ONE_THREAD_BELOW
    if small and policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
