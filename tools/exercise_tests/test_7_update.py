"""Algorithm 1, line 9: the update of minimal.py, on a model of which every number is known."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pytest import approx
from torch import Tensor, nn

from corpora.dialogue import Turn
from data import Completion, Responder, Sample
from minimal import Group, Settings, update

exercise = pytest.mark.exercise

CFG = Settings(mini_batch_prompts=1, temperature=1.0, clip_eps=0.2, kl_coef=0.0)
SAMPLE = Sample("toy/train/d1/1", "toy", (Turn("Ann", "Hi."),), Responder("Bo", None, "next"), ("joy",), {"joy": 1.0})


class Table(nn.Module):
    """A language model of four tokens: the logits of the next one are the row of the last one. It begins with all 0."""

    def __init__(self, first_row: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> None:
        super().__init__()
        rows = torch.zeros(4, 4, dtype=torch.float64)
        rows[0] = torch.tensor(first_row, dtype=torch.float64)
        self.rows = nn.Parameter(rows)

    def forward(self, ids_BZ: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits as a model of transformers gives them."""
        return SimpleNamespace(logits=self.rows[ids_BZ])


def group(answers: dict[tuple[int, ...], float]) -> Group:
    """A group with the prompt [0], from the token ids of its answers to their advantages."""
    made = [Completion(ids, (-1.0,) * len(ids), True) for ids in answers]
    zeros = [0.0] * len(made)
    return Group(SAMPLE, [0], made, zeros, {}, zeros, list(answers.values()))


def learn(lm: Table, groups: list[Group], cfg: Settings = CFG, reference: Table | None = None) -> list[list[float]]:
    """The table after an update by plain gradient descent with rate 1."""
    update(lm, reference or Table(), cast(Any, torch.optim.SGD(lm.parameters(), lr=1.0)), groups, cfg)
    return lm.rows.tolist()  # type: ignore[no-any-return]


@exercise("minimal.update")
def test_praise_goes_up_and_blame_goes_down() -> None:
    """All four tokens have 1/4. Answer (1) has A = +1, answer (2) has A = -1, and each token weighs 1/2. Ratio 1: the slope
    of the loss in the two log-probs is -1/2 and +1/2, in the logits 0, -1/2, +1/2, 0. Rate 1 goes the other way."""
    found = learn(Table(), [group({(1,): 1.0, (2,): -1.0})])
    assert found[0] == approx([0, 0.5, -0.5, 0]), (
        "after one step the logits after token 0 should be 0, .5, -.5, 0: the praised token 1 up, the blamed token 2 down. "
        "All 0: nothing was learnt. Signs reversed: the loss is minus Eq. 14"
    )


@exercise("minimal.update")
def test_every_token_weighs_the_same() -> None:
    """Answers (1, 3, 3) with A = +1 and (2) with A = -1: four tokens, 1/4 each (D3). Row 0 gets 1/4 (e1 - p) - 1/4 (e2 - p),
    row 1 gets 1/4 (e3 - p) and row 3 the same, with p = 1/4 everywhere: 1/4 * 3/4 = .1875 and -1/4 * 1/4 = -.0625."""
    found = learn(Table(), [group({(1, 3, 3): 1.0, (2,): -1.0})])
    assert found[0] == approx([0, 0.25, -0.25, 0]), (
        "four tokens weigh 1/4 each (token_weights with 'token'), so the first row moves by .25. "
        "If you got .5 or .166667 there, every answer weighs the same, or every answer was padded to three tokens"
    )
    assert [found[1], found[3]] == [approx([-0.0625, -0.0625, -0.0625, 0.1875])] * 2, (
        "each token of an answer carries the answer's advantage, also the second and the third"
    )
    assert found[2] == [0, 0, 0, 0], "nothing follows token 2: its row stays"


@exercise("minimal.update")
def test_old_log_probs_are_those_before_the_first_step() -> None:
    """The same group twice, in two mini-batches. After the first step p is 1, 1.648721, .606531, 1 over 4.255252: ratios
    .387453/.25 = 1.549811 and .142537/.25 = .570148 lie outside .8 to 1.2, so both gains are clipped and nothing moves."""
    twice = group({(1,): 1.0, (2,): -1.0})
    found = learn(Table(), [twice, twice])
    assert found[0] == approx([0, 0.5, -0.5, 0]), (
        "the second mini-batch should change nothing: its ratios, 1.55 and .57, are measured against the policy from before "
        "the first step, and both are clipped. If the logits moved on, you measured the old log-probs again in between"
    )


@exercise("minimal.update")
def test_both_groups_in_one_mini_batch() -> None:
    """With two prompts in a mini-batch there is one step: four tokens of 1/4, so 1/4 + 1/4 up and down."""
    twice = group({(1,): 1.0, (2,): -1.0})
    found = learn(Table(), [twice, twice], replace(CFG, mini_batch_prompts=2))
    assert found[0] == approx([0, 0.5, -0.5, 0]), "one optimizer step over both groups, whose weights sum to 1"


@exercise("minimal.update")
def test_the_kl_pulls_back_to_the_reference() -> None:
    """No praise and no blame. The policy has e, 1, 1, 1 over 5.718282 after token 0, the reference 1/4: for token 1,
    d = ln(.25/.475367) = -.642626, e^d = .525910, slope 1 - e^d = .474090. Half of it (beta = .5) times e1 - p."""
    found = learn(Table((0.0, 1.0, 0.0, 0.0)), [group({(1,): 0.0})], replace(CFG, kl_coef=0.5))
    assert found[0] == approx([0.041454, 0.875638, 0.041454, 0.041454], abs=1e-6), (
        "the loss is that of Eq. 14 and kl_coef times the weighted k3: token 1, which the policy likes more than the "
        "reference does, goes from 1 to .8756. Unchanged: the KL is missing, or it was taken to the policy itself"
    )


@exercise("minimal.update")
def test_log_probs_at_the_temperature_of_sampling() -> None:
    """At temperature 2 a log-prob is half as steep in the logits: .25 and -.25 (D19)."""
    found = learn(Table(), [group({(1,): 1.0, (2,): -1.0})], replace(CFG, temperature=2.0))
    assert found[0] == approx([0, 0.25, -0.25, 0]), (
        "the log-probs of the loss are those at cfg.temperature: half the step at temperature 2"
    )
