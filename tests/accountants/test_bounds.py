"""The parts of the bound one by one: both directions, the lattice laws, the rounding of the transform."""

import math
from dataclasses import replace

import mpmath as mp
import numpy as np
import pytest

from accountants import bounds, create_accountant
from accountants.assumptions import Segment
from accountants.bounds import direction_epsilon, directions, most_loss, negligible
from accountants.compose import Spectrum
from accountants.fixed_size import FixedSizeGaussian
from accountants.gaussian import closed_form
from accountants.lattice import optimistic, pessimistic
from accountants.pairs import Cells, SubsampledGaussian
from accountants.plan import Plan
from accountants.replace import ReplacedGaussian

from .truth import epsilon_one_way

ROW = (1.1, 256 / 60000, 14062)


def test_both_directions_are_composed_and_each_is_right() -> None:
    removed, added = directions([Segment(*ROW)])
    for parts, add in ((removed, False), (added, True)):
        truth = epsilon_one_way(*ROW, 1e-5, add, 2, 36.0)
        assert direction_epsilon(parts, 1e-5, upper=False) <= truth <= direction_epsilon(parts, 1e-5, upper=True)
        assert direction_epsilon(parts, 1e-5, upper=True) == pytest.approx(truth, rel=1e-3)


def exact_delta(pair, epsilon: float) -> mp.mpf:
    """One step's hockey-stick divergence, 40 digits, by cutting the line where the loss is epsilon."""
    with mp.workdps(40):
        s, q = mp.mpf(pair.sigma), mp.mpf(pair.q)
        tail = lambda cut, centre: mp.erfc((cut - centre) / s / mp.sqrt(2)) / 2  # noqa: E731
        e = mp.exp(mp.mpf(epsilon))
        if isinstance(pair, ReplacedGaussian):
            u = mp.asinh((1 - q) / q * mp.exp(1 / (2 * s**2)) * mp.sinh(mp.mpf(epsilon) / 2))
            x = s**2 * (mp.mpf(epsilon) / 2 + u)
            return (1 - q) * tail(x, 0) + q * tail(x, 1) - e * ((1 - q) * tail(x, 0) + q * tail(x, -1))
        x = s**2 * mp.log(((1 / e if pair.add else e) - 1 + q) / q) + mp.mpf(1) / 2
        if pair.add:  # the loss exceeds epsilon to the left of x
            return (1 - tail(x, 0)) - e * ((1 - q) * (1 - tail(x, 0)) + q * (1 - tail(x, 1)))
        return (1 - q) * tail(x, 0) + q * tail(x, 1) - e * tail(x, 0)


@pytest.mark.parametrize(
    "pair",
    [SubsampledGaussian(1.0, 0.01), SubsampledGaussian(1.0, 0.01, add=True), SubsampledGaussian(0.4, 1e-5),
     SubsampledGaussian(8.0, 0.5), SubsampledGaussian(8.0, 0.5, add=True), ReplacedGaussian(1.0, 0.05)],
)  # fmt: skip
@pytest.mark.parametrize("step", [1e-2, 1e-5])
def test_lattice_laws_enclose_one_step(pair, step: float) -> None:
    above = pessimistic(pair, step, 1e-12, 1e-20)
    below = optimistic(pair, step, 1e-12, 1e-20)
    reach = -math.log1p(-pair.q) if getattr(pair, "add", False) else 3.0
    for epsilon in np.array([0.0, 0.1, 0.37, 0.8]) * reach:
        exact = exact_delta(pair, float(epsilon))
        for law, side in ((above, 1), (below, -1)):
            with mp.workdps(40):
                larger = law.losses > epsilon
                terms = law.mass[larger] * -np.expm1(epsilon - law.losses[larger])
                delta = mp.mpf(math.fsum(terms)) + law.infinite
            # 1e-13: the rounding of this very sum
            assert side * (delta - exact) >= -1e-13 * exact - mp.mpf(10) ** -30
        assert math.fsum(above.mass) + above.infinite >= 1 - 1e-15
    assert math.fsum(below.mass) <= 1 + 1e-15


def test_what_the_transform_rounds_is_counted() -> None:
    # Without a tilt the tail that matters, 1e-16, drowns in the rounding of the transform: the bounds must say so.
    pair, steps = SubsampledGaussian(*ROW[:2]), ROW[2]
    plan = Plan(1e-9, 4.9588318, -6.0, 8.0, 1e-4, 12.0, 12.0)
    upper = Spectrum([pessimistic(pair, plan.step, 1e-14, 1e-25)], plan).compose([steps], upper=True)
    lower = Spectrum([optimistic(pair, plan.step, 1e-14, 1e-25)], plan).compose([steps], upper=False)
    for epsilon in (4.9588318, 5.4):
        assert lower.delta(epsilon) <= 1e-16
        assert upper.delta(epsilon) >= 0.99e-16 or epsilon > 5
    assert lower.epsilon(1e-16) <= 4.95884
    assert upper.epsilon(1e-16) is None or upper.epsilon(1e-16) >= 4.95883


def test_mass_outside_the_window_is_counted() -> None:
    # A window far too small: everything wraps around, and the bounds become trivial instead of wrong.
    pair, steps = SubsampledGaussian(*ROW[:2]), ROW[2]
    plan = Plan(1.0, 0.2, 0.0, 0.4, 1e-4, 5.0, 5.0)
    upper = Spectrum([pessimistic(pair, plan.step, 1e-12, 1e-20)], plan).compose([steps], upper=True)
    lower = Spectrum([optimistic(pair, plan.step, 1e-12, 1e-20)], plan).compose([steps], upper=False)
    true_delta_at_02 = 0.1  # about; epsilon 2.38 is at 1e-5
    assert upper.delta(0.2) >= true_delta_at_02 and lower.delta(0.2) <= true_delta_at_02


class Doubtful(SubsampledGaussian):
    """The same pair, admitting a rounding error of a thousandth of every cell."""

    def cells(self, edges: np.ndarray) -> Cells:
        cells = super().cells(edges)
        return replace(cells, excess_error=cells.excess_error + 1e-3 * cells.p)


def test_rounding_errors_of_the_cells_move_mass_to_the_safe_side() -> None:
    for make, side in ((pessimistic, 1), (optimistic, -1)):
        sure, doubtful = (make(kind(1.0, 0.01), 1e-2, 1e-12, 1e-20) for kind in (SubsampledGaussian, Doubtful))
        sums = [float(law.mass @ np.maximum(-np.expm1(0.1 - law.losses), 0.0)) for law in (sure, doubtful)]
        assert side * (sums[1] - sums[0]) > 0


def test_reported_rounding_errors_are_honest() -> None:
    pair = SubsampledGaussian(1.0, 0.01)
    edges = np.linspace(-0.005, 2.0, 400)
    cells = pair.cells(edges)
    for k in range(0, 399, 37):
        with mp.workdps(40):
            cuts = [
                mp.log((mp.exp(mp.mpf(float(e))) - 1 + mp.mpf(pair.q)) / mp.mpf(pair.q)) + mp.mpf(1) / 2
                for e in edges[k : k + 2]
            ]
            n, m = ((mp.erfc((cuts[0] - c) / mp.sqrt(2)) - mp.erfc((cuts[1] - c) / mp.sqrt(2))) / 2 for c in (0, 1))
            q = mp.mpf(pair.q)
            exact = (1 - q) * n + q * m - mp.exp(mp.mpf(float(edges[k]))) * n
        assert abs(cells.excess[k] - exact) <= cells.excess_error[k]


def test_what_lies_above_the_lattice_counts_as_infinite() -> None:
    pair = SubsampledGaussian(1.0, 0.01)
    law = pessimistic(pair, 1e-2, 1e-12, 1e-3)
    assert law.infinite >= exact_delta(pair, float(law.losses[-1])) > 0
    assert pessimistic(pair, 1e-2, 1e-12, 1e-20).infinite < 1e-18


def test_from_below_only_neighbours_that_exist_are_composed() -> None:
    fixed = [Segment(1.5, 0.1, 10, "fixed_size")]
    (above,) = directions(fixed)
    assert above == [(FixedSizeGaussian(1.5, 0.1), 10)]
    # Noise over the bound of one contribution is 3: the exchanged records are at plus and minus one bound.
    below = [pair for ((pair, _),) in directions(fixed, upper=False)]
    assert below == [SubsampledGaussian(1.5, 0.1), SubsampledGaussian(1.5, 0.1, add=True), ReplacedGaussian(3.0, 0.1)]


MANY = [(SubsampledGaussian(1.0, 0.01), 300), (SubsampledGaussian(1.1, 0.01), 300)]


def test_what_is_not_computed_counts_as_nothing_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    added = [(SubsampledGaussian(1.0, 0.01, add=True), 10)]
    assert direction_epsilon(added, 1e-5, upper=True, enough=1.0) == most_loss(added)
    assert direction_epsilon(added, 1e-5, upper=False, enough=1.0) == 0
    little = [(SubsampledGaussian(50.0, 1e-6), 1)]
    assert direction_epsilon(little, 1e-5, upper=False) == 0
    assert bounds._direction_epsilon(MANY, 1e-5, True, enough=50.0) > 0
    assert bounds._direction_epsilon(MANY, 1e-5, False, enough=50.0) == 0
    monkeypatch.setattr(bounds, "_by_planning_anew", lambda *given: [])
    assert bounds._direction_epsilon(MANY, 1e-5, False, enough=0.0) == 0


@pytest.mark.parametrize("error", [OverflowError, ZeroDivisionError])
def test_where_numbers_leave_the_range_of_floats_renyi_divergences_bound(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = direction_epsilon(MANY, 1e-5, upper=True)

    def fail(*given: object) -> float:
        raise error

    monkeypatch.setattr(bounds, "_direction_epsilon", fail)
    assert exact < direction_epsilon(MANY, 1e-5, upper=True) < 2 * exact
    assert direction_epsilon(MANY, 1e-5, upper=False) == 0


def test_the_most_that_added_records_can_lose_is_rounded_up() -> None:
    rng = np.random.default_rng(0)
    for q in rng.uniform(0, 0.9, 20):
        parts = [(SubsampledGaussian(1.0, float(q), add=True), 7), (SubsampledGaussian(1.0, 0.3, add=True), 3)]
        with mp.workdps(40):
            assert most_loss(parts) >= -7 * mp.log(1 - mp.mpf(float(q))) - 3 * mp.log(1 - mp.mpf(0.3))
        assert most_loss([*parts, (SubsampledGaussian(1.0, 0.1), 1)]) == math.inf


def test_what_counts_as_infinite_is_a_small_part_of_delta_over_all_steps() -> None:
    assert negligible(MANY, 1e-5) * 600 == pytest.approx(1e-9)


@pytest.mark.parametrize("name", ["pld", "prv", "rdp"])
@pytest.mark.parametrize("sigma", [1e-30, 1e-12, 1e-6, 1.9e-3])
def test_next_to_no_noise_has_finite_bounds_at_once(name: str, sigma: float) -> None:
    """Without ``hopeless`` the mesh of these takes gigabytes and minutes, or there is no memory for it."""
    accountant = create_accountant(name)
    accountant.history = [(sigma, 0.1, 3)]
    lower, upper = accountant.get_epsilon_bounds(1e-5)
    unsampled = closed_form([Segment(sigma / 3**0.5, 1.0, 1)]).epsilon(1e-5, True)
    assert 0 <= lower <= upper and unsampled * 0.99 < upper <= unsampled * 1.01 + 10
    assert accountant.get_delta(5.0) in (pytest.approx(1 - 0.9**3), 1)  # at most: that the record was in some batch


@pytest.mark.parametrize("name", ["pld", "prv", "rdp"])
@pytest.mark.parametrize("sigma", [1e-31, 1e-300, 1e31, 1e300])
def test_a_noise_multiplier_whose_square_is_no_number_is_named(name: str, sigma: float) -> None:
    accountant = create_accountant(name)
    accountant.history = [(1.0, 0.1, 3), (sigma, 0.1, 3)]
    for ask in (accountant.get_epsilon, accountant.get_epsilon_bounds, accountant.get_delta):
        with pytest.raises(ValueError, match=r"history\[1\]: noise_multiplier must be 0 .no noise. or lie in"):
            ask(0.5)


def test_a_delta_too_small_for_a_number_is_named() -> None:
    with pytest.raises(ValueError, match="delta must be at least 1e-300"):
        create_accountant("pld").get_epsilon(5e-324)


@pytest.mark.parametrize("sigma", [20.0, 1e9, 1e30])
def test_a_delta_below_every_number_is_bounded(sigma: float) -> None:
    accountant = create_accountant("pld")
    accountant.history = [(sigma, 0.1, 3)]
    lower, upper = accountant.get_delta_bounds(60.0)
    assert 0 <= lower <= upper <= 1e-100 and upper > 0
