"""Normalisations within a sample: LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d/2d/3d.

With `z` the normalised input (before weight and bias) the gradients are `sum g * z` and `sum g` over everything but
the parameter's own dimensions: `[B, *weight.shape]`, as small as a bias, so norms and sums go through them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from grad_samplers.readings import norms_from, weighted_from
from grad_samplers.registry import (
    Layer,
    PerParameter,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
)
from grad_samplers.tensors import plain_parameters, spatial_sum, trainable, widen

INSTANCE_NORM = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
"""Class to the number of dimensions of a batch."""


def _supports(layer: Layer) -> str | None:
    return plain_parameters(layer, "weight", "bias")


def _instance_norm_supports(layer: Layer) -> str | None:
    kind = type(layer).__qualname__
    if layer.track_running_stats:
        return (
            f"{kind} has track_running_stats=True: its running statistics mix the samples and would be released "
            f"without noise; use track_running_stats=False"
        )
    own = nn.InstanceNorm2d._apply_instance_norm
    if getattr(type(layer), "_apply_instance_norm", own) is not own:
        return f"{kind} overrides _apply_instance_norm"
    return _supports(layer)


def _affine(layer: Layer, z: Tensor, g: Tensor, total) -> PerParameter:
    """`{weight: total(g * z), bias: total(g)}` for those that are trainable."""
    z, g = widen(z, g)
    found: PerParameter = {}
    if trainable(layer.weight):
        found[layer.weight] = total(g * z)
    if trainable(getattr(layer, "bias", None)):
        found[layer.bias] = total(g)
    return found


def _over_leading(layer: Layer):
    """Sum over the positions between the batch and the normalised shape."""
    trailing = len(layer.normalized_shape)

    def total(x: Tensor) -> Tensor:
        middle = tuple(range(1, x.dim() - trailing))
        return x.sum(middle) if middle else x

    return total


@register_grad_sampler(nn.LayerNorm, supports=_supports)
def layer_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, ..., *normalized_shape]` to `{weight, bias: [B, *normalized_shape]}`."""
    (a,) = widen(activations[0])
    _check_batched(layer, a, len(layer.normalized_shape) + 1)
    return _affine(layer, F.layer_norm(a, layer.normalized_shape, eps=layer.eps), backprops, _over_leading(layer))


@register_grad_sampler(nn.RMSNorm, supports=_supports)
def rms_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, ..., *normalized_shape]` to `{weight: [B, *normalized_shape]}`."""
    a = activations[0]  # without eps the layer takes that of the input's dtype: not widened before
    if layer.eps is not None:
        (a,) = widen(a)
    _check_batched(layer, a, len(layer.normalized_shape) + 1)
    return _affine(layer, F.rms_norm(a, layer.normalized_shape, eps=layer.eps), backprops, _over_leading(layer))


@register_grad_sampler(nn.GroupNorm, supports=_supports)
def group_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, C, ...]` to `{weight, bias: [B, C]}`."""
    (a,) = widen(activations[0])
    _check_batched(layer, a, 2)
    z = F.group_norm(a, layer.num_groups, eps=layer.eps) if len(a) else a
    return _affine(layer, z, backprops, spatial_sum)


@register_grad_sampler(list(INSTANCE_NORM), supports=_instance_norm_supports)
def instance_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, C, ...]` to `{weight, bias: [B, C]}`."""
    (a,) = widen(activations[0])
    rank = next((rank for cls, rank in INSTANCE_NORM.items() if isinstance(layer, cls)), a.dim())
    _check_batched(layer, a, rank, exactly=True)
    z = F.instance_norm(a, eps=layer.eps) if len(a) else a
    return _affine(layer, z, backprops, spatial_sum)


def _check_batched(layer: Layer, a: Tensor, rank: int, exactly: bool = False) -> None:
    if a.dim() < rank or (exactly and a.dim() > rank):
        raise ValueError(
            f"{type(layer).__qualname__} got an input of shape {tuple(a.shape)}: "
            f"a batch has {'' if exactly else 'at least '}{rank} dimensions"
        )


for _classes, _grad in (
    (nn.LayerNorm, layer_norm_grad_sample),
    (nn.RMSNorm, rms_norm_grad_sample),
    (nn.GroupNorm, group_norm_grad_sample),
    (list(INSTANCE_NORM), instance_norm_grad_sample),
):
    register_norm_sampler(_classes)(norms_from(_grad))
    register_weighted_sampler(_classes)(weighted_from(_grad))
