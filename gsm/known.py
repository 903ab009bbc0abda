"""Known functions: a use of a tracked parameter by one of them is a use of a registered layer.

What every call of one site has in common - the stand-in layer, its sampler, who gets the gradients - is worked out
once and kept on the tape, as a :class:`Template` under a key made of the call's constants; a narrow layer takes less
time than finding these things out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grad_samplers import Sampler, sampler_of
from grad_samplers.functional import KEPT, Call, bind
from gsm.contributions import Aside, Record
from gsm.functions import Tap
from gsm.layout import BATCH_FIRST, UNKNOWN, Layout, Rows, Unresolvable
from gsm.tape import Pass
from gsm.tracked import Tracked, apply_to_values, plain_value, tracked_in

# Samplers that take any number of positions between the batch and the features.
_ANY_RANK = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm}
_CONSTANTS = frozenset({int, float, bool, str, tuple, type(None)})


class Template:
    """What the calls at one site have in common: nothing of it depends on the batch."""

    __slots__ = (
        "site",
        "first",
        "layer",
        "layer_type",
        "sampler",
        "targets",
        "flatten",
        "batch_dim",
        "row_dims",
        "with_statistics",
        "aside",
    )

    def __init__(
        self, call: Call, first: Tracked, name: str, layer: Any, sampler: Sampler, targets: list[tuple[Tensor, Tracked]]
    ):
        self.first, self.site = first, f"{first.gsm_name}:{name}"
        self.layer, self.sampler, self.targets = layer, sampler, targets
        self.layer_type, self.flatten, self.batch_dim = call.layer_type, call.flatten, call.batch_dim
        #: How many of the input's last dimensions belong to one row, where the function acts on rows.
        self.row_dims = 1 if call.layer_type is nn.Linear else 0
        # Only our own samplers know of further activations; a user's gets the layer's inputs, as promised.
        own = getattr(sampler.grad, "__module__", "").startswith("grad_samplers.")
        self.with_statistics = KEPT.get(call.layer_type) if own else None
        self.aside = _aside(call, targets)


class LayerUse:
    """One call of a known function: told its output's gradient, it hands a record to the tape."""

    __slots__ = ("tape", "group", "batch_size", "template", "layouts", "out_layout", "fold", "lead")

    def __init__(
        self,
        active: Pass,
        template: Template,
        layouts: list[Layout | Rows | None],
        out_layout: Layout | Rows,
        fold: int = 1,
    ):
        self.tape, self.group, self.batch_size = active.tape, active.group, active.batch_size
        self.template, self.layouts, self.out_layout, self.fold = template, layouts, out_layout, fold
        self.lead: torch.Size | None = None  # leading dimensions, if the call was made on flattened rows

    def receive(self, saved: tuple[Tensor, ...], grad: Tensor) -> None:
        activations = [self._front(a.detach(), layout) for a, layout in zip(saved, self.layouts, strict=True)]
        backprops = self._front(grad.detach(), self.out_layout)
        template = self.template
        record = Record(template.layer, template.sampler, activations, backprops, self.batch_size, self.fold)
        aside = template.aside if backprops.dim() > 2 else None
        self.tape.receive(self.group, record, template.targets, aside)

    def _front(self, x: Tensor, layout: Layout | Rows | None) -> Tensor:
        if self.lead is not None:
            x = x.view(*self.lead, *x.shape[1:])
        if layout is None or layout is BATCH_FIRST:
            return x
        x = layout.to_front(x, self.batch_size)
        return x.flatten(0, 1) if self.fold > 1 else x


def known_again(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call, if it is like an earlier one whose template was kept and the batch lies where it did; else None."""
    found = _key(func, args, kwargs)
    if found is None:
        return None
    key, first, x = found
    tape = first.gsm_tape
    template, active = tape.templates.get(key), tape.active
    if template is None or active is None or active.log is not None or tape.inside is not None:
        return None
    if sampler_of(template.layer_type) is not template.sampler:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        visit = active.visits[template.site]
        layout = tape.layouts.get((template.site, visit))
        if not isinstance(layout, Layout) or layout is UNKNOWN or not layout.fits(x, active.batch_size):
            return None
        active.visits[template.site] = visit + 1
        return _run(_arranged(active, template, x, layout), func, args, kwargs, x)


def known_call(active: Pass, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A use of a registered layer, by function: runs it with detached parameters and taps the output."""
    call = bind(func, args, kwargs)
    assert call is not None
    tracked = tracked_in(args, kwargs)
    name = func.__name__
    if any(isinstance(a, Tracked) for a in call.activations):
        return _mixed_call(active, func, args, kwargs, call, tracked)
    # Where all ids lie in a row, the offsets tell whose they are; their values depend on all bags before, as they may.
    bags = call.layer_type is nn.EmbeddingBag and call.activations[1] is not None
    asked = [torch.zeros_like(call.activations[1])] if bags else call.activations
    layouts = [None if a is None else layout_of(active, tracked[0], name, a, call.batch_dim) for a in asked]
    if layouts[0] is None:
        if any(layouts[1:]):
            raise unresolvable(tracked, name, ", whose first input does not depend on the samples")
        return apply_to_values(func, args, kwargs)
    for p in call.parameters.values():
        if isinstance(p, Tensor) and not isinstance(p, Tracked) and p.requires_grad:
            raise unresolvable(tracked, name, ", together with weights that depend on the samples")
    template = _template(call, tracked, name)
    activations = [a for a in call.activations if a is not None]
    if bags:
        use = LayerUse(active, template, [None] * len(activations), BATCH_FIRST)
    elif len(activations) > 1:
        own = [lay for a, lay in zip(call.activations, layouts, strict=True) if a is not None]
        use = LayerUse(active, template, own, layouts[0], _fold(template, activations[0], layouts[0], active))
    else:
        found = _key(func, args, kwargs)
        if found is not None:
            active.tape.templates[found[0]] = template
        return _run(_arranged(active, template, activations[0], layouts[0]), func, args, kwargs, activations[0])
    y = func(*[plain_value(a) for a in args], **{k: plain_value(v) for k, v in kwargs.items()})
    return Tap.apply(y, active.tape.anchor, use, y._is_view(), *activations)


def _key(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tracked, Tensor] | None:
    """What tells this call's template from others, with its first tracked argument and its input; None if there is no
    single input, or an argument that may be different the next time.

    The template holds its parameters, so the identities in the key are not given to anything else.
    """
    parts: list[Any] = [func, *kwargs]
    first: Tracked | None = None
    x: Tensor | None = None
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is Tracked:
            if value.gsm_param is None:
                return None
            first = value if first is None else first
            parts.append(id(value))
        elif isinstance(value, Tensor):
            if x is not None:
                return None
            x = value
            parts.append((Tensor, value.dim()))
        elif kind in _CONSTANTS:
            parts.append(value)
        else:
            return None
    if first is None or x is None:
        return None
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return None
    return key, first, x


def _template(call: Call, tracked: list[Tracked], name: str) -> Template:
    parameters: dict[str, Tensor | None] = {}
    targets: list[tuple[Tensor, Tracked]] = []
    for key, p in call.parameters.items():  # what stands for each parameter in the layer that the sampler sees
        if isinstance(p, Tracked):
            holder = p.gsm_param if p.gsm_param is not None else p.gsm_value.detach().requires_grad_()
            targets.append((holder, p))
            parameters[key] = holder
        else:
            parameters[key] = p
    layer = call.stand_in(**parameters)
    sampler = sampler_of(call.layer_type)
    if sampler is None:
        raise unresolvable(tracked, name, f": the sampler of {call.layer_type.__name__} was removed")
    reason = sampler.supports(layer) if sampler.supports else None
    if reason:
        raise unresolvable(tracked, name, f": {reason}")
    return Template(call, tracked[0], name, layer, sampler, targets)


def _fold(template: Template, x: Tensor, layout: Layout | Rows, active: Pass) -> int:
    folded = layout.flat and template.layer_type not in _ANY_RANK
    return layout.positions(x, active.batch_size) if folded else 1


def _arranged(active: Pass, template: Template, x: Tensor, layout: Layout | Rows) -> LayerUse:
    return LayerUse(active, template, [layout], layout, _fold(template, x, layout, active))


def _run(use: LayerUse, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """The function on plain tensors, its output tapped; on flattened rows where it acts on every row alike."""
    row_dims, with_statistics = use.template.row_dims, use.template.with_statistics
    if with_statistics is not None and _takes_kept(x, use.out_layout):
        layer = use.template.layer
        plain = [None if p is None else p.detach() for p in (layer.weight, layer.bias)]
        y, *further = with_statistics(layer, x, *plain)
        use.layouts = use.layouts * (1 + len(further))
        return Tap.apply(y, use.tape.anchor, use, False, x, *further)
    given = x
    if use.template.flatten and not (row_dims and x.dim() <= 2):
        use.lead = x.shape[: x.dim() - row_dims]
        given = x.reshape(-1, *x.shape[x.dim() - row_dims :])
    elif use.template.layer_type is nn.Conv1d and not x.is_contiguous():
        assert use.tape.active is not None
        given = use.tape.active.in_order(x)
    positional = [given if a is x else plain_value(a) for a in args]
    y = func(*positional, **{k: given if v is x else plain_value(v) for k, v in kwargs.items()})
    out = Tap.apply(y, use.tape.anchor, use, not use.template.flatten and y._is_view(), given)
    return out if use.lead is None else out.view(*use.lead, y.shape[-1])


def _takes_kept(x: Tensor, layout: Layout | Rows) -> bool:
    """Whether the statistics of ``x`` are what the sampler expects: autocast would change the dtype on the way."""
    plain = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    return plain and layout.dim == 0 and isinstance(layout, Layout) and x.shape[0] > 0


def _aside(call: Call, targets: list[tuple[Tensor, Tracked]]) -> Aside | None:
    """The small parameters of a layer that is kept as a pair: their gradients are cheaper made than read twice."""
    small = [(p, t) for p, t in targets if p.dim() == 1]
    large = [(p, t) for p, t in targets if p.dim() > 1]
    if not small or not large or call.layer_type in KEPT:
        return None

    def without(left_out: list[tuple[Tensor, Tracked]]) -> Any:
        frozen = {id(p): p.detach() for p, _ in left_out}
        own = {k: _holder(p, targets) for k, p in call.parameters.items()}
        return call.stand_in(**{k: frozen.get(id(p), p) for k, p in own.items()})

    return Aside(without(large), small, without(small), large)


def _holder(p: Any, targets: list[tuple[Tensor, Tracked]]) -> Any:
    return next((holder for holder, t in targets if t is p), p)


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


# -- what the rules for other functions share ----------------------------------------------------------------------


def unresolvable(tracked: list[Tracked], name: str, why: str = "") -> Unresolvable:
    names = sorted({n for t in tracked for n in t.gsm_name.split(" + ")})
    return Unresolvable(f"{' and '.join(names)}: used by {name}{why or ', for which no rule is known'}", tuple(names))


def is_batched(active: Pass, target: Tracked, name: str, x: Tensor) -> bool:
    return x.dim() > 0 and layout_of(active, target, name, x) is not None


def layout_of(
    active: Pass, target: Tracked, name: str, x: Tensor, batch_dim: int | None = None
) -> Layout | Rows | None:
    try:
        return active.layout(f"{target.gsm_name}:{name}", x, batch_dim)
    except Unresolvable as error:
        raise unresolvable([target], name, f", but {error}") from None
