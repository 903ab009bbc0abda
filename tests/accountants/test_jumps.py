"""Histories in which single large losses matter, against an oracle that composes nothing on a lattice."""

import math
from types import SimpleNamespace

import mpmath as mp
import numpy as np
import pytest

from accountants import PLDAccountant, jumps
from accountants.bounds import lattice_maker, negligible
from accountants.jumps import Answer, epsilon_by_jumps
from accountants.pairs import SubsampledGaussian
from accountants.plan import Plan

from .test_pairs import exact
from .truth_few_steps import epsilon_of_few_steps
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


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [
        (1.0, 0.01, 2, 1e-5),
        (0.788, 1.54e-6, 6, 2.1e-12),
        (0.98, 2.84e-5, 12, 3.3e-11),
        (3.0, 0.3, 4, 1e-9),
        (1.3, 2e-3, 6, 1e-16),
    ],
)
def test_a_few_steps_with_small_deltas(sigma: float, q: float, steps: int, delta: float) -> None:
    truth = epsilon_of_few_steps(sigma, q, steps, delta, 2)
    accountant = PLDAccountant()
    accountant.history = [(sigma, q, steps)]
    lower, upper = accountant.get_epsilon_bounds(delta)
    slack = 1e-5 + 2e-5 * truth  # of the oracle
    assert lower - slack <= truth <= upper + slack
    assert upper - truth <= 0.5 * max(2e-4, 1e-3 * truth)


def test_a_split_law_has_room_in_its_windows() -> None:
    # Windows cut too close once made three large losses look like the answer: 0.575 instead of 0.2188.
    accountant = PLDAccountant()
    accountant.history = [(0.8548044695616275, 3.92977865917938e-05, 1164)]
    lower, upper = accountant.get_epsilon_bounds(1.897529629170528e-14)
    assert 0.2187 < lower <= upper < 0.2189


PAIR = SubsampledGaussian(0.8, 1e-5)


def by_jumps(steps: int, delta: float, guess: float, upper: bool = True) -> Answer | None:
    parts = [(PAIR, steps)]
    make = lattice_maker(parts, delta, upper)
    return epsilon_by_jumps(PAIR, steps, delta, negligible(parts, delta), make, Answer(guess, 30.0, {}), 0, upper)


def test_terms_beyond_the_last_computed_are_counted_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def solve(curves: list, delta: float, upper: bool) -> Answer:
        asked.append((max(number for number, _ in curves), delta))
        return Answer(1.0, 1.0, {})

    monkeypatch.setattr(jumps, "_solve", solve)
    steps, guess = 1000, 0.8
    log_mass = jumps._log_mass_above(PAIR, 0.25 * guess)
    delta = math.comb(steps, 3) * math.exp(3 * log_mass) / 0.4e-6  # three large losses just do not matter
    for upper in (True, False):
        by_jumps(steps, delta, guess, upper)
    (last, above), (_, below) = asked
    with mp.workdps(30):
        mass = exact(PAIR, 0.25 * guess, None)[0]
        rest = mp.fsum(mp.binomial(steps, j) * mass**j for j in range(last + 1, last + 20))
    assert 0 < rest <= delta - above and below == delta


def test_too_many_large_losses_are_not_counted() -> None:
    assert by_jumps(10**7, 1e-9, 1e-3) is None


def test_the_mass_of_large_losses_is_rounded_up() -> None:
    for threshold in (1e-4, 0.01, 0.1, 1.0, 5.0):
        with mp.workdps(30):
            assert jumps._log_mass_above(PAIR, threshold) >= mp.log(exact(PAIR, threshold, None)[0])


def test_infinite_losses_count_once_and_where_no_other_is_large() -> None:
    make = lattice_maker([(PAIR, 5)], 1e-3, True)
    plan = Plan(1.0, 0.5, -1.0, 4.0, 1e-2, 5.0, 5.0)
    infinite = make(PAIR, 1e-2, -math.inf, 0.2).infinite
    found = [jumps._compose(make, PAIR, plan, 0.2, (0.2, math.inf), n, True, 0.0).infinite for n in ((5, 0), (4, 1))]
    assert found == [pytest.approx(5 * infinite, rel=1e-9, abs=0), 0] and infinite > 0


@pytest.mark.parametrize(("upper", "side"), [(True, 1), (False, -1)])
def test_curves_are_added_up_and_solved_to_the_safe_side(upper: bool, side: int) -> None:
    curves = [
        (k, SimpleNamespace(losses=np.array([0.0, 9.0]), delta=lambda x, k=k: math.exp(-(k + 1) * x))) for k in (0, 1)
    ]
    for delta in np.geomspace(1e-3, 1.5, 40):
        found = jumps._solve(curves, float(delta), upper).epsilon
        total = sum(curve.delta(found) for _, curve in curves)
        assert side * (delta - total) >= 0 and total == pytest.approx(delta)
    assert jumps._solve(curves, 1e-6, upper).epsilon == (math.inf if upper else 9.0)
