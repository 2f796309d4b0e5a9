"""The exercises: green with the real bodies, red with each single one empty, and with mistakes of students."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tools import exercises

ROOT = Path(__file__).resolve().parent.parent
FILES = ("grpo", "data", "minimal")
MISTAKES = [  # (function, what stands there, what a student may write): the tests of the folder have to notice
    ("grpo.iou", "normalised(prediction), normalised(label)", "prediction, label"),
    ("grpo.iou", "p.keys() | q.keys()", "p.keys()"),
    ("grpo.core_emotions", "normalised(prediction).items()", "prediction.items()"),
    ("grpo.core_emotions", "-len(votes[emotion]), ", ""),
    ("grpo.consistency", "/ CORE_SIZE", "/ max(len(core), 1)"),
    ("grpo._z_scores", "/ (n - 1)", "/ n"),
    ("grpo._z_scores", "std + STD_EPS", "std"),
    ("grpo._z_scores", "if min(values) == max(values):", "if False:"),
    ("grpo.advantages", "z + lam * z2", "z + z2"),
    ("grpo.policy_loss", "loss = -(", "loss = ("),
    ("grpo.policy_loss", "torch.minimum(free_BT, clipped_BT)", "clipped_BT"),
    ("grpo.policy_loss", "old_logp_BT.detach()", "old_logp_BT"),
    ("grpo.policy_loss", "logp_BT.where(on_BT, 0.0) - ", "logp_BT - "),
    ("grpo.low_var_kl", "(ref_logp.detach() - logp)", "(logp - ref_logp.detach())"),
    ("grpo.low_var_kl", ".clamp(max=K3_MAX)", ""),
    ("data.read_emotions", "0.1 <= float(word)", "0 <= float(word)"),
    ("data.read_emotions", "> 3", "> 4"),
    ("data._parse", "or not clean(think[1])", ""),
    ("data.best", "isinstance(parse, Output)", "True"),
    ("data.select", "< keep_reward", "<= keep_reward"),
    ("data.new_sample", "2 * math.fsum(gold.values())", "3 * math.fsum(gold.values())"),
    ("data.new_sample", "Responder(swapped, sample.personas.get(swapped), \"swap\")", "sample.responder"),
    ("minimal.update", "logp_BT = token_logprobs(lm, batch, cfg.temperature)",
     "logp_BT = token_logprobs(lm, batch, cfg.temperature); old_BT = logp_BT.detach()"),
    ("minimal.update", "token_logprobs(reference, batch", "token_logprobs(lm, batch"),
    ("minimal.update", "\"token\", old_BT", "\"sequence\", old_BT"),
    ("minimal.update", "loss + cfg.kl_coef * kl", "loss"),
    ("minimal.update", "cfg.temperature", "1.0"),
]  # fmt: skip
DRIVER = """
import importlib, io, json, contextlib, sys
import pytest

class Plugin:
    def __init__(self):
        self.passed, self.failed = [], {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            (function,) = [value for key, value in report.user_properties if key == "function"]
            if report.failed:
                self.failed.setdefault(function, []).append(str(report.longrepr))
            else:
                self.passed.append(function)

def tested(*files):
    for name in [name for name in sys.modules if name == "conftest" or name.startswith("test_")]:
        del sys.modules[name]
    plugin, said = Plugin(), io.StringIO()
    with contextlib.redirect_stdout(said):
        pytest.main(list(files), plugins=[plugin])
    return {"passed": plugin.passed, "failed": plugin.failed, "said": said.getvalue()}

found = [tested()]
for name, source, path in json.load(sys.stdin):
    file, _, function = name.partition(".")
    module = importlib.import_module(file)
    real = getattr(module, function)
    exec(compile(source, f"{file}.py", "exec"), module.__dict__)
    found.append(tested(path))
    setattr(module, function, real)
json.dump(found, sys.stdout)
"""


def functions(source):
    """Name -> source of every function at the top of a file."""
    return {n.name: ast.get_source_segment(source, n) for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder as a student gets it."""
    out = tmp_path_factory.mktemp("class") / "exercises"
    exercises.write(out)
    return out


@pytest.fixture(scope="module")
def results(folder):
    """What pytest says in the folder: with the real bodies filled in, with each single one empty, with each mistake."""
    empty = {file: (folder / f"{file}.py").read_text(encoding="utf-8") for file in FILES}
    real = {file: functions((ROOT / f"{file}.py").read_text(encoding="utf-8")) for file in FILES}
    for name in exercises.HINTS:
        file, _, function = name.partition(".")
        path = folder / f"{file}.py"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(functions(text)[function], real[file][function]), encoding="utf-8")
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("test_*.py")}
    own = {name: next(file for file, text in texts.items() if f'exercise("{name}")' in text) for name in exercises.HINTS}
    asked = []
    for name, path in own.items():
        file, _, function = name.partition(".")
        asked.append((name, functions(empty[file])[function], path))
    for name, old, new in MISTAKES:
        file, _, function = name.partition(".")
        assert real[file][function].count(old) >= 1, (name, old)
        asked.append((name, real[file][function].replace(old, new), own[name]))
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, input=json.dumps(asked), capture_output=True, text=True, env=clean
    )
    for file, text in empty.items():
        (folder / f"{file}.py").write_text(text, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bodies_are_empty_and_everything_else_is_ours(folder):
    """Docstring and types stay, and one statement that raises the hint; no other line is changed, but for what goes."""
    for file in FILES:
        ours = (ROOT / f"{file}.py").read_text(encoding="utf-8")
        theirs = (folder / f"{file}.py").read_text(encoding="utf-8")
        left = {name.partition(".")[2] for name in exercises.HINTS if name.startswith(f"{file}.")}
        for mine, other in zip(ast.parse(ours).body, ast.parse(theirs).body, strict=True):
            if getattr(mine, "name", "") in left:
                assert ast.get_docstring(mine) == ast.get_docstring(other)
                assert ast.dump(mine.args) == ast.dump(other.args) and ast.dump(mine.returns) == ast.dump(other.returns)
                (statement,) = other.body[1:] if ast.get_docstring(other) else other.body
                assert isinstance(statement, ast.Raise)
                assert statement.exc.args[0].value.startswith(f"{other.name} is still empty. Hint: ")
            else:
                assert ast.dump(mine) == ast.dump(other)


def test_it_holds_all_that_it_imports_and_none_of_the_solutions(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert {"minimal.py", "grpo.py", "data.py", "common/draws.py", "toy/base.py", "corpora/loading.py"} <= names
    assert not {name for name in names if name.startswith(("selfemo", "training", "tests", "evaluate", "analysis", "tools"))}
    for path in folder.rglob("*.py"):
        assert "z + lam * z2" not in path.read_text(encoding="utf-8") and "K3_MAX)" not in path.read_text(encoding="utf-8")


def test_with_the_real_bodies_everything_is_right(results):
    assert results[0]["failed"] == {}
    assert set(results[0]["passed"]) == set(exercises.HINTS)
    assert f"\n{len(exercises.HINTS)} of {len(exercises.HINTS)} right\n" in results[0]["said"]


@pytest.mark.parametrize(("i", "name"), list(enumerate(exercises.HINTS, 1)))
def test_each_empty_body_is_red_and_says_what_to_do(results, i, name):
    """Its own tests fail, with its hint; whoever else fails calls it, and says that it is empty."""
    function = name.partition(".")[2]
    said = [text for texts in results[i]["failed"].values() for text in texts]
    assert name in results[i]["failed"]
    assert all(f"{function} is still empty. Hint: " in text for text in said)
    row = next(line for line in results[i]["said"].splitlines() if line.startswith(f"{name} "))
    assert row.split()[1:] == ["empty"]


@pytest.mark.parametrize("i", range(len(MISTAKES)))
def test_each_mistake_of_a_student_is_red(results, i):
    """The function's own tests say so; it is not called empty."""
    name, _, new = MISTAKES[i]
    found = results[1 + len(exercises.HINTS) + i]
    assert name in found["failed"], new
    row = next(line for line in found["said"].splitlines() if line.startswith(f"{name} "))
    assert row.split()[1:4] == ["not", "right", "yet,"]


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("notes", encoding="utf-8")
    with pytest.raises(UserError, match="is not an empty folder"):
        exercises.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    exercises.write(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "new"}
