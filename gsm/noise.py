"""Gaussian noise: fast, reproducible from a seed, and the same whatever the number of threads.

A noise part has one method, ``add_(tensors, std, sensitivity)``: it adds independent N(0, std^2) to every entry of
``tensors`` in place. It never sees a gradient before clipping, a layer or a model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Values drawn from one stream: its set-up (about 15 us) must be small beside drawing them (about 400 us).
CHUNK = 1 << 17
# Values per vectorised operation: they stay in the L2 cache, and torch starts no threads of its own below 2^15.
BLOCK = 1 << 15


class Noise(Protocol):
    """What the optimizer needs of its noise."""

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        """Adds N(0, std^2) to every entry, in place. ``sensitivity`` is the l2 sensitivity of ``tensors`` taken
        together."""

    def refresh(self) -> None:
        """Makes sure that no noise drawn before (by an earlier run that is being resumed) can be drawn again."""


class GaussianNoise:
    """Gaussian noise from a seedable generator (not cryptographic: see :class:`gsm.secure_noise.SecureNoise`).

    Up to 2^15 entries come straight from the generator. For more, each call draws a 126-bit key from it; the entries
    of all CPU tensors are numbered through and cut into chunks of 2^17; chunk ``i`` gets its own Mersenne twister
    whose whole state comes from Philox4x64(key, counter ``i``). So the result depends on the generator alone, not on
    how many threads share the work. Tensors on an accelerator use its own generator, seeded from the key.

    Formal guarantee: the entries are pseudo-random normal deviates in the tensors' own precision (Box-Muller on 24-bit
    uniform numbers in float32: no deviate beyond 5.8 standard deviations). An observer who can exploit the gaps between
    floating-point numbers, or predict the generator, is outside of this guarantee and inside that of ``secure_mode``.

    Args:
        generator: the source of randomness; None is torch's global generator, so ``torch.manual_seed`` makes a run
            reproducible.

    Example:
        >>> total = [torch.zeros(3), torch.zeros(2, 2)]
        >>> GaussianNoise(torch.Generator().manual_seed(0)).add_(total, std=1.0, sensitivity=1.0)
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def refresh(self) -> None:
        """From here on the noise comes from fresh randomness of the operating system, whatever was seeded: a resumed
        run must not repeat its noise (the same noise under two different sums cancels out)."""
        self.generator = _twister(np.frombuffer(os.urandom(624 * 4), np.uint32))

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        if std == 0 or not tensors:
            return
        check_dtypes(tensors)
        host = [t for t in tensors if t.device.type == "cpu"]
        if len(host) == len(tensors) and sum(t.numel() for t in host) <= BLOCK and self._on_cpu():
            return self._add_few(host, std)
        key = self._key()
        for dtype in (torch.float32, torch.float64):
            in_chunks([t for t in host if t.dtype == dtype], lambda i, parts: _add_chunk(key, i, parts, std))
        for device in dict.fromkeys(t.device for t in tensors if t.device.type != "cpu"):
            generator = torch.Generator(device).manual_seed(int(key[0]))
            for t in tensors:
                if t.device == device:
                    t.add_(torch.empty_like(t).normal_(generator=generator), alpha=std)

    def _add_few(self, tensors: Sequence[Tensor], std: float) -> None:
        # One draw per tensor, in order: with the same seed the same noise as Opacus's.
        drawn = [torch.empty_like(t).normal_(0.0, std, generator=self.generator) for t in tensors]
        torch._foreach_add_(list(tensors), drawn)

    def _on_cpu(self) -> bool:
        return self.generator is None or self.generator.device.type == "cpu"

    def _key(self) -> Any:
        device = "cpu" if self.generator is None else self.generator.device
        draw = torch.empty(2, dtype=torch.int64, device=device).random_(generator=self.generator)
        return draw.cpu().numpy().astype(np.uint64)

    def __repr__(self) -> str:
        return f"GaussianNoise(generator={self.generator})"


def check_dtypes(tensors: Sequence[Tensor]) -> None:
    """Raises TypeError for sums in low precision: their rounding would undo what the noise hides."""
    for t in tensors:
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Noise is added in float32 or float64, got a sum in {t.dtype}: sum in float32 or better.")


def in_chunks(tensors: Sequence[Tensor], work: Callable[[int, list[Tensor]], None]) -> None:
    """Cuts the entries of ``tensors`` into chunks of :data:`CHUNK` and calls ``work(i, flat_slices)`` on every one,
    on all of torch's threads. ``work`` changes the slices in place."""
    flat = [(t, t if t.is_contiguous() else t.contiguous()) for t in tensors if t.numel()]
    chunks = list(enumerate(_cut([dense.view(-1) for _, dense in flat], CHUNK)))
    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        list(_pool(threads, os.getpid()).map(lambda job: work(*job), chunks))
    else:
        for job in chunks:
            work(*job)
    for t, dense in flat:
        if dense is not t:
            t.copy_(dense)


def in_blocks(parts: Sequence[Tensor], fill: Callable[[int], Tensor], block_size: int) -> Iterator[tuple[Any, Any]]:
    """Goes through flat tensors, up to ``block_size`` entries at a time: yields a list of slices, and as many slices of
    the same sizes with what ``fill(number of entries)`` drew."""
    for group in _cut(parts, block_size):
        sizes = [p.numel() for p in group]
        yield group, fill(sum(sizes)).split(sizes)


def _cut(flat: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of slices of flat tensors, in order, of ``size`` entries together (the last list: up to ``size``)."""
    parts: list[Tensor] = []
    room = size
    for t in flat:
        start = 0
        while start < t.numel():
            n = min(room, t.numel() - start)
            parts.append(t if n == t.numel() else t[start : start + n])
            start, room = start + n, room - n
            if room == 0:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def _add_chunk(key: Any, stream: int, parts: list[Tensor], std: float) -> None:
    philox = np.random.Philox(key=key, counter=[0, 0, stream, 0])
    buffer = torch.empty(BLOCK, dtype=parts[0].dtype)
    if parts[0].dtype == torch.float32 and _layout_is_known():
        generator = _twister(philox.random_raw(312).view(np.uint32))
        fill = lambda n: buffer[:n].normal_(generator=generator)  # noqa: E731
    else:  # numpy's ziggurat: twice as fast as torch in float64, half as fast in float32
        ziggurat = np.random.Generator(philox)
        kind: Any = np.float32 if buffer.dtype == torch.float32 else np.float64

        def fill(n: int) -> Tensor:
            ziggurat.standard_normal(dtype=kind, out=buffer[:n].numpy())
            return buffer[:n]

    for group, drawn in in_blocks(parts, fill, BLOCK):
        torch._foreach_add_(group, drawn, alpha=std)


def _twister(words: np.ndarray[Any, Any]) -> torch.Generator:
    """A CPU generator whose 624-word state is given: torch's own seeding keeps only 32 bits, too few to never
    repeat."""
    state = _blank_state().copy()
    state[8:16].view(np.int32)[:] = 1  # words left before the next refill; seeded
    state[16:24].view(np.uint64)[:] = 0  # position
    state[24 : 24 + 624 * 8].view(np.uint64)[:] = words
    generator = torch.Generator()
    generator.set_state(torch.from_numpy(state))
    return generator


@cache
def _blank_state() -> np.ndarray[Any, Any]:
    return torch.Generator().get_state().numpy()


@cache
def _layout_is_known() -> bool:
    """Whether this version of torch keeps the Mersenne twister's state where :func:`_twister` puts it."""
    words = np.random.SFC64(0).random_raw(312).view(np.uint32)
    reference = np.random.MT19937(0)
    reference.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    try:
        drawn = torch.empty(8, dtype=torch.int64).random_(0, 1 << 24, generator=_twister(words))
    except (RuntimeError, ValueError, IndexError):
        return False
    return drawn.tolist() == (reference.random_raw(8) % (1 << 24)).tolist()


_pool_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool per size and process: threads do not survive a fork."""
    with _pool_lock:
        if (threads, process) not in _pools:
            _pools[threads, process] = ThreadPoolExecutor(threads, thread_name_prefix="noise")
        return _pools[threads, process]
