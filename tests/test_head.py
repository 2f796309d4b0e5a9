"""The head: log-probs in blocks against plain autograd, in float64 to 1e-12; in bf16 within what one rounding leaves."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from common import head
from common.head import Head, product, score_tokens
from engine import fast
from engine.fast import float32_logits


def plain(hidden_MD, weight_VD, bias_V, target_M, temperature):
    """Log-probs and entropies, all logits at once, every gradient autograd's."""
    logp_MV = (F.linear(hidden_MD, weight_VD, bias_V) / temperature).log_softmax(-1)
    return logp_MV.gather(-1, target_M[:, None])[:, 0], -(logp_MV.exp() * logp_MV).sum(-1)


def numbers(M, V, D, dtype=torch.float64):
    """Hidden states, weights of logits some 2 nats apart, bias, targets, and what the log-probs are multiplied with."""
    torch.manual_seed(0)
    hidden_MD, weight_VD, bias_V = torch.randn(M, D), 2 * torch.randn(V, D) / D**0.5, torch.randn(V)
    given = [x.to(dtype).requires_grad_() for x in (hidden_MD, weight_VD, bias_V)]
    return *given, torch.randint(V, (M,)), torch.randn(M, dtype=torch.float64)


def with_gradients(scored, given, slope_M):
    logp_M, entropy_M = scored
    return logp_M, entropy_M, *torch.autograd.grad((logp_M * slope_M.to(logp_M.dtype)).sum(), given)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("limit", [1, 1200, 10**9])
def test_blocks_equal_plain_autograd(limit, biased, temperature):
    """23 tokens of 97: a token and a word at a time, 3 tokens and 13 words at a time (4 bytes a logit), all at once."""
    hidden_MD, weight_VD, bias_V, target_M, slope_M = numbers(23, 97, 8)
    given = (hidden_MD, weight_VD, *([bias_V] if biased else []))
    ours = Head.apply(hidden_MD, weight_VD, bias_V if biased else None, target_M, temperature, limit)
    theirs = plain(hidden_MD, weight_VD, bias_V if biased else None, target_M, temperature)
    assert not ours[1].requires_grad  # a measurement
    ours, theirs = (with_gradients(scored, given, slope_M) for scored in (ours, theirs))
    assert min(g.abs().max() for g in theirs[2:]) > 0.1  # there is something to compare
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_never_more_logits_than_the_limit(monkeypatch):
    """1,200 bytes: forward 3 rows of 97 words, 1,164 bytes; backward 13 words of 23 rows, 1,196 bytes."""
    made, whole = [], head.scaled_logits
    monkeypatch.setattr(head, "scaled_logits", lambda *args: made.append(whole(*args)) or whole(*args))
    hidden_MD, weight_VD, _, target_M, slope_M = numbers(23, 97, 8)
    scored = Head.apply(hidden_MD, weight_VD, None, target_M, 1.0, 1200)
    assert [tuple(x.shape) for x in made] == [(3, 97)] * 7 + [(2, 97)]
    with_gradients(scored, (hidden_MD,), slope_M)
    assert [tuple(x.shape) for x in made[8:]] == [(23, 13)] * 7 + [(23, 6)]


def test_a_token_that_cannot_be_said_adds_nothing_to_the_entropy():
    """Logits 0, -inf, 1: probabilities .268941, 0, .731059; entropy .268941 * 1.313262 + .731059 * .313262 = .582203; log of
    the sum of exponentials ln 3.718282 = 1.313262."""
    logits_MV = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    found = [x.item() for x in score_tokens(logits_MV, torch.tensor([2]))]
    assert found == pytest.approx([-0.313262, 0.582203, 1.313262], abs=1e-6)


def off(found, exact):
    """Root mean square of the error over that of the exact numbers."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_bf16_is_rounded_once():
    """1,192 tokens in 149 chunks, as 16,384 tokens of a vocabulary of 151,936 are. Summed chunk by chunk in bf16, the
    weight's gradient was 1.4 % off; one rounding leaves .17 %, that of the logits' gradient as much. Logits that leave the
    head in bf16 put log-probs 3e-3 nats off on average."""
    hidden_MD, weight_VD, bias_V, target_M, slope_M = numbers(149 * 8, 97, 32, torch.bfloat16)
    given = (hidden_MD, weight_VD, bias_V)
    exact_given = [x.detach().double().requires_grad_() for x in given]
    exact = with_gradients(plain(*exact_given, target_M, 1.0), exact_given, slope_M)
    found = with_gradients(Head.apply(*given, target_M, 1.0, 8 * 97 * 4), given, slope_M)
    assert [x.dtype for x in found] == [torch.float32] * 2 + [torch.bfloat16] * 3
    assert (found[0] - exact[0]).abs().mean() < 1e-5
    assert (found[1] - exact[1]).abs().max() < 1e-5
    assert 1e-3 < off(found[3], exact[3]) < 3e-3  # weight
    assert off(found[2], exact[2]) < 3e-3 and off(found[4], exact[4]) < 3e-3  # hidden states, bias


def test_products_of_bf16_are_float32():
    """512 products of order 1, prompts by heads: 2^-20 of the sum, where bf16 keeps 2^-8."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 512).bfloat16(), torch.randn(2, 3, 7, 512).bfloat16()
    found = product(a, b.transpose(-1, -2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double().transpose(-1, -2), rtol=2**-20, atol=1e-4)
    assert product(a.double(), b.double().transpose(-1, -2)).dtype == torch.float64


def test_products_on_a_gpu_by_shapes_alone():
    """Fake tensors know the rules of the kernel that is asked for, and hold no numbers."""
    with FakeTensorMode():
        sizes = ((2, 3, 5, 8), (2, 3, 8, 7), (5, 8), (8, 7))
        a, b, c, d = (torch.empty(size, dtype=torch.bfloat16, device="cuda:0") for size in sizes)
        heads, rows = product(a, b), product(c, d)
        assert (heads.shape, rows.shape) == ((2, 3, 5, 7), (5, 7))
        assert heads.dtype == rows.dtype == torch.float32


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_samplers_logits_leave_the_head_in_float32(biased, packed, monkeypatch):
    """For the length of a call; float64's products of the same bf16 numbers agree to 1e-5."""
    monkeypatch.setattr(fast, "PACKED", 1 if packed else 10**9)
    lm = tiny().bfloat16()
    lm.lm_head.bias = torch.nn.Parameter(torch.randn(97).bfloat16()) if biased else None
    hidden_MD = torch.randn(5, 32).bfloat16()
    bias_V = lm.lm_head.bias.double() if biased else None
    exact = F.linear(hidden_MD.double(), lm.lm_head.weight.double(), bias_V)
    with torch.no_grad(), float32_logits(lm):
        found = lm.lm_head(hidden_MD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert lm.lm_head(hidden_MD).dtype == torch.bfloat16
