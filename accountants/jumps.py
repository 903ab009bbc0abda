r"""Histories in which single large losses matter: composed by how many there are.

At small q the privacy loss of a step is tiny unless its record was sampled and the noise was small too. The sum of
many such steps has a
bell-shaped bulk and a heavy tail of rare large losses, and no one tilt serves both. So each step's lattice law is
split at a
loss b into small and large, :math:`p=p_s+p_l`, and

.. math:: p^{*n}=\sum_j\binom nj\,p_s^{*(n-j)}*p_l^{*j},

each term composed under its own tilt, window and mesh (:mod:`accountants.compose` never needs total mass one). Terms
beyond the last computed
have mass at most :math:`\sum_{j>J}\binom nj p_l(\mathbb R)^j`; that counts as infinite loss from above and as nothing
from below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compose import Curve, Spectrum
from .lattice import Lattice
from .pairs import Pair
from .plan import Cumulants, choose, saddle_for_epsilon

MOST_JUMPS = 12
LARGE = 0.25  # a loss above this part of epsilon is large


def epsilon_by_jumps(
    pair: Pair, steps: int, delta: float, above: float, make, guess: tuple[float, float], refine: float, upper: bool
) -> tuple[float, float] | None:
    """Epsilon at ``delta``, rounded up or down, and the slope there; None if there are too many jumps to count.

    Args:
        pair, steps: the history, ``steps`` equal steps.
        above: P-mass of one step's largest losses that is left out.
        make: pair, mesh to lattice law.
        guess: the epsilon and slope expected.
        refine: as for :func:`accountants.plan.make_plan`.
    """
    threshold = LARGE * guess[0]
    both = Cumulants([(pair, steps)], above).split(threshold)
    if both is None:
        return None
    curves: list[Curve] = []
    missing = 0.0
    log_mass = both.log_masses()[1]
    for jumps in range(min(MOST_JUMPS, steps) + 1):
        log_ways = math.lgamma(steps + 1) - math.lgamma(jumps + 1) - math.lgamma(steps - jumps + 1)
        if jumps and log_ways + jumps * log_mass < math.log(1e-6 * delta):
            missing = 2 * math.exp(log_ways + jumps * (log_mass + 0.1))
            break
        part = both.with_counts((steps - jumps, jumps))
        tilt = saddle_for_epsilon(part, guess[0])
        tilts = [tilt / 1.7**k for k in range(-2, 6)] + [0.1, 1.0]
        plan = choose(part, tilts, guess[0], math.log(delta) - log_ways, guess[1], refine)
        curves.append(_compose(make(pair, plan.step), threshold, plan, (steps - jumps, jumps), log_ways, upper))
    else:
        if steps > MOST_JUMPS:
            return None
    return _solve(curves, delta - (missing if upper else 0.0), upper)


def _compose(lattice: Lattice, threshold: float, plan, counts: tuple[int, int], log_ways: float, upper: bool) -> Curve:
    cut = max(int((threshold - lattice.offset) / lattice.step), 1)
    small = Lattice(lattice.offset, lattice.step, lattice.mass[:cut], 0.0 if counts[1] else lattice.infinite)
    if not counts[1]:
        return Spectrum([small], plan).compose(counts[:1], upper, log_ways)
    large = Lattice(lattice.offset + cut * lattice.step, lattice.step, lattice.mass[cut:])
    return Spectrum([small, large], plan).compose(counts, upper, log_ways)


def _solve(curves: Sequence[Curve], delta: float, upper: bool) -> tuple[float, float]:
    """Where the curves add up to ``delta``, on the safe side."""

    def over(epsilon: float) -> bool:
        return math.fsum(curve.delta(epsilon) for curve in curves) > delta

    if not over(0.0):
        return 0.0, 1.0
    low, high = 0.0, max(float(curve.losses[-1]) for curve in curves)
    if over(high):
        return (math.inf if upper else high), 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if over(middle):
            low = middle
        else:
            high = middle
    result = high if upper else low
    further = result * 1.02
    here, there = (math.fsum(curve.delta(epsilon) for curve in curves) for epsilon in (result, further))
    slope = math.log(max(here, 1e-300) / max(there, 1e-300)) / (further - result)
    return result, 1 + max(slope, 1.0)
