"""Where the batch lies in a tensor.

Samplers want the batch in front. Inside a model it may be elsewhere: second (sequence first), or flattened together
with the positions. Shapes alone cannot tell when a sequence is as long as the batch, so :mod:`gsm.probe` runs the
model at two batch sizes and compares; :func:`guess` is for tensors the probe has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Unresolvable(RuntimeError):
    """A parameter is used in a way that cannot be taken apart by sample; the subtree around it has to be.

    ``subtree`` is set where a subtree was already taken as a whole, and that did not do.
    """

    def __init__(self, message: str, parameters: tuple[str, ...] = (), subtree: str | None = None):
        super().__init__(message)
        self.parameters, self.subtree = parameters, subtree


class SamplesInfluenceEachOther(ValueError, NotImplementedError):
    """What one sample's gradient is depends on its neighbours, so no bound on one record's influence would hold.

    Also the NotImplementedError that Opacus raises for such layers.
    """


class Untold(Unresolvable):
    """Which sample the rows of a tensor belong to is known neither from the probe nor from the graph."""


@dataclass(frozen=True)
class Layout:
    """The batch is dimension ``dim``; ``flat`` says whether and how positions are folded into it.

    ``"major"``: rows ordered sample by sample, ``[B * T]``; ``"minor"``: position by position, ``[T * B]``;
    ``"middle"``: ``outer`` times sample by sample, ``[E * B * T]`` (every expert sees all tokens).
    """

    dim: int = 0
    flat: str = ""
    outer: int = 1

    def factors(self, n: int, batch_size: int) -> tuple[int, int]:
        """``n`` rows are ``(outer, batch_size, inner)``: the number of outer and of inner positions."""
        positions = n // max(batch_size, 1)
        if self.flat == "major":
            return 1, positions
        return (positions, 1) if self.flat == "minor" else (self.outer, positions // self.outer)

    def fits(self, x: Tensor, batch_size: int) -> bool:
        """Whether a tensor can be laid out so."""
        if x.dim() <= self.dim:
            return False
        n = x.shape[self.dim]
        return n % (batch_size * self.outer) == 0 if self.flat and batch_size else n == batch_size

    def positions(self, x: Tensor, batch_size: int) -> int:
        """How many rows of ``x`` belong to one sample."""
        return x.shape[self.dim] // max(batch_size, 1)

    def to_front(self, x: Tensor, batch_size: int) -> Tensor:
        """``x`` with the batch as its own first dimension (positions, if any were folded in, follow)."""
        if not self.flat:
            return x if self.dim == 0 else x.movedim(self.dim, 0)
        outer, inner = self.factors(x.shape[self.dim], batch_size)
        parts = x.unflatten(self.dim, (outer, batch_size, inner))
        front = parts.movedim((self.dim + 1, self.dim, self.dim + 2), (0, 1, 2))
        return front.squeeze(1) if outer == 1 else front.flatten(1, 2)

    def spread(self, copies: Tensor, at: int, n: int, batch_size: int) -> Tensor:
        """``copies``, with one entry per sample at dimension ``at``, as ``n`` rows laid out so."""
        if not self.flat:
            return copies
        outer, inner = self.factors(n, batch_size)
        parts = copies.unsqueeze(at).unsqueeze(at + 2)
        sizes = list(parts.shape)
        sizes[at], sizes[at + 2] = outer, inner
        return parts.expand(sizes).flatten(at, at + 2)


class Rows:
    """Rows in any order, in the first dimension, each with the sample it belongs to (``owner``, ``[rows]``)."""

    dim, flat = 0, "rows"

    def __init__(self, owner: Tensor):
        self.owner = owner
        self._places: tuple[Tensor, Tensor, int] | None = None

    def fits(self, x: Tensor, batch_size: int) -> bool:
        return x.dim() > 0 and x.shape[0] == self.owner.shape[0]

    def positions(self, x: Tensor, batch_size: int) -> int:
        """The largest number of rows of any sample."""
        return self._placed(batch_size)[2]

    def _placed(self, batch_size: int) -> tuple[Tensor, Tensor, int]:
        if self._places is None:
            order = torch.argsort(self.owner, stable=True)
            counts = torch.bincount(self.owner, minlength=batch_size)
            starts = counts.cumsum(0) - counts
            place = torch.arange(len(order), device=order.device) - starts[self.owner[order]]
            self._places = order, place, max(int(counts.max()) if counts.numel() else 0, 1)
        return self._places

    def to_front(self, x: Tensor, batch_size: int) -> Tensor:
        """``[rows, ...]`` as ``[B, most rows of a sample, ...]``, zeros where a sample has fewer."""
        order, place, most = self._placed(batch_size)
        out = x.new_zeros(batch_size, most, *x.shape[1:])
        out[self.owner[order], place] = x[order]
        return out

    def spread(self, copies: Tensor, at: int, n: int, batch_size: int) -> Tensor:
        """``copies``, with one entry per sample at dimension ``at``, as one entry per row."""
        return copies.index_select(at, self.owner)


BATCH_FIRST = Layout(0)
UNKNOWN = Layout(-1, "unknown")  # the probe saw the tensor: what its shape suggests means nothing


def guess(
    shape: tuple[int, ...], batch_size: int, *, depends: bool, batch_first: bool, batch_dim: int | None = None
) -> Layout | None:
    """The likely layout of a tensor of this shape, or None if it seems to have no batch dimension.

    Args:
        shape: the tensor's shape.
        batch_size: samples in the physical batch.
        depends: the tensor is known to depend on the samples (it carries a gradient).
        batch_first: the convention the user stated.
        batch_dim: what the caller, a layer that knows more than the shape, takes for the batch dimension.
    Raises:
        Unresolvable: if it depends on the samples but no dimension fits.
    """
    preferred = 0 if batch_first or len(shape) < 2 else 1
    if batch_dim is not None:
        preferred = batch_dim
        if batch_size and shape[preferred] > batch_size and shape[preferred] % batch_size == 0 and depends:
            return Layout(preferred, "major")
    if len(shape) > preferred and shape[preferred] == batch_size:
        return Layout(preferred)
    matching = [i for i, n in enumerate(shape) if n == batch_size]
    if matching:
        return Layout(matching[0])
    if len(shape) and batch_size > 1 and shape[0] and shape[0] % batch_size == 0 and depends:
        return Layout(0, "major")
    if depends:
        raise Unresolvable(f"no dimension of a tensor of shape {tuple(shape)} fits the batch of {batch_size}")
    return None
