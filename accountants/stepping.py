r"""Epsilon after every step of a run, without composing anew each time.

A run of equal steps has the transform :math:`\hat p^n` for every n: one discretisation serves a stretch of step counts,
and only the frequencies where :math:`|\hat p|^n` is not negligible matter, a few hundred of them once n is large. The
sums over the window that :class:`accountants.compose.Curve` takes of the inverse transform are geometric series per
frequency, so delta at one epsilon costs as many operations as there are such frequencies. The bounds are those of
:mod:`accountants.compose`; the frequencies left out are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .bounds import TINY, direction_epsilon, directions, discretise, epsilon_bound, negligible, scout
from .compose import NEGLIGIBLE, Spectrum
from .pairs import UNIT
from .plan import Cumulants, Parts, Plan, choose
from .rdp import log_moment

STRETCH = 1.25  # a stretch of step counts served by one discretisation ends when the history costs so much more
MOST_FREQUENCIES = 60_000
SHIFT_DIVISORS = (1.0, 2.0, 4.0, 8.0)


class Stretch:
    """Upper bounds on epsilon at ``delta`` for one direction while segment ``growing`` has ``first``..``last``
    steps."""

    def __init__(self, parts: Parts, growing: int, delta: float) -> None:
        self.first = parts[growing][1]
        self.last = _last(parts, growing)
        self.growing, self.delta = growing, delta
        longest = _with_steps(parts, growing, self.last)
        self.counts = [count for _, count in parts]
        plan = self._plan(parts, longest)
        spectrum = Spectrum(discretise(longest, plan.step, delta, True), plan)
        self.plan, self.tilted, self.size = plan, spectrum.tilted, spectrum.size
        self._keep(spectrum)
        shifts = [(plan.tail_high, -plan.tail_low)[side] / divisor for side in (0, 1) for divisor in SHIFT_DIVISORS]
        self.tails = [(shift, [part.log_moment(shift) for part in self.tilted]) for shift in shifts]

    def _plan(self, shortest: Parts, longest: Parts) -> Plan:
        """One tilt, and a window that holds the answers of both ends of the stretch."""
        plans: list[Plan] = []
        above = negligible(longest, self.delta)
        theta = 0.0
        for parts in (longest, shortest):
            cumulants = Cumulants(parts, above)
            tilts, epsilon, slope, _ = scout(parts, cumulants, self.delta)
            # The least tilts leave the rounding just small enough at one end, and too large at the other.
            tilts = [theta] if plans else [tilt for tilt in tilts if tilt > 0.05 * slope] or tilts
            plans.append(choose(cumulants, tilts, epsilon, math.log(self.delta), slope, 1.0))
            theta = plans[0].theta
        self.guess = (plans[1].epsilon, max(slope - 1, 1e-3))
        long, short = plans
        low, high = min(short.low, long.low), max(short.high, long.high)
        return Plan(theta, long.epsilon, low, high, min(short.step, long.step), long.tail_high, short.tail_low)

    def _keep(self, spectrum: Spectrum) -> None:
        """The frequencies that matter, and the fixed segments' share of the transform."""
        logs = [spectrum.log_transform(index) for index in range(len(self.tilted))]
        bound = np.sum([count * log[1] for count, log in zip(self.counts, logs, strict=True)], axis=0)
        kept = np.nonzero(bound > NEGLIGIBLE)[0]
        self.usable = len(kept) <= MOST_FREQUENCIES
        fixed = [
            (count, log)
            for index, (count, log) in enumerate(zip(self.counts, logs, strict=True))
            if index != self.growing
        ]
        self.fixed_power = sum((count * log[0][kept] for count, log in fixed), np.zeros(len(kept), dtype=complex))
        self.fixed_bound = sum((count * log[1][kept] for count, log in fixed), np.zeros(len(kept)))
        self.power, self.bound = (part[kept] for part in logs[self.growing])
        self.index = kept.astype(np.int64)
        self.omega = 2 * math.pi * kept / self.size
        # Each frequency stands for itself and its conjugate, but for the first and the middle one, which have none.
        self.double = np.where((kept == 0) | (2 * kept == self.size), 1.0, 2.0) / self.size

    def epsilon(self, steps: int) -> float | None:
        """Upper bound after ``steps`` steps of the growing segment; None where this stretch cannot tell."""
        at = _At(self, steps)
        guess, slope = self.guess
        before: tuple[float, float] | None = None
        for _ in range(30):
            value = at.log_delta(guess)
            if value is None:
                return None
            gap = value - math.log(self.delta)
            if -2e-6 * slope <= gap <= 0:
                self.guess = (guess, slope)
                return guess
            if before is not None and guess != before[0]:
                secant = (before[1] - gap) / (guess - before[0])
                slope = min(max(secant, slope / 4), slope * 4)
            before = (guess, gap)
            guess = max(guess + (gap + 1e-6 * slope) / slope, 0.25 * guess)
        return None


def _last(parts: Parts, growing: int) -> int:
    """How far one discretisation serves: until the whole history, in Renyi divergence of order 2, is so much longer."""
    costs = [count * log_moment(pair.sigma, pair.q, 2.0, pair.kind) for pair, count in parts]
    first = parts[growing][1]
    return math.ceil(first * (1 + (STRETCH - 1) * min(math.fsum(costs) / max(costs[growing], 1e-300), 1e6))) + 1


class _At:
    """The stretch at one step count."""

    def __init__(self, stretch: Stretch, steps: int) -> None:
        self.stretch = stretch
        counts = list(stretch.counts)
        counts[stretch.growing] = steps
        plan, parts = stretch.plan, stretch.tilted
        power = stretch.fixed_power + steps * stretch.power
        most = np.exp(stretch.fixed_bound + steps * stretch.bound)
        product = np.exp(power)
        rounding = 8 * UNIT * (np.abs(power.real) + np.abs(power.imag) + 40)
        self.eta = float(stretch.double @ (np.maximum(most - np.abs(product), 0.0) + rounding * most)) + math.exp(
            NEGLIGIBLE
        )
        offset = math.fsum(count * part.centre for part, count in zip(parts, counts, strict=True))
        first = math.floor((plan.low - offset) / plan.step)
        self.start = offset + first * plan.step
        # Phases are reduced modulo the window exactly, in integers.
        turn = (stretch.index * (first % stretch.size)) % stretch.size
        self.weight = stretch.double * product * np.exp(2j * math.pi * turn / stretch.size)
        self.log_unit = math.fsum(count * part.log_size for part, count in zip(parts, counts, strict=True))
        self.relative = math.fsum(
            count * part.spread for part, count in zip(parts, counts, strict=True)
        ) + 8 * UNIT * abs(self.log_unit)
        self.infinite = math.fsum(count * part.lattice.infinite for part, count in zip(parts, counts, strict=True))
        self.drift = (
            8
            * UNIT
            * (math.fsum(count * abs(part.centre) for part, count in zip(parts, counts, strict=True)) + abs(self.start))
        )
        end = self.start + (stretch.size - 1) * plan.step
        self.outside = math.exp(min(
            [0.0] + [math.fsum(c * m for c, m in zip(counts, moments, strict=True)) - shift * end
                     for shift, moments in stretch.tails if shift > 0]
        ))  # fmt: skip

    def log_delta(self, epsilon: float) -> float | None:
        """log of the upper bound on delta at ``epsilon``; None outside the window."""
        plan, size = self.stretch.plan, self.stretch.size
        epsilon -= self.drift
        m = math.ceil((epsilon - self.start) / plan.step)
        if not 0 < m < size:
            return None
        ahead = self.start + m * plan.step - epsilon  # the first counted loss lies this much above epsilon
        omega, theta, step = self.stretch.omega, plan.theta, plan.step
        # Losses s_m .. s_{N-1}: e^{-theta (s - epsilon)} and e^{-(theta + 1)(s - epsilon)} times the mass, as
        # geometric series.
        phase = np.exp(2j * math.pi * ((self.stretch.index * m) % size) / size)
        sums, size_of = [], []
        for rate in (theta, theta + 1):
            gap = -np.expm1(1j * omega - rate * step)
            end = math.exp(-rate * step * (size - m))
            fade = math.exp(-rate * ahead)
            sums.append(fade * float((self.weight * (phase - end) / gap).sum().real))
            # What the difference in the numerator loses is in proportion to its terms, not to what is left of it.
            size_of.append(fade * (1 + end) * float(np.abs(self.weight) @ (1 / np.abs(gap))))
        flat = sum(
            sign * math.exp(-rate * ahead) / -math.expm1(-rate * step) for rate, sign in ((theta, 1), (theta + 1, -1))
        )
        rounding = 64 * UNIT * sum(size_of)
        value = sums[0] - sums[1] + self.eta * max(flat, 0.0) + rounding + self.outside
        if value <= 0:
            return None
        log_delta = math.log(value) + self.log_unit - theta * epsilon + self.relative
        return math.log(math.exp(min(log_delta, 0.0)) + self.infinite)


class Follower:
    """Remembers the last answers of one accountant, so that asking after every step is cheap.

    Where no stretch can serve (few steps yet, or single large losses matter), the answer for a few steps further on
    is given as
    long as it is within ``slack`` of the last one: epsilon rises with the steps, so that is a bound as well.
    """

    relative_slack, absolute_slack = 4e-4, 1e-4

    def __init__(self) -> None:
        self.last: dict[float, tuple[tuple, float]] = {}
        self.stretches: dict[tuple, Stretch | None] = {}
        self.ahead: dict[float, tuple[tuple, int, int, float]] = {}
        self.added: dict[tuple, tuple[int, float]] = {}

    def epsilon(self, segments: Sequence, delta: float) -> float:
        """Upper bound on epsilon at ``delta``."""
        key = tuple(segments)
        before = self.last.get(delta)
        if before is not None and before[0] == key:
            return before[1]
        dear = any(part.noise_multiplier < TINY for part in key)  # a stretch of that would have billions of points
        growing = _growing(before[0], key) if before is not None and not dear else None
        result = None if growing is None or before is None else self._follow(key, growing, delta, before[1])
        if result is None:
            result = epsilon_bound(segments, delta, upper=True)
        self.last[delta] = (key, result)
        return result

    def _follow(self, key: tuple, growing: int, delta: float, previous: float) -> float | None:
        steps = key[growing].steps
        others = tuple(part if index != growing else None for index, part in enumerate(key))
        name = (others, key[growing].noise_multiplier, key[growing].sample_rate, growing, delta)
        known = self.ahead.get(delta)
        if known is not None and known[0] == name and known[1] <= steps <= known[2]:
            return known[3]
        result = self._stretched(name, key, growing, delta) if len(key) <= 8 else None
        if result is not None:
            return max(result, previous)
        further = steps + max(1, steps // 50)
        parts = [*key]
        parts[growing] = type(key[growing])(
            key[growing].noise_multiplier, key[growing].sample_rate, further, key[growing].kind
        )
        value = epsilon_bound(parts, delta, upper=True)
        if value > previous * (1 + self.relative_slack) + self.absolute_slack:
            self.ahead[delta] = (name, further, further, value)  # too much for now, right when it gets there
            return None
        self.ahead[delta] = (name, steps, further, value)
        return value

    def _stretched(self, name: tuple, key: tuple, growing: int, delta: float) -> float | None:
        """By stretches, both directions if there are two; the adding one only where it is not known to be smaller."""
        steps, ways = key[growing].steps, directions(key)
        removed = self._one_way(name, ways[0], growing, delta, False)
        if removed is None or len(ways) == 1:
            return removed
        until, value = self.added.get(name, (0, math.inf))
        if steps > until:  # the far end serves all of the stretch, and a first glance may be enough there
            stretch = self.stretches[(*name, False)]
            assert stretch is not None
            far = _with_steps(ways[1], growing, stretch.last)
            value = direction_epsilon(far, delta, True, enough=removed)
            self.added[name] = (stretch.last, value)
        if value <= removed:
            return removed
        added = self._one_way(name, ways[1], growing, delta, True)
        return None if added is None else max(removed, added)

    def _one_way(self, name: tuple, parts: Parts, growing: int, delta: float, add: bool) -> float | None:
        steps = parts[growing][1]
        stretch = self.stretches.get((*name, add))
        if stretch is None or not stretch.first <= steps <= stretch.last:
            try:
                stretch = Stretch(parts, growing, delta)
            except (OverflowError, ValueError):
                return None
            self.stretches = {other: value for other, value in self.stretches.items() if other[:-1] == name}
            self.stretches[(*name, add)] = stretch
            first = stretch.epsilon(stretch.first)
            whole = direction_epsilon(parts, delta, True)
            if first is None or first > whole * (1 + self.relative_slack / 4) + self.absolute_slack / 2:
                stretch.usable = False
        return stretch.epsilon(steps) if stretch.usable and steps <= stretch.last else None


def _with_steps(parts: Parts, growing: int, steps: int) -> Parts:
    """The same history with another number of steps of one segment."""
    return [(pair, steps if index == growing else count) for index, (pair, count) in enumerate(parts)]


def _growing(before: tuple, now: tuple) -> int | None:
    """The one segment that has a few more steps than before, if nothing else changed."""
    if len(before) != len(now):
        return None
    changed = [index for index, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if len(changed) != 1:
        return None
    old, new = before[changed[0]], now[changed[0]]
    same = (old.noise_multiplier, old.sample_rate, old.kind) == (new.noise_multiplier, new.sample_rate, new.kind)
    return changed[0] if same and 0 < new.steps - old.steps <= max(2, old.steps // 20) else None
