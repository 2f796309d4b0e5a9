"""Log-probs and entropies of tokens under a linear layer over a large vocabulary, never with all logits at once.

Whatever the type of the weights, logits and sums are float32 at least, and a gradient is rounded to that type once.

Shapes: M tokens, D width of a hidden state, V vocabulary, C tokens of one block of it.
"""

from typing import Any

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, [..., M, D] by [..., D, V], in float32 at least.

    A GPU multiplies bf16 numbers and hands over the float32 sums. PyTorch's products on a CPU round them to bf16, so there
    the operands are made float32.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != wide:
        rows, columns = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
        return torch.bmm(rows, columns, out_dtype=wide).view(*a.shape[:-1], b.shape[-1])
    return a.to(wide) @ b.to(wide)


def scaled_logits(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Logits / temperature, in float32 at least, in memory of their own."""
    logits_MV = product(hidden_MD, weight_VD.T)
    if bias_V is not None:
        logits_MV += bias_V
    return logits_MV.div_(temperature) if temperature != 1 else logits_MV


def score_tokens(logits_MV: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, entropy of each distribution, and log of the sum of exp(logits). Overwrites the logits."""
    peak_M1 = logits_MV.amax(-1, keepdim=True)
    weight_MV = logits_MV.sub_(peak_M1).exp()
    sum_M = weight_MV.sum(-1)
    logp_M = logits_MV.gather(-1, target_M[:, None])[:, 0] - sum_M.log()
    finite_MV = logits_MV.clamp_(min=torch.finfo(logits_MV.dtype).min)  # a token that cannot be said adds 0, not NaN
    entropy_M = sum_M.log() - torch.linalg.vecdot(weight_MV, finite_MV) / sum_M
    return logp_M, entropy_M, peak_M1[:, 0] + sum_M.log()


class Head(torch.autograd.Function):
    """(logp_M, entropy_M) from hidden states, weight, bias or None, targets, temperature, and bytes of logits at once.

    Forward goes through the tokens, a few with all of the vocabulary; backward through the vocabulary, a block with all of
    the tokens: so each row of the weight's gradient is one product, summed over all tokens before it is rounded. Logits are
    computed again for it. The entropy is a measurement and carries no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_M: Tensor, temperature: float,
        limit: int,
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        rows = max(1, limit // (4 * len(weight_VD)))
        once_VD = weight_VD if weight_VD.is_cuda else weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))
        parts = [
            score_tokens(scaled_logits(h, once_VD, bias_V, temperature), t)
            for h, t in zip(hidden_MD.split(rows), target_M.split(rows), strict=True)
        ]
        logp_M, entropy_M, logsum_M = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, target_M, logsum_M)
        ctx.temperature, ctx.limit = temperature, limit
        ctx.mark_non_differentiable(entropy_M)
        return logp_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """d logp / d logit = (1 if it is the target's, else 0) - probability, over the temperature."""
        hidden_MD, weight_VD, bias_V, target_M, logsum_M = ctx.saved_tensors
        slope_M = slopes[0] / ctx.temperature
        dhidden_MD, dweight_VD = torch.zeros_like(hidden_MD, dtype=slope_M.dtype), torch.empty_like(weight_VD)
        dbias_V = None if bias_V is None else torch.empty_like(bias_V)
        step = max(1, ctx.limit // (4 * len(target_M)))
        for first in range(0, len(weight_VD), step):
            block = slice(first, first + step)
            weight_CD, bias_C = weight_VD[block], None if bias_V is None else bias_V[block]
            d_MC = scaled_logits(hidden_MD, weight_CD, bias_C, ctx.temperature).sub_(logsum_M[:, None]).exp_()
            d_MC.mul_(-slope_M[:, None])
            here_M = (target_M >= first) & (target_M < first + step)
            place_M1 = (target_M - first).clamp(0, len(weight_CD) - 1)[:, None]
            d_MC.scatter_add_(1, place_M1, torch.where(here_M, slope_M, 0)[:, None])
            if dbias_V is not None:
                dbias_V[block] = d_MC.sum(0)
            d_MC = d_MC.to(weight_VD.dtype)
            dhidden_MD += product(d_MC, weight_CD)
            dweight_VD[block] = product(d_MC.T, hidden_MD)
        return dhidden_MD.to(hidden_MD.dtype), dweight_VD, dbias_V, None, None, None
