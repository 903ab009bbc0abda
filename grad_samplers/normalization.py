"""Normalisations within a sample: LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d/2d/3d.

With `z` the normalised input (before weight and bias) the gradients are `sum g * z` and `sum g` over everything but
the parameter's own dimensions: `[B, *weight.shape]`, as small as a bias, so norms and sums go through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
from grad_samplers.tensors import plain_parameters, trainable, widen

LONG = 1 << 14
"""Numbers in a sample from which a call for each of them pays."""
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


def _trailing(layer: Layer, z: Tensor, backprops: Tensor) -> PerParameter:
    """For parameters of the trailing dimensions, from `z`, which is overwritten: sums over the positions in between."""
    z, g = widen(z, backprops)
    middle = tuple(range(1, g.dim() - len(layer.normalized_shape)))
    found: PerParameter = {}
    if trainable(getattr(layer, "weight", None)):
        product = z.mul_(g)
        found[layer.weight] = product.sum(middle) if middle else product
    if trainable(getattr(layer, "bias", None)):
        found[layer.bias] = g.sum(middle) if middle else g
    return found


def _one_by_one(layer: Layer, a: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> PerParameter:
    """PyTorch's own backward for one sample after the other: one pass over memory instead of three.

    0.34 instead of 0.75 ms for `B=16 T=128 d=256` (one thread); for short samples the calls would cost more.
    """
    weight: Any = getattr(layer, "weight", None)
    bias: Any = getattr(layer, "bias", None)
    ones, shape = a.new_ones(layer.normalized_shape), list(layer.normalized_shape)
    mask = [False, trainable(weight), trainable(bias)]
    backward = torch.ops.aten.native_layer_norm_backward
    pairs = [backward(g[i], a[i], shape, mean[i], rstd[i], ones, ones, mask)[1:] for i in range(len(a))]
    wanted = [(p, k) for k, p in enumerate((weight, bias)) if trainable(p)]
    return {p: torch.stack([pair[k] for pair in pairs]) for p, k in wanted}


@register_grad_sampler(nn.LayerNorm, supports=_supports)
def layer_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, ..., *normalized_shape]` to `{weight, bias: [B, *normalized_shape]}`.

    The input's mean and reciprocal deviation, if the forward kept them, are two more activations.
    """
    (a,) = widen(activations[0])
    _check_batched(layer, a, len(layer.normalized_shape) + 1)
    if len(activations) == 3:
        g, mean, rstd = widen(backprops, *activations[1:])
        if g.dtype == a.dtype and len(a) and a[0].numel() >= LONG:
            return _one_by_one(layer, a, g.contiguous(), mean, rstd)
        return _trailing(layer, (a - mean).mul_(rstd), g)
    return _trailing(layer, F.layer_norm(a, layer.normalized_shape, eps=layer.eps), backprops)


@register_grad_sampler(nn.RMSNorm, supports=_supports)
def rms_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, ..., *normalized_shape]` to `{weight: [B, *normalized_shape]}`."""
    a = activations[0]  # without eps the layer takes that of the input's dtype: not widened before
    if layer.eps is not None:
        (a,) = widen(a)
    _check_batched(layer, a, len(layer.normalized_shape) + 1)
    return _trailing(layer, F.rms_norm(a, layer.normalized_shape, eps=layer.eps), backprops)


def _channelwise(layer: Layer, a: Tensor, g: Tensor, groups: int, statistics: Sequence[Tensor] = ()) -> PerParameter:
    """For parameters of the channels, `[B, C, ...]`: PyTorch's own backward, with the samples folded into the groups.

    Faster than normalising and multiplying (B=32, C=32, 32x32 positions, two CPU threads: 0.56 against 4.1 ms).
    """
    a, g = widen(a.contiguous(), g.contiguous())
    batch, channels = a.shape[:2]
    pair = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    weights = {p: i for i, p in enumerate(pair) if p is not None and p.requires_grad}
    if batch == 0:
        return {p: a.new_zeros(0, *p.shape) for p in weights}  # folded rows of nobody may show no channels either
    size = a.shape[2:].numel()
    mean, rstd = statistics or torch.native_group_norm(a, None, None, batch, channels, size, groups, layer.eps)[1:]
    ones = a.new_ones(batch * channels)
    gradients = torch.ops.aten.native_group_norm_backward(
        g, a, mean.view(1, -1), rstd.view(1, -1), ones, 1, batch * channels, size, batch * groups, [False, True, True]
    )[1:]
    return {p: gradients[i].view(batch, channels) for p, i in weights.items()}


@register_grad_sampler(nn.GroupNorm, supports=_supports)
def group_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, C, ...]` to `{weight, bias: [B, C]}`.

    The groups' means and reciprocal deviations, if the forward kept them, are two more activations.
    """
    _check_batched(layer, activations[0], 2)
    return _channelwise(layer, activations[0], backprops, layer.num_groups, activations[1:])


@register_grad_sampler(list(INSTANCE_NORM), supports=_instance_norm_supports)
def instance_norm_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`[B, C, ...]` to `{weight, bias: [B, C]}`: every channel is a group."""
    a = activations[0]
    rank = next((rank for cls, rank in INSTANCE_NORM.items() if isinstance(layer, cls)), a.dim())
    _check_batched(layer, a, rank, exactly=True)
    return _channelwise(layer, a, backprops, a.shape[1])


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
