"""What every accountant is: a history of steps, the assumptions under which it is read, and the cost of it.

The interface is Opacus's ``IAccountant`` (1.6), so an accountant of either library serves the other's optimizers and
its state dict loads in the other's accountant of the same name.
"""

from __future__ import annotations

import abc
import math
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from copy import copy, deepcopy
from typing import Any

import numpy as np

from . import checks
from .assumptions import RELATIONS, SAMPLINGS, Segment, check_assumptions, segments
from .dp_event import to_dp_event

LEAST_DELTA = 1e-30
"""The smallest delta that :meth:`IAccountant.get_delta` looks at."""


class IAccountant(abc.ABC):
    """Counts the steps of a training run and says what they cost.

    Args:
        sampling: how batches were drawn, one of :data:`accountants.assumptions.SAMPLINGS`; "poisson" by default.
        relation: which data sets are neighbours, one of :data:`accountants.assumptions.RELATIONS`; "add_remove" by
        default.

    ``history`` is a plain list of ``(noise_multiplier, sample_rate, num_steps)``: append to it, assign it, save it.

    Example:
        >>> from accountants import PLDAccountant
        >>> accountant = PLDAccountant()
        >>> accountant.history = [(1.1, 256 / 60000, 14062)]
        >>> round(accountant.get_epsilon(delta=1e-5), 3)
        2.382
    """

    def __init__(self, *, sampling: str = "poisson", relation: str = "add_remove") -> None:
        check_assumptions(sampling, relation)
        self.history = []
        self.sampling = sampling
        self.relation = relation

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """The steps charged so far; a list that is assigned is kept as it is, and read at every question."""
        return self._history

    @history.setter
    def history(self, entries: list[tuple[float, float, int]]) -> None:
        if isinstance(entries, str) or not isinstance(entries, Sequence | np.ndarray):
            raise TypeError(
                "history must be a list of (noise_multiplier, sample_rate, num_steps), got "
                f"{type(entries).__name__}; for an account without steps assign []"
            )
        self._history = entries if isinstance(entries, list) else list(entries)

    @classmethod
    @abc.abstractmethod
    def mechanism(cls) -> str:
        """The name under which :func:`accountants.create_accountant` makes this accountant."""

    @abc.abstractmethod
    def get_epsilon(self, delta: float, **kwargs: Any) -> float:
        """Epsilon spent so far at ``delta`` in (0, 1); 0 for an empty history, ``inf`` where no noise was added."""

    def get_epsilon_bounds(self, delta: float) -> tuple[float, float]:
        """(lower, upper) around the true epsilon at ``delta``: a certified lower bound (:mod:`accountants.bounds`), and
        this accountant's own upper bound."""
        from .bounds import epsilon_bound  # which needs the formulas of an accountant

        upper = self.get_epsilon(delta)
        return min(epsilon_bound(self.segments(), checks.delta(delta), upper=False), upper), upper

    def get_delta(self, epsilon: float) -> float:
        """Smallest delta, up to 1e-9 of itself, at which :meth:`get_epsilon` is at most ``epsilon`` >= 0 (the safe
        side); 0 for an empty history, 1 where no delta below 1 is enough."""
        epsilon = checks.epsilon(epsilon)
        if not self.history:
            return 0.0
        low, high = math.log(LEAST_DELTA), math.log1p(-(2.0**-53))
        if self.get_epsilon(math.exp(high)) > epsilon:
            return 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (low, middle) if self.get_epsilon(math.exp(middle)) <= epsilon else (middle, high)
        return math.exp(high)

    def epsilon_curve(self, delta: float) -> np.ndarray:
        """Epsilon at ``delta`` after every step of the history, an array of :attr:`num_steps`, rising."""
        meter = copy(self)
        meter.history = []
        values = []
        for sigma, q, count in self.history:
            meter.history.append((sigma, q, 0))
            for done in range(1, checks.steps(count, "num_steps") + 1):
                meter.history[-1] = (sigma, q, done)
                values.append(meter.get_epsilon(delta))
        return np.maximum.accumulate(np.array(values, dtype=float)) if values else np.zeros(0)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one step.

        Args:
            noise_multiplier: standard deviation of the noise over the sensitivity of the sum; 0 makes epsilon ``inf``.
            sample_rate: probability in [0, 1] that a record was in the batch.
        """
        sigma, q = checks.noise_multiplier(noise_multiplier), checks.sample_rate(sample_rate)
        if self.history and tuple(self.history[-1][:2]) == (sigma, q):
            self.history[-1] = (sigma, q, self.history[-1][2] + 1)
        else:
            self.history.append((sigma, q, 1))

    def __len__(self) -> int:
        """Number of entries of the history (as in Opacus: runs of equal steps, not steps; see :attr:`num_steps`)."""
        return len(self.history)

    @property
    def num_steps(self) -> int:
        """Number of steps charged so far."""
        return sum(checks.steps(entry[2], "num_steps") for entry in self.history)

    def segments(self) -> list[Segment]:
        """The history as certified mechanisms under this accountant's sampling and relation; checks every number."""
        return segments(self.history, self.sampling, self.relation)

    def describe(self, delta: float, **kwargs: Any) -> str:
        """One line that may be quoted: epsilon, delta, and everything the number rests on."""
        return (
            f"epsilon = {self.get_epsilon(delta, **kwargs):.4g} at delta = {delta:g} "
            f"({self.mechanism()} accountant; {SAMPLINGS[self.sampling]}; {RELATIONS[self.relation]})"
        )

    def to_dp_event(self) -> Any:
        """The history as a ``dp_accounting.DpEvent``; needs dp_accounting (:mod:`accountants.dp_event`).

        Raises:
            ImportError: dp_accounting is not installed.
            ValueError: there is no such event for this sampling. (The relation is told to dp_accounting's accountant.)
        """
        if self.sampling == "unsampled":
            return to_dp_event([(sigma, 1.0, count) for sigma, _, count in self.history])
        if self.sampling != "poisson":
            raise ValueError(
                f"to_dp_event: the history holds no event for sampling={self.sampling!r}; it knows 'poisson' and "
                "'unsampled'"
            )
        return to_dp_event(self.history)

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """A function of an optimizer that charges the step it is about to take.

        Args:
            sample_rate: probability that a record is in one backward's batch; it is multiplied by the optimizer's
                ``accumulated_iterations``, as in Opacus.
        """

        def charge(optimizer: Any) -> None:
            self.step(
                noise_multiplier=optimizer.noise_multiplier,
                sample_rate=sample_rate * optimizer.accumulated_iterations,
            )

        return charge

    def state_dict(self, destination: MutableMapping[str, Any] | None = None) -> MutableMapping[str, Any]:
        """History, name and (where they are not the defaults) the assumptions; Opacus reads the first two."""
        state: MutableMapping[str, Any] = OrderedDict() if destination is None else destination
        state["history"] = deepcopy(self.history)
        state["mechanism"] = self.mechanism()
        if (self.sampling, self.relation) != ("poisson", "add_remove"):
            state["sampling"], state["relation"] = self.sampling, self.relation
        return state

    def load_state_dict(self, state_dict: MutableMapping[str, Any]) -> None:
        """Take over a state dict of this library or of Opacus.

        Raises:
            ValueError: it is empty, lacks an entry, belongs to another accountant, or its history is not valid.
                Nothing is changed then.
        """
        if not state_dict:
            raise ValueError("the accountant's state dict is None or empty: there is nothing to load")
        for key in ("history", "mechanism"):
            if key not in state_dict:
                raise ValueError(f"the accountant's state dict has no entry {key!r}")
        if state_dict["mechanism"] != self.mechanism():
            raise ValueError(
                f"a state dict of the accountant {state_dict['mechanism']!r} does not load into {self.mechanism()!r}: "
                f"use create_accountant({state_dict['mechanism']!r})"
            )
        checks.history(state_dict["history"])
        sampling, relation = state_dict.get("sampling", "poisson"), state_dict.get("relation", "add_remove")
        check_assumptions(sampling, relation)
        self.history = [tuple(entry) for entry in deepcopy(state_dict["history"])]
        self.sampling, self.relation = sampling, relation

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self.num_steps}, sampling={self.sampling!r}, relation={self.relation!r})"
