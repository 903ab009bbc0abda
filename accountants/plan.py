r"""Where to look: the tilt, the mesh and the window that a question needs.

Nothing here enters a bound; a bad plan costs tightness, not safety. With the cumulant function
:math:`K(\theta)=\log E[e^{\theta S}]` of the composed privacy loss S, the question "which epsilon at this delta" is about losses near
:math:`K'(\theta)`, where (saddle point; Lugannani and Rice 1980)

.. math:: \log\delta\approx K(\theta)-\theta K'(\theta)-\log\bigl(\theta(\theta+1)\sqrt{2\pi K''(\theta)}\bigr).

Under that tilt the law has its bulk where the answer lies, so a Fourier transform there keeps relative, not only absolute, digits. A mesh h
adds variance of about :math:`h^2/6` to each of n steps and so :math:`n(\theta+1)h^2/12` to epsilon; h is chosen to make that small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .lattice import MAX_POINTS
from .pairs import Array, Pair

Parts = Sequence[tuple[Pair, int]]
LOG_OUTSIDE = 32.0  # the window leaves out at most e^-32 of the tilted mass at either end, as planned
ABSOLUTE, RELATIVE = 1e-5, 3e-5  # error of epsilon that the mesh may cause


@dataclass(frozen=True)
class Plan:
    """Tilt ``theta``, epsilon expected, window ``low``..``high`` of total losses, mesh ``step``, tilts that bound the tails."""

    theta: float
    epsilon: float
    low: float
    high: float
    step: float
    tail_high: float
    tail_low: float


class Cumulants:
    """The cumulant function of the composed loss, from quadratures of each step's law."""

    def __init__(self, parts: Parts, above: float) -> None:
        laws = [pair.nodes(above) for pair, _ in parts]
        size = max(len(loss) for _, loss in laws)
        self.log_weight = np.full((len(laws), size), -np.inf)
        self.loss = np.zeros((len(laws), size))
        for row, (log_weight, loss) in enumerate(laws):
            self.log_weight[row, : len(loss)], self.loss[row, : len(loss)] = log_weight, loss
        self.log_weight -= self._log_sum(self.log_weight)[:, None]
        self.counts = np.array([count for _, count in parts], dtype=float)

    @staticmethod
    def _log_sum(values: Array) -> Array:
        peak = values.max(axis=1)
        return peak + np.log(np.exp(values - peak[:, None]).sum(axis=1))

    def value(self, theta: float) -> float:
        """K(theta)."""
        return float(self.counts @ self._log_sum(self.log_weight + theta * self.loss))

    def three(self, theta: float) -> tuple[float, float, float]:
        """K, K' and K'' at theta."""
        exponent = self.log_weight + theta * self.loss
        peak = exponent.max(axis=1)
        weight = np.exp(exponent - peak[:, None])
        total = weight.sum(axis=1)
        mean = (weight * self.loss).sum(axis=1) / total
        variance = (weight * (self.loss - mean[:, None]) ** 2).sum(axis=1) / total
        return (
            float(self.counts @ (peak + np.log(total))),
            float(self.counts @ mean),
            max(float(self.counts @ variance), 1e-300),
        )


def for_delta(cumulants: Cumulants, delta: float, refine: float = 1.0) -> Plan:
    """The plan for the epsilon at ``delta``."""

    def too_small(log_theta: float) -> bool:
        theta = math.exp(log_theta)
        value, mean, variance = cumulants.three(theta)
        log_delta = value - theta * mean - math.log(theta * (theta + 1)) - 0.5 * math.log(2 * math.pi * variance)
        return log_delta > math.log(delta) or mean < 0

    return around(cumulants, _bisect(too_small), refine)


def for_epsilon(cumulants: Cumulants, epsilon: float, refine: float = 1.0) -> Plan:
    """The plan for the delta at ``epsilon``."""
    return around(cumulants, _bisect(lambda log_theta: cumulants.three(math.exp(log_theta))[1] < epsilon), refine)


def _bisect(too_small, low: float = math.log(1e-5), high: float = math.log(1e7)) -> float:
    """The tilt at which ``too_small`` (of its logarithm) turns false, to a few per cent."""
    if not too_small(low):
        return math.exp(low)
    while high - low > 0.02:
        middle = (low + high) / 2
        if too_small(middle):
            low = middle
        else:
            high = middle
    return math.exp(high)


def around(cumulants: Cumulants, theta: float, refine: float) -> Plan:
    """Window and mesh for the tilt ``theta``; ``refine`` divides the mesh."""
    value, mean, variance = cumulants.three(theta)
    width = math.sqrt(variance)
    highs, lows = [], []
    for multiple in (0.1, 0.25, 0.5, 1, 2, 3, 4.5, 6, 8, 11, 16, 32, 64):
        shift = multiple / width
        highs.append(((cumulants.value(theta + shift) - value + LOG_OUTSIDE) / shift, shift))
        lows.append((-(cumulants.value(theta - shift) - value + LOG_OUTSIDE) / shift, shift))
    (high, tail_high), (low, tail_low) = min(highs), max(lows)
    steps = cumulants.counts.sum()
    tolerance = ABSOLUTE + RELATIVE * max(mean, 0.0)
    step = math.sqrt(12 * tolerance / (steps * (theta + 1))) / refine
    step = max(min(step, (high - low) / 512), (high - low) / MAX_POINTS)
    return Plan(theta, max(mean, 0.0), low - 8 * step, high + 8 * step, step, tail_high, tail_low)
