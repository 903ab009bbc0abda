"""Calibration: on the safe side, close to the target, quick."""

import pytest

from accountants import (
    PLDAccountant,
    RDPAccountant,
    create_accountant,
    get_noise_multiplier,
    get_num_steps,
    get_sample_rate,
)
from accountants.calibrate import steps_in

SETTING = {"target_delta": 1e-5, "sample_rate": 0.01}


def spent(name: str, sigma: float, q: float, steps: int) -> float:
    accountant = create_accountant(name)
    accountant.history = [(sigma, q, steps)]
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("target", [0.01, 1.0, 3.0, 200.0])
@pytest.mark.parametrize("name", ["pld", "rdp", "prv"])
def test_noise_keeps_to_the_target_and_near_it(target: float, name: str) -> None:
    if name == "prv":
        target = max(target, 0.05)  # the 0.01 that this accountant adds would be the whole of a smaller target
    sigma = get_noise_multiplier(target_epsilon=target, epochs=10, accountant=name, **SETTING)
    assert target * (1 - 2e-3) <= spent(name, sigma, 0.01, 1000) <= target


def test_a_small_target_of_prv_needs_a_small_error() -> None:
    coarse, fine = (
        get_noise_multiplier(target_epsilon=0.01, steps=1000, accountant="prv", eps_error=error, **SETTING)
        for error in (1e-3, 1e-4)
    )
    accountant = create_accountant("prv")
    accountant.history = [(fine, 0.01, 1000)]
    assert 0.998 * 0.01 <= accountant.get_epsilon(1e-5, eps_error=1e-4) <= 0.01
    assert spent("pld", fine, 0.01, 1000) > 0.98 * 0.01 > spent("pld", coarse, 0.01, 1000)


def test_default_is_prv_and_epochs_are_steps() -> None:
    by_epochs = get_noise_multiplier(target_epsilon=2.0, epochs=3, target_delta=1e-5, sample_rate=0.03)
    assert by_epochs == get_noise_multiplier(target_epsilon=2.0, steps=100, target_delta=1e-5, sample_rate=0.03)
    assert spent("prv", by_epochs, 0.03, 100) <= 2.0


@pytest.mark.parametrize("batches, epochs, run", [(75, 3, 225), (8, 1.3, 11), (49, 1, 49), (100, 7, 700), (3, 0.1, 1)])
def test_every_step_of_the_epochs_is_within_the_budget(batches: int, epochs: float, run: int) -> None:
    assert steps_in(epochs, 1 / batches) == run
    setting = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 1 / batches, "accountant": "rdp"}
    assert get_noise_multiplier(epochs=epochs, **setting) == get_noise_multiplier(steps=run, **setting)


def test_no_whole_number_of_passes_gains_or_loses_a_step_by_rounding() -> None:
    wrong = [(n, k) for n in range(1, 300) for k in range(1, 60) if steps_in(k, 1 / n) != n * k]
    assert not wrong


def test_more_steps_than_can_be_taken_are_refused() -> None:
    with pytest.raises(ValueError, match="1e.300 epochs"):
        get_noise_multiplier(target_epsilon=1.0, epochs=1e300, **SETTING)


def test_an_accountant_lends_its_assumptions_and_keeps_its_history() -> None:
    accountant = PLDAccountant(relation="replace_one")
    accountant.history = [(9.0, 0.5, 7)]
    exchanged = get_noise_multiplier(target_epsilon=2.0, steps=100, accountant=accountant, **SETTING)
    assert accountant.history == [(9.0, 0.5, 7)]
    assert exchanged > get_noise_multiplier(target_epsilon=2.0, steps=100, accountant="pld", **SETTING)


def test_steps() -> None:
    steps = get_num_steps(target_epsilon=1.0, noise_multiplier=1.0, accountant="pld", **SETTING)
    assert spent("pld", 1.0, 0.01, steps) <= 1.0 < spent("pld", 1.0, 0.01, steps + 1 + steps // 500)
    assert get_num_steps(target_epsilon=0.05, noise_multiplier=0.5, accountant="pld", **SETTING) == 0


def test_sample_rate() -> None:
    q = get_sample_rate(target_epsilon=1.0, target_delta=1e-5, noise_multiplier=1.0, steps=100, accountant="pld")
    assert 0.998 <= spent("pld", 1.0, q, 100) <= 1.0
    assert get_sample_rate(target_epsilon=9, target_delta=1e-5, noise_multiplier=50, steps=1, accountant="pld") == 1.0


@pytest.mark.parametrize(
    "bad, named",
    [({"target_epsilon": 0}, "target_epsilon"), ({"target_epsilon": -1}, "target_epsilon"),
     ({"target_delta": 1}, "target_delta"),
     ({"sample_rate": 2}, "sample_rate"), ({"sample_rate": 0}, "sample_rate"), ({"steps": 1.5}, "steps"),
     ({"steps": 0}, "steps"),
     ({"epochs": 0, "steps": None}, "epochs must lie"), ({"epochs": -1, "steps": None}, "epochs must lie"),
     ({"epochs": 3}, "EITHER"), ({"steps": None}, "EITHER"), ({"epsilon_tolerance": 0}, "epsilon_tolerance")],
)  # fmt: skip
def test_bad_input(bad: dict, named: str) -> None:
    arguments = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.01, "steps": 100, **bad}
    with pytest.raises(ValueError, match=named):
        get_noise_multiplier(**arguments)


@pytest.mark.parametrize(
    "bad, named",
    [({"noise_multiplier": 0}, "noise_multiplier"), ({"sample_rate": 0}, "sample_rate"), ({"target_delta": 0}, "delta"),
     ({"target_epsilon": 0}, "target_epsilon"), ({"sample_rate": 1e-9}, "more than .* steps keep to")],
)  # fmt: skip
def test_bad_input_for_steps(bad: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        get_num_steps(**{"target_epsilon": 5.0, "noise_multiplier": 9.0, "accountant": "rdp", **SETTING, **bad})


@pytest.mark.parametrize(
    "bad, named",
    [({"noise_multiplier": 0}, "noise_multiplier"), ({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"),
     ({"target_delta": 0}, "delta"), ({"target_epsilon": 0}, "target_epsilon"),
     ({"noise_multiplier": 1e-5, "target_epsilon": 1e-9}, "no sample rate above 1e-12")],
)  # fmt: skip
def test_bad_input_for_rates(bad: dict, named: str) -> None:
    given = {"target_epsilon": 1.0, "target_delta": 1e-5, "noise_multiplier": 1.0, "steps": 10, "accountant": "rdp"}
    with pytest.raises(ValueError, match=named):
        get_sample_rate(**{**given, **bad})


class Stubborn(RDPAccountant):
    """Whatever the noise, something is spent."""

    def get_epsilon(self, delta: float, **kwargs: object) -> float:
        return 0.5 + 1 / self.history[0][0]


def test_a_budget_that_no_noise_keeps_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="budget is too low"):
        get_noise_multiplier(target_epsilon=0.5, steps=10, accountant=Stubborn(), **SETTING)


class Remembering(RDPAccountant):
    """Says less when it is asked for a second time."""

    asked = False

    def get_epsilon(self, delta: float, **kwargs: object) -> float:
        share, self.asked = 0.5 if self.asked else 1.0, True
        return share * super().get_epsilon(delta)


def test_what_is_promised_is_what_a_fresh_accountant_says() -> None:
    accountant = Remembering()
    sigma = get_noise_multiplier(target_epsilon=2.0, steps=100, accountant=accountant, **SETTING)
    assert not accountant.asked and 1.99 <= spent("rdp", sigma, 0.01, 100) <= 2.0
