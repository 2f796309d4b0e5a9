"""Opening Hugging Face folders: tokenizers, stop tokens, and what is wrong with a folder in one line."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common.errors import UserError
from common.files import SUMS, listed, names, unlike
from common.template import check_template


def check_model(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raise `UserError` where a model folder has SHA256SUMS and a file is not what was written. Others have no such file."""
    if (folder / SUMS).exists():
        sums = listed(folder)
        if bad := unlike(folder, sums, filter(wanted, names(folder, sums))):
            mend = f"restore it, or delete {folder / SUMS} if it was changed on purpose"
            raise UserError(f"{folder / bad[0]} is not what was written (SHA-256): {mend}")


def check_place(path: str | Path) -> None:
    """Raise `UserError` for what is neither a folder nor looks like a hub name."""
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        raise UserError(f"{path} does not exist: give a Hugging Face folder or a hub name")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn a library's failure to open something into one clear `UserError` that opens with `what`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "give a Hugging Face folder (config.json, *.safetensors, tokenizer) or a hub name"
        raise UserError(f"{what}: {first}; {mend}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises `UserError` where it is missing or has no chat template that works."""
    check_place(path)
    check_model(Path(path), lambda name: not name.endswith(".safetensors"))
    with user_errors(f"cannot open the tokenizer {path}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {path} has no chat template: use a chat model, or add chat_template.jinja")
    check_template(tokenizer)
    return tokenizer


def eos_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every stop token a model names: config, generation_config and tokenizer (Qwen3 has two). Nothing else is read."""
    ids: set[int] = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    with user_errors(f"cannot read the configuration of {path}"):
        named = [AutoConfig.from_pretrained(str(path)).eos_token_id, generation_eos(path)]
    for value in named:
        ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    if not ids:
        raise UserError(f"the model {path} names no end-of-sequence token: set eos_token in its tokenizer")
    return frozenset(ids)


def generation_eos(path: str | Path) -> int | list[int] | None:
    """`eos_token_id` of generation_config.json, where there is one; its sampling settings are ignored (D19)."""
    try:
        return GenerationConfig.from_pretrained(str(path)).eos_token_id  # type: ignore[no-any-return]
    except OSError:
        if (Path(path) / "generation_config.json").exists():
            raise
        return None


def quiet_transformers() -> None:
    """No progress bars and notices of the library between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
