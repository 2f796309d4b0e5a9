"""The policy as an ordinary Hugging Face folder, checked by opening it again."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from common.files import write_sums
from engine.processes import rank
from engine.shards import space_errors
from model import Group, Policy


def export(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """The policy as a Hugging Face folder, checked by opening it again. Raises RuntimeError if it says other things."""
    whole = policy.sampler()
    if rank() > 0:
        return
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with space_errors(aside):
        whole.export(aside, tokenizer)
    write_sums(aside)
    V = whole.lm.config.get_text_config().vocab_size
    group = [Group([3 % V, 5 % V, 7 % V], [[11 % V, 13 % V]])]
    with torch.no_grad():
        again = Policy(Policy.load(aside, whole.lm.dtype, whole.device).lm, whole.layout_of)  # other kernels round otherwise
        same = torch.allclose(whole(group)[0], again(group)[0], atol=1e-4)
    if not same:  # a tolerance: kernels may differ in the last bits, and a finished run must not fail for them
        raise RuntimeError(f"{aside} does not reload with equal log-probs")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
