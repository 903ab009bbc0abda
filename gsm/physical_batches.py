"""Physical batches: logical batches cut into pieces that fit in memory, with the optimizer told where each one ends.

One release uses all pieces of one logical batch and nothing else. The optimizer is told at the moment a piece is
handed to the training loop, not when a worker process fetches it ahead of time, so an epoch may be left at any point:
what was clipped and not released is forgotten, and enters no later release.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler
from torch.utils.data import DataLoader, Sampler

from gsm import drawn
from gsm.loader import loader_options
from gsm.loss_check import looks_at_the_next

IN_VAIN = (
    "Three iterations in a row over this loader ended before a logical batch did: what they clipped was forgotten, and "
    "nothing was released, so nothing is learned. Does the loop call next(iter(loader)) for every step? Keep one "
    "iterator for a whole pass: each logical batch comes in several pieces."
)


class _Pieces(Sampler[list[int]]):
    """Index lists of at most ``size`` records; ``ends`` says of each piece handed out whether it ends its batch."""

    def __init__(self, batches: Any, size: int) -> None:
        self.batches, self.size = batches, size
        self.ends: deque[bool] = deque()
        self.sizes: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        # A new list for each pass: workers that still fetch for an abandoned pass cannot write into the new one.
        self.ends, self.sizes = deque(), deque()
        return self._cut(self.ends, self.sizes)

    def _cut(self, ends: deque[bool], sizes: deque[int]) -> Iterator[list[int]]:
        for batch in self.batches:
            indices = batch.tolist() if isinstance(batch, torch.Tensor) else list(batch)
            count = max(1, math.ceil(len(indices) / self.size))
            for k in range(count):
                ends.append(k == count - 1)
                piece = indices[k * len(indices) // count : (k + 1) * len(indices) // count]
                sizes.append(len(piece))
                yield piece


def forget_unreleased(optimizer: Any, *, signals: bool) -> None:
    """Make the optimizer forget gradients and sums that were not released, and with ``signals`` what it was told."""
    told = [] if signals else list(optimizer._step_skip_queue)
    optimizer._is_last_step_skipped = False  # or zero_grad would keep the sum, ours and Opacus's
    optimizer.zero_grad()
    optimizer._step_skip_queue[:] = told


class PhysicalBatchLoader(DataLoader):
    """A loader's batches in pieces of at most ``max_physical_batch_size`` records.

    The ordinary loop stays as it is: ``optimizer.step()`` clips and accumulates each piece, and releases at the last.

    Args:
        loader: loader of logical batches, with a batch sampler.
        max_physical_batch_size: largest number of records in memory at a time, > 0.
        optimizer: the DP optimizer that takes one ``step`` per piece.
        lookahead: how many pieces the training loop holds before it takes the step for the first of them: 0 in an
            ordinary loop, 1 behind something that fetches ahead.

    Raises:
        ValueError: a size < 1, or a loader without batches of its own.
        TypeError: an optimizer that is not private.
        RuntimeError: while iterating, if a piece got no ``optimizer.step()`` (see ``lookahead``), or two iterations
            over the loader run at once. Pieces read under ``torch.no_grad()`` need no step.

    Example:
        >>> for x, y in PhysicalBatchLoader(loader, 64, optimizer):
        ...     optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()
    """

    def __init__(self, loader: DataLoader, max_physical_batch_size: int, optimizer: Any, lookahead: int = 0) -> None:
        size: Any = max_physical_batch_size
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"max_physical_batch_size must be at least 1, got {size!r}")
        if getattr(loader, "batch_sampler", None) is None:
            raise ValueError(
                f"max_physical_batch_size needs a torch DataLoader with batches of its own, got {type(loader).__name__}"
            )
        if not hasattr(optimizer, "signal_skip_step"):
            raise TypeError(
                "physical batches need the private optimizer that make_private returned, which joins them in one "
                f"release; got {type(optimizer).__name__}. Without privacy, iterate over the DataLoader itself."
            )
        options = dict(loader_options(loader), generator=loader.generator, collate_fn=loader.collate_fn)
        # This object looks like the loader of logical batches; an inner one, never handed out, fetches the pieces.
        super().__init__(loader.dataset, batch_sampler=loader.batch_sampler, **options)
        self.max_physical_batch_size, self.optimizer, self.lookahead = max_physical_batch_size, optimizer, lookahead
        if hasattr(loader, "sample_rate"):
            self.sample_rate = loader.sample_rate
        self.logical = loader
        self._pieces = _Pieces(loader.batch_sampler, max_physical_batch_size)
        self._inner = DataLoader(loader.dataset, batch_sampler=self._pieces, **options)
        self._pass = self._in_vain = 0  # iterations, and how many in a row ended before a logical batch did

    def __len__(self) -> int:
        """Expected number of pieces per epoch (the exact number is random under Poisson sampling)."""
        batches: Any = self.batch_sampler
        count = len(batches)
        if isinstance(batches, UniformWithReplacementSampler | DistributedUniformWithReplacementSampler):
            size = batches.sample_rate * batches.num_samples
        elif (size := getattr(batches, "batch_size", None)) is None:
            return count
        return max(count, math.ceil(count * size / self.max_physical_batch_size))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._pass += 1
        self._in_vain += 1
        if self._in_vain == 4:
            warnings.warn(IN_VAIN, stacklevel=2)
        current = self._pass
        forget_unreleased(self.optimizer, signals=True)
        batches = iter(self._inner)
        ends = self._pieces.ends
        try:
            for batch in drawn.counted(batches, self._pieces.sizes, self._looked_at):
                self._check(current)
                end = ends.popleft()
                if torch.is_grad_enabled():  # data that is only looked at takes no step
                    self.optimizer.signal_skip_step(do_skip=not end)
                if end or not torch.is_grad_enabled():
                    self._in_vain = 0
                yield batch
        except GeneratorExit:
            # Left half-way. What was told about a piece stays: a step taken for it later must not release it alone.
            if current == self._pass:
                forget_unreleased(self.optimizer, signals=False)
            raise

    def _looked_at(self) -> bool:
        return looks_at_the_next(getattr(self.optimizer, "params", []))

    def _check(self, current: int) -> None:
        if current != self._pass:
            raise RuntimeError(
                "another iteration over this loader was started: finish one before the next, because a logical batch "
                "that is in pieces belongs to one optimizer step"
            )
        waiting = len(self.optimizer._step_skip_queue)
        if waiting > self.lookahead:
            raise RuntimeError(
                f"{waiting} physical batch(es) got no optimizer.step(). With max_physical_batch_size every batch needs "
                "one, an empty batch too (its release is noise, and part of the guarantee); batches that are only "
                "looked at belong under torch.no_grad(). If something between this loader and the loop fetches ahead, "
                "set loader.lookahead to the number of batches it holds."
            )


def logical_batches(loader: Any) -> Any:
    """The loader whose batches ``loader`` hands out in pieces, or ``loader`` itself."""
    return loader.logical if isinstance(loader, PhysicalBatchLoader) else loader


class BatchMemoryManager:
    """Opacus's context manager for physical batches, by :class:`PhysicalBatchLoader`.

    Args:
        data_loader: loader of logical batches.
        max_physical_batch_size: largest number of records in memory at a time, > 0.
        optimizer: the DP optimizer used in the loop.

    Example:
        >>> with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as pieces:
        ...     for x, y in pieces:
        ...         optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()
    """

    def __init__(self, *, data_loader: DataLoader, max_physical_batch_size: int, optimizer: Any) -> None:
        self.data_loader, self.max_physical_batch_size, self.optimizer = data_loader, max_physical_batch_size, optimizer

    def __enter__(self) -> PhysicalBatchLoader:
        return PhysicalBatchLoader(self.data_loader, self.max_physical_batch_size, self.optimizer)

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is not None:  # between a piece and its step, say: whoever goes on begins with a batch of its own
            forget_unreleased(self.optimizer, signals=True)
