"""What is certified under which sampling and relation, and what is refused."""

import math

import pytest

from accountants import PLDAccountant, PRVAccountant, RDPAccountant, combined_noise_multiplier
from accountants.assumptions import Segment, segments
from accountants.replace import ReplacedGaussian

from .test_bounds import exact_delta


def epsilon(sampling: str, relation: str, *history: tuple) -> float:
    accountant = PLDAccountant(sampling=sampling, relation=relation)
    accountant.history = list(history)
    return accountant.get_epsilon(1e-5)


def gaussian(sigma: float) -> float:
    return epsilon("poisson", "add_remove", (sigma, 1.0, 1))


@pytest.mark.parametrize("sampling", ["shuffled", "cyclic"])
def test_once_per_epoch_is_one_gaussian_per_epoch(sampling: str) -> None:
    # 100 steps at rate 1/10: ten epochs, ten participations.
    assert epsilon(sampling, "zero_out", (5.0, 0.1, 100)) == pytest.approx(gaussian(5.0 / math.sqrt(10)), rel=1e-9)
    assert epsilon(sampling, "replace_one", (5.0, 0.1, 100)) == pytest.approx(gaussian(2.5 / math.sqrt(10)), rel=1e-9)
    # A begun epoch counts as a whole one.
    assert epsilon(sampling, "zero_out", (5.0, 0.1, 101)) == pytest.approx(gaussian(5.0 / math.sqrt(11)), rel=1e-9)


def test_the_least_noisy_steps_are_the_ones_a_record_was_in() -> None:
    # One epoch in all, half of it with little noise: the record may have been there.
    assert epsilon("cyclic", "zero_out", (9.0, 0.1, 5), (3.0, 0.1, 5)) >= gaussian(3.0) * (1 - 1e-9)


def test_an_entry_that_begins_within_an_epoch_reaches_into_one_more() -> None:
    # Five steps of the first epoch, then ten steps, half of them in the second: a record can be in two of the ten.
    found = epsilon("cyclic", "zero_out", (9.0, 0.1, 5), (3.0, 0.1, 10))
    assert found == pytest.approx(gaussian(3.0 / math.sqrt(2)), rel=1e-9)


def test_no_noise_in_one_of_several_unsampled_steps_is_no_privacy() -> None:
    assert segments([(0.0, 1.0, 1), (1.0, 1.0, 5)], "poisson", "add_remove") == [Segment(0.0, 1.0, 1)]
    assert epsilon("unsampled", "replace_one", (0.0, 0.1, 1), (1.0, 0.1, 5)) == math.inf


def test_the_history_is_read_under_known_names_only() -> None:
    with pytest.raises(ValueError, match="no epsilon can be certified"):
        segments([(1.0, 0.1, 1)], "cyclic", "add_remove")


def test_unsampled_forgets_the_rate() -> None:
    assert epsilon("unsampled", "add_remove", (10.0, 0.01, 100)) == pytest.approx(gaussian(1.0), rel=1e-9)
    assert epsilon("unsampled", "replace_one", (10.0, 0.01, 100)) == pytest.approx(gaussian(0.5), rel=1e-9)


def test_zero_out_equals_add_remove_under_poisson() -> None:
    assert epsilon("poisson", "zero_out", (1.0, 0.01, 50)) == epsilon("poisson", "add_remove", (1.0, 0.01, 50))


@pytest.mark.parametrize("sampling", ["shuffled", "cyclic", "fixed_size"])
def test_what_cannot_be_certified_is_refused(sampling: str) -> None:
    with pytest.raises(ValueError, match="no epsilon can be certified"):
        PLDAccountant(sampling=sampling)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="sampling must be one of"):
        PLDAccountant(sampling="bernoulli")
    with pytest.raises(ValueError, match="relation must be one of"):
        PLDAccountant(relation="swap")


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
def test_an_accountant_without_a_bound_for_exchanged_records_names_those_that_have_one(sampling: str) -> None:
    accountant = PRVAccountant(sampling=sampling, relation="replace_one")
    accountant.history = [(1.0, 0.01, 10)]
    with pytest.raises(ValueError, match="use PLDAccountant or RDPAccountant"):
        accountant.get_epsilon(1e-5)


@pytest.mark.parametrize(
    "history", [[(1.0, 0.01, 2)], [(3.0, 0.3, 5)], [(1.1, 0.01, 1000)], [(4.0, 0.1, 9), (5.0, 1.0, 2)]]
)
def test_exchanged_records_under_poisson_sampling_few_steps_or_many(history: list) -> None:
    pld, rdp = PLDAccountant(relation="replace_one"), RDPAccountant(relation="replace_one")
    pld.history = rdp.history = history
    lower, upper = pld.get_epsilon_bounds(1e-6)
    assert 0.99 * upper <= lower <= upper <= rdp.get_epsilon(1e-6) <= 2.5 * upper


def test_from_below_an_exchanged_record_costs_at_least_a_removed_one() -> None:
    removed, exchanged = PLDAccountant(), PLDAccountant(relation="replace_one")
    removed.history = exchanged.history = [(0.3228, 3.229e-6, 1353)]
    lower, upper = exchanged.get_epsilon_bounds(1.125e-5)
    assert removed.get_epsilon_bounds(1.125e-5)[0] <= lower <= upper <= lower * 1.001


def test_a_single_step_costs_no_less_than_two_records_that_are_exchanged() -> None:
    found = epsilon("poisson", "replace_one", (1.0, 0.5, 1))
    pair = ReplacedGaussian(1.0, 0.5)
    assert exact_delta(pair, found) <= 1e-5 < exact_delta(pair, found - 0.01)


def test_unsampled_steps_among_sampled_ones_move_the_sum_by_twice_the_bound() -> None:
    # The sampled step costs next to nothing beside the ten unsampled ones.
    mixed = epsilon("poisson", "replace_one", (5.0, 1.0, 10), (100.0, 1e-6, 1))
    assert mixed == pytest.approx(gaussian(2.5 / math.sqrt(10)), rel=1e-3)


def test_two_sums_of_one_batch_are_one_gaussian() -> None:
    assert combined_noise_multiplier([3.0, 4.0]) == pytest.approx(2.4)
    assert combined_noise_multiplier([1.5]) == 1.5
    assert combined_noise_multiplier([1.5, 0.0]) == 0.0
    # Unsampled, it is the composition of the two.
    assert gaussian(2.4) == pytest.approx(epsilon("poisson", "add_remove", (3.0, 1.0, 1), (4.0, 1.0, 1)), rel=1e-9)
    with pytest.raises(ValueError, match="one value or more"):
        combined_noise_multiplier([])
    with pytest.raises(ValueError, match="noise_multiplier"):
        combined_noise_multiplier([-1.0])
