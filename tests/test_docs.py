"""The documents tell the truth: what README.md, PAPER.md, CHANGELOG.md and docs/ name exists; what must be there is."""

import ast
import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import links
import pytest

import data
from corpora import loading
from corpora.dialogue import SPLITS
from training import config, metrics

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "data", "expert", "runs", "measuring", "curves", "by-hand", "speed", "smollm2", "architectures", "evidence", "gpu",
    "course",
)  # fmt: skip
PAGES = tuple(f"docs/{name}.md" for name in NAMES)
DOCUMENTS = ("README.md", "PAPER.md", "CHANGELOG.md", *PAGES)
LATER = "not built yet"

# Reading documents and code


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def present(document):
    """A document without what is history: in the change log, old entries, and the columns of what was called otherwise."""
    whole = text(document)
    if document != "CHANGELOG.md":
        return whole
    newest = whole.partition("\n### Before the move\n")[0]
    assert newest != whole
    return re.sub(r"^\|[^|]*\|", "|", newest, flags=re.MULTILINE)


def section(document, title):
    """The part of a document under the heading `title`, up to the next one of the same depth or less."""
    lines = text(document).splitlines()
    first = lines.index(title)
    depth = title.index(" ")
    rest = (i for i, line in enumerate(lines) if i > first and re.match(rf"#{{1,{depth}}} ", line))
    return "\n".join(lines[first + 1 : next(rest, len(lines))])


def rows(part):
    """The cells of every row of the tables in a text, heads and rules left out."""
    found = []
    for line in part.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.append(cells)
    heads = {i for i, cells in enumerate(found) if set("".join(cells)) <= set("-:")}
    return [cells for i, cells in enumerate(found) if i not in heads and i + 1 not in heads]


def keyed(part):
    """The rows of a text by their first cell, which no two share."""
    found = rows(part)
    names = [cells[0] for cells in found]
    assert len(set(names)) == len(names), "a row stands there twice"
    return {cells[0]: cells for cells in found}


def quoted(part):
    """Everything in backticks, and the titles of links, which hold the names that their words stand for."""
    return re.findall(r"`([^`\n]+)`", part) + titles(part)


def titles(part):
    """[words](place "title")"""
    return re.findall(r"\]\([^)\s]* \"([^\"\n]+)\"\)", part)


def members(body, prefix=""):
    """Names that statements bind, and those of classes within."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= members(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {prefix + name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


MODULES = {path.stem: path for path in ROOT.glob("*.py")}  # by the name that documents give them: grpo, training.task
MODULES |= {f"{room}.{path.stem}": path for room in links.ROOMS for path in (ROOT / room).glob("*.py") if room != "tests"}
MODULES |= {f"tests.{name}": ROOT / f"tests/{name}.py" for name in ("links", "mutants", "fuzz")}


@cache
def bound(stem):
    return members(ast.parse(MODULES[stem].read_text(encoding="utf-8")).body) if stem in MODULES else set()


@cache
def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def code_names(part):
    """(file, name) of every `file.name` in a text, `data.py` and the like left out; files of a room are `room.file`."""
    found = (links.CODE.fullmatch(name) for name in quoted(part))
    files = {"py", "md", "txt", "jsonl", "json", "toml", "safetensors", "csv"}
    known = {*MODULES, *links.FILES}
    return [(match[1], match[2]) for match in found if match and match[1] in known and match[2] not in files]


def numbers(mention):
    """The numbers of "(5)", "(11), (12)", "8-13" and so on."""
    found = set()
    for first, last in re.findall(r"(\d+)\)?(?:-\(?(\d+))?", mention):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def equations(source):
    """Numbers of all equations that a text speaks of."""
    return set().union(*map(numbers, re.findall(r"Eqs?\. ?((?:\(?\d+\)?(?:-\d+)?(?:, | and )?)+)", source)))


def equation_comments():
    """Equation number -> files with a comment that names it."""
    found = {}
    for stem, path in MODULES.items():
        for comment in re.findall(r"#.*\bEqs?\. \(.*", path.read_text(encoding="utf-8")):
            for number in equations(comment):
                found.setdefault(number, set()).add(stem)
    return found


# Names

IMPORTED = {"data.load"}  # not bound there, and may be taken from there


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_of_the_code_exists(document):
    named = code_names(present(document))
    missing = [f"{stem}.{name}" for stem, name in named if name not in bound(stem) and f"{stem}.{name}" not in IMPORTED]
    assert missing == []


def test_the_map_names_enough_for_the_checks_to_mean_something():
    names = set(code_names(text("PAPER.md")))
    assert {("grpo", "iou"), ("minimal", "self_emo"), ("selfemo", "self_emo"), ("training.task", "Task.lam")} <= names
    assert {("training.config", "Config.clip_eps"), ("engine.fsdp", "sharded"), ("tests.fuzz", "expected")} <= names
    assert len(names) > 80


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_of_the_map_exists(document):
    named = [name.split("::") for name in quoted(present(document)) if "::" in name]
    missing = ["::".join(x) for x in named if not (ROOT / x[0]).exists() or x[-1] not in functions(ROOT / x[0])]
    assert missing == []
    assert len(named) > 60 or document != "PAPER.md"


def targets(document):
    """Links of a document, and of its pictures, that do not leave the repository: (path from the root, anchor)."""
    prose = re.sub(r"^```.*?^```$", "", text(document), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|src=\"([^\"]+)\"", prose)
    for target in (a or b for a, b in found):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            whole = (ROOT / document).parent / path if path else ROOT / document
            yield os.path.relpath(whole.resolve(), ROOT), anchor


def anchors(document):
    """Headings as the anchors that they have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_a_heading_or_a_line(document):
    """Code files in backticks exist too."""
    for path, anchor in targets(document):
        assert path in REQUIRED or (ROOT / path).exists(), path  # those that must exist have a test of their own
        if anchor and path.endswith(".md"):
            assert anchor in anchors(path), f"{path}#{anchor}"
        elif anchor:
            assert int(re.fullmatch(r"L(\d+)", anchor)[1]) <= len(text(path).splitlines()), f"{path}#{anchor}"
    named = {name for name in quoted(present(document)) if re.fullmatch(r"(\w+/)*\w+\.(py|md)", name)} - {"__init__.py"}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_no_page_is_left_out():
    """Every file of docs/ is a document or lies in a folder of one, and README leads to every page."""
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} == set(PAGES)
    assert set(PAGES) <= {path for path, _ in targets("README.md")}


def places():
    """The rows of the README's table: its place -> its number of lines."""
    table = keyed(section("README.md", "## Files, in reading order"))
    return {re.fullmatch(r"\[(.+)\]\(\1\)", link)[1]: int(lines.replace(",", "")) for link, _, lines in table.values()}


def test_every_file_has_its_line_in_the_readme():
    """A row each for the files of the root, in reading order, and for the rooms: all folders with Python files."""
    assert list(places()) == [*(f"{name}.py" for name in links.FILES), *links.ROOMS]
    tracked_files = [path.relative_to(ROOT) for path in tracked() if path.suffix == ".py"]
    assert {path.parts[0] for path in tracked_files} == set(places())
    nested = {path.parent for path in tracked_files if len(path.parts) > 2}
    assert nested == {Path("tools/exercise_tests")}  # what tools/exercises.py copies, and nothing of ours imports


def test_the_readme_says_what_each_room_costs_in_lines():
    """Within a twentieth; `python -m tests.links --write` renews the numbers."""
    for place, said in places().items():
        paths = [ROOT / place] if place.endswith(".py") else (ROOT / place).glob("*.py")
        found = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        assert abs(said - found) <= 0.05 * found, f"{place} has {found} lines"
    assert links.stale("README.md") == []


def test_numbers_of_lines_are_renewed_only_where_they_are_off():
    found = links.lines_of("grpo.py")
    row = "| [grpo.py](grpo.py) | Eqs. 8-14, | and all | {} |\n"
    assert links.counted(row.format("9,999")) == row.format(found) == links.counted(row.format(found))
    assert links.counted(row.format(found + 1)) == row.format(found + 1)


# The map


def test_every_equation_has_a_row():
    assert list(keyed(section("PAPER.md", "## Equations"))) == [str(n) for n in range(1, 15)]


def test_every_equation_is_named_in_the_code_that_its_row_names():
    table = keyed(section("PAPER.md", "## Equations"))
    for number in range(5, 15):
        files = {stem for stem, _ in code_names(table[str(number)][2])}
        assert any(number in equations(MODULES[stem].read_text(encoding="utf-8")) for stem in files), number


def test_every_equation_of_the_code_has_its_row_and_the_other_way_round():
    table = keyed(section("PAPER.md", "## Equations"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    above = {int(n) for n in re.findall(r"^ *# Eq\. \((\d+)\)", source, re.MULTILINE)}
    assert above == set(range(5, 15))
    for number, files in equation_comments().items():
        assert files & {stem for stem, _ in code_names(table[str(number)][2])}, f"Eq. ({number}) in {files}"


def test_every_line_of_the_algorithm_has_a_row():
    assert list(keyed(section("PAPER.md", "## Algorithm 1"))) == [str(n) for n in range(1, 21)]


def test_the_loop_has_the_lines_that_the_map_gives_to_it():
    """The comments at the right of self_emo: every line but the output (2), comments (11) and ends (10, 16, 19)."""
    tree = ast.parse(text("selfemo.py"))
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "self_emo")
    source = "\n".join(text("selfemo.py").splitlines()[loop.lineno - 1 : loop.end_lineno])
    found = set().union(*map(numbers, re.findall(r"# (\d+(?:-\d+)?)(?::|$)", source, re.MULTILINE)))
    assert found >= {1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 17, 18, 20}
    assert found <= set(range(1, 21))


def test_every_table_and_figure_has_a_row():
    found = list(keyed(section("PAPER.md", "## Tables and figures")))
    assert found == [f"Table {n}" for n in range(1, 13)] + [f"Fig. {n}" for n in range(1, 7)]


def decisions():
    """Heading of every entry -> its parts by label: The paper., Here., Why., In the toy., Code:, Tests:"""
    entries = re.split(r"^### ", section("PAPER.md", "## Decisions"), flags=re.MULTILINE)[1:]
    pairs = (entry.split("\n", 1) for entry in entries)
    return {title: dict(re.findall(r"\*\*([^*]+)\*\*(.*?)(?=\*\*|\Z)", rest, re.DOTALL)) for title, rest in pairs}


def test_every_decision_has_an_entry():
    assert [title.partition(":")[0] for title in decisions()] == [f"D{n}" for n in range(1, 29)]


def test_every_decision_says_where_the_paper_stands_what_we_do_why_and_what_it_changes():
    """Each in words, and then the code that does it and a test of it. The toy: a number, or that none was measured."""
    for title, parts in decisions().items():
        assert list(parts) == ["The paper.", "Here.", "Why.", "In the toy.", "Code:", "Tests:"], title
        assert all(len(words.strip()) > 10 for words in parts.values()), title
        places = r"section|Section|Eq\.|Eqs\.|Table|Algorithm|[Ll]ine|Fig\.|[Aa]ppendi"
        assert re.search(places, parts["The paper."]), title
        assert re.search(r"[Nn]ot measured|\.\d\d|\d\.\d|\d{2,}", parts["In the toy."]), title
        assert code_names(parts["Code:"]), title
        assert [name for name in quoted(parts["Tests:"]) if re.fullmatch(r"tests/\w+\.py::test_\w+", name)], title


def test_every_decision_of_the_code_is_one_of_the_map():
    named = {int(n) for path in MODULES.values() for n in re.findall(r"\bD(\d+)\b", path.read_text(encoding="utf-8"))}
    assert named - {0} <= set(range(1, 29))  # D0 is the original dataset


MAPS = {"## Equations": 2, "## Algorithm 1": 2, "## Tables and figures": 2, "## Smaller choices": 1}


@pytest.mark.parametrize(("title", "column"), MAPS.items())
def test_every_row_names_code_and_test_or_says_why_not(title, column):
    for cells in rows(section("PAPER.md", title)):
        code, test = cells[column], cells[-1]
        assert len(cells) == len(rows(section("PAPER.md", title))[0]), cells
        assert code_names(code) or LATER in code or "no code" in code, cells
        assert "tests/" in test or test == "—" or test.startswith("see "), cells
        structure = title == "## Algorithm 1" and cells[1].startswith("end of")
        if code_names(code) and test == "—":
            assert structure or cells[0] == "1", cells


def public(stem):
    return {name for name in functions(MODULES[stem]) if not name.startswith("_")}


def body(path, name):
    return next(x for x in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if getattr(x, "name", None) == name)


def test_every_public_function_of_the_equations_has_a_worked_example():
    """A test named in the section calls it, compares with numbers that it gives itself, and works them out in words."""
    part = section("PAPER.md", "## Equations")
    assert public("grpo") <= {name for stem, name in code_names(part) if stem == "grpo"}
    named = {tuple(name.split("::")) for name in quoted(part) if name.startswith("tests/test_grpo.py::")}
    worked = set()
    for file, name in named:
        test = body(ROOT / file, name)
        called = {node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        numbers = [n for n in ast.walk(test) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
        checks = [n for n in ast.walk(test) if isinstance(n, ast.Assert)]
        if numbers and checks and ast.get_docstring(test):
            worked |= called
    assert public("grpo") - worked == set()


# Line links


def test_line_links_are_true():
    """The line of a link is the def, the class or the assignment of the name; of an equation, its comment."""
    seen = 0
    for document in links.DOCUMENTS:
        links_to_lines = r"\[`?([^]`]+)`?\]\(([^)#]+)#L(\d+)(?: \"([^\"]+)\")?\)"
        for words, path, line, title in re.findall(links_to_lines, text(document)):
            seen, name = seen + 1, title or words
            there = text(os.path.normpath(Path(document).parent / path)).splitlines()[int(line) - 1]
            last = re.split(r"[.:]+", name)[-1]
            pattern = rf" *((async )?(def|class) {last}\b|{last}\b *[:=,])"
            if name.startswith("Eq."):
                equation, _, plain = name.partition(" in ")
                pattern = rf" *# {re.escape(equation)}(, \w+)?:"
                assert path == plain if plain else path != "minimal.py", name
            assert re.match(pattern, there), f"{document}: {name} is not at {path}:{line}; python -m tests.links --write"
    assert seen > 250


def test_every_name_that_can_have_a_line_link_has_it():
    """`python -m tests.links --write` renews all of them."""
    assert [problem for document in links.DOCUMENTS for problem in links.stale(document)] == []
    for document in ("PAPER.md",):
        bare = [name for name in re.findall(r"(?<!\[)`([^`\n]+)`", text(document)) if links.place(name)]
        assert bare == []
        assert [title for title in titles(text(document)) if not links.place(title)] == []


def test_every_equation_comment_of_the_code_is_linked_from_its_row():
    """`# Eq. (13), left: ...` of grpo.py is linked once, from row 13; so are the comments of minimal.py."""
    table, comments = keyed(section("PAPER.md", "## Equations")), links.equations()
    assert [name for name in comments if not name.endswith(" in minimal.py")] == [
        *(f"Eq. ({n})" for n in (9, 10, 8, 11, 12)), *(f"Eq. ({n}), {side}" for n, side in
        ((13, "left"), (13, "right"), (14, "right"), (14, "left"))), "Eq. (7)",
    ]  # fmt: skip
    assert len(comments) > 14
    for name, (file, line) in comments.items():
        assert f"[{name}]({file}#L{line})" in table[re.search(r"\d+", name)[0]][2]
        assert text("PAPER.md").count(f"[{name}](") == 1


def test_links_are_renewed_wherever_they_led(tmp_path):
    """A name without a link, one that leads to an old line, an equation; code blocks and names of nothing stay."""
    line = next(n for n, x in enumerate(text("grpo.py").splitlines(), 1) if x.startswith("def iou("))
    comment = next(n for n, x in enumerate(text("grpo.py").splitlines(), 1) if "# Eq. (10):" in x)
    old = "see `grpo.iou`, [`grpo.iou`](grpo.py#L1) and [Eq. (10)](x#L9); `grpo.nothing`, `data.py`\n```\n`grpo.iou`\n```\n"
    new = (
        f"see [`grpo.iou`](../grpo.py#L{line}), [`grpo.iou`](../grpo.py#L{line}) and [Eq. (10)](../grpo.py#L{comment}); "
        "`grpo.nothing`, `data.py`\n```\n`grpo.iou`\n```\n"
    )
    assert links.linked(old, "../") == new
    assert links.linked(new, "../") == new


def test_links_with_other_words_are_renewed_by_the_name_in_their_title():
    """The words stay, the place changes; a title that names nothing stays, and a test of its own complains."""
    line = next(n for n, x in enumerate(text("grpo.py").splitlines(), 1) if x.startswith("def iou("))
    old = '[the overlap](x.py#L9 "grpo.iou"), [`iou`](#L1 "grpo.iou"), [none](x "grpo.nothing")'
    new = f'[the overlap](../grpo.py#L{line} "grpo.iou"), [`iou`](../grpo.py#L{line} "grpo.iou"), [none](x "grpo.nothing")'
    assert links.linked(old, "../") == links.linked(new, "../") == new


def test_a_name_leads_into_its_room():
    lines = text("training/task.py").splitlines()
    file, line = links.place("training.task.Task.lam")
    assert file == "training/task.py" and lines[line - 1].startswith("    def lam(self")
    assert links.place("task.Task.lam") is links.place("training.task.py") is links.place("training.task") is None


TABLE_12 = {
    "train_batch_size": 64,
    "max_prompt_length": 4096,
    "max_response_length": 8192,
    "model.path": "Qwen3-8B",
    "actor.optim.lr": 1e-6,
    "actor.ppo_mini_batch_size": 32,
    "actor.ppo_micro_batch_size_per_gpu": 16,
    "actor.kl_loss_coef": 0.001,
    "actor.kl_loss_type": "low_var_kl",
    "actor.entropy_coeff": 0,
    "actor.fsdp_config.param_offload": False,
    "actor.fsdp_config.optimizer_offload": False,
    "rollout.log_prob_micro_batch_size_per_gpu": 16,
    "rollout.n": 8,
    "rollout.max_num_batched_tokens": 12400,
    "rollout.gpu_memory_utilization": 0.5,
    "rollout.tensor_model_parallel_size": 8,
    "ref.log_prob_micro_batch_size_per_gpu": 16,
    "ref.fsdp_config.param_offload": True,
    "algorithm.use_kl_in_reward": False,
    "trainer.critic_warmup": 0,
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 1,
    "trainer.save_freq": 480,
    "trainer.test_freq": 10,
    "trainer.total_epochs": 3,
}


def value(cell):
    try:
        return ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        return cell


def test_table_12_is_complete_and_our_defaults_are_the_papers():
    """All 26 values as printed. Where the third cell opens with a field of Config, the preset `paper` has that value."""
    table = keyed(section("PAPER.md", "## Table 12"))
    assert {name: value(cells[1]) for name, cells in table.items()} == TABLE_12
    compared = 0
    for name, (_, paper, ours, _) in table.items():
        assert code_names(ours) or LATER in ours or "no code" in ours, name
        if ours.startswith("[`Config."):
            compared += 1
            preset = getattr(config.PRESETS["paper"], quoted(ours)[0].rpartition(".")[2])
            assert (preset.rpartition("/")[2] if isinstance(preset, str) else preset) == value(paper), name
    assert compared == 15


# Commands and metrics


def blocks(document):
    return re.findall(r"```\w*\n(.*?)```", text(document), re.DOTALL)


def fields(stem, name):
    prefix = f"{name}."
    return {member.removeprefix(prefix) for member in bound(stem) if member.startswith(prefix)}


def arguments(stem, name):
    """Those of a function, which are its flags where it is a command."""
    found = body(MODULES[stem], name).args
    return {argument.arg for argument in (*found.args, *found.kwonlyargs)}


def accepted():
    """Which flags a program or a subcommand of ours takes."""
    asking = fields("experts.asking", "Settings") | fields("experts.__main__", "Asking")
    return {
        "selfemo.py": fields("training.config", "Config"),
        "evaluate.py score": fields("analysis.scoring", "ScoreCommand"),
        "evaluate.py judge": fields("analysis.judge", "JudgeCommand"),
        "evaluate.py personas": fields("analysis.clusters", "PersonasCommand"),
        "evaluate.py audit": arguments("evaluate", "audit_command"),
        "evaluate.py try": fields("analysis.trying", "TryCommand"),
        "data.py stats": arguments("data", "stats"),
        "data.py download": arguments("corpora.download", "download"),
        "data.py audit": arguments("corpora.check", "audit"),
        "-m experts personas": asking | fields("experts.__main__", "PersonasCommand"),
        "-m experts gold": asking | fields("experts.__main__", "GoldCommand"),
        "-m toy build": arguments("toy.base", "build"),
        "-m toy baselines": arguments("toy.__main__", "baselines"),
        "-m toy gold_sft": arguments("toy.__main__", "gold_sft"),
        "-m toy soft_gold": arguments("toy.__main__", "soft_gold"),
        "tools.report": fields("tools.report", "Report"),
        "tools.accept": fields("tools.accept", "Accept"),
        "tools.ablate": fields("tools.ablate", "Ablate") | fields("training.config", "Config"),
        "tools.pictures curves": arguments("tools.pictures", "curves"),
        "tools.pictures growth": arguments("tools.pictures", "growth"),
        "tools.pictures ablations": arguments("tools.pictures", "ablations"),
        "tools.learning": fields("tools.learning", "Learning"),
        "tools.parity": fields("tools.parity", "Parity"),
        "tools.replay": fields("tools.replay", "Replay"),
        "tools.export": fields("tools.export", "Export"),
        "tools.exercises": arguments("tools.exercises", "exercises"),
        "tests.links": {"write"},
        "tests.mutants": fields("tests.mutants", "Mutants"),
        "tests.fuzz": arguments("tests.fuzz", "loaders"),
    }


def test_commands_name_files_and_flags_that_exist():
    seen = set()
    names = [name for document in DOCUMENTS for name in quoted(present(document))]
    commands = [name for name in names if ".py " in name or "python -m " in name]
    shell = [block for document in DOCUMENTS for block in blocks(document)]
    commands += [part for block in shell for line in block.splitlines() for part in line.split("&&")]
    for command in commands:
        for program, known in accepted().items():
            if program in command:
                seen.add(program)
                assert set(re.findall(r"--(\w+)", command.partition(program)[2])) <= known, command
        for name in re.findall(r"[\w/.-]+\.(?:py|txt)\b", command):
            assert (ROOT / name).exists(), command
        for script in re.findall(r"python (\w+\.py [a-z][a-z_-]*)", command):
            assert script in accepted(), command
        for module, word in re.findall(r"python -m ([\w.]+)( [a-z][a-z_]*)?", command):
            if module not in ("pytest", "venv"):
                folder = ROOT / module.replace(".", "/")
                assert folder.with_suffix(".py").exists() or (folder / "__main__.py").exists(), command
                several = any(f"{module} " in f"{program} " and program != module for program in accepted())
                assert not several or any(f"{module}{word}" in program for program in accepted()), command
    assert seen == set(accepted())


def test_flags_in_the_text_exist():
    others = {"nproc_per_node", "nnodes", "shutdown-timeout", "index-url", "help"}
    others |= {"dtype", "repeats", "threads"}  # of tools.bench
    known = set().union(*accepted().values()) | others
    for document in DOCUMENTS:
        unknown = {flag for name in quoted(present(document)) for flag in re.findall(r"(?<![\w-])--([\w-]+)", name)} - known
        assert not unknown, document


def test_values_of_flags_in_the_text_are_accepted():
    """`--cold_start self` and the like: the value is one of the field's choices."""
    for document in DOCUMENTS:
        for name in quoted(text(document)):
            kinds = "preset|ratio|loss_mean|cold_start|retrain_from|context|persona_scope"
            for flag, choice in re.findall(rf"--({kinds}) (\w+)", name):
                choices = config.Config.__annotations__[flag].__args__
                assert choice in choices, name


def test_the_first_screen_has_the_two_commands():
    """One line each: a venv, the requirements, the toy; a venv, the requirements for developing, the tests."""
    toy, tests = (block.strip() for block in blocks("README.md")[:2])
    ends_of = {toy: "selfemo.py --preset toy --out runs/toy", tests: "python -m pytest -n auto --dist loadfile"}
    for command, ends in ends_of.items():
        assert "\n" not in command and command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert command.endswith(ends)
    assert text("README.md").splitlines().index(tests) < 25


def test_the_first_screen_shows_what_a_run_says():
    """Evaluations and RL steps as `selfemo.py` prints them, and its last line; what is left out is marked by three dots."""
    shown = re.search(r"```text\n(.*?)```", text("README.md"), re.DOTALL)[1].splitlines()
    names = {name for line in shown for name in re.findall(r"(eval|test)/toy/(\w+) \d\.\d{3}", line)}
    assert names == {("eval", "acc"), ("eval", "iou"), ("test", "acc"), ("test", "iou")}
    steps = [re.findall(r"([a-z]+) [\d.e+]+", line.partition("/20")[2]) for line in shown if line.startswith("step ")]
    assert len(steps) >= 3 and all(found and set(found) <= set(metrics.SHOWN) for found in steps)
    assert shown[-1] == "done: the model is in runs/toy/model; check the run with: python evaluate.py audit runs/toy"
    stages = [line.partition(":")[0] for line in shown if "/toy/acc" in line]
    assert stages == ["start", "after the cold start", "after RL 1", "after SFT 1", "after RL 2", "after SFT 2", "test"]


def example(flag):
    """The line that the page on data shows for a file given with a flag."""
    row = next(cells for cells in rows(section("docs/data.md", "# Data")) if cells[0].startswith(f"`--{flag} "))
    return next(name for name in quoted(row[1]) if name.startswith("{"))


def test_the_formats_of_the_data_page_are_read(tmp_path):

    dialogue = next(block for block in blocks("docs/data.md") if block.startswith('{"id"'))
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(dialogue, encoding="utf-8")
    samples = data.samples(loading.load("mine", tmp_path, "test"), loading.label_set("mine", tmp_path))
    assert [s.id for s in samples] == ["mine/test/d1/0", "mine/test/d1/1"]
    assert samples[0].gold == {"sadness": 0.65, "anger": 0.35}
    assert samples[0].responder == data.Responder("Bo", "a worrier who whispers", "next")
    for flag, read in (("personas", loading.read_personas), ("gold", loading.read_gold)):
        (tmp_path / flag).write_text(example(flag), encoding="utf-8")
        assert len(read(tmp_path / flag)) == 1


def documented():
    """Every metric that is explained, as a pattern: <...> is any one part."""
    names = [name for cells in rows(section("docs/runs.md", "## Metrics")) for name in quoted(cells[0])]
    assert len(set(names)) == len(names), "a metric is explained twice"
    return {name: re.compile(re.sub(r"<\w+>", "[^/]+", name)) for name in names}


def test_a_run_logs_exactly_the_metrics_that_are_explained(finished):
    """`finished`: a small whole run. Rule reasons beside `rule/rate`, `@T` names only with several
    temperatures, reserved memory only on a GPU."""
    found = {name for line in (finished / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    logged = {re.sub(r"@[\d.]+/", "/", name) for name in found} - {"step", "iteration", "phase"}
    patterns = documented()
    assert {name for name in logged if not any(p.fullmatch(name) for p in patterns.values())} == set()
    silent = {name for name, p in patterns.items() if not any(p.fullmatch(x) for x in logged - {"rule/rate"})}
    assert silent <= {"rule/rate", "memory/reserved_gb"}


def test_every_part_of_a_metric_name_stands_in_the_code():
    files = ("training/metrics", "training/coldstart", "selfemo", "evaluate", "grpo", "engine/processes")
    source = "".join(text(f"{file}.py") for file in files)
    for name in documented():
        for part in re.split(r"/?<\w+>/?", name):
            words = {part, *part.split("/")}
            assert part in source or all(word in source for word in words - {part}), name


def test_every_metric_has_a_meaning():
    for cells in rows(section("docs/runs.md", "## Metrics")):
        assert len(cells) == 4 and all(cells), cells


def test_files_of_a_run_are_those_that_are_listed(finished):
    listed = {part for cells in rows(section("docs/runs.md", "# A run folder")) for part in quoted(cells[0])}
    inside = ("rollouts/", "evaluations/")
    tops = {name.partition("/")[0] for name in listed if "/" not in name.rstrip("/") or name.startswith(inside)}
    assert {path.name for path in finished.iterdir()} - {"tensorboard"} <= {name.rstrip("/") for name in tops}
    missing = {n for n in listed if re.fullmatch(r"[\w]+\.(json|jsonl|safetensors)", n) and not (finished / n).exists()}
    assert missing == {"expert.jsonl", "judge.jsonl"}  # this run asked no expert and no judge


# The repository


REQUIRED = ("README.md", "PAPER.md", "CHANGELOG.md", "LOG.md", "LICENSE", "pyproject.toml", ".gitignore", ".ci/run")


@pytest.mark.parametrize("name", REQUIRED)
def test_required_files_exist(name):
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_the_licence_is_apache_2():
    assert "Apache License" in text("LICENSE") and "Version 2.0, January 2004" in text("LICENSE")


def packages(name):
    return dict(line.split("==") for line in text(name).splitlines() if line and not line.startswith(("#", "-r ")))


def test_requirements_are_pinned_and_complete():
    core = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "tyro", "tqdm", "pytest"}
    assert set(packages("requirements.txt")) == core
    assert set(packages("requirements-extra.txt")) == {"tensorboard", "matplotlib", "scikit-learn", "openai", "jinja2"}
    assert {"-r requirements.txt", "-r requirements-extra.txt"} <= set(text("requirements-dev.txt").splitlines())
    assert f"torch=={packages('requirements.txt')['torch']} " in text("README.md")


def tracked():
    """Text files of the repository; without git, those beside the code."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        paths = [*ROOT.glob("*.*"), *ROOT.glob("tests/*.py")]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_a_machine():
    """Homes, mounts and temporary folders of whoever wrote it; and package indexes that are not public."""
    tops = "home|root|work|mnt|Users|scratch|tmp|var|private"
    place = re.compile(rf"(?<![\w.~/>{{}}-])/(?:{tops})/\w|\b[A-Z]:\\\w|https?://\S+/" + "simple/")
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if place.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_blank_is_left_to_fill(document):
    assert re.findall("<<[^>]*", text(document)) == []
