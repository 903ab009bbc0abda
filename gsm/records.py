"""Records that a data set holds several times: each copy is drawn and clipped by itself."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset


def check_repeated(dataset: Any) -> None:
    """Warns where torch's own containers hold a record k times; it then moves a sum by k bounds, as a group of k does.

    Copies that a data set makes by itself are not seen.
    """
    most = most_copies(dataset)
    if most > 1:
        warnings.warn(
            f"The data set holds a record {most} times (repeated indices of a Subset, or one data set twice in a "
            "ConcatDataset). Every copy is drawn and clipped by itself, so epsilon is for a copy, not for the record. "
            "To give a class more weight, weight its losses record by record, or clip all copies of a record together "
            "with clipping=UserClipping().",
            stacklevel=5,
        )


def most_copies(dataset: Any) -> int:
    """How often the most frequent record is in a data set, as far as ``Subset`` and ``ConcatDataset`` tell."""
    if isinstance(dataset, Subset):
        inside, indices = most_copies(dataset.dataset), dataset.indices
        if isinstance(indices, range) or not len(indices):
            return inside
        return inside * int(np.unique(indices, return_counts=True)[1].max())
    if isinstance(dataset, ConcatDataset):
        parts = [id(part) for part in dataset.datasets]
        return max(parts.count(id(part)) * most_copies(part) for part in dataset.datasets)
    return 1
