"""Resolving a use of tracked parameters: the table of what each function does with the batch (see `gsm.tracked`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grad_samplers import Sampler, sampler_of
from grad_samplers.functional import Call, bind, known
from gsm.contributions import Record
from gsm.functions import Expand, Tap
from gsm.layout import BATCH_FIRST, Layout, Rows, Unresolvable
from gsm.tape import Pass, Tape
from gsm.tracked import SHAPE_ONLY, Tracked, apply_to_values, plain, tracked_in

# Samplers that take any number of positions between the batch and the features.
_ANY_RANK = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm}


def resolve(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives when some of its arguments are tracked parameters."""
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
        rule = known_call if known(func) else RULES.get(name.strip("_"), _unknown)
        try:
            return rule(active, func, args, kwargs)
        except Unresolvable:
            if active.log is None or not active.log.dry:
                raise
        active.log.skipped = True  # perhaps only because a shape misled: look again when layouts are known
        return func(*[plain(a) for a in args], **{k: plain(v) for k, v in kwargs.items()})


def _unknown(active: Pass, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function without a rule: of parameters and constants alone it is fine."""
    tracked, name = tracked_in(args, kwargs), getattr(func, "__name__", "")
    if any(is_batched(active, tracked[0], name, x) for x in plain_tensors(args, kwargs)):
        raise unresolvable(tracked, name)
    return apply_to_values(func, args, kwargs)


def unresolvable(tracked: list[Tracked], name: str, why: str = "") -> Unresolvable:
    names = sorted({n for t in tracked for n in t.gsm_name.split(" + ")})
    return Unresolvable(f"{' and '.join(names)}: used by {name}{why or ', for which no rule is known'}", tuple(names))


def plain_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that are not tracked."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, Tensor) and not isinstance(v, Tracked):
                found.append(v)
    return found


def is_batched(active: Pass, target: Tracked, name: str, x: Tensor) -> bool:
    return x.dim() > 0 and layout_of(active, target, name, x) is not None


def layout_of(
    active: Pass, target: Tracked, name: str, x: Tensor, batch_dim: int | None = None
) -> Layout | Rows | None:
    try:
        return active.layout(f"{target.gsm_name}:{name}", x, batch_dim)
    except Unresolvable as error:
        raise unresolvable([target], name, f", but {error}") from None


# -- 1. known functions ------------------------------------------------------------------------------------------------


class LayerUse:
    """One call of a known function: told its output's gradient, it hands a record to the tape."""

    __slots__ = (
        "tape",
        "group",
        "batch_size",
        "layer",
        "sampler",
        "targets",
        "layouts",
        "out_layout",
        "fold",
        "rest",
        "lead",
    )

    def __init__(self, active: Pass, call: Call, targets: list[tuple[Tensor, Tracked]], layer: Any, sampler: Sampler):
        self.tape, self.group, self.batch_size = active.tape, active.group, active.batch_size
        self.layer, self.sampler, self.targets = layer, sampler, targets
        self.layouts: list[Layout | Rows | None] = []
        self.out_layout: Layout | Rows = BATCH_FIRST
        self.fold = 1
        self.lead: torch.Size | None = None  # leading dimensions, if the call was made on flattened rows

    def receive(self, saved: tuple[Tensor, ...], grad: Tensor) -> None:
        activations = [self._front(a.detach(), layout) for a, layout in zip(saved, self.layouts, strict=True)]
        backprops = self._front(grad.detach(), self.out_layout)
        record = Record(self.layer, self.sampler, activations, backprops, self.batch_size, self.fold)
        self.tape.receive(self.group, record, self.targets)

    def _front(self, x: Tensor, layout: Layout | Rows | None) -> Tensor:
        if self.lead is not None:
            x = x.view(*self.lead, *x.shape[1:])
        if layout is None:
            return x
        x = layout.to_front(x, self.batch_size)
        return x.flatten(0, 1) if self.fold > 1 else x


def known_call(active: Pass, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A use of a registered layer, by function: runs it with detached parameters and taps the output."""
    call = bind(func, args, kwargs)
    assert call is not None
    tracked = tracked_in(args, kwargs)
    name = func.__name__
    if any(isinstance(a, Tracked) for a in call.activations):
        return _mixed_call(active, func, args, kwargs, call, tracked)
    # Where all ids lie in a row, the offsets tell whose they are; their values depend on all bags before, as they may.
    asked = [torch.zeros_like(call.activations[1])] if _bags(call) else call.activations
    layouts = [None if a is None else layout_of(active, tracked[0], name, a, call.batch_dim) for a in asked]
    if layouts[0] is None:
        if any(layouts[1:]):
            raise unresolvable(tracked, name, ", whose first input does not depend on the samples")
        return apply_to_values(func, args, kwargs)
    for p in call.parameters.values():
        if isinstance(p, Tensor) and not isinstance(p, Tracked) and p.requires_grad:
            raise unresolvable(tracked, name, ", together with weights that depend on the samples")

    parameters, targets = _placeholders(call)
    layer = call.stand_in(**parameters)
    sampler = sampler_of(call.layer_type)
    if sampler is None:
        raise unresolvable(tracked, name, f": the sampler of {call.layer_type.__name__} was removed")
    reason = sampler.supports(layer) if sampler.supports else None
    if reason:
        raise unresolvable(tracked, name, f": {reason}")
    use = LayerUse(active, call, targets, layer, sampler)
    _arrange(use, call, layouts)
    return _run(use, active.tape, func, args, kwargs, call)


def _placeholders(call: Call) -> tuple[dict[str, Tensor | None], list[tuple[Tensor, Tracked]]]:
    """What stands for each parameter in the layer that the sampler sees."""
    parameters: dict[str, Tensor | None] = {}
    targets: list[tuple[Tensor, Tracked]] = []
    for key, p in call.parameters.items():
        if isinstance(p, Tracked):
            holder = p.gsm_param if p.gsm_param is not None else p.gsm_value.detach().requires_grad_()
            targets.append((holder, p))
            parameters[key] = holder
        else:
            parameters[key] = p
    return parameters, targets


def _bags(call: Call) -> bool:
    return call.layer_type is nn.EmbeddingBag and call.activations[1] is not None


def _arrange(use: LayerUse, call: Call, layouts: list[Layout | Rows | None]) -> None:
    first = layouts[0]
    assert first is not None
    if _bags(call):
        use.layouts = [None] * sum(a is not None for a in call.activations)
        return
    if first.flat and call.layer_type not in _ANY_RANK:
        use.fold = first.positions(call.activations[0], use.batch_size)
    use.layouts = [lay for a, lay in zip(call.activations, layouts, strict=True) if a is not None]
    use.out_layout = first


def _run(
    use: LayerUse, tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
) -> Tensor:
    x = call.activations[0]
    detached = [_detached(a) for a in args], {k: _detached(v) for k, v in kwargs.items()}
    if call.flatten:
        keep = 1 if call.layer_type is nn.Linear else 0
        use.lead = x.shape[: x.dim() - keep]
        rows = x.reshape(-1, *x.shape[x.dim() - keep :]) if x.dim() > keep + 1 or keep == 0 else x
        positional, keywords = detached
        if positional and positional[0] is x:
            positional[0] = rows
        else:
            keywords["input"] = rows
        y = Tap.apply(func(*positional, **keywords), tape.anchor, use, False, rows)
        return y.view(*use.lead, y.shape[-1])
    y = func(*detached[0], **detached[1])
    saved = [a for a in call.activations if a is not None]
    return Tap.apply(y, tape.anchor, use, y._is_view(), *saved)


def _detached(value: Any) -> Any:
    return value.gsm_value.detach() if isinstance(value, Tracked) else value


def _mixed_call(
    active: Pass,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Call,
    tracked: list[Tracked],
) -> Any:
    """The input itself is a function of parameters alone: so is the output, unless something else has a batch."""
    others = [a for a in call.activations if isinstance(a, Tensor) and not isinstance(a, Tracked)]
    others += [p for p in call.parameters.values() if isinstance(p, Tensor) and not isinstance(p, Tracked)]
    if any(is_batched(active, tracked[0], func.__name__, x) for x in others):
        raise unresolvable(tracked, func.__name__, " on a parameter and a tensor that depends on the samples")
    return apply_to_values(func, args, kwargs)


# -- 2. expansion ------------------------------------------------------------------------------------------------------


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
