"""Whether a dataset holds a record twice, as far as torch's own ``Subset`` and ``ConcatDataset`` show it.

Clipping bounds what one item of the dataset adds. A record that is several items (oversampling by repeated indices, a
bootstrap, the same dataset concatenated with itself) adds several times the bound, and no gradient shows that.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

REPEATED = (
    "The dataset holds {n} of its {items} items more than once (indices of a Subset that repeat, or a dataset that is "
    "concatenated with itself). Every item is clipped on its own, so a record that is k items contributes up to k "
    "times the bound, and epsilon does not hold for it. Give every record once, or clip all items of a record together "
    "with clipping=UserClipping()."
)


def warn_if_repeated(dataset: Any) -> None:
    """Warns of items that are the same index of the same dataset.

    Example:
        >>> warn_if_repeated(Subset(TensorDataset(torch.randn(5, 3)), [0, 1, 2]))
    """
    if type(dataset) not in (Subset, ConcatDataset):
        return
    found = _places(dataset, {})
    repeated = len(found) - len(np.unique(found))
    if repeated:
        warnings.warn(REPEATED.format(n=repeated, items=len(found)), stacklevel=4)


def _places(dataset: Any, starts: dict[int, tuple[int, int]]) -> np.ndarray:
    """Where each item comes from: a number of its own for every index of every dataset that is not made of others."""
    if type(dataset) is Subset and hasattr(dataset.dataset, "__len__"):
        indices, inner = np.asarray(dataset.indices), _places(dataset.dataset, starts)
        # What takes keys that are no positions is looked at as it is.
        if indices.dtype.kind in "iu" and (np.abs(indices) < len(inner) + (indices < 0)).all():
            return inner[indices]
    if type(dataset) is ConcatDataset:
        return np.concatenate([_places(part, starts) for part in dataset.datasets])
    start, count = starts.setdefault(id(dataset), (sum(n for _, n in starts.values()), len(dataset)))
    return np.arange(start, start + count)
