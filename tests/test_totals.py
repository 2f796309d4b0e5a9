"""What an audit knows of sums, evaluations and data; each forgery here once passed with 0 differences."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lines, status_of
from sceptic import mistakes

import evaluate
from analysis import audit
from analysis.audit import BufferFile, as_csv, differences, recompute
from common.errors import UserError
from common.files import jsonl, read_json
from data import Output, parse_output
from training.metrics import rollout_metrics
from training.records import digest


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run without its checkpoints."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "cold_start", "tensorboard"))
    return tmp_path / "run"


def audited(run, **more):
    return audit.audit(run, score=lambda asked, parses: evaluate.score(asked, parses).metrics(), **more)


def edit(path, change):
    """Rewrite the lines of a file; `change` gives the new line, or None for none."""
    path.write_text(jsonl([new for line in lines(path) if (new := change(line)) is not None]), encoding="utf-8")


def test_an_honest_run_is_compared_as_a_whole(run):
    """Two iterations of three RL steps, 8 evaluations: nothing differs, and only the checkpoint is not there."""
    findings = audited(run)
    assert findings.problems == ()
    assert "numbers of metrics.jsonl compared" in findings.summary
    assert "not scored again" not in findings.summary and "not compared with data" not in findings.summary
    rows = lines(run / "evaluations/iteration-1.jsonl")
    assert {"eval/tiny", "eval/selfemo"} == {row["set"] for row in rows}
    assert {row["set"] for row in lines(run / "evaluations/iteration-2.jsonl")} >= {"test/tiny"}


def test_an_accuracy_that_no_answer_supports_is_found(run):
    """.9 in every evaluation: one difference for each set of each line."""
    told = [line for line in lines(run / "metrics.jsonl") if line["phase"] == "eval"]
    sets = [name for line in told for name in line if name.endswith("/acc")]
    edit(run / "metrics.jsonl", lambda line: {name: 0.9 if name.endswith("/acc") else x for name, x in line.items()})
    found = [p for p in audited(run).problems if "/acc: written 0.9, recomputed" in p and ": reward/acc" not in p]
    assert len(found) == len(sets) >= 10
    shutil.rmtree(run / "evaluations")
    assert f"{len(sets)} evaluations not scored again (no evaluations/)" in audited(run).summary


@pytest.mark.parametrize("name", ["reward/mean", "reward/iou", "consistency/mean", "rule/rate", "answer/tokens", "lam",
                                  "buffer/keep_rate", "new/distinct_2"])  # fmt: skip
def test_a_metric_that_its_records_do_not_support_is_found(run, name):
    """By name, in its line."""
    edit(run / "metrics.jsonl", lambda line: {**line, name: 0.123} if name in line else line)
    found = audited(run).problems
    assert found and all(f": {name}: written 0.123, recomputed " in problem for problem in found)


def test_lines_of_rl_steps_that_go_or_come_are_found(run):
    def changed(line):
        if line["phase"] == "rl" and line["step"] == 1:
            return None
        return {**line, "rule/glory": 1.0} if line["phase"] == "rl" and line["step"] == 2 else line

    edit(run / "metrics.jsonl", changed)
    more = {"step": 77, "iteration": 9, "phase": "rl"}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(more) + "\n")
    found = audited(run).problems
    assert len(found) == 3
    assert any("metrics.jsonl: RL step 2: 0 lines, there should be one" in problem for problem in found)
    assert any("rule/glory: written 1.0, but no record" in problem for problem in found)
    assert any(": RL step 78: it has no record" in problem for problem in found)


def valid(row):
    return isinstance(parse_output(row["text"], row["labels"], finished=row["finished"]), Output)


def test_answers_of_an_evaluation_cannot_go_or_change(run):
    """A wrong answer left out; an answer replaced by a better one; a whole set left out; gold bent to the answer."""
    path = run / "evaluations/iteration-2.jsonl"
    kept = path.read_text(encoding="utf-8")
    first = lines(path)[0]["sample_id"]
    last = [row for row in lines(path) if row["set"] == "eval/tiny" and valid(row)][-1]

    def audit_after(change):
        edit(path, change)
        found = audited(run).problems
        path.write_text(kept, encoding="utf-8")
        return found

    where = {"step": last["step"], "when": last["when"], "set": last["set"], "sample_id": last["sample_id"]}
    mine = lambda line: all(line[name] == value for name, value in where.items())  # noqa: E731
    assert any("other samples than" in p for p in audit_after(lambda line: None if line["sample_id"] == first and
               line["step"] == 3 and line["when"] != "test" else line))  # fmt: skip
    worse = audit_after(lambda line: {**line, "finished": False} if mine(line) else line)
    assert any(": eval/tiny/rule_rate: written" in p for p in worse)
    gone = audit_after(lambda line: None if line["set"] == "test/tiny" else line)
    assert [p.partition(": ")[2] for p in gone] == ["test/tiny: no answers in evaluations/ for 'test'"]
    bent = audit_after(lambda line: {**line, "gold": {"anger": 0.7, "joy": 0.3}} if mine(line) else line)
    assert any(f"gold of {last['sample_id']}: " in p and "the data says" in p for p in bent)


def forged_gold(run):
    """Other gold in every original group where selection stays silent, everything recomputed: how many, and the run."""
    config, kept = read_json(run / "config.json"), BufferFile(run)
    count, by_step = 0, {}
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        records = lines(path)
        for i, record in enumerate(records):
            for gold in ({"joy": 0.3, "anger": 0.7}, {"neutral": 0.3, "anger": 0.7}, {"neutral": 1.0}):
                if record["depth"] or record["selected"] is not None or record["gold"] == gold:
                    continue
                new = json.loads(json.dumps({**record, "gold": gold}))
                _, derived = recompute(new, config)
                for j, answer in enumerate(new["answers"]):
                    answer.update({x: derived[f"answers[{j}].{x}"] for x in ("reward", "consistency", "advantage")})
                if not list(differences(new, config, kept)):
                    records[i] = {**new, "sha256": digest(new)}
                    count += 1
                    break
        path.write_text(jsonl(records), encoding="utf-8")
        for record in records:
            by_step.setdefault(record["step"], []).append(record)
    edit(run / "metrics.jsonl", lambda x: {**x, **rollout_metrics(by_step[x["step"]])} if x["phase"] == "rl" else x)
    return count


def test_gold_is_compared_with_the_data(run, place, tmp_path):
    """Forged with all that follows from it. Without the data nobody can tell, and the audit says that it did not look."""
    count = forged_gold(run)
    assert count >= 3
    found = audited(run).problems
    assert len([p for p in found if ": gold: written" in p and "the data says" in p]) == len(found) == count
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    gone = {**config, "data": ["tiny=no/such/folder"]}
    (run / "config.json").write_text(json.dumps(gone), encoding="utf-8")
    blind = audited(run)
    assert blind.problems == () and "gold not compared with data (" in blind.summary
    shutil.copytree(place.root / "world", tmp_path / "moved")
    assert len(audited(run, data_at={"tiny": str(tmp_path / "moved")}).problems) == count
    with pytest.raises(UserError, match="--data names other: the run learned from tiny"):
        audited(run, data_at={"other": str(tmp_path)})
    with pytest.raises(UserError):
        audited(run, data_at={"tiny": str(tmp_path / "nowhere")})


def test_a_sceptic_who_imports_nothing_of_ours_agrees(run, tmp_path):
    """Every reward, consistency and advantage of the run; and not with a run in which one of them is another."""
    path = tmp_path / "all.csv"
    path.write_text(as_csv(run, None), encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "tests/sceptic.py", str(path)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parent.parent)  # fmt: skip
    assert done.stdout.strip() == ""
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert len(rows) == 2 * 3 * 5 * 3  # iterations, steps, prompts, answers
    for name in ("reward", "consistency", "advantage"):
        forged = [{**row, name: float(row[name]) + 0.01 * (i == 4)} for i, row in enumerate(rows)]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(forged)
        path.write_text(text.getvalue(), encoding="utf-8")
        assert [found[3] for found in mistakes(path)] == [name]


def test_the_commands_flags(run, tmp_path, monkeypatch, capsys, place):
    """--csv writes a file, of one sample with --show; --data is read."""
    sample = lines(run / "rollouts/iteration-1.jsonl")[0]["sample_id"]
    out = tmp_path / "group.csv"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "audit", str(run), "--show", sample, "--csv", str(out)])
    assert status_of(evaluate.main) == 0
    assert {row["sample_id"] for row in csv.DictReader(out.open(encoding="utf-8"))} == {sample}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "audit", str(run), "--data", f"tiny={place.root / 'world'}"])
    assert status_of(evaluate.main) == 0
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "audit", str(run), "--data", "tiny=nowhere"])
    assert status_of(evaluate.main) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_show_does_not_divide_by_nothing(run):
    """Where all rewards or all consistencies of a group are equal, its term is 0 and not a division by 0.000000."""
    records = [r for k in (1, 2) for r in lines(run / f"rollouts/iteration-{k}.jsonl")]
    equal = next(r for r in records if len({a["consistency"] for a in r["answers"]}) == 1)
    said = audit.show(run, equal["sample_id"])
    assert "* 0 (all equal, D5) = " in said and "/0.000000" not in said
