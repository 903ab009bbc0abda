"""Inputs of `nn.EmbeddingBag`: all ids of the batch in a row, and the offset at which each sample's bag begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Bags(NamedTuple):
    """`ids [total]` (any integers), `offsets [B]`: bag `b` is `ids[offsets[b] : offsets[b + 1]]`."""

    ids: Tensor
    offsets: Tensor

    def bounds(self) -> list[int]:
        return [*self.offsets.tolist(), len(self.ids)]


def has_bags(model: nn.Module) -> bool:
    """Whether a model contains a layer that takes bags as ids and offsets."""
    return any(isinstance(m, nn.EmbeddingBag) and not m.include_last_offset for m in model.modules())


def bags_in(value: Any) -> Bags | None:
    """The first one-dimensional integer tensor, and after it one that can hold its offsets: 0 first, never falling."""
    rows = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.dim() == 1]
    integers = [x for x in rows if x.dtype in (torch.int32, torch.int64)]
    for offsets in integers[1:]:
        ids = integers[0]
        if len(offsets) and offsets[0] == 0 and bool((offsets.diff() >= 0).all()) and offsets[-1] <= len(ids):
            return Bags(ids, offsets)
    return None


def regrouped(value: Any, bags: Bags, rows: list[tuple[int, int]]) -> tuple[Any, list[Tensor]]:
    """`value` with other bags: for every (bag, turns) in `rows` that bag, its ids turned round so many times.

    Weights of the ids (a floating tensor of their length) go with them. Also returns the new tensors, which need no
    further selection.
    """
    bounds, made = bags.bounds(), []
    pieces = [torch.arange(bounds[b], bounds[b + 1]).roll(turns) for b, turns in rows]
    place = torch.cat(pieces).to(bags.ids.device)
    lengths = torch.tensor([0] + [len(p) for p in pieces[:-1]], device=bags.offsets.device)

    def change(x: Any) -> Any:
        if x is bags.offsets:
            new = lengths.cumsum(0).to(x.dtype)
        elif x is bags.ids or (isinstance(x, Tensor) and x.is_floating_point() and x.shape == bags.ids.shape):
            new = x.detach()[place]
        else:
            return x
        made.append(new)
        return new

    return tree_map(change, value), made
