"""Checks of the numbers that users hand in: every refusal names the value and the range it must lie in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

History = list[tuple[float, float, int]]


def number(value: Any, name: str) -> float:
    """``value`` as a float; ValueError if it is not a number or is NaN."""
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, got NaN")
    return result


def noise_multiplier(value: Any, name: str = "noise_multiplier") -> float:
    """Standard deviation of the noise over the sensitivity, in [0, inf); 0 means no noise, hence no privacy.

    So does what has no square in float64: its epsilon is above 1e300.
    """
    result = number(value, name)
    if not 0 <= result < math.inf:
        raise ValueError(f"{name} must lie in [0, inf), got {value!r}")
    return result if result > 1e-150 else 0.0


def sample_rate(value: Any, name: str = "sample_rate") -> float:
    """Probability that a record takes part in a step, in [0, 1]."""
    result = number(value, name)
    if not 0 <= result <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return result


def steps(value: Any, name: str = "steps") -> int:
    """A count of steps: an integer, 0 or more."""
    result = number(value, name)
    if not 0 <= result < math.inf or result != math.floor(result):
        raise ValueError(f"{name} must be an integer in [0, inf), got {value!r}")
    return int(value)


def delta(value: Any, name: str = "delta") -> float:
    """The delta of (epsilon, delta), strictly between 0 and 1."""
    result = number(value, name)
    if not 0 < result < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value!r}")
    return result


def epsilon(value: Any, name: str = "epsilon") -> float:
    """The epsilon of (epsilon, delta), in [0, inf)."""
    result = number(value, name)
    if not 0 <= result < math.inf:
        raise ValueError(f"{name} must lie in [0, inf), got {value!r}")
    return result


def target_epsilon(value: Any) -> float:
    """An epsilon to calibrate to: finite and above 0."""
    result = number(value, "target_epsilon")
    if not 0 < result < math.inf:
        raise ValueError(f"target_epsilon must lie in (0, inf), got {value!r}")
    return result


def history(entries: Sequence[Sequence[Any]]) -> History:
    """Every entry checked, and equal (noise multiplier, sample rate) merged; entries that cost nothing are left out."""
    merged: dict[tuple[float, float], int] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, str) or not hasattr(entry, "__len__") or len(entry) != 3:
            raise ValueError(
                f"history[{index}] must be (noise_multiplier, sample_rate, num_steps), three numbers, got {entry!r}"
            )
        key = (
            noise_multiplier(entry[0], f"history[{index}]: noise_multiplier"),
            sample_rate(entry[1], f"history[{index}]: sample_rate"),
        )
        count = steps(entry[2], f"history[{index}]: num_steps")
        if count and key[1] > 0:
            merged[key] = merged.get(key, 0) + count
    return [(sigma, q, count) for (sigma, q), count in merged.items()]
