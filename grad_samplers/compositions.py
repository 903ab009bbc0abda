"""Modules rewritten in terms of known functions, where their own forward hides how the parameters are used.

A composition is called as `f(layer, *args, **kwargs)` in place of the layer's forward and gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_COMPOSITIONS: dict[type[nn.Module] | str, Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register_composition(*classes: type[nn.Module] | str) -> Callable[[F], F]:
    """Registers the decorated function as an equal of these classes' forward.

    A class may be given by its dotted name, where its package need not be installed.
    """

    def decorator(function: F) -> F:
        for cls in classes:
            _COMPOSITIONS[cls] = function
        return function

    return decorator


def composition(layer: nn.Module) -> Callable[..., Any] | None:
    """The composition for the layer's exact behaviour, or None."""
    for cls in type(layer).__mro__:
        function = _COMPOSITIONS.get(cls) or _COMPOSITIONS.get(f"{cls.__module__}.{cls.__qualname__}")
        if function is not None:
            same = type(layer).forward is getattr(cls, "forward", None) and "forward" not in layer.__dict__
            return function if same else None
    return None
