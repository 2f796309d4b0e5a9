"""Eq. 14, the clipped loss, and the k3 estimate of the KL."""

import math

import pytest
import torch
from pytest import approx
from torch import Tensor

from grpo import low_var_kl, policy_loss

exercise = pytest.mark.exercise

# Answer 0 has two tokens and A = +2, answer 1 has one token and A = -1; the last place is padding, where anything may stand.
RATIOS = ((math.exp(0.5), 0.5), (1.5, math.nan))  # 1.648721, .5 | 1.5
THIRD = 1 / 3


def tensor(rows: object) -> Tensor:
    """Numbers in float64."""
    return torch.tensor(rows, dtype=torch.float64)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New log-probs, old ones, advantages, weights."""
    logp_BT = tensor([[math.log(x) for x in row] for row in RATIOS]).requires_grad_()
    return logp_BT, tensor([[0.0, 0.0], [0.0, 0.0]]), tensor([2.0, -1.0]), tensor([[THIRD, THIRD], [THIRD, 0.0]])


@exercise("grpo.policy_loss")
def test_one_ratio_per_token() -> None:
    """Products: min(3.297443, 1.2 * 2) = 2.4; min(1, .8 * 2) = 1; min(-1.5, -1.2) = -1.5. Together 1.9; -1.9/3."""
    loss, _ = policy_loss(*inputs(), clip_eps=0.2)
    assert not math.isnan(loss.item()), (
        "the loss is nan: where the weight is 0 there is no token, and its log-prob may be anything. Mask it before you "
        "subtract, because 0 * nan is nan"
    )
    assert loss.item() == approx(-1.9 / 3, abs=1e-6), (
        "the smaller products are 2.4 (clipped), 1 and -1.5, so the objective is 1.9/3 and the loss is minus that (D1). "
        "If you got -.733333 you clipped the blame too: the minimum of -1.5 and -1.2 is -1.5"
    )


@exercise("grpo.policy_loss")
def test_the_gradient() -> None:
    """Clipped: 0. Else -weight * A * ratio: -(1/3) * 2 * .5 = -1/3, and -(1/3) * -1 * 1.5 = +.5. Padding: 0."""
    logp_BT, old_BT, adv_B, weight_BT = inputs()
    old_BT = old_BT.requires_grad_()
    policy_loss(logp_BT, old_BT, adv_B, weight_BT, clip_eps=0.2)[0].backward()
    assert logp_BT.grad is not None, "the loss must keep its gradient in the new log-probs"
    assert logp_BT.grad.flatten().tolist() == approx([0, -1 / 3, 0.5, 0]), (
        "the slope is -weight * A * ratio, and 0 where the clipped product is the smaller one and on padding. "
        "Clipping stops gain, not blame: the token with ratio 1.5 and A = -1 keeps its slope"
    )
    assert old_BT.grad is None, "old log-probs are numbers, not something to learn: detach them"


@exercise("grpo.policy_loss")
def test_one_ratio_per_sequence() -> None:
    """Answer 0: e^.5 * .5 = .824361 for both of its tokens, inside .8 to 1.2. (2 * 2 * .824361 - 1.5)/3 = .599148."""
    loss, _ = policy_loss(*inputs(), clip_eps=0.2, ratio="sequence")
    assert loss.item() == approx(-0.599148, abs=1e-6), (
        "one ratio per sequence is the product of its tokens' ratios, e^.5 * .5 = .824361, and both tokens share it"
    )
    try:
        policy_loss(*inputs(), clip_eps=0.2, ratio="word")  # type: ignore[arg-type]
    except ValueError:
        return
    pytest.fail("a ratio that is neither token nor sequence: raise ValueError")


@exercise("grpo.policy_loss")
def test_what_is_logged() -> None:
    """(1.648721 + .5 + 1.5)/3 = 1.216240; the largest is 1.648721; one third of the weight is clipped."""
    _, metrics = policy_loss(*inputs(), clip_eps=0.2)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == approx({"ratio/mean": 1.216240, "ratio/max": 1.648721, "clip_frac": THIRD}, abs=1e-6), (
        "three metrics: the weighted mean of the ratios, the largest one (padding left out), and the weight whose clipped "
        "product is smaller than the free one"
    )


@exercise("grpo.low_var_kl")
def test_e_to_the_d_minus_d_minus_1() -> None:
    """d = log(reference) - log(policy). d = .2: 1.221403 - 1.2. d = -1: .367879 + 1 - 1. d = 0: 0."""
    found = low_var_kl(tensor([-1.2, 0.0, -0.7]), tensor([-1.0, -1.0, -0.7]))
    assert found.tolist() == approx([0.021403, 0.367879, 0.0], abs=1e-6), (
        "k3 = e^d - d - 1 with d = reference - policy. If you got .018731 for the first one, d has the wrong sign"
    )


@exercise("grpo.low_var_kl")
def test_its_gradient_and_its_limit() -> None:
    """The slope in the policy's log-prob is 1 - e^d: d = .2 gives -.221403. d = 5 is 142.4, cut to 10, without a slope."""
    logp, reference = tensor([-1.2, -6.0]).requires_grad_(), tensor([-1.0, -1.0]).requires_grad_()
    found = low_var_kl(logp, reference)
    assert found.tolist() == approx([0.021403, 10.0], abs=1e-6), "K3_MAX: no token adds more than 10"
    found.sum().backward()
    assert logp.grad is not None, "the KL must keep its gradient in the policy's log-probs"
    assert logp.grad.tolist() == approx([-0.221403, 0.0], abs=1e-6), "the slope is 1 - e^d, and 0 where the value is cut"
    assert reference.grad is None, "the reference is frozen: detach it"
    assert math.isfinite(low_var_kl(tensor(-900.0), tensor(-1.0)).item()), "cut d at +-LOG_RATIO_MAX before e^d overflows"
