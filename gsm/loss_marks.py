"""Outputs of watched forwards, to be found again in the graph of what is made of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from gsm.loss_check import LossCheck

_MARK = "gsm.loss_check"


class Mark:
    """What an output was, left in the graph at its place.

    Args:
        check: who watches the model.
        size: the batch size.
        dims: the dimensions in which the samples may lie.
        entries: of the output.
    """

    __slots__ = ("check", "size", "dims", "entries", "number", "feeds", "__weakref__")

    def __init__(self, check: LossCheck, size: int, dims: list[int], entries: int):
        self.check, self.size, self.dims, self.entries = weakref.ref(check), size, dims, entries
        self.number: int | None = None  # in the recording
        self.feeds = False  # another forward was given what was made of it

    def leave(self, x: Tensor) -> None:
        """Marks the output."""
        node: Any = x.grad_fn
        node.metadata.setdefault(_MARK, {})[x.output_nr] = self


def marked(roots: Sequence[Tensor]) -> list[tuple[GradientEdge, Mark]]:
    """The outputs of watched forwards from which ``roots`` were made, but not those behind them."""
    found, seen, stack = [], set(), [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        metadata: Any = node.metadata
        marks = metadata.get(_MARK, {})
        found += [(GradientEdge(node, number), mark) for number, mark in marks.items()]
        if not marks:
            stack += [n for n, _ in node.next_functions]
    return found


def in_a_graph(x: Tensor) -> bool:
    """Whether gradients can be sent back from it."""
    return x.is_floating_point() and x.requires_grad and x.grad_fn is not None and x.numel() > 0
