"""A clipping part and a noise part that remember what they did, for whoever may look at the data itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gsm.clipping import Clipping
from gsm.noise import Noise


class Measured:
    """A noise part that measures what it is given, and in ``clipping`` a clipping part that tells its weights.

    What ``values`` holds depends on the data and was not made private: it is for debugging, not for publication.

    Args:
        clipping: class of the clipping part.
        noise: the noise part that does the work.
        measure: whether to measure signal and noise as well, which takes a copy of the sum.
    """

    def __init__(self, clipping: type[Clipping], noise: Noise, measure: bool) -> None:
        self.values: dict[str, float] = {}
        self.noise, self.measure = noise, measure
        self.clipping = clipping()
        weights_of = self.clipping.weights

        def weights(squared_norms: Tensor) -> Tensor:
            found = weights_of(squared_norms)
            if found.numel():
                self.values.update(
                    med_clip=found.median().item(), max_clip=found.max().item(), min_clip=found.min().item()
                )
            return found

        self.clipping.weights = weights  # type: ignore[method-assign]

    def add_(self, tensors: Sequence[Tensor], std: float, sensitivity: float) -> None:
        if not self.measure:
            return self.noise.add_(tensors, std, sensitivity)
        before = [t.clone() for t in tensors]
        self.noise.add_(tensors, std, sensitivity)
        signal = _norm(before)
        noise = _norm([t - b for t, b in zip(tensors, before, strict=True)])
        self.values.update(signal=signal, noise=noise, snr=signal / noise if noise else math.inf)

    def refresh(self) -> None:
        self.noise.refresh()


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([t.norm() for t in tensors]).norm().item()
