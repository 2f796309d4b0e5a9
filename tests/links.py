"""What the documents say of places: line links of names, test ids and equations, and the README's numbers of lines.

    python -m tests.links            say what is missing or no longer true; exit status 1 if anything is
    python -m tests.links --write    renew all of it

In text, `grpo.iou`, `training.task.Task.lam` (a file of a room) and `tests/test_grpo.py::test_x` become links to the line
of the def, class or assignment. A link with other words has the name in its title, [words](x "tests/test_grpo.py::test_x"):
it fits a narrow table, and shows the name when the pointer rests on it. "[Eq. (10)]()" becomes one to the comment
"# Eq. (10)" of grpo.py or data.py, "[Eq. (11) in minimal.py]()" one to that of minimal.py. Whatever a link led to before is
replaced. In the README's table of files, the number of lines of a row is renewed where it is off by more than a twentieth.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from common.errors import UserError, command

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("PAPER.md", "docs/curves.md", "docs/gpu.md")
FILES = ("minimal", "grpo", "data", "selfemo", "rollout", "model", "evaluate")  # of the root, in reading order
ROOMS = ("common", "corpora", "engine", "training", "experts", "analysis", "toy", "tools", "tests")
CODE = re.compile(rf"((?:(?:{'|'.join(ROOMS)})\.)?\w+)\.([A-Za-z_][\w.]*)")
TEST = re.compile(r"(tests/\w+\.py)::(\w+)")
TITLED = re.compile(r'(\[[^\]\n]+\]\()[^)\s]* "([^"\n]+)"\)')
NAME = re.compile(r"\[?`([^`\n]+)`(?:\]\([^)\s]*\))?")
EQUATION = re.compile(r"\[(Eq\. \(\d+\)(?:, (?:left|right))?(?: in minimal\.py)?)\]\([^)\s]*\)")
ROW = re.compile(r"\| \[(\w+(?:\.py)?)\]\(\1\) \| .* \| ([\d,]+) \|")


def places(path: Path) -> dict[str, int]:
    """Line of everything that a file binds at its top and inside its classes: "name" or "Class.name"."""
    return dict(bound(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def bound(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
    """(name, line) of the statements of a module or a class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from bound(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            yield from ((prefix + name.id, name.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))


@cache
def found(file: str) -> dict[str, int]:
    """`places` of a file of the repository; nothing for one that does not exist."""
    return places(ROOT / file) if (ROOT / file).is_file() else {}


def equations() -> dict[str, tuple[str, int]]:
    """ "Eq. (13), left" or "Eq. (13) in minimal.py" -> file and line of the comment that opens with it."""
    comments = {}
    for file in FILES:
        path = ROOT / f"{file}.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else (), 1):
            if match := re.match(r" *# (Eq\. \(\d+\)(?:, \w+)?):", line):
                name = f"{match[1].partition(',')[0]} in minimal.py" if file == "minimal" else match[1]
                comments[name] = (path.name, number)
    return comments


def lines_of(where: str) -> int:
    """How many lines the .py files of a room have, or a file of the root."""
    paths = [ROOT / where] if where.endswith(".py") else (ROOT / where).glob("*.py")
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def counted(readme: str) -> str:
    """The README with the numbers of lines renewed that are off by more than a twentieth."""

    def row(match: re.Match[str]) -> str:
        said, found = int(match[2].replace(",", "")), lines_of(match[1])
        return match[0] if abs(said - found) <= found / 20 else f"{match[0][: -len(match[2]) - 2]}{found:,} |"

    return ROW.sub(row, readme)


def place(name: str) -> tuple[str, int] | None:
    """File and line of what a document calls `name`; None if it is no name of the code or of a test."""
    if match := TEST.fullmatch(name):
        file, wanted = match[1], match[2]
    elif match := CODE.fullmatch(name):
        file, wanted = f"{match[1].replace('.', '/')}.py", match[2]
    else:
        return None
    line = found(file).get(wanted)
    return None if line is None else (file, line)


def linked(text: str, up: str) -> str:
    """A document with all its links renewed; `up` leads from its folder to the root. Blocks of code stay as they are."""

    def name(match: re.Match[str]) -> str:
        where = place(match[1])
        return match[0] if where is None else f"[`{match[1]}`]({up}{where[0]}#L{where[1]})"

    def titled(match: re.Match[str]) -> str:
        where = place(match[2])
        return match[0] if where is None else f'{match[1]}{up}{where[0]}#L{where[1]} "{match[2]}")'

    def equation(match: re.Match[str]) -> str:
        where = comments.get(match[1])
        return match[0] if where is None else f"[{match[1]}]({up}{where[0]}#L{where[1]})"

    def renew(part: str) -> str:
        return EQUATION.sub(equation, NAME.sub(name, TITLED.sub(titled, part)))

    comments = equations()
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else renew(part) for i, part in enumerate(parts))


def renewed(document: str) -> str:
    """What a document should say."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return counted(text) if document == "README.md" else linked(text, "../" * document.count("/"))


def stale(document: str) -> list[str]:
    """What `--write` would change in a document, one line per change."""
    pairs = zip((ROOT / document).read_text(encoding="utf-8").split("\n"), renewed(document).split("\n"), strict=True)
    changed = [(n, set(parts(b)) - set(parts(a))) for n, (a, b) in enumerate(pairs, 1) if a != b]
    return [f"{document}:{n}: should be {', '.join(sorted(wanted))}" for n, wanted in changed]


def parts(line: str) -> list[str]:
    """All links of a line, and the number at the end of a row."""
    return re.findall(r"\[[^\]]*\]\([^)]*\)|(?<=\| )[\d,]+(?= \|$)", line)


def main(argv: Sequence[str]) -> int:
    """Run the command line. 1: something is stale."""
    if argv not in ([], ["--write"]):
        raise UserError("usage: python -m tests.links [--write]")
    documents = ("README.md", *DOCUMENTS)
    problems = [problem for document in documents for problem in stale(document)]
    for document in documents if argv else ():
        (ROOT / document).write_text(renewed(document), encoding="utf-8")
    done = "renewed" if argv else "to renew: python -m tests.links --write"
    print("\n".join([*problems, f"{len(problems)} lines {done}"]))
    return 1 if problems and not argv else 0


if __name__ == "__main__":
    sys.exit(command(lambda: main(sys.argv[1:])))
