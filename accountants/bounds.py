"""Epsilon at a delta and delta at an epsilon for a history of segments, from above or from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import gaussian
from .assumptions import Segment
from .checks import LEAST_DELTA
from .compose import Curve, Spectrum
from .fixed_size import FixedSizeGaussian
from .jumps import Answer, epsilon_by_jumps, guess_by_one_jump
from .lattice import Lattice, optimistic, pessimistic
from .pairs import Pair, SubsampledGaussian
from .plan import (
    ABSOLUTE,
    Cumulants,
    Parts,
    Plan,
    choose,
    log_allowed,
    log_noise,
    make_plan,
    saddle_for_delta,
    saddle_for_epsilon,
    tolerance,
)
from .rdp import best_epsilon
from .replace import ReplacedGaussian

REFINE_LOWER = 4.0  # the optimistic lattice merges six points, so it needs a finer mesh for the same error
COARSER = 0.5  # mesh for many segments: four times the error, still a fraction of what is promised
MANY = 8  # segments: above, one coarse composition is not cheap
ATTEMPTS = 6
TINY = 0.02  # noise multiplier: below, epsilon is above a thousand, and a mesh fine enough takes minutes or gigabytes
DEAR = 1e6  # lattice points: above, it is worth trying to compose by the number of large losses


def epsilon_bound(segments: Sequence[Segment], delta: float, upper: bool) -> float:
    """Epsilon at ``delta``: an upper or a lower bound."""
    if not segments:
        return 0.0
    if any(part.noise_multiplier == 0 for part in segments):
        return math.inf
    known = gaussian.closed_form(segments)
    if known is not None:
        return known.epsilon(delta, upper)
    result = 0.0
    segments = sorted(
        segments, key=lambda part: (part.noise_multiplier, part.sample_rate)
    )  # the same plan in any order
    for parts in directions(segments, upper):
        result = max(result, direction_epsilon(parts, delta, upper, enough=result))
    return result


def delta_bound(segments: Sequence[Segment], epsilon: float, upper: bool) -> float:
    """Delta at ``epsilon``: an upper or a lower bound."""
    if not segments:
        return 0.0
    if any(part.noise_multiplier == 0 for part in segments):
        return 1.0
    known = gaussian.closed_form(segments)
    if known is not None:
        return known.delta(epsilon, upper)
    segments = sorted(segments, key=lambda part: (part.noise_multiplier, part.sample_rate))
    return max(direction_delta(parts, epsilon, upper) for parts in directions(segments, upper))


def directions(segments: Sequence[Segment], upper: bool = True) -> list[Parts]:
    """The composed pairs to look at; the largest epsilon counts.

    A record removed and a record added; or, where the relation is symmetric, exchanged. From below there are neighbours
    that exist: a record exchanged for one that contributes nothing; with batches of fixed size, where one pair
    dominates, a record opposite to all others (either way round), or to its replacement while the others are nothing.
    """

    kinds = {part.kind for part in segments}
    if "fixed_size" in kinds:
        ways = [_dominating] if upper else [_removed, _added, _exchanged]
    elif "replaced" in kinds:
        ways = [_exchanged] if upper else [_exchanged, _removed, _added]
    else:
        ways = [_removed, _added]
    return [[(_removed(part) if part.is_gaussian else way(part), part.steps) for part in segments] for way in ways]


def _removed(part: Segment) -> Pair:
    return SubsampledGaussian(part.noise_multiplier, part.sample_rate)


def _added(part: Segment) -> Pair:
    return SubsampledGaussian(part.noise_multiplier, part.sample_rate, add=True)


def _exchanged(part: Segment) -> Pair:
    sigma = 2 * part.noise_multiplier if part.kind == "fixed_size" else part.noise_multiplier
    return ReplacedGaussian(sigma, part.sample_rate)


def _dominating(part: Segment) -> Pair:
    return FixedSizeGaussian(part.noise_multiplier, part.sample_rate)


def direction_epsilon(parts: Parts, delta: float, upper: bool, enough: float = 0.0) -> float:
    """Epsilon at ``delta`` for one direction, or some bound below ``enough``.

    Where Renyi divergences already say that epsilon is next to nothing, where there is next to no noise, or the numbers
    leave what float64 can hold, theirs is the upper bound, and 0 the lower.
    """
    fallback = most_loss(parts)
    if fallback <= enough:
        return fallback if upper else 0.0
    if len(parts) <= MANY or hopeless(parts):
        fallback = min(fallback, _renyi(parts, delta)[0])
    if fallback <= ABSOLUTE or hopeless(parts):
        return fallback if upper else 0.0
    try:
        with np.errstate(invalid="ignore"):  # infinite losses, where a plan that cannot be kept is given up
            result = _direction_epsilon(parts, delta, upper, enough)
    except (OverflowError, ZeroDivisionError):
        result = math.nan
    if math.isnan(result):
        return fallback if upper else 0.0
    return min(result, fallback) if upper else result


def hopeless(parts: Parts) -> bool:
    """Whether there is next to no noise in some step: a mesh for that is of no use to anybody."""
    return any(pair.sigma < TINY for pair, _ in parts)


def _renyi(parts: Parts, delta: float) -> tuple[float, float]:
    """Epsilon by Renyi divergences, and its order."""
    return best_epsilon([Segment(pair.sigma, pair.q, count, pair.kind) for pair, count in parts], delta)


def most_loss(parts: Parts) -> float:
    """No total loss is above this, so neither is epsilon: -log(1 - q) a step where a record is added."""
    if not all(pair.anchor == "top" for pair, _ in parts):
        return math.inf
    return math.fsum(-count * math.log1p(-pair.q) for pair, count in parts) * (1 + 1e-12)


def _direction_epsilon(parts: Parts, delta: float, upper: bool, enough: float) -> float:
    """Epsilon at ``delta`` for one direction; or, if that is found to be below ``enough`` already at first sight,
    some bound below it."""
    cumulants = Cumulants(parts, negligible(parts, delta))
    tilts, epsilon, slope, found = scout(parts, cumulants, delta)
    if found <= enough:
        return found if upper else 0.0
    saddle_epsilon = cumulants.three(tilts[0])[1]
    refine = (1.0 if upper else REFINE_LOWER) * (COARSER if len(parts) > MANY else 1.0)
    if upper and enough > 0 and len(parts) > MANY:
        glance = choose(cumulants, tilts, epsilon, math.log(delta), slope, COARSER * refine)
        result = compose(parts, glance, delta, True).epsilon(delta)
        if result is not None and result <= enough:
            return result
    plan = choose(cumulants, tilts, epsilon, math.log(delta), slope, refine)
    odd = abs(saddle_epsilon - epsilon) > 0.1 * epsilon
    drowned = log_noise(cumulants, plan, math.log(delta)) > log_allowed(epsilon, slope)
    lost = epsilon > found + 20 * tolerance(found)
    simple = not (drowned or lost or (plan.high - plan.low) / plan.step > DEAR)
    results = [found] if upper else []
    if upper and simple:
        # The saddle point or the first guess may mislead: what counts is whether coarse and fine composition agree.
        result = compose(parts, plan, delta, True).epsilon(delta)
        if result is not None:
            results.append(result)
            gap = found - result if odd else epsilon - result - 0.1 * epsilon
            if gap < 20 * tolerance(result):
                return min(results)
    if len(parts) == 1 and parts[0][0].anchor != "top" and (odd or upper or not simple):
        result = _by_jumps(parts[0], delta, (epsilon, slope), refine, upper)
        if result is not None:
            return min([*results, result])
    results += _by_planning_anew(parts, cumulants, tilts, (epsilon, slope), plan, delta, refine, upper)
    # Where the window missed: from above fall back to a bound that needs none, from below to nothing.
    return min(results) if upper else max(results, default=0.0)


def _by_planning_anew(
    parts: Parts,
    cumulants: Cumulants,
    tilts: list[float],
    expected: tuple[float, float],
    plan: Plan,
    delta: float,
    refine: float,
    upper: bool,
) -> list[float]:
    """Epsilons by plain composition, each planned for the last one's answer until that is what comes out."""
    results: list[float] = []
    epsilon, slope = expected
    for _ in range(ATTEMPTS // 2):
        curve = compose(parts, plan, delta, upper)
        result = curve.epsilon(delta)
        if result is not None:
            results.append(result)
            if not upper or abs(result - epsilon) < 0.1 * epsilon + 20 * tolerance(result):
                break
            epsilon, slope, choice = result, curve.slope(result), tilts
        else:  # outside the window: look where the saddle point says
            epsilon, slope, choice = cumulants.three(tilts[0])[1], 1 + tilts[0], tilts[:1]
        plan = choose(cumulants, choice, epsilon, math.log(delta), slope, refine)
    return results


def _by_jumps(
    part: tuple[Pair, int], delta: float, guess: tuple[float, float], refine: float, upper: bool
) -> float | None:
    """Composition by the number of large losses: coarsely from above until it agrees with itself, then as asked."""
    pair, steps = part
    above = negligible([part], delta)
    # From above, the foot of a window looks like an answer; so start from a guess that is too low rather than too high.
    look = min(Answer(*guess, {}), guess_by_one_jump(pair, steps, delta, above), key=lambda answer: answer.epsilon)
    if look.epsilon < ABSOLUTE:
        return None
    for _ in range(ATTEMPTS):
        answer = epsilon_by_jumps(pair, steps, delta, above, lattice_maker([part], delta, True), look, 0, True)
        if answer is None or not 0 < answer.epsilon < math.inf:
            return None
        close = abs(answer.epsilon - look.epsilon) < 20 * tolerance(look.epsilon)
        look = answer
        if close:
            break
    answer = epsilon_by_jumps(pair, steps, delta, above, lattice_maker([part], delta, upper), look, refine, upper)
    return None if answer is None or math.isinf(answer.epsilon) else answer.epsilon


def scout(parts: Parts, cumulants: Cumulants, delta: float) -> tuple[list[float], float, float, float]:
    """Tilts worth considering, the epsilon to expect, the slope there, and an upper bound (inf if none was found).

    The saddle point is all that is needed while the tilted law is bell-shaped. Where single large losses matter as
    much as the sum of
    the small ones it is not, and the answer is looked for by coarse compositions, each under the tilt that looks best
    for the last answer.
    """
    tilt = saddle_for_delta(cumulants, delta)
    _, mean, variance = cumulants.three(tilt)
    if len(parts) > MANY:
        return [tilt, tilt / 2, tilt / 8], max(mean, 0.0), 1 + tilt, math.inf
    found, order = _renyi(parts, delta)
    epsilon, slope = min(max(mean, 0.0), found), 1 + tilt if mean <= found else order
    tilts = [tilt, *np.geomspace(1e-2, 1e5, 24).tolist()]
    for _ in range(ATTEMPTS):
        plan = choose(cumulants, tilts, epsilon, math.log(delta), slope, 0)
        curve = compose(parts, plan, delta, True)
        result = curve.epsilon(delta)
        if result is None:
            epsilon = (epsilon + found) / 2
            continue
        close = abs(result - epsilon) < 20 * tolerance(epsilon)
        found, epsilon, slope = min(found, result), result, curve.slope(result)
        if close:
            break
    return tilts, epsilon, slope, found


def direction_delta(parts: Parts, epsilon: float, upper: bool) -> float:
    """Delta at ``epsilon`` for one direction.

    Where there is next to no noise, the upper bound is the probability that the record was in any batch: without it
    nothing differs.
    """
    if hopeless(parts):
        return most_delta(parts) if upper else 0.0
    cumulants = Cumulants(parts, 1e-30)
    tilt = saddle_for_epsilon(cumulants, epsilon)
    tilts = [tilt / 2**k for k in range(6)]
    best, slope = 1.0, 1 + tilt
    for theta in tilts:
        value, mean, variance = cumulants.three(theta)
        log_delta = min(value - theta * epsilon, math.log(best))
        curve = compose(parts, make_plan(cumulants, theta, epsilon, log_delta, slope, 0), math.exp(log_delta), True)
        if curve.delta(epsilon) < best:
            best, slope = max(curve.delta(epsilon), LEAST_DELTA), curve.slope(epsilon)
    plan = choose(cumulants, tilts, epsilon, math.log(best), slope, 1.0 if upper else REFINE_LOWER)
    result = compose(parts, plan, best, upper).delta(epsilon)
    return max(min(result, best, most_delta(parts)), LEAST_DELTA) if upper else result


def most_delta(parts: Parts) -> float:
    """No delta is above this: the probability that the record is in some batch, as the outputs differ only then."""
    if any(pair.q >= 1 for pair, _ in parts):
        return 1.0
    return min(1.0, -math.expm1(math.fsum(count * math.log1p(-pair.q) for pair, count in parts)) * (1 + 1e-12))


def compose(parts: Parts, plan: Plan, delta: float, upper: bool) -> Curve:
    """The composed curve under ``plan``; ``delta`` says what is negligible."""
    lattices = discretise(parts, plan.step, delta, upper)
    return Spectrum(lattices, plan).compose([count for _, count in parts], upper)


def negligible(parts: Parts, delta: float) -> float:
    """Mass of one step's largest losses that may count as infinite: together they are 1e-4 of delta."""
    return 1e-4 * delta / sum(count for _, count in parts)


def discretise(parts: Parts, step: float, delta: float, upper: bool) -> list[Lattice]:
    make = lattice_maker(parts, delta, upper)
    return [make(pair, step) for pair, _ in parts]


def lattice_maker(parts: Parts, delta: float, upper: bool) -> Callable[..., Lattice]:
    """Lattice law of a pair at a mesh, or of its losses between two, dominating it (``upper``) or dominated by it."""
    make = pessimistic if upper else optimistic
    below, above = 1e-9 / sum(count for _, count in parts), negligible(parts, delta)
    return lambda pair, step, *between: make(pair, step, below, above, *between)
