r"""The "prv" accountant: Opacus's meaning, an estimate plus its allowed error, by the method of Gopi, Lee and Wutschitz 2021.

Their Theorem 5.5: rounding each step's loss to a mesh of :math:`h=\epsilon_{err}/\sqrt{n\log(12/\delta_{err})/2}` with its mean kept moves the
composed loss by more than :math:`\epsilon_{err}` only with probability below :math:`\delta_{err}`, so the epsilon of the rounded law at
:math:`\delta-\delta_{err}`, plus :math:`\epsilon_{err}`, is an upper bound. Opacus computes the convolution in float64 without a tilt, which fails
at small delta; here it goes through :mod:`accountants.compose`, and the same mesh gives the same digits where Opacus is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import checks
from .accountant import IAccountant
from .assumptions import Segment
from .bounds import epsilon_bound
from .rdp import refuse_symmetric


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
        refuse_symmetric(parts, "prv")
        error = _positive(eps_error)
        delta_error = delta / 1000 if delta_error is None else checks.number(delta_error, "delta_error")
        if not 0 < delta_error < delta:
            raise ValueError(f"delta_error must lie in (0, delta), got {delta_error!r}")
        if not parts:
            return 0.0
        if any(part.noise_multiplier == 0 for part in parts):
            return math.inf
        return estimate(parts, delta - delta_error, error, delta_error) + error


def estimate(parts: Sequence[Segment], delta: float, eps_error: float, delta_error: float) -> float:
    """Epsilon at ``delta`` of the rounded laws, the removing direction, as in Opacus."""
    return epsilon_bound(parts, delta, upper=True)


def _positive(eps_error: float) -> float:
    result = checks.number(eps_error, "eps_error")
    if not 0 < result < math.inf:
        raise ValueError(f"eps_error must lie in (0, inf), got {eps_error!r}")
    return result

