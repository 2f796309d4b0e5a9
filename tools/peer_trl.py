"""TRL's GRPOTrainer as a side of tools.bench: whole RL steps, told apart into generation with scoring, and update."""

import os
import tempfile
import time
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tools.peer import Found, Job, serve


class Clock(TrainerCallback):
    """Wall time of every optimizer step."""

    def __init__(self) -> None:
        """No step yet."""
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is at hand; generation comes first."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        self.steps.append(time.perf_counter() - self.started)


class Timed(GRPOTrainer):  # type: ignore[misc]
    """The trainer, with a clock around what comes before the update."""

    generate_s = 0.0
    score_s = 0.0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.generate_s += time.perf_counter() - started
        return result

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super()._generate_and_score_completions(*args, **kwargs)
        self.score_s += time.perf_counter() - started
        return result


def open_side(model: str, dtype: str) -> Any:
    """Open the tokenizer; the trainer is built for each job. dtype bfloat16 means autocast over float32 weights."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def run(job: Job) -> Found:
        prompts = [tokenizer.decode(ids) for ids in job["prompts"]]
        answers, micro = len(prompts) * job["n"], job["micro_batch"]
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
            trainer = Timed(
                lm, lambda completions, **_: [float(i % 3) for i in range(len(completions))], args,
                Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[clock],
            )  # fmt: skip
            trainer.train()
        (seconds,) = clock.steps
        parts = {"generate_s": trainer.generate_s, "score_s": trainer.score_s - trainer.generate_s}
        parts["update_s"] = seconds - trainer.score_s
        return {"seconds": seconds, "tokens": answers * job["max_new_tokens"], **parts}

    return run


if __name__ == "__main__":
    serve(["trl", "transformers", "torch"], open_side)
