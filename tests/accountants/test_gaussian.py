"""The closed forms against 60-digit arithmetic."""

import mpmath as mp
import pytest

from accountants.gaussian import ClosedForm


def exact_delta(epsilon: float, sigma: float, q: float) -> mp.mpf:
    with mp.workdps(60):
        mu = 1 / mp.mpf(sigma)
        inner = mp.log(1 + (mp.exp(mp.mpf(epsilon)) - 1) / mp.mpf(q))
        below = [mp.erfc(-(sign * mu / 2 - inner / mu) / mp.sqrt(2)) / 2 for sign in (1, -1)]
        return mp.mpf(q) * (below[0] - mp.exp(inner) * below[1])


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1, 5, 20, 1000, 1e5])
@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.3, 1.0])
def test_bounds_enclose_the_exact_value_and_are_tight(sigma: float, q: float) -> None:
    form = ClosedForm(sigma, q)
    for delta in (1e-4, 1e-10, 1e-16, 1e-30):
        lower, upper = form.epsilon(delta, upper=False), form.epsilon(delta, upper=True)
        if upper == 0:
            assert exact_delta(0.0, sigma, q) <= delta
            continue
        assert exact_delta(upper, sigma, q) <= delta
        assert lower == 0 or exact_delta(lower, sigma, q) >= delta * (1 - mp.mpf(10) ** -20)
        assert upper - lower <= 1e-7 * upper
    for epsilon in (1e-4, 0.1, 3.0):
        assert form.delta(epsilon, upper=False) <= exact_delta(epsilon, sigma, q) <= form.delta(epsilon, upper=True)
