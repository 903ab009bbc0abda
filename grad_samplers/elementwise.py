"""Layers whose parameters act on single numbers: PReLU, and the bias token of Opacus's DPMultiheadAttention."""

from __future__ import annotations

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

SEQUENCE_BIAS = "opacus.layers.dp_multihead_attention.SequenceBias"


@register_grad_sampler(nn.PReLU, supports=lambda layer: plain_parameters(layer, "weight"))
def prelu_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`{weight: [B, num_parameters]}`: the sum of `g a` where `a < 0`, over all numbers that share the slope."""
    if not trainable(layer.weight):
        return {}
    a, g = widen(activations[0], backprops)
    product = a.clamp(max=0).mul_(g)
    if layer.weight.numel() == 1:
        return {layer.weight: product.flatten(1).sum(1, keepdim=True) if a.dim() > 1 else product.unsqueeze(1)}
    return {layer.weight: spatial_sum(product)}


@register_grad_sampler(SEQUENCE_BIAS, supports=lambda layer: plain_parameters(layer, "bias"))
def sequence_bias_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """The bias is the last position of each sequence, so its gradient is the last one of `[B, T + 1, d]`."""
    if not trainable(layer.bias):
        return {}
    (g,) = widen(backprops)
    return {layer.bias: g[:, -1]}


for _cls, _grad in ((nn.PReLU, prelu_grad_sample), (SEQUENCE_BIAS, sequence_bias_grad_sample)):
    register_norm_sampler(_cls)(norms_from(_grad))
    register_weighted_sampler(_cls)(weighted_from(_grad))
