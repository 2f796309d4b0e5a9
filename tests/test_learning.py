"""TRL's trainer beside ours: what it is asked, its rewards, and that both are measured alike."""

import json

import pytest
from conftest import lines

import data
from common.errors import UserError
from tools import learning
from tools.bands import bands_svg
from tools.learning import Learning
from training import config
from training.task import Buffer, open_task


@pytest.fixture(scope="module")
def task(place):
    return open_task(config.parse(place.argv("nowhere", "--eval_temperatures", 0)))


def test_our_side_is_grpo_alone_from_the_base_model(tmp_path):
    made = config.parse(("--preset", "toy", *learning.plain(Learning(tmp_path, steps=6, every=3)).flags))
    assert (made.self_grpo, made.self_play, made.cold_start, made.iterations, made.steps, made.eval_every) == (
        False, False, "none", 1, 6, 3,
    )  # fmt: skip


def test_trl_gets_our_prompts_in_the_order_of_the_steps_and_our_settings(task, tmp_path):
    """3 steps of 5 prompts, mini-batches of 3: two optimizer steps per RL step, 6 in all, of 3 x 3 answers."""
    job = learning.asked(task, tmp_path, 2)
    drawn = [sample for step in range(3) for sample in Buffer(task.originals).draw(1, step, task.cfg)]
    assert job["samples"] == [sample.id for sample in drawn] and len(set(job["samples"])) == 15
    assert job["prompts"] == [task.encode(sample)[0] for sample in drawn]
    assert (job["mini_batches"], job["max_steps"], job["answers"], job["save_every"]) == (2, 6, 9, 4)
    assert (job["lr"], job["epsilon"], job["beta"], job["max_grad_norm"]) == (1e-3, 0.2, 0.001, 1.0)
    assert job["adamw"]["weight_decay"] == 0.01


def test_rewards_are_those_of_eq_8(task):
    """Gold itself earns 1.1; without its end of sequence, or without its beginning, 0."""
    sample = next(s for s in task.originals if len(s.gold) == 1)
    label = next(iter(sample.gold))
    said = data.format_output(f"{sample.context[-1].speaker} feels {label}.", {label: 1.0}, {"joy": 1.0}, "It is Monday.")
    ids = [*task.tokenizer(said, add_special_tokens=False)["input_ids"], task.stop]
    assert learning.rewards_of(task, [sample.id] * 3, [ids, ids[:-1], ids[1:]]) == [1.1, 0.0, 0.0]


def test_both_sides_are_measured_alike(task, finished, place):
    """The start model scores as the run's first evaluation says."""
    first = next(line for line in lines(finished / "metrics.jsonl") if line["phase"] == "eval")
    assert first["when"] == "start"
    found = learning.evaluated(task, place.root / "base")
    assert found == {"tiny/acc": first["eval/tiny/acc"], "tiny/iou": first["eval/tiny/iou"]}


def test_what_is_taken_of_a_run_of_ours(finished):
    """Steps 0, 2, 3, 4 and 6 have an evaluation; the SELF-EMO split is not drawn."""
    found = learning.our_result(finished)
    written = lines(finished / "metrics.jsonl")
    assert sorted(found["points"]) == [0, 2, 3, 4, 6]
    assert all(set(values) == {"tiny/acc", "tiny/iou"} for values in found["points"].values())
    times = [line["time/rollout_s"] + line["time/update_s"] for line in written if line["phase"] == "rl"]
    assert len(times) == 6 and found["seconds"] == pytest.approx(sum(times)) and found["peak_mib"] > 100


def record(acc, seconds, peak):
    points = {str(step): {"toy/acc": value, "toy@1/iou": value / 2} for step, value in zip((0, 10, 5), acc, strict=True)}
    return {"points": points, "seconds": seconds, "peak_mib": peak}


def test_the_table_and_the_picture():
    """Two seeds: .4 and .6 first, .8 and .9 last; 10 and 20 s, at most 300 MiB. Steps are numbers, not words."""
    both = [record([0.4, 0.8, 0.5], 10, 300), record([0.6, 0.9, 0.7], 20, 200)]
    name = learning.title("ours", both)
    assert name == "ours: 15 s, 300 MiB"
    panels = learning.panels({name: both})
    assert panels["Accuracy on dev, greedy"][name] == [(0.0, [0.4, 0.6]), (5.0, [0.5, 0.7]), (10.0, [0.8, 0.9])]
    assert learning.table({name: both}) == [
        ["", "seeds", "Accuracy on dev, greedy first", "Accuracy on dev, greedy last", "IOU on dev, T = 1 first",
         "IOU on dev, T = 1 last"],
        [name, "2", "50.0", "85.0", "25.0", "42.5"],
    ]  # fmt: skip
    assert bands_svg("x", panels, "RL steps").count("<polygon") == 2
    del both[0]["points"]["5"]["toy@1/iou"]  # between stages our runs answer at the first temperature alone
    assert learning.panels({name: both})["IOU on dev, T = 1"][name] == [(0.0, [0.2, 0.3]), (10.0, [0.4, 0.45])]


def test_two_sides_are_compared_seed_by_seed():
    """.8 - .7 and .9 - .6 at the last evaluation: mean .2, deviation .1414, half width 12.706 x .1414 / sqrt(2) = 1.2706."""
    sides = {"a": [record([0.5, 0.8, 0], 1, 1), record([0.5, 0.9, 0], 1, 1)],
             "b": [record([0.5, 0.7, 0], 1, 1), record([0.5, 0.6, 0], 1, 1)]}  # fmt: skip
    assert learning.table(sides)[-1][:4] == ["difference", "2", "+0.0 [+0.0, +0.0]", "+20.0 [-107.1, +147.1]"]
    assert len(learning.table({"a": sides["a"], "b": sides["b"][:1]})) == 3


def test_a_finished_seed_of_trl_is_read_not_made(tmp_path):
    made = type("Made", (), {"seed": 3})
    (tmp_path / "trl-3").mkdir()
    (tmp_path / "trl-3" / "result.json").write_text(json.dumps({"seconds": 1}))
    assert learning.trl_result(Learning(tmp_path), made, "nowhere") == {"seconds": 1}


def test_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="give --peer trl=PYTHON"):
        learning.learning(Learning(tmp_path))
    with pytest.raises(UserError, match="--every a divisor of --steps"):
        learning.learning(Learning(tmp_path, ("trl=x",), steps=5, every=2))
