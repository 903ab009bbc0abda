"""What a model takes and gives: tensors in tuples, lists, dicts, dataclasses, and objects that hold them."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

_DEEPEST = 8


def named_tensors(value: Any, name: str = "", depth: int = 0) -> dict[str, Tensor]:
    """All tensors of an output, also inside objects (a distribution, say), by the path to them.

    Packed sequences are padded. A tensor that is the output itself is called "the model's output".
    """
    if isinstance(value, Tensor):
        return {name or "the model's output": value}
    if isinstance(value, PackedSequence):  # its own tensors have no batch dimension, or depend on all lengths
        return {name or "the model's output": pad_packed_sequence(value)[0]}
    if depth > _DEEPEST or isinstance(value, (nn.Module, type)):
        return {}
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [f"output {i}" if not depth else str(i) for i in range(len(value))]
        items = zip(names, value, strict=True)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    else:
        items = getattr(value, "__dict__", {}).items()
    found: dict[str, Tensor] = {}
    for key, part in items:
        found |= named_tensors(part, f"{name}.{key}" if name else str(key), depth + 1)
    return found


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
