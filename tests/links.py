"""Line links of the documents: `file.name`, test ids and equations, each to the line where it stands.

    python -m tests.links            say which links are missing or lead to another line; exit status 1 if any
    python -m tests.links --write    renew all of them

In text, `grpo.iou`, `tools.report.page` and `tests/test_grpo.py::test_x` become links to the line of the def, class or
assignment, and "[Eq. (10)]()" one to the comment "# Eq. (10)" of the code. Whatever a link led to before is replaced.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from common.errors import UserError, command

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("PAPER.md", "docs/curves.md")
CODE = re.compile(r"\w+(?:\.[A-Za-z_]\w*)+")
TEST = re.compile(r"(tests/\w+\.py)::(\w+)")
NAME = re.compile(r"\[?`([^`\n]+)`(?:\]\([^)\s]*\))?")
EQUATION = re.compile(r"\[(Eq\. \(\d+\)(?:, (?:left|right))?)\]\([^)\s]*\)")


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
    """ "Eq. (13), left" -> file and line of the comment that opens with it."""
    comments = {}
    for path in sorted(ROOT.glob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if match := re.match(r" *# (Eq\. \(\d+\)(?:, (?:left|right))?):", line):
                comments[match[1]] = (path.name, number)
    return comments


def place(name: str) -> tuple[str, int] | None:
    """File and line of what a document calls `name`; None if it is no name of the code or of a test."""
    candidates: list[tuple[str, str]] = []  # file, and what it should hold
    if match := TEST.fullmatch(name):
        candidates = [(match[1], match[2])]
    elif CODE.fullmatch(name):
        parts = name.split(".")
        candidates = [(f"{'/'.join(parts[:n])}.py", ".".join(parts[n:])) for n in (1, 2)]  # at the root, in a room
    return next(((file, found(file)[wanted]) for file, wanted in candidates if wanted in found(file)), None)


def linked(text: str, up: str) -> str:
    """A document with all its links renewed; `up` leads from its folder to the root. Blocks of code stay as they are."""

    def name(match: re.Match[str]) -> str:
        where = place(match[1])
        return match[0] if where is None else f"[`{match[1]}`]({up}{where[0]}#L{where[1]})"

    def equation(match: re.Match[str]) -> str:
        where = comments.get(match[1])
        return match[0] if where is None else f"[{match[1]}]({up}{where[0]}#L{where[1]})"

    comments = equations()
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else EQUATION.sub(equation, NAME.sub(name, part)) for i, part in enumerate(parts))


def stale(document: str) -> list[str]:
    """What `--write` would change in a document, a line each."""
    old = (ROOT / document).read_text(encoding="utf-8")
    new = linked(old, "../" * document.count("/"))
    pairs = zip(old.split("\n"), new.split("\n"), strict=True)
    changed = [(n, set(links(b)) - set(links(a))) for n, (a, b) in enumerate(pairs, 1) if a != b]
    return [f"{document}:{n}: should be {', '.join(sorted(wanted))}" for n, wanted in changed]


def links(line: str) -> list[str]:
    """All links of a line."""
    return re.findall(r"\[[^\]]*\]\([^)]*\)", line)


def main(argv: Sequence[str]) -> int:
    """Say what is stale, or renew it. 1: something is stale."""
    if argv not in ([], ["--write"]):
        raise UserError("usage: python -m tests.links [--write]")
    problems = [problem for document in DOCUMENTS for problem in stale(document)]
    for document in DOCUMENTS if argv else ():
        path = ROOT / document
        path.write_text(linked(path.read_text(encoding="utf-8"), "../" * document.count("/")), encoding="utf-8")
    done = "renewed" if argv else "to renew: python -m tests.links --write"
    print("\n".join([*problems, f"{len(problems)} lines {done}"]))
    return 1 if problems and not argv else 0


if __name__ == "__main__":
    sys.exit(command(lambda: main(sys.argv[1:])))
