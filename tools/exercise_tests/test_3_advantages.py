"""Eq. 13: an answer is compared with its own group."""

import pytest
import torch
from pytest import approx

from grpo import _z_scores, advantages

exercise = pytest.mark.exercise


@exercise("grpo._z_scores")
def test_distance_from_the_mean_in_standard_deviations() -> None:
    """Mean 2.4/4 = .6; distances .5, -.5, 0, 0; squares .5 in all; the root of .5/3 is .408248; .5/.408249 = 1.224742."""
    found = _z_scores([1.1, 0.1, 0.6, 0.6])
    assert found == approx([1.224742, -1.224742, 0, 0], abs=2e-6), (
        "the mean is .6, and the sample standard deviation divides by n - 1: the root of .5/3 = .408248. "
        "If you got 1.414210, you divided by n"
    )


@exercise("grpo._z_scores")
def test_equal_values_are_exactly_0() -> None:
    """The mean of three times .1 is rounded; divided by 1e-6, that would be something to learn from."""
    for n in (2, 3, 7, 10):
        assert _z_scores([0.1] * n) == [0.0] * n, "D5: equal values give exactly 0: look for them before you divide"
    close = _z_scores([0.5, 0.500001])
    assert close[1] == approx(0.292893, abs=1e-4), (
        "D5: 1e-6 is added to the standard deviation. Here that is 7.07e-7, so 5e-7 / (7.07e-7 + 1e-6) = .292893"
    )


@exercise("grpo._z_scores")
def test_a_group_of_one_is_refused() -> None:
    """With one answer there is nothing to compare it with."""
    try:
        found = _z_scores([1.0])
    except ValueError:
        return
    except ZeroDivisionError:
        pytest.fail("one value: raise ValueError with a message instead of dividing by n - 1 = 0")
    pytest.fail(f"one value gave {found}: it should raise ValueError, because there is nothing to compare it with")


@exercise("grpo.advantages")
def test_both_rewards_added() -> None:
    """Rewards as above. Consistencies: mean .5, distances 1/6, the root of (4/36)/3 is .192450, so +-.866021; half of that
    is .433010: 1.224742 - .433010, -1.224742 - .433010, +.433010, +.433010."""
    found = advantages([[1.1, 0.1, 0.6, 0.6]], [[1 / 3, 1 / 3, 2 / 3, 2 / 3]], 0.5)
    assert found.dtype == torch.float64, "advantages are a Tensor[P, G] in float64"
    assert found.tolist() == [approx([0.791732, -1.657752, 0.433010, 0.433010], abs=3e-6)], (
        "Eq. 13: first each of the two rewards is compared within the group, and then lambda times the second is added. "
        "Adding the rewards first and comparing once is something else"
    )


@exercise("grpo.advantages")
def test_each_group_by_itself() -> None:
    """(1.1, 0) and (.2, .1): in both the first is half of the gap above the mean, and the deviation is gap/1.414214."""
    found = advantages([[1.1, 0.0], [0.2, 0.1]], [[0.0, 0.0], [0.0, 0.0]], 1.0)
    why = "every row is a group of its own, with its own mean and deviation: +-.7071 in both rows"
    assert tuple(found.shape) == (2, 2), "two groups of two answers: the shape is (2, 2)"
    assert found.flatten().tolist() == approx([0.7071, -0.7071, 0.7071, -0.7071], abs=1e-4), why


@exercise("grpo.advantages")
def test_both_inputs_have_the_same_shape() -> None:
    """Two groups of rewards and one of consistencies do not belong together."""
    try:
        advantages([[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0]], 0.0)
    except ValueError:
        return
    pytest.fail("two groups of rewards and one of consistencies: raise ValueError (zip has strict=True for that)")
