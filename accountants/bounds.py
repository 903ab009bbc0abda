"""Epsilon at a delta and delta at an epsilon for a history of segments, from above or from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from . import gaussian
from .assumptions import Segment
from .compose import Curve, Spectrum
from .lattice import Lattice, optimistic, pessimistic
from .pairs import Pair, SubsampledGaussian
from .plan import Cumulants, Parts, Plan, for_delta, for_epsilon
from .rdp import best_epsilon

REFINE_LOWER = 4.0  # the optimistic lattice merges six points, so it needs a finer mesh for the same error
ATTEMPTS = 4
FAR = 0.2  # of the window


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
    refine = 1.0 if upper else REFINE_LOWER
    plan = for_delta(cumulants, delta, refine)
    results = []
    for _ in range(ATTEMPTS):
        curve = compose(parts, plan, delta, upper)
        result = curve.epsilon(delta)
        if result is None:
            plan = for_epsilon(cumulants, curve.elsewhere(delta), refine)
            continue
        results.append(result)
        # Every result is a bound; one far from where the plan looked is worth a second look from nearer by.
        if abs(result - plan.epsilon) <= FAR * (plan.high - plan.low):
            break
        plan = for_epsilon(cumulants, result, refine)
    if upper:
        return min(results) if results else best_epsilon(_as_segments(parts), delta)[0]
    return max(results, default=0.0)


def direction_delta(parts: Parts, epsilon: float, upper: bool) -> float:
    cumulants = Cumulants(parts, negligible(parts, 1e-12))
    plan = for_epsilon(cumulants, epsilon, 1.0 if upper else REFINE_LOWER)
    return compose(parts, plan, 1e-12, upper).delta(epsilon)


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
