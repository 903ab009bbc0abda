"""What an audit proves: from correct guesses to a lower bound on epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

MAX_EPSILON = 200.0


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely ``correct`` or more right guesses are, at most, if the training is (epsilon, delta)-private.

    Steinke, Nasr, Jagielski 2023, Theorem 5.2: with ``W`` binomial of ``guesses`` trials that succeed with probability
    ``e^epsilon / (1 + e^epsilon)``, it is ``P[W >= correct] + 2 * canaries * delta * alpha``, where
    ``alpha = max_i P[correct - i <= W < correct] / i`` over ``i = 1, 2, ...``.

    Args:
        canaries: number of coins, each fair and independent.
        guesses: how many were guessed, whatever the outcome.
        correct: how many of the guesses were right.
        epsilon, delta: the claim.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"expected 0 <= correct <= guesses <= canaries, got {correct}, {guesses}, {canaries}")
    if not epsilon >= 0 or not 0 <= delta < 1:
        raise ValueError(f"epsilon must be 0 or more and delta in [0, 1), got {epsilon!r} and {delta!r}")
    success = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, success))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, success))
    alpha = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * alpha)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that this many right guesses refute at ``confidence``; 0 if they refute none."""
    level = 1.0 - confidence
    if p_value(canaries, guesses, correct, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, correct, high, delta) < level:
        low, high = high, 2 * high
        if high > MAX_EPSILON:
            return low
    while high - low > 1e-4 * max(high, 1.0):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class AuditReport:
    """The outcome of a :class:`gsm.audit.CanaryAudit`; ``print(report)`` says it in words.

    ``claimed`` is the epsilon under test; ``scores`` and ``included`` (``[canaries]``) what the guesses rest on.
    """

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    claimed: float
    releases: int
    scores: np.ndarray[Any, Any] = field(repr=False)
    included: np.ndarray[Any, Any] = field(repr=False)

    @property
    def epsilon(self) -> float:
        """The lower bound on epsilon, at ``delta`` and with ``confidence``."""
        return epsilon_lower_bound(self.canaries, self.guesses, self.correct, self.delta, self.confidence)

    @property
    def ok(self) -> bool:
        """Whether what was measured does not contradict the claim."""
        return self.epsilon <= self.claimed

    def __str__(self) -> str:
        verdict = (
            "no contradiction to"
            if self.ok
            else "CONTRADICTION: this training is not as private as claimed. Look for noise that is missing or too "
            "small, gradients that escape clipping, records used more than once. It contradicts"
        )
        return (
            f"{self.correct} of {self.guesses} guesses right ({self.canaries} canaries, {self.releases} releases): "
            f"epsilon >= {self.epsilon:.3g} at delta = {self.delta:g} with {self.confidence:.0%} confidence; {verdict} "
            f"the claimed epsilon = {self.claimed:.4g}"
        )

    def plot(self, path: Any = None) -> Any:
        """Scores of the canaries that were in and of those that were not, and the two epsilons.

        Args:
            path: file to save the figure to; None: only return it. Needs matplotlib.

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("report.plot() draws with matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 1])
        bins = np.histogram_bin_edges(self.scores, 40).tolist()
        for label, rows in (("in the training data", self.included), ("left out", ~self.included)):
            left.hist(self.scores[rows], bins=bins, alpha=0.6, label=label)
        left.set(xlabel="score: alignment with the releases", ylabel="canaries")
        left.legend()
        right.bar(["measured\n(at least)", "claimed\n(at most)"], [self.epsilon, self.claimed], color=["C3", "C2"])
        right.set(ylabel=f"epsilon at delta = {self.delta:g}")
        figure.suptitle(f"{self.correct} of {self.guesses} guesses right, {self.confidence:.0%} confidence")
        if path is not None:
            figure.savefig(path)
        return figure
