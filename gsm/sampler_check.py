"""Before the first batch: is a user's sampler right, for one sample?

A sampler that ignores an option or an input of its layer, sums over the batch or divides by it, gives gradients whose
norm is not that of the release's share: clipping would bound nothing. The layer runs once more, with its parameters in
the graph, and autograd's gradient of one sample is compared with each of the sampler's readings. :func:`gsm.verify`
compares every sample, of the data as they are.
"""

from __future__ import annotations

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
    "The sampler registered for {cls} is wrong: the {reading} that it gives for {name} differs from autograd's by a "
    "relative error of {error:.2g}, for one sample alone. It has to take every input and option of the layer into "
    "account, sum over positions and not over the batch, and not divide by its size; gsm.verify(model, batch) shows "
    "more. Correct it, or take it away with grad_samplers.unregister({cls}): the layer works without."
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
    """Compares the sampler's readings of one call with autograd, where the batch is a dimension of its own.

    Args:
        forward: the layer's own.
        args, kwargs: what the layer is called with; ``layouts`` says where each tensor of it has its ``size`` samples.

    Raises:
        ValueError: names the parameter.
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
    what = module, sampler, seen, given[0] if len(given) == 1 else given
    for reading, (a, b) in _readings(*what, expected, size):
        name, error = _largest_error(a, b, own)
        if error > TOLERANCE.get(own[name].dtype, 0.1):
            where = f"{path}.{name}" if path else name
            raise ValueError(WRONG.format(cls=type(module).__name__, reading=reading, name=where, error=error))


PerParameter = dict[nn.Parameter, Tensor]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def _of_the_last(output: Tensor, dim: int) -> Tensor:
    """The gradient of a loss of the last sample alone."""
    share = torch.zeros_like(output, memory_format=torch.contiguous_format)
    row = share.select(dim, output.shape[dim] - 1)
    row.copy_(torch.arange(1, row.numel() + 1, device=row.device).mul(0.7).sin().reshape(row.shape))
    return share


def _readings(
    module: nn.Module, sampler: Sampler, seen: list[Tensor], given: Any, expected: PerParameter, size: int
) -> Iterator[tuple[str, tuple[PerParameter, PerParameter]]]:
    """What the sampler gives, beside what autograd's gradient of the last sample makes of it."""

    def alone(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(size - 1, *value.shape), value.unsqueeze(0)])

    with shown_instead(module, {}):
        gradients = per_sample_gradients(module, seen, given, sampler=sampler)
    yield "per-sample gradient", (gradients, {p: alone(g) for p, g in expected.items()})
    if sampler.norm is not None:
        with shown_instead(module, {}):
            norms = per_sample_norms(module, seen, given, sampler=sampler)
        yield "norm", (norms, {p: alone(g.norm()) for p, g in expected.items()})
    if sampler.weighted is not None:
        one = given[0] if isinstance(given, list) else given
        weights = torch.linspace(0.5, 1.5, size, device=one.device, dtype=one.dtype)
        with shown_instead(module, {}):
            sums = weighted_sum(module, seen, given, weights, sampler=sampler)
        yield "weighted sum", (sums, {p: 1.5 * g for p, g in expected.items()})


def _largest_error(a: PerParameter, b: PerParameter, own: dict[str, nn.Parameter]) -> tuple[str, float]:
    """The name of the parameter where the two differ most, and by how much of their size."""
    sizes = {n: max(float(a[p].double().norm()), float(b[p].double().norm())) for n, p in own.items()}
    floor = 1e-3 * max(sizes.values()) + 1e-30  # what should cancel is only rounding
    errors = {n: float((a[p].double() - b[p].double()).norm()) / max(sizes[n], floor) for n, p in own.items()}
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]
