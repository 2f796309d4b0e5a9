"""The core works with requirements.txt alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = {"hypothesis", "sklearn", "matplotlib", "tensorboard", "openai", "flash_attn", "accelerate"}
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, "")
"""
CORE = """
import runpy
import data, evaluate, grpo, model, rollout
from analysis import clusters, judge, pairing, table1, vectors
from experts import asking, contracts
from toy import base, world
from training import config, folder, metrics, task
assert folder.tensorboard(__import__("pathlib").Path("nowhere")) is None
sys.argv = ["selfemo.py", "--help"]
runpy.run_path("selfemo.py", run_name="__main__")
"""
APART = """
import data
assert "torch" not in sys.modules
import grpo
ours = {"data", "model", "rollout", "selfemo", "evaluate", "engine", "training", "experts", "analysis", "toy", "tools"}
assert ours & sys.modules.keys() == {"data"}
"""


def python(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", ABSENT + code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_core_files_and_help_need_nothing_but_requirements_txt():
    """What only some users install is hidden; the help shows the flags and the paper's values."""
    done = python(CORE)
    assert done.returncode == 0, done.stderr
    for said in ("--preset", "--iterations", "--keep_reward", "--self_play", "Qwen/Qwen3-8B"):
        assert said in done.stdout


def test_what_is_absent_is_really_absent():
    assert python("import tensorboard").returncode == 1


def test_data_has_no_torch_and_equations_have_none_of_our_files():
    done = python(APART)
    assert done.returncode == 0, done.stderr


def test_requirements_are_exact_pins():
    for path in ROOT.glob("requirements*.txt"):
        rows = [row for row in path.read_text().splitlines() if row and not row.startswith(("#", "-r "))]
        assert all("==" in row for row in rows), path.name
