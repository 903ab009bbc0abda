r"""The "prv" accountant: Opacus's meaning, an estimate plus its allowed error, by the method of Gopi, Lee and
Wutschitz 2021.

Their bound, with the constants of their code and of Opacus's: rounding each step's loss to a mesh of
:math:`h=\epsilon_{err}/\sqrt{n\log(12/\delta_{err})/2}` with its mean kept moves the composed loss by more than
:math:`\epsilon_{err}` only with probability below :math:`\delta_{err}`, so the epsilon of the rounded law at
:math:`\delta-\delta_{err}`, plus :math:`\epsilon_{err}`, is an upper bound. Opacus computes the convolution in float64
without a tilt, which fails at small delta; here it goes through :mod:`accountants.compose`, and the same mesh gives the
same digits where Opacus is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import checks
from .accountant import IAccountant
from .assumptions import Segment
from .bounds import TINY, directions, epsilon_bound, negligible
from .compose import Spectrum
from .gaussian import closed_form
from .lattice import Lattice, midpoint
from .pairs import Pair
from .plan import Cumulants, make_plan, saddle_for_delta
from .pld import PLDAccountant
from .rdp import refuse_exchanged

MOST_POINTS = 1 << 22


class PRVAccountant(IAccountant):
    """Upper bound on epsilon by privacy random variables, ``eps_error`` above the estimate, as in Opacus."""

    @classmethod
    def mechanism(cls) -> str:
        return "prv"

    def get_epsilon(
        self, delta: float, *, eps_error: float = 0.01, delta_error: float | None = None, **kwargs: Any
    ) -> float:
        """Estimate at ``delta - delta_error`` plus ``eps_error``.

        Args:
            delta: in (0, 1).
            eps_error: how far the estimate may be off, above 0; it is added.
            delta_error: probability that it is further off, in (0, delta); delta / 1000 by default.
        """
        delta = checks.delta(delta)
        parts = self.segments()
        refuse_exchanged(parts, "prv")
        error = _positive(eps_error)
        delta_error = delta / 1000 if delta_error is None else checks.number(delta_error, "delta_error")
        if not 0 < delta_error < delta:
            raise ValueError(f"delta_error must lie in (0, delta), got {delta_error!r}")
        if not parts:
            return 0.0
        if any(part.noise_multiplier == 0 for part in parts):
            return math.inf
        value = estimate(parts, delta - delta_error, error, delta_error)
        # Next to nothing: then the value is the certified bound, and what would be added could be a thousand times it.
        return value if value <= error / 100 else value + error

    def get_delta(self, epsilon: float) -> float:
        """The certified upper bound on delta at ``epsilon`` of :class:`accountants.PLDAccountant`."""
        refuse_exchanged(self.segments(), "prv")
        return self._certified().get_delta(epsilon)

    def epsilon_curve(self, delta: float) -> np.ndarray:
        """Certified upper bounds on epsilon at ``delta`` after every step, those of
        :class:`accountants.PLDAccountant`: below this accountant's own values by about ``eps_error``, and in a fraction
        of their time."""
        refuse_exchanged(self.segments(), "prv")
        return self._certified().epsilon_curve(delta)

    def _certified(self) -> PLDAccountant:
        found = PLDAccountant(sampling=self.sampling, relation=self.relation)
        found.history = list(self.history)
        return found


def estimate(parts: Sequence[Segment], delta: float, eps_error: float, delta_error: float) -> float:
    """Epsilon at ``delta`` of the laws rounded to the mesh, the removing direction as in Opacus.

    Where that mesh would need millions of points, the certified upper bound takes its place: never below it by more
    than rounding.
    """
    known = closed_form(parts)
    if known is not None:
        return known.epsilon(delta, upper=True)
    if min(part.noise_multiplier for part in parts) < TINY:
        return epsilon_bound(parts, delta, True)
    steps = sum(part.steps for part in parts)
    mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
    pairs = directions(parts)[0]
    cumulants = Cumulants(pairs, negligible(pairs, delta_error))
    tilt = saddle_for_delta(cumulants, delta)
    epsilon = cumulants.three(tilt)[1]
    plan = make_plan(cumulants, tilt, epsilon, math.log(delta), 1 + tilt, 1.0)
    plan = replace(plan, step=mesh)
    if (
        epsilon > mesh
        and plan.high - plan.low > 64 * mesh
        and max(plan.high - plan.low, cumulants.range) < MOST_POINTS * mesh
    ):
        lattices = [_rounded(pair, mesh, delta_error / steps) for pair, _ in pairs]
        result = Spectrum(lattices, plan).compose([count for _, count in pairs], upper=True).epsilon(delta)
        if result is not None and abs(result - epsilon) < 0.1 * epsilon:
            return result
    return epsilon_bound(parts, delta, upper=True)


def _rounded(pair: Pair, mesh: float, negligible_mass: float) -> Lattice:
    log_weight, loss = pair.nodes(1e-40)
    weight = np.exp(log_weight - log_weight.max())
    return midpoint(pair, mesh, 1e-6 * negligible_mass, 1e-6 * negligible_mass, float(weight @ loss / weight.sum()))


def _positive(eps_error: float) -> float:
    result = checks.number(eps_error, "eps_error")
    if not 0 < result < math.inf:
        raise ValueError(f"eps_error must lie in (0, inf), got {eps_error!r}")
    return result
