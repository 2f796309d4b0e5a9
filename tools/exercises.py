"""A folder of exercises: the project's own code with the bodies of some functions empty, and tests that say which are right.

    python -m tools.exercises OUT
    cd OUT && python -m pytest

The folder needs nothing beside it but the packages of requirements.txt. docs/course.md says how a class uses it.
"""

import ast
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from common.errors import UserError, command

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tools/exercise_tests"

HINTS = {  # "file.function": what stays in its place, in the order of the exercises
    "grpo.normalised": "refuse weights without a share first, then divide each by math.fsum of all.",
    "grpo.iou": "normalise both sides. Over all emotions that either side names, sum smaller shares and larger ones.",
    "grpo.reward": "0.0 for None, else iou and RULE_BONUS.",
    "grpo.core_emotions": "collect the shares of every emotion over the answers that are not None; sum each with math.fsum; "
        "sorted() with a key of (-sum, -number of shares, name) puts the core in order; its shares are over its own sum.",
    "grpo.consistency": "take the core of the group; for each answer, count core emotions among its keys, over CORE_SIZE.",
    "grpo._z_scores": "ValueError for fewer than 2 values; exactly 0.0 for each of equal ones; else (value - mean) / (std + "
        "STD_EPS) with the sample standard deviation, which divides by n - 1. math.fsum sums exactly.",
    "grpo.advantages": "_rows makes lists of either input; walk through both with zip(..., strict=True); one row per group "
        "is _z_scores of the rewards plus lam times _z_scores of the consistencies; a tensor of dtype float64.",
    "grpo.policy_loss": "put 0 in both log-probs where the weight is 0, before you subtract; detach the old ones; for "
        "'sequence', sum the log-ratios of a row and expand them; clamp to +-LOG_RATIO_MAX before exp(). Then the smaller "
        "of ratio * A and clipped ratio * A, weighted, summed, negated. Metrics are detached.",
    "grpo.low_var_kl": "d is the reference (detached) minus the policy, cut at +-LOG_RATIO_MAX; cut the value at K3_MAX.",
    "data._parse": "raise Broken(reason, detail) for the first thing wrong from the left: unfinished; too_long; think "
        "(THINK finds the block, clean() of blank text is ''); then Scanner(text, where the block ends). `for key in "
        "scanner.entries()` gives each key, and you read its value: scanner.string(reason=key) for my_output, read_emotions "
        "for the others. Note scanner.position before and after, for the spans. Reasons left: duplicate, keys, my_output "
        "(blank), trailing (SIGN finds a sign after the end).",
    "data.read_emotions": "`for name in scanner.entries(reason=key)` gives each name; small() makes it comparable with the "
        "labels; scanner.take(WORD, 'a number', reason='weight') gives the text of its weight, which NUMBER must match "
        "fully. Raise Broken(reason, detail) with the reasons duplicate, label, weight, or key (none, or more than three).",
    "data.best": "among the indices of valid answers (isinstance(parse, Output)), max() with a key and a default.",
    "data.select": "ask best(); then keep_reward; then new_sample, which gives a Sample or a reason; then fits().",
    "data.new_sample": "the next responder is the latest speaker in the context who is somebody else and no group "
        "(is_group); drop feelings outside sample.labels; replace(sample, ...) makes the copy: id, context, gold, responder "
        "(kind 'swap'), following, origin, parent, iteration, depth.",
    "minimal.update": "cut the groups into mini-batches of cfg.mini_batch_prompts, and each into (prompt_ids, answer ids) "
        "pairs. Before the first optimizer step, and without gradients, take token_logprobs of all mini-batches under lm "
        "(the old ones) and under the reference. Then, for each mini-batch: token_weights(lengths, 'token', T), new "
        "token_logprobs, policy_loss, plus cfg.kl_coef times the weighted low_var_kl; descend() makes the step.",
}  # fmt: skip

README = """# Exercises

In grpo.py, data.py and minimal.py the bodies of these functions are empty:

{functions}

Each has its docstring, its types and a hint. Fill them in, in any order; `normalised` to `advantages` is a good beginning.
Then ask

    python -m pytest                          all of them
    python -m pytest test_1_rewards.py        those of one file

and read the table at the end: it says of each function whether it is right, not right yet, or empty. The docstring of each
test works its example out by hand. A function that calls an empty one cannot be right yet, and the table says so.

When all are right, `python minimal.py` trains a small model with your code, in about two minutes.

The rest of the code is that of SELF-EMO's reference implementation, unchanged. Packages: `pip install -r requirements.txt`.
"""

SETTINGS = """[pytest]
addopts = -q -rN --tb=short -p no:cacheprovider
pythonpath = .
testpaths = .
markers = exercise(name): the function that a test is about
"""


def needed(start: str) -> list[Path]:
    """The files of ours that a module imports, directly or not, itself among them."""
    found, waiting = set[Path](), [start]
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if not path.is_file():
            path = ROOT.joinpath(*name.split("."), "__init__.py")
        if path.is_file() and path not in found:
            found.add(path)
            waiting += [*imports(path), name.rpartition(".")[0] or name]
    return sorted(found)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file may mean by its imports, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def emptied(source: str, hints: dict[str, str]) -> str:
    """The source of a file with other bodies for the functions that have a hint: docstring, if any, and the hint."""
    lines = source.splitlines(keepends=True)
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in hints]
    for node in reversed(functions):
        first = node.body[0]
        after = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        text = textwrap.wrap(f"{node.name} is still empty. Hint: {hints[node.name]}", 105, break_on_hyphens=False)
        said = [f"        {line + ' ' * (line is not text[-1])!r}\n" for line in text]
        lines[after : node.end_lineno] = ["    raise NotImplementedError(\n", *said, "    )\n"]
    return "".join(lines)


def write(out: Path) -> None:
    """Write the folder. Raises `UserError` where something is there already."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} exists and is not an empty folder: give another one, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{os.getpid()}"
    try:
        for path in [*needed("minimal"), ROOT / "requirements.txt", ROOT / "LICENSE"]:
            target = aside / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        for name in dict.fromkeys(name.partition(".")[0] for name in HINTS):
            file = aside / f"{name}.py"
            hints = {function.partition(".")[2]: hint for function, hint in HINTS.items() if function.startswith(f"{name}.")}
            file.write_text(emptied(file.read_text(encoding="utf-8"), hints), encoding="utf-8")
        for path in [*sorted(TESTS.glob("test_*.py")), TESTS / "conftest.py"]:
            shutil.copyfile(path, aside / path.name)
        listed = "\n".join(f"- `{name}`" for name in HINTS)
        (aside / "README.md").write_text(README.format(functions=listed), encoding="utf-8")
        (aside / "pytest.ini").write_text(SETTINGS, encoding="utf-8")
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def exercises(out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write the exercises into a new folder.

    Args:
        out: Folder to write.
    """
    write(out)
    print(f"{out}: {len(HINTS)} functions to fill in. README.md there says how, and `python -m pytest` which are right")


def main() -> int:
    """Run the command line; see `common.errors.command` for the exit status."""
    return command(lambda: tyro.cli(exercises, prog="python -m tools.exercises"))


if __name__ == "__main__":
    sys.exit(main())
