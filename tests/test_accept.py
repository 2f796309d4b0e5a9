"""python -m tools.accept: its checks in small on this CPU, what it says of those that fail, and what it counts on a GPU."""

import json
import os
import re
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

from rollout import generate
from tools import accept, decoding, trials
from tools.accept import CHECKS, Accept, Check
from tools.checks import Row, peak_bytes, row, warned_waits
from tools.decoding import busy_s, counted, differing, pace_of, waits_in
from tools.trials import REFUSED

# All checks in small but one: a run under torchrun, which tests/test_ranks.py tries in more ways, is left to .ci/nightly

IN_SMALL = tuple(name for name in CHECKS if name != "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(exit status, the JSON file) of the command on a CPU."""
    out = tmp_path_factory.mktemp("accept") / "accept.json"
    return accept.accept(Accept(cpu=True, only=IN_SMALL, out=str(out))), json.loads(out.read_text())


def test_every_check_holds_on_a_cpu_or_says_why_it_means_nothing_there(small):
    status, found = small
    failed = [r for r in found["rows"] if r["verdict"] == "FAILED"]
    assert (status, failed) == (0, [])
    assert list(dict.fromkeys(r["check"] for r in found["rows"])) == list(IN_SMALL)
    for r in found["rows"]:
        assert r["note"] if r["verdict"] == "skipped" else r["measured"], r
    means_nothing = {r["check"] for r in found["rows"] if r["verdict"] == "skipped"}
    assert means_nothing == {"cascade", "graphs", "plan", "pace"}


def test_the_bounds_are_those_that_were_asked_for(small):
    """A number with each claim, in the order of the table; those of time and memory are not measured on a CPU."""
    _, found = small
    expected = [
        ("cascade", "error against float64", "< 0.01"), ("cascade", "over that of one causal call", "< 2"),
        ("cascade", "36,864 tokens, memory", "< 2.27 GB"), ("head", "gradient of the weight", "< 0.003"),
        ("draws", "weight 0", "= 0"), ("sampler", "mean gap", "< 0.02"), ("sampler", "largest gap", "< 0.3"),
        ("sampler", "error of the sampler", "< 2"),
        ("graphs", "differ from eager steps", "= 0"), ("graphs", "captures", "= 4"), ("ranks", "one killed", "< 60"),
        ("plan", "off the plan", "<= 0.1"),
        ("pace", "waits per step", "<= 1"), ("pace", "share of time the GPU works", "> 0.8"),
    ]  # fmt: skip
    for check, what, bound in expected:
        claims = {r["expected"] for r in found["rows"] if r["check"] == check and what in r["what"]}
        assert claims == {bound}, (check, what)


def test_who_measured_with_what_stands_above_the_table(small):
    _, found = small
    assert set(found) == {"date", "hardware", "torch", "transformers", "cuda", "python", "commit", "rows"}
    assert found["torch"] == torch.__version__ and "no GPU used" in found["hardware"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", found["date"])


def test_time_is_enough_for_all_of_them():
    """Ten minutes, of which 20 s are left to begin in."""
    assert sum(check.limit for check in CHECKS.values()) == 590


# What fails


def fine(device):
    yield row("half", 0.5, "<", 1)


def wrong(device):
    print("this goes into the log")
    yield row("a third", 0.333333, "<", 0.3)
    yield row("a quarter", 0.25, "<", 0.3, note="near")


def crashes(device):
    yield row("one", 1, "=", 1)
    raise ValueError("first line\nlast line")


def dies(device):
    yield row("two", 2, "=", 2)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(device):
    child = os.fork()
    if child:
        yield row("a process of its own", child, ">", 0)
    time.sleep(60)


def leaves(device):
    yield row("three", 3, "=", 3)
    os._exit(5)


BAD = {"wrong": Check(wrong, 60), "crashes": Check(crashes, 60), "dies": Check(dies, 60), "leaves": Check(leaves, 60)}
BAD |= {"hangs": Check(hangs, 2), "fine": Check(fine, 60)}


def test_a_check_that_fails_crashes_or_hangs_is_a_row_and_the_others_go_on(tmp_path, capsys):
    """The file says what was printed; what checks print goes into the log, with the whole error."""
    out = tmp_path / "found.json"
    assert accept.accept(Accept(cpu=True, out=str(out)), BAD) == 1
    said, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    found = [(r["check"], r["what"], r["measured"], r["verdict"], r["note"]) for r in rows]
    child = found[-3][2]
    assert found == [
        ("wrong", "a third", "0.333", "FAILED", ""), ("wrong", "a quarter", "0.25", "ok", "near"),
        ("crashes", "one", "1", "ok", ""), ("crashes", "ends well", "", "FAILED", "last line"),
        ("dies", "two", "2", "ok", ""), ("dies", "ends well", "", "FAILED", "killed by SIGSEGV"),
        ("leaves", "three", "3", "ok", ""), ("leaves", "ends well", "", "FAILED", "exit status 5"),
        ("hangs", "a process of its own", child, "ok", ""), ("hangs", "ends well", "", "FAILED", "not done after 6 s"),
        ("fine", "half", "0.5", "ok", ""),
    ]  # fmt: skip
    table = said[said.index("check ") :].splitlines()[1 : 1 + len(rows)]
    for line, r in zip(table, rows, strict=True):
        cells = [r["check"], r["what"], r["expected"], r["measured"], f"{r['seconds']:.1f}", r["verdict"], r["note"]]
        assert re.split(r" {1,}", line) == " ".join(filter(None, cells)).split(" ")
    assert said.splitlines()[-1] == f"6 ok, 5 FAILED, 0 skipped; {out}, {out.with_suffix('.log')}"
    log = out.with_suffix(".log").read_text()
    assert "this goes into the log" in log and "ValueError: first line\nlast line" in log and "this goes" not in said
    stat = Path("/proc", child.replace(",", ""), "stat")  # what a check has started ends with it
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_check_may_be_chosen(tmp_path, capsys):
    assert accept.accept(Accept(cpu=True, only=("fine",), out=str(tmp_path / "a.json")), BAD) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 ok, 0 FAILED, 0 skipped")


@pytest.mark.parametrize(
    ("argv", "heard"), [(["--cpu", "--only", "all"], "one or more of cascade, head"), ([], "no GPU"), (["--gpu"], "--gpu")]
)
def test_a_users_mistake_is_said_before_anything_runs(argv, heard, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["accept", *argv])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert accept.main() == 2
    assert heard in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Rows and what they are made of


@pytest.mark.parametrize(
    ("value", "sign", "bound", "verdict"),
    [
        (0.99, "<", 1, "ok"), (1, "<", 1, "FAILED"), (1, "<=", 1, "ok"), (0.8, ">", 0.8, "FAILED"), (0.81, ">", 0.8, "ok"),
        (4, "=", 4, "ok"), (5, "=", 4, "FAILED"), (float("nan"), "<", 1, "FAILED"), (float("nan"), "=", 0, "FAILED"),
    ],
)  # fmt: skip
def test_a_bound_holds_or_not(value, sign, bound, verdict):
    assert row("x", value, sign, bound).verdict == verdict


def test_rows_as_they_are_printed():
    """2.2655 GB to three digits; large numbers whole; what is skipped has no number."""
    assert row("x", 1_234_567.8, "<", 1.15 * 1.97, " GB") == Row("x", "< 2.27 GB", "1,234,568 GB", "FAILED", "", 1_234_567.8)
    assert row("x", float("nan"), "<", 2, skip="why") == Row("x", "< 2", "", "skipped", "why")
    assert row("x", float("inf"), "<", 2).measured == "inf"


def event(name, start=0, end=0, device=DeviceType.CPU):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_a_gpu_is_busy_while_any_kernel_runs():
    """Microseconds 0-4 and 2-5 on two streams, 10-20, 12-13 within it: 5 + 10. What the host does does not count."""
    spans = ((10, 20), (0, 4), (2, 5), (12, 13))
    events = [event("k", start, end, DeviceType.CUDA) for start, end in spans]
    assert busy_s([*events, event("aten::mm", 0, 100)]) == pytest.approx(15e-6, rel=1e-12)
    assert busy_s([]) == 0


def test_a_sampler_at_another_temperature_fails(monkeypatch):
    """Two per cent warmer: four to six times as far from float32 as the policy, and within .01 nats of it."""
    monkeypatch.setattr(decoding, "generate", lambda *args, **given: generate(*args, **{**given, "temperature": 1.02}))
    first, mean, gap, _ = decoding.sampler(torch.device("cpu"))
    assert first.verdict == "FAILED" and first.value is not None and 3 < first.value < 10
    assert mean.verdict == "ok"  # a bound in nats does not see it
    assert gap.verdict == "ok" and gap.value is not None and gap.value < 0.01


def test_calls_of_the_driver_that_wait():
    copies = ("cudaMemcpyAsync", "cudaMemcpyAsync", "cudaMemcpy")
    names = (*copies, "cudaStreamSynchronize", "cudaLaunchKernel", "cudaEventSynchronize")
    assert waits_in(map(event, names)) == 3


def test_the_pace_is_that_of_a_step_alone(monkeypatch):
    """Answers of T tokens: .5 s and 7 waits once, .01 s, 1 wait and 8 ms of the GPU per token."""

    def seen(work, device):
        events = [event("cudaStreamSynchronize")] * (7 + work.args[0])
        return [*events, event("k", 0, 500_000 + 8_000 * work.args[0], DeviceType.CUDA)]

    monkeypatch.setattr("tools.decoding.profiled", seen)
    monkeypatch.setattr("tools.decoding.median_s", lambda work, device, repeats: 0.5 + 0.01 * work.args[0])
    found = pace_of(lambda tokens: None, torch.device("cpu"), 8, 56)
    assert (found.seconds, found.busy, found.waits) == pytest.approx((0.01, 0.008, 1))


def test_tokens_that_differ_and_captures_are_counted():
    calls, answer = [], lambda *ids: SimpleNamespace(ids=ids)
    assert differing([[answer(1, 2), answer(3)]], [[answer(1, 4), answer(5)]]) == 2
    assert counted(lambda compute: ("replay", compute()), calls)(lambda: "drawn") == ("replay", "drawn")
    assert calls == [1]


# What only a GPU has, played by stand-ins (a PyTorch without CUDA cannot cut even tensors without numbers on one)


def test_the_peak_of_a_call_is_counted_from_what_was_there(monkeypatch):
    """3 GB are there, 7 at most during the call: 4 are its own. The count begins anew, and the GPU is waited for."""
    seen = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: seen.append("wait"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: seen.append("reset"))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 3 * 10**9)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7 * 10**9)
    assert peak_bytes(lambda: seen.append("work"), torch.device("cuda")) == 4 * 10**9
    assert seen == ["wait", "reset", "work", "wait"]


def test_waits_that_pytorch_warns_of_are_counted(monkeypatch):
    """Twice the same warning, and another one; afterwards PyTorch is silent again, also where the call fails."""
    modes = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def work():
        for what in ("called a synchronizing CUDA operation", "something else", "called a synchronizing CUDA operation"):
            warnings.warn(what, stacklevel=1)

    assert warned_waits(work, torch.device("cuda")) == 2
    with pytest.raises(ZeroDivisionError):
        warned_waits(lambda: 1 / 0, torch.device("cuda"))
    assert modes == ["warn", "default"] * 2


DUPLICATE = f"ncclInvalidUsage\n{REFUSED} : rank 1 and rank 0"


@pytest.mark.parametrize(("said", "verdict"), [(DUPLICATE, "skipped"), ("unhandled system error", "FAILED")])
def test_a_gpu_that_two_ranks_may_not_share_is_no_fault_of_ours(said, verdict, tmp_path):
    """Other errors of NCCL are: the processes end without a word, and the check fails."""
    found = list(accept.findings("ranks", Check(partial(refused, said), 60), True, tmp_path / "log"))
    assert [f.row.verdict for f in found] == [verdict]
    assert ("NCCL refuses: Duplicate GPU : rank 1 and rank 0" in found[0].row.note) is (verdict == "skipped")


def refused(said, device):
    """In the process of the check: what `ranks` yields where NCCL says so."""
    with mock.patch("engine.fsdp.sharded", side_effect=torch.distributed.DistBackendError(said)):
        yield from trials.ranks(device)
