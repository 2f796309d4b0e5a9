"""The toy world's commands.

    python -m toy build
    python -m toy baselines
    python -m toy gold_sft
"""

import sys

import tyro

from common.errors import command
from common.hub import quiet_transformers
from toy.base import build
from toy.baselines import baselines, gold_sft


def main() -> int:
    """Run a command: build, baselines or gold_sft; see `common.errors.command` for the exit status."""
    quiet_transformers()
    commands = {"build": build, "baselines": baselines, "gold_sft": gold_sft}
    return command(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m toy", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
