"""`nn.Embedding`, on index tensors of any rank.

Index letters: B samples, T indices of a sample, V rows of the table, d features. The gradient of sample i is
the sum of `g_t` in row `ids_t`; nothing of size `V` is needed for its norm or for a weighted sum's scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grad_samplers.registry import (
    Layer,
    PerParameter,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
)
from grad_samplers.tensors import plain_parameters, trainable, widen


def supports(layer: Layer) -> str | None:
    """Refuse `max_norm`: its forward rescales the rows that the batch uses, so the table tells who was in it."""
    if getattr(layer, "max_norm", None) is not None:
        return (
            f"{type(layer).__qualname__} has max_norm={layer.max_norm}, which changes the weight in the forward, "
            f"without noise, depending on the data: use max_norm=None"
        )
    return plain_parameters(layer, "weight")


def slots(ids: Tensor) -> Tensor:
    """`[B, T]`: equal ids of a sample get equal numbers below T, different ids different ones.

    By sorting, so the result's shape does not depend on the data and an accelerator is not waited for.
    """
    ordered, order = ids.sort(dim=1)
    steps = torch.zeros_like(ordered, dtype=torch.int64)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=steps[:, 1:])
    return torch.empty_like(steps).scatter_(1, order, steps.cumsum(1))


def capture_rows(layer: Layer, activations: list[Tensor], backprops: Tensor) -> tuple[Tensor, Tensor]:
    """ids `[B, T]` and what each adds to its row, `[B, T, d]`: nothing for `padding_idx`."""
    ids = activations[0]
    ids = (ids.unsqueeze(1) if ids.dim() == 1 else ids.flatten(1)).long()
    (g,) = widen(backprops)
    g = g.unsqueeze(1) if g.dim() == 2 else g.flatten(1, -2)
    if layer.padding_idx is not None:
        g = g.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0)
    if getattr(layer, "scale_grad_by_freq", False):
        slot = slots(ids)
        counts = torch.zeros_like(slot).scatter_add_(1, slot, torch.ones_like(slot))
        g = g / counts.gather(1, slot).unsqueeze(2)
    return ids, g


def sum_rows(index: Tensor, g: Tensor, rows: int) -> Tensor:
    """`[B, T, d]` summed into `[B, rows, d]` at `index [B, T]`."""
    batch, _, d = g.shape
    flat = index + torch.arange(batch, device=index.device).unsqueeze(1) * rows
    return g.new_zeros(batch * rows, d).index_add_(0, flat.flatten(), g.flatten(0, 1)).view(batch, rows, d)


@register_grad_sampler(nn.Embedding, supports=supports)
def embedding_grad_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """`{weight: [B, V, d]}`; with `scale_grad_by_freq` the frequency counts within the sample."""
    if not trainable(layer.weight):
        return {}
    ids, g = capture_rows(layer, activations, backprops)
    return {layer.weight: sum_rows(ids, g, layer.weight.shape[0])}


@register_norm_sampler(nn.Embedding)
def embedding_norm_sample(layer: Layer, activations: list[Tensor], backprops: Tensor) -> PerParameter:
    """Sum the gradients of equal ids, at most T rows per sample, and take the norm of those."""
    if not trainable(layer.weight):
        return {}
    ids, g = capture_rows(layer, activations, backprops)
    if ids.shape[1] > 1:
        g = sum_rows(slots(ids), g, ids.shape[1])
    return {layer.weight: torch.linalg.vector_norm(g, dim=(1, 2))}


@register_weighted_sampler(nn.Embedding)
def embedding_weighted_sample(
    layer: Layer, activations: list[Tensor], backprops: Tensor, weights: Tensor
) -> PerParameter:
    """One `index_add` of the scaled gradients into `[V, d]`."""
    if not trainable(layer.weight):
        return {}
    ids, g = capture_rows(layer, activations, backprops)
    g = g * weights.to(g.dtype).view(-1, 1, 1)
    return {layer.weight: g.new_zeros(layer.weight.shape).index_add_(0, ids.flatten(), g.flatten(0, 1))}
