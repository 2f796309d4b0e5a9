"""Cascade attention against plain rows, against GroupLayout and against itself on a GPU.

On a CPU all in float64, so that equal means equal to 1e-12; PyTorch's own kernels are played by the plain ones behind the
real signatures. What needs a GPU is skipped without one, and says so.
"""

import importlib.machinery
import itertools
import math
import sys
import types
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import GROUPS, separate, weights_B6
from test_plan import saved_for_backward
from test_ranks import finish, in_float64, start
from tiny import exact_norms, gradients, tiny, tokenizer, with_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import LlamaConfig

from engine import cascade, fsdp, processes
from engine.cascade import FLASH_ATTN, PLAIN, TORCH, CascadeLayout, Segments, kernels_for, layout_for
from model import Group, GroupLayout, Policy, pack
from tools import checks
from tools.checks import attends, errors, qkv, solved
from training.export import export
from training.plan import Place, kept_bytes

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 1e-12}
PAPER = LlamaConfig(head_dim=128)
# Prompts of 3, 1 and 9 tokens with answers of 2, 4 | 1, 1, 1 | 5: 13 + 14 = 27 tokens.
SHAPE = ([3, 1, 9], [[2, 4], [1, 1, 1], [5]])
SHAPES = {
    "unequal": SHAPE,
    "one token each": ([1, 1], [[1], [1, 1]]),
    "one answer": ([4], [[3]]),
    "one group": ([6], [[2, 7, 1]]),
    "longer than the prompt": ([2, 1], [[9], [3, 12]]),
}


def plain_rows(shape):
    """Every prompt, and every answer behind its prompt, as one causal row by itself; gathered from the stream."""
    prompts, answers = shape

    def attend(layer, q, k, v, scale):
        def row(places):
            one = [x[places].transpose(0, 1)[None] for x in (q, k, v)]
            return scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

        starts, at, parts, answered = itertools.accumulate(prompts, initial=0), sum(prompts), [], []
        for first, length, group in zip(starts, prompts, answers, strict=False):
            prompt = list(range(first, first + length))
            parts.append(row(prompt))
            for own in group:
                answered.append(row([*prompt, *range(at, at + own)])[length:])
                at += own
        return torch.cat([*parts, *answered])

    return attend


def assert_same(found, expected, **tolerance):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(ours, theirs, **(tolerance or EXACT), msg=lambda text, name=name: f"{name}: {text}")


# Equality


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cascade_equals_plain_rows_and_group_layout(shape, K):
    """Output and all gradients; 1, 2 and 4 query heads share a key/value head."""
    found = solved(attends(shape), shape, K=K)
    assert_same(found, solved(plain_rows(shape), shape, K=K))
    assert_same(found, solved(GroupLayout.of(*shape, CPU).attend, shape, K=K))
    assert min(x.abs().max() for x in found[2:]) > 0.1  # there is something to compare


def test_scores_that_are_large():
    """8 times the scale. Then scores beyond 709, where exp alone overflows; gradients there are 20 times as large."""
    for scale, atol in ((2.8, 1e-12), (100.0, 1e-11)):
        found = solved(attends(SHAPE), SHAPE, scale=scale)
        assert_same(found, solved(plain_rows(SHAPE), SHAPE, scale=scale), rtol=0, atol=atol)


lengths = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=4), st.integers(0, 99))
def test_any_groups_are_equal(groups, seed):
    shape = ([prompt for prompt, _ in groups], [answers for _, answers in groups])
    found = solved(attends(shape), shape, seed=seed)
    assert_same(found, solved(GroupLayout.of(*shape, CPU).attend, shape, seed=seed))
    assert_same(found, solved(plain_rows(shape), shape, seed=seed))


def test_a_merge_in_pieces_is_the_merge(monkeypatch):
    """14 answer tokens merged 4 at a time: 4, 4, 4, 2."""
    expected = solved(attends(SHAPE), SHAPE)
    monkeypatch.setattr(cascade, "ROWS", 4)
    assert_same(solved(attends(SHAPE), SHAPE), expected)


def test_gradients_are_those_of_small_changes():
    shape = ([2, 1], [[2, 1], [1]])
    inputs, _ = qkv(shape, H=2, K=1, D=3)
    assert torch.autograd.gradcheck(lambda q, k, v: attends(shape)(0, q, k, v, 0.7), inputs)


def test_the_merge_by_hand():
    """One head of width 1, scale 1, all keys 0 but the prompt's second, ln 2. The answer token, query 1, weighs the prompt's
    values 4 and 8 by 1 and 2, its own value 16 by 1: (4 + 16 + 16) / 4 = 9. The share of a value's gradient is its weight:
    1/4, 2/4, 1/4. d out / d key_j = weight_j (value_j - 9): -5/4, -1/2, 7/4; d out / d query = -1/2 ln 2 = -.346574."""
    rows = [0.0, 0.0, 1.0], [0.0, math.log(2), 0.0], [4.0, 8.0, 16.0]
    q, k, v = (torch.tensor(row, dtype=torch.float64)[:, None, None].requires_grad_() for row in rows)
    out = attends(([2], [[1]]))(0, q, k, v, 1.0)
    dq, dk, dv = torch.autograd.grad(out[2].sum(), (q, k, v))
    assert out.flatten().tolist() == pytest.approx([4, 6, 9], abs=1e-6)
    assert dv.flatten().tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)
    assert dk.flatten().tolist() == pytest.approx([-1.25, -0.5, 1.75], abs=1e-6)
    assert dq.flatten().tolist() == pytest.approx([0, 0, -0.3465736], abs=1e-6)


class Alone(torch.autograd.Function):
    """One call as flash-attn and PyTorch offer it: what comes back for lse is dropped without a word."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        out, lse = PLAIN.forward(q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = segments, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *PLAIN.backward(dout, *ctx.saved_tensors, *ctx.rest), None, None


def test_a_merge_that_is_left_to_autograd_would_be_seen():
    """It has the right output and the right dv; dq and dk are wrong by as much as their own size."""
    layout = CascadeLayout.of(PLAIN, *SHAPE, CPU)

    def attend(layer, q, k, v, scale):
        near, lse = Alone.apply(q, k, v, layout.own, scale)
        far, far_lse = Alone.apply(q[13:], k[:13], v[:13], layout.prompt, scale)
        both = torch.logaddexp(lse[:, 13:], far_lse)
        near_X, far_X = ((x - both).exp().T[..., None] for x in (lse[:, 13:], far_lse))
        return torch.cat([near[:13], near_X * near[13:] + far_X * far])

    out, dq, dk, dv = solved(attend, SHAPE)
    right = solved(attends(SHAPE), SHAPE)
    assert_close((out, dv), (right[0], right[3]), **EXACT)
    assert (dq - right[1]).abs().max() > 0.3 * right[1].abs().max()
    assert (dk - right[2]).abs().max() > 0.3 * right[2].abs().max()
    with pytest.raises(AssertionError, match="dq"):
        assert_same((out, dq, dk, dv), solved(plain_rows(SHAPE), SHAPE))


def test_bf16_errs_hardly_more_than_without_a_merge():
    """Sixteen bits in and out, float32 between: below twice what a long prompt alone would have. Measured, three seeds: 2.0,
    3.1, 3.1 and 2.3 thousandths; with the weights of the merge in bf16 the output would be 2.3 off, with the sums of
    dout * out in bf16 dq 4.7."""
    merged = errors(attends, ([40, 30], [[30, 20, 25], [28, 31]]), torch.bfloat16, D=32)
    alone = errors(attends, ([160], [[1]]), torch.bfloat16, D=32)
    for ours, theirs, most in zip(merged, alone, (2.1e-3, 3.5e-3, 3.5e-3, 2.6e-3), strict=True):
        assert 0 < ours < min(2 * theirs, most)


# The stream and the policy


def test_a_stream_is_all_prompts_then_all_answers():
    """Prompts 5 | 1 2 3, answers 7 8, 9 | 4 6. The first token of an answer is predicted at its prompt's last one."""
    batch = pack([Group([5], [[7, 8], [9]]), Group([1, 2, 3], [[4, 6]])], CPU, GroupLayout.of)
    assert batch.ids_N.tolist() == [5, 1, 2, 3, 7, 8, 9, 4, 6]
    assert batch.positions_N.tolist() == [0, 0, 1, 2, 1, 2, 1, 3, 4]
    assert batch.predict_M.tolist() == [0, 4, 0, 3, 7]
    assert batch.target_M.tolist() == [7, 8, 9, 4, 6]
    assert (batch.slot_M.tolist(), batch.shape) == ([0, 1, 2, 4, 5], (3, 2))
    assert batch.layout.prompt_PS.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert batch.layout.answer_BT.tolist() == [[4, 5], [6, 0], [7, 8]]
    assert batch.layout.back_N.tolist() == [0, 3, 4, 5, 6, 7, 8, 10, 11]


def test_the_pieces_of_both_calls():
    layout = CascadeLayout.of(PLAIN, [1, 3], [[2, 1], [2]], CPU)
    assert layout.own.cu_q.tolist() == layout.own.cu_k.tolist() == [0, 1, 4, 6, 7, 9]
    assert (layout.own.max_q, layout.own.max_k, layout.own.causal) == (3, 3, True)
    assert (layout.prompt.cu_q.tolist(), layout.prompt.cu_k.tolist()) == ([0, 3, 5], [0, 1, 4])
    assert (layout.prompt.max_q, layout.prompt.max_k, layout.prompt.causal) == (3, 3, False)
    assert layout.L == 4
    assert {x.dtype for x in (layout.own.cu_q, layout.prompt.cu_q, layout.prompt.cu_k)} == {torch.int32}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpoints"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_policy_is_the_same_under_both_layouts(kind, checkpoints):
    """Log-probs, entropies and the gradient of every weight; log-probs also as transformers' own model gives them."""
    lm = tiny(kind)
    expected = Policy(lm)(GROUPS)
    slopes = gradients(lm, (expected[0] * weights_B6()).sum())
    plain = separate(with_attention(lm, "sdpa"))
    policy = Policy(lm, layout_for(PLAIN))
    if checkpoints:
        fsdp.checkpoint_blocks(policy)
    found = policy(GROUPS)
    assert_close(found, expected, **EXACT)
    assert_close(found[0], plain, **EXACT)
    for name, gradient in gradients(lm, (found[0] * weights_B6()).sum()).items():
        assert_close(gradient, slopes[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def on_two_ranks(path):
    """In a worker: opened as on GPUs, first with the plain kernels, and each rank with groups of its own."""
    build = fsdp.on_meta
    opening = mock.patch("engine.fsdp.kernels_for", return_value=PLAIN)
    norms = mock.patch("engine.fsdp.on_meta", lambda config, dtype: exact_norms(build(config, dtype)))
    with processes.processes(), opening, norms:
        policy = in_float64(path, activation_checkpointing=True)
        kept, used = policy.frozen_copy(), []
        inner = CascadeLayout.attend
        with mock.patch.object(CascadeLayout, "attend", lambda *args: used.append(args[1]) or inner(*args)):
            ranks = [slice(0, 2), slice(2, 3)][processes.rank()], [slice(0, 5), slice(5, 6)][processes.rank()]
            weights_BT = weights_B6()[ranks[1]]
            logp_BT = policy(GROUPS[ranks[0]])[0]
            assert used == [0, 1]
            (2 * (logp_BT * weights_BT[:, : logp_BT.shape[1]]).sum()).backward()  # FSDP takes the mean over the ranks
            assert used == [0, 1, 1, 0]
            for other in (kept, policy.sampler()):
                other(GROUPS)
            assert used[4:] == [0, 1, 0, 1]
        found = {name: fsdp.full(p.grad).contiguous() for name, p in policy.lm.named_parameters()}
        if processes.rank() == 0:
            save_file(found, f"{path}/gradients.safetensors")
    return 0


def test_sharded_over_two_ranks_gradients_are_those_of_one(tmp_path):
    """FSDP2 on gloo, activation checkpoints, two groups on one rank and one on the other: to 1e-12. The reference and the
    sampler have the layout that was chosen at opening."""
    lm = tiny()
    Policy(lm).export(tmp_path, tokenizer())
    expected = gradients(lm, (Policy(lm)(GROUPS)[0] * weights_B6()).sum())
    assert finish(start(2, on_two_ranks, str(tmp_path))) == [0, 0]
    found = load_file(tmp_path / "gradients.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# The choice


def gpu(monkeypatch, capability=(9, 0), built=True, installed=False):
    """A machine with such a GPU, PyTorch built with or without its kernels, flash-attn installed or not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    spec = importlib.machinery.ModuleSpec("flash_attn", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("place", "dtype", "D", "machine", "expected"),
    [
        ("cuda", torch.bfloat16, 128, {}, TORCH),
        ("cuda", torch.float16, 256, {}, TORCH),
        ("cuda:3", torch.bfloat16, 64, {"capability": (8, 0)}, TORCH),
        ("cuda", torch.bfloat16, 128, {"installed": True}, TORCH),
        ("cuda", torch.bfloat16, 128, {"built": False, "installed": True}, FLASH_ATTN),
        ("cuda", torch.bfloat16, 128, {"built": False}, None),
        ("cuda", torch.float32, 128, {}, None),
        ("cuda", torch.bfloat16, 100, {}, None),
        ("cuda", torch.bfloat16, 264, {}, None),
        ("cuda", torch.bfloat16, 128, {"capability": (7, 5)}, None),
        ("cpu", torch.bfloat16, 128, {}, None),
    ],
)
def test_what_is_chosen(monkeypatch, place, dtype, D, machine, expected):
    gpu(monkeypatch, **machine)
    assert kernels_for(LlamaConfig(head_dim=D), dtype, torch.device(place)) is expected


def test_without_kernels_the_layout_is_the_clear_one():
    assert layout_for(None) == GroupLayout.of
    assert layout_for(TORCH)([2], [[1]], CPU).kernels is TORCH


# The kernels behind their real signatures


def plain_aten(library):
    """PyTorch's two operators on a CPU, computed by the plain kernels, strict about what the real ones believe."""

    def seen(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal):
        for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
            assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[-1] == len(x) and longest == cu.diff().max()
        assert dropout == 0 and all(x.stride(-1) == 1 for x in (q, k, v))
        return Segments(cu_q, cu_k, max_q, max_k, causal)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **_):
        out, lse = PLAIN.forward(q, k, v, seen(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal), scale)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale=None, **_):
        assert lse.is_contiguous() and state.dtype == torch.uint64
        return PLAIN.backward(
            dout, q, k, v, out, lse, seen(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal), scale
        )  # fmt: skip

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pytorchs_operators_are_called_as_their_schema_wants(shape):
    with torch.library._scoped_library("aten", "IMPL") as library:
        plain_aten(library)
        assert_same(solved(attends(shape, TORCH), shape), solved(plain_rows(shape), shape))


@pytest.mark.parametrize(
    ("name", "since_2_7"),
    [
        (
            "_flash_attention_forward",
            "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
            "float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None) -> (Tensor output, "
            "Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
        ),
        (
            "_flash_attention_backward",
            "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
            "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, "
            "Tensor unused, *, float? scale=None) -> (Tensor, Tensor, Tensor)",
        ),
    ],
)
def test_the_installed_pytorch_takes_what_we_give(name, since_2_7):
    """Its operators are private: what may be left out has grown from version to version, what we give has not changed."""
    installed = getattr(torch.ops.aten, name).default._schema
    assert installed.is_backward_compatible_with(torch._C.parse_schema(f"aten::{name}{since_2_7}"))


def fake_flash_attn():
    """The two functions of flash-attn 2.8.3 with their parameters, computed by the plain kernels."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        segments = Segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *PLAIN.forward(q, k, v, segments, softmax_scale), torch.empty(0), torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
        zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        assert deterministic is False and softmax_lse.is_contiguous()
        segments = Segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        found = PLAIN.backward(dout, q, k, v, out, softmax_lse, segments, softmax_scale)
        for theirs, ours in zip((dq, dk, dv), found, strict=True):
            theirs.copy_(ours)
        return torch.empty(0)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package.flash_attn_interface = interface
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def test_flash_attn_is_called_as_its_functions_want():
    with mock.patch.dict(sys.modules, fake_flash_attn()):
        assert_same(solved(attends(SHAPE, FLASH_ATTN), SHAPE), solved(plain_rows(SHAPE), SHAPE))


# Fake tensors: shapes, types and memory


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pytorchs_kernels_give_the_shapes_of_the_plain_ones(device):
    """On fake tensors, also of a GPU that is not there: out and lse forward, dq, dk and dv backward."""
    N = sum(SHAPE[0]) + sum(map(sum, SHAPE[1]))
    segments = Segments.of([13, 14], [13, 14], CPU, causal=True)
    (q, k, v), dout = qkv(SHAPE, dtype=torch.bfloat16)
    plain = PLAIN.forward(q.detach(), k.detach(), v.detach(), segments, 0.35)
    shapes = [(x.shape, x.dtype) for x in (*plain, q, k, v)]
    with FakeTensorMode():
        q, k, v, dout = (torch.empty(N, heads, 8, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2, 4))
        segments = Segments(*(torch.empty(3, dtype=torch.int32, device=device) for _ in range(2)), 14, 14, True)
        out, lse = TORCH.forward(q, k, v, segments, 0.35)
        found = (out, lse, *TORCH.backward(dout, q, k, v, out, lse, segments, 0.35))
    assert [(x.shape, x.dtype) for x in found] == shapes
    assert {x.device.type for x in found} == {device}


def test_a_layer_keeps_what_the_kernels_need_and_no_mask():
    """Qwen3-8B, a prompt of 4,096 tokens and 8 answers of 4,096, N = 36,864: q and out of 32 heads, k and v of 8, 128 wide,
    in bf16: 36,864 x 80 x 128 x 2 = 754,974,720 bytes; lse of 32 heads in float32: 4,718,592."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        q, k, v = (torch.empty(36_864, heads, 128, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8))
        out = attends(([4096], [[4096] * 8]), TORCH)(0, q, k, v, 128**-0.5)
    assert out.shape == (36_864, 32, 128)
    assert sum(kept.values()) == 754_974_720 + 4_718_592


@pytest.mark.parametrize(("D", "kernels"), [(8, PLAIN), (6, None)])
def test_a_plan_counts_what_a_gpu_will_keep(D, kernels):
    """In bf16: the cascade where it will be chosen, rectangles and a mask for heads of a width without kernels."""
    lm = tiny(head_dim=D)
    for module in lm.modules():
        module.__dict__.pop("forward", None)  # transformers' own norms, as in a run
    expected = saved_for_backward(Policy(lm.bfloat16(), layout_for(kernels)), GROUPS)
    assert kept_bytes(lm.config, 2, GROUPS, Place(1, 10**9, gpu=True, sharded=True)) == expected > 0


def test_a_policy_of_fast_kernels_reloads_as_itself(tmp_path):
    """Its export is compared through the same kernels: in bf16 others part by more than the 1e-4 that are allowed."""
    Policy(tiny()).export(tmp_path / "start", tokenizer())
    policy = Policy(Policy.load(tmp_path / "start", torch.bfloat16).lm, layout_for(PLAIN))
    with torch.no_grad():
        group = [Group([3, 5, 7], [[11, 13]])]  # what `export` compares
        assert (policy(group)[0] - Policy(policy.lm)(group)[0]).abs().max() > 1e-4
    export(tmp_path / "model", policy, tokenizer())
    assert (tmp_path / "model" / "model.safetensors").exists()


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fast kernels need a GPU")
def test_what_a_gpu_has_to_show():
    """Errors, repetition, waits, time and memory: see docs/gpu.md. On a CPU tests/test_accept.py runs the same lines."""
    assert [row for row in checks.cascade(torch.device("cuda")) if row.verdict != "ok"] == []
