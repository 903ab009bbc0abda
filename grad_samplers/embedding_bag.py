"""`nn.EmbeddingBag` with `mode` "sum" and "mean": a sample is a bag.

Each index n of bag b adds `c_n g_b` to row `ids_n`, where the coefficient `c_n` is its weight in the bag (1, its
entry of `per_sample_weights`, or 1 / size of the bag; 0 for `padding_idx`). Hence
`|grad_b|^2 = |g_b|^2 sum_v (sum of c_n over the n in b with ids_n = v)^2`: the norm costs no more than a sort.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from grad_samplers import embedding
from grad_samplers.registry import (
    Layer,
    PerParameter,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
)
from grad_samplers.tensors import trainable, widen


class Bags(NamedTuple):
    """Every index of every bag: its row in the table, its bag and its coefficient, each `[N]`."""

    ids: Tensor
    bag: Tensor
    coefficient: Tensor


def _supports(layer: Layer) -> str | None:
    if layer.mode not in ("sum", "mean"):
        return f"EmbeddingBag has mode={layer.mode!r}: only 'sum' and 'mean' are covered"
    if layer.scale_grad_by_freq:
        return "EmbeddingBag has scale_grad_by_freq=True, which depends on the other samples: use False"
    return embedding.supports(layer)


def _bags(layer: Layer, activations: list[Tensor], g: Tensor) -> Bags:
    """Inputs are `[ids [B, N]]` or `[ids [N], offsets]`, then `per_sample_weights` (shaped as ids) if it was given.

    What was not given may be None or absent.
    """
    ids, *rest = (x for x in activations if x is not None)
    size = g.shape[0]
    if ids.dim() == 2:
        bag = torch.arange(size, device=ids.device).unsqueeze(1).expand_as(ids).flatten()
    else:
        if not rest:
            raise ValueError("EmbeddingBag got one-dimensional input without offsets, so its bags are unknown")
        offsets, *rest = rest
        starts = offsets[:size]  # include_last_offset appends the end of the last bag
        places = torch.arange(ids.shape[0], device=ids.device, dtype=offsets.dtype)
        bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    ids = ids.flatten().long()
    kept = torch.ones_like(ids, dtype=g.dtype)
    if layer.padding_idx is not None:
        kept = (ids != layer.padding_idx).to(g.dtype)
    if rest:
        return Bags(ids, bag, kept * rest[0].flatten().to(g.dtype))
    if layer.mode == "mean":
        counts = g.new_zeros(size).index_add_(0, bag, kept)
        return Bags(ids, bag, kept / counts[bag].clamp(min=1))
    return Bags(ids, bag, kept)


@register_grad_sampler(nn.EmbeddingBag, supports=_supports)
def embedding_bag_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`{weight: [B, V, d]}`."""
    if not trainable(layer.weight):
        return {}
    (g,) = widen(backprops)
    ids, bag, coefficient = _bags(layer, activations, g)
    rows, d = layer.weight.shape
    total = g.new_zeros(g.shape[0] * rows, d).index_add_(0, bag * rows + ids, coefficient.unsqueeze(1) * g[bag])
    return {layer.weight: total.view(-1, rows, d)}


@register_norm_sampler(nn.EmbeddingBag)
def embedding_bag_norm_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`|g_b|` times the norm of the bag's summed coefficients."""
    if not trainable(layer.weight):
        return {}
    (g,) = widen(backprops)
    ids, bag, coefficient = _bags(layer, activations, g)
    slot = embedding.slots((bag * layer.weight.shape[0] + ids).unsqueeze(0)).squeeze(0)
    summed = torch.zeros_like(coefficient).index_add_(0, slot, coefficient)
    owner = torch.zeros_like(bag).scatter_(0, slot, bag)
    squared = g.new_zeros(g.shape[0]).index_add_(0, owner, summed.square())
    return {layer.weight: squared.sqrt() * torch.linalg.vector_norm(g, dim=1)}


@register_weighted_sampler(nn.EmbeddingBag)
def embedding_bag_weighted_sample(
    layer: Layer, activations: list[Tensor], backprops: Tensor, weights: Tensor
) -> PerParameter:
    """One `index_add` into `[V, d]`."""
    if not trainable(layer.weight):
        return {}
    (g,) = widen(backprops)
    ids, bag, coefficient = _bags(layer, activations, g)
    scaled = g * weights.to(g.dtype).unsqueeze(1)
    added = coefficient.unsqueeze(1) * scaled[bag]
    return {layer.weight: g.new_zeros(layer.weight.shape).index_add_(0, ids, added)}
