"""Convolutions and transposed convolutions in one, two and three dimensions, with all their options.

A sample's weight gradient is an ordinary convolution weight gradient. The batch's are computed in one call by
folding the samples into groups: `[B, C, ...]` becomes `[1, B*C, ...]` with B times the groups (the idea is from
Rochette et al. 2019, "Efficient Per-Example Gradient Computations in Convolutional Neural Networks").
What a layer captured is a :class:`grad_samplers.conv_capture.Convolution`, of transposed layers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from grad_samplers.conv_capture import Convolution, convolution, windows
from grad_samplers.conv_norms import cheapest, norms_by_pixels, norms_by_windows, pixel_numel, window_numel
from grad_samplers.registry import (
    Layer,
    PerParameter,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
)
from grad_samplers.tensors import (
    norms_in_chunks,
    plain_parameters,
    sample_norms,
    spatial_sum,
    trainable,
    widen,
)

CONV = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
CONV_TRANSPOSE = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
CONVOLUTIONS = [*CONV, *CONV_TRANSPOSE]
CPU_WINDOWS = 1 << 19
"""Numbers unfolded at a time on a CPU: 2 MiB in float32, what a second-level cache holds (B=32, 128 channels, 3x3, 8x8:
6.7 ms; half as many, three samples at a time, 10.3)."""


def _supports(layer: Layer) -> str | None:
    kind = type(layer)
    for parent in (cls for cls in kind.__mro__ if cls in CONVOLUTIONS):
        for name in ("_conv_forward", "_output_padding"):
            if getattr(kind, name, None) is not getattr(parent, name, None):
                return f"{kind.__qualname__} overrides {parent.__qualname__}.{name}"
    return plain_parameters(layer, "weight", "bias")


def _weight_grad(x: Tensor, g: Tensor, conv: Convolution, shape: Sequence[int], groups: int) -> Tensor:
    """PyTorch's own weight gradient of a convolution of `x`, `shape` being the weight's."""
    zeros = [0] * len(conv.kernel)
    mask = [False, True, False]
    weight = x.new_empty(1).expand(shape)  # only its shape matters
    arguments = (None, conv.stride, conv.padding, conv.dilation, False, zeros, groups, mask)
    return torch.ops.aten.convolution_backward(g, x, weight, *arguments)[1]


def patches_are_faster(conv: Convolution) -> bool:
    """Whether a batched matmul with the unfolded input beats the folded convolution.

    It does for 1x1 kernels, short one-dimensional ones, and where the positions are fewer than the output channels
    (B=32, 3x3, 128 channels, 8x8 positions: 9 against 21 ms; but 32 channels, 32x32 positions: 10 against 4 ms). The
    rule picked the faster for 18 of 21 shapes (float32, one CPU thread), elsewhere at most 1.6 times slower.
    On a CPU also where the channels of either side do not fill its vectors, as in the first layer on images (two
    threads, B=32, 3 to 16 channels, 3x3, 32x32: 0.6 against 1.6 ms; faster for 64 of 70 shapes, else up to 1.4 slower).
    """
    if conv.groups > 1:
        return False
    kernel, length, channels = conv.kernel, conv.g.shape[2:].numel(), conv.g.shape[1]
    short = len(kernel) == 1 and kernel[0] <= 5
    unfilled = conv.g.device.type == "cpu" and (channels % 8 > 0 or conv.weight_shape[1] % 8 > 0)
    return short or max(kernel) == 1 or length < channels or unfilled


def _materialise(conv: Convolution) -> Tensor:
    """Every sample's weight gradient, `[B, O, C / groups, *kernel]`."""
    batch, shape = conv.x.shape[0], conv.weight_shape
    if batch == 0:
        return conv.x.new_zeros(0, *shape)
    if patches_are_faster(conv):
        return _from_windows(conv).view(batch, *shape)
    x = conv.x.reshape(1, -1, *conv.x.shape[2:])
    g = conv.g.reshape(1, -1, *conv.g.shape[2:])
    folded = (batch * shape[0], *shape[1:])
    return _weight_grad(x, g, conv, folded, batch * conv.groups).view(batch, *shape)


@register_grad_sampler(CONV, supports=_supports)
def conv_grad_sample(
    layer: Layer, activations: list[Tensor], backprops: Tensor, *, transposed: bool = False
) -> PerParameter:
    """`{weight: per-sample weight gradient, bias: sum of the output gradient over positions}`."""
    found: PerParameter = {}
    if trainable(layer.weight):
        found[layer.weight] = _materialise(convolution(layer, activations, backprops, transposed))
    if trainable(getattr(layer, "bias", None)):
        found[layer.bias] = spatial_sum(*widen(backprops))
    return found


@register_norm_sampler(CONV)
def conv_norm_sample(
    layer: Layer, activations: list[Tensor], backprops: Tensor, *, transposed: bool = False
) -> PerParameter:
    """Norms from Gram matrices over output positions where that is cheaper, else from the gradient, in chunks."""
    found: PerParameter = {}
    if trainable(layer.weight):
        conv = convolution(layer, activations, backprops, transposed)
        found[layer.weight] = _weight_norms(conv)
    if trainable(getattr(layer, "bias", None)):
        found[layer.bias] = torch.linalg.vector_norm(spatial_sum(*widen(backprops)), dim=1)
    return found


def _weight_norms(conv: Convolution) -> Tensor:
    batch, numel = conv.x.shape[0], torch.Size(conv.weight_shape).numel()
    way = cheapest(conv)
    if way == "gradient":
        return norms_in_chunks(lambda part: sample_norms(_materialise(conv.part(part))), batch, numel, like=conv.x)
    norms, held = (norms_by_pixels, pixel_numel) if way == "pixels" else (norms_by_windows, window_numel)
    return norms_in_chunks(lambda part: norms(conv.part(part)), batch, held(conv), like=conv.x)


def _from_windows(conv: Convolution) -> Tensor:
    """Every sample's weight gradient, `[B, O, C * kernel]`, from the unfolded input, a few samples at a time.

    Unfolded as `[C * kernel, T]`, which copies whole rows of positions (B=32, 64 channels, 3x3, 16x16: 6.8 ms; as
    `[T, C * kernel]` 19), and in pieces that stay in the cache.
    """
    rank = len(conv.kernel)
    g = conv.g.flatten(2)
    columns = torch.Size(conv.weight_shape[1:]).numel()
    seen = windows(conv).permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    on_cpu = g.device.type == "cpu"
    step = max(1, CPU_WINDOWS // max(1, columns * g.shape[2])) if on_cpu else len(g)
    out = g.new_empty(len(g), g.shape[1], columns)
    for start in range(0, len(g), step):
        part = seen[start : start + step].reshape(-1, columns, g.shape[2])
        torch.bmm(g[start : start + step], part.transpose(1, 2), out=out[start : start + step])
    return out


@register_weighted_sampler(CONV)
def conv_weighted_sample(
    layer: Layer, activations: list[Tensor], backprops: Tensor, weights: Tensor, *, transposed: bool = False
) -> PerParameter:
    """The ordinary weight gradient of the batch, with each sample's output gradient scaled by its weight."""
    (g,) = widen(backprops)
    scaled = g * weights.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
    found: PerParameter = {}
    if trainable(layer.weight):
        conv = convolution(layer, activations, scaled, transposed)
        if conv.x.shape[0] == 0:
            found[layer.weight] = conv.x.new_zeros(conv.weight_shape)
        else:
            found[layer.weight] = _weight_grad(conv.x, conv.g, conv, conv.weight_shape, conv.groups)
    if trainable(getattr(layer, "bias", None)):
        found[layer.bias] = spatial_sum(scaled).sum(0)
    return found


register_grad_sampler(CONV_TRANSPOSE, supports=_supports)(partial(conv_grad_sample, transposed=True))
register_norm_sampler(CONV_TRANSPOSE)(partial(conv_norm_sample, transposed=True))
register_weighted_sampler(CONV_TRANSPOSE)(partial(conv_weighted_sample, transposed=True))
