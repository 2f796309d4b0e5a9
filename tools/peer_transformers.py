"""Plain transformers `generate` as a side of tools.bench: left padding, one row an answer, every answer of full length."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.peer import Found, Job, serve, timed


def open_side(model: str, dtype: str) -> Any:
    """Open the model."""
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    lm.generation_config.update(eos_token_id=None, pad_token_id=0, top_k=None, top_p=None)

    def run(job: Job) -> Found:
        width = max(map(len, job["prompts"]))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in job["prompts"]])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in job["prompts"]])
        settings = {"max_new_tokens": job["max_new_tokens"], "num_return_sequences": job["n"]}
        seconds, out = timed(lambda: lm.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, **settings))
        return {"seconds": seconds, "tokens": len(out) * (out.shape[1] - width)}

    return run


if __name__ == "__main__":
    serve(["transformers", "torch"], open_side)
