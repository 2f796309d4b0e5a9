"""The policy: any Hugging Face causal LM, with an attention that lets the n answers to one prompt share that prompt.

A batch is one packed stream of tokens without padding, [prompt | answer | answer | ...] group after group. Every linear
layer sees each prompt once; only inside attention are prompts and answers laid out in rectangles.

Shapes: N tokens of the stream, P groups (prompts), B answers (prompt-major), S prompt tokens, T answer tokens, Z = S + T,
M answer tokens of all answers in one row, H query heads, K key/value heads, D head width, V vocabulary. Padding is right.
"""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from common.hub import check_model, read_config, user_errors

ATTENTION = "selfemo"  # the name under which transformers finds our attention
ONE_THREAD_BELOW = 10_000_000  # parameters
HEAD_BYTES = 2**26  # logits that exist at once; a larger head is cut into chunks that backward computes again


class Layout(Protocol):
    """How the tokens of one stream attend to each other; passed to the model as the keyword `layout`."""

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """Attention of layer number `layer` over the stream; returns [N, H, D]."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in every layer: [1, H, N, D] in, [1, N, H, D] out.

    Without a layout it is plain causal attention over rows of one length: `lm(input_ids)` means what it always means. A 2-D
    padding mask never arrives here (transformers drops it for attentions that it does not know), so do not pass one.
    Raises ValueError for what it would otherwise compute wrongly: 4-D masks, caches, sliding windows, soft caps.
    """
    if sliding_window is not None or softcap is not None:
        raise ValueError("group attention knows no sliding window and no soft cap; this model uses one")
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("group attention takes neither masks nor transformers' caches: pass a layout")
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
    """Training attention in two parts: prompts by themselves, then answers over (their prompt, themselves).

    `prompt_PS` and `answer_BT` hold stream positions (padding points at position 0 and is never read back), `owner_B` the
    group of each answer, `mask_B1TZ` what an answer token sees, `back_N` where the stream's tokens lie in the rectangles.
    """

    prompt_PS: Tensor
    answer_BT: Tensor
    owner_B: Tensor
    mask_B1TZ: Tensor
    back_N: Tensor

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scaling: float) -> Tensor:
        """See `Layout`. A prompt's keys and values come from one forward, whatever the number of its answers."""
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

    On CUDA a mask with `enable_gqa` is left to PyTorch's math kernel, which holds all scores at once; heads that are spread
    keep the fused one. Elsewhere they would only cost memory.
    """
    if spread:
        k_BKZD, v_BKZD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], dim=1) for x in (k_BKZD, v_BKZD))
    return F.scaled_dot_product_attention(q_BHTD, k_BKZD, v_BKZD, attn_mask=mask_B1TZ, scale=scaling, enable_gqa=not spread)


def rectangle(x_NHD: Tensor, index: Tensor) -> Tensor:
    """Rows of the stream laid out as [rows, H, columns, D] by their positions [rows, columns]."""
    return x_NHD.index_select(0, index.flatten()).view(*index.shape, *x_NHD.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Batch:
    """A packed stream and, for each of the M answer tokens, where it is predicted, what it is, and where it goes."""

    ids_N: Tensor
    positions_N: Tensor
    layout: GroupLayout
    predict_M: Tensor  # stream position whose hidden state predicts the token: the prompt's last one for the first token
    target_M: Tensor
    slot_M: Tensor  # row-major place in [B, T]
    shape: tuple[int, int]  # (B, T)


def pack(groups: Sequence[Group], device: torch.device) -> Batch:
    """Lay out groups as one stream. Raises ValueError for an empty prompt, answer or list."""
    if not groups or any(not g.prompt_ids or not g.answers or not all(map(len, g.answers)) for g in groups):
        raise ValueError("every group needs a prompt and answers of at least one token")
    ids: list[int] = []
    positions: list[int] = []
    prompts: list[range] = []
    answers: list[range] = []
    owner: list[int] = []
    for index, group in enumerate(groups):
        prompts.append(range(len(ids), len(ids) + len(group.prompt_ids)))
        ids.extend(group.prompt_ids)
        positions.extend(range(len(group.prompt_ids)))
        for answer in group.answers:
            answers.append(range(len(ids), len(ids) + len(answer)))
            owner.append(index)
            ids.extend(answer)
            positions.extend(range(len(group.prompt_ids), len(group.prompt_ids) + len(answer)))
    T = max(map(len, answers))
    predict = [p for a, o in zip(answers, owner, strict=True) for p in (prompts[o][-1], *a[:-1])]
    layout = group_layout(prompts, answers, owner, len(ids))
    slots = [row * T + t for row, a in enumerate(answers) for t in range(len(a))]
    ids_N = torch.tensor(ids)
    target_M = ids_N[torch.cat([torch.tensor(a) for a in answers])]
    moved = [x.to(device) for x in (ids_N, torch.tensor(positions), torch.tensor(predict), target_M, torch.tensor(slots))]
    on_device = GroupLayout(**{name: value.to(device) for name, value in vars(layout).items()})
    return Batch(moved[0], moved[1], on_device, moved[2], moved[3], moved[4], (len(answers), T))


def group_layout(prompts: Sequence[range], answers: Sequence[range], owner: Sequence[int], n: int) -> GroupLayout:
    """The rectangles of a stream of n tokens, from the stream positions of its prompts and answers."""
    prompt_PS, answer_BT, owner_B = pad(prompts), pad(answers), torch.tensor(owner)
    S, T = prompt_PS.shape[1], answer_BT.shape[1]
    seen_PS = torch.arange(S) < torch.tensor([len(p) for p in prompts])[:, None]
    causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
    mask_BTZ = torch.cat([seen_PS[owner_B][:, None].expand(-1, T, -1), causal_TT.expand(len(answers), -1, -1)], dim=2)
    places = [(p, row * S) for row, p in enumerate(prompts)]
    places += [(a, len(prompts) * S + row * T) for row, a in enumerate(answers)]
    back_N = torch.empty(n, dtype=torch.long)
    for stream, start in places:
        back_N[stream.start : stream.stop] = torch.arange(start, start + len(stream))
    return GroupLayout(prompt_PS, answer_BT, owner_B, mask_BTZ[:, None], back_N)


class Policy(nn.Module):
    """A causal LM as the policy pi_theta: log-probs of answers, given their prompts."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Wrap `lm`, which must have been opened with our attention (see `load`)."""
        super().__init__()
        self.lm = lm

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32, device: str | torch.device = "cpu"
    ) -> "Policy":
        """Open a Hugging Face causal LM (folder or hub name); "auto" leaves weights in the type they are stored in.

        Raises `UserError` where it cannot be opened, where weights are missing, and where sharing a prompt would change
        what the model says (recurrent layers, scaled logits).
        """
        read_config(path)
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
            check_sharing(policy, path)
        return policy

    @classmethod
    def load_here(cls, path: str | Path) -> "Policy":
        """Open one that only answers: bf16 on a GPU, else float32 on the CPU. Raises `UserError` as `load` does."""
        gpu = torch.cuda.is_available()
        return cls.load(path, torch.bfloat16 if gpu else torch.float32, "cuda" if gpu else "cpu").eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, groups: Sequence[Group], *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Token log-probs and entropies of every answer: logp_BT, entropy_BT in nats, prompt-major, 0 off the answer.

        Both are those of the distribution that is sampled: logits / temperature (D19). The prompt is computed once a
        group. The entropy is a measurement and carries no gradient.
        """
        batch = pack(groups, self.device)
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
        rows = max(1, HEAD_BYTES // (4 * output.weight.shape[0]))
        if len(target_M) <= rows or not torch.is_grad_enabled():
            parts = [score_tokens(output, h, t, temperature) for h, t in chunks(hidden_MD, target_M, rows)]
        else:
            parts = [
                checkpoint(score_tokens, output, h, t, temperature, use_reentrant=False)
                for h, t in chunks(hidden_MD, target_M, rows)
            ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def sampler(self) -> "Policy":
        """The policy that `rollout.generate` samples from: this one; see engine.fsdp.ShardedPolicy for shards."""
        return self

    def frozen_copy(self, *, offload: bool = False) -> "Policy":
        """The same weights, apart and without gradients: the reference of the KL term (D6).

        `offload` keeps a sharded copy in main memory between layers; a whole policy lies there anyway.
        """
        return copy.deepcopy(self).requires_grad_(False)

    def export(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write an ordinary Hugging Face folder (weights as safetensors, config, tokenizer, chat template)."""
        self.lm.save_pretrained(str(path))
        tokenizer.save_pretrained(str(path))


def chunks(hidden_MD: Tensor, target_M: Tensor, rows: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of at most `rows` hidden states and their target tokens."""
    return zip(hidden_MD.split(rows), target_M.split(rows), strict=True)


def score_tokens(output: nn.Module, hidden_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, in float32 at least."""
    logits_MV = output(hidden_MD)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    logp_MV = (logits_MV / temperature if temperature != 1 else logits_MV).log_softmax(-1)
    logp_M = logp_MV.gather(-1, target_M[:, None])[:, 0]
    with torch.no_grad():
        finite_MV = logp_MV.clamp(min=torch.finfo(logp_MV.dtype).min)  # a token that cannot be said adds 0, not NaN
        entropy_M = -torch.linalg.vecdot(logp_MV.exp(), finite_MV)
    return logp_M, entropy_M


@torch.no_grad()
def check_sharing(policy: Policy, path: str | Path) -> None:
    """Raise `UserError` unless answers that share a prompt get the log-probs that the plain model gives each of them."""
    V = policy.lm.config.get_text_config().vocab_size
    prompt, answers = [3 % V, 5 % V, 7 % V], [[11 % V, 13 % V], [17 % V]]
    logp_BT, _ = policy([Group(prompt, answers)])
    for row, answer in zip(logp_BT, answers, strict=True):
        ids_1N = torch.tensor([[*prompt, *answer]], device=policy.device)
        logits_NV = policy.lm(ids_1N, use_cache=False).logits[0, len(prompt) - 1 : -1].to(logp_BT.dtype)
        plain = logits_NV.log_softmax(-1).gather(1, ids_1N[0, len(prompt) :, None])[:, 0]
        if not torch.allclose(row[: len(answer)], plain, atol=1e-3 if policy.lm.dtype.itemsize > 2 else 0.5, equal_nan=True):
            raise UserError(f"the model {path} cannot share prompts (recurrent layers or scaled logits): take another one")


def few_threads(policy: Policy) -> None:
    """Let a small model on a CPU compute on one thread, unless OMP_NUM_THREADS says otherwise.

    Its products are over before a second thread has begun; beside other work, waiting for that thread doubles the time.
    """
    small = sum(p.numel() for p in policy.parameters()) < ONE_THREAD_BELOW
    if small and policy.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
