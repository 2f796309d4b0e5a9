"""The benchmark: what it asks of every side, what it says of them, and a short run of ours against a stand-in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tools.bench import GROWTH, QUICK, STEP, WORKLOADS, A, B, Settings, can, chosen, prompts, ratios, table
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
