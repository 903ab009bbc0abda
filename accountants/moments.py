r"""Moments of one step's likelihood ratio, from which Renyi divergences are made.

*Poisson.* For order :math:`\alpha`, :math:`A_\alpha=E_{N(0,\sigma^2)}[r^\alpha]` with the likelihood ratio
:math:`r=1-q+q\,e^{(2x-1)/2\sigma^2}` (Mironov, Talwar and Zhang 2019, Section 3; the other direction is never larger,
as they show). The excess :math:`A_\alpha-1` is computed, not :math:`A_\alpha`, as a sum or integral of positive terms,
so that it keeps its digits at small q: with :math:`\varphi(r)=r^\alpha-1-\alpha(r-1)\ge0` it is :math:`E[\varphi(r)]`.

*Poisson, one record exchanged.* With the pair of :mod:`accountants.replace` it is :math:`\int Q\varphi(P/Q)\,dx`.

*Fixed size.* The pair of :mod:`accountants.fixed_size` has

.. math:: A_\alpha-1=\int_{1/2}^\infty N\varphi(M/N)+M\varphi(N/M)\,dx .
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln, log_ndtr, ndtr

from .pairs import Array, loss_of

MOST_NODES = 100_000


def log_excess_integer(sigma: float, q: float, order: int) -> float:
    """log(A - 1) = log sum_{k>=2} C(order, k) q^k (1-q)^(order-k) (e^{k(k-1)/2 sigma^2} - 1); the rest of the sum is
    1."""
    k = np.arange(2, order + 1, dtype=float)
    log_binomial = gammaln(order + 1.0) - gammaln(k + 1) - gammaln(order - k + 1)
    exponent = k * (k - 1) / (2 * sigma**2)
    log_expm1 = np.where(exponent > 30, exponent, np.log(np.expm1(np.minimum(exponent, 30))))
    return _log_sum(log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + log_expm1)


def log_excess_real(sigma: float, q: float, order: float) -> float:
    """log(A - 1) by the trapezoidal rule, whose error falls exponentially: the integrand is analytic in a strip of
    sigma^2.

    Where that takes too many nodes (sigma below 0.006 to 0.02) the power's convexity gives an upper bound,
    ``r^a <= (1 - q) + q e^{a (2x-1) / 2 sigma^2}``, so ``A - 1 <= q (e^{a (a-1) / 2 sigma^2} - 1)``. Its log is above
    the moment's by ``(a - 1) log 1/q`` at most, and epsilon is in the thousands there.
    """
    spacing = min(sigma / 4, sigma**2 / 3)
    if (max(order, 1.0) + 24 * sigma) / spacing > MOST_NODES:
        unsampled = order * (order - 1) / (2 * sigma**2)
        return math.log(q) + (unsampled if unsampled > 30 else math.log(math.expm1(unsampled)))
    x = np.arange(-12 * sigma, max(order, 1.0) + 12 * sigma + spacing, spacing)
    exponent = (2 * x - 1) / (2 * sigma**2)
    log_ratio = np.where(
        exponent < 1,
        np.log1p(q * np.expm1(np.minimum(exponent, 1))),
        np.logaddexp(math.log1p(-q), math.log(q) + exponent),
    )
    log_density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi) / spacing)
    return _log_sum(log_density + _log_bregman(log_ratio, order))


def log_excess_replaced(sigma: float, q: float, order: float) -> float:
    """log(A - 1) for the exchanged record under Poisson sampling, as :func:`log_excess_real`; inf for high orders."""
    spacing = min(sigma / 4, sigma**2 / 3)
    if (2 * order + 26 * sigma) / spacing > MOST_NODES:
        return math.inf
    x = np.arange(-1 - 12 * sigma, 2 * order + 12 * sigma + spacing, spacing)
    log_other = loss_of(-x, sigma, q)
    log_density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi) / spacing)
    return _log_sum(log_density + log_other + _log_bregman(loss_of(x, sigma, q) - log_other, order))


def _log_bregman(log_ratio: np.ndarray, order: float) -> np.ndarray:
    """log(r^a - 1 - a(r - 1)) from log r, without cancellation near r = 1 and without overflow."""
    small = np.abs(log_ratio) * max(order, 1.0) < 1e-2
    near = np.where(small, log_ratio, 0.0)
    ratio = np.where(small, 0.0, log_ratio)
    # Taylor series of e^{au} - 1 - a(e^u - 1) in u: sum_{k>=2} (a^k - a) u^k / k!
    series = sum((order**k - order) * near**k / math.factorial(k) for k in range(2, 9))
    big = order * ratio > 600
    direct = np.expm1(np.where(big, 0.0, order * ratio)) - order * np.expm1(np.where(big, 0.0, ratio))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            small, np.log(np.maximum(series, 0.0)), np.where(big, order * ratio, np.log(np.maximum(direct, 0.0)))
        )


def _log_sum(values: np.ndarray) -> float:
    peak = float(values.max())
    return peak + math.log(float(np.exp(values - peak).sum())) if peak > -math.inf else peak


NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
SURELY = 20.0  # where order * log r is above this, r^order stands for phi(r)


def log_excess_fixed_size(s: float, q: float, order: float) -> float:
    """log(A - 1) for batches of fixed size; ``s``: noise over the largest move, half the noise multiplier.

    By Gauss-Legendre panels shorter than the distance s^2 over which r changes. For high integer orders only to where
    r^order is all of phi, and from there by the binomial sum; what is left over is counted, never dropped.
    """
    last = 2 + 13 * s
    x, log_step = _panels(0.5, last, s)
    loss = loss_of(x, s, q)
    log_n = log_step - x**2 / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
    beyond = (1 - q) * ndtr(-last / s) + q * ndtr((1 - last) / s)  # M there; phi is at most order - 1 where r < 1
    down = np.logaddexp(
        _log_sum(log_n + loss + _log_bregman(-loss, order)), math.log(max((order - 1) * beyond, 1e-300))
    )
    end, tail = order + 13 * s, -math.inf
    if float(order).is_integer():
        sure = 0.5 + s**2 * math.log1p(math.expm1(SURELY / order) / q)
        end, tail = (sure, _log_binomial_tail(s, q, int(order), sure)) if sure < end else (end, tail)
    x, log_step = _panels(0.5, end, s)
    log_n = log_step - x**2 / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
    up = _log_sum(log_n + _log_bregman(loss_of(x, s, q), order))
    return float(np.logaddexp(np.logaddexp(up, tail), down))


def _panels(start: float, end: float, s: float) -> tuple[Array, Array]:
    """Nodes between ``start`` and ``end``, and the logarithms of their weights."""
    count = math.ceil((end - start) / min(s, s**2))
    edges = np.linspace(start, end, count + 1)
    half = (edges[1] - edges[0]) / 2
    return ((edges[:-1] + half)[:, None] + half * NODES).ravel(), np.tile(np.log(half * WEIGHTS), count)


def _log_binomial_tail(s: float, q: float, order: int, x: float) -> float:
    """log E_N[r^order; above x] = log sum_k C(order, k) q^k (1-q)^(order-k) e^{k(k-1)/2s^2} Phi((k - x)/s)."""
    k = np.arange(order + 1, dtype=float)
    log_binomial = gammaln(order + 1.0) - gammaln(k + 1) - gammaln(order - k + 1)
    power = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + k * (k - 1) / (2 * s**2)
    return _log_sum(power + log_ndtr((k - x) / s))
