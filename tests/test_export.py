"""A checkpoint as a Hugging Face folder: the very weights, from a run, from its cold start, from a copy of a checkpoint."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.hub import check_model
from model import Policy
from tools.export import export_checkpoint
from training.folder import newest_checkpoint


def weights_of(folder):
    """As plain transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_newest_checkpoint_of_a_finished_run_is_its_model(run, tmp_path):
    said = export_checkpoint(run, tmp_path / "out")
    assert equal(weights_of(tmp_path / "out"), weights_of(run / "model"))
    assert re.fullmatch(r".*/out: .*/run/checkpoints/\d{3}-\d{6}-\d{8}, started from .*/base", said)
    check_model(tmp_path / "out")


def test_a_copied_checkpoint_knows_its_start_model(run, tmp_path):
    copied = shutil.copytree(newest_checkpoint(run), tmp_path / "kept" / "copy")
    shutil.rmtree(run)
    export_checkpoint(copied, tmp_path / "out")
    check_model(tmp_path / "out")


def test_the_cold_start_is_neither_the_start_nor_the_end(run, place, tmp_path):
    export_checkpoint(run / "cold_start", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert not equal(found, weights_of(place.root / "base")) and not equal(found, weights_of(run / "model"))


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    path = newest_checkpoint(run) / "weights.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match="weights.safetensors is not what was written"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changed", "says"), [({"model": "no/such/folder"}, "does not exist"), ({}, "KeyError 'model'")])
def test_a_start_model_that_cannot_be_opened_leaves_no_folder(run, tmp_path, changed, says):
    settings = {k: v for k, v in json.loads((run / "config.json").read_text()).items() if k != "model"}
    (run / "config.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(UserError, match=says):
        export_checkpoint(run / "cold_start", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_while_a_model_is_written_is_a_file_error(run, tmp_path, monkeypatch):
    """safetensors has an error of its own for it, which no command knows."""

    def full(policy, folder, tokenizer):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Policy, "export", full)
    with pytest.raises(OSError, match="No space left on device"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_said_in_one_line(run, place, tmp_path):
    with pytest.raises(UserError, match="exists: give another --out"):
        export_checkpoint(run, run)
    with pytest.raises(UserError, match="neither a run with a checkpoint nor a checkpoint"):
        export_checkpoint(place.root / "base", tmp_path / "out")
    command = [sys.executable, "-m", "tools.export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
