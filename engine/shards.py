"""Tensors of a checkpoint. Each part (weights, moments) has one safetensors file per rank (process): the rows of every
weight that this rank holds, its shard. No pickle.

Any number of ranks may read what any other number wrote. Shard i of N holds rows i * C to (i + 1) * C of every weight, where
C is the number of rows divided by N, rounded up; FSDP2 cuts weights in the same way.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import SUMS, listed, names, sha256, sync, text_of, unlike
from engine.fsdp import bounds, local, sharded_over
from engine.processes import exchange, rank, size, wait
from model import Policy


def save_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None = None) -> None:
    """Write a folder that is whole or not there, with one file per part and rank, and the SHA-256 of each file."""
    aside = folder.with_name(f".{folder.name}.tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    wait()
    parts, number, writes = sharded_over()
    own: dict[str, str] = {}
    for part, named in tensors.items() if writes else ():
        path = aside / shard_name(part, number, parts)
        rows = {k: local(v.detach()).cpu().contiguous() for k, v in named.items()}
        with space_errors(path):
            save_file({k: v for k, v in rows.items() if v.numel()}, path)
        sync(path)
        own[path.name] = sha256(path)
    sums = {name: found for part in exchange(own) for name, found in part.items()}
    if rank() == 0:
        if state is not None:
            write(aside / "state.json", json.dumps(state, indent=1))
            sums["state.json"] = sha256(aside / "state.json")
        write(aside / SUMS, text_of(sums))
        sync(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
        sync(folder.parent)
    wait()


def write(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def intact(folder: Path) -> Path:
    """The folder that `save_parts` wrote, if its files have their SHA-256 sums. All ranks must call it, to divide the files.

    Raises `UserError` for a file that is not what was written.
    """
    found = listed(folder)
    bad = [name for part in exchange(unlike(folder, found, names(folder, found)[rank() :: size()])) for name in part]
    if bad:
        mend = "restore it, or start again with another --out"
        raise UserError(f"damaged checkpoint: {folder / bad[0]} is not what was written (SHA-256); {mend}")
    return folder


def shard_name(part: str, number: int, parts: int) -> str:
    """Name of the file of a shard; if a part lies in one file, its name has no number."""
    return f"{part}.safetensors" if parts == 1 else f"{part}-{number + 1:05d}-of-{parts:05d}.safetensors"


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors says of a full disk or a read-only folder as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a failure to read a file of a checkpoint as a `UserError` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        mend = "restore it, or start again with another --out"
        raise UserError(f"unreadable checkpoint {path}: {error}; {mend}") from error


class Shards:
    """One part of a checkpoint, written by any number of ranks. Raises `UserError` where it cannot be read."""

    def __init__(self, folder: Path, part: str) -> None:
        """Open all of its files; nothing is read yet."""
        self.paths = sorted(folder.glob(f"{part}*.safetensors"))
        names = [shard_name(part, number, len(self.paths)) for number in range(len(self.paths))]
        if not names or [path.name for path in self.paths] != names:
            raise UserError(f"unreadable checkpoint {folder}: files of {part} are missing; start again with another --out")
        self.files: list[Any] = []
        for path in self.paths:
            with reading(path):
                self.files.append(safe_open(str(path), framework="pt"))
        self.known = [set(file.keys()) for file in self.files]

    @property
    def names(self) -> set[str]:
        """Names of its tensors."""
        return set().union(*self.known)

    def copy_to(self, name: str, target: Tensor) -> None:
        """Fill this rank's rows of a weight, from all files that hold some of them. Raises `UserError` for another shape."""
        if not target.dim():
            with reading(self.paths[0]):
                target.copy_(self.files[0].get_tensor(name))
            return
        slices = {i: self.files[i].get_slice(name) for i, known in enumerate(self.known) if name in known}
        shapes = [tuple(x.get_shape()) for x in slices.values()]
        if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != tuple(target.shape):
            raise UserError("the checkpoint belongs to another model: give the --model it was made with")
        mine = local(target)
        parts, part, _ = sharded_over() if mine is not target else (1, 0, True)
        first, last = bounds(len(target), parts, part)
        for i, x in slices.items():
            start, stop = bounds(len(target), len(self.files), i)
            low, high = max(first, start), min(last, stop)
            if low < high:
                with reading(self.paths[i]):
                    mine[low - first : high - first] = x[low - start : high - start]


@torch.no_grad()
def read_part(folder: Path, part: str, named: Mapping[str, Tensor]) -> None:
    """Fill weights from one part of a checkpoint. Raises `UserError` where names or shapes do not fit."""
    shards = Shards(folder, part)
    if shards.names != set(named):
        raise UserError("the checkpoint belongs to another model: give the --model it was made with")
    for name, target in named.items():
        shards.copy_to(name, target)


def weights(policy: Policy) -> dict[str, Tensor]:
    """The policy's parameters by name; a parameter that is used twice (tied) stands there once."""
    return dict(policy.named_parameters())


def moments(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, empty before its first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in weights(policy).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_moments(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put saved moments back. Raises `UserError` where they cannot be read or belong to another model."""
    shards, parameters = Shards(folder, "moments"), weights(policy)
    for full_name in sorted(shards.names):
        name, key = full_name.rsplit("/", 1)
        if name not in parameters:
            raise UserError("the checkpoint belongs to another model: give the --model it was made with")
        weight = parameters[name]
        value = torch.zeros((), device=weight.device) if key == "step" else torch.zeros_like(weight)
        shards.copy_to(full_name, value)
        optimizer.state[weight][key] = value
