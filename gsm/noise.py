"""Gaussian noise: fast, reproducible from a seed, and the same whatever the number of threads.

A noise part has one method, ``add_(tensors, std, sensitivity)``: it adds independent N(0, std^2) to every entry of
``tensors`` in place. It never sees a gradient before clipping, a layer or a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from gsm.generators import Used
from gsm.keystream import NormalStream, block, in_blocks, shaped

#: Up to so many entries come straight from torch's generator.
FEW = 1 << 15


class Noise(Protocol):
    """What the optimizer needs of its noise."""

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        """Adds N(0, std^2) to every entry, in place. ``sensitivity`` is the l2 sensitivity of ``tensors`` taken
        together."""

    def refresh(self) -> None:
        """Makes sure that no noise drawn before (by an earlier run that is being resumed) can be drawn again."""


class GaussianNoise:
    """Gaussian noise from a seedable generator (what ``secure_mode`` adds is in :mod:`gsm.secure_noise`).

    Up to 2^15 entries come straight from the generator, the same as Opacus draws. For more, each call draws a 126-bit
    key from it, and the entries of all CPU tensors, numbered through, come from that key's AES keystream
    (:class:`gsm.keystream.NormalStream`). So the result depends on the generator alone, not on how many threads share
    the work. Tensors on an accelerator use its own generator, seeded from the key.

    Formal guarantee: the entries are pseudo-random normal deviates in the tensors' own precision (Box-Muller on 31-bit
    uniform numbers in float32: no deviate beyond 6.6 standard deviations). An observer who can exploit the gaps between
    floating-point numbers, or predict the generator, is outside of this guarantee and inside that of ``secure_mode``.

    Numbers are never used twice: if something seeds the generator anew between two releases, the second is an error.
    Nor are those that drew the batches, or another optimizer's noise, where a :class:`gsm.PrivacyEngine` lets them
    share :attr:`used`.

    Args:
        generator: the source of randomness; None is torch's global generator, so ``torch.manual_seed`` makes a run
            reproducible.

    Example:
        >>> total = [torch.zeros(3), torch.zeros(2, 2)]
        >>> GaussianNoise(torch.Generator().manual_seed(0)).add_(total, std=1.0, sensitivity=1.0)
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator
        #: The random numbers that may not come again.
        self.used = Used()
        self._refreshed = False
        self._process = os.getpid()

    def refresh(self) -> None:
        """From here on every key comes from the operating system, whatever is seeded: a resumed run must not repeat its
        noise (the same noise under two different sums cancels out)."""
        self._refreshed = True

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        if std == 0 or not tensors:
            return
        check_dtypes(tensors)
        if os.getpid() != self._process:
            self.refresh()  # a forked process inherits the generator's state, and would repeat its parent's noise
        with self._never_again():
            self._add(tensors, std)

    def _add(self, tensors: Sequence[Tensor], std: float) -> None:
        host = [t for t in tensors if t.is_cpu]
        if len(host) == len(tensors) and sum(t.numel() for t in host) <= FEW and self._draws_itself():
            return self._add_few(host, std)
        for dtype in (torch.float32, torch.float64):
            own = [t for t in host if t.dtype == dtype]
            if own:
                stream = NormalStream(self._key(), dtype, std)
                for parts, entries in in_blocks(own, block(dtype)):
                    torch._foreach_add_(parts, shaped(stream.draw(entries), parts))
        for device in dict.fromkeys(t.device for t in tensors if not t.is_cpu):
            generator = torch.Generator(device).manual_seed(int.from_bytes(self._key()[:8], "little") >> 1)
            for t in tensors:
                if t.device == device:
                    t.add_(torch.empty_like(t).normal_(generator=generator), alpha=std)

    @contextmanager
    def _never_again(self) -> Iterator[None]:
        """Raises RuntimeError if the generator is about to give numbers that it gave in an earlier call."""
        if self._refreshed:
            yield
            return
        generator = self.generator or torch.default_generator
        if self.used.holds(generator):
            raise RuntimeError(REPEATED)
        yield
        self.used.add(generator)

    def _add_few(self, tensors: Sequence[Tensor], std: float) -> None:
        # One draw per tensor, in order: with the same seed the same noise as Opacus's.
        drawn = [torch.empty_like(t).normal_(0.0, std, generator=self.generator) for t in tensors]
        torch._foreach_add_(list(tensors), drawn)

    def _draws_itself(self) -> bool:
        return not self._refreshed and (self.generator is None or self.generator.device.type == "cpu")

    def _key(self) -> bytes:
        if self._refreshed:
            return os.urandom(16)
        device = "cpu" if self.generator is None else self.generator.device
        words = torch.empty(2, dtype=torch.int64, device=device).random_(generator=self.generator)
        return words.cpu().numpy().tobytes()

    def __repr__(self) -> str:
        return f"GaussianNoise(generator={self.generator})"


REPEATED = (
    "The generator of the noise is where it was at an earlier release: the same noise would be added again, and the "
    "difference of the two releases would show the data without any. Something seeds it anew (torch.manual_seed in "
    "the model's forward or in the training loop, a training in another thread?). Seed once, before the training; for "
    "fixed random numbers inside a model use a torch.Generator of their own. Or another generator was given the same "
    "seed: the one that draws the batches, whose numbers would tell from the noise who is in them, or another "
    "optimizer's. Give every generator a seed of its own."
)


def check_dtypes(tensors: Sequence[Tensor]) -> None:
    """Raises TypeError for sums in low precision: their rounding would undo what the noise hides."""
    low = {t.dtype for t in tensors} - {torch.float32, torch.float64}
    if low:
        raise TypeError(f"Noise is added in float32 or float64, got a sum in {low.pop()}: sum in float32 or better.")
