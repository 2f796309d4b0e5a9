"""The table of ablations: its rows, its arithmetic, and that it goes on after a kill."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import lines, results

import data
from common.errors import UserError
from tools import ablate
from tools.ablate import Ablate, Job, Row
from training import config

ROOT = Path(__file__).resolve().parent.parent


def flags_of(name, **more):
    rows = ablate.table_rows(1206, True, Path("gold.jsonl"), **{"expert": (), **more})
    return next((row.flags, row.skip) for row in rows if row.name == name)


def test_the_rows_of_table_2_as_d27_reads_them():
    """Two thirds of 1206 originals are 804, a twentieth is 60. The paper has 15 of 22.5 thousand originals, 2/3."""
    assert flags_of("full") == ((), "")
    assert flags_of("no_self_emo") == (("--self_grpo", "false", "--self_play", "false", "--originals", "0"), "")
    assert flags_of("no_self_grpo") == (("--self_grpo", "false"), "")
    assert flags_of("no_self_play") == (("--self_play", "false"), "")
    assert flags_of("lr_0") == (("--lr", "0"), "")
    assert flags_of("fewer_originals") == (("--originals", "804"), "")
    assert flags_of("few_synthetic") == (("--max_synthetic", "60"), "")
    assert flags_of("from_base") == (("--retrain_from", "base"), "")
    assert flags_of("sequence_ratio") == (("--ratio", "sequence"), "")
    assert flags_of("one_hot") == (("--gold", "gold.jsonl"), "")


def test_the_row_with_cold_needs_an_expert():
    assert flags_of("with_cold")[1].startswith("give --expert")
    flags, skip = flags_of("with_cold", expert=("--expert", "http://localhost:8000/v1", "--expert_model", "m"))
    assert flags == ("--cold_start", "expert", "--expert", "http://localhost:8000/v1", "--expert_model", "m") and not skip


def test_one_hot_gold_is_the_heaviest_label_of_every_training_sample(place):
    cfg = config.parse(place.argv("nowhere"))
    gold = {row["id"]: row["weights"] for row in ablate.one_hot_gold(cfg)}
    train = data.read_samples("tiny", place.root / "world", "train")
    assert gold == {s.id: {max(s.gold, key=s.gold.get): 1.0} for s in train}
    assert any(len(s.gold) > 1 for s in train)
    rows = ablate.table_rows(24, False, Path("gold.jsonl"), ())
    assert next(row.skip for row in rows if row.name == "one_hot").startswith("gold has one label")


def test_rows_are_chosen_by_name_in_the_order_of_the_table():
    rows = ablate.table_rows(100, True, Path("g"), ())
    assert [row.name for row in ablate.chosen(rows, ("lr_0", "full"))] == ["full", "lr_0"]
    assert len(ablate.chosen(rows, ())) == 11
    with pytest.raises(UserError, match="--rows fulll: there are full with_cold no_self_grpo"):
        ablate.chosen(rows, ("fulll",))


def test_a_rows_flags_win_over_those_of_all_rows():
    args = Ablate(out=Path("DIR"), preset="toy")
    made = ablate.job(args, ("--lr", "0.5", "--originals", "7", "--seed", "9"), Row("x", "X", ("--lr", "0")), 2)
    assert (made.cfg.lr, made.cfg.originals, made.cfg.seed, made.cfg.out) == (0.0, 7, 2, "DIR/x-2")
    assert made.cfg.resume and made.log == Path("DIR/x-2.log")


# The table


def record(title, seeds, acc, **more):
    names = {"test/toy/acc": acc, "test/toy@1/acc": acc, "kept": [100.0] * len(acc)}
    scores = {name: ablate.spread(values) for name, values in names.items() if values}
    return {"name": title, "title": title, "flags": [], "seeds": seeds, "scores": scores, "difference": None} | more


def test_mean_and_sample_deviation():
    """.6, .7, .8: mean .7, squares .01 + 0 + .01 over 2, root .1."""
    assert ablate.cell(ablate.spread([0.6, 0.7, 0.8])) == "70.00 +- 10.00"
    assert ablate.cell(ablate.spread([0.7])) == "70.00"
    assert ablate.cell(ablate.spread([0.02, 0.04]), signed=True) == "+3.00 +- 1.41"
    assert ablate.cell(None) == "-"


def test_rows_are_compared_seed_by_seed():
    """Seeds 1 and 2 are in both: .5 - .7 = -.2, .6 - .9 = -.3."""
    full, other = record("full", [0, 1, 2], [0.1, 0.7, 0.9]), record("other", [1, 2], [0.5, 0.6])
    assert ablate.difference(other, full)["values"] == pytest.approx([-0.2, -0.3])
    assert ablate.difference(record("none", [], []), full) is None
    assert ablate.accuracy_name({"test/a/acc": 0, "test/b/acc": 0, "test/average/acc": 0}) == "test/average/acc"
    assert ablate.accuracy_name({"eval/a/acc": 0, "test/a@1/acc": 0, "test/a/acc": 0}) == "test/a/acc"


def test_the_table():
    rows = ablate.table([record("SELF-EMO", [0, 1], [0.5, 0.5]), record("w/o", [], [])])
    assert rows == [
        ["", "seeds", "kept", "toy Acc.", "toy W-F1", "toy IOU", "toy T=1 Acc.", "toy T=1 W-F1", "toy T=1 IOU",
         "Acc. against the full row"],
        ["SELF-EMO", "2", "100", "50.00 +- 0.00", "-", "-", "50.00 +- 0.00", "-", "-", "-"],
        ["w/o", "0", "-", "-", "-", "-", "-", "-", "-", "-"],
    ]  # fmt: skip
    assert ablate.text([["", "b"], ["aa", "10"]]) == "     b\naa  10"
    assert ablate.markdown([["", "b"], ["aa", "10"]]) == "|  | b |\n| --- | ---: |\n| aa | 10 |"


# Runs


def job_of(folder, argv, seed=0):
    return Job(Row("full", "SELF-EMO"), seed, folder, tuple(argv), config.parse(argv))


def test_a_run_with_other_settings_is_no_run_of_the_row(place, finished):
    assert ablate.finished(job_of(finished, place.argv(finished)))
    assert not ablate.finished(job_of(place.root / "nowhere", place.argv("nowhere")))
    with pytest.raises(UserError, match=r"made with other settings \(lr was 0.001, is 0.0\)"):
        ablate.finished(job_of(finished, place.argv(finished, "--lr", 0)))


def test_a_setting_that_an_older_run_does_not_know_had_its_default(place, finished, tmp_path):
    known = json.loads((finished / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in known.items() if k != "limit"}))
    assert not ablate.finished(job_of(tmp_path, place.argv(tmp_path)))
    with pytest.raises(UserError, match=r"limit was \[\], is \['tiny=3'\]"):
        ablate.finished(job_of(tmp_path, place.argv(tmp_path, "--limit", "tiny=3")))


def test_a_killed_run_with_half_a_line_is_not_finished(place, finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phas')
    assert not ablate.finished(job_of(tmp_path, place.argv(tmp_path)))


def test_scores_of_a_run(finished, place):
    found = ablate.scores(job_of(finished, place.argv(finished)))
    written = lines(finished / "metrics.jsonl")
    assert found["test/tiny/acc"] == written[-1]["test/tiny/acc"]
    assert found["eval/selfemo/iou"] == written[-2]["eval/selfemo/iou"]
    assert found["kept"] == len(lines(finished / "buffer.jsonl"))


def stub(tmp_path, monkeypatch, code):
    """A program in the place of selfemo.py."""
    path = tmp_path / "stub.py"
    path.write_text(code)
    monkeypatch.setattr(ablate, "SELFEMO", path)


def jobs(tmp_path, place, n):
    return [job_of(tmp_path / f"full-{seed}", place.argv(tmp_path / f"full-{seed}"), seed) for seed in range(n)]


def test_a_failed_run_does_not_stop_the_others(place, tmp_path, monkeypatch):
    """Every job once and in order, and its own log: the status and the last line that it wrote."""
    stub(tmp_path, monkeypatch, "import sys; print('first'); print('went to', sys.argv[-1], '\\n'); sys.exit(3)")
    made = jobs(tmp_path, place, 3)
    assert ablate.run_all(made, 1) == [f"full-{i}: status 3: went to {made[i].argv[-1]}" for i in range(3)]


def test_a_mistake_in_the_command_stops_all(place, tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "import sys; print('error: no such data', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match="full-0: status 2: error: no such data"):
        ablate.run_all(jobs(tmp_path, place, 3), 1)
    assert not (tmp_path / "full-1.log").exists()


def test_whatever_ends_it_the_runs_that_go_are_asked_to_save(place, tmp_path, monkeypatch):
    """The first run ends with status 2; the second one, started beside it, gets SIGTERM and says so."""
    stub(tmp_path, monkeypatch, (
        "import pathlib, signal, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "ready = out.parent / 'ready'\n"
        "while out.name == 'full-0' and not ready.exists(): time.sleep(.05)\n"
        "if out.name == 'full-0': sys.exit(2)\n"
        "ready.touch()\n"
        "time.sleep(60)\n"
    ))  # fmt: skip
    with pytest.raises(UserError):
        ablate.run_all(jobs(tmp_path, place, 2), 2)
    assert (tmp_path / "full-1.log").read_text() == "saved\n"


def test_no_run_is_started_beside_one_that_still_writes_there(place, tmp_path):
    job = jobs(tmp_path, place, 1)[0]
    with job.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a run still writes to .*full-0"):
            ablate.start(job)


def command(place, out, *more):
    """Two rows, two seeds, on the tiny world, in processes of their own."""
    rows = ("--rows", "full", "no_self_emo", "--seeds", "2")
    extra = place.argv("", "--eval_every", 9)[:-2]
    return [sys.executable, "-m", "tools.ablate", "--out", str(out), *rows, *more, "--", *extra]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def made(argv):
    return subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_two_rows_with_two_seeds_go_on_after_a_kill(place, tmp_path):
    """The first run is killed in its RL stage; the second command makes what is missing; the third one only shows it."""
    out = tmp_path / "ablate"
    first = subprocess.Popen(command(place, out), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((out / "full-0").glob("checkpoints/001-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGKILL)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1 and "full-0: status -9: " in said
    assert sorted(path.name for path in out.glob("*-?")) == ["full-0", "full-1", "no_self_emo-0", "no_self_emo-1"]
    untouched = results(out / "full-1")

    second = made(command(place, out, "--markdown"))
    assert second.returncode == 0, second.stderr
    assert "full-0: started" in second.stdout and second.stdout.count("started") == 1
    assert results(out / "full-1") == untouched
    table = [line.split(" | ")[:2] for line in second.stdout.splitlines()[-2:]]
    assert table == [["| SELF-EMO", "2"], ["| w/o SELF-EMO", "2"]]
    found = json.loads((out / "ablate.json").read_text())
    assert (found["failed"], found["skipped"], found["seeds"]) == ([], {}, 2)
    full, plain = found["rows"]
    assert full["scores"]["kept"]["mean"] > 0 == plain["scores"]["kept"]["mean"]
    accuracy = [lines(out / f"full-{s}" / "metrics.jsonl")[-1]["test/tiny/acc"] for s in (0, 1)]
    assert full["scores"]["test/tiny/acc"]["values"] == accuracy
    assert [json.loads((out / n / "config.json").read_text())["seed"] for n in ("full-0", "full-1")] == [0, 1]

    assert place.run(tmp_path / "whole", "--preset", "toy", "--eval_every", 9)[0] == 0
    assert results(tmp_path / "whole") == results(out / "full-0")

    third = made(command(place, out, "--show"))
    assert third.returncode == 0 and "started" not in third.stdout
    assert third.stdout.splitlines()[-1].startswith("w/o SELF-EMO")


def test_a_users_mistake_is_one_line(place, tmp_path, capsys):
    for argv, words in ((["--rows", "x"], "--rows x: there are full"), (["--seeds", "0"], "must be at least 1")):
        assert ablate.main(["--out", str(tmp_path / "no"), *argv, "--", *place.argv("")[:-2]]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert not (tmp_path / "no").exists()
