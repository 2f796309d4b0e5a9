"""How commands end: silent without a reader, one line for a mistake; a checkpoint is claimed where there is one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import READER_GONE, UserError, command, reason
from engine import batches
from training import folder

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "selfemo.py --help", "data.py stats --data tiny={world}", "evaluate.py --help", "evaluate.py audit {finished}",
    "-m experts --help", "-m tools.report --help",
)  # fmt: skip


def gone_reader(words):
    """(exit status, stderr) of a command whose stdout is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_a_reader_that_has_gone_hears_nothing(place, finished, words):
    """As other Unix programs: no word, and the status that a shell shows for SIGPIPE."""
    given = words.format(world=place.root / "world", finished=finished).split()
    assert gone_reader(given) == (READER_GONE, "")


def test_errors_into_a_closed_pipe_are_silent_too():
    """2>&1 | head -0: the line that says the mistake has no reader either."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "data.py", "stats"], cwd=ROOT, stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == READER_GONE


def test_every_program_of_the_tree_ends_that_way():
    """Whatever can be started imports `command`, or hands its work to a file that does."""
    programs = [path for path in ROOT.rglob("*.py") if "__main__" in path.read_text() and ".venv" not in path.parts]
    found = {}
    for path in programs:
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
            found[str(path.relative_to(ROOT))] = "command" in names
    assert len(found) > 10
    # training/launch.py does it for selfemo.py; a peer speaks to tools.bench alone, and a server to its clients
    others = {"selfemo.py", "tools/peers.py", "tests/endpoint.py"}
    assert {name for name, does in found.items() if not does} == others


def fails(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "kept", "status", "said"),
    [
        (UserError("no such label"), "answers", 2, "error: no such label\n"),
        (OSError(28, "No space left", "/x/y"), "", 2, "error: No space left (/x/y)\n"),
        (OSError(28, "No space left", "/x/y"), "answers are kept", 2, "error: No space left (/x/y); answers are kept\n"),
        (KeyboardInterrupt(), "answers are kept", 130, "stopped; answers are kept\n"),
        (KeyboardInterrupt(), "", 130, "stopped\n"),
    ],
)
def test_what_a_command_says(capsys, error, kept, status, said):
    assert command(fails(error), kept) == status
    assert capsys.readouterr() == ("", said)


def test_the_status_of_a_command_is_its_own():
    assert (command(lambda: None), command(lambda: 0), command(lambda: 3)) == (0, 0, 3)
    assert reason(OSError("odd")) == "odd"


# A file error in training


def test_a_file_error_before_a_run_claims_no_checkpoint(place, tmp_path, monkeypatch):
    """/proc cannot hold a run; nothing was begun, so there is nothing to go on from."""
    status, _, complained = place.run(tmp_path / "file" / "run")
    assert status == 0
    (tmp_path / "taken").write_text("")
    status, _, complained = place.run(tmp_path / "taken" / "run")
    assert status == 2
    assert complained.count("\n") == 1
    assert "taken" in complained and "checkpoint" not in complained and "--resume" not in complained


def test_a_file_error_after_the_first_checkpoint_says_how_to_go_on(place, tmp_path, monkeypatch):
    inner, calls = folder.Run.append, iter(range(100))

    def full(run, name, records):
        if name.startswith("rollouts") and next(calls) == 1:
            raise OSError(28, "No space left on device", str(run.out / name))
        return inner(run, name, records)

    monkeypatch.setattr(folder.Run, "append", full)
    status, _, complained = place.run(tmp_path / "run", "--save_every", 1)
    assert status == 2
    assert "No space left on device" in complained and "the last checkpoint is whole" in complained
    assert "--resume" in complained and complained.count("\n") == 1


def test_the_scalars_of_micro_batches_come_to_the_host_in_one_copy(monkeypatch):
    """Two micro-batches of two scalars each: one call of tolist, and the rows in the order of the micro-batches."""
    import torch

    parts = [batches.MicroBatch(i, 3, [], slice(i, i + 1), scale) for i, scale in ((2, 1.0), (0, 1.0), (1, 0.0))]
    copies, inner = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append(tuple(x.shape)) or inner(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("a scalar was copied alone"))
    found = [(p, {"a": torch.tensor(0.1), "b": torch.tensor(float(p.number))}) for p in parts]
    rows = batches.on_host(found)
    assert copies == [(3, 2)]
    assert rows[0] == {"a": pytest.approx(0.1), "b": 0.0} and rows[2]["b"] == 2.0
    assert rows[1] == {"a": 0.0, "b": 0.0}  # another rank counts it
    assert json.dumps(rows)
