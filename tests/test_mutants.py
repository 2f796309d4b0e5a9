"""The list of mistakes fits the code, and the tool tells a mistake that is noticed from one that is not.

The mistakes themselves are tried by `python -m tests.mutants`, in minutes; here they are only made.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = mutants.read(ROOT / "tests/mutants.toml")[1]


@cache
def functions(path):
    """Names of the tests of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_and_no_two_are_alike():
    assert len(ROWS) >= 40
    assert {"grpo.py", "rollout.py", "model.py", "data.py", "selfemo.py"} <= {m.file for m in ROWS}
    assert len({(m.file, m.mistake) for m in ROWS}) == len({(m.file, m.old, m.new) for m in ROWS}) == len(ROWS)


def test_every_mistake_can_be_made_in_one_line_that_python_reads():
    for m in ROWS:
        before = (ROOT / m.file).read_text(encoding="utf-8")
        after, line = m.apply(before)  # raises where the line is not there exactly once
        pairs = enumerate(zip(before.splitlines(), after.splitlines(), strict=True), 1)
        changed = [number for number, (ours, theirs) in pairs if ours != theirs]
        assert changed == [line], m.mistake
        compile(after, m.file, "exec")


def test_every_test_that_a_row_names_exists():
    named = {test for m in ROWS for test in m.tests}
    assert all(m.tests for m in ROWS)
    missing = [t for t in named if re.sub(r"\[.*", "", t).split("::")[1] not in functions(ROOT / t.split("::")[0])]
    assert missing == []


def test_every_decision_has_a_mistake():
    named = {int(number) for m in ROWS for number in re.findall(r"\bD(\d+)\b", m.mistake)}
    assert named == set(range(1, 29))


# An invented project. Its file is called data.py, as one of ours that the tool itself has imported

CODE = "def half(x):\n    return x / 2\n\n\ndef double(x):\n    return x * 2\n"
TESTS = """
import pytest
import data

@pytest.fixture
def four():
    return data.half(8)

@pytest.mark.parametrize("x", [4, 6])
def test_half(x):
    assert data.half(x) == x / 2, "not a half"

def test_double():
    assert data.double(2) == 4

def test_four(four):
    pass

def test_skipped():
    pytest.skip("nothing to see")
"""
HALF, DOUBLE = "tests/test_data.py::test_half", "tests/test_data.py::test_double"
MISTAKES = {
    "killed": ("x / 2", "x / 3", HALF),
    "survivor": ("x * 2", "x + 2", DOUBLE),
    "unreadable": ("x / 2", "x /", HALF),
    "unknown name": ("x * 2", "y * 2", DOUBLE),
    "in a fixture": ("x / 2", "x // 0", "tests/test_data.py::test_four"),
    "crash": ("x * 2", "__import__('os')._exit(3)", DOUBLE),
    "gone": ("x * 3", "x", DOUBLE),
    "two places": ("2", "3", DOUBLE),
    "two lines": ("(x):\n    return x / 2", "(y):\n    return y / 2", HALF),
    "endless": ("x / 2", "__import__('time').sleep(99)", HALF),
    "skipped": ("x / 2", "x / 3", "tests/test_data.py::test_skipped"),
    "unwritten": ("x / 2", "x / 3", "tests/test_data.py::test_unwritten"),
}


@pytest.fixture
def project(tmp_path):
    for folder in ("tests", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data.py").write_text(CODE)
    (tmp_path / "tests/test_data.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    rows = [
        f'[[mutant]]\nfile = "data.py"\nmistake = "{name}"\nold = {old}\nnew = {new}\ntests = ["{test}"]\n'
        for name, (old, new, test) in ((name, (*map(json.dumps, row[:2]), row[2])) for name, row in MISTAKES.items())
    ]
    (tmp_path / "tests/mutants.toml").write_text("preload = []\n" + "".join(rows))
    return tmp_path


def run(project, *words):
    command = [sys.executable, "-m", "tests.mutants", "--file", str(project / "tests/mutants.toml"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_kinds_of_verdicts(project):
    """Only a test that fails in its own body kills: no broken file, fixture or process does. The tree stays as it was."""
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    names = [name for name in MISTAKES if name not in ("endless", "skipped", "unwritten")]
    status, out, _ = run(project, *names, "--json", "--jobs", "2")
    found = {v["mutation"]["mistake"]: v for v in json.loads(out)["mistakes"]}
    assert {name: v["outcome"] for name, v in found.items()} == {
        "killed": "killed", "survivor": "SURVIVED", "unreadable": "BROKEN", "unknown name": "BROKEN",
        "in a fixture": "BROKEN", "crash": "BROKEN", "gone": "STALE", "two places": "STALE", "two lines": "STALE",
    }  # fmt: skip
    assert (status, json.loads(out)["noticed"]) == (1, 1)
    killed = found["killed"]
    assert (killed["mutation"]["file"], killed["line"], killed["by"]) == ("data.py", 2, f"{HALF}[4]")
    assert killed["why"] == "AssertionError: not a half"
    assert "SyntaxError" in found["unreadable"]["why"]
    assert "ended with 3" in found["crash"]["why"]
    assert found["gone"]["why"] == "the line occurs 0 times in the file"
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_all_noticed_is_status_0_and_a_hang_is_named(project):
    status, out, _ = run(project, "killed", "endless", "--timeout", "4")
    assert status == 0
    first, second, third, last = out.splitlines()
    assert first.startswith("2 tests pass without a mistake")
    assert second.startswith("killed ") and "data.py:2" in second and second.endswith(f"{HALF}[4]")
    assert third.startswith("timeout ") and "endless" in third
    assert last.startswith("2 of 2 mistakes are noticed")


def test_nothing_can_be_said_where_tests_fail_without_a_mistake(project):
    for word, said in (("skipped", "nothing of tests/test_data.py::test_skipped passed"), ("unwritten", "::test_unwritten")):
        status, _, complained = run(project, word)
        assert (status, complained.count("\n")) == (2, 1)
        assert said in complained
    (project / "data.py").write_text(CODE.replace("x / 2", "x / 2.5"))
    status, _, complained = run(project, "survivor", "killed")
    assert (status, complained.count("\n")) == (2, 1)
    assert f"nothing can be said, on the unchanged tree {HALF}[4] fails: AssertionError: not a half" in complained


def test_a_list_that_cannot_be_read_and_a_word_that_nothing_has(project):
    for words, said in ((("--file", str(project / "none.toml")), "none.toml"), (("nothing",), "no mistake has nothing")):
        status, _, complained = run(project, *words)
        assert (status, complained.count("\n")) == (2, 1)
        assert said in complained
