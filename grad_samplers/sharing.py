"""Norms of a weight matrix used several times, without materialising its per-sample gradients.

The gradient of a sum of uses is the sum of their gradients, and the norm of a sum is not the sum of the norms. A
matrix `[V, d]` is used in two ways: a linear layer adds `sum_s u_s h_s^T` (output gradients `u_s`, inputs `h_s`); an
embedding adds `e_t` to row `x_t`. With U, E the sums of either kind:

    |U + E|^2 = |U|^2 + |E|^2 + 2 sum_{s,t} u_s[x_t] <h_s, e_t>

where several uses of one kind are one use with the positions concatenated. Index letters, as in `linear`:
B samples, S and T positions, V rows, d columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grad_samplers.embedding import capture_rows, slots, sum_rows
from grad_samplers.linear import outer_norms
from grad_samplers.registry import Layer
from grad_samplers.tensors import positions, widen


@dataclass(frozen=True)
class Outer:
    """`sum_s rows_s columns_s^T`: rows `[B, S, V]`, columns `[B, S, d]`."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def of_linear(activations: Sequence[Tensor], backprops: Tensor, transposed: bool = False) -> Outer:
        """The weight's gradient in one call of a linear layer; ``transposed`` for a weight stored `[in, out]`."""
        a, g = widen(positions(activations[0]), positions(backprops))
        return Outer(a, g) if transposed else Outer(g, a)


@dataclass(frozen=True)
class Rows:
    """`e_t` added to row `ids_t`: ids `[B, T]`, gradients `[B, T, d]`."""

    ids: Tensor
    gradients: Tensor

    @staticmethod
    def of_embedding(layer: Layer, activations: Sequence[Tensor], backprops: Tensor) -> Rows:
        """The table's gradient in one call of an embedding."""
        return Rows(*capture_rows(layer, list(activations), backprops))


def _joined(parts: list[Tensor]) -> Tensor:
    """Their positions in a row. One part stays itself: a copy of a language model's output gradient takes a while."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def shared_squared_norms(uses: Sequence[Outer | Rows]) -> Tensor:
    """Squared norms `[B]` of the sum of all uses of one matrix.

    Where the terms cancel almost completely, their rounding is added on top: an underestimated norm would be clipped
    too little.
    """
    outer = [u for u in uses if isinstance(u, Outer)]
    rows = [u for u in uses if isinstance(u, Rows)]
    parts: list[Tensor] = []
    if outer:
        u = _joined([x.rows for x in outer])
        h = _joined([x.columns for x in outer])
        parts.append(outer_norms(u, h).square())
    if rows:
        ids = _joined([x.ids for x in rows])
        e = _joined([x.gradients for x in rows])
        summed = sum_rows(slots(ids), e, ids.shape[1])
        parts.append(torch.linalg.vector_norm(summed, dim=(1, 2)).square())
    if len(parts) == 1:
        return parts[0]
    picked = u.gather(2, ids.unsqueeze(1).expand(-1, u.shape[1], -1))
    cross = 2 * (picked * torch.bmm(h, e.transpose(1, 2))).sum((1, 2))
    total, magnitude = parts[0] + parts[1] + cross, parts[0] + parts[1]
    margin = 8 * torch.finfo(total.dtype).eps * magnitude
    return torch.where(total < 1e-4 * magnitude, total.clamp(min=0) + margin, total)
