"""Rules for contractions and distances between a parameter and a tensor that depends on the samples (`gsm.rules`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gsm.known import known_call, layout_of, unresolvable
from gsm.resolve import aligned, plain_tensors, reference
from gsm.tape import Pass
from gsm.tracked import Tracked, apply_to_values, tracked_in

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def rows_of(active: Pass, x: Tensor, weight: Tracked) -> Tensor:
    """`x @ weight.T` as a use of `nn.Linear`."""
    return known_call(active, F.linear, (x, weight), {})


def moved(weight: Tracked, function: Callable[..., Any], *args: Any) -> Tracked:
    """``function`` of a parameter alone."""
    return apply_to_values(function, (weight, *args), {})


def tensordot(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """A contraction with a parameter is a linear layer on what is contracted, flattened."""
    a, b, dims = (*args, *[kwargs.get(name, 2) for name in ("a", "b", "dims")[len(args) :]])[:3]
    tracked, others = tracked_in((a, b), {}), plain_tensors((a, b), {})
    layout = layout_of(active, tracked[0], "tensordot", others[0]) if others else None
    if layout is None:
        return apply_to_values(func, args, kwargs)
    pair = [range(a.dim() - dims, a.dim()), range(dims)] if isinstance(dims, int) else dims
    inner = [[int(d) % x.dim() for d in of] for x, of in zip((a, b), pair, strict=True)]
    outer = [[d for d in range(x.dim()) if d not in of] for x, of in zip((a, b), inner, strict=True)]
    first = isinstance(a, Tracked)
    x, weight = (b, a) if first else (a, b)
    if layout.dim in inner[first]:
        raise unresolvable(tracked, "tensordot", " that contracts the batch")
    kept, made = ([v.shape[d] for d in of] for v, of in ((x, outer[first]), (weight, outer[not first])))
    size = [x.shape[d] for d in inner[first]]
    matrix = moved(weight, torch.permute, (*outer[not first], *inner[not first]))
    matrix = moved(matrix, torch.reshape, (math.prod(made), math.prod(size)))
    y = rows_of(active, x.permute(*outer[first], *inner[first]).reshape(*kept, -1), matrix).view(*kept, *made)
    return y.movedim(tuple(range(len(kept), y.dim())), tuple(range(len(made)))) if first else y


def cdist(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Distances to a parameter's rows (prototypes, inducing points): those of one copy per sample."""
    a, b = (*args, *[kwargs.get(name) for name in ("x1", "x2")[len(args) :]])[:2]
    rest = args[2:], {name: v for name, v in kwargs.items() if name not in ("x1", "x2")}
    tracked = tracked_in((a, b), {})
    where = reference(active, tracked, "cdist", (a, b), {})
    if where is None:
        return apply_to_values(func, args, kwargs)
    (dim, layout, count), first = where, isinstance(a, Tracked)
    x, points = (b, a) if first else (a, b)
    each = dim == -2  # every row is a sample's: it becomes a batch of one
    if each and points.dim() > 2:
        raise unresolvable(tracked, "cdist", " on several sets of points at once")
    copies = aligned(active, points, "cdist", dim - each, layout, count)
    x = x.unsqueeze(-2) if each else x
    out = func(*((copies, x) if first else (x, copies)), *rest[0], **rest[1])
    return (out.squeeze(-1).transpose(-1, -2) if first else out.squeeze(-2)) if each else out
