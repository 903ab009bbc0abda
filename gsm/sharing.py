"""Recognising the uses of one parameter among its contributions (the formulas are in `grad_samplers.sharing`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from grad_samplers import sharing
from gsm.contributions import Contribution, Paired, Pulled


def shared_squared_norms(held: Sequence[Contribution]) -> Tensor | None:
    """``[batch]`` squared norms of the sum of ``held`` without materialising it, or None where no formula is known."""
    if _apart(held):
        return torch.stack([c.norms() for c in held]).square_().sum(0)
    uses = [_use(c) for c in held]
    if any(u is None for u in uses):
        return None
    return sharing.shared_squared_norms([u for u in uses if u is not None])


def _apart(held: Sequence[Contribution]) -> bool:
    """Whether the uses are of views of the parameter that do not overlap: of each row by itself, of chunks in turn."""
    spans = []
    for c in held:
        if not isinstance(c, Pulled) or c.value.numel() == 0 or not c.is_view():
            return False
        x = c.value.detach()
        reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        spans.append((x.storage_offset(), x.storage_offset() + reach))
    spans.sort()
    return all(end < start for (_, end), (start, _) in pairwise(spans))


def _use(c: Contribution) -> sharing.Outer | sharing.Rows | None:
    """A contribution as a use of the leaf's matrix by a linear layer (perhaps transposed) or an embedding."""
    transposed = False
    if isinstance(c, Pulled):
        if not _is_transpose(c.value, c.leaf) and not _is_same(c.value, c.leaf):
            return None
        transposed = _is_transpose(c.value, c.leaf)
        c = c.inner
    if not isinstance(c, Paired) or c.record.fold != 1:
        return None
    record = c.record
    if c.parameter is not getattr(record.layer, "weight", None):
        return None
    if record.sampler.cls is nn.Linear:
        return sharing.Outer.of_linear(record.activations, record.backprops, transposed)
    if record.sampler.cls is nn.Embedding and not transposed:
        return sharing.Rows.of_embedding(record.layer, record.activations, record.backprops)
    return None


def _is_same(value: Tensor, leaf: Tensor) -> bool:
    return value.data_ptr() == leaf.data_ptr() and value.shape == leaf.shape and value.stride() == leaf.stride()


def _is_transpose(value: Tensor, leaf: Tensor) -> bool:
    return (
        leaf.dim() == 2
        and value.data_ptr() == leaf.data_ptr()
        and value.shape == leaf.shape[::-1]
        and value.stride() == leaf.stride()[::-1]
        and not _is_same(value, leaf)
    )
