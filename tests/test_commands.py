"""How commands end: silent without a reader, one line for a mistake; a checkpoint is claimed where there is one."""

import ast
import errno
import fcntl
import io
import json
import os
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import evaluate
import experts.__main__
from common.errors import READER_GONE, UserError, command, reason, tell
from common.files import lock, write_atomically
from engine import batches
from experts import asking
from experts.cache import open_cache
from tools import ablate
from training import folder

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("data.py stats --data tiny={world}", "evaluate.py audit {finished}")  # starting one takes seconds


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


# Output that cannot be written


def started(words, redirected, **environment):
    """(exit status, stderr) of a command under a redirection of the shell."""
    argv = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_disk_under_the_output_is_one_line(place, finished, words):
    """/dev/full takes nothing. Python's own try to write it at its end would add a line and end with 120."""
    given = words.format(world=place.root / "world", finished=finished).split()
    status, said = started(given, "> /dev/full")
    assert status == 2 and said.count("\n") == 1
    assert said.startswith("error: No space left on device")


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        (">&-", 2, "error: stdout is closed: send it to a file, or to /dev/null\n"),
        ("1< /dev/null", 2, "error: Bad file descriptor\n"),
        ("> /dev/full 2> /dev/full", 2, ""),
        ("> /dev/null 2> /dev/full", 0, ""),
        ("> /dev/null 2>&-", 0, ""),
    ],
)
def test_whatever_is_wrong_with_stdout_or_stderr_is_one_line_at_most(place, redirected, status, said):
    assert started(["data.py", "stats", "--data", f"tiny={place.root / 'world'}"], redirected) == (status, said)


def test_a_run_whose_output_is_full_writes_nothing(place, tmp_path):
    status, said = started(["selfemo.py", *place.argv(tmp_path / "run")], "> /dev/full")
    assert (status, said) == (2, "error: No space left on device\n")
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_said_once_although_stdout_is_full_too():
    """What was printed before the mistake cannot be written either; the line is the mistake's."""
    code = """if True:
        import sys
        from common.errors import UserError, command

        def work():
            print("half")
            raise UserError("odd")

        sys.exit(command(work))
    """
    assert started(["-c", code], "> /dev/full") == (2, "error: odd\n")


def test_a_status_of_its_own_does_not_hide_that_the_findings_are_lost():
    code = "import sys; from common.errors import command; sys.exit(command(lambda: print('found') or 1))"
    assert started(["-c", code], "> /dev/full") == (2, "error: No space left on device (stdout)\n")


def test_a_terminal_without_unicode_shows_what_it_can(tmp_path):
    """U+4E2D is written as its escape; Python alone would end with UnicodeEncodeError."""
    row = {"id": "d", "turns": [{"speaker": "Ann", "text": "x", "label": "\u4e2d"}]}
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "labels.json").write_text(json.dumps(["\u4e2d", "joy"]), encoding="utf-8")
    argv = [sys.executable, "data.py", "stats", "--data", f"zh={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u4e2d" in done.stdout


def test_no_work_ends_because_its_log_cannot_be_written(monkeypatch):
    """A signal asks a run to save; that the line about it has no reader must not keep it from saving."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    tell("saving after this step")
    run = types.SimpleNamespace(stop_asked=False)
    with folder.Run.signals(run):
        os.kill(os.getpid(), signal.SIGTERM)
    assert run.stop_asked


def test_what_cannot_be_written_is_named_and_nothing_half_is_left(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    write_atomically(path, "old\n")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as told:
        write_atomically(path, "new\n")
    assert reason(told.value) == f"No space left on device ({path})"
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_and_stays_one(tmp_path):
    """A rename over a pipe, or over /dev/null, would put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "answers")
    assert os.read(reader, 100) == b"answers"
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]
    os.close(reader)


# Files that one job alone may write


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_said_once_and_the_work_goes_on(tmp_path, monkeypatch, capsys, number):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("a", "b", "a"):
        with (tmp_path / name).open("ab") as file:
            lock(file, "in use")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{tmp_path} cannot lock files ({os.strerror(number)}): going on")


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_job_holds_is_a_mistake(tmp_path, monkeypatch, number):
    """As file systems over the network say it too: EACCES."""

    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "a").open("ab") as file, pytest.raises(UserError, match="^in use$"):
        lock(file, "in use")


def test_a_lock_lasts_until_the_file_is_closed(tmp_path):
    with (tmp_path / "a").open("ab") as one, (tmp_path / "a").open("ab") as other:
        lock(one, "in use")
        with pytest.raises(UserError, match="^in use$"):
            lock(other, "in use")
        one.close()
        lock(other, "in use")


def test_a_cache_and_a_table_go_on_where_nothing_can_be_locked(place, tmp_path, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_cache(tmp_path / "cache" / "c") as cache:
        cache.add("k", "m", asking.Reply("hi", True, (1, 2)))
    job = ablate.job(ablate.Ablate(out=tmp_path / "table"), place.argv("")[:-2], ablate.Row("full", "full"), 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: "started")
    assert ablate.start(job) == "started"
    assert capsys.readouterr().err.count("cannot lock files (Function not implemented)") == 2


def test_a_cache_in_which_nothing_was_answered_is_not_left(tmp_path, monkeypatch):
    """Who has just opened the file that the job before removes must not write to it: that would be gone."""
    with pytest.raises(ValueError), open_cache(tmp_path / "c"):
        raise ValueError
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr("common.files.fcntl.flock", lambda file, how: (tmp_path / "c").unlink())
    with pytest.raises(UserError, match="in use by another job"), open_cache(tmp_path / "c"):
        pass


@pytest.mark.parametrize(("program", "name"), [(evaluate, "score_command"), (experts.__main__, "gold")])
def test_out_of_memory_while_a_model_answers_is_one_line(program, name, monkeypatch, capsys):
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(program, name, work)
    monkeypatch.setattr(sys, "argv", ["program", name.removesuffix("_command")])
    assert program.main() == 2
    complained = capsys.readouterr().err
    assert complained.startswith("error: out of memory: CUDA out of memory. Tried to allocate 2 GiB; ask for shorter")
    assert complained.count("\n") == 1


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
    # launch.py does it for selfemo.py; a peer speaks to tools.bench, a server to its clients, a sceptic to nobody
    others = {"selfemo.py", "tools/peers.py", "tests/endpoint.py", "tests/sceptic.py"}
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
