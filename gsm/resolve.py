"""Resolving a use of tracked parameters: the table of what each function does with the batch (see `gsm.tracked`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grad_samplers.functional import known
from gsm.functions import Expand
from gsm.known import is_batched, known_again, known_call, layout_of, unresolvable
from gsm.layout import Layout, Rows, Unresolvable
from gsm.tape import Pass
from gsm.tracked import SHAPE_ONLY, Tracked, apply_to_values, plain, tracked_in


def resolve(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives when some of its arguments are tracked parameters."""
    is_known = known(func)
    if is_known and torch.is_grad_enabled():
        again = known_again(func, args, kwargs)
        if again is not None:
            return again
    from gsm.rules import COMPOSITE, RULES  # rules use the helpers below

    composite = COMPOSITE.get(func)
    if composite is not None and torch.is_grad_enabled():
        return composite(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        name = getattr(func, "__name__", "")
        tracked = tracked_in(args, kwargs)
        if not tracked:
            raise Unresolvable(f"a parameter is used in an argument structure of {name or func} that is not searched")
        tape = tracked[0].gsm_tape
        if not torch.is_grad_enabled() or name == "__get__" or name in SHAPE_ONLY:
            return apply_to_values(func, args, kwargs)
        active = tape.active
        if active is None:
            raise RuntimeError(
                f"A value computed from {tracked[0].gsm_name} during an earlier forward is used outside of one (by "
                f"{name}): its gradient would be lost. Recompute it in the model's forward, or use it under no_grad."
            )
        if tape.inside is not None:
            raise Unresolvable(f"{tape.inside}: it also uses {tracked[0].gsm_name} from outside", subtree=tape.inside)
        rule = known_call if is_known else RULES.get(name.strip("_"), _unknown)
        try:
            if torch._C._functorch.maybe_current_level() is not None:
                raise unresolvable(tracked, name, " under torch.func or torch.vmap")
            return _real(tracked, name, is_known, lambda: rule(active, func, args, kwargs))
        except Unresolvable:
            if active.log is None or not active.log.dry:
                raise
        active.log.skipped = True  # perhaps only because a shape misled: look again when layouts are known
        return func(*[plain(a) for a in args], **{k: plain(v) for k, v in kwargs.items()})


def _real(tracked: list[Tracked], name: str, is_known: bool, run: Callable[[], Any]) -> Any:
    """The samplers' formulas are those of real numbers: where complex ones meet the samples, autograd has to do it."""
    if not any(t.gsm_value.is_complex() for t in tracked):
        return run()
    out = None if is_known else run()
    found = out if isinstance(out, (list, tuple)) else (out,)
    if not all(isinstance(o, Tracked) or isinstance(o, Tensor) and not o.requires_grad for o in found):
        raise unresolvable(tracked, name, " on complex numbers")
    return out


def _unknown(active: Pass, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function without a rule: of parameters and constants alone it is fine."""
    tracked, name = tracked_in(args, kwargs), getattr(func, "__name__", "")
    if any(is_batched(active, tracked[0], name, x) for x in plain_tensors(args, kwargs)):
        raise unresolvable(tracked, name)
    return apply_to_values(func, args, kwargs)


def plain_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that are not tracked."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, Tensor) and not isinstance(v, Tracked):
                found.append(v)
    return found


# -- expansion ---------------------------------------------------------------------------------------------------------


class ExpandUse:
    """One expansion of a tracked tensor: told the per-sample gradient, it hands it to the tape."""

    __slots__ = ("tape", "group", "batch_size", "target")

    def __init__(self, active: Pass, target: Tracked):
        self.tape, self.group, self.batch_size, self.target = active.tape, active.group, active.batch_size, target

    def receive(self, saved: tuple[Tensor, ...], grad: Tensor) -> None:
        self.tape.receive_dense(self.group, self.target, grad)


def expanded(active: Pass, target: Tracked) -> Tensor:
    """``[batch, *target.shape]``, one copy per sample."""
    return Expand.apply(active.tape.anchor, ExpandUse(active, target), target.gsm_value.detach())


def aligned(active: Pass, target: Tracked, name: str, dim: int, layout: Layout | Rows, count: int = 0) -> Tensor:
    """``target``, one copy per sample, shaped to broadcast against a tensor whose batch is at ``dim`` < 0.

    ``count`` is that tensor's size there, where positions are folded into the batch.
    """
    n, copies = target.dim(), expanded(active, target)
    if n < -dim:
        copies = copies.reshape(active.batch_size, *[1] * (-dim - 1 - n), *target.shape)
        return layout.spread(copies, 0, count, active.batch_size)
    at = n + dim
    if target.shape[at] == 1:
        return layout.spread(copies.squeeze(1 + at).movedim(0, at), at, count, active.batch_size)
    if isinstance(layout, Rows) and at == 0 and target.shape[0] == count:  # a row of the parameter for each row
        return copies[layout.owner, torch.arange(count, device=copies.device)]
    raise unresolvable([target], name, f" with {target.shape[at]} entries where the other operand has its batch")


def reference(
    active: Pass, tracked: list[Tracked], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, Layout | Rows, int] | None:
    """Batch position (from the end), layout and size there of the operands that depend on the samples."""
    best: tuple[int, Layout | Rows, int] | None = None
    for x in plain_tensors(args, kwargs):
        if x.dim() == 0:
            continue
        layout = layout_of(active, tracked[0], name, x)
        if layout is None:
            continue
        found = (layout.dim - x.dim(), layout, x.shape[layout.dim])
        if best is not None and not _agree(best, found):
            raise unresolvable(tracked, name, " on operands with their batch in different places")
        best = found
    return best


def _agree(one: tuple[int, Layout | Rows, int], other: tuple[int, Layout | Rows, int]) -> bool:
    if isinstance(one[1], Rows) and isinstance(other[1], Rows):
        return one[0] == other[0] and torch.equal(one[1].owner, other[1].owner)
    same_order = one[1].flat == other[1].flat and getattr(one[1], "outer", 1) == getattr(other[1], "outer", 1)
    return one[0] == other[0] and same_order


def broadcast(active: Pass, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that broadcasts its operands: each tracked one is expanded to the batch of the others."""
    tracked, name = tracked_in(args, kwargs), func.__name__
    where = reference(active, tracked, name, args, kwargs)
    if where is None:
        return apply_to_values(func, args, kwargs)
    dim, layout, count = where

    def place(value: Any) -> Any:
        if isinstance(value, Tracked):
            return aligned(active, value, name, dim, layout, count)
        return type(value)(place(v) for v in value) if isinstance(value, (list, tuple)) else value

    return func(*[place(a) for a in args], **{k: place(v) for k, v in kwargs.items()})
