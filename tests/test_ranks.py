"""Many processes on a CPU (gloo), the code path of NCCL: the same run whatever the number of ranks.

Workers are forked from a server that has imported the program. A whole run of the tiny world is the unit: cold start, two RL
steps, selection, retraining, evaluations, export. 5 prompts of 3 answers of unequal length divide by neither 2 nor 4.
"""

import contextlib
import ctypes
import functools
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import lines
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import exact_norms
from transformers import AutoConfig

import model
import selfemo
from engine import fsdp, peers, processes
from engine.batches import my_micro_batches
from engine.fsdp import bounds
from engine.processes import divide
from model import Group, Policy
from training import folder, task

ONE_ITERATION = ("--iterations", 1, "--steps", 2, "--eval_every", 1)
ROOT = Path(__file__).parent.parent


# Division of work


def test_divide_by_hand():
    """Costs 5 1 4 2 3 to two: 5 | 4 from the left, then 3 | 2 from the right, then 1: sums 5 + 2 + 1 and 4 + 3."""
    assert divide([5, 1, 4, 2, 3], 2) == [[0, 3, 1], [2, 4]]


def test_divide_by_one_keeps_the_order():
    assert divide([1, 3, 2], 1) == [[0, 1, 2]]


def test_divide_by_more_ranks_than_work():
    assert divide([7, 9], 4) == [[1], [0], [], []]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9))
def test_every_index_is_given_once_and_ranks_differ_by_one_at_most(costs, size):
    divided = divide(costs, size)
    assert sorted(i for own in divided for i in own) == list(range(len(costs)))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),  # 3 each, the last one what is left
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),  # the last rank holds no row
        (1, 2, [(0, 1), (1, 1)]),
    ],
)
def test_bounds(rows, parts, expected):
    assert [bounds(rows, parts, part) for part in range(parts)] == expected


def test_one_process_is_alone():
    assert (processes.rank(), processes.size()) == (0, 1)
    assert processes.exchange({"a": 0.1}) == [{"a": 0.1}]
    assert processes.gathered({2: (0.1, 3), 0: ()}) == [[], [0.1, 3]]
    parts = my_micro_batches([Group([1], [[2]]), Group([3], [[4, 5]])], 1)
    assert [(part.number, part.of, part.rows, part.scale) for part in parts] == [
        (0, 2, slice(0, 1), 1.0), (1, 2, slice(1, 2), 1.0),
    ]  # fmt: skip
    x = torch.tensor([1.0])
    assert processes.summed(x) is x


# Workers


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start(size, target, *args, nodes=1):
    """Processes with the environment that torchrun gives its workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfemo"])
    port, here = free_port(), size // nodes
    started = []
    for rank in range(size):
        env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        worker = context.Process(target=launched, args=({k: str(v) for k, v in env.items()}, target, args))
        worker.start()
        started.append(worker)
    return started


def launched(env, target, args):
    os.environ.update(env)
    torch.set_num_threads(1)
    os._exit(target(*args))


def finish(workers, timeout=240):
    """Exit statuses; whoever is left after the time is killed."""
    end = time.monotonic() + timeout
    for worker in workers:
        worker.join(max(0.1, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    return [worker.exitcode for worker in workers]


def whole_run(argv, dtype, log):
    """selfemo.main, in float64 if asked for, with what it says in a file."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Path(f"{log}.{processes.launched_rank()}").open("w"))
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        stack.enter_context(mock.patch("model.HEAD_BYTES", 4 * 60 * 8))  # chunks of the head of some eight tokens
        if dtype == "float64":
            stack.enter_context(mock.patch("training.launch.open_policy", in_float64))
            build = fsdp.on_meta
            stack.enter_context(mock.patch("engine.fsdp.on_meta", lambda config, dtype: exact_norms(build(config, dtype))))
        return selfemo.main(argv)


def in_float64(path, *, dtype="auto", activation_checkpointing=False):
    """`engine.fsdp.open_policy` in float64, norms included: transformers' own are float32 inside, good for 1e-7 only."""
    if not torch.distributed.is_initialized():
        policy = Policy.load(path, torch.float64)
        exact_norms(policy.lm)
    else:
        source = Policy.load(path, torch.float64) if processes.rank() == 0 else None
        config = AutoConfig.from_pretrained(str(path))
        policy = fsdp.sharded(config, storage=torch.float64, compute=torch.float64, where=torch.device("cpu"))
        fsdp.fill(policy, source)
    if activation_checkpointing:
        fsdp.checkpoint_blocks(policy)
    return policy


def run_on(size, place, out, *more, dtype="float64", nodes=1, resume=False):
    argv = [*place.argv(out, *more), *(["--resume"] if resume else [])]
    if size == 0:  # no launcher, nothing sharded
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["selfemo"])
        worker = context.Process(target=launched, args=({}, whole_run, (argv, dtype, f"{out}.log")))
        worker.start()
        return finish([worker])
    return finish(start(size, whole_run, argv, dtype, f"{out}.log", nodes=nodes))


def said(out, rank=0):
    return Path(f"{out}.log.{rank}").read_text()


def numbers(out):
    """Every measurement of a run by line and name, but for clocks."""
    found = {}
    for i, line in enumerate(lines(out / "metrics.jsonl")):
        for name, value in line.items():
            if not name.startswith(("time/", "memory/", "rollout/tokens")) and isinstance(value, int | float):
                found[i, name] = value
    return found


def ids(out):
    """What was sampled: token ids of every answer of every group."""
    paths = sorted((out / "rollouts").glob("*.jsonl"))
    return [(r["step"], r["sample_id"], [a["ids"] for a in r["answers"]]) for p in paths for r in lines(p)]


def apart(a, b):
    """Largest difference between the models of two runs."""
    one, two = (load_file(out / "model/model.safetensors") for out in (a, b))
    assert one.keys() == two.keys()
    return max((one[k] - two[k]).abs().max().item() for k in one)


# Equality


@pytest.fixture(scope="module")
def alone(place):
    """One process without a launcher, float64."""
    out = place.root / "alone"
    assert run_on(0, place, out, *ONE_ITERATION) == [0], said(out)
    return out


@pytest.mark.parametrize(("size", "nodes"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_any_number_of_ranks_is_the_same_run(place, alone, tmp_path, size, nodes):
    """Same tokens; every logged number and the final weights to 1e-9. (4, 2): two nodes of two ranks, HSDP."""
    out = tmp_path / "run"
    assert run_on(size, place, out, *ONE_ITERATION, nodes=nodes) == [0] * size, said(out)
    assert ids(out) == ids(alone)
    assert lines(out / "buffer.jsonl") == lines(alone / "buffer.jsonl")
    assert numbers(out) == pytest.approx(numbers(alone), rel=1e-9, abs=1e-9)
    assert 0 <= apart(out, alone) < 1e-9


@pytest.mark.parametrize(("size", "micro"), [(2, 1), (4, 3)])
def test_sequence_ratio_and_mean_and_small_micro_batches(place, tmp_path, size, micro):
    """`--ratio sequence --loss_mean sequence`, micro-batches of one answer against all answers at once (1 x 8 = 8 x 1)."""
    more = (*ONE_ITERATION, "--ratio", "sequence", "--loss_mean", "sequence", "--cold_start", "none")
    one, many = tmp_path / "one", tmp_path / "many"
    assert run_on(0, place, one, *more, "--micro_batch", 64) == [0], said(one)
    assert run_on(size, place, many, *more, "--micro_batch", micro) == [0] * size, said(many)
    assert ids(many) == ids(one)
    assert numbers(many) == pytest.approx(numbers(one), rel=1e-9, abs=1e-9)
    assert apart(many, one) < 1e-9


def test_float32_begins_equal_and_stays_near(place, tmp_path):
    """First step: the same tokens and the same loss to 1e-5. After it, sums in another order: weights to 1e-3."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_on(0, place, one, *ONE_ITERATION, dtype="float32") == [0], said(one)
    assert run_on(2, place, two, *ONE_ITERATION, dtype="float32") == [0, 0], said(two)
    first = [[x for x in ids(out) if x[0] == 0] for out in (one, two)]
    assert first[0] == first[1]
    a, b = (next(m for m in lines(out / "metrics.jsonl") if m["phase"] == "rl") for out in (one, two))
    assert b["loss/policy"] == pytest.approx(a["loss/policy"], abs=1e-5)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert apart(one, two) < 1e-3


def test_activation_checkpointing_changes_nothing(place, alone, tmp_path):
    out = tmp_path / "run"
    assert run_on(2, place, out, *ONE_ITERATION, "--activation_checkpointing", "true") == [0, 0], said(out)
    assert ids(out) == ids(alone)
    assert apart(out, alone) < 1e-9


def two_layers_untied(place, path):
    """The base model with a second layer that adds nothing yet and a head apart from the embeddings: as Qwen3-8B has it."""
    shutil.copytree(place.root / "base", path)
    small = load_file(path / "model.safetensors")
    large = dict(small) | {"lm_head.weight": small["model.embed_tokens.weight"].clone()}
    for name, value in small.items():
        if ".layers.0." in name:
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            large[name.replace(".0.", ".1.")] = torch.zeros_like(value) if silent else value.clone()
    save_file(large, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "max_window_layers": 2}
    (path / "config.json").write_text(json.dumps({**config, **layers, "tie_word_embeddings": False}))
    return path


def test_several_blocks_and_a_head_of_its_own(place, tmp_path):
    """Two FSDP groups of blocks, activation checkpointing over both, the head untied: two ranks are one process."""
    more = (*ONE_ITERATION, "--model", two_layers_untied(place, tmp_path / "base"), "--activation_checkpointing", "true")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_on(0, place, one, *more) == [0], said(one)
    assert run_on(2, place, two, *more) == [0, 0], said(two)
    assert ids(two) == ids(one)
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-9, abs=1e-9)
    trained = load_file(two / "model/model.safetensors")
    assert trained["model.layers.1.mlp.down_proj.weight"].abs().max() > 0
    assert not torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])
    assert apart(two, one) < 1e-9


@pytest.mark.parametrize("size", [0, 2])
def test_bf16_compute_keeps_float32_weights_and_moments(place, tmp_path, size):
    """As on GPUs, also in one process without a launcher: log-probs of sampler and policy differ by bf16's rounding, which
    shows, the exported model is bf16, and the run says what it computed in."""
    out = tmp_path / "run"
    more = (*ONE_ITERATION, "--save_every", 1, "--dtype", "bfloat16")
    assert run_on(size, place, out, *more, dtype="float32") == [0] * max(size, 1), said(out)
    first = next(m for m in lines(out / "metrics.jsonl") if m["phase"] == "rl")
    assert 1e-4 < first["rollout/logp_gap_mean"] < 0.1
    assert first["ratio/mean/by_mini_batch"][0] == pytest.approx(1, abs=1e-6)
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert {x.dtype for x in load_file(min(checkpoint.glob("weights*.safetensors"))).values()} == {torch.float32}
    assert {x.dtype for x in load_file(out / "model/model.safetensors").values()} == {torch.bfloat16}
    assert ("no bf16 instructions" in said(out)) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    settings = json.loads((out / "config.json").read_text())
    assert (settings["dtype"], settings["versions"]["dtype"]) == ("bfloat16", "bfloat16")


def test_one_prompt_for_four_ranks_hangs_nobody(place, tmp_path):
    out = tmp_path / "run"
    more = ("--batch_prompts", 1, "--mini_batch_prompts", 1, "--micro_batch", 64, "--sft_batch", 1)
    assert run_on(4, place, out, "--iterations", 1, "--steps", 1, *more, "--eval_limit", 1, "--test_limit", 1) == [0] * 4


def two_sides(out):
    """In a worker: the sampler's log-probs before and after an update, against the sharded policy's."""
    with processes.processes():
        torch.manual_seed(0)
        policy = in_float64(out)
        group = [model.Group([1, 2, 3], [[4, 5], [6]])]
        seen = []
        for _ in range(2):
            whole = policy.sampler()
            with torch.no_grad():
                seen.append((whole(group)[0] - policy(group)[0]).abs().max().item())
                seen.append(policy(group)[0].sum().item())
            optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
            (-policy(group)[0].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        reference = policy.frozen_copy(offload=True)
        with torch.no_grad():
            seen.append((reference(group)[0] - policy(group)[0]).abs().max().item())
        seen.append(sum(p.requires_grad for p in reference.parameters()))
        if processes.rank() == 0:
            (Path(out) / "seen.json").write_text(json.dumps(seen))
    return 0


def test_the_sampler_never_has_stale_weights_and_the_reference_is_a_copy(place, tmp_path):
    shutil.copytree(place.root / "base", tmp_path / "base")
    assert finish(start(2, two_sides, str(tmp_path / "base"))) == [0, 0]
    seen = json.loads((tmp_path / "base/seen.json").read_text())
    gap_before, total_before, gap_after, total_after, reference_gap, trainable = seen
    assert gap_before < 1e-6 and gap_after < 1e-6 and reference_gap < 1e-12  # the sampler's norms are float32 inside
    assert total_after > total_before + 0.1
    assert trainable == 0


def frozen_in_bf16(out):
    """In a worker of bf16 compute: the reference's log-probs against the policy's own, its type and its bytes."""
    with processes.processes():
        torch.manual_seed(0)
        policy = fsdp.open_policy(out, dtype="bfloat16")
        for p in policy.parameters():  # numbers that bf16 has to round
            fsdp.local(p.data).add_(torch.rand_like(fsdp.local(p.data)) * 1e-2)
        groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9, 10, 11]])]
        with torch.no_grad():
            own = policy(groups)[0]
            copies = [policy.frozen_copy(offload=offload) for offload in (False, True)]
            same = [torch.equal(own, copy(groups)[0]) for copy in copies]
        bytes_of = [sum(fsdp.local(p).nbytes for p in one.parameters()) for one in (policy, *copies)]
        own_types = {str(p.dtype) for copy in copies for p in copy.parameters()}
        if processes.rank() == 0:
            (Path(out) / "seen.json").write_text(json.dumps([same, sorted(own_types), bytes_of]))
    return 0


def test_a_reference_is_stored_as_it_is_computed_and_its_log_probs_are_the_same_bits(place, tmp_path):
    shutil.copytree(place.root / "base", tmp_path / "base")
    assert finish(start(2, frozen_in_bf16, str(tmp_path / "base"))) == [0, 0]
    same, types, (policy, one, two) = json.loads((tmp_path / "base/seen.json").read_text())
    assert same == [True, True]
    assert types == ["torch.bfloat16"]
    assert policy == 2 * one == 2 * two


def communicators(out):
    """In a worker: the collectives that the first call of `mesh` makes, as (name, ranks of the group)."""
    seen = []

    def spy(name):
        inner = getattr(torch.distributed, name)

        def call(whole, part, *args, **named):
            inner(whole, part, *args, **named)
            seen.append([name, max(len(whole), len(part))])

        return mock.patch(f"torch.distributed.{name}", call)

    with processes.processes(), spy("all_gather_into_tensor"), spy("reduce_scatter_tensor"):
        fsdp.mesh("cpu")
        fsdp.mesh("cpu")
        if processes.rank() == 0:
            Path(out).write_text(json.dumps(seen))
    return 0


@pytest.mark.parametrize(("size", "nodes", "groups"), [(2, 1, [2]), (4, 2, [2, 2])])
def test_communicators_are_open_before_the_first_rollout(tmp_path, size, nodes, groups):
    """One node of two: one group. Two nodes of two: shards of 2 in a node, copies of 2 over the nodes."""
    assert finish(start(size, communicators, str(tmp_path / "seen.json"), nodes=nodes)) == [0] * size
    both = ("all_gather_into_tensor", "reduce_scatter_tensor")
    assert json.loads((tmp_path / "seen.json").read_text()) == [[name, ranks] for ranks in groups for name in both]


def limits(out):
    """In a worker: how long gloo waits for a peer, before and after a limit, and in a group made later."""
    with processes.processes():
        found = []
        for most in (None, processes.NCCL_WAIT):
            if most:
                processes.limit_waits("cpu", most)
            found.append(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        if processes.rank() == 0:
            Path(out).write_text(json.dumps(found))
    return 0


def test_a_limit_of_one_backend(tmp_path):
    """Gloo stands for NCCL here: a day, then half an hour."""
    assert finish(start(2, limits, str(tmp_path / "seen.json"))) == [0, 0]
    assert json.loads((tmp_path / "seen.json").read_text()) == [86_400, 1_800]


def test_memory_of_a_gpu_grows_in_place_unless_somebody_said_otherwise(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    processes.grow_in_place()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    processes.grow_in_place()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    processes.grow_in_place()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_memory_of_a_gpu_in_gb_and_given_back_after_sampling(monkeypatch):
    """3 GB in use at most and 5 GB reserved on a GPU that is not there; after an answer the cache is emptied, once."""
    emptied = []
    for name, value in {"is_available": True, "max_memory_allocated": 3 * 10**9, "max_memory_reserved": 5 * 10**9}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append("cache"))
    assert processes.peak_memory() == {"memory/peak_gb": 3.0, "memory/reserved_gb": 5.0}
    monkeypatch.setattr("training.task.generate", lambda *_, **__: emptied.append("sampled") or [])
    world = SimpleNamespace(cfg=SimpleNamespace(seed=0, max_new_tokens=1, kv_budget=1, compile=False), eos=frozenset())
    policy = SimpleNamespace(sampler=lambda: None, device=torch.device("cpu"))
    assert task.answer(world, policy, [], n=1, temperature=1.0, step=0) == []
    assert emptied == ["sampled", "cache"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    processes.give_back_memory()
    assert emptied == ["sampled", "cache"]
    assert processes.peak_memory().keys() == {"memory/peak_gb"}


# Stopped, killed, failed


def stop_after(argv, dtype, log, updates):
    """A run in which rank 1 gets SIGTERM when it has made its nth optimizer step: the others must stop with it."""
    inner = folder.Run.count_update

    def count(run):
        inner(run)
        if run.position.updates == updates and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch("training.folder.Run.count_update", count):
        return whole_run(argv, dtype, log)


@pytest.mark.parametrize("then", [1, 3, 0])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(place, alone, tmp_path, then):
    """Stopped on two ranks in the second RL step (moments, reference and all), finished on one, three, or without any."""
    out = tmp_path / "run"
    cold = -(-len(lines(alone / "cold_start.jsonl")) // 6)
    more = (*ONE_ITERATION, "--save_every", 1)
    workers = start(2, stop_after, place.argv(out, *more), "float64", f"{out}.log", cold + 2)
    assert finish(workers) == [0, 0], said(out)
    assert "saved; go on with: torchrun --nproc_per_node 2 -- selfemo.py" in said(out)
    (checkpoint,) = (out / "checkpoints").iterdir()
    shards = {f"{part}-0000{i}-of-00002.safetensors" for part in ("moments", "reference", "weights") for i in (1, 2)}
    assert {p.name for p in checkpoint.iterdir()} == {"state.json", "SHA256SUMS", *shards}
    assert json.loads((checkpoint / "state.json").read_text())["position"] == {"stage": 1, "step": 1, "updates": cold + 2}
    assert run_on(then, place, out, *more, resume=True) == [0] * max(then, 1), said(out)
    assert ids(out) == ids(alone)
    assert numbers(out) == pytest.approx(numbers(alone), rel=1e-9, abs=1e-9)
    assert apart(out, alone) < 1e-9


def test_a_missing_shard_is_one_line(place, tmp_path):
    out = tmp_path / "run"
    more = (*ONE_ITERATION, "--save_every", 1)
    assert finish(start(2, stop_after, place.argv(out, *more), "float32", f"{out}.log", 3)) == [0, 0], said(out)
    (checkpoint,) = (out / "checkpoints").iterdir()
    (checkpoint / "weights-00002-of-00002.safetensors").unlink()
    status, _, complained = place.run(out, *more, resume=True)
    assert status == 2
    assert complained.startswith("error: ") and complained.count("\n") == 1
    assert "weights" in complained


def test_every_rank_killed_and_the_run_goes_on(place, alone, tmp_path):
    """kill -9 of both ranks at five moments; what is left always goes on, and ends where the others ended."""
    out = tmp_path / "run"
    more = (*ONE_ITERATION, "--save_every", 1)
    for written in (1, 1, 2, 2, 2):  # killed when so many checkpoints, the old one among them, have been seen
        workers, seen = start(2, whole_run, [*place.argv(out, *more), "--resume"], "float64", f"{out}.log"), set()
        while len(seen) < written and any(worker.is_alive() for worker in workers):
            seen |= {path.name for path in (out / "checkpoints").glob("[0-9]*")}
            time.sleep(0.005)
        for worker in workers:
            worker.kill()
        assert -signal.SIGKILL in finish(workers)
    assert run_on(2, place, out, *more, resume=True) == [0, 0], said(out)
    assert ids(out) == ids(alone)
    assert apart(out, alone) < 1e-9


FAILING = """
import sys, torch
sys.path.insert(0, {root!r})
import selfemo
from engine import processes
torch.cuda.is_available = lambda: False
inner = selfemo.answer
def answer(world, policy, samples, **settings):
    if settings["step"] == 0 and processes.rank() == 1:
        {what}
    return inner(world, policy, samples, **settings)
selfemo.answer = answer
sys.exit(selfemo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("what", "heard"),
    [
        ("raise OSError(28, 'No space left on device')", "rank 1: error: No space left on device"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_a_rank_that_fails_takes_the_job_down_with_one_error(place, tmp_path, what, heard):
    """Under the real torchrun: rank 1 fails while rank 0 samples or waits. Everything has ended within a minute."""
    script = tmp_path / "script.py"
    script.write_text(FAILING.format(root=str(ROOT), what=what))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    begun = time.monotonic()
    ended = subprocess.run(
        [*command, "--", str(script), *place.argv(tmp_path / "run", *ONE_ITERATION)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert heard in ended.stderr
    spoken = [line for line in ended.stderr.splitlines() if re.match(r"rank \d: error: ", line)]
    # Heard once; a rank that is killed says nothing, torchrun says SIGKILL.
    assert sum("No space" in line for line in spoken) == ("error" in heard)
    assert time.monotonic() - begun < 60


def watched(out, what):
    """In a worker, with short limits: `what` happens to a rank, and the other one is where no signal handler runs."""
    silent = 100.0 if what == "raise" else 4.0  # a rank that fails says so: nobody waits for its silence
    quick = functools.partial(peers.Watcher, every=0.2, silent=silent, grace=0.3)
    with mock.patch("engine.peers.Watcher", quick), Path(f"{out}.{processes.launched_rank()}").open("w") as file:
        os.dup2(file.fileno(), 2)
        with processes.processes():
            WATCHED[what](processes.rank())
    return 0


def killed(victim):
    """One rank is killed; the other is in C for a minute, as in NCCL."""

    def happens(rank):
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.CDLL(None).sleep(60)

    return happens


def raised(rank):
    """Rank 1 fails while rank 0 is in C."""
    if rank == 1:
        raise OSError(28, "No space left on device")
    ctypes.CDLL(None).sleep(60)


def slow(rank):
    """Rank 1 works longer than a silent rank may live while rank 0 waits, and again when rank 0 has parted."""
    if rank == 1:
        ctypes.CDLL(None).sleep(6)
    assert processes.exchange(rank) == [0, 1]
    if rank == 1:
        ctypes.CDLL(None).sleep(6)


def suspended(rank):
    """Both say that they are there, and work on."""
    print(f"rank {rank} is there", file=sys.stderr, flush=True)
    ctypes.CDLL(None).sleep(2)
    assert processes.exchange(rank) == [0, 1]


WATCHED = {"kill 1": killed(1), "kill 0": killed(0), "raise": raised, "slow": slow, "suspended": suspended}


@pytest.mark.parametrize("what", ["kill 1", "kill 0", "raise"])
def test_a_rank_inside_of_a_native_call_ends_when_the_other_is_gone(tmp_path, what):
    """Rank 1 is killed, or rank 0 with the store that it holds, or rank 1 fails: the other sleeps a minute in C and is ended
    within seconds (limits .2 + 4 + .3 s). The line is the thread's: a rank that wakes by itself says something else."""
    ends = finish(start(2, watched, str(tmp_path / "log"), what))
    gone = 0 if what == "kill 0" else 1
    assert ends[1 - gone] == 1
    assert ends[gone] == (1 if what == "raise" else -signal.SIGKILL)
    assert f"rank {1 - gone}: error: another rank has ended\n" in (tmp_path / f"log.{1 - gone}").read_text()


def test_a_rank_that_works_long_is_not_taken_for_dead(tmp_path):
    assert finish(start(2, watched, str(tmp_path / "log"), "slow")) == [0, 0]
    assert [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path):
    """Rank 1 is stopped, then rank 0, for longer than a silent rank may live; they go on in the other order."""
    workers, logs = start(2, watched, str(tmp_path / "log"), "suspended"), [tmp_path / f"log.{rank}" for rank in (0, 1)]
    while not all(log.exists() and log.read_text() for log in logs):
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.05)
    order = (1, signal.SIGSTOP, 0.6), (0, signal.SIGSTOP, 5.0), (0, signal.SIGCONT, 0.6), (1, signal.SIGCONT, 0.0)
    for rank, number, pause in order:  # in .6 s rank 0 looks three times at a rank that stands still
        os.kill(workers[rank].pid, number)
        time.sleep(pause)
    assert finish(workers) == [0, 0]
    assert [log.read_text() for log in logs] == ["rank 0 is there\n", "rank 1 is there\n"]


def test_the_limits_leave_a_minute():
    """30 s of silence, seen 5 s later at most, and 15 s to end by itself: 50 s. Its own last word comes after 10."""
    defaults = inspect.signature(peers.Watcher).parameters
    every, silent, grace = (defaults[name].default for name in ("every", "silent", "grace"))
    assert every + silent + grace == 50
    assert grace > 10
