"""Opening Hugging Face folders: tokenizers, stop tokens, and what is wrong with a folder in one line."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from common.files import SUMS, listed, names, read_json, unlike
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
    if Path(path).is_file():
        more = GGUF if Path(path).suffix == ".gguf" else ""
        raise UserError(f"{path} is a file: give the Hugging Face folder that it belongs to{more}")
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        raise UserError(f"{path} does not exist: give a Hugging Face folder or a hub name")


FOLDER = "give a Hugging Face folder (config.json, *.safetensors, tokenizer) or a hub name"
GGUF = "; GGUF weights cannot be trained, take the *.safetensors that they were made of"
OTHERS = (  # a file that shows what a folder without a model's config.json is, and what to do
    ("model_index.json", "is a diffusers pipeline: give a causal language model"),
    ("*.gguf", f"holds no *.safetensors: give another folder{GGUF}"),
    ("*.distcp", "is a distributed checkpoint (FSDP, DCP): write it as a Hugging Face folder with what trained it"),
    ("weights*.safetensors", "is a checkpoint of a run: python -m tools.export {path} --out DIR makes a model of it"),
    ("model/config.json", "is a run, its model is a folder of it: give {path}/model"),
    ("rollouts", "is a run that has not ended: python -m tools.export {path} --out DIR makes a model of its checkpoint"),
    ("*/config.json", "is no model but holds some: give {found}"),
    ("*/*/config.json", "is no model but holds some: give {found}"),
    ("tokenizer.json", "holds a tokenizer and no model: give a folder with both"),
)


def check_folder(path: str | Path) -> None:
    """Raise `UserError` where a folder holds something else than a model, and say what, and what to do. Hub names pass."""
    folder = Path(path)
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "its base model")
        merge = f"peft.AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(DIR)"
        mend = f"merge it, {merge}, copy the tokenizer of {base} to DIR, and give DIR"
        done = "if that was done here, delete adapter_config.json"
        raise UserError(f"{path} is a LoRA (PEFT) adapter of {base}, not a whole model: {mend} ({done})")
    if (folder / "modules.json").exists():
        raise UserError(f"{path} is a sentence-transformers encoder, which writes no text: give a causal language model")
    if not folder.is_dir() or has_model(folder):
        return
    for pattern, words in OTHERS:
        if found := min(folder.glob(pattern), default=None):
            raise UserError(f"{path} {words.format(path=path, found=found.parent)}")
    raise UserError(f"{path} holds no model: {FOLDER}")


def has_model(folder: Path) -> bool:
    """Whether a config.json is a model's and not that of a run; one that cannot be read is left to transformers."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or "model_type" in config or "architectures" in config


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn a library's failure to open something, whatever its type, into one clear `UserError` that opens with `what`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers raises nothing but that; a missing package is an ImportError, and so on
        line, mend = first_line(error), FOLDER
        if type(error) is Exception:
            mend = f"a newer version of tokenizers may have written it; {FOLDER}"
        if "custom code" in line:
            mend = "code of a model is never run here, take one that transformers knows by itself"
        raise UserError(f"{what}: {line}; {mend}") from error


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn "out of memory" while a model answers into one `UserError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        mend = "ask for shorter answers (--max_new_tokens), or close what else uses the device"
        raise UserError(f"out of memory: {first_line(error)}; {mend}") from None


def first_line(error: Exception) -> str:
    """What an error says, in one line: its first, with the next where it ends in a colon. KeyErrors and the like say little
    by themselves: their type stands before.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    bare = isinstance(error, LookupError | TypeError | AttributeError | AssertionError | RecursionError) or not said
    return (f"{type(error).__name__} {said}" if bare else said)[:300].rstrip(".;: ")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises `UserError` where it is missing or has no chat template that works."""
    check_place(path)
    check_model(Path(path), lambda name: not name.endswith(".safetensors"))
    if not any(Path(path).glob("tokenizer*")):
        check_folder(path)
    with user_errors(f"cannot open the tokenizer {path}"):
        # False and not the default: that asks at the terminal, whether code of the folder may run
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {path} has no chat template: use a chat model, or add chat_template.jinja")
    check_template(tokenizer)
    return tokenizer


def read_config(path: str | Path) -> PretrainedConfig:
    """The configuration of a model, without its weights. Raises `UserError` for a model that cannot be trained here."""
    check_place(path)
    check_folder(path)
    with user_errors(f"cannot read the configuration of {path}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        if why := unfit(config):
            raise UserError(f"the model {path} {why}")
    return config


def unfit(config: PretrainedConfig) -> str:
    """Why a model cannot be trained here, as far as its configuration tells; "" for one that may be."""
    if getattr(config, "quantization_config", None):
        return "has quantised weights, which cannot be trained: take the model that they were made of"
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "is not a decoder of text alone: take one that is, such as Qwen3"
    return ""


def eos_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every stop token a model names: config, generation_config and tokenizer (Qwen3 has two). Nothing else is read.

    Raises `UserError` where there is none, and where the tokenizer has tokens that the model does not know.
    """
    ids: set[int] = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    config = read_config(path)
    with user_errors(f"cannot read the configuration of {path}"):
        named = [config.eos_token_id, generation_eos(path)]
        if unknown := unknown_tokens(tokenizer, config.get_text_config().vocab_size):
            more = f"{len(unknown)} tokens that the model does not know, one is {unknown[0]!r}"
            raise UserError(f"the tokenizer {path} has {more}: take the tokenizer that the model came with")
    for value in named:
        ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    if not ids:
        raise UserError(f"the model {path} names no end-of-sequence token: set eos_token in its tokenizer")
    return frozenset(ids)


def unknown_tokens(tokenizer: PreTrainedTokenizerBase, V: int) -> list[str]:
    """Tokens beyond a vocabulary of V that a prompt or an answer may have: all but control tokens that nobody writes."""
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.eos_token_id}
    template = str(tokenizer.chat_template)
    return sorted(t for t, i in tokenizer.get_vocab().items() if i >= V and (i not in control or t in template))


def openable(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that can be opened, as far as that shows before any weight is read. Raises `UserError`."""
    tokenizer = load_tokenizer(path)
    eos_ids(path, tokenizer)
    with user_errors(f"cannot open the model {path}"):
        for part in weight_files(Path(path)):
            with safe_open(part, "pt"):  # reads the header: the file is there, and as long as it says
                pass
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read; [] for a hub name and for weights of another kind."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists() or not index.exists():
        if folder.is_dir() and not one.exists() and not any(folder.glob("*.bin")):
            raise FileNotFoundError(f"{one} does not exist")
        return [one] if one.exists() else []
    return [folder / part for part in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


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
