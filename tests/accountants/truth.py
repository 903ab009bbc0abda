r"""The true epsilon by a second way, which shares nothing with the package: contour integration of the moment
generating function.

With :math:`M(s)=E[e^{sL}]` of one step's privacy loss, for any :math:`\theta>0`

.. math:: \delta(\epsilon)=\frac1{2\pi i}\int_{\theta-i\infty}^{\theta+i\infty}\frac{M(s)^n
e^{-s\epsilon}}{s(s+1)}\,ds .

M by the trapezoidal rule in x (the integrand is analytic, so the error falls exponentially), the contour integral by
the
trapezoidal rule in :math:`\omega` up to where the integrand has died; both are refined until the answer stands still.
No lattice, no FFT.

``python -m tests.accountants.truth`` writes ``data/truth.json`` (a few minutes).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "truth.json"


class Contour:
    """One direction of the subsampled Gaussian composed ``steps`` times, along the line Re s = theta."""

    def __init__(
        self, sigma: float, q: float, steps: int, add: bool, theta: float, fineness: int, reach: float
    ) -> None:
        spacing = min(sigma, sigma**2) / (8 * fineness)
        x = np.arange(-13 * sigma, max(1.0, 1.0 + 0 * theta) + 14 * sigma, spacing)
        y = (2 * x - 1) / (2 * sigma**2)
        mixture = np.where(
            y < 30, np.log1p(q * np.expm1(np.minimum(y, 30))), math.log(q) + y + np.log1p((1 - q) / q * np.exp(-y))
        )
        weight = np.exp(-(x**2) / (2 * sigma**2)) * spacing / (sigma * math.sqrt(2 * math.pi))
        self.loss, log_weight = (-mixture, np.log(weight)) if add else (mixture, np.log(weight) + mixture)
        exponent = log_weight + theta * self.loss
        peak = exponent.max()
        tilted = np.exp(exponent - peak)
        self.steps, self.theta = steps, theta
        self.log_m = peak + math.log(tilted.sum())
        self.tilted = tilted / tilted.sum()
        mean = float(self.tilted @ self.loss)
        self.mean, self.variance = steps * mean, steps * float(self.tilted @ (self.loss - mean) ** 2)
        width = math.sqrt(self.variance)
        self.d_omega = 2 * math.pi / (reach * width)
        self.values: list[np.ndarray] = []
        self.omegas: list[np.ndarray] = []
        self._walk(mean)

    def _walk(self, mean: float, block: int = 256, most: int = 100) -> None:
        """M(theta + i omega)^n / M(theta)^n, block by block, until it no longer counts."""
        for index in range(most):
            omega = self.d_omega * np.arange(index * block, (index + 1) * block)
            phase = np.exp(1j * np.outer(omega, self.loss - mean)) @ self.tilted
            value = np.exp(self.steps * np.log(phase)) / ((self.theta + 1j * omega) * (self.theta + 1 + 1j * omega))
            self.values.append(value)
            self.omegas.append(omega)
            if np.abs(value).max() < 1e-11 * abs(self.values[0][0]):
                return
        raise ArithmeticError("the contour integrand does not die: another theta or a longer walk is needed")

    def delta(self, epsilon: float) -> float:
        omega, value = np.concatenate(self.omegas), np.concatenate(self.values)
        terms = (value * np.exp(-1j * omega * (epsilon - self.mean))).real
        integral = self.d_omega / math.pi * (terms.sum() - terms[0] / 2)
        scale = self.steps * self.log_m - self.theta * epsilon
        return math.exp(scale + math.log(integral)) if integral > 0 else 0.0


def epsilon_one_way(sigma: float, q: float, steps: int, delta: float, add: bool, fineness: int, reach: float) -> float:
    """Epsilon >= 0 at ``delta`` for one direction."""
    low, high = math.log(1e-3), math.log(1e6)
    for _ in range(40):  # the tilt whose Chernoff bound is delta, near enough
        theta = math.exp((low + high) / 2)
        value, mean = _cumulant(sigma, q, steps, add, theta)
        low, high = (
            ((low + high) / 2, high) if value - theta * mean > math.log(delta) or mean < 0 else (low, (low + high) / 2)
        )
    contour = Contour(sigma, q, steps, add, math.exp((low + high) / 2), fineness, reach)
    width = math.sqrt(contour.variance)
    bottom, top = max(contour.mean - 6 * width, 0.0), contour.mean + 6 * width
    if contour.delta(bottom) <= delta:
        return 0.0
    for _ in range(80):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if contour.delta(middle) > delta else (bottom, middle)
    return top


def _cumulant(sigma: float, q: float, steps: int, add: bool, theta: float) -> tuple[float, float]:
    x = np.linspace(-13 * sigma, 1 + 14 * sigma, 6001)
    y = (2 * x - 1) / (2 * sigma**2)
    mixture = np.logaddexp(math.log1p(-q), math.log(q) + y)
    log_weight = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi) / (x[1] - x[0]))
    exponent, loss = (log_weight - theta * mixture, -mixture) if add else (log_weight + (1 + theta) * mixture, mixture)
    weight = np.exp(exponent - exponent.max())
    return steps * (exponent.max() + math.log(weight.sum())), steps * float(weight @ loss / weight.sum())


def true_epsilon(sigma: float, q: float, steps: int, delta: float) -> tuple[float, float]:
    """Epsilon and how far the last refinement moved it."""
    coarse, fine = (
        max(epsilon_one_way(sigma, q, steps, delta, add, fineness, reach) for add in (False, True))
        for fineness, reach in ((1, 24.0), (2, 36.0))
    )
    return fine, abs(fine - coarse)


def grid() -> list[tuple[float, float, int, float]]:
    """The table of known failures of other libraries, and a grid around it."""
    table = [
        (1.1, 256 / 60000, 14062, 1e-5), (4.0, 0.01, 10000, 1e-5), (2.5, 0.01279, 71589, 8e-7), (1.0, 1e-5, 50000,
        1e-8),
        (0.5, 1e-5, 20000, 1e-9), (1.1, 256 / 60000, 14062, 1e-13), (1.1, 256 / 60000, 14062, 1e-14),
        (1.1, 256 / 60000, 14062, 1e-16), (4.0, 1024 / 50000, 10000, 1e-5), (1.5, 0.04, 2250, 1e-5),
    ]  # fmt: skip
    rest = [
        (sigma, q, steps, delta)
        for sigma in (0.3, 0.8, 2.0, 20.0)
        for q in (1e-5, 1e-3, 1e-2, 0.3)
        for steps in (100, 10_000, 1_000_000)
        for delta in (1e-4, 1e-10, 1e-16)
    ]
    return table + rest


def main() -> None:
    rows = []
    for sigma, q, steps, delta in grid():
        try:
            epsilon, moved = true_epsilon(sigma, q, steps, delta)
        except (ArithmeticError, ValueError, OverflowError):
            continue
        if moved > 1e-6 * epsilon + 1e-8:
            continue
        rows.append({"sigma": sigma, "q": q, "steps": steps, "delta": delta, "epsilon": epsilon, "moved": moved})
        print(rows[-1], flush=True)
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(
        json.dumps({"made_by": "python -m tests.accountants.truth", "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
