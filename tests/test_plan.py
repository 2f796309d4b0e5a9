"""The memory plan: counted parameters, counted activations, and whether it says what to change."""

from dataclasses import replace

import pytest
import torch
from conftest import call
from tiny import tiny
from transformers import LlamaConfig

from common.errors import UserError
from model import Group, Policy
from training import plan
from training.config import MAY_DIFFER, PRESETS
from training.plan import Place, estimate, kept_bytes, place_of, sizes_of

PAPER = replace(PRESETS["paper"], max_prompt_tokens=64, max_new_tokens=64)  # short, so that counting takes no time
EIGHT = Place(8, 80 * 10**9, gpu=True, sharded=True)


@pytest.mark.parametrize(("text", "count", "memory"), [("8x80", 8, 80e9), ("1x141GB", 1, 141e9), ("2x79.5", 2, 79.5e9)])
def test_a_place_is_gpus_by_gigabytes(text, count, memory):
    assert place_of(text) == Place(count, int(memory), gpu=True, sharded=True)


@pytest.mark.parametrize("text", ["8", "8x", "x80", "0x80", "8x0", "8 80", "eightx80", "0x8x80", "1x2x3x4"])
def test_other_words_are_a_users_mistake(text):
    with pytest.raises(UserError, match="8x80"):
        place_of(text)


def test_nodes_hold_copies_of_each_other():
    """Two nodes of eight: sixteen ranks, but a weight is cut into eight."""
    assert place_of("2x8x80") == Place(16, 80 * 10**9, gpu=True, sharded=True, nodes=2)
    one, two = (estimate(PAPER, plan.config_of("Qwen/Qwen3-8B"), place_of(text)) for text in ("8x80", "2x8x80"))
    assert two.held == one.held
    assert two.learning == one.learning


def test_this_machine_without_a_gpu_is_one_rank_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = place_of("")
    assert (here.ranks, here.gpu, here.sharded, here.c) == (1, False, False, 4)
    assert here.memory > 10**9
    bf16 = place_of("", "bfloat16")
    assert (bf16.ranks, bf16.gpu, bf16.sharded, bf16.c) == (1, False, True, 2)
    assert (place_of("8x80").c, place_of("8x80", "float32").c) == (2, 4)


@pytest.mark.parametrize(
    ("model", "parameters", "rest"),
    [
        ("Qwen/Qwen3-8B", 8_190_735_360, 2 * 151_936 * 4096 + 4096),  # embeddings, head, final norm
        ("Qwen/Qwen3-4B", 4_022_468_096, 151_936 * 2560 + 2560),  # head and embeddings are one
    ],
)
def test_the_papers_models_have_their_published_sizes(model, parameters, rest):
    sizes = sizes_of(plan.config_of(model))
    assert (sizes.all, sizes.rest, sizes.layers) == (parameters, rest, 36)
    assert sizes.block * 36 == parameters - rest


def test_qwen3_8b_on_eight_gpus_by_hand():
    """N = 8,190,735,360 over 8: float32 weights 4N/8, moments 8N/8, bf16 copy 2N; the bf16 reference is in main
    memory, 2N in all. Gathered: rest R = 1,244,663,808 and two blocks b = 192,946,432: 2 (R + 2b) + (2 + 4) R."""
    made = estimate(PAPER, plan.config_of("Qwen/Qwen3-8B"), EIGHT)
    assert made.held == {
        "weights (float32)": 4_095_367_680, "AdamW's moments": 8_190_735_360, "rollout copy": 16_381_470_720,
    }  # fmt: skip
    assert made.host == {"reference (offloaded)": 16_381_470_720}
    assert made.learning["gradients"] == 4_095_367_680
    assert made.learning["gathered weights"] == 2 * (1_244_663_808 + 2 * 192_946_432) + 6 * 1_244_663_808


def test_a_reference_that_is_not_offloaded_is_on_the_device():
    """2N / 8: bf16 as it is computed."""
    made = estimate(replace(PAPER, ref_offload=False), plan.config_of("Qwen/Qwen3-8B"), EIGHT)
    assert made.held["reference"] == 2_047_683_840
    assert made.host == {}


def test_keys_and_values_stay_within_the_budget():
    """Half of the device unless --kv_budget says otherwise; 256 rows of 8192 tokens would need more."""
    long = replace(PAPER, max_new_tokens=8192)
    config = plan.config_of("Qwen/Qwen3-8B")
    assert plan.kv_bytes(long, config, EIGHT) == 40 * 10**9
    assert plan.kv_bytes(replace(long, kv_budget=10**9), config, EIGHT) == 10**9


def test_keys_and_values_of_a_short_rollout_by_hand():
    """8 prompts of 64 tokens, 8 answers each of 64; one layer more than 36 is counted while the cache grows. A token:
    2 x 8 heads x 128 x 2 bytes = 4096. The evaluation, one answer to each of 256 prompts, needs more:
    37 x 4096 x (256 x 64 + 256 x 64) = 4,966,055,936."""
    assert plan.kv_bytes(PAPER, plan.config_of("Qwen/Qwen3-8B"), EIGHT) == 4_966_055_936


def test_a_group_with_one_answer_left_keeps_its_prompt():
    """64 prompts per rank, 8 answers each, 256 rows: all 64 prompts may be there at once, not only 32. 4096 bytes per token,
    37 x 4096 x (64 x 64 + 256 x 64) = 3,103,784,960; 8 evaluated prompts need less."""
    many = replace(PAPER, batch_prompts=512, eval_limit=8)
    assert plan.kv_bytes(many, plan.config_of("Qwen/Qwen3-8B"), EIGHT) == 3_103_784_960


def test_recorded_steps_keep_their_memory():
    """256 rows of 1,000 logits, 6 x 4 bytes each: 6,144,000; 12,400 tokens, 2 bytes, 3 x 128 + 6 x 64: 19,046,400. CUDA
    graphs hold the first while the second is used; on a CPU (4 bytes: 38,092,800) nothing is recorded."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, vocab_size=1000)
    assert plan.sampling_bytes(PAPER, config, EIGHT) == 19_046_400
    recorded = replace(PAPER, compile=True)
    assert plan.sampling_bytes(recorded, config, EIGHT) == 6_144_000 + 19_046_400
    assert plan.sampling_bytes(recorded, config, Place(1, 10**9, gpu=False, sharded=False)) == 38_092_800


def saved_for_backward(policy, groups):
    """Bytes that autograd really keeps, each storage once."""
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy(groups)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_fake_tensors_keep_what_real_ones_keep(kind):
    lm = tiny(kind, dtype="float32").float()
    for module in lm.modules():
        module.__dict__.pop("forward", None)  # transformers' own norms, as in a run
    groups = [Group([1] * 30, [[2] * 20] * 4), Group([1] * 10, [[2] * 7])]
    expected = saved_for_backward(Policy(lm), groups)
    assert kept_bytes(lm.config, 2, groups, Place(1, 10**9, gpu=False, sharded=False)) == expected > 0


def test_checkpointing_keeps_one_block_and_the_inputs_of_all():
    """With 100 blocks the inputs are what grows: one float32 vector of 64 per token and block."""
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    place = Place(1, 10**9, gpu=False, sharded=False)
    cfg = replace(PAPER, micro_batch=8)
    few, many = (plan.activation_bytes(cfg, LlamaConfig(**shape, num_hidden_layers=n), place) for n in (10, 110))
    assert many - few == 100 * (64 + 8 * 64) * 64 * 4
    off = replace(cfg, activation_checkpointing=False)
    assert plan.activation_bytes(off, LlamaConfig(**shape, num_hidden_layers=10), place) > 3 * few


def test_what_does_not_fit_is_told_what_to_change():
    """Of 1.3 GB, .2 hold weights and moments and .61 the logits of 256 rows: half of it for keys and values is too much,
    a quarter is not."""
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=40)
    config = LlamaConfig(**shape, vocab_size=100_000)
    place = Place(1, 13 * 10**8, gpu=True, sharded=True)
    cfg = replace(PAPER, max_new_tokens=512)
    made = estimate(cfg, config, place)
    lines = plan.advice(cfg, config, made)
    assert not made.fits
    assert lines[0].startswith("does not fit: ")
    assert lines[1].startswith("  --kv_budget 325000000: peak ") and lines[1].endswith(" GB, fits")
    assert len(lines) == 2


def test_a_run_that_ran_out_of_memory_may_go_on_with_the_advice():
    """Such a run ends with "see --plan; then go on with: ... --resume", so --resume may refuse nothing that a plan names."""
    cfg = replace(PAPER, micro_batch=8, ref_offload=False, activation_checkpointing=False)
    made = estimate(cfg, plan.config_of("Qwen/Qwen3-8B"), Place(1, 24 * 10**9, gpu=True, sharded=True))
    found = [vars(changed) for changed, _ in plan.changes(cfg, made)]
    changed = {name for values in found for name in values if values[name] != getattr(cfg, name)}
    assert changed == {"activation_checkpointing", "ref_offload", "kv_budget", "micro_batch"}
    assert changed <= MAY_DIFFER


def test_the_command_prints_the_plan_and_writes_nothing(place, tmp_path):
    status, said, complained = call([*place.argv(tmp_path / "run"), "--plan", "2x24"])
    assert (status, complained) == (0, "")
    assert "2 x 24 GB" in said and "peak" in said and said.rstrip().endswith("fits")
    assert not (tmp_path / "run").exists()


def test_the_command_without_a_place_speaks_of_this_machine(place, tmp_path):
    status, said, _ = call([*place.argv(tmp_path / "run"), "--plan"])
    assert status == 0
    assert "1 x " in said and "float32" in said


@pytest.mark.parametrize(("more", "heard"), [(["--plan", "lots"], "8x80"), (["--model", "/nowhere", "--plan"], "/nowhere")])
def test_a_plan_that_cannot_be_made_is_one_line(place, tmp_path, more, heard):
    status, _, complained = call([*place.argv(tmp_path / "run"), *more])
    assert status == 2
    assert complained.startswith("error: ") and complained.count("\n") == 1
    assert heard in complained
