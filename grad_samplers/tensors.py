"""Small tensor helpers that the samplers share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

_HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """`x`, in float32 if it was in half precision: gradients, norms and sums are computed in float32 or better."""
    return x.float() if x.dtype in _HALF else x


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, float32 or better (under autocast an input and a gradient may differ)."""
    dtype = tensors[0].dtype
    if dtype not in _HALF and all(x.dtype == dtype for x in tensors):
        return tensors  # the usual case, and calls that do nothing cost microseconds too
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def positions(x: Tensor) -> Tensor:
    """`[B, ..., d]` as `[B, T, d]`, where T counts the positions of a sample (1 if there are none)."""
    if x.dim() < 2:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no batch dimension in front of its features")
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def position_sum(g: Tensor) -> Tensor:
    """`[B, T, p]` summed to `[B, p]`."""
    return g.squeeze(1) if g.shape[1] == 1 else g.sum(1)


def spatial_sum(g: Tensor) -> Tensor:
    """`[B, C, ...]` summed to `[B, C]`."""
    return g.flatten(2).sum(2) if g.dim() > 2 else g


def trainable(parameter: Tensor | None) -> bool:
    """Whether a (possibly absent) parameter wants a gradient."""
    return parameter is not None and parameter.requires_grad


def norms_of_products(*factors: Tensor) -> Tensor:
    """Norms `[B]` of `sum_t u_t (x) v_t (x) ...`, from the factors, each `[B, T, .]`, by Gram matrices over positions.

    `|sum_t u_t (x) v_t|^2 = sum_{s,t} <u_s, u_t> <v_s, v_t>` (Li et al. 2021, "Large Language Models Can Be Strong
    Differentially Private Learners", section 4). The summands are symmetric in s and t: of the blocks above the
    diagonal only one half is computed. Where the terms cancel almost completely, rounding of the order of
    `eps * |u|^2 |v|^2` may exceed the result; an underestimated norm would be clipped too little, so there the rounding
    is added on top.
    """
    length = factors[0].shape[1]
    # Two threads, B=16 T=128 256 to 1024: 4.0 ms in one block, 4.4 in two; B=4 T=512: 12.0 in one, 10.2 in four.
    step = -(-length // max(1, min(4, length // 128)))
    squared: Any = None
    magnitudes: list[Any] = [None] * len(factors)
    for start in range(0, max(length, 1), step or 1):
        product: Any = None
        for i, x in enumerate(factors):
            gram = torch.bmm(x[:, start : start + step], x[:, : start + step].transpose(1, 2))
            own = gram[:, :, start:].diagonal(dim1=1, dim2=2).sum(1)
            magnitudes[i] = own if magnitudes[i] is None else magnitudes[i] + own
            product = gram if product is None else product.mul_(gram)
        part = product[:, :, start:].sum((1, 2))
        if start:
            part = part.add_(product[:, :, :start].sum((1, 2)), alpha=2)
        squared = part if squared is None else squared + part
    return _root(squared, functools.reduce(torch.mul, magnitudes))


def norms_of_grams(first: Tensor, second: Tensor) -> Tensor:
    """Norms `[B]` of `sum_t u_t (x) v_t` from the Gram matrices of u and v, `[B, T, T]` (the first is overwritten).

    The same as :func:`norms_of_products`, where the Gram matrices are had in another way than by a product.
    """
    magnitude = first.diagonal(dim1=1, dim2=2).sum(1) * second.diagonal(dim1=1, dim2=2).sum(1)
    return _root(first.mul_(second).sum((1, 2)), magnitude)


def _root(squared: Tensor, magnitude: Tensor) -> Tensor:
    """The square root, with the rounding on top where the terms of the sum cancel (`magnitude`: the sum of squares)."""
    margin = 4 * torch.finfo(squared.dtype).eps * magnitude
    return torch.where(squared < 1e-4 * magnitude, squared.clamp(min=0) + margin, squared).sqrt()


def sample_norms(gradients: Tensor) -> Tensor:
    """`[B, ...]` to the norm of each sample's, `[B]`."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1)


def norms_in_chunks(norms: Callable[[slice], Tensor], batch: int, numel: int, like: Tensor) -> Tensor:
    """Norms `[B]`, computed for a few samples at a time so that what they need on the way stays small.

    Args:
        norms: returns the norms of a slice of the samples.
        batch: number of samples B.
        numel: how many numbers one sample takes on the way.
        like: a tensor of the result's dtype and device.
    """
    chunk = CPU_CHUNK_NUMEL if like.device.type == "cpu" else CHUNK_NUMEL
    step = max(1, chunk // max(1, numel))
    if step >= batch:
        return norms(slice(None))
    out = like.new_empty(batch)
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        out[part] = norms(part)
    return out


CPU_CHUNK_NUMEL = 1 << 20
CHUNK_NUMEL = 1 << 26
"""Numbers held at a time on the way to a norm: 4 MiB in float32, what a CPU's cache may hold
(larger was not faster); 256 MiB on an accelerator, where every launch counts."""


def plain_parameters(layer: nn.Module, *names: str) -> str | None:
    """None if the layer's trainable parameters are exactly the named attributes, else a sentence saying what differs.

    Parametrizations, weight norm and the like replace a parameter by something computed from others.
    """
    if not isinstance(layer, nn.Module):
        return None
    kind = type(layer).__qualname__
    for name in names:
        value = getattr(layer, name, None)
        if isinstance(value, UninitializedParameter):
            return f"{kind}.{name} is lazy and has no shape yet: run the model on one batch first"
        if value is not None and layer._parameters.get(name) is not value:
            return f"{kind}.{name} is computed from other tensors (a parametrization or weight norm)"
    for name, parameter in layer._parameters.items():
        if name not in names and trainable(parameter):
            return f"{kind} has a further parameter '{name}' that its sampler does not know"
    return None
