"""Passes over a loader that is accounted as "every record once per pass": one that was left early counts as whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Sampler

#: What accountants with these names for the sampling count in passes, by the sum of the steps' rates.
BY_PASSES = ("shuffled", "cyclic")


class Passes(Sampler[Any]):
    """The same order as ``order`` (a sampler or batch sampler), knowing which pass is under way.

    An accountant sees steps, not passes: half a pass and another half look like one, in which a record takes part
    once. If the second was begun anew, it took part twice. So the first release of another pass is to be preceded by a
    charge for what the passes so far lack to a whole number (:meth:`lacking`).

    Formal guarantee: if all batches come from here and each is released once, then the account, rounded up to whole
    passes, counts every pass that had a release, and a record takes part at most once in each.
    """

    def __init__(self, order: Any, counted: bool = True):
        self.order = order
        #: Whether the account is in passes. If not, a batch may well be used again, and only where a pass ends matters.
        self.counted = counted
        #: Batches (or single records, of a loader without batches) drawn so far.
        self.drawn = 0
        self._begun = self._drawing = 0
        self._charged: int | None = None

    def __iter__(self) -> Iterator[Any]:
        self._begun += 1
        current = self._begun
        for chosen in self.order:
            self.drawn, self._drawing = self.drawn + 1, current
            yield chosen

    @property
    def under_way(self) -> int:
        """The number of the pass that the batch drawn last belongs to; they count from 1."""
        return self._drawing

    def __len__(self) -> int:
        return len(self.order)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "order":
            raise AttributeError(name)
        return getattr(self.order, name)

    def lacking(self, history: Sequence[tuple[float, float, int]]) -> tuple[float, float] | None:
        """Asked before a charge: the (noise multiplier, rate) to be charged first, if that is for another pass than the
        one before; None if the passes so far are whole.

        Args:
            history: entries ``(noise_multiplier, sample_rate, num_steps)``.
        """
        if not self.counted:
            return None
        before, self._charged = self._charged, self._drawing
        epochs = math.fsum(rate * steps for _, rate, steps in history)
        missing = math.ceil(epochs * (1 - 1e-9)) - epochs
        if before == self._drawing or missing <= 1e-9 * epochs:
            return None
        left, noises = 1 - missing, []
        for noise, rate, steps in reversed(history):
            if left > 1e-9 * epochs:
                noises.append(noise)
            left -= rate * steps
        # The least noise of the pass that was left: a record may have been in any of its steps.
        return min(noises), missing


def lacking(sampler: Any, accountant: Any) -> list[tuple[float, float]]:
    """The charges (noise multiplier, rate) that must precede the next release, if ``sampler`` watches passes."""
    before = sampler.lacking(accountant.history) if isinstance(sampler, Passes) else None
    return [before] if before else []


def watched(loader: DataLoader, counted: bool) -> DataLoader:
    """The same loader, its passes watched (see :class:`Passes`); the one handed in stays as it is."""
    found = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    # torch forbids to assign these, as a loader's iterators would not follow; a copy has none yet.
    found.__dict__.update({name: Passes(getattr(loader, name), counted), "_iterator": None, "_unwatched": loader})
    return found


def unwatched(loader: Any) -> Any:
    """The loader that :func:`watched` was given, or the loader itself."""
    return getattr(loader, "__dict__", {}).get("_unwatched", loader)


def passes_of(loader: Any) -> Passes | None:
    """What watches a loader's passes, if anything does."""
    held = (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    return next((order for order in held if isinstance(order, Passes)), None)
