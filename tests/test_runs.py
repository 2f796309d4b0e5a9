"""The run folder: what is refused, what a record holds, and that no stop, kill or half-written file changes a result.

Whole runs on the tiny world of conftest.py, on one CPU, where a resumed run repeats the rest bit by bit.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import call, lines, results
from safetensors.torch import load_file
from tiny import tiny
from torch import nn

import evaluate
import grpo
import selfemo
from common.errors import UserError
from common.files import jsonl, read_json, read_lines, write_atomically
from corpora.dialogue import Turn
from data import Completion, Failure, Output, Responder, Sample, Selection
from engine import shards
from engine.shards import load_moments, moments, read_part, save_parts, weights
from model import Policy
from training import coldstart, folder, task
from training.folder import Learner, Position, Stopped, alone, newest_checkpoint, open_run, save_checkpoint, stage_steps
from training.records import ScoredGroup, digest, group_record

NOTHING = frozenset()


def fresh(out, settings=None, *, resume=False, may_differ=NOTHING):
    return open_run(out, settings or {"lr": 1}, resume=resume, may_differ=may_differ)


# Opening


def test_a_new_folder_holds_the_settings_at_once(tmp_path):
    run = fresh(tmp_path / "a/b")
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == {"lr": 1}
    assert (run.position, run.offsets, run.loaded) == (Position(0, 0, 0), {}, None)


def test_an_existing_run_is_refused_without_resume(tmp_path):
    fresh(tmp_path)
    with pytest.raises(UserError, match="--resume"):
        fresh(tmp_path)
    assert fresh(tmp_path, resume=True).position == Position()


def test_a_run_of_an_earlier_version_has_the_defaults_of_settings_that_are_new(tmp_path):
    """`dtype` and `label_noise` were not there: such a run goes on with auto and 0, and with nothing else."""
    now = {"lr": 1, "dtype": "auto", "label_noise": 0.0, "eval_temperatures": [0.0]}
    fresh(tmp_path)
    assert fresh(tmp_path, now, resume=True).position == Position()
    with pytest.raises(UserError, match="label_noise was 0.0, is 0.4"):
        fresh(tmp_path, {**now, "label_noise": 0.4}, resume=True)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty"):
            fresh(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    fresh(tmp_path / "run")


def test_resume_without_a_run_starts_one(tmp_path):
    assert fresh(tmp_path / "run", resume=True).position == Position()


def test_changed_settings_are_refused_by_name(tmp_path):
    fresh(tmp_path, {"lr": 1, "n": 8, "save_every": 5, "old": 0})
    with pytest.raises(UserError) as error:
        fresh(tmp_path, {"lr": 2, "n": 8, "save_every": 6, "new": 0}, resume=True, may_differ=frozenset({"save_every"}))
    said = str(error.value)
    assert "lr was 1, is 2" in said and "old was 0, is None" in said and "new was None, is 0" in said
    assert "n was" not in said and "save_every" not in said
    assert "\n" not in said


def test_settings_that_change_no_result_may_change(tmp_path):
    fresh(tmp_path, {"lr": 1, "save_every": 5})
    fresh(tmp_path, {"lr": 1, "save_every": 6}, resume=True, may_differ=frozenset({"save_every"}))


def test_tensorboard_tells_fine_tunings_apart(tmp_path):
    """Their steps begin at 0 in every stage, and RL has a gradient norm too: one curve each."""
    run, seen = fresh(tmp_path), []
    run.board = SimpleNamespace(add_scalar=lambda *point: seen.append(point))
    for phase, iteration, norm in (("rl", 1, 1.0), ("sft", 1, 2.0), ("sft", 2, 3.0)):
        run.log(phase, iteration, {"grad_norm": norm, "when": "words"}, 0)
    assert seen == [("grad_norm", 1.0, 0), ("sft-1/grad_norm", 2.0, 0), ("sft-2/grad_norm", 3.0, 0)]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_an_unreadable_config_is_a_users_mistake(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        fresh(tmp_path, resume=True)


# Files


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a/x.json"
    write_atomically(path, "old")

    def no_space(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_json_lines_refuse_what_json_cannot_say():
    assert jsonl([{"a": "é"}, {"b": 0.1}]) == '{"a": "é"}\n{"b": 0.1}\n'
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            jsonl([{"a": bad}])


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(UserError, match=r"x\.jsonl line 2"):
        read_lines(path)


def test_growing_files_are_cut_back_to_where_the_checkpoint_stands(tmp_path):
    """A file that the checkpoint does not know yet is emptied."""
    run = fresh(tmp_path)
    run.append("metrics.jsonl", [{"a": 1}])
    run.append("rollouts/iteration-1.jsonl", [{"b": "é"}])
    save_checkpoint(run, {"weights": {"w": torch.zeros(1)}})
    assert run.offsets == {"metrics.jsonl": 9, "rollouts/iteration-1.jsonl": 12}
    run.append("metrics.jsonl", [{"a": 2}])
    run.append("buffer.jsonl", [{"c": 1}])
    run.append("rollouts/iteration-2.jsonl", [{"d": 1}])
    with (tmp_path / "rollouts/iteration-1.jsonl").open("a") as file:
        file.write('{"half')
    again = fresh(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"a": 1}\n'
    assert (tmp_path / "rollouts/iteration-1.jsonl").read_text() == '{"b": "é"}\n'
    assert (tmp_path / "buffer.jsonl").read_text() == (tmp_path / "rollouts/iteration-2.jsonl").read_text() == ""
    assert again.offsets == {"metrics.jsonl": 9, "rollouts/iteration-1.jsonl": 12}


def test_notes_belong_to_the_next_line_of_metrics_only(tmp_path):
    run = fresh(tmp_path)
    run.note({"rollout/tokens": 5})
    run.log("rl", 1, {"x": 1.0}, 0)
    run.log("rl", 1, {"x": 2.0}, 1)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "iteration": 1, "phase": "rl", "x": 1.0, "rollout/tokens": 5},
        {"step": 1, "iteration": 1, "phase": "rl", "x": 2.0},
    ]


# A record


def scored_group():
    context = (Turn("Ann", "I won."), Turn("Bo", "And now?"))
    responder = Responder("Ann", "calm", "prev")
    sample = Sample("w/train/d0/1+1", "w", context, responder, ("joy", "anger"), {"joy": 1.0}, origin="synthetic",
                    parent="w/train/d0/1", iteration=1, depth=1)  # fmt: skip
    output = Output("why", {"joy": 0.1}, {"hope": 0.3}, "Oh.", {"my_output": (0, 3)})
    good = Completion((4, 9), (-0.1, -1e-17), True, "…", output)
    bad = Completion((4,), (-1 / 3,), False, "x", Failure("unfinished", "cut off"))
    return ScoredGroup(sample, (1, 2), (good, bad), (1.1, 0.0), {"joy": 1.0}, (1 / 3, 0.0), (0.1 + 0.2, -0.3))


CHOSEN = Selection(0, "kept", None)


def test_a_record_says_all_that_an_audit_needs():
    record = group_record(scored_group(), CHOSEN, step=7, iteration=2, lam=1 / 3, version=14)
    sha = record.pop("sha256")
    assert len(sha) == 64
    assert record == {
        "step": 7, "iteration": 2, "sample_id": "w/train/d0/1+1", "dataset": "w", "origin": "synthetic",
        "parent": "w/train/d0/1", "depth": 1, "responder": {"name": "Ann", "persona": "calm", "kind": "prev"},
        "labels": ["joy", "anger"], "gold": {"joy": 1.0}, "prompt_ids": [1, 2], "lam": 1 / 3, "core": {"joy": 1.0},
        "weights_version": 14, "selected": 0, "why": "kept",
        "answers": [
            {"index": 0, "ids": [4, 9], "text": "…", "finished": True, "logprobs": [-0.1, -1e-17], "reward": 1.1,
             "parse": {"reason": None, "last_emotions": {"joy": 0.1}, "my_emotions": {"hope": 0.3}, "my_output": "Oh."},
             "consistency": 1 / 3, "advantage": 0.30000000000000004},
            {"index": 1, "ids": [4], "text": "x", "finished": False, "logprobs": [-1 / 3], "reward": 0.0,
             "parse": {"reason": "unfinished", "detail": "cut off"}, "consistency": 0.0, "advantage": -0.3},
        ],
    }  # fmt: skip


def test_floats_come_back_bit_by_bit_and_the_digest_holds():
    record = group_record(scored_group(), CHOSEN, step=7, iteration=2, lam=1 / 3, version=14)
    back = json.loads(jsonl([record]))
    assert back == record
    assert back["answers"][0]["advantage"] == 0.1 + 0.2 != 0.3
    assert digest(back) == record["sha256"]


def test_the_digest_is_of_the_canonical_json_without_itself():
    """printf '{"a":1,"b":"é"}' | sha256sum"""
    expected = "09ad9fd2fb648cb2f62141215828ea00a62c299db05d20aa9ade2f527a301cc6"
    assert digest({"b": "é", "a": 1}) == digest({"a": 1, "b": "é", "sha256": "anything"}) == expected
    assert digest({"b": "é", "a": 2}) != expected


def test_a_group_is_trained_on_its_token_ids():
    group = scored_group().group
    assert (group.prompt_ids, group.answers) == ((1, 2), [(4, 9), (4,)])


# Checkpoints


class Line(nn.Module):
    """One weight, learnt by AdamW; enough for checkpoints."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def copy(self):
        other = Line()
        other.load_state_dict(self.state_dict())
        return other


def learn(line, teacher):
    teacher.optimizer.zero_grad()
    (line.w**2).sum().backward()
    teacher.optimizer.step()


def make(line):
    return lambda: Learner(torch.optim.AdamW(line.parameters(), lr=0.1), line.copy())


def test_a_checkpoint_brings_back_weights_moments_reference_and_place(tmp_path):
    """Four steps in one go and 2 + 2 over a checkpoint give the same weight; the reference stays that of the start."""
    whole = Line()
    for _ in stage_steps(fresh(tmp_path / "a"), whole, 0, 4, make(whole), 100):
        pass
    straight = Line()
    for _, teacher in stage_steps(fresh(tmp_path / "b"), straight, 0, 4, make(straight), 100):
        learn(straight, teacher)
    first, run = Line(), fresh(tmp_path / "c")
    with pytest.raises(Stopped):
        for step, teacher in stage_steps(run, first, 0, 4, make(first), 100):
            learn(first, teacher)
            run.count_update()
            run.stop_asked = step == 1
    again = fresh(tmp_path / "c", resume=True)
    assert again.position == Position(0, 2, 2)
    second = Line()
    read_part(again.loaded, "weights", weights(second))
    done = []
    for step, teacher in stage_steps(again, second, 0, 4, make(second), 100):
        learn(second, teacher)
        done.append(step)
        assert teacher.reference.w.tolist() == [1.0, 2.0]
    assert done == [2, 3]
    assert torch.equal(second.w, straight.w)
    assert not torch.equal(whole.w, straight.w)


def test_stages_follow_each_other_and_what_is_done_is_skipped(tmp_path):
    run, line = fresh(tmp_path), Line()
    assert [step for step, _ in stage_steps(run, line, 0, 2, make(line), 1)] == [0, 1]
    assert run.position == Position(1, 0, 0)
    assert list(stage_steps(run, line, 0, 2, make(line), 1)) == []
    assert [step for step, _ in stage_steps(run, line, 1, 0, make(line), 1)] == []
    assert fresh(tmp_path, resume=True).position == Position(2, 0, 0)


def test_save_every_and_the_end_of_a_stage(tmp_path, monkeypatch):
    """5 steps, every 2: after steps 2 and 4, and at the end."""
    saved = []
    inner = folder.save_checkpoint
    monkeypatch.setattr(folder, "save_checkpoint", lambda run, tensors: saved.append(run.position) or inner(run, tensors))
    run, line = fresh(tmp_path), Line()
    for _ in stage_steps(run, line, 0, 5, make(line), 2):
        pass
    assert saved == [Position(0, 2, 0), Position(0, 4, 0), Position(1, 0, 0)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_the_furthest_complete_checkpoint_wins(tmp_path):
    """By number, not by name; a folder that was never renamed counts for nothing."""
    run = fresh(tmp_path)
    run.position = Position(9, 0, 3)
    nine = save_checkpoint(run, {"weights": {"w": torch.zeros(1)}})
    shutil.copytree(nine, tmp_path / "keep")
    run.position = Position(10, 2, 4)
    ten = save_checkpoint(run, {"weights": {"w": torch.zeros(1)}})
    assert not nine.exists()
    shutil.copytree(tmp_path / "keep", nine)  # as if the machine had gone down before the older one was deleted
    (tmp_path / "checkpoints/.011-000000-00000009.tmp").mkdir()
    assert newest_checkpoint(tmp_path) == ten
    assert fresh(tmp_path, resume=True).position == Position(10, 2, 4)
    run.position = Position(10, 3, 5)
    last = save_checkpoint(run, {"weights": {"w": torch.zeros(1)}})
    assert list((tmp_path / "checkpoints").iterdir()) == [last]


def test_a_checkpoint_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    run = fresh(tmp_path)
    first = save_checkpoint(run, {"weights": {"w": torch.zeros(1)}})
    run.position = Position(0, 1, 1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_space)
            with pytest.raises(OSError, match="space"):
                save_checkpoint(run, {"weights": {"w": torch.ones(1)}})
        assert newest_checkpoint(tmp_path) == first
        assert load_file(first / "weights.safetensors")["w"].tolist() == [0]


def test_moments_round_trip(tmp_path):
    policy = Policy(tiny())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    assert moments(policy, optimizer) == {}
    sum(p.square().sum() for p in policy.parameters()).backward()
    optimizer.step()
    save_parts(tmp_path / "saved", {"moments": moments(policy, optimizer)})
    other = torch.optim.AdamW(policy.parameters(), lr=0.1)
    load_moments(policy, other, tmp_path / "saved")
    for p in policy.parameters():
        assert {k: v.tolist() for k, v in other.state[p].items()} == {k: v.tolist() for k, v in optimizer.state[p].items()}
        assert set(other.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("other", [{"num_hidden_layers": 1}, {"intermediate_size": 60}, {"tied": False}])
def test_weights_of_another_model_are_refused(tmp_path, other):
    save_parts(tmp_path / "saved", {"weights": weights(Policy(tiny(**other)))})
    with pytest.raises(UserError, match="another model"):
        read_part(tmp_path / "saved", "weights", weights(Policy(tiny())))


# Whole runs: stopped, killed, damaged


MOMENTS = {  # where a process is killed: generation, update, records and buffer, checkpoint, what makes it durable, export
    "generation": (task, "generate"),
    "update": (grpo, "policy_loss"),
    "fine-tuning": (coldstart, "sft_step"),
    "records": (folder.Run, "append"),
    "checkpoint": (shards, "save_file"),
    "sync": (os, "fsync"),
    "rename": (os, "rename"),
    "tidying": (shutil, "rmtree"),
    "export": (Policy, "export"),
}


def leg(place, out, moment, nth):
    """A run in a process of its own, ended by SIGKILL when it is about to enter a moment for the nth time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfemo"])
    worker = context.Process(target=mortal, args=([*place.argv(out, "--save_every", 1), "--resume"], moment, nth))
    worker.start()
    worker.join(120)
    return worker.exitcode


def mortal(argv, moment, nth):
    torch.set_num_threads(1)
    place, name = MOMENTS[moment]
    inner, left = getattr(place, name), itertools.count(nth - 1, -1)

    def fatal(*args, **settings):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **settings)

    setattr(place, name, fatal)
    os._exit(call(argv)[0])


def test_twenty_kills_and_the_run_ends_bit_by_bit_as_if_nothing_had_happened(place, finished, tmp_path):
    """kill -9 at random moments of every kind, at least twenty; then everything the run wrote is compared."""
    rng, out, killed = random.Random(4), tmp_path / "run", []
    often = [moment for moment in MOMENTS if moment not in ("fine-tuning", "export")]
    while (position := stage_of(out)) < 5 or "export" not in killed:
        kinds = ["export"] if position == 5 else [*often, "fine-tuning"] if position % 2 == 0 else often
        moment = rng.choice(kinds)
        nth = 1 if moment in ("export", "fine-tuning") else rng.randint(1, 4)
        assert leg(place, out, moment, nth) == -signal.SIGKILL
        killed.append(moment)
    assert len(killed) >= 20
    assert set(killed) == set(MOMENTS)
    assert place.run(out, "--save_every", 1, resume=True)[0] == 0
    assert results(out) == results(finished)


def stage_of(out):
    """The stage that a run will go on with; 5 is the last, after two iterations."""
    newest = newest_checkpoint(out)
    return read_json(newest / "state.json")["position"]["stage"] if newest else 0


def stop_at(monkeypatch, updates, number=signal.SIGTERM):
    """The process gets a signal when the run has made its nth update."""
    inner = folder.Run.count_update

    def count(run):
        inner(run)
        if run.position.updates == updates:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(folder.Run, "count_update", count)


def test_a_stopped_run_saves_prints_its_command_and_goes_on_bit_by_bit(place, finished, tmp_path, monkeypatch):
    """SIGTERM or SIGINT in the cold start, in RL and in SFT of both iterations; the printed command goes on each time."""
    out = tmp_path / "run"
    plan = Position(0, 1), Position(1, 1), Position(1, 3), Position(2, 1), Position(3, 2), Position(4, 1)
    cold, kept = len(lines(finished / "cold_start.jsonl")), lines(finished / "buffer.jsonl")
    sft = [math.ceil(len({x["sample_id"] for x in kept if x["iteration"] == k}) / 6) for k in (1, 2)]
    starts = list(itertools.accumulate([0, math.ceil(cold / 6), 6, sft[0], 6]))
    argv = place.argv(out)
    for i, position in enumerate(plan):
        a_step = 2 if position.stage % 2 else 1
        with monkeypatch.context() as patch:
            stop_at(patch, starts[position.stage] + a_step * position.step, (signal.SIGTERM, signal.SIGINT)[i % 2])
            status, said, complained = call(argv)
        assert (status, complained.strip()) == (0, "saving after this step; once more to stop at once")
        state = read_json(newest_checkpoint(out) / "state.json")["position"]
        assert (state["stage"], state["step"]) == (position.stage, position.step)
        command = re.search(r"go on with: (.*)", said)[1]
        assert shlex.split(command)[:2] == ["python", "selfemo.py"]
        argv = shlex.split(command)[2:]
        assert argv == [*place.argv(out), "--resume"]
    assert call(argv)[0] == 0
    assert results(out) == results(finished)


def test_a_stopped_run_from_base_goes_on_bit_by_bit(place, tmp_path, monkeypatch):
    """In the middle of the retraining of the start model: it must not be put back a second time."""
    more = ("--retrain_from", "base", "--iterations", 1, "--steps", 1)
    assert place.run(tmp_path / "whole", *more)[0] == 0
    cold = len(lines(tmp_path / "whole/cold_start.jsonl"))
    with monkeypatch.context() as patch:
        stop_at(patch, math.ceil(cold / 6) + 2 + 2)
        assert place.run(tmp_path / "run", *more)[0] == 0
    state = read_json(newest_checkpoint(tmp_path / "run") / "state.json")["position"]
    assert (state["stage"], state["step"]) == (2, 2)
    assert place.run(tmp_path / "run", *more, resume=True)[0] == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def stop_in(monkeypatch, module, step, nth):
    """SIGTERM in the nth call (from 0) of `answer` that a module makes at this step; the list of prompts per call."""
    inner, asked = task.answer, []

    def answer(world, policy, samples, **settings):
        if settings["step"] == step:
            if len(asked) == nth:
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(len(samples))
        return inner(world, policy, samples, **settings)

    monkeypatch.setattr(module, "answer", answer)
    return asked


def test_a_stopped_cold_start_keeps_the_parts_it_has_answered(place, finished, tmp_path, monkeypatch):
    """24 prompts in parts of 10: stopped in the second, 20 are kept, and the resumed run answers 4. All bit for bit."""
    out = tmp_path / "run"
    monkeypatch.setattr(coldstart, "PART", 10)
    with monkeypatch.context() as patch:
        asked = stop_in(patch, coldstart, task.COLD_START, 1)
        status, said, _ = place.run(out)
    assert (status, asked) == (0, [10, 10])
    assert "saved; go on with: python selfemo.py" in said
    assert [len(lines(path)) for path in sorted((out / "cold_start.parts").iterdir())] == [10, 10]
    with monkeypatch.context() as patch:
        asked = stop_in(patch, coldstart, task.COLD_START, None)
        assert place.run(out, resume=True)[0] == 0
    assert asked == [4]
    assert not (out / "cold_start.parts").exists()
    assert results(out) == results(finished)


@pytest.mark.parametrize(("nth", "saved"), [(1, (1, 0)), (4, (2, 0))])
def test_a_stop_is_looked_at_between_the_sets_of_an_evaluation(place, finished, tmp_path, monkeypatch, nth, saved):
    """One set at the start and between steps, else two: after the cold start (1, 2), after step 2 (3), after RL (4, 5).
    Stopped in the first of two, the second is not answered, and the whole evaluation is made again."""
    out, more = tmp_path / "run", ("--save_every", 100)
    with monkeypatch.context() as patch:
        asked = stop_in(patch, evaluate, task.EVALUATION, nth)
        assert place.run(out, *more)[0] == 0
    assert len(asked) == nth + 1
    state = read_json(newest_checkpoint(out) / "state.json")["position"]
    assert (state["stage"], state["step"]) == saved
    assert place.run(out, *more, resume=True)[0] == 0
    assert results(out) == results(finished)


def test_a_second_signal_stops_at_once_and_the_run_can_go_on(place, tmp_path, monkeypatch):
    out, more = tmp_path / "run", ("--iterations", 1, "--steps", 1, "--save_every", 1)
    with monkeypatch.context() as patch:
        inner = task.answer

        def twice(world, policy, samples, **settings):
            if settings["step"] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(world, policy, samples, **settings)

        patch.setattr(selfemo, "answer", twice)
        status, _, complained = place.run(out, *more)
    assert status == 130
    assert "--resume" in complained and "Traceback" not in complained
    assert place.run(out, *more, resume=True)[0] == 0


def test_what_a_step_wrote_before_it_failed_is_taken_back(tmp_path, monkeypatch):
    """A NaN in a step that began with an evaluation: the step is done again, and so is the evaluation, once."""
    run, saved = fresh(tmp_path), []
    monkeypatch.setattr(folder, "save_checkpoint", lambda run, tensors: saved.append(dict(run.offsets)))
    run.learner, run.position = SimpleNamespace(optimizer=None, reference=None), Position(1, 2)
    monkeypatch.setattr(folder, "saved_tensors", lambda policy, learner: {})
    run.append("metrics.jsonl", [{"step": 1}])
    run.begin_step()
    run.append("metrics.jsonl", [{"step": 2}])
    run.append("evaluations/iteration-1.jsonl", [{"text": "x"}])
    run.rescue(None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "evaluations/iteration-1.jsonl").read_text() == ""
    assert saved == [{"metrics.jsonl": 12}]
    assert run.hashes["metrics.jsonl"].hexdigest() == hashlib.sha256(b'{"step": 1}\n').hexdigest()


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with fresh(tmp_path).signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    return out


def test_a_finished_run_resumed_changes_nothing(place, finished, copied):
    before = results(copied)
    status, said, complained = place.run(copied, resume=True)
    assert (status, complained) == (0, "")
    assert "done" in said
    assert results(copied) == before


def test_without_resume_a_run_is_left_alone(place, finished):
    before = results(finished)
    status, _, complained = place.run(finished)
    assert status == 2
    assert complained.startswith("error: ") and "--resume" in complained and complained.count("\n") == 1
    assert results(finished) == before


def test_two_jobs_never_work_on_one_run(place, finished, copied):
    """The second is refused in one line and changes nothing, wherever it stands; after the first it is let in."""
    before = results(copied)
    with alone(copied):
        status, _, complained = place.run(copied, resume=True)
    assert (status, complained) == (2, f"error: another job works on {copied}: wait for it, or give another --out\n")
    assert results(copied) == before
    assert place.run(copied, resume=True)[0] == 0
    assert not (copied / "lock").exists()


def test_what_a_killed_job_leaves_of_its_claim_stops_nobody(tmp_path):
    (tmp_path / "lock").touch()
    with alone(tmp_path), pytest.raises(UserError, match="another job works"), alone(tmp_path):
        pass
    with alone(tmp_path):
        fresh(tmp_path)
    assert not (tmp_path / "lock").exists() and (tmp_path / "config.json").exists()


def test_other_settings_are_refused_and_named(place, finished):
    before = results(finished)
    status, _, complained = place.run(finished, "--n", 5, "--kl_coef", 0.5, resume=True)
    assert status == 2
    assert "n was 3, is 5" in complained and "kl_coef was 0.001, is 0.5" in complained
    assert complained.count("\n") == 1
    assert results(finished) == before


@pytest.fixture(scope="module")
def stopped(place, finished):
    """A run that was stopped in the middle of the first RL stage: after the cold start and two updates."""
    out = place.root / "stopped"
    cold = len(lines(finished / "cold_start.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, math.ceil(cold / 6) + 2)
        assert place.run(out)[0] == 0
    return out


@pytest.mark.parametrize("name", ["weights", "moments", "reference"])
def test_a_truncated_checkpoint_is_one_line(place, stopped, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    path = newest_checkpoint(out) / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, _, complained = place.run(out, resume=True)
    assert status == 2
    assert complained.startswith("error: ") and complained.count("\n") == 1
    assert str(path) in complained


def test_an_unreadable_state_is_one_line(place, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (newest_checkpoint(out) / "state.json").write_text('{"position"')
    status, _, complained = place.run(out, resume=True)
    assert status == 2
    assert complained.startswith("error: ") and complained.count("\n") == 1


def test_no_space_is_one_line_and_the_run_goes_on_later(place, tmp_path, monkeypatch):
    out, more = tmp_path / "run", ("--iterations", 1, "--steps", 1)
    with monkeypatch.context() as patch:

        def no_space(*_):
            raise OSError(28, "No space left on device", "x")

        patch.setattr(shards, "save_file", no_space)
        status, _, complained = place.run(out, *more)
    assert status == 2
    assert "No space left" in complained and complained.count("\n") == 1
    assert place.run(out, *more, resume=True)[0] == 0


def test_a_run_may_be_opened_from_another_folder(place, stopped, finished, tmp_path):
    """The folder's own name is no setting: a run that was moved goes on."""
    out = tmp_path / "moved"
    shutil.copytree(stopped, out)
    assert place.run(out, resume=True)[0] == 0
    assert results(out) == results(finished)


def test_weights_on_disk_are_float32(stopped):
    """Weights and moments are kept in full precision: in bf16 an update of 1e-6 would round to nothing."""
    for name in ("weights", "moments", "reference"):
        tensors = load_file(newest_checkpoint(stopped) / f"{name}.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
