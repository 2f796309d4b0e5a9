"""Kinds of command-line flags that several commands share."""

from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from common.errors import UserError


def number(value: str) -> int:
    """A positive number of a NAME=N flag. Raises `UserError`."""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--limit wants NAME=N with N a positive whole number, not {value!r}")
    return int(value)


Switch = Annotated[
    bool,
    tyro.conf.FlagConversionOff,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="true|false",
        instance_from_str=lambda args: {"true": True, "false": False}[args[0].lower()],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: ["true" if value else "false"],
        choices=("true", "false"),
    ),
]
Pairs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Dtype = Literal["auto", "float32", "bfloat16"]


def roots(given: Sequence[str]) -> dict[str, str]:
    """The folder of each dataset, from --data. Raises `UserError` where none is given."""
    if not given:
        raise UserError("no data: give --data NAME=DIR, for example --data meld=data/meld")
    return pairs("data", given)


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE flags as a mapping. Raises `UserError` for a malformed or a repeated one."""
    found: dict[str, str] = {}
    for entry in values:
        name, _, value = entry.partition("=")
        if not name or not value or name in found:
            raise UserError(f"--{flag} {entry}: give NAME=VALUE, every name once")
        found[name] = value
    return found
