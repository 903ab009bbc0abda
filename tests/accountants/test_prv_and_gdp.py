"""The accountants whose meaning is Opacus's: the same digits where Opacus is right, and a word of warning where due."""

import math
import subprocess
import sys
import warnings

import opacus.accountants
import pytest

from accountants import ApproximateEpsilonWarning, GaussianAccountant, PRVAccountant


def prv(*history: tuple) -> PRVAccountant:
    accountant = PRVAccountant()
    accountant.history = list(history)
    return accountant


def test_opacus_published_figure() -> None:
    assert prv((1.5, 0.04, 2249)).get_epsilon(1e-5) == pytest.approx(6.777395712150674, abs=5e-7)


@pytest.mark.parametrize(
    "history, delta",
    [([(1.1, 256 / 60000, 14062)], 1e-5), ([(4.0, 0.01, 10000)], 1e-5), ([(0.6, 0.01, 100)], 1e-6),
     ([(1.5, 0.04, 1000), (1.2, 0.02, 500), (2.0, 0.05, 300)], 1e-5)],
)  # fmt: skip
def test_seven_digits_of_opacus(history: list, delta: float) -> None:
    theirs = opacus.accountants.PRVAccountant()
    theirs.history = list(history)
    assert prv(*history).get_epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-7)


def test_right_where_opacus_fails() -> None:
    assert 4.3804 < prv((1.1, 256 / 60000, 14062)).get_epsilon(1e-13) < 4.392  # Opacus: 4.169, below the truth
    assert 0 <= prv((100.0, 0.001, 1)).get_epsilon(1e-5) <= 0.0101


def test_eps_error_is_added() -> None:
    fine, coarse = prv((1.0, 0.01, 100)).get_epsilon(1e-5, eps_error=0.005), prv((1.0, 0.01, 100)).get_epsilon(1e-5)
    assert coarse - fine == pytest.approx(0.005, abs=1e-4)


@pytest.mark.parametrize("bad", [{"eps_error": 0}, {"eps_error": -1}, {"delta_error": 0}, {"delta_error": 1e-5}])
def test_bad_errors_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="_error must lie in"):
        prv((1.0, 0.01, 100)).get_epsilon(1e-5, **bad)


def test_gdp_equals_opacus_and_says_each_time_that_it_is_an_approximation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = opacus.accountants.GaussianAccountant()
    ours = GaussianAccountant()
    ours.history = theirs.history = [(1.1, 256 / 60000, 14062)]
    for poisson in (True, False):
        with pytest.warns(ApproximateEpsilonWarning, match="below the truth"):
            value = ours.get_epsilon(1e-5, poisson=poisson)
        assert value == pytest.approx(theirs.get_epsilon(1e-5, poisson=poisson), rel=1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("always", ApproximateEpsilonWarning)
        for _ in range(3):
            ours.get_epsilon(1e-5)
    assert len(caught) == 3


def test_gdp_is_silent_on_purpose_and_exact_without_sampling() -> None:
    accountant = GaussianAccountant()
    accountant.history = [(1.0, 0.01, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ApproximateEpsilonWarning)
        accountant.get_epsilon(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accountant.history = [(10.0, 1.0, 100)]
        assert accountant.get_epsilon(1e-5) == pytest.approx(4.37718, abs=1e-5)


def test_gdp_with_next_to_no_noise_is_infinite() -> None:
    accountant = GaussianAccountant()
    accountant.history = [(0.03, 0.01, 1)]
    with pytest.warns(ApproximateEpsilonWarning):
        assert accountant.get_epsilon(1e-5) == math.inf


def test_gdp_warns_each_time_without_being_asked_to() -> None:
    code = """
from accountants import GaussianAccountant
accountant = GaussianAccountant()
accountant.history = [(1.0, 0.01, 10)]
for _ in range(3):
    accountant.get_epsilon(1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.count("ApproximateEpsilonWarning:") == 3


def test_an_estimate_that_is_not_where_it_was_expected_gives_way_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prv((1.1, 256 / 60000, 1000)).get_epsilon(1e-5)
    monkeypatch.setattr("accountants.compose.Curve.epsilon", lambda curve, delta: 0.01)
    monkeypatch.setattr("accountants.prv.epsilon_bound", lambda parts, delta, upper: 7.0 if upper else 0.0)
    assert expected < prv((1.1, 256 / 60000, 1000)).get_epsilon(1e-5) == 7.0 + 0.01


def test_what_the_estimate_may_be_off_by_is_taken_from_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def estimate(parts: object, delta: float, eps_error: float, delta_error: float) -> float:
        asked.update(delta=delta, errors=(eps_error, delta_error))
        return 1.0

    monkeypatch.setattr("accountants.prv.estimate", estimate)
    assert prv((1.0, 0.01, 10)).get_epsilon(1e-5, eps_error=0.02, delta_error=4e-6) == 1.02
    assert asked["delta"] == pytest.approx(6e-6) and asked["errors"] == (0.02, 4e-6)
