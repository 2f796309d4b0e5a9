"""What python -m tools.accept asks of whole runs: the toy's under torchrun, the memory plan, and a rank that is killed.

See tools/checks.py for what a check is.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

import selfemo
from analysis import audit
from common.files import read_lines
from data import Completion
from engine import fsdp, processes
from model import ATTENTION, Group, Policy
from tools.bench import ROOT
from tools.checks import NO_MEMORY, Row, on_gpu, row
from tools.decoding import prompts_for, qwen_config, sampled, scored
from toy import base
from training.coldstart import adamw
from training.config import Config
from training.folder import Learner
from training.plan import GB, estimate, place_of

# The whole toy run


def run(device: torch.device) -> Iterator[Row]:
    """The toy under torchrun, one rank: shards, offload, activation checkpoints, SIGTERM, resume, audit."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "toy", Path(folder) / "run"
        if on_gpu(device):
            base.build(root)
            sizes: dict[str, Any] = {"iterations": 2, "steps": 3, "limit": "toy=256", "eval_limit": 128, "test_limit": 128}
        else:
            base.untaught(root / "base")
            sizes = {"iterations": 1, "steps": 2, "batch_prompts": 2, "mini_batch_prompts": 1, "n": 2}
            sizes |= {"limit": "toy=8", "eval_limit": 1, "test_limit": 1, "eval_temperatures": 0.0, "cold_start": "dataset"}
        flags = {
            "preset": "toy", "model": root / "base", "data": f"toy={root / 'world'}", "out": out, "save_every": 1,
            "ref_offload": "true", "activation_checkpointing": "true", **sizes,
        }  # fmt: skip
        argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        _, said = launch(argv, stop_at="] step 1/")
        yield row("SIGTERM after the first RL step: lines 'saved'", said.count("\nsaved; go on with: "), "=", 1)
        status, said = launch([*argv, "--resume"])
        yield row("resumed: lines 'going on from'", said.count("going on from "), "=", 1)
        yield row("resumed: exit status", status, "=", 0)
        yield row("audit of the run: findings", len(audit.audit(out).problems), "=", 0)
        yield from logged([line for line in read_lines(out / "metrics.jsonl") if line["phase"] == "rl"], sizes)


def logged(steps: Sequence[dict[str, Any]], sizes: dict[str, Any]) -> Iterator[Row]:
    """What the run logged of its RL steps."""
    yield row("RL steps logged", len(steps), "=", sizes["iterations"] * sizes["steps"])
    for name, bound in (("mean", 0.02), ("max", 0.3)):
        gap = max(step[f"rollout/logp_gap_{name}"] for step in steps)
        yield row(f"{name} gap of sampler and policy, largest of all steps", gap, "<", bound)
    first = max(abs(step["ratio/mean/by_mini_batch"][0] - 1) for step in steps)
    yield row("first ratio of every step, off 1 (a last bit of a mean is let pass)", first, "<", 1e-6)


def launch(argv: Sequence[str], stop_at: str = "") -> tuple[int, str]:
    """(exit status, stdout) of selfemo.py under torchrun, which gets SIGTERM at a line with `stop_at`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]
    said = "\n"
    with subprocess.Popen([*command, "--", "selfemo.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            print(line, end="", flush=True)  # into the log
            said += line
            if stop_at and stop_at in line:
                job.terminate()
    return job.returncode, said


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
    return port


# The memory plan


def plan(device: torch.device) -> Iterator[Row]:
    """The peak of a step with prompts and answers as long as the settings allow, against what --plan says of it."""
    gpu = on_gpu(device)
    S, T, layers = (1024, 1024, 8) if gpu else (16, 8, 2)
    cfg = Config(
        max_prompt_tokens=S, max_new_tokens=T, dtype="bfloat16", batch_prompts=8, mini_batch_prompts=8, eval_limit=8,
    )  # fmt: skip
    config = qwen_config("Qwen/Qwen3-4B", device, layers)
    with processes.processes(cfg.dtype):
        planned = estimate(cfg, config, place_of("", cfg.dtype)).peak / GB
        peaks = worst_step(cfg, config, device)
    measured = max(peaks.values())
    found = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items())
    note = f"{measured:.2f} GB measured ({found}), {planned:.2f} planned"
    skip = "" if gpu else NO_MEMORY
    yield row("peak of the longest step, off the plan", abs(measured / planned - 1), "<=", 0.1, note=note, skip=skip)


def worst_step(cfg: Config, config: Qwen3Config, device: torch.device) -> dict[str, float]:
    """GB in use at most while learning and while sampling, when the optimizer has its moments."""
    policy = fsdp.sharded(config, compute=processes.computing(cfg.dtype), where=device)
    fill_randomly(policy, config, device)
    fsdp.checkpoint_blocks(policy)
    learner = Learner(adamw(policy, cfg.lr), policy.frozen_copy(offload=cfg.ref_offload and on_gpu(device)))
    prompts = prompts_for(policy, cfg.batch_prompts, cfg.max_prompt_tokens)
    answer = Completion((1,) * cfg.max_new_tokens, (0.0,) * cfg.max_new_tokens, finished=False)
    parts = scored(prompts, [[answer] * cfg.n] * cfg.batch_prompts)

    def learn() -> None:
        assert learner.reference is not None
        ref_BT = selfemo.logprobs(learner.reference, parts, cfg)
        selfemo.mini_batch(policy, learner, parts, torch.full_like(ref_BT, selfemo.NOT_MEASURED), ref_BT, cfg)
        learner.apply()

    learn()  # makes the moments
    policy.sampler()  # and the copy that samples
    peaks, sample = {}, lambda: sampled(policy.sampler(), prompts, cfg.n, cfg.max_new_tokens)
    for name, work in (("learning", learn), ("sampling", sample)):
        if on_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
        work()
        peaks[name] = processes.peak_memory()["memory/peak_gb"]
        processes.give_back_memory()
    return peaks


@torch.no_grad()
def fill_randomly(policy: Policy, config: Qwen3Config, device: torch.device) -> None:
    """Weights for shards without any, and the buffers that no shard holds, from a small model of the same positions."""
    for parameter in policy.parameters():
        fsdp.local(parameter).normal_(0, 0.02) if parameter.ndim > 1 else fsdp.local(parameter).fill_(1)
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "layer_types": None}
    with device:
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**{**config.to_dict(), **small}), attn_implementation=ATTENTION)
    fsdp.copy_buffers(Policy(lm), policy)


# Two ranks, one killed


def ranks(device: torch.device) -> Iterator[Row]:
    """Two ranks share a model on one GPU; one is killed while the other waits for it in a collective."""
    context = multiprocessing.get_context("fork")  # nothing has touched CUDA in this process
    ours, theirs = context.Pipe(duplex=False)
    port, config = free_port(), qwen_config("", torch.device("cpu"), layers=2)
    both = [context.Process(target=one_of_two, args=(rank, port, config, device, theirs)) for rank in (0, 1)]
    for process in both:
        process.start()
    theirs.close()
    found = [ours.recv() for _ in both]
    if refused := next((said for said in found if isinstance(said, str)), ""):
        for process in both:
            process.kill()
        yield row("two ranks on one GPU: seconds that one outlives the other", 0, "<", 60, skip=f"NCCL refuses: {refused}")
        return
    yield row("gradient norm of two ranks, apart", abs(found[0] - found[1]), "=", 0)
    both[1].join()
    killed = time.monotonic()
    both[0].join()
    yield row("one killed (9): seconds that the other outlives it", time.monotonic() - killed, "<", 60)
    yield row("exit status of the killed one", both[1].exitcode or 0, "=", -signal.SIGKILL)
    yield row("exit status of the other", both[0].exitcode or 0, "=", 1)


def one_of_two(rank: int, port: int, config: Qwen3Config, device: torch.device, pipe: Connection) -> None:
    """In a process: the gradient norm of shards goes into the pipe, or why NCCL will not have two ranks on one GPU."""
    here = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    # NCCL refuses two ranks on one GPU of one machine. With names of their own for it they meet over sockets.
    here |= {"MASTER_PORT": port, "NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in here.items()})
    with processes.processes():
        try:
            policy = fsdp.sharded(config, compute=processes.computing("auto"), where=device)
        except dist.DistBackendError as error:
            if REFUSED in str(error):
                pipe.send(str(error).splitlines()[-1])
            raise
        torch.manual_seed(rank)
        fill_randomly(policy, config, device)
        policy([Group([1, 2, 3 + rank], [[4, 5], [6]])])[0].sum().backward()
        pipe.send(fsdp.clip_gradients(policy, 1.0))
        processes.wait()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        never = torch.ones(1, device=device)
        dist.all_reduce(never)
        never.item()


REFUSED = "Duplicate GPU"  # what NCCL says
