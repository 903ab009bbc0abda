"""What a convolution captured: the input and output gradient whose correlation is the weight's gradient.

A transposed convolution is the adjoint of a convolution: input and output gradient change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from grad_samplers.registry import Layer
from grad_samplers.tensors import widen


class Convolution(NamedTuple):
    """One capture, as the convolution whose weight gradient is wanted: `x [B, C, *S]`, `g [B, O, *S']`.

    For a transposed layer x is the output gradient and g the layer's input.
    """

    x: Tensor
    g: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[O, C / groups, *kernel]`."""
        return (self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel)

    def part(self, samples: slice) -> Convolution:
        """The same for a slice of the samples."""
        return self._replace(x=self.x[samples], g=self.g[samples])


def convolution(layer: Layer, activations: list[Tensor], backprops: Tensor, transposed: bool) -> Convolution:
    kernel = tuple(layer.weight.shape[2:])
    a, g = widen(activations[0], backprops)
    if a.dim() != len(kernel) + 2:
        raise ValueError(
            f"{type(layer).__qualname__} got an input of shape {tuple(a.shape)}: "
            f"a batch has {len(kernel) + 2} dimensions, [B, C, ...]"
        )
    stride, dilation = tuple(layer.stride), tuple(layer.dilation)
    if transposed:
        x, padding = _laid_out(g, a.shape[2:], kernel, stride, tuple(layer.padding), dilation)
        return Convolution(x, a, kernel, stride, padding, dilation, layer.groups)
    x, padding = _padded(layer, a, kernel, dilation)
    return Convolution(x, g, kernel, stride, padding, dilation, layer.groups)


def _padded(
    layer: Layer, a: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the symmetric zero padding still to be applied; anything else is applied here."""
    none = (0,) * len(kernel)
    mode = getattr(layer, "padding_mode", "zeros")
    if layer.padding == "valid":
        return a, none
    if layer.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    if mode == "zeros" and all(left == right for left, right in sides):
        return a, tuple(left for left, _ in sides)
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(a, flat, mode="constant" if mode == "zeros" else mode), none


def _laid_out(
    g: Tensor,
    length: Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """A transposed layer's output gradient, as the input of the adjoint convolution, and that one's padding.

    The margin (`output_padding`, or what `output_size` asked for) is read off the shapes. A margin of a whole stride
    or more would make the adjoint's output too long: then padding and margin are settled here.
    """
    spans = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(length, stride, dilation, kernel, strict=True)]
    margins = [n + 2 * p - span for n, p, span in zip(g.shape[2:], padding, spans, strict=True)]
    if all(margin < s for margin, s in zip(margins, stride, strict=True)):
        return g, padding
    sides = [(p, p - margin) for p, margin in zip(padding, margins, strict=True)]  # a negative side crops
    return F.pad(g, [side for pair in reversed(sides) for side in pair]), (0,) * len(kernel)


def windows(conv: Convolution) -> Tensor:
    """What each output position sees, without copying: `[B, C, *S', *kernel]`."""
    pads = [p for p in reversed(conv.padding) for _ in range(2)]
    x = F.pad(conv.x, pads) if any(pads) else conv.x
    for dim, (k, s, d) in enumerate(zip(conv.kernel, conv.stride, conv.dilation, strict=True), start=2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d].narrow(dim, 0, conv.g.shape[dim])
    return x


def patches(conv: Convolution) -> Tensor:
    """`[B, T, C * kernel]`, position by position."""
    rank = len(conv.kernel)
    order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    return windows(conv).permute(order).flatten(1 + rank).flatten(1, rank)
