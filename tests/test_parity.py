"""Our loss is held against what TRL's own said of the same numbers: tests/trl.json, by `tools.parity --record`."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from model import Group
from tests.tiny import tiny
from tools import parity
from tools.parity import Answers, Setting, answers_of, asked, compared, ours, padded

KEPT = json.loads((Path(__file__).parent / "trl.json").read_text(encoding="utf-8"))
ROWS = [(Setting(**row["setting"]), row) for row in KEPT["rows"]]
GIVEN = answers_of(KEPT)


SAME = [row for row in ROWS if not row[0].why]


@pytest.mark.parametrize(("setting", "theirs"), SAME, ids=[f"{s.loss_type} {s.clip_eps} {s.beta}" for s, _ in SAME])
def test_loss_and_gradient_are_trls_to_rounding(setting, theirs):
    row = compared(GIVEN, setting, theirs)
    assert row["loss_apart"] < 1e-14 and row["gradient_apart"] < 1e-14


def test_every_mean_clip_range_and_kl_that_both_have_is_held_against_trl():
    found = {(s.loss_mean, s.ratio, s.clip_eps, s.beta) for s, _ in ROWS if not s.why}
    assert found == set(product(("token", "sequence"), ("token",), (0.2, 0.3), (0.0, 0.5)))
    assert KEPT["versions"]["trl"] == "1.16.0"


@pytest.mark.parametrize(("setting", "theirs"), [row for row in ROWS if row[0].why], ids=["length", "bias", "means"])
def test_where_trl_means_something_else_the_numbers_differ(setting, theirs):
    row = compared(GIVEN, setting, theirs)
    assert row["loss_apart"] > 0.01 and row["gradient_apart"] > 0.01


def test_the_numbers_reach_both_sides_of_the_clip_range():
    """Log-ratios .25, -.25, 0; -.5, .125; -.25, .5, .25, 0, -.25; -.375. Clipped at .2: gain above 1.2, blame below .8.

    Advantage 1.25 > 0: .25 is (1.28). -.75 < 0: -.5 is (.61), .125 is not. .5 > 0: .5 and .25 are. -1: -.375 is (.69).
    """
    _, gradient_BT = ours(GIVEN, Setting("token", "token", "bnpo", beta=0.0))
    assert (gradient_BT == 0).tolist() == [
        [True, False, False, True, True], [True, False, True, True, True], [False, True, True, False, False],
        [True, True, True, True, True],
    ]  # fmt: skip


def test_what_trl_is_asked_in_its_own_words():
    job = asked(GIVEN, Setting("sequence", "token", "grpo", clip_eps=0.3, beta=0.5, micro_batches=2, kl_ratio=True))
    words = {"loss_type": "grpo", "level": "token", "clip_eps": 0.3, "beta": 0.5, "micro_batches": 2, "kl_ratio": True}
    assert {key: job[key] for key in words} == words and job["logp"] == KEPT["logp"]


def test_the_table_names_what_trl_means_otherwise():
    head, same, other = parity.table([compared(GIVEN, setting, theirs) for setting, theirs in (ROWS[0], ROWS[-1])])
    assert head[-3:] == ["loss apart", "gradient apart", ""] and same[-1] == "" and other[-1] == "means"
    assert len(head) == len(same) == len(other)


def test_the_recorded_answers_of_a_run_have_the_log_probs_of_both_models(finished, place):
    """Two groups of three answers, as many numbers as tokens: of the policy that answered, the final and the start model."""
    given = parity.recorded(finished, 2)
    assert len(given.answers) == 6 and [len(group.answers) for group in given.groups] == [3, 3]
    for rows in (given.logp, given.old, given.ref):
        assert [len(row) for row in rows] == [len(ids) for ids in given.answers]
    apart = [parity.apart(padded(given.logp), padded(rows)) for rows in (given.old, given.ref)]
    assert min(apart) > 1e-3


class Peer:
    """In the place of TRL's process: what it is asked, and a gradient that it writes."""

    def __init__(self, lm):
        self.lm = lm

    def run(self, job):
        from safetensors.torch import save_file

        self.job = job
        save_file({name: torch.ones_like(p) for name, p in self.lm.named_parameters()}, job["save"])
        return {"loss": 2.0}


def test_the_gradient_by_weight_is_of_the_same_answers(tmp_path):
    """The peer's loss is 2 and its gradient all ones; ours has other numbers in the same weights."""
    lm = tiny("llama", tied=False).float()
    lm.config.eos_token_id = 1
    lm.save_pretrained(tmp_path / "model")
    group = Group([1, 2, 3], [[4, 5], [6]])
    rows = [[-1.0, -2.0], [-1.5]]
    given = Answers([[1, 2, 3]] * 2, [[4, 5], [6]], [1.0, -1.0], rows, rows, rows, [group])
    peer = Peer(lm)
    found = parity.by_weights(tmp_path, given, peer)
    assert (peer.job["prompts"], peer.job["answers"], peer.job["beta"]) == ([[1, 2, 3]] * 2, [[4, 5], [6]], 0.1)
    assert found["loss_apart"] == pytest.approx(abs(found["ours"] - 2) / 2) and found["gradient_apart"] > 0.9


def test_the_peer_must_be_trl(tmp_path):
    with pytest.raises(UserError, match="give --peer trl=PYTHON"):
        parity.parity(parity.Parity(tmp_path, ("vllm=python",)))
