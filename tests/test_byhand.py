"""The chapter of a group worked by hand: it is what the code prints, its numbers are right, and its update happened."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import lines, status_of

import evaluate
from analysis import audit, byhand
from common.errors import UserError
from tools import replay
from training import records

ROOT = Path(__file__).resolve().parent.parent
GROUP = ROOT / "docs" / "by-hand"
SAMPLE = "toy/train/d215/1"


def the_record():
    return lines(GROUP / "rollouts" / "iteration-1.jsonl")[0]


def the_update():
    return json.loads((GROUP / "update.json").read_text(encoding="utf-8"))


def chapter():
    return (ROOT / "docs" / "by-hand.md").read_text(encoding="utf-8").splitlines()


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "audit", *map(str, arguments)])
    status = status_of(evaluate.main)
    return status, *capsys.readouterr()


def test_the_chapter_is_what_the_command_prints(monkeypatch, capsys):
    """If this fails because the code has changed on purpose: python evaluate.py audit docs/by-hand --show
    toy/train/d215/1 --markdown true > docs/by-hand.md, and read what has become of it."""
    monkeypatch.chdir(ROOT)
    printed = command(monkeypatch, capsys, "docs/by-hand", "--show", SAMPLE, "--markdown", "true")
    assert printed == (0, (ROOT / "docs" / "by-hand.md").read_text(encoding="utf-8"), "")


def test_the_record_is_what_follows_from_its_texts():
    """Rule, rewards, core, consistencies and advantages, read again from the eight texts, and no leaf was changed."""
    record, config = the_record(), json.loads((GROUP / "config.json").read_text(encoding="utf-8"))
    _, derived = audit.recompute(record, config)
    written = {**record, **{f"answers[{i}].{k}": v for i, a in enumerate(record["answers"]) for k, v in a.items()}}
    assert len(derived) == 42
    assert list(audit.compare(written, {**derived, "sha256": records.digest(record)})) == []


@pytest.mark.parametrize(
    "line",
    [
        # gold .65 fear, .35 sadness against fear alone: smaller .65, larger 1 + .35
        "IOU = 0.650000 / 1.350000 = 0.481481; r = 0.481481 + 0.1 = **0.581481**.",
        # fear 4 * .65 + 1; sadness 3 * .35; joy .35 + .65 from two answers, neutral 1 from one: joy is the third
        "| fear | A0 0.6500, A1 0.6500, A2 0.6500, A3 0.6500, A5 1.0000 | 3.600000 | 0.637168 |",
        "| neutral | A7 1.0000 | 1.000000 | — |",
        "| A2 | fear, joy | 2/3 | 0.666667 |",
        # 3 * 1.1 + 2 * .581481 + 2 * .1 + 0 = 4.662963; squares 3 * .267424 + 2 * 2e-6 + 2 * .233164 + .339737
        "- r: mean 4.662963 / 8 = 0.582870; squared distances from it sum to 1.608338; the root of 1.608338 / 7 is "
        "0.479336.",
        # 1.078844 + .15 * .846111 = 1.205761; -1.215994 - .15 * 1.410185 = -1.427522
        "| A0 | 1.100000 | 1.078844 | 0.666667 | 0.846111 | **1.205761** |",
        "| A4 | 0.000000 | -1.215994 | 0.000000 | -1.410185 | **-1.427522** |",
        # e^(-3.895843 + 3.631620) = e^-.264223 = .767803 < .8: times -1.2189, held at .8 * -1.2189 = -.97512
        "| A7 | `keeps it in` | -1.218900 | -3.631620 | -3.895843 | 0.767803 | -0.935875 | -0.975120 | **-0.975120** |",
        # d = -2.796230 + 3.895843 = 1.099612, e^d = 3.003, k3 = 3.003001 - 1.099612 - 1
        "| `keeps it in` | -2.796230 | -3.895843 | 1.099612 | 3.003001 | 0.903389 |",
        # clipped: only .001 * (1 - 3.003) is left
        "| A7 | `keeps it in` | 0, clipped | -0.002003 | **-0.002003** | -0.002003 |",
        # 1.427522 * 1.145566 = 1.635320 + .001 * (1 - .399615)
        "| A4 | `fond tie` | 1.635320 | 0.000600 | **1.635920** | 1.635920 |",
        # -1.380678 * 2 - .141472 + 1.63592 = -1.266908; p = e^(10.57472 - 11.650979) = .340868; .340868 * 1.395519 = .475688
        "| `fond tie` | A0, A2, A3, A4 | 10.574720 | 0.340868 | -1.266908 | 0.475688 | -0.791220 | -0.791219 |",
    ],
)
def test_numbers_of_the_chapter_by_hand(line):
    assert line in chapter()


def test_the_slopes_worked_by_hand_are_those_that_autograd_found():
    """All 344 tokens of the group: -A ratio, 0 where clipped, plus .001 (1 - e^d), over 2395. One is clipped."""
    found = [x for row in byhand.rows_of(the_record(), the_update()) for x in row]
    assert (len(found), sum(x.clipped(0.2) for x in found)) == (344, 1)
    for x in found:
        assert sum(x.slopes(0.2, 0.001)) / 2395 == pytest.approx(x.measured, abs=2e-9), x


def test_the_slopes_of_all_logits_sum_to_nothing():
    fork = the_update()["fork"]
    assert sum(fork["gradient"]) + fork["gradient_of_the_others"] == pytest.approx(0, abs=1e-9)


# Replaying a run


@pytest.mark.parametrize("number", [0, 1])
def test_a_replay_meets_the_run_in_the_middle_of_a_step(finished, number):
    """Step 2 of the tiny run, mini-batches of 3 and 2 prompts: the largest ratio of the groups is the one that it logged."""
    logged = next(x for x in lines(finished / "metrics.jsonl") if x["phase"] == "rl" and x["step"] == 2)
    records = [r for r in lines(finished / "rollouts" / "iteration-1.jsonl") if r["step"] == 2]
    largest = 0.0
    for record in records[3 * number : 3 * number + 3]:
        found, update = replay.replay(finished, record["sample_id"])
        assert (found, update["mini_batch"]) == (record, number)
        rows = byhand.rows_of(record, update)
        largest = max([largest, *(x.ratio for row in rows for x in row)])
        for x in (x for row in rows for x in row):
            assert sum(x.slopes(0.2, 0.001)) / update["tokens"] == pytest.approx(x.measured, abs=1e-7)
    assert largest == pytest.approx(logged["ratio/max/by_mini_batch"][number], rel=1e-5)
    assert (largest == pytest.approx(1.0, abs=1e-6)) is (number == 0)


def changed(run, to, change):
    """A copy of a run with its first rollout file changed."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "model"))
    path = to / "rollouts" / "iteration-1.jsonl"
    records = lines(path)
    change(records)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return records


def test_a_replay_that_leaves_the_run_stops(finished, tmp_path, capsys):
    def change(records):
        records[0]["answers"][0]["logprobs"][0] -= 0.01

    records = changed(finished, tmp_path / "run", change)
    arguments = [str(tmp_path / "run"), records[-1]["sample_id"], "--out", str(tmp_path / "out")]
    assert replay.main(arguments) == 2
    error = capsys.readouterr().err
    assert "the replay leaves the run at RL step 1: a log-prob differs by 0.01" in error and not (tmp_path / "out").exists()


def test_the_command_of_the_replay_writes_what_the_chapter_needs(finished, tmp_path, capsys):
    record = lines(finished / "rollouts" / "iteration-1.jsonl")[-1]
    assert replay.main([str(finished), record["sample_id"], "--out", str(tmp_path)]) == 0
    text = byhand.chapter(tmp_path, record["sample_id"])
    assert "## 8. From log-probs to the logits" in text and f"--show {record['sample_id']}" in capsys.readouterr().out
    assert replay.main([str(finished), "nobody", "--out", str(tmp_path)]) == 2
    assert "holds no answers to 'nobody' in iteration 1" in capsys.readouterr().err


# What cannot be shown


def test_without_an_update_the_chapter_ends_with_the_advantages(finished):
    record = lines(finished / "rollouts" / "iteration-2.jsonl")[0]
    text = byhand.chapter(finished, record["sample_id"])
    assert f"\npython -m tools.replay {finished} {record['sample_id']} --out DIR\n" in text
    assert "## 5. The advantages (Eq. 13)" in text and "## 6." not in text


def test_user_errors(finished, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no answers to 'nobody'"):
        byhand.chapter(finished, "nobody")
    code, out, err = command(monkeypatch, capsys, finished, "--markdown", "true")
    assert (code, out, err) == (2, "", "error: --markdown true goes with --show SAMPLE_ID\n")
    record = changed(finished, tmp_path / "run", lambda records: None)[0]
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "ratio": "sequence"}), encoding="utf-8")
    with pytest.raises(UserError, match="written for --ratio token"):
        byhand.chapter(tmp_path / "run", record["sample_id"])


def test_no_answer_breaks_out_of_its_block(finished, tmp_path):
    """A code fence in an answer is a common way to break the rule; a block around it has a longer one."""

    def change(records):
        records[0]["answers"][0]["text"] = "```python\n{}\n```"
        records[0]["answers"][0]["parse"] = {"reason": "think", "detail": "<b>`x`"}

    record = changed(finished, tmp_path / "run", change)[0]
    text = byhand.chapter(tmp_path / "run", record["sample_id"])
    assert "\n\n````text\n```python\n{}\n```\n````\n" in text
    assert "**breaks the rule** (think: `` <b>`x` ``):" in text
