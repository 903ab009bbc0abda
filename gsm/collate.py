"""Batches of nobody: an empty batch has the structure of a full one, with zero rows.

Poisson sampling sometimes draws no record at all. Such a batch must be trained on like any other (its release is
noise alone; to skip it would tell that it was empty), and must not be filled with made-up records, whose gradients
would be a contribution of nobody. So it is derived from the collate function itself: collate the first record once
alone and once twice, see what grew from one row to two, and cut that to zero.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def fetch(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The records at ``indices``, fetched as torch's own loader fetches them."""
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(list(indices))
    return [dataset[i] for i in indices]


def empty_like(one: Any, two: Any, path: str = "batch") -> Any:
    """A batch of zero records, from the same record collated once (``one``) and twice (``two``).

    Args:
        one, two: nested mappings, sequences, named tuples, dataclasses, tensors, arrays, numbers, strings, None.
        path: where in the batch this is, for the error message.

    Returns:
        The structure of ``one`` and its types. Every tensor dimension that grew is 0; a list that grew is empty; a
        number or tensor that doubled (a count of records) is 0; what did not change is kept.

    Raises:
        TypeError: a type without rows, or a number whose value for no record cannot be known; names the place.
    """
    if one is None or isinstance(one, str | bytes | bool | torch.dtype | torch.device):
        return one
    if isinstance(one, torch.Tensor) or isinstance(one, np.ndarray):
        return _empty_array(one, two, path)
    if isinstance(one, numbers.Number):
        return _empty_number(one, two, path)
    if isinstance(one, Mapping):
        return _rebuild_mapping(one, {k: empty_like(one[k], two[k], f"{path}[{k!r}]") for k in one})
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return type(one)()  # one entry per record
        items = [empty_like(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True))]
        return type(one)(*items) if hasattr(one, "_fields") else type(one)(items)
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        result = copy.copy(one)
        for field in dataclasses.fields(one):
            value = empty_like(getattr(one, field.name), getattr(two, field.name), f"{path}.{field.name}")
            object.__setattr__(result, field.name, value)
        return result
    raise TypeError(
        f"{path} is a {type(one).__name__}: an empty batch of that type cannot be made. Return tensors, lists, dicts, "
        "tuples, named tuples or dataclasses of these from collate_fn."
    )


def _empty_array(one: Any, two: Any, path: str) -> Any:
    if one.ndim != two.ndim:
        raise TypeError(f"{path} has shape {tuple(one.shape)} for one record and {tuple(two.shape)} for two")
    grown = tuple(slice(0, 0) if a != b else slice(None) for a, b in zip(one.shape, two.shape, strict=True))
    if any(s.stop == 0 for s in grown):
        rows = one[grown]  # a copy, for a view would keep the record alive
        return rows.copy() if isinstance(rows, np.ndarray) else rows.clone()
    counts = one.dtype.kind in "iuf" if isinstance(one, np.ndarray) else one.dtype != torch.bool
    return one * 0 if counts and bool((one + one == two).all()) else copy.deepcopy(one)


def _empty_number(one: Any, two: Any, path: str) -> Any:
    if one == two:
        return one
    if one + one == two:
        return type(one)(0)
    raise TypeError(f"{path} is {one} for one record and {two} for two: its value for an empty batch is unknown")


def _rebuild_mapping(like: Mapping, items: dict) -> Any:
    if type(like) is dict:
        return items
    result = copy.copy(like)  # keeps what else it carries (a default factory, a tokenizer's encodings)
    for key, value in items.items():
        result[key] = value  # type: ignore[index]
    return result


class CollateWithEmpty:
    """A collate function that also answers for an empty list of records, even the very first time.

    Args:
        collate_fn: the loader's own collate function.
        dataset: where to find one record to learn the structure from, when the first empty batch comes.

    Example:
        >>> collate = CollateWithEmpty(default_collate, TensorDataset(torch.randn(10, 3)))
        >>> collate([])[0].shape
        torch.Size([0, 3])
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], dataset: Any) -> None:
        self.collate_fn, self.dataset = collate_fn, dataset
        self._empty: Any = None
        self._known = False

    def __call__(self, records: list[Any]) -> Any:
        if len(records):
            return self.collate_fn(records)
        if not self._known:
            self._empty, self._known = self._learn(), True
        return copy.deepcopy(self._empty)  # the caller may change it in place

    def _learn(self) -> Any:
        try:
            # Fetched anew for each call: collate functions may take their records apart.
            one, two = self.collate_fn(fetch(self.dataset, [0])), self.collate_fn(fetch(self.dataset, [0, 0]))
        except Exception as error:
            raise RuntimeError(
                "Poisson sampling drew an empty batch, and collate_fn failed on the first record alone, from which "
                f"the structure of an empty batch is learned: {type(error).__name__}: {error}"
            ) from error
        return empty_like(one, two)
