"""The three readings of one capture, for any registered layer: gradients, norms, weighted sum.

Each uses the registered function where there is one, or derives the reading from the grad sampler,
checks what came back, and leaves out frozen parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grad_samplers.registry import GradSampler, Layer, PerParameter, Sampler, lookup
from grad_samplers.tensors import wide

#: The output's gradient, or those of several outputs.
Backprops = Any


def norms_from(grad: GradSampler) -> GradSampler:
    """The norm sampler that materialises the gradients: right for every layer, lean where parameters are small."""

    def norm_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
        gradients = grad(layer, activations, backprops)
        return {p: torch.linalg.vector_norm(wide(g).flatten(1), dim=1) for p, g in gradients.items()}

    return norm_sample


def weighted_from(grad: GradSampler) -> GradSampler:
    """The weighted-sum sampler that materialises the gradients."""

    def weighted_sample(layer: Layer, activations: list[Tensor], backprops: Tensor, weights: Tensor) -> PerParameter:
        gradients = {p: wide(g) for p, g in grad(layer, activations, backprops).items()}
        return {p: (weights.to(g.dtype) @ g.flatten(1)).view(g.shape[1:]) for p, g in gradients.items()}

    return weighted_sample


def per_sample_gradients(
    layer: Layer, activations: Sequence[Tensor], backprops: Backprops, *, sampler: Sampler | None = None
) -> PerParameter:
    """The gradient of each sample's own loss with respect to each trainable parameter of the layer.

    Args:
        layer: the layer, or a stand-in with its parameters and options as attributes (then name the `sampler`).
        activations: the layer's tensor inputs, batch first, detached.
        backprops: gradient of each sample's own loss with respect to the layer's output, `[B, ...]`; a list of them
            for a layer with several floating-point outputs.
        sampler: the sampler to use; by default the one `lookup` finds.

    Returns:
        `{parameter: [B, *parameter.shape]}` for parameters with `requires_grad`.

    Raises:
        LookupError: if no sampler covers the layer's class.
        ValueError: if the sampler leaves out a trainable parameter or returns a wrong shape.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> per_sample_gradients(layer, [torch.ones(4, 3)], torch.ones(4, 2))[layer.weight].shape
        torch.Size([4, 2, 3])
    """
    found = sampler or _sampler(layer)
    batch = _first(backprops).shape[0]
    with full_precision(_first(backprops)):
        gradients = found.grad(layer, list(activations), backprops)
    return _checked(layer, found, gradients, lambda p: (batch, *p.shape))


def per_sample_norms(
    layer: Layer, activations: Sequence[Tensor], backprops: Backprops, *, sampler: Sampler | None = None
) -> PerParameter:
    """The 2-norm of each sample's gradient, `{parameter: [B]}`; arguments and errors as `per_sample_gradients`."""
    found = sampler or _sampler(layer)
    norm = found.norm or norms_from(found.grad)
    batch = _first(backprops).shape[0]
    with full_precision(_first(backprops)):
        norms = norm(layer, list(activations), backprops)
    return _checked(layer, found, norms, lambda p: (batch,))


def weighted_sum(
    layer: Layer,
    activations: Sequence[Tensor],
    backprops: Backprops,
    weights: Tensor,
    *,
    sampler: Sampler | None = None,
) -> PerParameter:
    """`sum_i weights[i] * grad_i` per trainable parameter; other arguments and errors as `per_sample_gradients`.

    A weight of zero does not silence a sample whose gradient is infinite or NaN: drop such samples first.

    Args:
        weights: one factor per sample, `[B]`.
    """
    found = sampler or _sampler(layer)
    batch = _first(backprops).shape[0]
    if weights.shape != (batch,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; one per sample is ({batch},)")
    weighted = found.weighted or weighted_from(found.grad)
    with full_precision(_first(backprops)):
        sums = weighted(layer, list(activations), backprops, weights)
    return _checked(layer, found, sums, lambda p: tuple(p.shape))


def full_precision(x: Tensor) -> AbstractContextManager:
    """Switches autocast off, should it be on where the backward runs: it would take matmuls to half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _first(backprops: Backprops) -> Tensor:
    return backprops[0] if isinstance(backprops, list) else backprops


def _sampler(layer: Layer) -> Sampler:
    found = lookup(layer)
    if found is None:
        raise LookupError(
            f"no sampler covers {type(layer).__qualname__}: decorate one with register_grad_sampler(...), "
            f"or pass sampler= for a stand-in"
        )
    return found


def _checked(
    layer: Layer, sampler: Sampler, results: PerParameter, shape: Callable[[nn.Parameter], tuple[int, ...]]
) -> PerParameter:
    """The trainable entries of `results`, after checking that none of the layer's own is missing or misshapen."""
    own = layer._parameters if isinstance(layer, nn.Module) else {}
    if not isinstance(results, Mapping) or not all(isinstance(x, Tensor) for pair in results.items() for x in pair):
        what = type(results).__name__
        if isinstance(results, Mapping):
            what += f" of {', '.join(sorted({f'{type(p).__name__}: {type(v).__name__}' for p, v in results.items()}))}"
        raise TypeError(
            f"the sampler of {_name(sampler)} returned a {what}, expected a dict from parameters to tensors: return "
            "{layer.weight: ..., layer.bias: ...}, with the parameters themselves and not their names as keys"
        )
    for name, parameter in own.items():
        if parameter is not None and parameter.requires_grad and parameter not in results:
            raise ValueError(f"the sampler of {_name(sampler)} returned nothing for the trainable parameter '{name}'")
    kept = {p: value for p, value in results.items() if p.requires_grad}
    for parameter, value in kept.items():
        if tuple(value.shape) != shape(parameter):
            name = next((n for n, p in own.items() if p is parameter), "parameter")
            raise ValueError(
                f"the sampler of {_name(sampler)} returned shape {tuple(value.shape)} for '{name}', "
                f"expected {shape(parameter)}"
            )
    return kept


def _name(sampler: Sampler) -> str:
    return sampler.cls if isinstance(sampler.cls, str) else sampler.cls.__qualname__
