"""The registry: which function computes the per-sample gradients of which class of layers.

Three readings of the same capture (activations in, output gradients back), one decorator each:

* `register_grad_sampler`: the gradients themselves, `{parameter: [B, *parameter.shape]}`. Needed.
* `register_norm_sampler`: their 2-norms, `{parameter: [B]}`. Optional, derived from the first if absent.
* `register_weighted_sampler`: `{parameter: sum_i weights[i] * grad_i}`. Optional, likewise.

A sampler stands for the exact behaviour of a class: a subclass is covered by its parent's sampler only
if it runs the parent's `forward`, and a layer only if the sampler's `supports` has no objection.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

PerParameter = dict[nn.Parameter, Tensor]
Layer = Any
"""A module, or a light stand-in: samplers only read the parameters and options that they find as attributes."""
GradSampler = Callable[..., PerParameter]
Supports = Callable[[Layer], "str | None"]
F = TypeVar("F", bound=Callable[..., PerParameter])
LayerClass = type | str
"""A class, or the dotted name of one in a package that need not be installed ("transformers.pytorch_utils.Conv1D")."""


@dataclass(frozen=True)
class Sampler:
    """What is known about one class of layers. `norm` and `weighted` may be None: `derive` fills them in."""

    cls: LayerClass
    grad: GradSampler
    norm: GradSampler | None = None
    weighted: GradSampler | None = None
    supports: Supports | None = None


_SAMPLERS: dict[LayerClass, Sampler] = {}


def _each(cls_or_list: LayerClass | Iterable[LayerClass]) -> list[LayerClass]:
    if isinstance(cls_or_list, (type, str)):
        return [cls_or_list]
    classes = list(cls_or_list) if isinstance(cls_or_list, Iterable) else [cls_or_list]
    for cls in classes:
        if not isinstance(cls, (type, str)):
            raise TypeError(f"a sampler is registered for a class (or its dotted name), not for {cls!r}")
    return classes


def register_grad_sampler(
    cls_or_list: LayerClass | Iterable[LayerClass], *, supports: Supports | None = None
) -> Callable[[F], F]:
    """Register the decorated function as the per-sample gradient of a layer class (or of each in a list).

    The function is called as `f(layer, activations, backprops)`: `activations` is the list of the layer's tensor
    inputs, batch first; `backprops` is the gradient of each sample's own loss with respect to the output. It returns
    `{parameter: [B, *parameter.shape]}`. Registering again replaces what was there, norm and weighted samplers
    included, since those belong to the function that is gone.

    Args:
        cls_or_list: class, list of classes, or dotted class names for packages that may be absent.
        supports: `supports(layer)` returns None if the layer's options are covered, else a sentence saying which
            is not. Without it every layer of the class is covered.

    Raises:
        TypeError: if something other than classes or names is given.

    Example:
        >>> @register_grad_sampler(Scale)                         # forward: x * self.weight, x [B, d]
        ... def scale_grad_sample(layer, activations, backprops):
        ...     return {layer.weight: activations[0] * backprops}
    """
    classes = _each(cls_or_list)

    def decorator(function: F) -> F:
        for cls in classes:
            _SAMPLERS[cls] = Sampler(cls, grad=function, supports=supports)
        return function

    return decorator


def _register_part(part: str, cls_or_list: LayerClass | Iterable[LayerClass]) -> Callable[[F], F]:
    classes = _each(cls_or_list)

    def decorator(function: F) -> F:
        changes: dict[str, Any] = {part: function}
        for cls in classes:
            if cls not in _SAMPLERS:
                name = cls if isinstance(cls, str) else cls.__qualname__
                raise ValueError(
                    f"no grad sampler is registered for {name}: register_grad_sampler({name}) comes first, "
                    f"the {part} sampler only makes it faster"
                )
            _SAMPLERS[cls] = dataclasses.replace(_SAMPLERS[cls], **changes)
        return function

    return decorator


def register_norm_sampler(cls_or_list: LayerClass | Iterable[LayerClass]) -> Callable[[F], F]:
    """Register `f(layer, activations, backprops) -> {parameter: norms [B]}` for classes that have a grad sampler.

    Raises:
        ValueError: if a class has no grad sampler yet.
    """
    return _register_part("norm", cls_or_list)


def register_weighted_sampler(cls_or_list: LayerClass | Iterable[LayerClass]) -> Callable[[F], F]:
    """Register `f(layer, activations, backprops, weights) -> {parameter: sum_i weights[i] * grad_i}`.

    Raises:
        ValueError: if a class has no grad sampler yet.
    """
    return _register_part("weighted", cls_or_list)


def unregister(cls: LayerClass) -> Sampler:
    """Remove the sampler of a class and return it. Raises KeyError if there is none."""
    for key in (cls, _dotted(cls)):
        if key in _SAMPLERS:
            return _SAMPLERS.pop(key)
    raise KeyError(f"no sampler is registered for {_dotted(cls)}")


def registered() -> dict[type, Sampler]:
    """All samplers by class. Those of packages that are not imported (yet) are not among them."""
    found: dict[type, Sampler] = {}
    for key, sampler in _SAMPLERS.items():
        cls = key if isinstance(key, type) else _imported(key)
        if cls is not None:
            found[cls] = sampler
    return found


def _dotted(cls: LayerClass) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def _imported(dotted: str) -> type | None:
    module, _, name = dotted.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def sampler_of(cls: type) -> Sampler | None:
    """The sampler registered for exactly this class, or None."""
    return _SAMPLERS.get(cls) or _SAMPLERS.get(_dotted(cls))


def _same_behaviour(layer: object, cls: type) -> bool:
    """Whether calling `layer` runs `cls.forward`: not overridden in a subclass, nor replaced on the instance."""
    if "forward" in getattr(layer, "__dict__", {}):
        return False
    mine = type(layer)
    return all(getattr(mine, name, None) is getattr(cls, name, None) for name in ("forward", "__call__"))


def lookup(layer: nn.Module) -> Sampler | None:
    """The sampler for the layer's exact behaviour, or None. Its options are `reason_unsupported`'s business.

    Example:
        >>> lookup(nn.Linear(2, 3)).cls
        <class 'torch.nn.modules.linear.Linear'>
    """
    for cls in type(layer).__mro__:
        sampler = sampler_of(cls)
        if sampler is not None and _same_behaviour(layer, cls):
            return sampler
    return None


def reason_unsupported(layer: nn.Module) -> str | None:
    """None if the registered sampler covers this layer with its options, else a sentence saying why not."""
    name = type(layer).__qualname__
    sampler = lookup(layer)
    if sampler is None:
        parents: Sequence[type] = [cls for cls in type(layer).__mro__ if sampler_of(cls) is not None]
        if not parents:
            return f"no sampler is registered for {name}"
        return f"{name} does not run the forward of {parents[0].__qualname__}, whose sampler would otherwise cover it"
    return None if sampler.supports is None else sampler.supports(layer)
