"""Which of the tensors that a loss is made of go with the samples, as labels do? Nobody says so.

A tensor from outside is taken for labels if its rows go with the samples in every batch recorded so far, of several
sizes, and if it changes. Where records are not rows (concatenated targets, positions in the batch as indices), none is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsm.recording import Operation, Program, Ref

RECORDED = 8
"""Batches whose tensors are compared with each other."""
SURE = 4
"""Batches after which the size of a tensor may be believed to follow that of the batch if neither ever changes."""
MOST_PLACES = 256
CHANCE = 3
"""Batches in which what a loader handed out must have had as many rows as records to be called theirs."""
_PEEK = 1024  # entries of a tensor that tell whether it has changed
_INDEXING = ("index", "index_put", "index_put_", "take", "embedding")
_INDEXING_ALONG = (
    "index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_",
    "index_copy", "index_copy_",
)  # fmt: skip
_MASKS = ("nonzero", "ne", "eq", "ge", "gt", "le", "lt")  # what they say moves with the samples


@dataclass(frozen=True)
class Along:
    """How a tensor goes with the samples: along ``dim``, of a first dimension parted in two if ``flat``."""

    dim: int
    flat: bool

    @staticmethod
    def of(shape: Sequence[int], size: int, dim: int) -> Along | None:
        """That of a tensor in a batch of ``size`` samples, where the output's lie along ``dim``; None: it has none."""
        along = [d for d in (dim, 1 - dim) if d < len(shape) and shape[d] == size]
        if along[:1] == [dim]:
            return Along(dim, False)
        if shape and shape[0] > size and shape[0] % size == 0:
            return Along(dim, True)
        return Along(along[0], False) if along else None

    @staticmethod
    def all(shape: Sequence[int], size: int) -> list[Along]:
        """All ways in which it may."""
        found = [Along(d, False) for d in (0, 1) if d < len(shape) and shape[d] == size]
        flat = shape and shape[0] > size and shape[0] % size == 0
        return found or ([Along(0, True), Along(1, True)] if flat else [])

    def rows(self, x: Tensor, size: int) -> Tensor:
        """``x`` with a row for each of ``size`` samples, ``[size, entries]``."""
        if self.flat:
            x = x.unflatten(0, (size, -1) if self.dim == 0 else (-1, size))
        return x.movedim(self.dim, 0).reshape(size, -1)

    def take(self, x: Tensor, source: Tensor, size: int) -> Tensor:
        """The rows ``source`` of ``x``, which has those of ``size`` samples."""
        source = source.to(x.device)
        if not self.flat:
            return x.index_select(self.dim, source)
        parts = (size, -1) if self.dim == 0 else (-1, size)
        return x.unflatten(0, parts).index_select(self.dim, source).flatten(0, 1)


@dataclass(frozen=True)
class Seen:
    """What a tensor was in one batch: the batch size, its shape, and its first entries."""

    size: int
    shape: tuple[int, ...]
    peek: Tensor


class Labels:
    """Tells, over several batches, which tensors from outside go with the samples."""

    def __init__(self) -> None:
        self.seen: dict[Any, deque[Seen]] = {}

    def look(self, program: Program, outputs: Sequence[int], size: int) -> list[tuple[int, deque[Seen]]]:
        """Remembers the tensors of one batch; returns their numbers, each with what was seen in its place."""
        place = hash(tuple(str(op.call) for op in program.operations))
        while len(self.seen) > MOST_PLACES:
            del self.seen[next(iter(self.seen))]
        found = []
        for k, (number, x) in enumerate(sorted(program.given.items())):
            if number in outputs or x.dim() == 0:
                continue
            past = self.seen.setdefault((place, k), deque(maxlen=RECORDED))
            past.append(Seen(size, tuple(x.shape), x.flatten()[:_PEEK].clone()))
            found.append((number, past))
        return found

    @staticmethod
    def choose(
        seen: Sequence[tuple[int, Sequence[Seen]]], dim: int, known: Mapping[int, int | None] | None
    ) -> dict[int, Along]:
        """The layouts of those that go with the samples; of none, where records are not rows.

        Args:
            seen: from :meth:`look`.
            dim: the dimension in which the outputs' samples lie.
            known: that of tensors which a loader handed out, if they have one; without it, nothing may be chosen.
        """
        if known is None or None in known.values():
            return {}
        found = {n: Along(d, False) for n, d in known.items() if d is not None}
        for number, past in seen:
            if number in found:
                continue
            if not any(_differ(past[-1].peek, p.peek) for p in past):
                continue
            layouts = {Along.of(p.shape, p.size, dim) for p in past}
            (layout, *more) = layouts
            if layout is None or more:
                if len({p.shape[0] for p in past}) > 1:
                    return {}
                continue
            sizes = {(p.size, p.shape[0] if layout.flat else p.shape[layout.dim]) for p in past}
            if len({rows for _, rows in sizes}) == len({size for size, _ in sizes}) == 1:
                if len(past) < SURE:
                    continue
            elif len({rows for _, rows in sizes}) == 1:
                continue  # the batch's size varies, but not this one's
            found[number] = layout
        return found

    @staticmethod
    def sure(seen: Sequence[Sequence[Seen]]) -> bool | None:
        """Whether tensors that a loader handed out are records' rows; None after fewer than :data:`CHANCE` batches.

        In one or two batches they may have as many rows as there are records by chance.
        """
        if any(len(past) < CHANCE for past in seen):
            return None
        return all(len({p.size for p in past}) > 1 and _rows(past) for past in seen)


def _rows(past: Sequence[Seen]) -> bool:
    return any(all(d < len(p.shape) and p.shape[d] == p.size for p in past) for d in (0, 1))


@torch.no_grad()
def are_positions(program: Program, outputs: Sequence[int], labels: dict[int, Along], size: int) -> bool:
    """Whether labels say where in the batch something is: such numbers do not mean the same in another place.

    Args:
        program: what was computed.
        outputs: the values in it that go with the samples.
        labels: which values may be labels.
        size: of the batch: what has other rows (counts of classes, say) is no batch.
    """
    made, values = set(outputs), program.run({})
    said = {n for n in labels if not (program.given[n].is_floating_point() or program.given[n].dtype is torch.bool)}
    for op in program.operations:
        name = op.call.__name__.partition(".")[0]
        index, whose = _index(op, name), {r.number for r in op.args[:1] if isinstance(r, Ref)}
        rows = [len(values[n]) for n in whose & made if values[n].dim()]
        if not index.isdisjoint(said) and any(n >= size and n % size == 0 for n in rows):
            return True
        reads = {r.number for r in op.reads}
        made.update(op.results if reads & made else ())
        said.update(op.results if reads & said and name not in _MASKS else ())
    return False


def _index(op: Operation, name: str) -> set[int]:
    """The values that say where along the first dimension something is picked or put; none if nothing is."""
    if name in _INDEXING:
        at = op.args[1][:1] if isinstance(op.args[1], list | tuple) else [op.args[1]]
    else:
        at = op.args[2:3] if name in _INDEXING_ALONG and op.args[1] == 0 else []
    return {r.number for r in at if isinstance(r, Ref)}


def _differ(a: Tensor, b: Tensor) -> bool:
    shared = min(len(a), len(b))
    return a is not b and not torch.equal(a[:shared], b[:shared])
