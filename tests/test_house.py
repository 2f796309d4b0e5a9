"""The house keeps its rules: seven files at the root, rooms in layers, no import circle, nothing too long."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRONT = {"minimal", "selfemo", "grpo", "data", "rollout", "model", "evaluate"}
ROOMS = ("common", "corpora", "engine", "training", "experts", "analysis", "toy", "tools", "tests")
LAYERS = (  # lowest first: a file imports from its own layer or from lower ones
    {"common"}, {"corpora"}, {"data", "grpo"}, {"model"}, {"engine"}, {"rollout"}, {"training", "experts", "toy"},
    {"analysis"}, {"evaluate"}, {"selfemo", "minimal", "toy.__main__"}, {"tools"}, {"tests"},
)  # fmt: skip
ROOMS_OF_COMMANDS = ("experts", "toy", "tools")
MOST_LINES, LONGEST_FUNCTION, NAMES_OF_SELFEMO = 450, 60, 30


def files():
    """Dotted name -> path of every Python file of the product and of the tests."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path, known):
    """Our files that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(known)


def graph():
    known = files()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def layer(name):
    """The layer of a file: its own row in LAYERS, or its room's."""
    own = [i for i, names in enumerate(LAYERS) if name in names]
    return own[0] if own else next(i for i, names in enumerate(LAYERS) if name.partition(".")[0] in names)


def test_the_root_holds_seven_files_and_the_rooms_are_those_of_the_plan():
    assert {path.stem for path in ROOT.glob("*.py")} == FRONT
    rooms = {path.parent.relative_to(ROOT).parts[0] for path in files().values() if path.parent != ROOT}
    assert rooms == set(ROOMS)
    for room in set(ROOMS) - {"tests"}:
        said, *rest = ast.get_docstring(tree(ROOT / room / "__init__.py")), *tree(ROOT / room / "__init__.py").body[1:]
        assert said and len(said.splitlines()) <= 5, room
        assert room == "common" or list(map(ast.unparse, rest)) == ["import common"] * (room in ROOMS_OF_COMMANDS), room


def test_every_command_is_told_of_an_old_python_before_anything_else():
    """Python runs a room's `__init__.py` before its programs; of the files at the root, grpo, model and rollout are none."""
    first = {name: ast.unparse(tree(ROOT / f"{name}.py").body[1]) for name in FRONT}
    assert {name for name, line in first.items() if line == "import common"} == {"data", "evaluate", "minimal", "selfemo"}
    programs = {path for path in files().values() if "if __name__" in path.read_text(encoding="utf-8")}
    rooms = {path.relative_to(ROOT).parts[0] for path in programs if path.parent != ROOT}
    assert rooms - {"tests"} == set(ROOMS_OF_COMMANDS)


@pytest.mark.parametrize("version", [(3, 8, 0), (3, 10, 13)])
def test_an_old_python_is_told_in_one_line(version):
    """All that is read before the check: the programs themselves, the rooms, and `common`, in the grammar of that Python."""
    for path in [*(ROOT / f"{name}.py" for name in FRONT), *ROOT.glob("*/__init__.py"), *ROOT.glob("*/__main__.py")]:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=version[:2])
    said = f"import sys; sys.version_info = {version}; sys.version = '3.x (old)'; import runpy; "
    for program in ("run_path('data.py', run_name='__main__')", "run_module('tools.pictures', run_name='__main__')"):
        done = subprocess.run([sys.executable, "-c", said + "runpy." + program], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: this needs Python 3.11 or newer, and {sys.executable} is 3.x\n"


def test_no_file_imports_from_a_higher_layer():
    assert len(graph()) > 60
    upward = [(a, b) for a, others in graph().items() for b in others if layer(b) > layer(a)]
    assert upward == []


def test_no_import_circle():
    """Also not through an import inside a function. Files without an import of ours go first, then those above them."""
    left = graph()
    while ready := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in ready}
    assert left == {}


def test_what_each_file_of_the_paper_may_know():
    """minimal.py leans on grpo, data and the seeded draws, and on the toy to have something to run."""
    edges = graph()
    assert {name.partition(".")[0] for name in edges["minimal"]} == {"grpo", "data", "common", "toy"}
    assert edges["grpo"] == set()
    assert {name.partition(".")[0] for name in edges["data"]} == {"common", "corpora"}
    light = [path for name, path in files().items() if name.startswith(("corpora", "common.draws")) or name == "data"]
    assert not any("torch" in imported(path) for path in light)


def imported(path):
    """First parts of everything that a file imports, ours or not."""
    names = [alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_selfemo_reads_as_the_paper():
    """It imports modules and few names."""
    names = []
    for node in tree(ROOT / "selfemo.py").body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or node.names[0].name
            if module.partition(".")[0] in FRONT | set(ROOMS):
                names += [alias.name for alias in node.names if alias.name != "common"]  # its check of Python alone
    assert 10 < len(names) <= NAMES_OF_SELFEMO


def test_no_file_and_no_function_is_too_long():
    """A longer function has a comment that says why, on the line of its `def`."""
    assert len((ROOT / "minimal.py").read_text().splitlines()) <= 300
    for name, path in files().items():
        if name.startswith("tests"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MOST_LINES, f"{name} has {len(lines)} lines"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= LONGEST_FUNCTION or "#" in lines[node.lineno - 1], f"{name}.{node.name}: {length} lines"
