"""Cells of the privacy loss: their numbers are as exact as they say, far into the tails."""

import mpmath as mp
import numpy as np
import pytest

from accountants.fixed_size import FixedSizeGaussian
from accountants.pairs import SubsampledGaussian, normal_masses
from accountants.replace import ReplacedGaussian


def cut(pair, loss: float) -> mp.mpf:
    """The x with that loss."""
    s, q, e = mp.mpf(pair.sigma), mp.mpf(pair.q), mp.exp(mp.mpf(loss))
    if isinstance(pair, ReplacedGaussian):
        u = mp.asinh((1 - q) / q * mp.exp(1 / (2 * s**2)) * mp.sinh(mp.mpf(loss) / 2))
        return s**2 * (mp.mpf(loss) / 2 + u)
    inner = ((1 / e if pair.add else e) - 1 + q) / q
    return s**2 * mp.log(inner) + mp.mpf(1) / 2 if inner > 0 else mp.mpf("-inf")


def normal(a: mp.mpf, b: mp.mpf) -> mp.mpf:
    """Standard normal mass between two, from the side where the tails are small."""
    a, b = (-b, -a) if b < 0 else (a, b)
    return (mp.erfc(a / mp.sqrt(2)) - mp.erfc(b / mp.sqrt(2))) / 2


def exact(pair, low: float | None, high: float | None) -> tuple[mp.mpf, mp.mpf]:
    """P- and Q-mass of the losses between two, 60 digits."""
    s, q = mp.mpf(pair.sigma), mp.mpf(pair.q)
    a, b = (None if loss is None else cut(pair, loss) for loss in (low, high))
    if getattr(pair, "add", False):
        a, b = b, a

    def mass(centre: int) -> mp.mpf:
        return normal(*(sign * mp.inf if x is None else (x - centre) / s for x, sign in ((a, -1), (b, 1))))

    plain, mixed = mass(0), (1 - q) * mass(0) + q * mass(1)
    if isinstance(pair, ReplacedGaussian):
        return mixed, (1 - q) * plain + q * mass(-1)
    return (plain, mixed) if pair.add else (mixed, plain)


@pytest.mark.parametrize(
    ("pair", "low", "high"),
    [
        (SubsampledGaussian(1.0, 0.01), -0.005, 20.0),
        (SubsampledGaussian(0.3, 1e-4), -5e-5, 100.0),
        (SubsampledGaussian(1.0, 0.3, add=True), -20.0, 0.3),
        (SubsampledGaussian(2.0, 1.0), -8.0, 8.0),
        (ReplacedGaussian(1.0, 0.05), -18.0, 18.0),
    ],
)
def test_reported_rounding_errors_are_honest(pair, low: float, high: float) -> None:
    edges = np.linspace(low, high, 101)
    cells = pair.cells(edges)
    with mp.workdps(60):
        for k in range(0, 100, 3):
            p, q = exact(pair, float(edges[k]), float(edges[k + 1]))
            assert abs(cells.p[k] - p) <= cells.p_error[k], (k, edges[k])
            assert abs(cells.excess[k] - (p - mp.exp(mp.mpf(float(edges[k]))) * q)) <= cells.excess_error[k]


@pytest.mark.parametrize("pair", [SubsampledGaussian(1.0, 0.3), ReplacedGaussian(0.7, 0.2)])
def test_what_lies_outside_is_rounded_up(pair) -> None:
    for bottom, top in np.random.default_rng(0).uniform(0.01, 0.25, (40, 2)) * [-1, 8]:
        edges = np.array([bottom, 0.0, top])
        cells = pair.cells(edges)
        with mp.workdps(60):
            assert cells.below >= exact(pair, None, float(bottom))[0]
            p, q = exact(pair, float(top), None)
            assert cells.above >= p
            assert cells.above_excess >= p - mp.exp(mp.mpf(float(top))) * q


def test_normal_masses_are_as_exact_as_they_say() -> None:
    rng = np.random.default_rng(0)
    cuts = np.sort(np.concatenate([rng.uniform(-37, 37, 300), rng.uniform(-1, 1, 40)]))
    mass, error = normal_masses(cuts, 2.0)
    ends = [-mp.inf, *(mp.mpf(float(z)) for z in cuts), mp.inf]
    with mp.workdps(60):
        for k in range(len(mass)):
            assert abs(mass[k] - normal(ends[k], ends[k + 1])) <= error[k]


def test_a_cell_across_zero_admits_what_its_parts_do() -> None:
    cells = FixedSizeGaussian(0.7, 0.2).cells(np.array([-1.0, 1.5]))
    sides = [side.cells(np.array(edges)) for side, edges in zip(
        FixedSizeGaussian(0.7, 0.2)._sides, ([0.0, 1.5], [-1.0, 0.0]), strict=True)]  # fmt: skip
    mass = FixedSizeGaussian(0.7, 0.2).at_zero
    assert cells.p_error[0] >= sum(side.p_error[0] for side in sides) + 7 * 2.0**-53 * mass
    lift = -np.expm1(-1.0) * (sides[0].q[0] + mass)
    assert cells.excess_error[0] >= sum(side.excess_error[0] for side in sides) + 15 * 2.0**-53 * lift
