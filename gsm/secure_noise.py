"""Noise for ``secure_mode``: a cryptographic stream, and sums that float arithmetic cannot betray."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gsm.keystream import NormalStream, block, in_blocks, shaped
from gsm.noise import check_dtypes

# The grid is this much finer than the sensitivity, all coordinates together; the noise is enlarged by as much.
_SLACK = 2.0**-16
# Doubles around it are whole numbers, up to 2^51 away.
_WHOLE = torch.tensor(1.5 * 2.0**52, dtype=torch.float64)


class SecureNoise:
    """Gaussian noise from AES-128, added on a grid that depends on nothing private.

    Bits: each call has its own 128-bit key from the operating system (``os.urandom``) and takes the keystream of AES in
    Galois/counter mode (:class:`gsm.keystream.NormalStream`). No key outlives its call: nothing can be seeded,
    pickled, inherited by a forked process or replayed after a resume.

    Floats: reachable outputs of ``fl(x + noise)`` depend on ``x``, which breaks textbook mechanisms (Mironov 2012,
    "On significance of the least significant bits for differential privacy"; Jin et al. 2022, "Are we there yet?
    Timing and floating-point attacks on differential privacy systems", for Box-Muller, polar and ziggurat samplers;
    Haney et al. 2022, "Precision-based attacks and interval refining"). Here both are rounded to integers first: the
    result is ``grid * rint(rint(x / grid) + z / grid)``, computed exactly in float64 as long as both together stay
    below ``2^51 grid``. ``grid`` is a power of two that depends on ``std``, ``sensitivity`` and the number of entries
    ``d`` only, so every output lies on one fixed lattice whatever the data. What follows (division by the expected
    batch size, a cast) is post-processing.

    Formal guarantee: if ``z`` were exactly Gaussian, ``rint(rint(x/grid) + z/grid)`` is post-processing of the Gaussian
    mechanism on ``rint(x/grid)``. Rounding ``x`` adds at most ``grid * sqrt(d) <= 2^-16 sensitivity`` to the
    sensitivity, and ``std`` is enlarged by the factor ``1 + 2^-16`` to cover it.

    Residual risk: ``z`` is Box-Muller in float64 from 63-bit radii and 64-bit angles. Its rounding (about 2^-51)
    moves the cells' boundaries by about 2^-25 of their width for a million entries, which is not proven harmless but
    far below what float noise leaks; it has no deviate beyond 9.3 standard deviations (probability 1e-20). There is
    no rejection loop, so the running time does not depend on the values drawn. Tensors on an accelerator get noise
    drawn on the CPU.

    Example:
        >>> total = [torch.zeros(3)]
        >>> SecureNoise().add_(total, std=1.0, sensitivity=1.0)
    """

    def refresh(self) -> None:
        """Nothing to do: no key outlives the call it was made for."""

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        """Adds N(0, std^2), in place, on the grid described above."""
        entries = sum(t.numel() for t in tensors)
        if std == 0 or not entries:
            return
        check_dtypes(tensors)
        grid = grid_for(std, sensitivity, entries)
        scaled = std * (1 + _SLACK) / grid
        host = [t.cpu() for t in tensors]
        stream = NormalStream(os.urandom(16), torch.float64, scaled)
        size = block(torch.float64)
        room = torch.empty(min(size, entries), dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            for parts, n in in_blocks([t for t in host if t.dtype == dtype], size):
                _add_on_grid(parts, stream.draw(n), grid, room)
        for t, there in zip(tensors, host, strict=True):
            if there is not t:
                t.copy_(there)

    def __repr__(self) -> str:
        return "SecureNoise()"


def grid_for(std: float, sensitivity: float, entries: int) -> float:
    """The lattice constant: the largest power of two up to ``2^-16 min(std, sensitivity) / sqrt(entries)``."""
    return 2.0 ** math.floor(math.log2(_SLACK * min(std, sensitivity) / math.sqrt(entries)))


def _add_on_grid(parts: list[Tensor], noise: Tensor, grid: float, room: Tensor) -> None:
    """``parts`` become ``grid * (rint(part / grid) + noise)``, rounded to whole steps; ``room`` has as many entries.

    Both roundings happen by adding :data:`_WHOLE`, behind whose last binary place nothing remains.
    """
    steps = room[: len(noise)]
    here = shaped(steps, parts)
    torch._foreach_copy_(here, parts)
    torch.add(_WHOLE, steps, alpha=1.0 / grid, out=steps)
    steps.add_(noise)
    torch.add(_WHOLE * -grid, steps, alpha=grid, out=steps)  # exact: grid is a power of two
    torch._foreach_copy_(parts, here)
