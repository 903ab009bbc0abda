"""Logical batches for a `Trainer`: Poisson samples, dealt to accumulation steps and cut to the device batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler

from gsm.sampling import PoissonSampler


class AccumulationSteps(Sampler[list[int]]):
    """Poisson batches, each dealt out in exactly `accumulation` lists of indices (some may be empty).

    So many iterations of the `Trainer`'s inner loop are one release, whatever size the Poisson batch has.
    """

    def __init__(self, sampler: PoissonSampler, accumulation: int) -> None:
        self.sampler, self.accumulation = sampler, accumulation

    def __len__(self) -> int:
        return len(self.sampler) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            for k in range(self.accumulation):
                yield batch[k * len(batch) // self.accumulation : (k + 1) * len(batch) // self.accumulation]


class CollateInPieces:
    """A collate function applied to pieces of at most `size` records: a list of batches, empty for no records."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], size: int) -> None:
        self.collate_fn, self.size = collate_fn, size

    def __call__(self, records: list[Any]) -> list[Any]:
        count = math.ceil(len(records) / self.size)
        cuts = [k * len(records) // count for k in range(count + 1)] if count else []
        return [self.collate_fn(records[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
