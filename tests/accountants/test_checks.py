"""What users hand in is checked before it is counted."""

import math

import pytest

from accountants import checks


@pytest.mark.parametrize("entry", ["abc", 3, None, (1.0, 0.1), (1.0, 0.1, 2, 3)])
def test_an_entry_of_the_history_is_three_numbers(entry: object) -> None:
    with pytest.raises(ValueError, match=r"history\[1\] must be .* three numbers, got"):
        checks.history([(1.0, 0.1, 2), entry])  # type: ignore[list-item]


def test_equal_entries_are_merged_and_those_that_cost_nothing_left_out() -> None:
    entries = [(1.0, 0.1, 2), (2, 0.1, 1), (1.0, 0.1, 5), (1.0, 0, 9), (3.0, 0.1, 0)]
    assert checks.history(entries) == [(1.0, 0.1, 7), (2.0, 0.1, 1)]


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.noise_multiplier, -1e-9),
        (checks.noise_multiplier, math.inf),
        (checks.noise_multiplier, math.nan),
        (checks.noise_multiplier, "much"),
        (checks.sample_rate, 1.0000001),
        (checks.sample_rate, -1e-9),
        (checks.steps, 1.5),
        (checks.steps, -1),
        (checks.steps, math.inf),
        (checks.delta, 0),
        (checks.delta, 1),
        (checks.epsilon, -1e-9),
        (checks.epsilon, math.inf),
        (checks.target_epsilon, 0),
        (checks.target_epsilon, math.inf),
    ],
)
def test_a_number_out_of_range_is_named(check, value: object) -> None:
    name = check.__name__
    with pytest.raises(ValueError, match=rf"^{name} must (be|lie)"):
        check(value)
