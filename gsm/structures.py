"""What a model takes and gives: tensors in tuples, lists, dicts, dataclasses, and objects that hold them."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

_DEEPEST = 8


def named_tensors(value: Any) -> dict[str, Tensor]:
    """All tensors of an output, also inside objects (a distribution, say), by the path to them.

    A tensor that is the output itself is called "the model's output".
    """
    found: dict[str, Tensor] = {}
    for name, x in _tensors(value, "", 0, objects=True):
        while name in found:  # the keys 1 and "1"
            name += "'"
        found[name or "the model's output"] = x
    return found


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments, in order; not those inside objects, which nothing here could take apart."""
    return [x for _, x in _tensors(values, "", 0, objects=False)]


def _tensors(value: Any, name: str, depth: int, objects: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the path to them; packed sequences padded (their own have no batch dimension)."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedSequence):
        yield name, pad_packed_sequence(value)[0]
    elif depth <= _DEEPEST and not isinstance(value, (nn.Module, type, str)):
        for key, part in _parts(value, depth, objects):
            yield from _tensors(part, f"{name}.{key}" if name else str(key), depth + 1, objects)


def _parts(value: Any, depth: int, objects: bool) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [f"output {i}" if not depth else str(i) for i in range(len(value))]
        return zip(names, value, strict=True)
    if dataclasses.is_dataclass(value):
        return ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    return getattr(value, "__dict__", {}).items() if objects else ()


def make_known(value: Any) -> Any:
    """Lets torch take apart the dataclasses and the mappings like `UserDict` that occur in ``value``; returns it."""
    if isinstance(value, (Tensor, str, int, float, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        for part in value:
            make_known(part)
    elif isinstance(value, (dict, UserDict)):
        if isinstance(value, UserDict):
            _register(type(value), _flatten_mapping, _unflatten_mapping(type(value)))
        for part in value.values():
            make_known(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _register(type(value), _flatten_dataclass, _unflatten_dataclass(type(value)))
        for field in dataclasses.fields(value):
            make_known(getattr(value, field.name, None))
    return value


def _register(cls: type, flatten: Any, unflatten: Any) -> None:
    if cls not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(cls, flatten, unflatten)


def _flatten_mapping(value: Any) -> tuple[list[Any], Any]:
    return list(value.values()), list(value.keys())


def _unflatten_mapping(cls: type) -> Any:
    return lambda values, keys: cls(dict(zip(keys, values, strict=True)))


def _flatten_dataclass(value: Any) -> tuple[list[Any], Any]:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return [getattr(value, name) for name in names], names


def _unflatten_dataclass(cls: type) -> Any:
    """Without calling ``__init__`` or ``__post_init__``: they may compute, and the fields are all there."""

    def unflatten(values: Any, names: Any) -> Any:
        new: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(new, name, value)
        return new

    return unflatten


def stored(x: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that hold ``x``: itself, or the indices and values of a sparse one."""
    x = x.detach()
    if x.layout is torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return x.ccol_indices(), x.row_indices(), x.values()
    return (x,)
