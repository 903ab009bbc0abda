"""One quantity from the others: the noise, the steps or the sample rate that spend a given epsilon, never more.

Whatever accountant is asked, the answer's epsilon has been computed by that accountant and is at most the target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from . import checks
from .accountant import IAccountant
from .registry import create_accountant

MAX_SIGMA = 1e9
MAX_STEPS = 10**9
RELATIVE_TOLERANCE = 1e-3


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: float | None = None,
    steps: int | None = None,
    accountant: str | IAccountant = "rdp",
    epsilon_tolerance: float = 0.01,
    **kwargs: Any,
) -> float:
    """Smallest noise multiplier, up to the tolerance, that keeps to the target.

    Args:
        target_epsilon: above 0.
        target_delta: in (0, 1).
        sample_rate: probability in (0, 1] that a record is in a step's batch.
        epochs: passes over the data, each of 1 / sample_rate steps (:func:`steps_in`); or
        steps: number of steps. Exactly one of the two.
        accountant: a registered name, or an accountant whose sampling and relation are to hold (its history is not
        used).
        epsilon_tolerance: the epsilon reached is within this of the target, and within 0.1 % of it, unless it jumps
        there.
        **kwargs: handed to the accountant's ``get_epsilon``. What "prv" adds, ``eps_error``, is 0.01 by default, too
            much for a target of that size: hand ``eps_error=target_epsilon / 100`` to both, or use "pld".

    Raises:
        ValueError: a number is out of range, or no noise multiplier below 1e9 is enough.

    Example:
        >>> sigma = get_noise_multiplier(target_epsilon=3, target_delta=1e-5, sample_rate=0.01, epochs=10)
        >>> round(sigma, 2)
        0.86
    """
    if (steps is None) == (epochs is None):
        raise ValueError("get_noise_multiplier takes as input EITHER a number of steps or a number of epochs")
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(target_delta, "target_delta")
    q = _positive(checks.sample_rate(sample_rate), "sample_rate")
    if steps is None:
        steps = steps_in(_positive(checks.number(epochs, "epochs"), "epochs"), q)
    count = checks.steps(steps)
    tolerance = _tolerance(target, epsilon_tolerance)
    epsilon = _curve(accountant, delta, kwargs)
    if count == 0:
        raise ValueError(f"steps must lie in [1, inf), got {steps!r}")
    sigma = _search(lambda sigma: epsilon(sigma, q, count), target, tolerance, start=1.0, limit=MAX_SIGMA)
    if sigma is None:
        raise ValueError(
            f"The privacy budget is too low: epsilon = {target:g} at delta = {delta:g} needs more noise than 1e9"
        )
    return sigma


def steps_in(epochs: float, sample_rate: float) -> int:
    """Steps of so many passes over the data, a part of a step counted whole: ``ceil(epochs / sample_rate)``.

    Rounding down would charge fewer steps than are run, also where only the division is inexact: 3 / (1 / 75) is
    224.99999999999997 in floating point, and 225 steps at the noise for 224 exceed the budget. A billionth of a step is
    no step, as 11.000000000000002 is 11.

    Example:
        >>> steps_in(3, 1 / 75), steps_in(1.3, 1 / 8)
        (225, 11)
    """
    steps = epochs / sample_rate
    if steps > MAX_STEPS:
        raise ValueError(f"{epochs:g} epochs at sample_rate {sample_rate:g} are more than {MAX_STEPS} steps")
    return math.ceil(steps - 1e-9)


def get_num_steps(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    sample_rate: float,
    accountant: str | IAccountant = "prv",
    **kwargs: Any,
) -> int:
    """Most steps that keep to the target: exact below 1000, to 0.1 % above; 0 if one step is too many.

    Arguments as for :func:`get_noise_multiplier`.

    Raises:
        ValueError: a number is out of range, or a thousand million steps still keep to the target.
    """
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(target_delta, "target_delta")
    sigma = _positive(checks.noise_multiplier(noise_multiplier), "noise_multiplier")
    q = _positive(checks.sample_rate(sample_rate), "sample_rate")
    epsilon = _curve(accountant, delta, kwargs)
    low, high = 0, 1
    while epsilon(sigma, q, high) <= target:
        low, high = high, 4 * high
        if high > MAX_STEPS:
            raise ValueError(f"more than {low} steps keep to epsilon = {target:g} at delta = {delta:g}: set no limit")
    while high - low > max(1, low // 1000):
        middle = round(math.sqrt(low * high)) if low > 10 else (low + high) // 2
        if epsilon(sigma, q, middle) <= target:
            low = middle
        else:
            high = middle
    return low


def get_sample_rate(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str | IAccountant = "prv",
    epsilon_tolerance: float = 0.01,
    **kwargs: Any,
) -> float:
    """Largest sample rate in (0, 1], up to the tolerance, that keeps to the target.

    Arguments as for :func:`get_noise_multiplier`.

    Raises:
        ValueError: a number is out of range, or even a rate of 1e-12 is too much.
    """
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(target_delta, "target_delta")
    sigma = _positive(checks.noise_multiplier(noise_multiplier), "noise_multiplier")
    count = int(_positive(checks.steps(steps), "steps"))
    epsilon = _curve(accountant, delta, kwargs)
    if epsilon(sigma, 1.0, count) <= target:
        return 1.0
    rate = _search(
        lambda inverse: epsilon(sigma, min(1 / inverse, 1.0), count),
        target, _tolerance(target, epsilon_tolerance), start=100.0, limit=1e12,
    )  # fmt: skip
    if rate is None:
        raise ValueError(f"no sample rate above 1e-12 keeps to epsilon = {target:g} at delta = {delta:g}")
    return 1 / rate


def _curve(accountant: str | IAccountant, delta: float, kwargs: dict[str, Any]) -> Callable[[float, float, int], float]:
    meter = create_accountant(accountant) if isinstance(accountant, str) else copy.copy(accountant)

    def epsilon(sigma: float, q: float, count: int) -> float:
        fresh = copy.copy(meter)  # remembers no earlier answer: what is promised is what the user will see
        fresh.history = [(sigma, q, count)]
        return fresh.get_epsilon(delta=delta, **kwargs)

    return epsilon


def _search(
    epsilon: Callable[[float], float], target: float, tolerance: float, start: float, limit: float
) -> float | None:
    """Smallest x with epsilon(x) <= target for a falling curve, to within ``tolerance`` of epsilon; None beyond
    ``limit``."""

    def height(x: float) -> float:
        value = epsilon(x)
        return math.log(max(value, 1e-12) / target) if value < math.inf else 50.0

    low, high = _bracket(height, start, limit)
    if high is None:
        return None
    goal = math.log1p(-tolerance / target)  # heights between goal and 0 will do
    side, jumps = 0, False  # so many answers in a row above the target (> 0), or below it (< 0)
    while high[1] < goal and high[0] - low[0] > 1e-6:
        # The chord between the ends (Illinois variant of regula falsi), aimed a little to the safe side; halving
        # where it is steep.
        slope = (high[1] - low[1]) / (high[0] - low[0])
        jumps = jumps or abs(side) > 3  # no chord tells where
        steep = jumps or abs(high[1] - low[1]) > 10
        middle = (low[0] + high[0]) / 2 if steep else low[0] + (goal / 2 - low[1]) / slope
        middle = min(max(middle, low[0] + 0.01 * (high[0] - low[0])), high[0] - 0.01 * (high[0] - low[0]))
        value = height(math.exp(middle))
        if value <= 0:
            high = (middle, value)
            low = (low[0], low[1] / 2) if side < 0 else low
            side = min(side, 0) - 1
        else:
            low = (middle, value)
            high = (high[0], high[1] / 2 if high[1] / 2 < goal else high[1]) if side > 0 else high
            side = max(side, 0) + 1
    return math.exp(high[0])


Point = tuple[float, float]


def _bracket(height: Callable[[float], float], start: float, limit: float) -> tuple[Point, Point | None]:
    """(log x, height) on either side of height 0, by growing strides from ``start``."""
    here, stride = (math.log(start), height(start)), math.log(2)
    if here[1] <= 0:
        while True:
            below = (here[0] - stride, height(math.exp(here[0] - stride)))
            if below[1] > 0:
                return below, here
            here, stride = below, stride * 1.5
    while here[0] < math.log(limit):
        above = (here[0] + stride, height(math.exp(here[0] + stride)))
        if above[1] <= 0:
            return here, above
        here, stride = above, stride * 1.5
    return here, None


def _tolerance(target: float, absolute: float) -> float:
    if not checks.number(absolute, "epsilon_tolerance") > 0:
        raise ValueError(f"epsilon_tolerance must lie in (0, inf), got {absolute!r}")
    return min(absolute, RELATIVE_TOLERANCE * target)


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must lie in (0, inf), got {value!r}")
    return value
