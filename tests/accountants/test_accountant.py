"""The interface: Opacus's, in both directions, and errors that name the value and the range."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import opacus.accountants
import pytest

import accountants
from accountants import IAccountant, PLDAccountant, create_accountant, register_accountant

NAMES = ["rdp", "gdp", "prv", "pld"]


@pytest.fixture(params=NAMES)
def accountant(request: pytest.FixtureRequest) -> IAccountant:
    return create_accountant(request.param)


def test_needs_neither_torch_nor_opacus() -> None:
    code = "import sys, accountants; sys.exit(any(m in sys.modules for m in ('torch', 'opacus', 'dp_accounting')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_steps_are_merged_into_runs(accountant: IAccountant) -> None:
    for sigma in (1.0, 1.0, 1.0):
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
    assert accountant.history == [(1.0, 0.01, 3)]
    accountant.step(noise_multiplier=2.0, sample_rate=0.01)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.history == [(1.0, 0.01, 3), (2.0, 0.01, 1), (1.0, 0.01, 1)]
    assert len(accountant) == 3 and accountant.num_steps == 5


@pytest.mark.parametrize("name", ["rdp", "gdp", "prv"])
def test_state_dicts_go_both_ways(name: str) -> None:
    ours, theirs = create_accountant(name), opacus.accountants.create_accountant(name)
    ours.history = [(1.0, 0.01, 10), (2.0, 0.02, 5)]
    theirs.load_state_dict(ours.state_dict())
    assert [tuple(entry) for entry in theirs.history] == ours.history
    back = create_accountant(name)
    back.load_state_dict(theirs.state_dict())
    assert back.history == ours.history and back.mechanism() == theirs.mechanism()


def test_state_dict_keeps_the_assumptions_and_is_a_copy() -> None:
    accountant = accountants.PLDAccountant(relation="replace_one")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    state = accountant.state_dict()
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert state["history"] == [(1.0, 0.1, 1)]
    other = accountants.PLDAccountant()
    other.load_state_dict(state)
    assert other.relation == "replace_one"
    kept: dict = {"x": 1}
    assert accountant.state_dict(kept) is kept and kept["x"] == 1


@pytest.mark.parametrize(
    "state",
    [None, {}, {"history": []}, {"mechanism": "pld"}, {"history": [], "mechanism": "rdp"},
     {"history": [(1.0, 2.0, 3)], "mechanism": "pld"}, {"history": [(1.0, 0.5)], "mechanism": "pld"},
     {"history": [], "mechanism": "pld", "sampling": "bernoulli"}],
)  # fmt: skip
def test_bad_state_dicts_change_nothing(state: dict | None) -> None:
    accountant = create_accountant("pld")
    accountant.history = [(1.0, 0.1, 1)]
    with pytest.raises(ValueError):
        accountant.load_state_dict(state)  # type: ignore[arg-type]
    assert accountant.history == [(1.0, 0.1, 1)]


def test_hook_charges_what_the_optimizer_does(accountant: IAccountant) -> None:
    hook = accountant.get_optimizer_hook_fn(sample_rate=0.01)
    hook(SimpleNamespace(noise_multiplier=1.5, accumulated_iterations=4))
    assert accountant.history == [(1.5, 0.04, 1)]


@pytest.mark.parametrize(
    "noise_multiplier, sample_rate, named",
    [(-1, 0.1, r"noise_multiplier must lie in \[0, inf\), got -1"), (math.nan, 0.1, "noise_multiplier.*NaN"),
     (math.inf, 0.1, "noise_multiplier"), ("x", 0.1, "noise_multiplier"),
     (1, 1.5, r"sample_rate must lie in \[0, 1\], got 1.5"),
     (1, -0.1, "sample_rate"), (1, math.nan, "sample_rate.*NaN")],
)  # fmt: skip
def test_bad_steps_are_refused(
    noise_multiplier: float, sample_rate: float, named: str, accountant: IAccountant
) -> None:
    with pytest.raises(ValueError, match=named):
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
    assert accountant.history == []


@pytest.mark.parametrize("delta", [0, 1, -0.1, 2, math.nan, "x", None])
def test_bad_deltas_are_refused(delta: float, accountant: IAccountant) -> None:
    accountant.history = [(1.0, 0.01, 10)]
    with pytest.raises(ValueError, match="delta must"):
        accountant.get_epsilon(delta)


@pytest.mark.parametrize("steps", [1.5, -1, math.nan, math.inf, "many"])
def test_bad_step_counts_are_refused(steps: float, accountant: IAccountant) -> None:
    accountant.history = [(1.0, 0.01, steps)]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"history\[0\]: num_steps"):
        accountant.get_epsilon(1e-5)


def test_empty_and_noiseless(accountant: IAccountant) -> None:
    assert accountant.get_epsilon(1e-5) == 0
    for rate in (0.01, 1.0):
        accountant.history = [(0.0, rate, 1)]
        assert accountant.get_epsilon(1e-5) == math.inf


@pytest.mark.filterwarnings("ignore::accountants.ApproximateEpsilonWarning")
def test_bounds_delta_and_curve_of_every_accountant(accountant: IAccountant) -> None:
    """They say the same as get_epsilon, on the safe side; only the approximation may leave its certified bounds."""
    accountant.history = [(1.1, 256 / 60000, 40), (1.3, 0.01, 20)]
    epsilon, (lower, upper) = accountant.get_epsilon(1e-5), accountant.get_epsilon_bounds(1e-5)
    certified = PLDAccountant()
    certified.history = accountant.history
    assert lower == certified.get_epsilon_bounds(1e-5)[0] and 0 < lower <= certified.get_epsilon(1e-5) <= upper
    assert lower <= epsilon <= upper or accountant.mechanism() == "gdp"
    delta = accountant.get_delta(epsilon)
    assert accountant.get_delta(1.01 * epsilon) < delta <= 1e-5 * (1 + 1e-4)
    assert delta >= (0.5 if accountant.mechanism() == "prv" else 0.99) * 1e-5
    curve = accountant.epsilon_curve(1e-5)
    assert curve.shape == (60,) and (np.diff(curve) >= 0).all()
    assert curve[-1] == pytest.approx(epsilon, abs=0.011 if accountant.mechanism() == "prv" else 1e-6)


@pytest.mark.filterwarnings("ignore::accountants.ApproximateEpsilonWarning")
def test_bounds_delta_and_curve_at_the_ends(accountant: IAccountant) -> None:
    assert accountant.get_epsilon_bounds(1e-5) == (0.0, 0.0) and accountant.get_delta(1.0) == 0.0
    assert accountant.epsilon_curve(1e-5).shape == (0,)
    accountant.history = [(0.0, 0.5, 2)]
    assert accountant.get_epsilon_bounds(1e-5) == (math.inf, math.inf) and accountant.get_delta(1.0) == 1.0
    assert accountant.epsilon_curve(1e-5).tolist() == [math.inf] * 2
    accountant.history = [(1.0, 1e-9, 1)]
    assert 0 <= accountant.get_delta(2.0) <= 1e-9
    with pytest.raises(ValueError, match="epsilon"):
        accountant.get_delta(-1.0)
    with pytest.raises(ValueError, match="delta"):
        accountant.get_epsilon_bounds(0.0)


@pytest.mark.parametrize("name", ["prv", "gdp"])
def test_what_an_accountant_does_not_certify_it_refuses_everywhere(name: str) -> None:
    accountant = type(create_accountant(name))(relation="replace_one")
    accountant.history = [(1.0, 0.01, 10)]
    for ask in (accountant.get_epsilon_bounds, accountant.get_delta, accountant.epsilon_curve):
        with pytest.raises(ValueError, match="certifies nothing"):
            ask(0.5)


def test_describe_names_what_the_number_rests_on(accountant: IAccountant) -> None:
    accountant.history = [(1.0, 1.0, 1)]
    text = accountant.describe(1e-5)
    assert "epsilon" in text and "1e-05" in text and "Poisson" in text and "added or removed" in text


class Wavering(accountants.RDPAccountant):
    """Its epsilon after five steps is less than after four, and jumps at a delta."""

    def get_epsilon(self, delta: float, **kwargs: object) -> float:
        return self.num_steps - 2.0 * (self.num_steps > 4) + 10 * (delta < 1e-3)


def test_what_was_spent_never_falls() -> None:
    accountant = Wavering()
    accountant.history = [(1.0, 0.1, 8)]
    assert accountant.epsilon_curve(1e-2).tolist() == [1, 2, 3, 4, 4, 4, 5, 6]


def test_a_delta_is_one_at_which_epsilon_is_small_enough() -> None:
    accountant = Wavering()
    accountant.history = [(1.0, 0.1, 2)]
    delta = accountant.get_delta(3.0)
    assert accountant.get_epsilon(delta) <= 3.0 and delta == pytest.approx(1e-3, rel=1e-8)
    assert accountant.get_delta(1.0) == 1.0


def test_deep_copies_are_independent(accountant: IAccountant) -> None:
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    other = copy.deepcopy(accountant)
    other.step(noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.num_steps == 1 and other.num_steps == 2


def test_dp_event_mirrors_the_history_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    accountant = create_accountant("pld")
    accountant.history = [(1.1, 0.01, 100), (2.0, 1.0, 3)]
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match="pip install dp-accounting"):
        accountant.to_dp_event()
    names = ("GaussianDpEvent", "PoissonSampledDpEvent", "SelfComposedDpEvent", "ComposedDpEvent")
    fake = SimpleNamespace(**{name: (lambda *args, name=name: (name, *args)) for name in names})
    monkeypatch.setitem(sys.modules, "dp_accounting", fake)
    sampled = ("PoissonSampledDpEvent", 0.01, ("GaussianDpEvent", 1.1))
    assert accountant.to_dp_event() == (
        "ComposedDpEvent",
        [("SelfComposedDpEvent", sampled, 100), ("SelfComposedDpEvent", ("GaussianDpEvent", 2.0), 3)],
    )


def test_registry() -> None:
    class Mine(accountants.RDPAccountant):
        pass

    with pytest.raises(ValueError, match="already registered"):
        register_accountant("rdp", Mine)
    register_accountant("mine", Mine)
    assert type(create_accountant("mine")) is Mine
    with pytest.raises(ValueError, match="Unexpected accounting mechanism: 'nope'"):
        create_accountant("nope")


@pytest.mark.parametrize("name", ["rdp", "gdp", "prv", "pld"])
@pytest.mark.parametrize("value", [None, "poisson", 3])
def test_a_history_that_is_none_is_refused_where_it_is_assigned(name: str, value: object) -> None:
    accountant = create_accountant(name)
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(TypeError, match=r"history must be a list of .* got (NoneType|str|int); .* assign \[\]"):
        accountant.history = value  # type: ignore[assignment]
    assert accountant.history == [(1.0, 0.1, 1)]


def test_a_history_is_the_list_that_was_assigned() -> None:
    accountant, entries = create_accountant("rdp"), [(1.0, 0.1, 2)]
    accountant.history = entries
    entries.append((2.0, 0.1, 1))
    assert accountant.history is entries and accountant.num_steps == 3
    accountant.history = ((1.0, 0.1, 2),)  # type: ignore[assignment]
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert accountant.history == [(1.0, 0.1, 3)]
