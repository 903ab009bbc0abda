"""The certified accountant against the truth by another method, closed forms, other libraries and itself."""

import json
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import PLDAccountant, create_accountant

DATA = Path(__file__).parent / "data"
TRUTH = json.loads((DATA / "truth.json").read_text(encoding="utf-8"))["rows"]
ORACLE = json.loads((DATA / "dp_accounting.json").read_text(encoding="utf-8"))["rows"]


def pld(*history, **assumptions) -> PLDAccountant:
    accountant = PLDAccountant(**assumptions)
    accountant.history = list(history)
    return accountant


def allowed(epsilon: float) -> float:
    return max(2e-4, 1e-3 * epsilon)


@pytest.mark.parametrize("row", TRUTH[:10] + TRUTH[10::4], ids=lambda row: "-".join(f"{v:g}" for v in row.values()))
def test_never_below_the_truth_and_close_to_it(row: dict) -> None:
    accountant = pld((row["sigma"], row["q"], row["steps"]))
    started = time.perf_counter()
    epsilon = accountant.get_epsilon(row["delta"])
    assert time.perf_counter() - started < 15  # a second on an idle core
    assert row["epsilon"] - 2 * row["moved"] <= epsilon <= row["epsilon"] + 2 * row["moved"] + allowed(row["epsilon"])


@pytest.mark.parametrize("row", TRUTH[:6] + TRUTH[12::20], ids=lambda row: "-".join(f"{v:g}" for v in row.values()))
def test_the_bounds_enclose_the_truth(row: dict) -> None:
    lower, upper = pld((row["sigma"], row["q"], row["steps"])).get_epsilon_bounds(row["delta"])
    assert 0 <= lower <= row["epsilon"] + 2 * row["moved"]
    assert upper >= row["epsilon"] - 2 * row["moved"]
    assert lower > 0.9 * row["epsilon"] - 1e-3


@pytest.mark.parametrize("row", ORACLE, ids=lambda row: str(row["history"]))
def test_between_the_optimistic_and_pessimistic_values_of_dp_accounting(row: dict) -> None:
    epsilon = pld(*(tuple(entry) for entry in row["history"])).get_epsilon(row["delta"])
    assert row["lower"] < epsilon < row["upper"] + allowed(row["upper"])


def test_published_figure_of_jax_privacy() -> None:
    assert pld((4, 1024 / 50000, 10000)).get_epsilon(1e-5) == pytest.approx(2.09245, abs=3e-4)


@pytest.mark.parametrize("delta, expected", [(1e-13, 4.381), (1e-14, 4.579), (1e-16, 4.959)])
def test_small_deltas_need_the_tilt(delta: float, expected: float) -> None:
    assert pld((1.1, 256 / 60000, 14062)).get_epsilon(delta) == pytest.approx(expected, abs=1.5e-3)


def test_one_step_has_a_closed_form() -> None:
    assert pld((1, 0.01, 1)).get_epsilon(1e-5) == pytest.approx(0.1995, abs=5e-5)


def test_unsampled_steps_have_a_closed_form_however_they_are_mixed() -> None:
    # 100 steps at sigma 10 are one at sigma 1; so are 50 at 10 and 2 at 2.
    assert pld((10, 1, 100)).get_epsilon(1e-5) == pytest.approx(4.37718, abs=1e-5)
    assert pld((10, 1, 50), (2, 1, 2)).get_epsilon(1e-5) == pytest.approx(4.37718, abs=1e-5)


def test_nearly_certain_sampling_approaches_the_closed_form() -> None:
    assert pld((10, 1 - 1e-9, 100)).get_epsilon(1e-5) == pytest.approx(4.37718, abs=5e-4)


def test_delta_inverts_epsilon() -> None:
    accountant = pld((1.0, 0.01, 500), (1.5, 0.02, 200))
    epsilon = accountant.get_epsilon(1e-6)
    lower, upper = accountant.get_delta_bounds(epsilon)
    assert lower <= upper
    assert accountant.get_delta(epsilon) == upper == pytest.approx(1e-6, rel=3e-3)
    assert lower == pytest.approx(1e-6, rel=2e-2)


def test_delta_by_drawing_privacy_losses() -> None:
    # delta(epsilon) = E[(1 - e^(epsilon - S))+] with S the sum of the losses: 400,000 draws, both directions.
    sigma, q, steps, epsilon = 1.0, 0.2, 8, 1.0
    rng = np.random.default_rng(0)
    estimates = []
    for add in (False, True):
        x = sigma * rng.standard_normal((400_000, steps))
        if not add:
            x += rng.random(x.shape) < q
        loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
        total = (-loss if add else loss).sum(axis=1)
        values = np.maximum(-np.expm1(epsilon - total), 0.0)
        estimates.append((values.mean(), values.std() / math.sqrt(len(values))))
    mean, error = max(estimates)
    assert pld((sigma, q, steps)).get_delta(epsilon) == pytest.approx(mean, abs=5 * error)


@given(
    st.floats(0.4, 8),
    st.floats(1e-5, 0.9),
    st.integers(1, 5000),
    st.floats(-12, -4),
    st.sampled_from(["s", "q", "n", "d"]),
)
def test_falls_with_noise_and_delta_and_rises_with_rate_and_steps(
    sigma: float, q: float, steps: int, log_delta: float, what: str
) -> None:
    lower, upper = pld((sigma, q, steps)).get_epsilon_bounds(10**log_delta)
    assert 0 <= lower <= upper
    more = {
        "s": (sigma / 1.3, q, steps),
        "q": (sigma, q * 1.1, steps),
        "n": (sigma, q, 2 * steps),
        "d": (sigma, q, steps),
    }
    delta = 10 ** (log_delta - 1 if what == "d" else log_delta)
    assert pld(more[what]).get_epsilon(delta) >= lower


def test_parts_compose_to_the_whole() -> None:
    whole = pld((1.2, 0.01, 900)).get_epsilon(1e-6)
    # Equal parts are merged; parts that differ in the last digit are composed as different mechanisms.
    parts = pld((1.2, 0.01, 300), (1.2 * (1 + 1e-12), 0.01, 300), (1.2, 0.01 * (1 + 1e-12), 300)).get_epsilon(1e-6)
    assert pld((1.2, 0.01, 300), (1.2, 0.01, 600)).get_epsilon(1e-6) == whole
    assert parts == pytest.approx(whole, abs=allowed(whole))


def test_order_of_the_history_does_not_matter() -> None:
    first, second = (1.0, 0.02, 100), (2.0, 0.1, 50)
    assert pld(first, second).get_epsilon(1e-5) == pytest.approx(pld(second, first).get_epsilon(1e-5), rel=1e-9)


def test_empty_history_costs_nothing_and_no_noise_costs_everything() -> None:
    assert pld().get_epsilon(1e-5) == 0 and pld().get_epsilon_bounds(1e-5) == (0, 0) and pld().get_delta(1.0) == 0
    assert pld((1.0, 0.0, 100)).get_epsilon(1e-5) == 0  # never sampled
    assert pld((0.0, 0.01, 1)).get_epsilon(1e-5) == math.inf and pld((0.0, 0.01, 1)).get_delta(3.0) == 1
    assert pld((0.0, 0.01, 0)).get_epsilon(1e-5) == 0  # no step taken


def test_replace_one_costs_more_and_is_shown() -> None:
    accountant = pld((1.1, 256 / 60000, 14062), relation="replace_one")
    # 4.22130 by contour integration of the pair's moment generating function
    assert 4.22130 - 1e-5 <= accountant.get_epsilon(1e-5) <= 4.22130 + allowed(4.2)
    assert "exchanged" in accountant.describe(1e-5)
    assert "added or removed" in pld((1.1, 0.01, 10)).describe(1e-5)


def test_a_schedule_of_500_segments() -> None:
    history = [(1.0 + 0.002 * k, 0.01, 20) for k in range(500)]
    started = time.perf_counter()
    epsilon = pld(*history).get_epsilon(1e-5)
    assert time.perf_counter() - started < 20  # 2 s on an idle core
    assert pld((2.0, 0.01, 10000)).get_epsilon(1e-5) < epsilon < pld((1.0, 0.01, 10000)).get_epsilon(1e-5)


def test_copies_and_pickles_without_its_memory() -> None:
    accountant = pld((1.0, 0.01, 50))
    epsilon = accountant.get_epsilon(1e-5)
    again = pickle.loads(pickle.dumps(accountant))
    assert "_memory" in accountant.__dict__ and "_memory" not in again.__dict__
    assert again.history == accountant.history and again.get_epsilon(1e-5) == epsilon


def test_losses_beyond_floating_point_are_bounded_by_renyi_divergences() -> None:
    """exp(700) is the largest loss that a lattice can hold."""
    accountant, renyi = PLDAccountant(), create_accountant("rdp")
    accountant.history = renyi.history = [(0.006, 0.125, 8)]
    lower, upper = accountant.get_epsilon_bounds(1e-5)
    # Truth: that some coordinate is above 1/2 has probability over 0.6 with the record (it is in one of eight batches
    # with probability 0.66), and at most 8 exp(-0.125 / sigma^2) without it.
    assert lower <= upper == accountant.get_epsilon(1e-5) <= renyi.get_epsilon(1e-5) < 1.1e5
    assert upper > 0.125 / 0.006**2 + math.log((0.6 - 1e-5) / 8)
    assert accountant.get_delta(0.1 / 0.006**2) == pytest.approx(1 - 0.875**8)  # that it is in some batch
