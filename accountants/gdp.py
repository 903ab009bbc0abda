r"""Gaussian differential privacy: the central-limit approximation of Bu, Dong, Long and Su 2020. Not a bound.

:math:`\mu^2=\sum_i n_i\,q_i^2\,(e^{1/\sigma_i^2}-1)` for Poisson sampling; with batches of fixed size,
:math:`\mu^2=\sum_i 2 n_i q_i^2 (e^{1/\sigma_i^2}\Phi(3/2\sigma_i)+3\Phi(-1/2\sigma_i)-2)` (theirs too); then the closed
form for the Gaussian mechanism. Gopi, Lee and Wutschitz 2021 show that it can be far below the truth.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.special import ndtr

from . import checks, gaussian
from .accountant import IAccountant
from .assumptions import Segment
from .bounds import epsilon_bound
from .rdp import refuse_exchanged


class ApproximateEpsilonWarning(UserWarning):
    """Said with every epsilon that is an approximation. Silence it on purpose with
    ``warnings.filterwarnings("ignore", category=...)``."""


# Said every time, not only the first; appended, so that a filter of the user's own comes first.
warnings.simplefilter("always", ApproximateEpsilonWarning, append=True)


class GaussianAccountant(IAccountant):
    """The "gdp" accountant: an approximation whose epsilon can be below the truth, for comparison with other work."""

    @classmethod
    def mechanism(cls) -> str:
        return "gdp"

    def get_epsilon(self, delta: float, poisson: bool = True, **kwargs: object) -> float:
        """Approximate epsilon at ``delta``; ``poisson=False`` for batches of fixed size.

        Warns:
            ApproximateEpsilonWarning: each time, unless the history is not sampled (q = 1), where the value is exact.
        """
        delta = checks.delta(delta)
        mu = self._mu(poisson)
        return gaussian.ClosedForm(1 / mu, 1.0).epsilon(delta, upper=True) if 0 < mu < math.inf else mu

    def get_epsilon_bounds(self, delta: float) -> tuple[float, float]:
        """(lower, upper) around the true epsilon at ``delta``, both certified: this accountant's own value is no bound,
        and may lie outside."""
        delta, parts = checks.delta(delta), self.segments()
        refuse_exchanged(parts, "gdp")
        upper = epsilon_bound(parts, delta, upper=True)
        return min(epsilon_bound(parts, delta, upper=False), upper), upper

    def get_delta(self, epsilon: float) -> float:
        """Approximate delta at ``epsilon`` >= 0, with the warning of :meth:`get_epsilon`."""
        epsilon, mu = checks.epsilon(epsilon), self._mu(True)
        return gaussian.ClosedForm(1 / mu, 1.0).delta(epsilon, upper=True) if 0 < mu < math.inf else min(mu, 1.0)

    def epsilon_curve(self, delta: float) -> np.ndarray:
        """Approximate epsilon at ``delta`` after every step, with one warning for all."""
        self._mu(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximateEpsilonWarning)
            return super().epsilon_curve(delta)

    def _mu(self, poisson: bool) -> float:
        parts = self.segments()
        refuse_exchanged(parts, "gdp")
        if any(part.noise_multiplier == 0 for part in parts):
            return math.inf
        if any(not part.is_gaussian for part in parts):
            warnings.warn(
                "this epsilon is the central-limit approximation ('gdp') and can be below the truth: for a bound use "
                "the 'pld' or 'prv' accountant. Silence: warnings.filterwarnings('ignore', "
                "category=accountants.ApproximateEpsilonWarning)",
                ApproximateEpsilonWarning,
                stacklevel=3,
            )
        return math.sqrt(math.fsum(_squared_mu(part, poisson) for part in parts))


def _squared_mu(part: Segment, poisson: bool) -> float:
    sigma, q, steps = part.noise_multiplier, part.sample_rate, part.steps
    if part.is_gaussian:
        return steps / sigma**2
    if sigma < 0.04:  # e^{1/sigma^2} is beyond float64
        return math.inf
    if poisson:
        return steps * q**2 * math.expm1(sigma**-2)
    inner = math.exp(sigma**-2) * float(ndtr(1.5 / sigma)) + 3 * float(ndtr(-0.5 / sigma)) - 2
    return 2 * steps * q**2 * inner
