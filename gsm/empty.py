"""Models that cannot run on zero rows, on a batch of zero rows.

Poisson sampling draws empty batches, and each is a release of its own (noise, and its charge). Many models fail on
them, forward (a reshape to `[0, T, -1]` is ambiguous) or only backward (`PixelShuffle`). Such a model runs on one row
of zeros instead (of ones where zeros fail too: a packed sequence has no length 0), without gradients, and its outputs
are cut to no rows: what the loss sees is what the model would have returned, and every per-sample gradient is
`[0, *p.shape]`. The made-up row reaches neither the sum nor the account.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map, tree_map_only

from gsm.capture import CapturedForward
from gsm.functions import Expand
from gsm.resolve import ExpandUse
from gsm.structures import make_known, tensors_in
from gsm.tape import Pass, Tape
from gsm.tracked import Tracked
from gsm.undisturbed import attributes_restored, undisturbed

_BACKWARD: WeakKeyDictionary[CapturedForward, bool] = WeakKeyDictionary()


def has_backward(
    forward: CapturedForward, root: nn.Module, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the model itself, without capture, runs on these empty arguments there and back; tried once."""
    if forward not in _BACKWARD:
        _BACKWARD[forward] = _try_backward(forward, root, tape, *tree_map_only(Tensor, _cut_off, (args, kwargs)))
    return _BACKWARD[forward]


def _cut_off(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _try_backward(
    forward: CapturedForward, root: nn.Module, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    enabled, tape.enabled = tape.enabled, False
    try:
        with undisturbed(root), attributes_restored(root):
            found: list[Tensor] = []

            def keep(x: Tensor) -> Tensor:
                found.extend([x] if x.requires_grad else [])
                return x

            change(forward.original(*args, **kwargs), keep)
            wanted = [x for x in (*root.parameters(), *tensors_in((args, kwargs))) if x.requires_grad]
            if found and wanted:
                torch.autograd.grad(found, wanted, [torch.zeros_like(x) for x in found], allow_unused=True)
        return True
    except Exception:
        return False
    finally:
        tape.enabled = enabled


def with_one_row(value: Any, fill: int = 0) -> Any:
    """The arguments with ``fill`` everywhere, and a row of it where a dimension is empty."""
    return change(value, lambda x: x.new_full([max(n, 1) for n in x.shape], fill))


def change(value: Any, each: Callable[[Tensor], Tensor], shape: Callable[[torch.Size], torch.Size] = torch.Size) -> Any:
    """Arguments or outputs with ``each`` of their tensors, in containers, dataclasses and copies of distributions;
    ``shape`` of a distribution's batch."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return each(x)
        if isinstance(x, Distribution):
            new: Any = copy.copy(x)
            new.__dict__.update({name: change(held, each, shape) for name, held in x.__dict__.items()})
            new._batch_shape = shape(x._batch_shape)
            return new
        return x

    return tree_map(leaf, make_known(value))


def cut(out: Any, active: Pass, tracked: Sequence[Tracked], batch_first: bool) -> Any:
    """The output for one row, as the output for none; its gradient tells every parameter that nobody reached it."""
    nothing: Any = 0.0
    for t in tracked:
        copies = Expand.apply(active.tape.anchor, ExpandUse(active, t), t.gsm_value.detach())
        nothing = copies.sum().to(torch.float64) + nothing

    def along(shape: torch.Size) -> int:
        """The batch's dimension, -1 if there is none."""
        dim = 0 if batch_first or len(shape) < 2 else 1
        return dim if shape and shape[dim] == 1 else -1

    def rows(x: Tensor) -> Tensor:
        dim = along(x.shape)
        if dim < 0:
            return x
        none = x.detach().narrow(dim, 0, 0)
        return none + nothing.to(x.dtype) if x.is_floating_point() and tracked else none

    def shapes(shape: torch.Size) -> torch.Size:
        dim = along(shape)
        return torch.Size(0 if i == dim else n for i, n in enumerate(shape))

    return change(out, rows, shapes)
