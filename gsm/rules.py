"""What each function does with the batch when a parameter meets a tensor that depends on the samples.

`RULES` maps a function's name (without underscores: `add`, `radd`, `iadd`, `add_` ... are spelled out) to its rule.
Adding a function that broadcasts is adding its name to `BROADCASTING`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grad_samplers.attention import multi_head_attention
from gsm.contractions import cdist, moved, rows_of, tensordot
from gsm.known import known_call, layout_of, unresolvable
from gsm.layout import Layout, Rows, Untold
from gsm.resolve import aligned, broadcast, expanded, plain_tensors, reference
from gsm.tape import Pass
from gsm.tracked import Tracked, apply_to_values, plain, tracked_in

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

BROADCASTING = frozenset(
    "add radd iadd sub rsub isub subtract mul rmul imul multiply div rdiv idiv truediv rtruediv itruediv true_divide "
    "divide floor_divide pow rpow ipow float_power maximum minimum fmax fmin where lerp addcmul addcdiv clamp clip "
    "clamp_min clamp_max eq ne lt le gt ge logaddexp atan2 fmod remainder hypot xlogy cat concat concatenate stack "
    "scaled_dot_product_attention cosine_similarity pairwise_distance linalg_vecdot "
    "broadcast_tensors".split()
)


def _pure_unless_batched(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs, x: Tensor) -> bool:
    tracked = tracked_in(args, kwargs)
    return layout_of(active, tracked[0], func.__name__, x) is None


def matmul(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Products with a matrix or vector parameter are linear layers; with a stack of matrices, batched products."""
    left: Any = args[0]
    right: Any = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    if func.__name__ == "__rmatmul__":
        left, right = right, left
    tracked = tracked_in((left, right), {})
    others = plain_tensors((left, right), {})
    if not others or all(layout_of(active, tracked[0], func.__name__, x) is None for x in others):
        return apply_to_values(torch.matmul, (left, right), {})
    if isinstance(right, Tracked):
        if right.dim() == 2:
            return rows_of(active, left, moved(right, torch.t))
        if right.dim() == 1:
            return rows_of(active, left, moved(right, torch.unsqueeze, 0)).squeeze(-1)
    elif left.dim() == 2 and right.dim() >= 2:
        return rows_of(active, right.transpose(-1, -2), left).transpose(-1, -2)
    elif left.dim() == 1 and right.dim() >= 2:
        return rows_of(active, right.transpose(-1, -2), moved(left, torch.unsqueeze, 0)).squeeze(-1)
    elif left.dim() <= 2 and right.dim() == 1:
        raise unresolvable(tracked, func.__name__, " with a vector that holds the batch")
    return _stacked_matmul(active, func, left, right)


def _stacked_matmul(active: Pass, func: Callable[..., Any], left: Any, right: Any) -> Tensor:
    tracked = tracked_in((left, right), {})
    where = reference(active, tracked, func.__name__, (left, right), {})
    assert where is not None
    dim, layout, count = where
    if dim == -2 and isinstance(right, Tracked) and left.dim() == right.dim() == 3 and len(left) == len(right):
        return torch.stack([rows_of(active, x, _piece_t(right, i)) for i, x in enumerate(left.unbind(0))])
    if dim >= -2:
        raise unresolvable(tracked, func.__name__, " that contracts or mixes the batch")
    pair = [
        aligned(active, v, func.__name__, dim, layout, count) if isinstance(v, Tracked) else v for v in (left, right)
    ]
    return torch.matmul(*pair)


def _piece_t(stack: Tracked, i: int) -> Tracked:
    """Two moves, by which it is known that the pieces lie apart: their norms add up, and no stack of them is made."""
    return moved(moved(stack, torch.select, 0, i), torch.t)


def grouped_mm(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Rows sorted by expert times the expert's matrix: one linear layer per expert, on its own rows."""
    x, weight, offs, *rest = _named(("input", "mat2", "offs"), ("self", "weight", "offs"), args, kwargs)
    tracked = tracked_in(args, kwargs)
    if not isinstance(weight, Tracked) or isinstance(x, Tracked) or x.dim() != 2 or weight.dim() != 3 or any(rest):
        raise unresolvable(tracked, func.__name__, " in an unusual form")
    ends = offs.tolist()
    pieces = [
        rows_of(active, x[start:end], _piece_t(weight, i))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    if ends[-1] < x.shape[0]:
        pieces.append(x.new_zeros(x.shape[0] - ends[-1], weight.shape[-1]))
    return torch.cat(pieces)


def _named(one: tuple[str, ...], other: tuple[str, ...], args: Args, kwargs: Kwargs) -> list[Any]:
    """Arguments in order, whichever of two names each goes by, then what is left over."""
    values, left = list(args), dict(kwargs)
    for a, b in zip(one[len(values) :], other[len(values) :], strict=True):
        values.append(left.pop(a, left.pop(b, None)))
    return values + [v for v in left.values() if v is not None]


def addmm(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`bias + x @ weight` (transformers' Conv1D)."""
    tracked = tracked_in(args, kwargs)
    if len(args) != 3 or kwargs or not isinstance(args[2], Tracked) or isinstance(args[1], Tracked):
        if not any(layout_of(active, tracked[0], "addmm", x) is not None for x in plain_tensors(args, kwargs)):
            return apply_to_values(func, args, kwargs)
        raise unresolvable(tracked, "addmm", " with scales or in an unusual place")
    bias, x, weight = args
    if bias.dim() == 2 and bias.shape[0] == 1:  # bias.unsqueeze(0), as it is often written
        bias = moved(bias, torch.squeeze, 0) if isinstance(bias, Tracked) else bias.squeeze(0)
    if bias.shape != weight.shape[1:]:
        product = rows_of(active, x, moved(weight, torch.t))
        return broadcast(active, torch.add, (bias, product), {}) if isinstance(bias, Tracked) else bias + product
    return known_call(active, F.linear, (x, moved(weight, torch.t), bias), {})


def einsum(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """The batch's letter is added to every parameter's subscripts."""
    equation, operands = (
        args[0],
        list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:]),
    )
    tracked = tracked_in(tuple(operands), {})
    where = reference(active, tracked, "einsum", tuple(operands), {})
    if where is None:
        return apply_to_values(torch.einsum, (equation, *operands), {})
    equation = equation.replace(" ", "")
    if "..." in equation or where[1].flat or "->" not in equation:
        raise unresolvable(tracked, "einsum", f" with the equation {equation!r}")
    inputs, output = equation.split("->")
    subscripts = inputs.split(",")
    depends = next(
        i
        for i, x in enumerate(operands)
        if not isinstance(x, Tracked)
        and x.dim() == len(subscripts[i])
        and layout_of(active, tracked[0], "einsum", x) is not None
    )
    letter = subscripts[depends][where[0]]
    if letter not in output or any(letter in subscripts[i] for i, x in enumerate(operands) if isinstance(x, Tracked)):
        raise unresolvable(tracked, "einsum", f" with the equation {equation!r}, which contracts the batch")
    subscripts = [letter + s if isinstance(x, Tracked) else s for s, x in zip(subscripts, operands, strict=True)]
    operands = [expanded(active, x) if isinstance(x, Tracked) else x for x in operands]
    return torch.einsum(",".join(subscripts) + "->" + output, *operands)


def _sizes(values: Args) -> list[int]:
    return list(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple, torch.Size)) else list(values)


def _grown(
    active: Pass, func: Callable[..., Any], target: Tracked, sizes: list[int]
) -> tuple[Tensor, Layout | Rows] | None:
    """`target` with one copy per sample where `sizes` asks for a batch, or None if it asks for none."""
    layout = layout_of(active, target, func.__name__, torch.empty(sizes, device="meta"))
    lead = len(sizes) - target.dim()
    if layout is None or (layout.dim >= lead and target.shape[layout.dim - lead] != 1):
        return None
    if layout.flat:
        raise unresolvable([target], func.__name__, " to batch and positions at once")
    return aligned(active, target, func.__name__, layout.dim - len(sizes), layout), layout


def expand(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`token.expand(B, -1, -1)`, `expand_as`, `broadcast_to`."""
    target = args[0]
    if not isinstance(target, Tracked):  # x.expand_as(parameter): only its shape matters
        return func(*[plain(a) for a in args], **kwargs)
    others = args[1:] or tuple(kwargs.values())
    sizes = list(others[0].shape) if isinstance(others[0], Tensor) else _sizes(others)
    lead = len(sizes) - target.dim()
    sizes = [target.shape[i - lead] if n == -1 else n for i, n in enumerate(sizes)]
    grown = _grown(active, func, target, sizes)
    return apply_to_values(torch.broadcast_to, (target, sizes), {}) if grown is None else grown[0].expand(sizes)


def repeat(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`token.repeat(B, 1, 1)`."""
    target = args[0]
    repeats = _sizes(args[1:] or tuple(kwargs.values()))
    lead = len(repeats) - target.dim()
    grown = _grown(
        active, func, target, [n * (target.shape[i - lead] if i >= lead else 1) for i, n in enumerate(repeats)]
    )
    if grown is None:
        return apply_to_values(func, args, kwargs)
    copies, layout = grown
    repeats[layout.dim] = 1
    return copies.repeat(repeats)


def repeat_interleave(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`token.repeat_interleave(B, dim=0)`; anything else is a function of the parameter alone."""
    target, times = args[0], args[1] if len(args) > 1 else kwargs.get("repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if isinstance(times, int) and dim is not None and target.shape[dim] == 1:
        sizes = list(target.shape)
        sizes[dim] = times
        return expand(active, torch.broadcast_to, (target, sizes), {})
    return apply_to_values(func, args, kwargs)


def getitem(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`table[ids]` with ids that depend on the samples is an embedding."""
    target, index = args
    if not isinstance(target, Tracked):
        return func(plain(target), plain(index))
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [i for i in parts if isinstance(i, Tensor) and i.dim()]
    try:
        batched = [active.layout(f"{target.gsm_name}:getitem", i) is not None for i in tensors]
    except Untold:  # entries picked for rows in an order of their own: that order is known where they meet the rows
        return apply_to_values(func, args, kwargs)
    if not any(batched):
        return apply_to_values(func, args, kwargs)
    rest = [i for i in parts[1:] if not (isinstance(i, slice) and i == slice(None)) and i is not Ellipsis]
    first = parts[0]
    if not isinstance(first, Tensor) or first.dtype == torch.bool or rest:
        raise unresolvable([target], "indexing", " by several indices or a mask that depend on the samples")
    table = moved(target, torch.reshape, (target.shape[0], -1))
    return known_call(active, F.embedding, (first.long(), table), {}).view(*first.shape, *target.shape[1:])


def index_select(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Along the first dimension as :func:`getitem`."""
    target, dim, index = args[0], *(args[1:] or (kwargs["dim"], kwargs["index"]))
    if not isinstance(target, Tracked) or _pure_unless_batched(active, func, (target,), {}, index):
        return apply_to_values(func, args, kwargs)
    if dim != 0:
        raise unresolvable([target], "index_select", f" along dimension {dim}")
    return getitem(active, torch.Tensor.__getitem__, (target, index), {})


def setitem(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """`x[index] = parameter`, for an x that depends on the samples."""
    x, index, value = args
    tracked = tracked_in(args, kwargs)
    if isinstance(x, Tracked) or not isinstance(value, Tracked):
        raise unresolvable(tracked, "assignment to a parameter's entries")
    first = index[0] if isinstance(index, tuple) else index
    if isinstance(first, Tensor) and first.dtype == torch.bool and value.dim() <= x.dim() - first.dim():
        where = reference(active, [value], "setitem", (x,), {})
        if first is not index or where is None:
            raise unresolvable(tracked, "assignment", " by a mask into a tensor without a batch of its own")
        x[first] = aligned(active, value, "setitem", *where).expand(x.shape)[first]
        return None
    if isinstance(first, int):  # one sample at a time
        whole = layout_of(active, value, "setitem", torch.empty(x.shape, device="meta"))
        if isinstance(whole, Layout) and whole.dim == 0 and not whole.flat:
            x[index] = expanded(active, value)[first]
            return None
    shape = x[index].shape
    layout = layout_of(active, value, "setitem", torch.empty(shape, device="meta"))
    if layout is None or layout.flat:
        raise unresolvable(tracked, "assignment", " into a tensor without a batch of its own")
    x[index] = aligned(active, value, "setitem", layout.dim - len(shape), layout)
    return None


def masked_fill(active: Pass, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """A choice between the tensor and a scalar parameter."""
    x, mask, value = args if len(args) == 3 else (*args, kwargs["value"])
    if func.__name__.endswith("_") or not isinstance(value, Tracked):
        raise unresolvable(tracked_in(args, kwargs), func.__name__)
    return broadcast(active, torch.where, (mask, value, x), {})


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation with fixed statistics is a scale and a shift; with the batch's own it mixes samples."""
    if isinstance(x, Tracked):  # of a weight, to standardise it: no sample is involved
        args = (x, running_mean, running_var, weight, bias, training, momentum, eps)
        with torch._C.DisableTorchFunctionSubclass():
            return apply_to_values(F.batch_norm, args, {})
    if training or running_mean is None:
        raise ValueError(
            "Batch normalisation in training mode makes samples influence each other: replace it by GroupNorm or "
            "LayerNorm (opacus.validators.ModuleValidator.fix does), or call .eval() on it to use fixed statistics."
        )
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = F.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


RULES: dict[str, Callable[[Pass, Callable[..., Any], Args, Kwargs], Any]] = {
    **{name: broadcast for name in BROADCASTING},
    **{name: matmul for name in ("matmul", "rmatmul", "mm", "bmm", "mv")},
    **{name: expand for name in ("expand", "expand_as", "broadcast_to")},
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "addmm": addmm,
    **{name: grouped_mm for name in ("grouped_mm", "grouped_mm_fallback")},
    "tensordot": tensordot,
    "cdist": cdist,
    "einsum": einsum,
    "getitem": getitem,
    "index_select": index_select,
    "setitem": setitem,
    "masked_fill": masked_fill,
}

COMPOSITE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.batch_norm: batch_norm,
}
"""Functions rewritten in terms of others, so that their parameters meet known functions inside."""
