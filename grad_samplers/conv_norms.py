"""Norms of a convolution's per-sample weight gradients that are never formed: two ways by Gram matrices.

At output position t the kernel sees a window `w_t` of the input, and the gradient is `sum_t g_t (x) w_t`, so

    |sum_t g_t (x) w_t|^2 = sum_{s,t} <g_s, g_t> <w_s, w_t>

(Bu et al. 2022, "Scalable and efficient training of large convolutional neural networks with differential privacy").
*By windows*: unfold the input and multiply. *By pixels*: `<w_s, w_t> = sum_k <x_{s+k}, x_{t+k}>` over the offsets k of
the kernel, so the windows' Gram matrix is a sum of shifted parts of the pixels', which costs as many operations fewer
as the kernel has entries, and nothing is unfolded. The offsets of each dimension are summed by themselves.

Index letters: B samples, C input and O output channels, N input and T output positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grad_samplers import linear
from grad_samplers.conv_capture import Convolution, patches
from grad_samplers.tensors import norms_of_grams, norms_of_products

ADDITION = 24
"""Multiply-adds of a matrix product that take as long as moving and adding one number of a Gram matrix."""


def costs(conv: Convolution) -> dict[str, float]:
    """Multiply-adds per sample: of the gradient itself, and of either way around it.

    Two threads, ms, by gradient and by pixels: B=32, 128 channels, 3x3, 8x8 positions 4.9 and 0.7; B=16, 256 channels,
    14x14 16.4 and 3.7; B=64, 128 to 100 channels, 5, 128 positions 6.1 and 2.8; B=32, 64 channels, 3x3, 16x16 5.6 and
    5.8. Unfolding counts as much again as what follows.
    """
    out, channels, *kernel = conv.weight_shape
    columns = channels * torch.Size(kernel).numel()
    pixels, length = conv.x.shape[2:].numel(), conv.g.shape[2:].numel()
    found = {"gradient": float(length * out * columns)}
    if conv.groups == 1:
        found["windows"] = 2.0 * length**2 * (out + columns)
        found["pixels"] = float(pixels**2 * channels + length**2 * out)
        left = pixels
        for k, inner, outer in zip(kernel, conv.x.shape[2:], conv.g.shape[2:], strict=True):
            left = left // max(inner, 1) * outer
            found["pixels"] += ADDITION * k * left**2
    return found


def cheapest(conv: Convolution) -> str:
    """A key of :func:`costs`; a gradient so small that the number of calls counts is made."""
    found = costs(conv)
    if conv.x.shape[0] * torch.Size(conv.weight_shape).numel() <= linear.SMALL:
        return "gradient"
    return min(found, key=found.__getitem__)


def norms_by_windows(conv: Convolution) -> Tensor:
    """`[B]`."""
    return norms_of_products(patches(conv), conv.g.flatten(2).mT)


def window_numel(conv: Convolution) -> int:
    """Numbers that one sample takes on the way."""
    length = conv.g.shape[2:].numel()
    return length * (torch.Size(conv.weight_shape[1:]).numel() + 2 * length)


def norms_by_pixels(conv: Convolution) -> Tensor:
    """`[B]`."""
    g = conv.g.flatten(2)
    return norms_of_grams(_gram_of_windows(conv), torch.bmm(g.mT, g))


def pixel_numel(conv: Convolution) -> int:
    """Numbers that one sample takes on the way."""
    return int(conv.x.shape[2:].numel() ** 2 + conv.g.shape[2:].numel() ** 2)


def _gram_of_windows(conv: Convolution) -> Tensor:
    """`<w_s, w_t>`, `[B, T, T]`, from the Gram matrix of the pixels, dimension by dimension."""
    if len(conv.kernel) == 1 and conv.stride == (1,):
        return _gram_of_sequences(conv)
    batch, _, *size = conv.x.shape
    x = conv.x.flatten(2)
    gram = torch.bmm(x.mT, x).view(batch, *size, *size)
    for dim in range(len(size)):
        s, t = 1 + dim, 1 + dim + len(size)  # the same dimension of either position
        shape = list(gram.shape)
        shape[s] = shape[t] = conv.g.shape[2 + dim]
        total = gram.new_zeros(shape)
        for offset in range(conv.kernel[dim]):
            positions, pixels = _in_reach(conv, dim, offset)
            part = [slice(None)] * gram.dim()
            part[s] = part[t] = pixels
            where = [slice(None)] * gram.dim()
            where[s] = where[t] = positions
            total[tuple(where)] += gram[tuple(part)]
        gram = total
    return gram.flatten(1 + len(size)).flatten(1, len(size))


def _gram_of_sequences(conv: Convolution) -> Tensor:
    """The same in one dimension without strides, where `[s + k, t + k]` lies the same number of places behind `[s, t]`
    for all s, t and samples: the shifted parts are slices of one long row (B=64, 128 positions, 5: 1.3 for 3.2 ms)."""
    (kernel,), (dilation,), (padding,) = conv.kernel, conv.dilation, conv.padding
    x = F.pad(conv.x, (padding, padding)) if padding else conv.x
    gram, length = torch.bmm(x.mT, x), conv.g.shape[2]
    row, shift = gram.view(-1), dilation * (x.shape[2] + 1)
    last = max(0, len(row) - (kernel - 1) * shift)  # behind it no window begins
    total = torch.empty_like(gram)
    sums = total.view(-1)[:last].copy_(row[:last])
    for offset in range(1, kernel):
        sums += row[offset * shift : offset * shift + last]
    return total[:, :length, :length]


def _in_reach(conv: Convolution, dim: int, offset: int) -> tuple[slice, slice]:
    """The output positions at which this entry of the kernel lies on a pixel (not on padding), and those pixels."""
    stride, pixels, positions = conv.stride[dim], conv.x.shape[2 + dim], conv.g.shape[2 + dim]
    start = offset * conv.dilation[dim] - conv.padding[dim]
    first = max(0, -(start // stride))
    last = min(positions - 1, (pixels - 1 - start) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(start + first * stride, start + last * stride + 1, stride)
