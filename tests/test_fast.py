"""The fast paths of sampling and training against the clear ones: packed weights, recorded steps, compiled blocks."""

import shutil

import pytest
import torch
from test_rollout import KEYS, PROMPTS, SETTINGS, TOKEN, assert_same
from tiny import tiny
from torch import nn

from common.errors import UserError
from engine import cache, fast
from engine.fast import RecordedSteps, can_pack, cuda_graph, filled, packed_weights
from engine.fsdp import compile_blocks
from minimal import generate_naive
from model import Group, Policy
from rollout import generate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def packed(monkeypatch, dtype):
    """Small weights are packed as well; skip where this CPU has no products of oneDNN in that type."""
    monkeypatch.setattr(fast, "PACKED", 1)
    if not can_pack(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip(f"oneDNN has no products in {dtype} here")


def again(compute):
    """What a CUDA graph does, on a CPU: fixed places are read, one place is written, nothing is returned."""
    out = compute().clone()

    def replay():
        out.copy_(compute())

    return replay, out


# Packed weights


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_a_packed_layer_gives_what_the_layer_gives(rows, dtype, packed):
    """Sums of 96 products of order 1, added up in float32 and rounded once: 24 or 8 bits of the result."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, dtype=dtype)
    x = torch.randn(1, rows, 96, dtype=dtype)
    plain = layer(x)
    with packed_weights(layer), torch.no_grad():
        found = layer(x)
    assert found.shape == (1, rows, 40)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    bits = {torch.float32: 2**-20, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=bits, atol=bits)
    assert plain.dtype == found.dtype


@DTYPES
def test_layers_are_packed_for_the_length_of_a_call(dtype, packed):
    """Also one that ends with an error; without a call every layer is the one that transformers made."""
    lm = tiny().to(dtype)
    layers = [m for m in lm.modules() if isinstance(m, nn.Linear)]
    with packed_weights(lm):
        assert all("forward" in vars(layer) for layer in layers)
        with packed_weights(lm):
            pass
        assert all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(ZeroDivisionError), packed_weights(lm):
        1 / 0  # noqa: B018
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(UserError):
        generate(lm, PROMPTS, keys=KEYS, kv_budget=1, **SETTINGS)
    assert not any("forward" in vars(layer) for layer in layers)


@DTYPES
def test_new_weights_are_packed_anew(dtype, packed):
    """A stale copy would answer as before the update."""
    lm = tiny().to(dtype)
    settings = {**SETTINGS, "keys": KEYS, "temperature": 0.0, "n": 1}
    before = generate(lm, PROMPTS, **settings)
    with torch.no_grad():
        for layer in (m for m in lm.modules() if isinstance(m, nn.Linear)):
            layer.weight.copy_(layer.weight.roll(1, 0))
    assert generate(lm, PROMPTS, **settings) != before


@DTYPES
def test_packed_rollouts_stay_near_the_policy(dtype, packed):
    """The gap that every step logs: mean |rollout - policy| over tokens, bf16 below .05 nats, float32 below 1e-5."""
    policy = Policy(tiny(initializer_range=0.1).to(dtype))
    groups = generate(policy, PROMPTS, keys=KEYS, **SETTINGS)
    logp_BT = policy([Group(p, [c.ids for c in group]) for p, group in zip(PROMPTS, groups, strict=True)])[0]
    rows = zip(logp_BT.tolist(), [c for group in groups for c in group], strict=True)
    gaps = [abs(a - b) for row, c in rows for a, b in zip(c.logprobs, row, strict=False)]
    assert sum(gaps) / len(gaps) < {torch.bfloat16: 0.05, torch.float32: 1e-5}[dtype]


def test_small_weights_and_float64_stay_as_they_are():
    """100,000 elements in float32 are packed, 99,999 are not; in float64 there is nothing to pack with."""
    assert can_pack(torch.zeros(100, 1000))
    assert not can_pack(torch.zeros(99_999, 1))
    assert not can_pack(torch.zeros(200, 1000, dtype=torch.float64))
    lm = tiny()
    with packed_weights(lm):
        assert not any("forward" in vars(m) for m in lm.modules() if isinstance(m, nn.Linear))


# Recorded steps


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_recorded_steps_give_the_naive_answers(rows, temperature, monkeypatch):
    """Rows are filled up to a multiple of 1, 4 or 16, or to the 21 that the cache holds; finished rows make place."""
    monkeypatch.setattr(fast, "ROWS", rows)
    policy = Policy(tiny())
    settings = {**SETTINGS, "keys": KEYS, "temperature": temperature}
    assert_same(generate(policy, PROMPTS, record=again, **settings), generate_naive(policy, PROMPTS, **settings))


@pytest.mark.parametrize("tokens", [60, 120])
def test_recordings_end_with_the_tensors_they_read(tokens, monkeypatch):
    """The cache grows by 4 tokens, and groups are dropped for want of room: an old recording would read old keys."""
    monkeypatch.setattr(cache, "BUCKET", 4)
    policy = Policy(tiny())
    settings = {**SETTINGS, "keys": KEYS}
    recorded = generate(policy, PROMPTS, kv_budget=TOKEN * tokens, record=again, **settings)
    assert_same(recorded, generate_naive(policy, PROMPTS, **settings))


def test_a_step_is_recorded_once_a_shape(monkeypatch):
    """Two prompts of three answers of 14 tokens: the cache never moves. 6 rows, and with ROWS = 4 later 4: two recordings,
    whatever the number of steps, and inputs in the shapes that the cache has: 64 + 64 tokens, 2 groups of 3."""
    monkeypatch.setattr(fast, "ROWS", 4)
    made, new = [], RecordedSteps.new

    def spy(steps, inputs):
        made.append([tuple(x.shape) for x in inputs])
        return new(steps, inputs)

    monkeypatch.setattr(RecordedSteps, "new", spy)
    lengths = generate(tiny(), PROMPTS[:2], keys=KEYS[:2], record=again, **SETTINGS)
    assert len({len(c.ids) for group in lengths for c in group}) > 2
    assert made == [
        [(6,), (6,), (2, 3), (6,), (6,), (6,), (6, 1, 1, 128)],
        [(4,), (4,), (2, 3), (4,), (4,), (4,), (4, 1, 1, 128)],
    ]


def test_filling_by_hand():
    x = torch.tensor([[1, 2], [3, 4]])
    assert filled(x, (3, 4)).tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0]]
    assert filled(x, (2, 2)).tolist() == [[1, 2], [3, 4]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same_answers():
    lm = tiny().cuda()
    plain = generate(lm, PROMPTS, keys=KEYS, **SETTINGS)
    assert_same(generate(lm, PROMPTS, keys=KEYS, record=cuda_graph, **SETTINGS), plain)


# Compiled blocks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_give_the_same_losses_and_gradients():
    """In float64. One block, one batch: the compiler takes most of the time."""
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7], [[8, 9, 10], [11, 12]])]
    found = []
    for compiled in (False, True):
        policy = Policy(tiny(num_hidden_layers=1))
        if compiled:
            compile_blocks(policy)
        logp_BT = policy(groups)[0]
        logp_BT.sum().backward()
        found.append((logp_BT, [p.grad for p in policy.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
