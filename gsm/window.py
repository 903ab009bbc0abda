"""What a thread computes from a wrapped model's outputs, recorded until their backward."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor

from gsm.recording import Program, Recording, plain
from gsm.structures import tensors_in


class Window:
    """What one thread computes between forwards and their backward, recorded while some output waits for one."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self.outputs: dict[int, tuple[int, list[int]]] = {}
        """Of each output, by its number in the recording: the batch size, and where the samples may lie."""
        self.batch: dict[int, tuple[int, ...]] = {}
        """What a loader handed out last: the shapes of its tensors, by their numbers."""
        self.records = 0
        """How many records it holds."""
        self.fresh = False
        """No forward has seen it yet."""
        self.in_order: bool | None = None
        """Whether the forwards' samples are the loader's, in its order; None if nobody knows."""

    def load(self, batch: Any, records: int) -> None:
        """Begins anew with a batch of ``records`` that a loader hands out, of which a loss will be looked at."""
        self.pause()
        if self.recording.lost or all(getattr(token, "feeds", False) for token in self.waiting):
            self.waiting.clear()
        if self.waiting:
            return self.open()
        self._clear()
        if records < 2:
            return None
        tensors = [x for x in tensors_in(batch) if plain(x) and x.dim()]
        self.batch = {self.recording.give(x): tuple(x.shape) for x in tensors}
        self.records, self.fresh = records, bool(tensors)
        if tensors:
            self.recording.start()
        return None

    def rows(self, number: int) -> int | None:
        """The dimension in which a tensor of the batch has one row for each record; None if not one alone does."""
        dims = [d for d, n in enumerate(self.batch[number][:2]) if n == self.records]
        return dims[0] if len(dims) == 1 else None

    def layouts(self, program: Program, size: int) -> dict[int, int | None] | None:
        """Of the batch's tensors in ``program`` the :meth:`rows`; None if forwards saw them in another order.

        Args:
            size: how many samples a forward saw.
        """
        found = {n: self.rows(n) for n in program.given if n in self.batch}
        if not found or self.in_order:
            return found if size == self.records else dict.fromkeys(found)
        return None

    def give(self, token: Any, x: Tensor, size: int, dims: list[int]) -> int:
        """Makes ``x`` an output, which waits as long as ``token`` lives; returns its number."""
        self.waiting.add(token)
        number = self.recording.give(x)
        self.outputs[number] = size, dims
        return number

    def done(self, token: Any) -> None:
        """Its output waits no more."""
        self.waiting.discard(token)

    def pause(self) -> None:
        """Records no more, until :meth:`open`."""
        self.recording.stop()

    def renew(self) -> None:
        """Begins anew if no output waits."""
        if self.recording.lost:
            self.waiting.clear()
        known, self.fresh = self.fresh and self.in_order is not None and not self.recording.lost, False
        if not self.waiting and not known:
            self._clear()

    def _clear(self) -> None:
        self.recording.clear()
        self.outputs, self.batch, self.records = {}, {}, 0
        self.fresh, self.in_order = False, None

    def open(self) -> None:
        """Records, if any output waits."""
        if self.waiting:
            self.recording.start()


class _Windows(threading.local):
    def __init__(self) -> None:
        self.window = Window()


_WINDOWS = _Windows()


def window() -> Window:
    """That of this thread."""
    return _WINDOWS.window
