"""The start and the end of a run's process: settings, opening, signals, and what is said when something goes wrong."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers

from common.errors import UserError, command, reason
from common.hub import quiet_transformers, read_config
from engine.fast import multiplies_bf16
from engine.fsdp import compile_blocks, open_policy
from engine.processes import PeerLost, announce, complain, computing, exchange, processes, rank, relaunch, wait
from engine.shards import read_part, weights
from experts.asking import open_experts
from model import Policy, check_architecture, few_threads
from toy import base
from training.config import MAY_DIFFER, PRESETS, Config, parse
from training.folder import Run, Stopped, alone, newest_checkpoint, open_run
from training.plan import plan
from training.records import check_prompts
from training.task import NotFinite, Task, open_task

Algorithm = Callable[[Run, Task, Policy], Policy]


def main(argv: Sequence[str], algorithm: Algorithm) -> int:
    """Run a command line; returns the exit status.

    0: done, or saved after a signal; 1: another rank is lost; 2: a mistake of the user's, or a file error; 3: a number was
    not finite; 130: stopped at once.
    """
    return command(lambda: start(argv, algorithm))


def start(argv: Sequence[str], algorithm: Algorithm) -> int:
    """What `main` does; every failure is one line that says how to go on."""
    again, cfg = relaunch(argv), None
    try:
        cfg = parse(argv)
        if cfg.plan is not None:
            announce(plan(cfg))
            return 0
        with processes(cfg.dtype):
            finished = train(cfg, algorithm)
        if not finished:
            announce(f"saved; go on with: {again}")
        return 0
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"stopped at once{going_on(cfg, again)}")
        return 130
    except NotFinite as error:
        complain(f"error: {error}; nothing was trained on it; lower --lr and go on with: {again}")
        return 3
    except torch.OutOfMemoryError as error:
        complain(f"error: out of memory ({str(error).splitlines()[0]}); see --plan; then go on with: {again}")
        return 2
    except PeerLost as error:
        complain(f"error: {error}{going_on(cfg, again)}", lost=True)
        return 1
    except BrokenPipeError:
        raise  # the reader of our output has gone: no word, see `command`
    except OSError as error:
        complain(f"error: {reason(error)}{going_on(cfg, again)}")
        return 2


def going_on(cfg: Config | None, again: str) -> str:
    """How to go on, if there is a checkpoint to go on from."""
    there = cfg is not None and newest_checkpoint(Path(cfg.out)) is not None
    return f"; the last checkpoint is whole, go on from it with: {again}" if there else ""


def train(cfg: Config, algorithm: Algorithm) -> bool:
    """One run from start to end, or from its newest checkpoint to the end. False: a signal stopped it and it is saved."""
    if cfg.model == PRESETS["toy"].model and exchange(not Path(cfg.model).exists())[0]:
        announce("building the toy world in data/toy (once)")
        if rank() == 0:
            base.build()
        wait()
    quiet_transformers()
    if cfg.cold_start == "expert" and not (Path(cfg.out) / "cold_start.jsonl").exists():
        open_experts(cfg.expert, cfg.expert_model)  # what is wrong there is said before anything is written
    check_architecture(read_config(cfg.model), cfg.model, cfg.max_prompt_tokens + cfg.max_new_tokens)
    task = open_task(cfg)
    cfg = task.cfg
    policy = open_policy(cfg.model, dtype=cfg.dtype, activation_checkpointing=cfg.activation_checkpointing)
    few_threads(policy)
    if policy.device.type == "cpu" and computing(cfg.dtype) == torch.bfloat16 and not multiplies_bf16():
        announce("this processor has no bf16 instructions: --dtype float32 is some ten times faster on it")
    if cfg.compile:
        compile_blocks(policy)
    settings = {**asdict(cfg), "S": task.S, "T": cfg.iterations * task.S, "versions": versions(cfg)}
    settings = json.loads(json.dumps({**settings, "prompt_sums": task.prompt_sums}))
    free, check = MAY_DIFFER | {"prompt_sums"}, partial(check_prompts, task)
    with alone(Path(cfg.out)):
        run = open_run(Path(cfg.out), settings, resume=cfg.resume, may_differ=free, check=check)
        return work(run, algorithm, task, policy)


def work(run: Run, algorithm: Algorithm, task: Task, policy: Policy) -> bool:
    """Go through the algorithm from where the run stands. False where a signal stopped it."""
    if run.loaded is not None:
        read_part(run.loaded, "weights", weights(policy))
        run.say(f"going on from {run.loaded}")
    with run.signals():
        try:
            algorithm(run, task, policy)
        except NotFinite:
            run.rescue(policy)
            raise
        except Stopped:
            return False
    run.say(f"done: the model is in {run.out / 'model'}; check the run with: python evaluate.py audit {run.out}")
    return True


def versions(cfg: Config) -> dict[str, str]:
    """What the numbers of a run were made with; `dtype` is what --dtype auto came to."""
    computed = str(computing(cfg.dtype)).removeprefix("torch.")
    names = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {**names, "threads": str(torch.get_num_threads()), "dtype": computed}
