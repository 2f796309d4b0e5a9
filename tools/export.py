"""A checkpoint as an ordinary Hugging Face folder, such as `evaluate.py score --model` and vLLM open.

    python -m tools.export runs/paper --out DIR                    the newest checkpoint of a run, finished or not
    python -m tools.export runs/paper/cold_start --out DIR         the model after the cold start
    python -m tools.export COPY --out DIR                          a copy of a checkpoint made while the run went on

The weights are compared with their SHA-256 before, and the folder is opened again after.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.errors import UserError, command
from common.files import SUMS, build_records, read_json
from common.hub import load_tokenizer, quiet_transformers
from engine.shards import intact, read_part, weights
from model import Policy
from training.export import export
from training.folder import newest_checkpoint


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face folder."""

    source: tyro.conf.Positional[Path]  # Folder of a run, or of one of its checkpoints, or its cold_start.
    out: Path  # Folder to write.


def checkpoint_of(source: Path) -> tuple[Path, str]:
    """The folder that holds the weights, and the start model that they belong to. Raises `UserError`."""
    folder = source if (source / SUMS).exists() and any(source.glob("weights*.safetensors")) else newest_checkpoint(source)
    if folder is None:
        raise UserError(f"{source} is neither a run with a checkpoint nor a checkpoint")
    state = intact(folder) / "state.json"  # cold_start/ has none
    file = state if state.exists() else folder.parent / "config.json"
    (model,) = build_records(file, [read_json(file)], lambda known: str(known.get("settings", known)["model"]))
    return folder, model


def export_checkpoint(source: Path, out: Path) -> str:
    """Write the weights of `checkpoint_of` to a new folder and say so. Raises `UserError`."""
    if out.exists():
        raise UserError(f"{out} exists: give another --out")
    folder, model = checkpoint_of(source)
    tokenizer, policy = load_tokenizer(model), Policy.load(model)
    read_part(folder, "weights", weights(policy))
    out.parent.mkdir(parents=True, exist_ok=True)
    export(out, policy, tokenizer)
    return f"{out}: {folder}, started from {model}"


def main() -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    quiet_transformers()
    return command(lambda: print(export_checkpoint(**vars(tyro.cli(Export)))))


if __name__ == "__main__":
    sys.exit(main())
