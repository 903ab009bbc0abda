"""Batches of fixed size without replacement: the dominating pair, its composition and its moments, by other means."""

import json
import math
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from accountants import PLDAccountant, PRVAccountant, RDPAccountant, get_noise_multiplier
from accountants.fixed_size import FixedSizeGaussian
from accountants.lattice import pessimistic
from accountants.moments import log_excess_fixed_size

from .truth import epsilon_one_way

ASSUMED = {"sampling": "fixed_size", "relation": "replace_one"}
ORACLE = json.loads((Path(__file__).parent / "data" / "without_replacement.json").read_text(encoding="utf-8"))["rows"]


def pld(*history: tuple) -> PLDAccountant:
    accountant = PLDAccountant(**ASSUMED)
    accountant.history = list(history)
    return accountant


def rdp(*history: tuple) -> RDPAccountant:
    accountant = RDPAccountant(**ASSUMED)
    accountant.history = list(history)
    return accountant


def curve(s: float, q: float, alpha: float) -> float:
    """The claimed largest hockey-stick divergence at threshold ``alpha``, for noise ``s`` over the largest move."""
    if alpha < 1:
        return 1 - alpha + alpha * curve(s, q, 1 / alpha)
    inner = math.log1p((alpha - 1) / q)
    return q * float(ndtr(0.5 / s - s * inner) - math.exp(inner) * ndtr(-0.5 / s - s * inner))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.floats(0.4, 3), st.floats(0.01, 0.95), st.floats(-3, 3),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2 * math.pi)), min_size=3, max_size=3),
)  # fmt: skip
def test_no_three_contributions_cost_more_at_any_threshold(s: float, q: float, epsilon: float, polar: list) -> None:
    """u, v, w in the unit disc, noise 2s in the plane; the divergence by quadrature."""
    u, v, w = (r * np.array([math.cos(t), math.sin(t)]) for r, t in polar)
    sigma, alpha = 2 * s, math.exp(epsilon)
    grid = np.linspace(-1 - 7 * sigma, 1 + 7 * sigma, 500)
    x, y = np.meshgrid(grid, grid, sparse=True)
    area = (grid[1] - grid[0]) ** 2 / (2 * math.pi * sigma**2)
    nu, nv, nw = (np.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2) / (2 * sigma**2)) for c in (u, v, w))
    divergence = area * float(np.maximum((1 - q) * nu + q * nv - alpha * ((1 - q) * nu + q * nw), 0).sum())
    assert divergence <= curve(s, q, alpha) + 2e-4


@pytest.mark.parametrize("s, q", [(0.5, 0.01), (2.0, 0.3), (0.15, 1e-4), (5.0, 0.9)])
@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_the_lattice_law_dominates_the_curve_at_every_threshold(s: float, q: float, step: float) -> None:
    law = pessimistic(FixedSizeGaussian(s, q), step, 1e-12, 1e-20)
    assert math.fsum(law.mass) + law.infinite >= 1 - 1e-14
    for epsilon in (-1.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 0.5, 2.0):
        larger = law.losses > epsilon
        delta = math.fsum(law.mass[larger] * -np.expm1(epsilon - law.losses[larger])) + law.infinite
        exact = curve(s, q, math.exp(epsilon))
        assert exact * (1 - 1e-9) - 1e-15 <= delta <= exact + step


def test_cells_cut_anywhere_hold_the_same_masses() -> None:
    pair = FixedSizeGaussian(0.7, 0.2)
    whole = pair.cells(np.array([-1.0, -0.3, 0.0, 0.4, 1.5]))
    for edges, part in (([-1.0, 0.4, 1.5], [2, 3]), ([0.4, 1.5], [3]), ([-1.0, -0.3], [0]), ([0.0, 0.4, 1.5], [2, 3])):
        cells = pair.cells(np.array(edges))
        assert cells.p.sum() + cells.below + cells.above == pytest.approx(1, abs=1e-12)
        assert cells.q.sum() + cells.below_q <= 1 + 1e-12
        assert cells.p[-1] == pytest.approx(whole.p[part[-1]], abs=1e-14)
    wide = pair.cells(np.array([-1.0, 1.5]))
    np.testing.assert_allclose(wide.p, [whole.p.sum()], rtol=1e-12)
    np.testing.assert_allclose(wide.excess, wide.p - math.exp(-1.0) * wide.q, rtol=1e-12)


@pytest.mark.parametrize("sigma, q, delta", [(1.0, 0.01, 1e-5), (5.0, 0.4, 1e-10), (0.5, 1e-4, 1e-6)])
def test_one_step_is_exact(sigma: float, q: float, delta: float) -> None:
    lower, upper = pld((sigma, q, 1)).get_epsilon_bounds(delta)
    assert upper - lower <= 1e-9 * upper
    assert curve(sigma / 2, q, math.exp(upper)) == pytest.approx(delta, rel=1e-6)


def test_the_whole_data_set_in_every_batch_is_a_gaussian_of_sensitivity_two() -> None:
    unsampled = PLDAccountant(sampling="unsampled", relation="replace_one")
    unsampled.history = [(10.0, 1.0, 100)]
    assert pld((10.0, 1.0, 100)).get_epsilon(1e-5) == unsampled.get_epsilon(1e-5)
    nearly = pld((10.0, 1 - 1e-7, 100)).get_epsilon(1e-5)
    assert nearly == pytest.approx(unsampled.get_epsilon(1e-5), rel=1e-3)


def test_two_steps_by_direct_convolution() -> None:
    # The law's losses rounded up (and down) to a mesh of 1e-3 from the curve's slope alone, and convolved directly.
    s, q, mesh, delta = 1.0, 0.1, 1e-3, 1e-5
    losses = mesh * np.arange(-4000, 4001)
    slope = np.array([(curve(s, q, math.exp(x - 1e-6)) - curve(s, q, math.exp(x + 1e-6))) / 2e-6 for x in losses])
    value = np.array([curve(s, q, math.exp(x)) for x in losses])
    above = value + slope  # P(L > l) = H - alpha H'(alpha)
    mass = np.clip(above[:-1] - above[1:], 0, None)
    epsilons = []
    for shift in (0, 1):
        total = np.convolve(mass, mass)
        points = 2 * losses[0] + mesh * (np.arange(len(total)) + 2 * shift)
        low, high = 0.0, 8.0
        for _ in range(40):
            middle = (low + high) / 2
            more = points > middle
            over = float(total[more] @ -np.expm1(middle - points[more])) > delta
            low, high = (middle, high) if over else (low, middle)
        epsilons.append(high)
    lower, upper = pld((2 * s, q, 2)).get_epsilon_bounds(delta)
    assert epsilons[0] - 2e-3 <= upper <= epsilons[1] + 2e-3
    assert lower <= upper


@pytest.mark.parametrize("row", ORACLE, ids=lambda row: str(row["history"]))
def test_between_neighbours_that_exist_and_the_bound_of_wang_balle_and_kasiviswanathan(row: dict) -> None:
    sigma, q, steps = row["history"]
    lower, upper = pld((sigma, q, steps)).get_epsilon_bounds(row["delta"])
    exists = max(epsilon_one_way(sigma / 2, q, steps, row["delta"], add, 1, 24.0) for add in (False, True))
    assert exists * (1 - 1e-6) <= upper and lower <= upper
    assert lower >= exists * (1 - 2e-3)
    by_moments = rdp((sigma, q, steps)).get_epsilon(row["delta"])
    assert upper <= by_moments < row["epsilon"]


@pytest.mark.parametrize("s, q, order", [(0.5, 0.01, 2.0), (0.5, 0.01, 2.5), (2.0, 0.1, 1.1), (1.0, 1e-5, 40.0)])
def test_moments_against_quadrature_in_high_precision(s: float, q: float, order: float) -> None:
    with mp.workdps(25):
        spread, rate, a = mp.mpf(s), mp.mpf(q), mp.mpf(order)

        def phi(r):
            return r**a - 1 - a * (r - 1)

        def integrand(x):
            ratio = 1 - rate + rate * mp.exp((2 * x - 1) / (2 * spread**2))
            return mp.npdf(x, 0, spread) * (phi(ratio) + ratio * phi(1 / ratio))

        points = {mp.mpf(1) / 2 + spread * k for k in range(15)} | {a + spread * k for k in range(-8, 14, 2)}
        exact = float(mp.log(mp.quad(integrand, sorted(x for x in points if x >= 0.5))))
    assert log_excess_fixed_size(s, q, order) == pytest.approx(exact, abs=2e-9)
    assert log_excess_fixed_size(s, q, order) >= exact - 1e-12 * max(abs(exact), 1)


def test_what_lies_beyond_the_last_panel_is_counted() -> None:
    # At a rate as small as this nothing else is left of the moment.
    assert log_excess_fixed_size(1.0, 1e-28, 3.0) >= math.log(2 * float(ndtr(-15.0)))


def delta_by_contour(s: float, q: float, steps: int, theta: float, epsilon: float) -> float:
    """delta of the composed pair as in :mod:`tests.accountants.truth`; the moments by Gauss-Legendre panels."""
    points, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(0.5, 1 + 14 * s, 2 * math.ceil((0.5 + 14 * s) / min(s, s * s)) + 1)
    half = (edges[1] - edges[0]) / 2
    x = ((edges[:-1] + half)[:, None] + half * points).ravel()
    up = np.log1p(q * np.expm1((2 * x - 1) / (2 * s * s)))
    normal = np.exp(-(x**2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi)) * np.tile(half * weights, len(edges) - 1)
    rest = (1 - q) * (1 - 2 * float(ndtr(-0.5 / s)))
    loss, mass = np.concatenate([up, -up, [0.0]]), np.concatenate([normal * np.exp(up), normal, [rest]])
    assert mass.sum() == pytest.approx(1, abs=1e-13)
    tilted = mass * np.exp(theta * loss)
    size = float(tilted.sum())
    mean = float(tilted @ loss) / size
    width = math.sqrt(steps * float(tilted @ (loss - mean) ** 2) / size)
    omega = 2 * math.pi / (30 * width) * np.arange(400)
    transform = (np.exp(1j * np.outer(omega, loss - mean)) @ tilted) / size
    values = transform**steps / ((theta + 1j * omega) * (theta + 1 + 1j * omega))
    assert abs(values[-1]) < 1e-9 * abs(values[0])
    terms = (values * np.exp(-1j * omega * (epsilon - steps * mean))).real
    integral = omega[1] / math.pi * (terms.sum() - terms[0] / 2)
    return float(math.exp(steps * math.log(size) - theta * epsilon) * integral)


@pytest.mark.parametrize(
    "history, delta, theta",
    [((4.0, 0.01, 10000), 1e-5, 4.0), ((3.0, 0.2, 50), 1e-8, 3.0), ((10.0, 0.05, 2000), 1e-12, 6.0)],
)
def test_many_steps_by_contour_integration(history: tuple, delta: float, theta: float) -> None:
    sigma, q, steps = history
    upper = pld(history).get_epsilon(delta)
    assert delta_by_contour(sigma / 2, q, steps, theta, upper) <= delta * (1 + 1e-9)
    assert delta_by_contour(sigma / 2, q, steps, theta, upper - max(2e-4, 1e-3 * upper)) > delta


def test_parts_compose_and_more_costs_more() -> None:
    base = pld((8.0, 0.1, 100)).get_epsilon(1e-6)
    assert pld((8.0, 0.1, 40), (8.0 * (1 + 1e-12), 0.1, 60)).get_epsilon(1e-6) == pytest.approx(base, rel=1e-3)
    for dearer in ((8.0, 0.1, 110), (8.0, 0.11, 100), (7.5, 0.1, 100)):
        assert pld(dearer).get_epsilon(1e-6) > base
    assert pld((8.0, 0.1, 100)).get_delta(base) == pytest.approx(1e-6, rel=5e-3)


def test_calibration_and_what_is_said() -> None:
    accountant = pld()
    sigma = get_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=500, accountant=accountant
    )
    accountant.history = [(sigma, 0.01, 500)]
    assert 2.99 <= accountant.get_epsilon(1e-5) <= 3.0
    text = accountant.describe(1e-5)
    assert "fixed size" in text and "exchanged" in text
    fresh = PLDAccountant()
    fresh.load_state_dict(accountant.state_dict())
    assert fresh.get_epsilon(1e-5) == accountant.get_epsilon(1e-5)
    with pytest.raises(ValueError, match="sampling='fixed_size'"):
        accountant.to_dp_event()


@pytest.mark.parametrize("relation", ["add_remove", "zero_out"])
def test_other_relations_are_refused(relation: str) -> None:
    with pytest.raises(ValueError, match="relation='replace_one'"):
        PLDAccountant(sampling="fixed_size", relation=relation)


def test_prv_names_who_can() -> None:
    accountant = PRVAccountant(**ASSUMED)
    accountant.history = [(1.0, 0.1, 10)]
    with pytest.raises(ValueError, match="RDPAccountant"):
        accountant.get_epsilon(1e-5)
