"""A run folder with one thing wrong: any byte of a checkpoint, any file of a run. It is refused, or told, in one line."""

import json
import random
import shutil
import subprocess

import pytest
import torch
from test_runs import Line, fresh, learn, make
from tiny import tiny

from analysis import audit, byhand
from analysis.clusters import PersonasCommand, personas_command
from analysis.pairing import recorded
from common import files
from common.errors import UserError
from common.files import SUMS, hash_of, read_lines, sha256, write_sums
from common.hub import check_model, load_tokenizer
from engine.shards import intact, read_part, save_parts, weights
from model import Policy
from tools import report
from training.config import MAY_DIFFER
from training.folder import Stopped, damage, newest_checkpoint, open_run, stage_steps
from training.records import sample_from_record


def flipped(raw, at, bit=0):
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of one weight, stopped after two steps of a stage: weights, moments, reference, two files that grow."""
    out, line = tmp_path_factory.mktemp("small") / "run", Line()
    run = fresh(out)
    for step, teacher in stage_steps(run, line, 0, 4, make(line), 2):
        if step == 2:
            break
        learn(line, teacher)
        run.append("metrics.jsonl", [{"step": step}])
        run.append("buffer.jsonl", [{"kept": "é"}])
    return out


def refused(out):
    """The one line that opening a run gives."""
    with pytest.raises(UserError) as error:
        fresh(out, resume=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_byte_of_a_checkpoint_and_of_the_files_it_knows_counts(small, tmp_path):
    """One bit of each byte, of about 2,000: position, offsets, sums, weights, moments, reference, records, settings."""
    fresh(shutil.copytree(small, tmp_path / "whole"), resume=True)
    rng, out = random.Random(0), tmp_path / "run"
    shutil.copytree(small, out)
    files = [path for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    tensors = {f"{part}.safetensors" for part in ("weights", "moments", "reference")}
    assert {path.name for path in files} == {*tensors, "state.json", SUMS, "metrics.jsonl", "buffer.jsonl", "config.json"}
    for path in files:
        raw = path.read_bytes()
        for at in range(len(raw)):
            path.write_bytes(flipped(raw, at, rng.randrange(8)))
            assert path.name in refused(out) or path.name in (SUMS, "config.json"), at
        for at in range(0, len(raw), 7):
            path.write_bytes(raw[:at])
            refused(out)
        path.unlink()
        refused(out)
        path.write_bytes(raw)
    assert fresh(out, resume=True).position.step == 2


def test_a_file_that_nobody_wrote_is_no_part_of_a_checkpoint(small, tmp_path):
    """But what other systems leave beside it, hidden, does no harm."""
    out = shutil.copytree(small, tmp_path / "run")
    checkpoint = newest_checkpoint(out)
    (checkpoint / "._weights.safetensors").write_bytes(b"x")
    fresh(out, resume=True)
    shutil.copy(checkpoint / "weights.safetensors", checkpoint / "weights-00001-of-00002.safetensors")
    assert "weights-00001-of-00002.safetensors is not what was written" in refused(out)


def test_a_list_of_sums_that_was_cut_is_refused(small, tmp_path):
    """Also where only its last line break is gone: it may be a list that lacks lines."""
    out = shutil.copytree(small, tmp_path / "run")
    path = newest_checkpoint(out) / SUMS
    path.write_text(path.read_text().removesuffix("\n"))
    assert "SHA256SUMS is damaged" in refused(out)


def test_a_checkpoint_of_an_earlier_version_is_refused(small, tmp_path):
    out = shutil.copytree(small, tmp_path / "run")
    (newest_checkpoint(out) / SUMS).unlink()
    assert "has no SHA256SUMS: an earlier version wrote it" in refused(out)
    assert damage(out) is None


def test_a_run_that_lost_its_checkpoints_is_not_emptied(small, tmp_path):
    """Without a checkpoint a run begins again and its files are cut to nothing: only where none of them holds a rollout."""
    out = shutil.copytree(small, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    assert "holds rollouts and no checkpoint" in refused(out)
    assert len(read_lines(out / "metrics.jsonl")) == 2
    (out / "buffer.jsonl").unlink()
    assert fresh(out, resume=True).position.step == 0


def test_a_folder_with_another_name_is_no_checkpoint(small, tmp_path):
    out = shutil.copytree(small, tmp_path / "run")
    checkpoint = newest_checkpoint(out)
    shutil.copytree(checkpoint, checkpoint.with_name("999-old"))
    assert newest_checkpoint(out) == checkpoint


def test_what_grows_after_a_checkpoint_goes_on_from_its_sum(small, tmp_path):
    """A resumed run's next checkpoint knows the whole file: what stood there and what came."""
    out, line = shutil.copytree(small, tmp_path / "run"), Line()
    run = fresh(out, resume=True)
    with pytest.raises(Stopped):
        for step, _ in stage_steps(run, line, 0, 4, make(line), 100):
            run.append("metrics.jsonl", [{"step": step}])
            run.stop_asked = True
    state = json.loads((newest_checkpoint(out) / "state.json").read_text())
    assert [x["step"] for x in read_lines(out / "metrics.jsonl")] == [0, 1, 2]
    assert state["sums"]["metrics.jsonl"] == sha256(out / "metrics.jsonl")
    assert damage(out) == []


def test_sums_are_those_of_sha256sum(tmp_path):
    """SHA-256 of "abc" is FIPS 180-2's example; the first byte alone is that of "a"."""
    save_parts(tmp_path / "saved", {"weights": {"w": torch.arange(3.0)}}, {"position": {}})
    assert subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=tmp_path / "saved").returncode == 0
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_of(tmp_path / "x", 1).hexdigest() == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    with pytest.raises(OSError, match="1 bytes short"):
        sha256(tmp_path / "x", 4)


def test_cold_start_weights_are_compared_too(tmp_path):
    """What the KL to the cold start is measured against; read in the middle of a later iteration."""
    policy = Policy(tiny())
    save_parts(tmp_path / "cold", {"weights": weights(policy)})
    read_part(intact(tmp_path / "cold"), "weights", weights(policy))
    path = tmp_path / "cold/weights.safetensors"
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 5))
    read_part(tmp_path / "cold", "weights", weights(policy))  # safetensors itself sees nothing
    with pytest.raises(UserError, match=r"cold/weights.safetensors is not what was written \(SHA-256\); restore it"):
        intact(tmp_path / "cold")


# A whole run


@pytest.fixture(scope="module")
def copy(finished, tmp_path_factory):
    """One copy of the finished run for all tests here; each puts back what it changed."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("damage") / "run")


KNOWN = ("metrics.jsonl", "buffer.jsonl", "cold_start.jsonl", "selfemo_test.jsonl", "rollouts/iteration-1.jsonl",
         "rollouts/iteration-2.jsonl", "config.json")  # fmt: skip


def ways(raw, rng):
    """Three flipped bits, another digit, a cut, a line gone, a line twice, two lines that changed places, nothing at all."""
    lines = raw.splitlines(keepends=True)
    i, j = rng.sample(range(len(lines)), 2)
    yield from (flipped(raw, rng.randrange(len(raw)), rng.randrange(8)) for _ in range(3))
    at = rng.choice([i for i, byte in enumerate(raw) if byte in b"123456789"])
    yield flipped(raw, at)
    yield raw[: rng.randrange(len(raw))]
    yield b"".join(lines[:i] + lines[i + 1 :])
    yield b"".join([*lines[:i], lines[i], *lines[i:]])
    lines[i], lines[j] = lines[j], lines[i]
    if b"".join(lines) != raw:
        yield b"".join(lines)
    yield b""


@pytest.mark.parametrize("name", KNOWN)
def test_resume_audit_and_report_see_a_changed_file(copy, name):
    path, rng = copy / name, random.Random(name)
    raw, settings = path.read_bytes(), json.loads((copy / "config.json").read_text())
    resume = lambda: open_run(copy, settings, resume=True, may_differ=MAY_DIFFER)  # noqa: E731
    page = lambda: report.page(report.Report(copy))  # noqa: E731
    assert damage(copy) == [] and audit.audit(copy).problems == () and page()
    try:
        for changed in ways(raw, rng):
            path.write_bytes(changed)
            for what in (resume, page):
                with pytest.raises(UserError) as error:
                    what()
                assert "\n" not in str(error.value)
            try:
                assert any(str(path) in problem for problem in audit.audit(copy).problems)
            except UserError as error:
                assert path.name in str(error) and "\n" not in str(error)
    finally:
        path.write_bytes(raw)


def test_a_changed_state_is_no_witness(copy):
    """One digit more in an offset, in JSON that still reads: what it knows of the files is not believed."""
    path = newest_checkpoint(copy) / "state.json"
    raw = path.read_text()
    offset = json.loads(raw)["offsets"]["buffer.jsonl"]
    try:
        path.write_text(raw.replace(f'"buffer.jsonl": {offset}', f'"buffer.jsonl": {offset}0'))
        assert damage(copy) == [f"{path} is not what was written (SHA-256)"]
        assert audit.audit(copy).problems[0] == damage(copy)[0]
    finally:
        path.write_text(raw)


def test_the_other_readers_of_a_run_look_too(copy):
    """The judge's pairs and the clusters of personas."""
    path = copy / "rollouts/iteration-1.jsonl"
    raw = path.read_bytes()
    try:
        path.write_bytes(flipped(raw, len(raw) // 2))
        for read in (lambda: recorded(copy, "0", "1"), lambda: personas_command(PersonasCommand(run=copy))):
            with pytest.raises(UserError, match="iteration-1.jsonl is not what the run wrote"):
                read()
    finally:
        path.write_bytes(raw)


def test_an_audit_without_a_checkpoint_says_so(copy, tmp_path):
    """Somebody may be given the records without the weights."""
    out = shutil.copytree(copy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert "files not compared with a checkpoint" in audit.audit(out).summary
    assert "files not compared" not in audit.audit(copy).summary


def test_records_without_a_checkpoint_that_are_no_records(copy, tmp_path):
    """No sum protects them here; what an audit, a derivation and a page say of them is still one line each."""
    out = shutil.copytree(copy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    path = out / "rollouts/iteration-1.jsonl"
    whole = path.read_bytes()
    first, rest = whole.split(b"\n", 1)
    sample = json.loads(first)["sample_id"]
    records = [json.loads(first) for _ in range(5)]
    del records[0]["answers"][0]["parse"]
    records[1]["answers"] = 5
    records[2]["gold"] = {"neutral": "x"}
    records[3]["core"] = None
    records[4]["answers"][0]["parse"]["last_emotions"] = []
    for line in (*(json.dumps(record).encode() for record in records), b"[]", b"5", b"\xff{}", b"[" * 100_000, b"\0"):
        path.write_bytes(line + b"\n" + rest)
        shown = (lambda run: audit.show(run, sample), lambda run: byhand.chapter(run, sample))
        for what in (audit.audit, *shown, lambda run: report.page(report.Report(run))):
            try:
                found = what(out)
            except UserError as error:
                assert "\n" not in str(error) and str(out) in str(error)
            else:
                assert isinstance(found, str) or found.problems
    (out / "rollouts/iteration-1-old.jsonl").write_bytes(b"{")
    path.write_bytes(whole)
    assert audit.audit(out).problems == ()


@pytest.mark.parametrize("old, new", [('"reward/original": ', '"reward/original": "x", "x": '), ('"step"', '"stop"')])
def test_a_page_about_metrics_that_are_none_is_one_line(copy, tmp_path, old, new):
    out = shutil.copytree(copy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    text = (out / "metrics.jsonl").read_text()
    assert old in text
    (out / "metrics.jsonl").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="holds what selfemo.py does not write") as error:
        report.page(report.Report(out))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"n": "3"}, {"n": 0}, {"S": 0}, {"T": None}, {"keep_reward": "x"}, {"self_grpo": 1}, {"max_new_tokens": True}]
)
def test_a_config_that_is_none_is_one_line(copy, tmp_path, change):
    out = shutil.copytree(copy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "model"))
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(UserError, match=rf"config.json: {next(iter(change))} is .* or damaged"):
        audit.audit(out)
    (out / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in change}))
    with pytest.raises(UserError, match="config.json"):
        audit.audit(out)


def test_the_exported_model_is_compared_when_it_is_opened(copy, tmp_path):
    """Weights and tokenizer; a model folder of others has no sums, and one that was changed on purpose may lose them."""
    model = shutil.copytree(copy / "model", tmp_path / "model")
    assert (model / SUMS).exists()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        raw = (model / name).read_bytes()
        (model / name).write_bytes(flipped(raw, len(raw) - 4))
        with pytest.raises(UserError, match=rf"{name} is not what was written \(SHA-256\): restore it, or delete"):
            Policy.load(model)
        if name != "model.safetensors":
            with pytest.raises(UserError, match=name):
                load_tokenizer(model)
        (model / name).write_bytes(raw)
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(flipped(raw, len(raw) - 4))
    load_tokenizer(model)  # reads no weights
    (model / SUMS).unlink()
    check_model(model)
    Policy.load(model)
    write_sums(model)
    Policy.load(model)
    (model / SUMS).write_text("")
    with pytest.raises(UserError, match="is damaged"):
        check_model(model)


@pytest.mark.parametrize("name", ["cold_start.jsonl", "selfemo_test.jsonl", "buffer.jsonl"])
def test_a_record_of_another_shape_is_named(place, finished, tmp_path, name):
    """A run killed before its first checkpoint, then damaged: no sum knows the file yet, reading it still does not crash."""
    lines = read_lines(finished / name)
    for broken in ({"sample_id": "x"}, {**lines[0], "child": 5, "ids": 5, "context": 5}):
        with pytest.raises(UserError, match=rf"{name} line 2 is not what a run writes"):
            builders = {"cold_start.jsonl": lambda x: tuple(x["ids"]), "selfemo_test.jsonl": sample_from_record,
                        "buffer.jsonl": lambda x: sample_from_record(x["child"])}  # fmt: skip
            files.build_records(tmp_path / name, [lines[0], broken], builders[name])


def test_main_says_it_in_one_line_and_exits_with_2(place, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    for path in (out / "buffer.jsonl", newest_checkpoint(out) / "weights.safetensors"):
        raw = path.read_bytes()
        path.write_bytes(flipped(raw, len(raw) // 2))
        status, _, complained = place.run(out, resume=True)
        assert (status, complained.count("\n")) == (2, 1)
        assert complained.startswith("error: ") and str(path) in complained
        path.write_bytes(raw)
    assert place.run(out, resume=True)[0] == 0
