"""The fast paths of sampling and training against the clear ones: packed weights, recorded steps, compiled blocks."""

import gc
import shutil
import weakref
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from test_rollout import KEYS, PROMPTS, SETTINGS, TOKEN, again, assert_same
from tiny import tiny
from torch import nn

import rollout
from common.errors import UserError
from engine import cache, fast
from engine.cache import DecodeRows, doubled, largest
from engine.fast import Recording, can_pack, cuda_graphs, filled, packed_weights
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


@pytest.fixture
def made(monkeypatch):
    """The shapes of what each recorded step reads."""
    found, of = [], Recording.of.__func__

    def spy(cls, step, rows, capture):
        found.append([tuple(x.shape) for x in vars(rows).values()])
        return of(cls, step, rows, capture)

    monkeypatch.setattr(Recording, "of", classmethod(spy))
    return found


def test_a_step_is_recorded_once_a_shape(made, monkeypatch):
    """Two prompts of three answers of 14 tokens: the cache never moves. 6 rows, and with ROWS = 4 later 4: two recordings,
    whatever the number of steps, and inputs in the shapes that the cache has: 2 groups of 3; 64 random numbers per row."""
    monkeypatch.setattr(fast, "ROWS", 4)
    lengths = generate(tiny(), PROMPTS[:2], keys=KEYS[:2], record=again, **SETTINGS)
    assert len({len(c.ids) for group in lengths for c in group}) > 2
    assert made == [[(2, 3), (6,), (6,), (6,), (6,), (6,), (6, 64)], [(2, 3), (4,), (4,), (4,), (4,), (4,), (4, 64)]]


@pytest.fixture
def sizes(monkeypatch):
    """The capacities that the cache has had."""
    found, resize = [], cache.GroupCache.resize

    def spy(self, size):
        resize(self, size)
        found.extend([size] * (found[-1:] != [size]))

    monkeypatch.setattr(cache.GroupCache, "resize", spy)
    return found


def test_a_cache_of_recorded_steps_doubles(made, sizes, monkeypatch):
    """In steps of 1, an answer of 50 tokens, of which 49 are cached: places for 1, 2, 4, 8, 16, 32 and 50 tokens (64 are
    more than it can need), and as many recordings; without recordings 49 sizes. 4,096 tokens in steps of 64: seven, too."""
    monkeypatch.setattr(cache, "BUCKET", 1)
    settings = {"n": 1, "max_new_tokens": 50, "temperature": 1.0, "eos_ids": (), "keys": KEYS[:1]}
    recorded = generate(tiny(), PROMPTS[:1], record=again, **settings)
    assert sizes == [(1, 3, 1, T) for T in (1, 2, 4, 8, 16, 32, 50)]
    assert len(made) == 7
    sizes.clear()
    assert_same(generate(tiny(), PROMPTS[:1], **settings), recorded)
    assert sizes == [(1, 3, 1, T) for T in range(1, 50)]
    T, grown = 0, []
    while T < 4096:
        _, _, _, T = doubled((1, 64, 8, T), (1, 64, 8, T + 64), (1, 64, 8, 4096))
        grown.append(T)
    assert grown == [64, 128, 256, 512, 1024, 2048, 4096]


def test_over_the_budget_a_cache_grows_tightly_before_a_group_is_dropped(sizes, monkeypatch):
    """Two prompts of 3 tokens, one answer of 12 to each, 11 tokens of it cached: 6 + 22 = 28 tokens of capacity are needed,
    and are the budget. 8 doubled, at most 12, would be 6 + 24 = 30: from 8 on it grows one by one, and nobody is dropped."""
    monkeypatch.setattr(cache, "BUCKET", 1)
    settings = {"n": 1, "max_new_tokens": 12, "temperature": 1.0, "eos_ids": (), "keys": KEYS[:2]}
    generate(tiny(), [[1, 2, 3], [4, 5, 6]], kv_budget=28 * TOKEN, record=again, **settings)
    assert sizes == [(2, 3, 2, T) for T in (1, 2, 4, 8, 9, 10, 11)]


def test_doubling_by_hand():
    """Groups are enough; S doubles; rows are asked for at more than twice; T stops at the most that can be needed."""
    assert doubled((2, 64, 8, 192), (2, 128, 24, 256), (9, 640, 72, 320)) == (2, 128, 24, 320)
    assert doubled((0, 0, 0, 0), (1, 64, 8, 64), (9, 640, 72, 320)) == (1, 64, 8, 64)
    assert doubled((4, 64, 32, 64), (5, 64, 33, 64), (9, 640, 72, 320)) == (8, 64, 64, 64)


def test_the_largest_capacity_by_hand():
    """256 rows. 8 prompts, 8 answers: 8 groups of 64 rows. 1,000 prompts: 248 groups with one row left each let another one
    in: 249. One answer each: 256. 300 answers to a prompt: one group, and all of its rows."""
    assert largest(8, 8, 256, 65, 64) == (8, 128, 64, 64)
    assert largest(1000, 8, 256, 64, 100) == (249, 64, 256, 128)
    assert largest(1000, 1, 256, 64, 64) == (256, 64, 256, 64)
    assert largest(5, 300, 256, 64, 64) == (1, 64, 300, 64)


def test_a_batch_never_outgrows_the_largest_capacity(sizes, monkeypatch):
    """24 prompts of two answers, 4 rows: at most 3 groups (two with one row left let the third in), recorded or not."""
    monkeypatch.setattr(rollout, "MAX_ROWS", 4)
    prompts, keys = [[1, 2, 3]] * 24, [(0, 0, str(i)) for i in range(24)]
    for record in (None, again):
        generate(tiny(), prompts, keys=keys, record=record, **{**SETTINGS, "n": 2})
        assert max(sizes) == (3, 64, 4, 64) == largest(24, 2, 4, 3, 14)
        sizes.clear()


def test_filling_by_hand():
    """Two rows of one group to three of two groups with places for three: the third is row 0 of group 0 at the beginning."""
    two, numbers = torch.tensor([1, 2]), torch.tensor([[0.5], [0.25]])
    rows = filled(DecodeRows(torch.tensor([[1, 0]]), two, two, two, two, two, numbers), 3, 2, 3)
    assert rows.row_PG.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert rows.ids_R.tolist() == rows.length_R.tolist() == [1, 2, 0]
    assert rows.uniform_RA.tolist() == [[0.5], [0.25], [0.0]]


class FakeCuda:
    """`torch.cuda` where there is none: graphs that keep the pool and the mode they were given, streams that do nothing."""

    def __init__(self, monkeypatch):
        self.pools, self.modes, self.alive, self.handles = [], [], weakref.WeakSet(), iter(range(9))
        fake = {"CUDAGraph": self.made, "graph": self.graph, "graph_pool_handle": lambda: (0, next(self.handles))}
        for name in ("Stream", "current_stream", "stream"):
            fake[name] = MagicMock()
        for name, what in fake.items():
            monkeypatch.setattr(torch.cuda, name, what)

    def made(self):
        graph = MagicMock()
        self.alive.add(graph)
        return graph

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.pools.append(pool)
        self.modes.append(capture_error_mode)
        assert len(self.alive) > 1 or len(self.pools) == 1  # CUDA does not go on with a pool whose graphs are all gone
        yield


def test_graphs_of_a_call_share_one_pool(monkeypatch):
    """The memory of a step is there once and not once per shape. Other calls have pools of their own. Other threads may go
    on using the device, and while a graph is recorded one of an earlier capacity is still there to keep the pool."""
    fake = FakeCuda(monkeypatch)
    record = cuda_graphs()
    for _ in range(3):
        assert record(lambda: "drawn")[1] == "drawn"
        gc.collect()
    cuda_graphs()(lambda: None)
    assert fake.pools == [(0, 0), (0, 0), (0, 0), (0, 1)]
    assert set(fake.modes) == {"thread_local"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same_answers():
    lm = tiny().cuda()
    plain = generate(lm, PROMPTS, keys=KEYS, **SETTINGS)
    assert_same(generate(lm, PROMPTS, keys=KEYS, record=cuda_graphs(), **SETTINGS), plain)


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
