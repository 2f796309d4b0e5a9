"""The benchmark: what it asks of every side, what it says of them, and a short run of ours against a stand-in."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model import Group, Policy
from tests.tiny import tiny
from tools import limits
from tools.bench import (
    GROWTH,
    LONG,
    QUICK,
    STEP,
    WORKLOADS,
    A,
    B,
    Settings,
    can,
    chosen,
    fastest,
    prompts,
    ratios,
    shares,
    table,
)
from tools.limits import Limits, Shapes
from tools.peers import clocked

ROOT = Path(__file__).parent.parent
OURS = {"seconds": [2.0, 1.0, 4.0], "cpu_s": [1.0, 2.0, 3.0], "peak_mib": 100}
THEIRS = {"seconds": [3.0, 8.0, 4.0], "cpu_s": [4.0, 5.0, 3.0], "peak_mib": 250}


def test_ratios_are_theirs_over_ours():
    """Medians 4 and 2: 2; bests 3 and 1: 3; CPU medians 4 and 2: 2; peaks 250 and 100: 2.5."""
    assert ratios(OURS, THEIRS) == {"seconds_ratio": 2.0, "cpu_s_ratio": 2.0, "best_ratio": 3.0, "peak_ratio": 2.5}
    assert set(ratios(OURS, OURS).values()) == {1.0}


def test_the_update_has_a_ratio_of_its_own():
    """9 s of theirs to 3 s of ours."""
    assert ratios({**OURS, "update_s": [3.0]}, {**THEIRS, "update_s": [9.0]})["update_s_ratio"] == 3.0


def test_prompts_without_data_have_the_length_asked_for_and_repeat():
    made = prompts(A, Settings())
    assert [len(ids) for ids in made] == [180] * 8
    assert made == prompts(A, Settings())
    assert len({tuple(ids) for ids in made}) == 8


def test_workloads_by_name():
    assert chosen(Settings(("rollout-b", "step"))) == [WORKLOADS["rollout-b"], WORKLOADS["step"]]
    assert chosen(Settings(("growth",))) == list(GROWTH)
    assert chosen(Settings(quick=True)) == list(QUICK)
    with pytest.raises(UserError, match="rollout-c"):
        chosen(Settings(("rollout-c",)))


def test_who_does_what():
    """TRL steps, the others answer, and a budget of bytes is ours alone."""
    assert [can("trl", STEP), can("trl", A), can("vllm", B), can("vllm", STEP)] == [True, False, True, False]
    assert not can("vllm", WORKLOADS["kv_mib-64"])
    assert [can("selfemo", WORKLOADS[name]) for name in ("step", "kv_mib-64", "limits")] == [True, True, False]
    assert not can("vllm", WORKLOADS["limits"])


def test_a_quick_run_prints_a_table_and_a_line_a_row(tmp_path):
    """Both workloads; every answer has its full length: 8 x 8 x 32 and 4 x 8 x 32 tokens."""
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "--quick", "--repeats", "1", "--threads", "1", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["workload"]["name"], r["side"], r["tokens"]) for r in rows] == [
        ("quick-rollout", "selfemo", 2048), ("quick-step", "selfemo", 1024),
    ]  # fmt: skip
    assert done.stdout.endswith(table(rows) + "\n")
    assert {"versions", "hardware", "commit", "dtype", "threads", "date"} <= rows[0].keys()
    assert 0 < rows[1]["update_s"][0] < rows[1]["seconds"][0]
    assert all(rows[0][name] > 0 for name in ("seconds_share", "cpu_s_share"))
    assert all(0 < rows[1][name] < 100 for name in ("update_s_share", "update_cpu_s_share", "generate_s_share"))
    assert "1024x1024 by 1024x1024" in rows[0]["limits"]["flops"] and "GB/s, memory" in done.stdout


def test_a_clock_around_a_method_changes_nothing_else():
    class Counter:
        def add(self, x, *, y):
            return x + y

    counter = Counter()
    spent = clocked(counter, "add")
    assert [counter.add(1, y=2), counter.add(3, y=4)] == [3, 7]
    assert len(spent) == 2 and all(0 <= seconds < 1 for seconds in spent)


def test_a_side_that_cannot_start_is_a_users_mistake():
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "--quick", "--threads", "1", "--peer", "nobody"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: nobody has ended: ")


# Layers of 24 + 12 + 12 + 24 = 72 weights, a head of 60, one layer of attention: queries 4 wide, keys (and values) 2.
SMALL = Shapes(((4, 6), (2, 6), (2, 6), (6, 4)), (10, 6), layers=1, queries=4, keys=2)


def test_tokens_computed_bound_the_ratio():
    """8 x (180 + 128) = 2,464 to 180 + 8 x 128 = 1,204; 9,024 to 2,024; prompts of 2 and 4, two answers of 1: 16 to 10."""
    assert limits.tokens_bound([180] * 4, 8, 128) == pytest.approx(2.0465, abs=1e-4)
    assert limits.tokens_bound([LONG.prompt_tokens], 8, 128) == pytest.approx(4.4585, abs=1e-4)
    assert limits.tokens_bound([2, 4], 2, 1) == 1.6


def test_operations_of_an_update():
    """A prompt of 3, two answers of 2. Layers: 7 tokens x 72 weights x 2 = 1,008. Head: 4 answer tokens x 60 x 2 = 480.

    Seen: the prompt's tokens 1 + 2 + 3, each answer's 4 + 5: 24 pairs x 4 wide x 4 = 384. Forward 1,872, backward twice so.
    """
    assert limits.forward_flops(SMALL, [3], 2, 2) == 1872
    assert limits.update_flops(SMALL, [3], 2, 2) == 5616
    assert limits.update_flops(SMALL, [3, 3], 2, 2) == 11232


def test_operations_and_bytes_of_a_rollout():
    """The same. Prefill: 3 x 72 x 2 = 432, one row of logits 120, 6 pairs x 16 = 96.

    One step for each second token: 2 rows x 132 x 2 = 528, 2 x 4 pairs x 16 = 128. It reads 132 weights, and of 3 tokens of
    the prompt and one of each answer 2 + 2 numbers: 152 numbers. Three tokens: 2 steps read 264 weights, 6 tokens of the
    prompt, 1 and then 2 of each answer: 264 + 4 x 12 = 312.
    """
    assert limits.prefill_flops(SMALL, [3]) == 648
    assert limits.decode_flops(SMALL, [3], 2, 2) == 656
    assert limits.decode_bytes(SMALL, [3], 2, 2, size=4) == 608
    assert limits.decode_bytes(SMALL, [3], 2, 3, size=1) == 312


def test_a_rollout_is_bound_by_operations_or_by_bytes():
    """At 54 operations and 50 bytes per second the prefill's 648 take 12 s, its 528 bytes 10.56.

    In decoding 656 operations take 12.15 s and 608 bytes 12.16. The slower product and the slower way to read are no limits.
    """
    machine = Limits({"a": 54.0, "b": 9.0}, {"sum": 5.0, "copy": 50.0})
    assert limits.rollout_s(SMALL, [3], 2, 2, 4, machine) == pytest.approx(12 + 12.16)


def test_shapes_and_operations_are_those_that_pytorch_counts(tmp_path):
    """Products of a real forward and backward, counted as they run: layers and head, without attention's. Backward computes
    the logits again, which is no work that has to be done: 2 x 97 x 32 for each of 6 answer tokens, 37,248."""
    lm = tiny("llama", tied=False)
    lm.save_pretrained(tmp_path)
    shapes = Shapes.of(str(tmp_path))
    assert (shapes.layers, shapes.queries, shapes.keys, shapes.head) == (2, 32, 16, (97, 32))
    with FlopCounterMode(display=False) as counter:
        logp_BT, _ = Policy(lm)([Group([1, 2, 3, 4, 5], [[6, 7, 8], [9, 10, 11]])])
        logp_BT.sum().backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert counted == limits.update_flops(replace(shapes, queries=0), [5], 2, 3) + 37_248


def test_shares_are_least_seconds_to_median_ones():
    """2 s of 2, 4 and 8: 2 to 4. The update 3 of 4 s. No share of what a side does not know."""
    possible = {"seconds": 2.0, "update_s": 3.0, "update_cpu_s": 3.0, "flops": {}}
    found = {"seconds": [8.0, 2.0, 4.0], "update_s": [4.0], "score_s": [1.0]}
    assert shares(possible, found) == {"seconds_share": 50.0, "update_s_share": 75.0}


def test_the_limits_are_the_best_of_all_turns():
    first = {"seconds": 2.0, "flops": {"a": 5.0, "b": 1.0}, "bytes": {"copy": 3.0}}
    second = {"seconds": 3.0, "flops": {"a": 4.0, "b": 2.0}, "bytes": {"copy": 4.0}}
    assert fastest([first, second]) == {"seconds": 2.0, "flops": {"a": 5.0, "b": 2.0}, "bytes": {"copy": 4.0}}


def test_the_ideal_of_a_job_takes_what_the_limits_allow(monkeypatch):
    """The ideal of a step: 5,616 operations of the update at 100 per second; on two threads twice that in CPU time."""
    monkeypatch.setattr(limits, "measure", lambda *_: Limits({"a": 100.0}, {"sum": 1e9}))
    job = {"task": "step", "prompts": [[1, 2, 3]], "n": 2, "max_new_tokens": 2, "micro_batch": 8}
    found = limits.ideal(SMALL, torch.float32, job, 2)
    assert (found["update_s"], found["update_cpu_s"], found["score_s"]) == (56.16, 112.32, 18.72)
    assert found["generate_s"] == pytest.approx(6.48 + 6.56) and found["seconds"] == pytest.approx(87.92)
    assert limits.ideal(SMALL, torch.float32, {**job, "task": "rollout"}, 2)["cpu_s"] == pytest.approx(26.08)


def test_the_limits_alone(tmp_path):
    """One row, without a side: products of the model's shapes, the square one, and three ways to read."""
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", "limits", "--dtype", "float32", "--repeats", "1", "--threads", "1",
         "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["side"], row["workload"]["name"], row["dtype"]) == ("limits", "limits", "float32")
    assert set(row["limits"]["bytes"]) == {"sum", "copy", "matrix by vector"} and len(row["limits"]["flops"]) == 6
    assert min(*row["limits"]["flops"].values(), *row["limits"]["bytes"].values()) > 1e7
    assert "GFLOP/s" in done.stdout and "median s" not in done.stdout
