"""What a thread computes from a wrapped model's outputs, recorded until their backward."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor

from gsm.recording import Recording


class Window:
    """What one thread computes between forwards and their backward, recorded while some output waits for one."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self.outputs: dict[int, tuple[int, list[int]]] = {}
        """Of each output, by its number in the recording: the batch size, and where the samples may lie."""

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
        if not self.waiting:
            self.recording.clear()
            self.outputs = {}

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
