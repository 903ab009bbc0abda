r"""Privacy-loss distributions: epsilon and delta as certified bounds, as tight as is asked for.

*Argument for the bound.* (1) Each step is dominated by the pair of :mod:`accountants.assumptions`, and adaptive
composition is dominated by the product of dominating pairs (Zhu, Dong and Wang 2022). For add/remove neighbours the two
directions are composed separately and the larger delta counts. (2) Each pair is replaced by a lattice law that
dominates it, or that it dominates: :mod:`accountants.lattice`. (3) The lattice laws are composed under an exponential
tilt, and aliasing, truncation and every rounding error is bounded and added, or subtracted: :mod:`accountants.compose`.
What is assumed and not proven: that scipy's ``ndtr``, its FFT and numpy's exp and log are as accurate as their authors
state, with the margins named there.

Where a closed form is known (no sampling; a single step) it is used instead: :mod:`accountants.gaussian`.
"""

from __future__ import annotations

from typing import Any

from . import checks
from .accountant import IAccountant
from .bounds import delta_bound, epsilon_bound
from .stepping import Follower


class PLDAccountant(IAccountant):
    """The "pld" accountant: never below the truth, and close to it.

    Guarantee: :meth:`get_epsilon` and :meth:`get_delta` are upper bounds, :meth:`get_epsilon_bounds` encloses the
    truth, for every
    history under ``sampling`` and ``relation``.

    Example:
        >>> accountant = PLDAccountant()
        >>> for _ in range(100):
        ...     accountant.step(noise_multiplier=1.0, sample_rate=0.01)
        >>> lower, upper = accountant.get_epsilon_bounds(delta=1e-5)
        >>> lower <= accountant.get_epsilon(delta=1e-5) <= upper
        True
    """

    @classmethod
    def mechanism(cls) -> str:
        return "pld"

    def get_epsilon(self, delta: float, **kwargs: Any) -> float:
        """Smallest certified epsilon at ``delta`` in (0, 1); 0 for an empty history, ``inf`` where there was no
        noise."""
        return self._follower().epsilon(self.segments(), checks.delta(delta))

    def _follower(self) -> Follower:
        """The memory of the last answers; made when it is needed, so that copies and state dicts carry none."""
        if "_memory" not in self.__dict__:
            self._memory = Follower()
        return self._memory

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_memory"}

    def get_epsilon_bounds(self, delta: float) -> tuple[float, float]:
        """(lower, upper) around the true epsilon at ``delta``, both certified.

        Close together, but for batches of fixed size (:mod:`accountants.fixed_size`): there the worst neighbours are
        not known, and the two can be a quarter apart.
        """
        parts, delta = self.segments(), checks.delta(delta)
        upper = epsilon_bound(parts, delta, upper=True)
        return min(epsilon_bound(parts, delta, upper=False), upper), upper

    def get_delta(self, epsilon: float) -> float:
        """Smallest certified delta at ``epsilon`` >= 0; 0 for an empty history, 1 where there was no noise."""
        return delta_bound(self.segments(), checks.epsilon(epsilon), upper=True)

    def get_delta_bounds(self, epsilon: float) -> tuple[float, float]:
        """(lower, upper) around the true delta at ``epsilon``."""
        parts, epsilon = self.segments(), checks.epsilon(epsilon)
        upper = delta_bound(parts, epsilon, upper=True)
        return min(delta_bound(parts, epsilon, upper=False), upper), upper
