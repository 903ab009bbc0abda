"""Composition: every error that its docstring names is in the curve, each found by itself."""

import math
from dataclasses import replace

import mpmath as mp
import numpy as np
import pytest

from accountants import compose
from accountants.compose import Curve, Spectrum, tilt
from accountants.lattice import Lattice
from accountants.plan import Plan

UNIT = 2.0**-53
LAW = Lattice(-0.02, 0.01, np.array([0.2, 0.3, 0.0, 0.35, 0.15]))


def plan(theta: float = 0.0, low: float = -0.5, high: float = 0.5) -> Plan:
    return Plan(theta, 0.1, low, high, 0.01, 40.0, 40.0)


def weights(curve: Curve) -> np.ndarray:
    """The masses, times e^(-theta (s - epsilon)), that the curve is made of."""
    return curve.mass_sum - np.append(curve.mass_sum[1:], 0.0)


def both(spectrum: Spectrum, steps: int) -> tuple[Curve, Curve]:
    return spectrum.compose([steps], upper=True), spectrum.compose([steps], upper=False)


@pytest.mark.parametrize(
    ("theta", "bottom", "top"), [(0.0, -0.09, 0.09), (3.0, -0.09, 0.09), (100.0, 0.0, 0.07), (100.0, -0.02, 0.03)]
)
def test_a_window_that_cuts_off_mass_leaves_the_bounds_around_the_truth(
    theta: float, bottom: float, top: float
) -> None:
    exact = np.ones(1)
    for _ in range(6):
        exact = np.convolve(exact, LAW.mass)
    losses = -0.12 + 0.01 * np.arange(len(exact))
    high, low = both(Spectrum([LAW], plan(theta, bottom, top)), 6)
    for epsilon in np.arange(0.0, top - 0.004, 0.0025):
        truth = float(exact @ np.maximum(-np.expm1(epsilon - losses), 0.0))
        assert low.delta(epsilon) <= truth <= high.delta(epsilon)


def test_the_bound_on_the_transform_holds_for_its_true_modulus() -> None:
    rng = np.random.default_rng(0)
    law = Lattice(-1.0, 0.01, rng.random(400) / 200)
    spectrum = Spectrum([law], plan(0.0, -3.0, 3.0))
    log_transform, log_bound = spectrum.log_transform(0)
    part = spectrum.tilted[0]
    places = np.arange(400) - part.heaviest
    for k in range(0, len(log_bound), 7):
        turns = ((k * places) % spectrum.size).astype(np.longdouble) * (2 * np.arctan(np.longdouble(1)) * 4)
        angle = turns / spectrum.size
        weight = part.weight.astype(np.longdouble)
        modulus = np.hypot((weight * np.cos(angle)).sum(), (weight * np.sin(angle)).sum())
        assert float(np.log(modulus) - log_bound[k]) <= 0, k
        # a sum of N terms by a tree: 4 u (log2 N + 4) times the mass off the heaviest point
        most = np.exp(log_transform[k].real) + 4 * UNIT * (math.log2(spectrum.size) + 4) * part.rest
        assert log_bound[k] >= math.log(most) - 2 * UNIT


def test_what_the_transforms_are_wrong_by_is_added_to_every_mass() -> None:
    spectrum, steps = Spectrum([LAW], plan()), 50
    sure = weights(spectrum.compose([steps], upper=True))
    spectrum.transform_error = 1e-6
    modulus = np.abs(np.fft.fft(LAW.mass, spectrum.size))
    rest = 1 - LAW.mass.max()
    eta = float(((modulus + 1e-6 * rest) ** steps - modulus**steps).mean())
    high, low = (weights(curve) for curve in both(spectrum, steps))
    assert (high >= sure + 0.999 * eta).all() and (low <= np.maximum(sure - 0.999 * eta, 1e-18)).all()


def test_the_rounding_of_the_inverse_transform_is_added_to_every_mass() -> None:
    # All mass on one point: what is elsewhere is rounding, of the order of 8 u (log2 N + 8).
    spectrum = Spectrum([Lattice(0.0, 0.01, np.ones(1))], plan())
    high, low = (weights(curve) for curve in both(spectrum, 10))
    assert high.min() >= 8 * UNIT * math.log2(spectrum.size)
    assert low.max() <= 1 - 8 * UNIT * math.log2(spectrum.size) and np.count_nonzero(low) == 1


def test_frequencies_that_are_left_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    high, low = both(Spectrum([LAW], plan()), 50)
    monkeypatch.setattr(compose, "NEGLIGIBLE", -3.0)
    rough_high, rough_low = both(Spectrum([LAW], plan()), 50)
    assert (weights(rough_high) >= weights(high)).all() and (weights(rough_low) <= weights(low)).all()


@pytest.mark.parametrize("theta", [1e-3, 7.3, 50_000.0])
def test_the_rounding_of_the_tilting_factors_is_within_what_is_stated(theta: float) -> None:
    rng = np.random.default_rng(1)
    law = Lattice(-0.9, 0.01, rng.random(200) / 100)
    part = tilt(law, theta)
    with mp.workdps(40):
        worst = max(
            abs(mp.mpf(w) * mp.exp(mp.mpf(part.log_size)) / (mp.mpf(m) * mp.exp(mp.mpf(theta) * mp.mpf(x))) - 1)
            for w, m, x in zip(part.weight.tolist(), law.mass.tolist(), law.losses.tolist(), strict=True)
            if w > 1e-250
        )
    assert 0 < worst <= part.spread + 8 * UNIT * abs(part.log_size)
    assert part.spread >= UNIT * (40 + theta * abs(law.losses).max())


def test_moments_are_rounded_up() -> None:
    part = tilt(LAW, 2.0)
    for shift in np.linspace(-40, 40, 33):
        with mp.workdps(40):
            terms = [mp.mpf(w) * mp.exp(mp.mpf(shift) * x) for w, x in zip(part.weight, LAW.losses, strict=True)]
            assert mp.mpf(part.log_moment(float(shift))) >= mp.log(mp.fsum(terms))


def test_errors_of_the_parts_add_up_over_the_steps() -> None:
    spectrum = Spectrum([replace(LAW, infinite=1e-9)], plan(2.0))
    high, low = both(spectrum, 10)
    assert high.infinite == pytest.approx(1e-8) and low.infinite == 0
    part = spectrum.tilted[0]
    spectrum.tilted[0] = replace(part, spread=1e-3)
    assert all(curve.relative >= 1e-2 for curve in both(spectrum, 10))
    spectrum.tilted[0] = replace(part, log_size=1e9)
    assert all(curve.relative >= 8 * UNIT * 1e10 for curve in both(spectrum, 10))


def test_where_the_losses_lie_is_known_to_within_the_shift() -> None:
    laws = [Lattice(1e6 + 1 / 3, 0.01, np.ones(1)), Lattice(-1e6 - 1 / 7, 0.01, LAW.mass)]
    curve = Spectrum(laws, Plan(0.0, 571.4, 560.0, 580.0, 0.01, 1.0, 1.0)).compose([3000, 3000], upper=True)
    exact = 3000 * (mp.mpf(1e6 + 1 / 3) + mp.mpf(-1e6 - 1 / 7))
    steps = (exact - mp.mpf(float(curve.losses[0]))) / mp.mpf(0.01)
    off = abs(float(steps - mp.nint(steps))) * 0.01
    assert off <= curve.shift
    assert curve.shift >= 8 * UNIT * 6e9


CURVES = dict(zip(("upper", "lower"), both(Spectrum([LAW], plan(3.0)), 50), strict=True))
SIGN = {"upper": 1, "lower": -1}
every_side = pytest.mark.parametrize("side", CURVES)
EPSILONS = (0.0, 0.033, 0.1, 0.247)


@every_side
def test_a_relative_error_moves_delta_by_it(side: str) -> None:
    sure, doubtful = CURVES[side], replace(CURVES[side], relative=0.2)
    for epsilon in EPSILONS:
        assert doubtful.delta(epsilon) == pytest.approx((1 + SIGN[side] * 0.2) * sure.delta(epsilon), rel=1e-9)


@every_side
def test_an_error_of_the_losses_moves_epsilon_by_it(side: str) -> None:
    sure, doubtful = CURVES[side], replace(CURVES[side], shift=0.01)
    for epsilon in EPSILONS[2:]:
        assert doubtful.delta(epsilon) == pytest.approx(sure.delta(epsilon - SIGN[side] * 0.01), rel=1e-9)
        assert SIGN[side] * (doubtful.epsilon(sure.delta(epsilon)) - sure.epsilon(sure.delta(epsilon))) >= 0.0099


def test_infinite_losses_are_added_to_delta() -> None:
    sure, doubtful = CURVES["upper"], replace(CURVES["upper"], infinite=1e-3)
    assert doubtful.delta(0.1) == pytest.approx(sure.delta(0.1) + 1e-3, rel=1e-12)
    assert doubtful.epsilon(1e-3) is None
    assert doubtful.epsilon(2e-3) == pytest.approx(sure.epsilon(1e-3), rel=1e-9)


@every_side
def test_mass_outside_the_window_moves_delta_by_the_most_that_it_can_count(side: str) -> None:
    sure, doubtful = CURVES[side], replace(CURVES[side], outside=CURVES[side].outside + 1e-3)
    for epsilon in EPSILONS[1:3]:
        moved = 1e-3 * math.exp(sure.log_unit - sure.theta * (epsilon - sure.reference))
        assert abs(doubtful.delta(epsilon) - sure.delta(epsilon)) == pytest.approx(moved, rel=1e-6)
        assert SIGN[side] * (doubtful.delta(epsilon) - sure.delta(epsilon)) > 0


@every_side
def test_the_rounding_of_the_final_sums_moves_delta(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = CURVES[side]
    sure = curve.delta(0.1)
    monkeypatch.setattr(compose, "UNIT", 1e-6)
    k = int(np.searchsorted(curve.losses, 0.1))
    moved = 2e-6 * len(curve.losses) * curve.mass_sum[k] * math.exp(curve.log_unit)
    assert SIGN[side] * (curve.delta(0.1) - sure) >= 0.99 * moved
    # and epsilon as far as delta: to where the sums beyond the point, without their rounding, are less by it
    for delta in np.geomspace(1e-6, 3e-2, 40):
        epsilon = curve.epsilon(float(delta))
        k = int(np.searchsorted(curve.losses, epsilon, side="right"))
        with monkeypatch.context() as exactly:
            exactly.setattr(compose, "UNIT", 0.0)
            left = SIGN[side] * (delta - curve.delta(epsilon))
        assert left >= 0.99 * 2e-6 * len(curve.losses) * curve.mass_sum[k] * math.exp(curve.log_unit) or not epsilon


@every_side
@pytest.mark.parametrize("errors", [{}, {"relative": 0.2}, {"shift": 0.01}, {"outside": 1e-3}])
def test_delta_at_the_epsilon_of_a_delta_is_on_the_safe_side(side: str, errors: dict) -> None:
    curve = replace(CURVES[side], **errors)
    for delta in np.geomspace(1e-6, 3e-2, 40):
        epsilon = curve.epsilon(float(delta))
        if epsilon:
            assert SIGN[side] * (delta * (1 + SIGN[side] * 1e-9) - curve.delta(epsilon)) >= 0


def test_below_its_window_a_curve_says_nothing() -> None:
    high, low = both(Spectrum([LAW], plan(3.0, 0.1, 0.5)), 50)
    assert high.delta(0.05) == 1 and low.delta(0.05) == low.delta(float(low.losses[0]))
    assert high.epsilon(0.9) is None and low.epsilon(0.9) is None
    assert high.epsilon(1e-30) is None


def test_between_nothing_and_its_first_point_a_curve_says_the_point() -> None:
    law = Lattice(-0.0205, 0.01, LAW.mass)  # 50 of its losses lie 0.005 above the lattice through zero
    curve = Spectrum([law], plan(3.0)).compose([50], upper=True)
    assert 0 < curve.losses[0] < 0.01
    exact = np.ones(1)
    for _ in range(50):
        exact = np.convolve(exact, LAW.mass)
    losses = 50 * -0.0205 + 0.01 * np.arange(len(exact))
    at_zero = float(exact @ np.maximum(-np.expm1(-losses), 0.0))
    between = math.sqrt(at_zero * curve.delta(float(curve.losses[0])))
    assert curve.losses[0] <= curve.epsilon(between) <= curve.losses[0] + 1e-9
    assert curve.epsilon(at_zero * 1.001) == 0


@pytest.mark.parametrize("theta", [0.0, 3.0])
def test_the_bound_on_the_tails_holds(theta: float) -> None:
    part = tilt(LAW, theta)
    exact = np.ones(1)
    for _ in range(6):
        exact = np.convolve(exact, part.weight)
    losses = -0.12 + 0.01 * np.arange(len(exact))
    for edge in (-0.115, -0.1, -0.05, 0.05, 0.1, 0.115):
        for shift in (1.0, 40.0, 400.0):
            assert compose._tail([part], [6], shift, edge) >= exact[losses > edge].sum()
            assert compose._tail([part], [6], -shift, edge) >= exact[losses < edge].sum()
