"""Asking after every step: the same numbers as asking once, much cheaper."""

import time
from dataclasses import replace

import numpy as np
import pytest

from accountants import PLDAccountant, stepping
from accountants.assumptions import segments
from accountants.bounds import directions, discretise
from accountants.compose import Spectrum
from accountants.pairs import UNIT
from accountants.stepping import Follower, Stretch, _At


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


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize(
    "sigma, q, first, delta",
    [(0.5, 1e-4, 47, 1e-12), (1.0, 1e-5, 40, 1e-9), (1.1, 256 / 60000, 14000, 1e-5), (2.0, 0.3, 20, 1e-7)],
)
def test_a_stretch_is_never_below_the_composition_it_stands_for(
    sigma: float, q: float, first: int, delta: float, way: int
) -> None:
    # At q = 1e-4 no frequency dies out, the middle one included; at 14000 steps few are left.
    parts = directions(segments([(sigma, q, first)], "poisson", "add_remove"))[way]
    stretch = Stretch(parts, 0, delta)
    for steps in (first, stretch.last):
        spectrum = Spectrum(discretise([(parts[0][0], steps)], stretch.plan.step, delta, True), stretch.plan)
        curve, here = spectrum.compose([steps], upper=True), _At(stretch, steps)
        reached = 0
        for epsilon in curve.epsilon(delta) * np.array([0.8, 0.95, 1.0, 1.01]):
            log_delta = here.log_delta(epsilon)
            if log_delta is not None:
                reached += 1
                assert -1e-5 <= log_delta - np.log(curve.delta(epsilon)) <= 1e-3
        assert reached >= 2


@pytest.mark.parametrize(
    "history, delta, assumed",
    [([(0.5, 1e-4, 120)], 1e-12, {}), ([(1.0, 1e-5, 60)], 1e-9, {}),
     ([(1.1, 0.004, 30), (1.1, 1.0, 3), (1.2, 0.004, 60)], 1e-5, {}),
     ([(1.0 + 0.1 * k, 0.01, 20) for k in range(5)], 1e-7, {}),
     ([(2.0, 0.01, 60), (3.0, 0.02, 40)], 1e-6, {"relation": "replace_one"}),
     ([(2.0, 0.01, 60), (3.0, 0.02, 40)], 1e-6, {"relation": "replace_one", "sampling": "fixed_size"})],
)  # fmt: skip
def test_curves_keep_to_what_a_fresh_accountant_says(history: list, delta: float, assumed: dict) -> None:
    accountant = PLDAccountant(**assumed)
    accountant.history = history
    started = time.process_time()
    curve = accountant.epsilon_curve(delta)
    assert time.process_time() - started < 6  # about half a second on an idle core
    for done in range(1, len(curve) + 1, 13):
        fresh, left = PLDAccountant(**assumed), done
        for sigma, q, count in history:
            if left > 0:
                fresh.history.append((sigma, q, min(count, left)))
                left -= count
        lower, upper = fresh.get_epsilon_bounds(delta)
        assert lower <= curve[done - 1] <= upper + max(2e-4, 1e-3 * upper)


def stretch_of(sigma: float = 1.0, q: float = 0.01, first: int = 300) -> Stretch:
    return Stretch(directions(segments([(sigma, q, first)], "poisson", "add_remove"))[0], 0, 1e-5)


def test_every_error_of_a_stretch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stretch = stretch_of()
    steps, epsilon = stretch.last, stretch.epsilon(stretch.last)
    sure = _At(stretch, steps).log_delta(epsilon)
    part = stretch.tilted[0]

    def with_part(**errors: object) -> _At:
        stretch.tilted = [replace(part, **errors)]
        try:
            return _At(stretch, steps)
        finally:
            stretch.tilted = [part]

    assert with_part(spread=1e-3).log_delta(epsilon) == pytest.approx(sure + 1e-3 * steps, rel=1e-6)
    lattice = replace(part.lattice, infinite=part.lattice.infinite + 1e-5 / steps)
    assert with_part(lattice=lattice).log_delta(epsilon) == pytest.approx(np.log(np.exp(sure) + 1e-5), rel=1e-6)
    assert with_part(log_size=1e12).relative >= 8 * UNIT * 1e12 * steps
    assert with_part(lattice=replace(part.lattice, offset=1e9)).drift >= 8 * UNIT * 1e9 * steps
    for name, much in (("eta", 1e-6), ("outside", 1e-3)):
        at = _At(stretch, steps)
        setattr(at, name, getattr(at, name) + much)
        assert at.log_delta(epsilon) > sure + 1e-4
    at = _At(stretch, steps)
    at.drift += 0.01
    assert at.log_delta(epsilon) == pytest.approx(_At(stretch, steps).log_delta(epsilon - 0.01), rel=1e-6)
    monkeypatch.setattr(stepping, "UNIT", 1e-6)
    at.drift -= 0.01
    assert at.log_delta(epsilon) > sure + 1e-4


def test_the_masses_of_a_stretch_are_off_by_what_the_composition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    stretch = stretch_of()
    steps = stretch.first
    sure = _At(stretch, steps).eta
    stretch.bound = stretch.bound + 1e-9
    modulus = np.exp(stretch.fixed_bound + steps * stretch.bound)
    assert _At(stretch, steps).eta >= sure + 0.9e-9 * steps * float(stretch.double @ modulus)
    monkeypatch.setattr(stepping, "UNIT", 1e-9)
    assert _At(stretch, steps).eta >= 8e-9 * 40 * float(stretch.double @ modulus)
    monkeypatch.setattr(stepping, "NEGLIGIBLE", -2.0)
    assert _At(stretch, steps).eta >= np.exp(-2.0)


def test_frequencies_count_twice_but_for_those_without_a_conjugate() -> None:
    stretch = stretch_of(0.5, 1e-4, 47)
    single = np.isclose(stretch.double * stretch.size, 1.0)
    assert set(stretch.index[single]) <= {0, stretch.size // 2} and single.any()


def test_beyond_its_window_a_stretch_says_nothing() -> None:
    stretch = stretch_of()
    at = _At(stretch, stretch.first)
    assert at.log_delta(stretch.plan.high + 1) is None and at.log_delta(stretch.plan.low - 1) is None


def test_epsilon_stays_where_it_was_when_a_stretch_gives_less(monkeypatch: pytest.MonkeyPatch) -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 300)]
    before = accountant.get_epsilon(1e-5)
    monkeypatch.setattr(Stretch, "epsilon", lambda stretch, steps: before * 0.999)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.get_epsilon(1e-5) == before


@pytest.mark.parametrize("larger", [0, 1])
def test_the_larger_of_both_directions_counts(larger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = stepping.Follower()
    key = tuple(segments([(1.0, 0.01, 300)], "poisson", "add_remove"))
    monkeypatch.setattr(Follower, "_one_way", lambda *given: 2.0 if given[-1] == larger else 1.0)
    follower.stretches[("name", False)] = stretch_of()
    follower.added[("name",)] = (10**6, 3.0)
    assert follower._stretched(("name",), key, 0, 1e-5) == 2.0


def test_what_is_known_of_the_added_record_serves_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower()
    key = tuple(segments([(1.0, 0.01, 300)], "poisson", "add_remove"))
    monkeypatch.setattr(Follower, "_one_way", lambda *given: 2.0 if given[-1] else 1.0)
    monkeypatch.setattr(stepping, "direction_epsilon", lambda parts, delta, upper, enough: 1e-3 * parts[0][1] + 0.9)
    stretch = stretch_of()
    follower.stretches[("name", False)] = stretch
    follower.added[("name",)] = (200, 0.5)
    assert follower._stretched(("name",), key, 0, 1e-5) == 2.0
    assert follower.added[("name",)] == (stretch.last, 1e-3 * stretch.last + 0.9)


def test_a_stretch_far_above_the_composition_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 300)]
    accountant.get_epsilon(1e-5)
    monkeypatch.setattr(Stretch, "epsilon", lambda stretch, steps: 7.0)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.get_epsilon(1e-5) == pytest.approx(once([(1.0, 0.01, 301)], 1e-5), rel=2e-3)


@pytest.mark.parametrize("change", [(1.0, 0.01, 20), (0.9, 0.01, 301), (1.0, 0.011, 301), (1.0, 0.01, 3000)])
def test_another_history_is_composed_anew(change: tuple) -> None:
    accountant = PLDAccountant()
    accountant.history = [(1.0, 0.01, 300)]
    accountant.get_epsilon(1e-5)
    accountant.history = [change]
    assert accountant.get_epsilon(1e-5) == once([change], 1e-5)


def test_an_epsilon_of_a_stretch_is_one_whose_delta_is_small_enough() -> None:
    stretch = stretch_of()
    for steps in range(stretch.first, stretch.last + 1, 5):
        assert _At(stretch, steps).log_delta(stretch.epsilon(steps)) <= np.log(stretch.delta)
    found, slope = stretch.guess
    stretch.guess = (found - 1.5e-6, slope)  # there delta is just too large
    assert _At(stretch, steps).log_delta(found - 1.5e-6) > np.log(stretch.delta)
    assert _At(stretch, steps).log_delta(stretch.epsilon(steps)) <= np.log(stretch.delta)


def test_an_answer_for_further_on_serves_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "epsilon_bound", lambda parts, delta, upper: 1 + 1e-7 * parts[0].steps)
    monkeypatch.setattr(Follower, "_stretched", lambda *given: None)
    follower = Follower()
    for steps in (5000, 5001, 5050, 5101, 5102, 5300, 5301):
        value = follower.epsilon(segments([(1.0, 0.01, steps)], "poisson", "add_remove"), 1e-5)
        assert 1 + 1e-7 * steps <= value <= 1 + 1.03e-7 * steps
    monkeypatch.setattr(stepping, "epsilon_bound", lambda parts, delta, upper: 3.0)
    for steps in (5300, 5301):
        assert follower.epsilon(segments([(0.5, 0.01, steps)], "poisson", "add_remove"), 1e-5) == 3.0
