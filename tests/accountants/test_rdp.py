"""Renyi accounting: Opacus's figures where Opacus is good, far below them where it is not, never below the truth."""

import json
import time
import warnings
from pathlib import Path

import mpmath as mp
import numpy as np
import opacus.accountants
import pytest

from accountants import PLDAccountant, RDPAccountant
from accountants.rdp import log_moment, rdp_to_epsilon

TRUTH = json.loads((Path(__file__).parent / "data" / "truth.json").read_text(encoding="utf-8"))["rows"]


def rdp(*history: tuple) -> RDPAccountant:
    accountant = RDPAccountant()
    accountant.history = list(history)
    return accountant


def test_opacus_published_figure() -> None:
    assert rdp((1.5, 0.04, 2250)).get_epsilon(1e-5) == pytest.approx(7.32911117143, abs=1e-7)


def test_published_figure_of_de_et_al() -> None:
    # ImageNet: 16384 of 1,271,167 images (10,000 of the training split are held out), with the orders of jax_privacy.
    orders = [*np.linspace(1.01, 8, num=50), *range(8, 64), *np.linspace(65, 512, num=10, dtype=int)]
    run = rdp((2.5, 16384 / 1271167, 71589))
    assert run.get_epsilon(8e-7, alphas=[float(order) for order in orders]) == pytest.approx(7.99976, abs=5e-6)
    assert run.get_epsilon(8e-7) == pytest.approx(8.00009, abs=5e-6)  # with Opacus's orders


@pytest.mark.parametrize(
    "history", [[(1.1, 256 / 60000, 14062)], [(4.0, 0.01, 10000)], [(1.5, 0.04, 100), (2.0, 0.02, 50)]]
)
def test_equals_opacus_where_the_orders_suffice(history: list) -> None:
    theirs = opacus.accountants.RDPAccountant()
    theirs.history = list(history)
    assert rdp(*history).get_epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-8)
    few = [2.5, 8.0, 32.0]
    assert rdp(*history).get_epsilon(1e-5, alphas=few) <= theirs.get_epsilon(1e-5, alphas=few) * (1 + 1e-9)


@pytest.mark.parametrize("row", TRUTH, ids=lambda row: "-".join(f"{v:g}" for v in row.values()))
def test_never_below_the_truth(row: dict) -> None:
    assert rdp((row["sigma"], row["q"], row["steps"])).get_epsilon(row["delta"]) >= row["epsilon"] - 2 * row["moved"]


def test_small_rates_are_not_fifty_times_above() -> None:
    assert 0.0125 < rdp((1.0, 1e-5, 50000)).get_epsilon(1e-8) < 50 * 0.0125
    assert rdp((1.0, 0.01, 1)).get_epsilon(1e-5) < 0.5


@pytest.mark.parametrize(
    "sigma, q, order", [(1.0, 0.01, 2.0), (1.0, 1e-6, 2.5), (0.5, 0.3, 7.3), (4.0, 0.02, 40.0), (0.3, 0.01, 1.1)]
)
def test_moments_against_quadrature_in_high_precision(sigma: float, q: float, order: float) -> None:
    with mp.workdps(30):
        s, p, a = mp.mpf(sigma), mp.mpf(q), mp.mpf(order)

        def integrand(x):
            ratio = 1 - p + p * mp.exp((2 * x - 1) / (2 * s**2))
            return mp.exp(-(x**2) / (2 * s**2)) / (s * mp.sqrt(2 * mp.pi)) * ratio**a

        points = [-12 * s, -3 * s, 0, 3 * s, *(mp.mpf(order) * k / 4 for k in range(1, 5)), order + 12 * s]
        exact = mp.log(mp.quad(integrand, sorted(points)))
    assert log_moment(sigma, q, order) == pytest.approx(float(exact), rel=1e-6)
    assert log_moment(sigma, q, order) >= float(exact) * (1 - 1e-12) - 1e-24


def test_bad_orders_are_refused() -> None:
    above = "orders above 1"
    for orders, named in (([1.0, 2.0], above), ([], above), ([2.0, "x"], "alphas must be a number")):
        with pytest.raises(ValueError, match=named):
            rdp((1.0, 0.1, 1)).get_epsilon(1e-5, alphas=orders)  # type: ignore[arg-type]


def test_renyi_divergences_add_up() -> None:
    one, two = rdp((1.0, 0.01, 5)), rdp((1.0, 0.01, 10))
    np.testing.assert_allclose(2 * one.get_rdp([2, 8.5]), two.get_rdp([2, 8.5]), rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.004, 0.01, 0.015, 1e-4])
def test_next_to_no_noise_is_answered_at_once_and_from_above(sigma: float) -> None:
    """The integral would need millions of nodes there; the bound in its place is at least the moment itself."""
    order = 10.5
    exact = mp.log(0.01) * order + mp.mpf(order) * (order - 1) / (2 * mp.mpf(sigma) ** 2)  # its largest term
    assert exact <= log_moment(sigma, 0.01, order) <= exact + (order - 1) * mp.log(100) + 1e-9 * exact


def test_no_noise_has_no_moment() -> None:
    assert log_moment(0.0, 0.01, 2.0) == np.inf and log_moment(0.0, 0.01, 2.5, "replaced") == np.inf
    # Where the integral would need millions of nodes: as without sampling, at twice the distance.
    assert log_moment(1e-3, 0.5, 64.0, "replaced") == pytest.approx(2 * 64 * 63 * 1e6)


@pytest.mark.parametrize("q", [0.3, 0.01, 1e-4, 1e-9])
def test_moments_of_integer_orders_are_rounded_up(q: float) -> None:
    for sigma in (0.5, 1.0, 3.7):
        for order in (2, 3, 7, 30):
            with mp.workdps(60):
                p, s = mp.mpf(q), mp.mpf(sigma)
                terms = (
                    mp.binomial(order, k) * p**k * (1 - p) ** (order - k) * mp.exp(mp.mpf(k * (k - 1)) / (2 * s**2))
                    for k in range(order + 1)
                )
                exact = mp.log(mp.fsum(terms))
            assert exact <= log_moment(sigma, q, float(order)) <= exact * (1 + mp.mpf(10) ** -9)


def exact_epsilon(log_moment: float, order: float, delta: float) -> mp.mpf:
    """The conversion of accountants/rdp.py in 60 digits."""
    w = mp.expm1(mp.mpf(log_moment)) / (mp.mpf(order) * mp.mpf(delta))
    s = (1 + w) ** (1 / (mp.mpf(order) - 1))
    return mp.log((mp.mpf(order) - 1) / order * (s + (s - 1) / w))


def test_the_conversion_is_rounded_up_and_never_below_what_it_can_hold() -> None:
    rng = np.random.default_rng(0)
    with mp.workdps(60):
        for moment, order, delta in zip(
            10 ** rng.uniform(-12, 0, 60), rng.uniform(1.1, 60, 60), 10 ** rng.uniform(-9, -4, 60), strict=True
        ):
            (found,) = rdp_to_epsilon(np.array([moment]), np.array([order]), delta)
            assert found >= exact_epsilon(moment, order, delta)
        for moment, order in ((700.0, 2.0), (900.0, 1.5), (2000.0, 3.0), (1e4, 40.0), (1e6, 64.0), (590.0, 1.01)):
            (found,) = rdp_to_epsilon(np.array([moment]), np.array([order]), 1e-5)
            assert found >= exact_epsilon(moment, order, 1e-5) * (1 - mp.mpf(10) ** -12)


@pytest.mark.parametrize(
    "relation", [("poisson", "add_remove"), ("poisson", "replace_one"), ("fixed_size", "replace_one")]
)
@pytest.mark.parametrize("sigma", [1e-4, 5e-3, 0.0201, 0.03, 0.059])
def test_next_to_no_noise_costs_no_more_than_without_sampling_and_no_time(relation, sigma):
    """Nor does anything warn of numbers that are none on the way."""
    sampling, neighbours = relation
    sampled, start = RDPAccountant(sampling=sampling, relation=neighbours), time.perf_counter()
    sampled.history = [(sigma, 0.1, 10)]
    unsampled = RDPAccountant(sampling="unsampled", relation=neighbours)
    unsampled.history = sampled.history
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds = [sampled.get_epsilon(1e-5), PLDAccountant(sampling=sampling, relation=neighbours)]
        bounds[1].history = sampled.history
        bounds[1] = bounds[1].get_epsilon(1e-5)
    assert all(0.1 / sigma**2 < epsilon <= unsampled.get_epsilon(1e-5) * 1.01 for epsilon in bounds)
    assert time.perf_counter() - start < 60
