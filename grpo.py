"""Equations 8-14 of SELF-EMO (arXiv:2604.18003v1) and the k3 KL of its Table 12, as pure functions.

Read it beside section 3.3. A prediction is the emotions that an answer recognises, with weights; a label is gold, what the
dataset says; a group is the n answers to one prompt. The rule (D8) is the form that an answer must have to count.
Nothing here knows a model, a tokenizer, a rank or a config, and no argument is changed.
Everything up to the advantages is computed with Python floats and `math.fsum`, whose results depend neither on the
order of the terms nor on the machine: an audit may compare them exactly.

Shapes: P prompts, G answers to each (the paper's n), B = P * G answers prompt-major, T tokens of an answer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Prediction = Mapping[str, float]
Level = Literal["token", "sequence"]
RULE_BONUS = 0.1  # Eq. (8): what an answer that follows the rule earns beside its IOU
CORE_SIZE = 3  # Eqs. (11), (12): emotions in the core, and always the divisor of the consistency
STD_EPS = 1e-6  # D5: added to both standard deviations
LOG_RATIO_MAX = 20.0  # as in VeRL, which the paper trains with: no log-ratio enters exp() beyond this
K3_MAX = 10.0  # as in VeRL: the most that one token adds to the KL


def normalised(weights: Prediction) -> dict[str, float]:
    """Shares that sum to 1 (Eq. 9). Raises ValueError for no weight or one that is not positive and finite."""
    values = weights.values()
    if not weights or min(values) <= 0 or not math.isfinite(sum(values)):
        raise ValueError(f"emotion weights must be positive, finite and at least one: {dict(weights)!r}")
    total = math.fsum(values)
    # Eq. (9): w^_e = w_e / sum_e' w_e'
    return {emotion: weight / total for emotion, weight in weights.items()}


def iou(prediction: Prediction, label: Prediction) -> float:
    """Intersection over union (IOU) of two weighted emotion sets, in [0, 1], 1 for equal shares (Eqs. 9, 10).

    Weights are raw: only their shares count. With the total variation distance TV of the shares it is (1-TV)/(1+TV).
    Raises ValueError where one side is empty or has a weight that is not positive and finite.
    """
    p, q = normalised(prediction), normalised(label)
    pairs = [(p.get(emotion, 0.0), q.get(emotion, 0.0)) for emotion in p.keys() | q.keys()]
    # Eq. (10): IOU(P, L) = sum_e min(p_e, l_e) / sum_e max(p_e, l_e), e in the union
    return math.fsum(map(min, pairs)) / math.fsum(map(max, pairs))


def reward(prediction: Prediction | None, label: Prediction) -> float:
    """First reward r of an answer, in [0, 1.1]; a prediction of None means that the rule failed (Eq. 8)."""
    # Eq. (8): R = 0 if rule = 0, else IOU(P, L) + 0.1
    return 0.0 if prediction is None else iou(prediction, label) + RULE_BONUS


def core_emotions(predictions: Sequence[Prediction | None], k: int = CORE_SIZE) -> dict[str, float]:
    """Core distribution p* of a group: its k heaviest emotions, heaviest first, shares that sum to 1 (Eq. 11).

    Every answer has the same say: its weights are normalised first (Eq. 9), failed ones (None) do not count.
    Ties go to the emotion that more answers name, then to the alphabet. {} when every answer failed.
    """
    votes: dict[str, list[float]] = {}
    for prediction in predictions:
        if prediction is not None:
            for emotion, share in normalised(prediction).items():
                votes.setdefault(emotion, []).append(share)
    mass = {emotion: math.fsum(shares) for emotion, shares in votes.items()}
    top = sorted(mass, key=lambda emotion: (-mass[emotion], -len(votes[emotion]), emotion))[:k]
    # Eq. (11): p*(e) = p~(e) / sum of p~ over the top k; the divisor inside p~ cancels
    total = math.fsum(mass[emotion] for emotion in top)
    return {emotion: mass[emotion] / total for emotion in top}


def consistency(predictions: Sequence[Prediction | None]) -> list[float]:
    """Second reward r2 of every answer of a group: how many core emotions it names, over 3; None earns 0 (Eq. 12)."""
    core = core_emotions(predictions)
    # Eq. (12): r2_i = 1/3 sum over core e of [e in Prediction_i]; over 3 also where the core is smaller
    return [sum(emotion in (prediction or {}) for emotion in core) / CORE_SIZE for prediction in predictions]


def lam(t: int, T: int) -> float:
    """Weight of the second reward at step t = 0..T-1 of T (Eq. 13, D7). Raises ValueError for a step outside."""
    if not 0 <= t < T:
        raise ValueError(f"step {t} is not one of 0..{T - 1}")
    # Eq. (13), left: lambda = t / T
    return t / T


def _z_scores(values: Sequence[float]) -> list[float]:
    n = len(values)
    if n < 2:
        raise ValueError("a group needs at least 2 answers: with one there is nothing to compare it with")
    if min(values) == max(values):
        return [0.0] * n  # D5: the rounded mean of equal values may miss them by a bit, which 1e-6 would blow up
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return [(value - mean) / (std + STD_EPS) for value in values]


def advantages(
    rewards_PG: Tensor | Sequence[Sequence[float]], consistencies_PG: Tensor | Sequence[Sequence[float]], lam: float
) -> Tensor:
    """Advantage of every answer within its own group: Tensor[P, G], float64 (Eq. 13, D5).

    Sample standard deviation (n - 1) + 1e-6 in both terms; a group of equal values adds exactly 0.
    Raises ValueError for fewer than 2 answers per group and for two inputs of different shape.
    """
    rows = []
    both = zip(_rows(rewards_PG), _rows(consistencies_PG), strict=True)
    for r, r2 in both:
        # Eq. (13), right: A_i = (r_i - mu_r) / sigma_r + lambda (r2_i - mu_r2) / sigma_r2
        rows.append([z + lam * z2 for z, z2 in zip(_z_scores(r), _z_scores(r2), strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _rows(values_PG: Tensor | Sequence[Sequence[float]]) -> list[list[float]]:
    return values_PG.tolist() if isinstance(values_PG, Tensor) else [list(row) for row in values_PG]


def token_weights(lengths: Sequence[int], loss_mean: Level, T: int) -> Tensor:
    """Weight of every token of a whole optimiser mini-batch, all ranks together: Tensor[B, T] float64, sum 1 (D3).

    `lengths` are the tokens of each answer; beyond them the weight is 0. `token`: every token the same. `sequence`:
    every answer the same, which is Eq. (14)'s 1/n. Cut micro-batches and ranks out of it by rows: their losses add up.
    Raises ValueError for an answer of no token or of more than T.
    """
    if not lengths or min(lengths) < 1 or max(lengths) > T:
        raise ValueError(f"every answer needs 1 to {T} tokens: {list(lengths)}")
    length_B = torch.tensor(lengths, dtype=torch.float64)
    share_B = length_B if loss_mean == "token" else torch.ones_like(length_B)
    on_BT = torch.arange(T) < length_B[:, None]
    return on_BT * (share_B / share_B.sum() / length_B)[:, None]


def policy_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, adv_B: Tensor, weight_BT: Tensor, *, clip_eps: float, ratio: Level = "token"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss, to be minimised: minus Eq. (14) (D1, D2, D4). It only sums: (loss, metrics).

    `weight_BT` (see `token_weights`) is 0 off the answer, where log-probs may be anything, and sums to 1 over the
    mini-batch on all ranks. `ratio`: one ratio per token, or one per sequence: exp of the summed log-ratio, which all
    tokens of an answer share. Clipping stops gain, not blame: an advantage < 0 with a ratio > 1 + eps keeps its gradient.
    Log-ratios are cut at +-20 before exp(), so that a clipped gain has gradient 0 and never 0 * inf.

    Metrics, detached: `ratio/mean` and `clip_frac` (weight whose gain is clipped) are sums over weight_BT, so parts of
    a mini-batch add up; of `ratio/max` take the maximum. With ratio="sequence" they speak of sequence ratios: each
    answer then counts with the weight of all its tokens.
    """
    on_BT = weight_BT != 0
    # Masked before the first operation: masked later, garbage would come back as 0 * nan in the gradient.
    log_ratio_BT = logp_BT.where(on_BT, 0.0) - old_logp_BT.detach().where(on_BT, 0.0)
    if ratio == "sequence":
        # Eq. (14), right: rho_i = pi(y_i | x) / pi_old(y_i | x), the product over the tokens
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(weight_BT)
    elif ratio != "token":
        raise ValueError(f"ratio must be token or sequence, not {ratio!r}")
    ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    adv_B1, weight_BT = adv_B.to(ratio_BT.dtype)[:, None], weight_BT.to(ratio_BT.dtype)
    free_BT, clipped_BT = ratio_BT * adv_B1, ratio_BT.clamp(1 - clip_eps, 1 + clip_eps) * adv_B1
    # Eq. (14), left: 1/n sum_i min(rho_i A_i, clip(rho_i, 1-eps, 1+eps) A_i), here negated (D1); 1/n sits in weight_BT
    loss = -(weight_BT * torch.minimum(free_BT, clipped_BT)).sum()
    seen_BT = ratio_BT.detach()
    metrics = {
        "ratio/mean": (weight_BT * seen_BT).sum(),
        "ratio/max": seen_BT.where(on_BT, 0.0).max(),
        "clip_frac": (weight_BT * (clipped_BT < free_BT)).sum().detach(),
    }
    return loss, metrics


def low_var_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, any shape, in [0, 10]; Table 12's `low_var_kl`.

    Its input is cut at +-20 and its output at 10; where either cuts, the gradient is 0.
    """
    d = (ref_logp.detach() - logp).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    # k3: e^d - d - 1 with d = log(ref / policy)
    return (d.exp() - d - 1).clamp(max=K3_MAX)


def clamped_share(logp: Tensor, ref_logp: Tensor, weight: Tensor) -> Tensor:
    """Share of the weight whose `low_var_kl` is cut, and so without gradient. Adds up over parts of a mini-batch."""
    cut = low_var_kl(logp.detach(), ref_logp) >= K3_MAX
    return (weight * cut).sum()
