"""Epsilon at a delta and delta at an epsilon for a history of segments, from above or from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from . import gaussian
from .assumptions import Segment
from .compose import Curve, Spectrum
from .lattice import Lattice, optimistic, pessimistic
from .pairs import Pair, SubsampledGaussian
from .plan import Cumulants, Parts, Plan, log_noise, make_plan, saddle_for_delta, saddle_for_epsilon, tolerance
from .rdp import best_epsilon

REFINE_LOWER = 4.0  # the optimistic lattice merges six points, so it needs a finer mesh for the same error
BELL = 14.0  # a tilted law is taken for bell-shaped if its window ends this many standard deviations above its mean


def epsilon_bound(segments: Sequence[Segment], delta: float, upper: bool) -> float:
    """Epsilon at ``delta``: an upper or a lower bound."""
    if not segments:
        return 0.0
    if any(part.noise_multiplier == 0 for part in segments):
        return math.inf
    known = gaussian.closed_form(segments)
    if known is not None:
        return known.epsilon(delta, upper)
    return max(direction_epsilon(parts, delta, upper) for parts in directions(segments))


def delta_bound(segments: Sequence[Segment], epsilon: float, upper: bool) -> float:
    """Delta at ``epsilon``: an upper or a lower bound."""
    if not segments:
        return 0.0
    if any(part.noise_multiplier == 0 for part in segments):
        return 1.0
    known = gaussian.closed_form(segments)
    if known is not None:
        return known.delta(epsilon, upper)
    return max(direction_delta(parts, epsilon, upper) for parts in directions(segments))


def directions(segments: Sequence[Segment]) -> list[Parts]:
    """The composed pairs to look at: a record removed, and a record added."""
    return [
        [(SubsampledGaussian(part.noise_multiplier, part.sample_rate, add), part.steps) for part in segments]
        for add in (False, True)
    ]


def direction_epsilon(parts: Parts, delta: float, upper: bool) -> float:
    """Epsilon at ``delta`` for one direction."""
    cumulants = Cumulants(parts, negligible(parts, delta))
    tilts, epsilon, slope = _scout(parts, cumulants, delta)
    refine = 1.0 if upper else REFINE_LOWER
    plan = cheapest(cumulants, tilts, epsilon, math.log(delta), slope, refine)
    result = compose(parts, plan, delta, upper).epsilon(delta)
    if result is None:  # the window missed: from above fall back to a bound that needs none, from below to nothing
        return min(best_epsilon(_as_segments(parts), delta)[0], epsilon if len(tilts) > 1 else math.inf) if upper else 0.0
    return result


def _scout(parts: Parts, cumulants: Cumulants, delta: float) -> tuple[list[float], float, float]:
    """Tilts worth considering, the epsilon to expect, and the slope there.

    The saddle point is all that is needed while the tilted law is bell-shaped. Where single large losses matter as much as the sum of
    the small ones it is not, and the answer is looked for by coarse compositions under smaller and smaller tilts.
    """
    tilt = saddle_for_delta(cumulants, delta)
    _, mean, variance = cumulants.three(tilt)
    guess = make_plan(cumulants, tilt, mean, math.log(delta), tilt, 0)
    if mean > 0 and guess.high - mean < BELL * math.sqrt(variance):
        return [tilt], max(mean, 0.0), tilt
    tilts = [tilt / 2**k for k in range(10)]
    epsilon, slope, found = max(mean, 0.0), tilt, math.inf
    for theta in tilts:
        curve = compose(parts, make_plan(cumulants, theta, epsilon, math.log(delta), slope, 0), delta, True)
        result = curve.epsilon(delta)
        if result is not None and result < found:
            epsilon, slope, found = result, curve.slope(result), result
    return tilts, epsilon, slope


def cheapest(
    cumulants: Cumulants, tilts: Sequence[float], epsilon: float, log_delta: float, slope: float, refine: float
) -> Plan:
    """The plan with the fewest points among the tilts that keep the rounding small enough."""
    plans = [make_plan(cumulants, theta, epsilon, log_delta, slope, refine) for theta in tilts]
    noises = [log_noise(cumulants, theta, epsilon, log_delta) for theta in tilts]
    log_allowed = math.log(min(tolerance(epsilon) * slope, 0.01))
    quiet = [plan for plan, noise in zip(plans, noises, strict=True) if noise < log_allowed]
    if not quiet:
        return plans[noises.index(min(noises))]
    return min(quiet, key=lambda plan: (plan.high - plan.low) / plan.step)


def direction_delta(parts: Parts, epsilon: float, upper: bool) -> float:
    """Delta at ``epsilon`` for one direction."""
    cumulants = Cumulants(parts, 1e-30)
    tilt = saddle_for_epsilon(cumulants, epsilon)
    tilts = [tilt / 2**k for k in range(6)]
    best, slope = 1.0, tilt
    for theta in tilts:
        value, mean, variance = cumulants.three(theta)
        log_delta = min(value - theta * epsilon, math.log(best))
        curve = compose(parts, make_plan(cumulants, theta, epsilon, log_delta, slope, 0), math.exp(log_delta), True)
        if curve.delta(epsilon) < best:
            best, slope = curve.delta(epsilon), curve.slope(epsilon)
    plan = cheapest(cumulants, tilts, epsilon, math.log(best), slope, 1.0 if upper else REFINE_LOWER)
    result = compose(parts, plan, best, upper).delta(epsilon)
    return min(result, best) if upper else result


def compose(parts: Parts, plan: Plan, delta: float, upper: bool) -> Curve:
    """The composed curve under ``plan``; ``delta`` says what is negligible."""
    lattices = discretise(parts, plan.step, delta, upper)
    return Spectrum(lattices, plan).compose([count for _, count in parts], upper)


def negligible(parts: Parts, delta: float) -> float:
    """Mass of one step's largest losses that may count as infinite: together they are 1e-5 of delta."""
    return 1e-5 * delta / sum(count for _, count in parts)


def discretise(parts: Parts, step: float, delta: float, upper: bool) -> list[Lattice]:
    total = sum(count for _, count in parts)
    make: Callable[[Pair, float, float, float], Lattice] = pessimistic if upper else optimistic
    return [make(pair, step, 1e-9 / total, negligible(parts, delta)) for pair, _ in parts]



def _as_segments(parts: Parts) -> list[Segment]:
    return [Segment(pair.sigma, pair.q, count) for pair, count in parts]
