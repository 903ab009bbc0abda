"""Before the first batch: is a user's sampler right, for one sample?

What a sampler gives for a sample is clipped and released, whatever it is. So a bound holds if it depends on that
sample's loss alone, and if norm and weighted sum are those of the same gradient: that is required. If it is not the
gradient that autograd gives (a sampler may ignore an option or an input of its layer), that is said. The layer runs
once more, with its parameters in the graph, for a loss of one sample; :func:`gsm.verify` compares every sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from grad_samplers import Sampler, per_sample_gradients, per_sample_norms, weighted_sum
from gsm.layout import UNKNOWN, Layout, Rows
from gsm.structures import tensors_in

WRONG = (
    "The sampler registered for {cls} is wrong: {what} for {name}, by a relative error of {error:.2g} in a loss of one "
    "sample alone. Then clipping bounds nothing. It has to sum over positions and not over the batch, and all its "
    "readings are of the same gradient; gsm.verify(model, batch) shows more. Correct it, or take it away with "
    "grad_samplers.unregister({cls}): the layer works without."
)
UNLIKE = (
    "The sampler registered for {cls} gives another gradient than autograd for {name} (relative error {error:.2g}, in "
    "a loss of one sample alone): an input or option of the layer that it ignores, a factor, a sum over positions that "
    "is missing? What it gives is what is clipped and released, so that epsilon holds, but the model learns from "
    "something else. gsm.verify(model, batch) shows more; grad_samplers.unregister({cls}): the layer works without."
)


def is_users(sampler: Sampler) -> bool:
    """Whether the sampler came with neither this library nor Opacus."""
    return getattr(sampler.grad, "__module__", "").split(".")[0] not in ("grad_samplers", "opacus", "gsm")


@contextmanager
def shown_instead(module: nn.Module, others: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a layer shows ``others`` in the places of its parameters, and elsewhere the parameters themselves."""
    place = module.__dict__
    before = {n: place.pop(n) for n in module._parameters if n in place}
    try:
        place.update(others)
        yield
    finally:
        for name in module._parameters:
            place.pop(name, None)
        place.update(before)


def check_sampler(
    module: nn.Module,
    sampler: Sampler,
    path: str,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    layouts: Sequence[Layout | Rows | None],
    size: int,
) -> None:
    """Compares the sampler's readings of one call with each other and with autograd, where the batch is a dimension of
    its own. Warns if only autograd's is another.

    Args:
        forward: the layer's own.
        args, kwargs: what the layer is called with; ``layouts`` says where each tensor of it has its ``size`` samples.

    Raises:
        ValueError: a gradient that is not of one sample, or readings that are not of the same; names the parameter.
    """
    batched = next(lay for lay in layouts if lay is not None)
    if any(isinstance(lay, Rows) or lay is UNKNOWN or lay.flat for lay in layouts if lay is not None):
        return
    own = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
    copies = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
    args, kwargs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
    seen = [
        x.clone() if lay is None or x.dim() <= lay.dim else lay.to_front(x.clone(), size)  # the forward may write to it
        for x, lay in zip(tensors_in(args, kwargs), layouts, strict=True)
    ]
    with torch.enable_grad(), shown_instead(module, copies):
        found = tree_flatten(forward(*args, **kwargs))[0]
    outputs = [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]
    if not outputs or not all(x.requires_grad and x.dim() > batched.dim for x in outputs):
        return
    if any(x.shape[batched.dim] != size for x in outputs):
        return
    backprops = [_of_the_last(x, batched.dim) for x in outputs]
    truth = torch.autograd.grad(outputs, list(copies.values()), backprops, allow_unused=True)
    expected = {p: torch.zeros_like(p) if g is None else g for p, g in zip(own.values(), truth, strict=True)}
    given = [batched.to_front(g, size) for g in backprops]
    for what, (a, b) in _readings(module, sampler, seen, given[0] if len(given) == 1 else given, expected, size):
        name, error = _largest_error(a, b, own)
        if error <= TOLERANCE.get(own[name].dtype, 0.1):
            continue
        said = {"cls": type(module).__name__, "name": f"{path}.{name}" if path else name, "error": error}
        if what is None:
            warnings.warn(UNLIKE.format(**said), stacklevel=2)
        else:
            raise ValueError(WRONG.format(what=what, **said))


PerParameter = dict[nn.Parameter, Tensor]
#: What must be equal, and what is wrong if it is not: None where only autograd's gradient is another.
Reading = tuple[str | None, tuple[PerParameter, PerParameter]]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def _of_the_last(output: Tensor, dim: int) -> Tensor:
    """The gradient of a loss of the last sample alone."""
    share = torch.zeros_like(output, memory_format=torch.contiguous_format)
    row = share.select(dim, output.shape[dim] - 1)
    row.copy_(torch.arange(1, row.numel() + 1, device=row.device).mul(0.7).sin().reshape(row.shape))
    return share


def _readings(
    module: nn.Module, sampler: Sampler, seen: list[Tensor], given: Any, expected: PerParameter, size: int
) -> Iterator[Reading]:
    """What the sampler gives for a loss of the last sample, beside what it should be equal to."""

    def gradients_for(backprops: Any) -> PerParameter:
        with shown_instead(module, {}):
            return per_sample_gradients(module, seen, backprops, sampler=sampler)

    found, of_nothing = gradients_for(given), gradients_for(tree_map(torch.zeros_like, given))
    own = {p: g[-1:] for p, g in found.items()}
    yield "a sample's gradient depends on the loss of another", (
        found,
        {p: torch.cat([g[:-1], own[p]]) for p, g in of_nothing.items()},
    )
    yield None, (own, {p: g.unsqueeze(0) for p, g in expected.items()})
    if sampler.norm is not None:
        with shown_instead(module, {}):
            norms = per_sample_norms(module, seen, given, sampler=sampler)
        yield "its norm is not that of the gradient it gives", (
            norms,
            {p: g.reshape(size, -1).norm(dim=1) for p, g in found.items()},
        )
    if sampler.weighted is not None:
        one = given[0] if isinstance(given, list) else given
        weights = torch.linspace(0.5, 1.5, size, device=one.device, dtype=one.dtype)
        with shown_instead(module, {}):
            sums = weighted_sum(module, seen, given, weights, sampler=sampler)
        yield "its weighted sum is not that of the gradients it gives", (
            sums,
            {p: torch.tensordot(weights.to(g.dtype), g, 1) for p, g in found.items()},
        )


def _largest_error(a: PerParameter, b: PerParameter, own: dict[str, nn.Parameter]) -> tuple[str, float]:
    """The name of the parameter where the two differ most, and by how much of their size."""
    sizes = {n: max(float(a[p].double().norm()), float(b[p].double().norm())) for n, p in own.items()}
    floor = 1e-3 * max(sizes.values()) + 1e-30  # what should cancel is only rounding
    errors = {n: float((a[p].double() - b[p].double()).norm()) / max(sizes[n], floor) for n, p in own.items()}
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]
