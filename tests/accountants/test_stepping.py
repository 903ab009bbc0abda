"""Asking after every step: the same numbers as asking once, much cheaper."""

import time

import numpy as np
import pytest

from accountants import PLDAccountant


def once(history: list, delta: float) -> float:
    accountant = PLDAccountant()
    accountant.history = history
    return accountant.get_epsilon(delta)


def test_every_step_of_a_run_is_a_close_upper_bound() -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.1, 256 / 60000, 900)]
    values = []
    for _ in range(600):
        accountant.step(noise_multiplier=1.1, sample_rate=256 / 60000)
        values.append(accountant.get_epsilon(1e-5))
    assert np.all(np.diff(values) >= 0)
    for index in (0, 1, 299, 599):
        fresh = PLDAccountant()
        fresh.history = [(1.1, 256 / 60000, 901 + index)]
        lower, upper = fresh.get_epsilon_bounds(1e-5)
        assert lower <= values[index] <= upper + 5e-4 * upper + 2e-4


def test_a_thousand_steps_cost_little_each() -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 2000)]
    accountant.get_epsilon(1e-5)
    started = time.perf_counter()
    for _ in range(1000):
        accountant.step(noise_multiplier=1.0, sample_rate=0.01)
        accountant.get_epsilon(1e-5)
    assert (time.perf_counter() - started) / 1000 < 0.02  # about 1 ms on an idle core


def test_a_new_noise_multiplier_in_the_middle_of_a_run() -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 200)]
    for _ in range(20):
        accountant.step(noise_multiplier=1.4, sample_rate=0.01)
        value = accountant.get_epsilon(1e-5)
    assert value == pytest.approx(once([(1.0, 0.01, 200), (1.4, 0.01, 20)], 1e-5), abs=3e-4)


def test_large_losses_that_no_stretch_can_serve() -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 1e-5, 5000)]
    for _ in range(10):
        accountant.step(noise_multiplier=1.0, sample_rate=1e-5)
        value = accountant.get_epsilon(1e-8)
    exact = once([(1.0, 1e-5, 5010)], 1e-8)
    assert exact - 1e-5 <= value <= exact + 3e-4


def test_curve_has_an_entry_for_every_step() -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 60), (1.5, 0.01, 40)]
    curve = accountant.epsilon_curve(1e-5)
    assert curve.shape == (100,) and np.all(np.diff(curve) >= 0)
    assert curve[-1] == pytest.approx(accountant.get_epsilon(1e-5), abs=3e-4)
    assert curve[0] == pytest.approx(once([(1.0, 0.01, 1)], 1e-5), abs=1e-9)
    assert PLDAccountant().epsilon_curve(1e-5).shape == (0,)
