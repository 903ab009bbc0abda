"""Modules rewritten in terms of known functions, where their own forward hides how the parameters are used.

A composition is called as `f(layer, *args, **kwargs)` in place of the layer's forward and gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_COMPOSITIONS: dict[type[nn.Module], Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register_composition(*classes: type[nn.Module]) -> Callable[[F], F]:
    """Registers the decorated function as an equal of these classes' forward."""

    def decorator(function: F) -> F:
        for cls in classes:
            _COMPOSITIONS[cls] = function
        return function

    return decorator


def composition(layer: nn.Module) -> Callable[..., Any] | None:
    """The composition for the layer's exact behaviour, or None."""
    for cls in type(layer).__mro__:
        if cls in _COMPOSITIONS:
            same = type(layer).forward is cls.forward and "forward" not in layer.__dict__
            return _COMPOSITIONS[cls] if same else None
    return None
