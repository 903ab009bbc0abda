"""What one use of a parameter adds to its per-sample gradient, and the three things one can ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from grad_samplers import Sampler, per_sample_gradients, per_sample_norms, weighted_sum
from gsm.ledger import norm, weighted

if TYPE_CHECKING:
    from gsm.tracked import Tracked


class Contribution(Protocol):
    """One summand of a parameter's per-sample gradient ``[batch, *p.shape]``."""

    def norms(self) -> Tensor:
        """``[batch]``."""

    def gradient(self) -> Tensor:
        """``[batch, *p.shape]``."""

    def weighted(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        """``sum_i weights[i] * grad[rows[i]]``; ``rows=None`` means all of them."""


class Record:
    """A layer's activations and output gradients, batch first, with the sampler that reads them.

    ``fold`` > 1: the rows are positions, that many per sample, for layers whose sampler knows no positions.
    """

    __slots__ = ("layer", "sampler", "activations", "backprops", "fold", "batch_size", "_norms")

    def __init__(
        self, layer: Any, sampler: Sampler, activations: list[Any], backprops: Any, batch_size: int, fold: int = 1
    ):
        self.layer, self.sampler, self.fold, self.batch_size = layer, sampler, fold, batch_size
        self.activations, self.backprops = activations, backprops
        self._norms: Mapping[Any, Tensor] | None = None

    def gradients(self) -> Mapping[Any, Tensor]:
        grads = per_sample_gradients(self.layer, self.activations, self.backprops, sampler=self.sampler)
        if self.fold == 1:
            return grads
        return {p: g.unflatten(0, (self.batch_size, self.fold)).sum(1) for p, g in grads.items()}

    def norms(self) -> Mapping[Any, Tensor]:
        if self._norms is None:
            if self.fold == 1:
                self._norms = per_sample_norms(self.layer, self.activations, self.backprops, sampler=self.sampler)
            else:
                self._norms = {p: norm(g) for p, g in self.gradients().items()}
        return self._norms

    def known_norms(self, norms: Mapping[Any, Tensor]) -> None:
        """Takes norms that were computed for several records at once."""
        self._norms = norms

    def weighted(self, weights: Tensor, rows: Tensor | None) -> Mapping[Any, Tensor]:
        if self.fold > 1:
            weights = weights.repeat_interleave(self.fold)
            if rows is not None:
                rows = (rows[:, None] * self.fold + torch.arange(self.fold, device=rows.device)).flatten()
        activations, backprops = self.activations, self.backprops
        if rows is not None and self.sampler.cls is nn.EmbeddingBag and len(activations) > 1:
            # The ids of all bags in a row cannot be selected by bag: the others get the output gradient zero instead.
            backprops = torch.zeros_like(backprops).index_copy_(0, rows, backprops[rows])
            weights = weights.new_zeros(len(backprops)).index_copy_(0, rows, weights)
        elif rows is not None:
            activations = [a[rows] if isinstance(a, Tensor) else a for a in activations]
            backprops = [b[rows] for b in backprops] if isinstance(backprops, list) else backprops[rows]
        return weighted_sum(self.layer, activations, backprops, weights, sampler=self.sampler)


class Aside(NamedTuple):
    """A layer taken apart: stand-ins with only the small parameters (a bias) and only the large ones trainable."""

    small_layer: Any
    small: list[tuple[Tensor, Tracked]]
    large_layer: Any
    large: list[tuple[Tensor, Tracked]]


class Dense:
    """A per-sample gradient that exists."""

    __slots__ = ("grad",)

    def __init__(self, grad: Tensor):
        self.grad = grad

    def norms(self) -> Tensor:
        return norm(self.grad)

    def gradient(self) -> Tensor:
        return self.grad

    def weighted(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        return weighted(self.grad if rows is None else self.grad[rows], weights)


class Paired:
    """A parameter's share in a record: nothing is materialised until somebody asks for it."""

    __slots__ = ("record", "parameter")

    def __init__(self, record: Record, parameter: Tensor):
        self.record, self.parameter = record, parameter

    def norms(self) -> Tensor:
        return self.record.norms()[self.parameter]

    def gradient(self) -> Tensor:
        return self.record.gradients()[self.parameter]

    def weighted(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        return self.record.weighted(weights, rows)[self.parameter]


class Pulled:
    """A contribution to ``value = f(leaf)``, pulled back through ``f`` (a transpose, weight norm, ``1 + weight``).

    ``f`` is the same for every sample, so a weighted sum is pulled back once; only gradients and norms need one
    vector-Jacobian product a sample, and norms not even that if ``f`` only moves entries around.
    """

    __slots__ = ("inner", "value", "leaf", "isometric")

    def __init__(self, inner: Contribution, value: Tensor, leaf: Tensor, isometric: bool):
        self.inner, self.value, self.leaf, self.isometric = inner, value, leaf, isometric

    def norms(self) -> Tensor:
        return self.inner.norms() if self.isometric else norm(self.gradient())

    def gradient(self) -> Tensor:
        grad = self.inner.gradient()
        if grad.shape[0] == 0:
            return grad.new_zeros(0, *self.leaf.shape)
        return self._pull(grad.to(self.value.dtype), batched=True)

    def weighted(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        total = self.inner.weighted(weights, rows)
        part = self.isometric and self.value.numel() < self.leaf.numel() and not self.value.is_complex()
        if part and self.is_view() and self.leaf.is_contiguous():  # a piece, to be put where it belongs
            out, at = total.new_zeros(self.leaf.shape), self.value.storage_offset() - self.leaf.storage_offset()
            out.as_strided(self.value.shape, self.value.stride(), at).copy_(total)
            return out
        return self._pull(total.to(self.value.dtype), batched=False).to(total.dtype)

    def is_view(self) -> bool:
        """Whether the value lies in the parameter's own memory."""
        return self.value.untyped_storage().data_ptr() == self.leaf.untyped_storage().data_ptr()

    def _pull(self, grad: Tensor, *, batched: bool) -> Tensor:
        (out,) = torch.autograd.grad(
            self.value, self.leaf, grad, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        if out is None:
            shape = (grad.shape[0], *self.leaf.shape) if batched else self.leaf.shape
            return grad.new_zeros(shape)
        return out
