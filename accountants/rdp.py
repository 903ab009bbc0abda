r"""Renyi differential privacy of sampled Gaussians, and the tightest epsilon that a single order gives.

*Moments*: :mod:`accountants.moments`. Steps multiply: :math:`A_\alpha` of the whole history is the product.

*Conversion.* With :math:`\varphi(r)=r^\alpha-1-\alpha(r-1)`, convex and :math:`\ge0`, and
:math:`E[\varphi(r)]=A_\alpha-1`, every tangent gives :math:`\varphi'(s)(r-e^\epsilon)\le\varphi(r)` where
:math:`e^\epsilon=s-\varphi(s)/\varphi'(s)`, hence :math:`\delta(\epsilon)\le(A_\alpha-1)/\varphi'(s)`. Solving for s:
with :math:`w=(A_\alpha-1)/(\alpha\delta)` and :math:`s=(1+w)^{1/(\alpha-1)}`,

.. math:: e^{\epsilon}=\frac{\alpha-1}{\alpha}\Bigl(s+\frac{s-1}{w}\Bigr).

For large A this is the conversion of Canonne, Kamath and Steinke 2020 (Proposition 12) that Opacus uses; for
:math:`A-1\ll1` it is far below it, as it knows that the ratio has mean one (the optimum that Asoodeh et al. 2021
characterise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from . import checks
from .accountant import IAccountant
from .assumptions import Segment
from .moments import log_excess_fixed_size, log_excess_integer, log_excess_real, log_excess_replaced

DEFAULT_ORDERS = [1 + x / 10.0 for x in range(1, 100)] + [float(x) for x in range(12, 64)]
LOW_ORDERS = [1 + 10.0**-k for k in (4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25)]
HIGH_ORDERS = sorted({float(round(64 * 1.08**k)) for k in range(130)})  # up to 1.3 million
LEAST_NOISE = 0.03  # for batches of fixed size, over the largest move: below, their integral takes seconds an order


@lru_cache(maxsize=8192)
def log_moment(noise_multiplier: float, sample_rate: float, order: float, kind: str = "subsampled") -> float:
    r"""log of :math:`A_\alpha` for one step; divide by ``order - 1`` for the Renyi divergence.

    ``kind``: "subsampled", "replaced" or "fixed_size", as in :class:`accountants.assumptions.Segment`.
    """
    sigma, q = noise_multiplier, sample_rate
    if sigma == 0:
        return math.inf
    distance = 2 if kind == "replaced" and q < 1 else 1
    unsampled = order * (order - 1) * distance**2 / (2 * sigma**2)
    # Sampling never raises it (joint convexity). With next to no noise the integral for fixed sizes has no end.
    if q == 1 or (kind == "fixed_size" and sigma < LEAST_NOISE):
        return unsampled
    if kind == "fixed_size":
        log_excess = log_excess_fixed_size(sigma, q, order)
    elif kind == "replaced":
        log_excess = log_excess_replaced(sigma, q, order)
    elif float(order).is_integer():
        log_excess = log_excess_integer(sigma, q, int(order))
    else:
        log_excess = log_excess_real(sigma, q, order)
    if log_excess == math.inf:
        return unsampled
    # The few units in the last place that sums of this length can lose are added back.
    return (
        float(np.logaddexp(0.0, log_excess)) * (1 + 1e-11) if log_excess > -30 else math.exp(log_excess) * (1 + 1e-11)
    )


def rdp_to_epsilon(log_moments: np.ndarray, orders: np.ndarray, delta: float) -> np.ndarray:
    r"""Epsilon at ``delta`` that each order gives.

    Args:
        log_moments: log of :math:`A_\alpha` of the whole history, one entry per order.
        orders: the orders, above 1.
        delta: in (0, 1).
    """
    with np.errstate(divide="ignore", over="ignore"):
        usual = log_moments / (orders - 1) + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
        log_excess = np.where(log_moments < 30, np.log(np.expm1(np.minimum(log_moments, 30))), log_moments)
        log_w = np.clip(log_excess - np.log(orders) - math.log(delta), -700, 600)
        log_s = np.logaddexp(0.0, log_w) / (orders - 1)
        ratio = np.expm1(np.minimum(log_s, 600)) * np.exp(-log_w)
        centred = np.log(np.maximum((orders - 1) / orders * (np.exp(np.minimum(log_s, 600)) + ratio), 1.0))
    reliable = (log_excess - np.log(orders) - math.log(delta) < 600) & (log_s < 600)
    centred = np.where(reliable, centred + 1e-13 * (1 + centred), math.inf)
    # Where the refinement gains nothing to speak of, the usual formula keeps the digits that other libraries print.
    result = np.where(centred < (1 - 1e-3) * usual, centred, usual)
    return np.where(log_moments > 0, np.maximum(result, 0.0), 0.0)


class RDPAccountant(IAccountant):
    """Accounting by Renyi divergences: fast, never below the truth, often well above it (see "pld").

    Guarantee: :meth:`get_epsilon` is an upper bound for every history under ``sampling`` and ``relation``.
    """

    DEFAULT_ALPHAS = DEFAULT_ORDERS

    @classmethod
    def mechanism(cls) -> str:
        return "rdp"

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **kwargs: object) -> float:
        """Epsilon spent so far at ``delta``; ``alphas``: the orders to try (by default Opacus's, and more where they
        end)."""
        return self.get_privacy_spent(delta=delta, alphas=alphas)[0]

    def get_privacy_spent(self, *, delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
        """Epsilon and the order that gives it (0 and 0 for an empty history, as in Opacus)."""
        delta = checks.delta(delta)
        parts = self.segments()
        if not parts:
            return 0.0, 0.0
        if any(part.noise_multiplier == 0 for part in parts):
            return math.inf, math.nan
        return best_epsilon(parts, delta, alphas)

    def get_rdp(self, orders: Sequence[float]) -> np.ndarray:
        """Renyi divergence of the history at each order, an array like ``orders``."""
        parts = self.segments()
        return np.array([_total(parts, order) / (order - 1) for order in orders])


def best_epsilon(parts: Sequence[Segment], delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
    """The smallest epsilon over the orders, and its order; orders beyond the default ones where the best is at their
    end."""
    if alphas is not None:
        return _best(parts, delta, [checks.number(alpha, "alphas") for alpha in alphas])
    eps, order = _best(parts, delta, DEFAULT_ORDERS)
    if order <= DEFAULT_ORDERS[0]:
        return min((eps, order), _best(parts, delta, LOW_ORDERS))
    if order >= DEFAULT_ORDERS[-2]:
        return min((eps, order), _climb(parts, delta))
    return eps, order


def _best(parts: Sequence[Segment], delta: float, orders: Sequence[float]) -> tuple[float, float]:
    if not len(orders) or min(orders) <= 1:
        raise ValueError(f"alphas must be orders above 1, got {list(orders)!r}")
    column = np.array(orders, dtype=float)
    eps = rdp_to_epsilon(np.array([_total(parts, order) for order in column]), column, delta)
    best = int(np.argmin(eps))
    return float(eps[best]), float(column[best])


def _climb(parts: Sequence[Segment], delta: float) -> tuple[float, float]:
    """The best of the high orders: a few at a time, until they get worse."""
    best = (math.inf, math.nan)
    for start in range(0, len(HIGH_ORDERS), 10):
        here = _best(parts, delta, HIGH_ORDERS[start : start + 10])
        if here[0] > best[0]:
            break
        best = here
    return best


def _total(parts: Sequence[Segment], order: float) -> float:
    return math.fsum(
        part.steps * log_moment(part.noise_multiplier, part.sample_rate, float(order), part.kind) for part in parts
    )


def refuse_exchanged(parts: Sequence[Segment], name: str) -> None:
    """For accountants that know only the Poisson-sampled record that is added or removed."""
    if any(part.kind != "subsampled" and not part.is_gaussian for part in parts):
        raise ValueError(
            f"the {name!r} accountant certifies nothing for this sampling under this relation: use PLDAccountant or "
            "RDPAccountant, with the same sampling and relation"
        )
