"""Histories in which single large losses matter, against an oracle that composes nothing on a lattice."""

import pytest

from accountants import PLDAccountant

from .truth_one_jump import delta_of_one_jump


@pytest.mark.parametrize(("q", "steps", "delta"), [(1e-6, 100_000, 1e-16), (1e-5, 100_000, 1e-14)])
def test_the_bounds_enclose_the_truth_where_one_large_loss_decides(q: float, steps: int, delta: float) -> None:
    accountant = PLDAccountant()
    accountant.history = [(0.8, q, steps)]
    lower, upper = accountant.get_epsilon_bounds(delta)
    at_lower, several = delta_of_one_jump(0.8, q, steps, lower)
    at_upper, _ = delta_of_one_jump(0.8, q, steps, upper)
    assert several < 0.01 * delta
    assert at_upper <= delta < at_lower + several
    assert upper - lower <= 1e-4


def test_two_steps_with_little_noise_are_not_dearer_for_the_added_record() -> None:
    accountant = PLDAccountant()
    accountant.history = [(0.3, 0.01, 2)]
    lower, upper = accountant.get_epsilon_bounds(1e-10)
    assert lower <= upper <= lower + 1e-3 * upper
