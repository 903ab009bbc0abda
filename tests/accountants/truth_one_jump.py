r"""The true epsilon where single large losses dominate, and the contour of :mod:`tests.accountants.truth` fails.

One step's law is split smoothly into small and large losses, p = p_s + p_l. With exactly one large loss among n,

.. math:: \delta_1(\epsilon)=n\int p_l(l)\,D(\epsilon-l)\,dl,\qquad D(x)=E_{p_s^{n-1}}[(1-e^{x-S})_+],

by plain quadrature in l, and D by contour integration: positive terms only, no lattice, no FFT. Two or more large
losses add at most (n p_l)^2 / 2; none at all adds next to nothing at the places where this is used.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import log_ndtr


def delta_of_one_jump(sigma: float, q: float, steps: int, epsilon: float) -> tuple[float, float]:
    """Delta from exactly one large loss (above a quarter of epsilon, about), and the most that several can add."""
    spacing = sigma / 400
    x = np.arange(-14 * sigma, 1 + 16 * sigma, spacing)
    y = (2 * x - 1) / (2 * sigma**2)
    loss = np.where(y < 1, np.log1p(q * np.expm1(np.minimum(y, 1))), np.logaddexp(math.log1p(-q), math.log(q) + y))
    law = np.exp(-(x**2) / (2 * sigma**2) + loss) * spacing / (sigma * math.sqrt(2 * math.pi))
    z = np.log(np.maximum(loss, 1e-300) / (epsilon / 4)) / 0.15
    share = np.where(z > 5, 1.0, np.exp(log_ndtr(np.maximum(z, -37.0))) * (loss > 0))
    small, large = law * (1 - share), law * share
    width = math.sqrt(steps * float(small @ loss**2))
    grid = np.linspace(-12 * width, epsilon, 1500)
    payoff = CubicSpline(grid, _small_curve(loss[small > 0], small[small > 0], steps - 1, grid, 0.5 / width))
    ahead = epsilon - loss
    surely = small.sum() ** (steps - 1) - np.exp(ahead) * float(small @ np.exp(-loss)) ** (steps - 1)
    one = steps * float(large @ np.where(ahead < grid[0], surely, payoff(np.maximum(ahead, grid[0]))))
    return one, (steps * float(large.sum())) ** 2 / 2


def _small_curve(loss: np.ndarray, law: np.ndarray, steps: int, at: np.ndarray, theta: float) -> np.ndarray:
    """E[(1 - e^{x - S})_+] for the sum S of ``steps`` small losses, at every x of ``at``."""
    tilted = law * np.exp(theta * loss)
    size = float(tilted.sum())
    tilted = tilted / size
    mean = float(tilted @ loss)
    width = math.sqrt(steps * float(tilted @ (loss - mean) ** 2))
    spacing = 2 * math.pi / (60 * width + float(at.max() - at.min()))
    omegas, values = [], []
    for block in range(400):
        omega = spacing * np.arange(block * 128, (block + 1) * 128)
        phase = (np.exp(1j * np.outer(omega, loss - mean)) - 1) @ tilted
        omegas.append(omega)
        values.append(np.exp(steps * np.log1p(phase)) / ((theta + 1j * omega) * (theta + 1 + 1j * omega)))
        if np.abs(values[-1]).max() < 1e-12 * abs(values[0][0]):
            break
    omega, value = np.concatenate(omegas), np.concatenate(values)
    integral = (np.exp(-1j * np.outer(at - steps * mean, omega)) @ value).real - value[0].real / 2
    return np.exp(steps * math.log(size) - theta * at) * integral * spacing / math.pi
