"""Does what a loss sends back for one sample depend on the model's output for another?

A loss is the samples' own if it is a sum of terms of which each is a function of one sample's outputs. Then its second
derivatives between the outputs of two samples are zero, which is tested in full precision by differentiating twice
(:func:`curved`): a contrastive loss, the root of a mean, a variance over the batch have others. What is piecewise
linear has second derivatives of zero wherever they exist, though the pieces may be chosen by neighbours: rankings by a
hinge, the largest of the batch, absolute differences. So for every such function in the loss's graph, what it chooses
by must be of one sample (:func:`chosen`).

Not seen: what is taken out of the graph (`detach`, `item`), and labels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node

#: Piecewise linear in each entry.
_ENTRYWISE = (
    "Abs|Sgn|Relu|LeakyRelu|PreluKernel|RreluWithNoise|Clamp|ClampMin|ClampMax|Threshold|Hardtanh|Hardswish|Hardsigmoid|"
    "Hardshrink|Softshrink|Maximum|Minimum|Fmax|Fmin|SmoothL1Loss|HuberLoss"
)
#: Which choose among the entries along a dimension, or among all.
_ALONG = "Max|Min|Amax|Amin|Aminmax|Topk|Sort|Median|Nanmedian|Kthvalue|Mode|Cummax|Cummin"
#: Which PyTorch cannot differentiate twice: their input is looked at in the same way.
_ONCE = "MultiMarginLoss|MultilabelMarginLoss|CtcLoss|CudnnCtcLoss|Cdist|Pdist"
_KINK = re.compile(rf"(?:(?P<entrywise>{_ENTRYWISE})|(?P<along>{_ALONG})|(?P<once>{_ONCE}))Backward\d*$")
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__  # that of whatever it wraps


class NotJudged(Exception):
    """A loss that cannot be differentiated twice."""


class Outputs:
    """The outputs of one or more forwards that a loss is made of.

    Args:
        edges: where they are in the loss's graph.
        sizes: the batch size of each.
        dims: the dimension of each along which its samples lie.
        others: where further outputs are, with respect to which nothing is differentiated.
    """

    def __init__(
        self,
        edges: Sequence[GradientEdge],
        sizes: Sequence[int],
        dims: Sequence[int],
        others: Sequence[GradientEdge] = (),
    ):
        self.edges, self.sizes, self.dims = list(edges), list(sizes), list(dims)
        self.ends = [*edges, *others]

    def halves(self, bit: int | None) -> Iterator[list[Tensor]]:
        """For each output which of its samples are in the first half: samples of one number always together.

        Args:
            bit: by which binary digit of the sample's number; None for all, so that every two samples are parted.
        """
        longest = max(1, (max(self.sizes) - 1).bit_length())
        for digit in range(longest) if bit is None else [bit % longest]:
            yield [(torch.arange(size) >> digit) % 2 == 0 for size in self.sizes]
        first = self.sizes[0]
        if any(size != first for size in self.sizes):  # other records, whatever their number
            yield [torch.full((size,), size == first) for size in self.sizes]

    def along(self, k: int, x: Tensor, rows: Tensor) -> Tensor:
        """``rows [batch]`` as a factor of ``x``, which has the shape of output ``k``."""
        shape = [1] * x.dim()
        shape[self.dims[k]] = self.sizes[k]
        return rows.to(x.device, x.dtype).reshape(shape)

    def along_all(
        self, grads: Sequence[Tensor | None], directions: Sequence[Tensor | None], rows: Sequence[Tensor]
    ) -> Tensor | None:
        """The sum of ``grads`` along ``directions``, over the samples ``rows``; None if none is part of a graph."""
        products = [
            (g * d * self.along(k, g, rows[k])).sum()
            for k, (g, d) in enumerate(zip(grads, directions, strict=True))
            if g is not None and d is not None and g.requires_grad
        ]
        return torch.stack(products).sum() if products else None

    def largest(self, grads: Sequence[Tensor | None], rows: Sequence[Tensor]) -> float:
        """The largest entry among the gradients of the samples ``rows``."""
        return max(
            (float((_finite(g) * self.along(k, g, rows[k])).abs().max()) for k, g in enumerate(grads) if g is not None),
            default=0.0,
        )


def influence(roots: Sequence[Tensor], grads: Sequence[Tensor | None], outputs: Outputs, bit: int | None) -> str | None:
    """What makes the loss depend on several samples at once, in words; None if nothing does.

    Args:
        roots, grads: what the backward is to begin with.
        outputs: the model's outputs in its graph.
        bit: see :meth:`Outputs.halves`.

    Raises:
        NotJudged: what makes the loss has no second derivatives.
    """
    directions = torch.Generator().manual_seed(0)
    nodes = list(_between(roots, outputs.ends))
    once = any((found := _KINK.match(type(node).__name__)) and found["once"] for node in nodes)
    if any(_forbidden(node) for node in nodes):
        raise NotJudged("a torch.autograd.Function marked once_differentiable")
    try:
        with torch.enable_grad():
            first = torch.autograd.grad(
                list(roots), outputs.edges, list(grads), retain_graph=True, create_graph=True, allow_unused=True
            )
            random = [None if g is None else _random(g, directions) for g in first]
            for rows in outputs.halves(bit):
                if not once and curved(outputs, first, random, rows):
                    return "its derivative for one sample changes with the model's output for others"
                by = chosen(roots, grads, outputs, first, random, rows)
                if by is not None:
                    return f"{by} joins the outputs of several samples"
    except RuntimeError as error:  # torch's word for a derivative that it does not have
        raise NotJudged(str(error).splitlines()[0]) from error
    return None


def informed(roots: Sequence[Tensor], grads: Sequence[Tensor | None], outputs: Outputs) -> list[Tensor]:
    """The parameters from which a loss is made besides the outputs, and whose gradients change with these.

    Args:
        roots, grads: what the backward is to begin with.
        outputs: the model's outputs in its graph.
    """
    leaves = [node.variable for node in _between(roots, outputs.ends) if hasattr(node, "variable")]
    found = []
    for leaf in leaves:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(
                list(roots), leaf, list(grads), retain_graph=True, create_graph=True, allow_unused=True
            )
            if g is None or not g.requires_grad:
                continue
            value = (g * _random(g, torch.Generator().manual_seed(0))).sum()
            try:
                changes = torch.autograd.grad(value, outputs.edges, retain_graph=True, allow_unused=True)
            except RuntimeError:  # not known how, but it is made of what the graph holds
                found.append(leaf)
                continue
        if any(c is not None and bool(_finite(c).any()) for c in changes):
            found.append(leaf)
    return found


def curved(
    outputs: Outputs, first: Sequence[Tensor | None], random: Sequence[Tensor | None], rows: Sequence[Tensor]
) -> bool:
    """Whether second derivatives between the samples ``rows`` and the others are not zero.

    Args:
        outputs: the model's outputs.
        first: the loss's derivatives with respect to them, which are part of a graph.
        random: a direction for each.
        rows: for each which samples.
    """
    own = outputs.along_all(first, random, rows)
    if own is None:
        return False
    second = torch.autograd.grad(own, outputs.edges, retain_graph=True, allow_unused=True)
    everyone = outputs.largest(second, [torch.ones_like(r) for r in rows])
    return outputs.largest(second, [~r for r in rows]) > _tolerance(second) * everyone


def chosen(
    roots: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    outputs: Outputs,
    first: Sequence[Tensor | None],
    random: Sequence[Tensor | None],
    rows: Sequence[Tensor],
) -> str | None:
    """The name of a piecewise linear function that chooses its piece by samples in ``rows`` and by others.

    An entry of its input belongs to the samples along whose outputs it moves; it counts if the loss depends on what is
    made of it. A batch's largest entry that is taken twice, to keep numbers small and back, adds up to nothing.
    """
    scale = max((float(_finite(g).abs().max()) for g in first if g is not None), default=0.0)
    alike: dict[Any, list[Node]] = {}
    for node in _between(roots, outputs.ends):
        if _KINK.match(name := type(node).__name__):
            alike.setdefault((name, getattr(node, "_saved_dim", None), node.next_functions), []).append(node)
    kinks = [node for nodes in alike.values() for node in nodes]
    made = dict(zip(kinks, _made(roots, grads, [GradientEdge(n, 0) for n in kinks]), strict=True))
    groups = [nodes for nodes in alike.values() if all(made[n] is not None for n in nodes)]
    edges = list(dict.fromkeys(e for nodes in groups for e in _inputs(nodes[0])))
    both = [dict(zip(edges, _moves(edges, outputs, random, half), strict=True)) for half in (rows, [~r for r in rows])]
    for nodes in groups:
        used = _finite(_all(g for n in nodes if (g := made[n]) is not None)).abs()
        found = _KINK.match(type(nodes[0]).__name__)
        assert found is not None
        moved = [[by_edge[e] for e in _inputs(nodes[0])] for by_edge in both]
        if not found["entrywise"]:
            # Distances from what does not move with the outputs leave their rows apart.
            moving = [k for k, halves in enumerate(zip(*moved, strict=True)) if any(bool(m.any()) for m in halves)]
            dims = functools.partial(_dims, nodes[0], found["along"] or found["once"], len(moving) > 1)
            moved = [[m[k].amax(dims(m[k].dim())) if m[k].dim() else m[k] for k in moving or [0]] for m in moved]
            used = used.max()
        joined = [_all(m) for m in moved]
        several = torch.minimum(*joined) > _tolerance(joined) * torch.maximum(*joined)
        if bool((several & (torch.maximum(*joined) * used > _tolerance(joined) * scale)).any()):
            return found[0].partition("Backward")[0].lower()
    return None


def _inputs(node: Node) -> list[GradientEdge]:
    return [GradientEdge(n, number) for n, number in node.next_functions if n is not None]


def _made(
    roots: Sequence[Tensor], grads: Sequence[Tensor | None], edges: Sequence[GradientEdge]
) -> Sequence[Tensor | None]:
    """What the loss sends back to each edge, all in one backward: one for each would take time quadratic in them."""
    if not edges:
        return []
    return torch.autograd.grad(list(roots), list(edges), list(grads), retain_graph=True, allow_unused=True)


def _all(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _moves(
    edges: Sequence[GradientEdge], outputs: Outputs, random: Sequence[Tensor | None], rows: Sequence[Tensor]
) -> list[Tensor]:
    """By how much the values at ``edges`` move with the outputs of the samples ``rows``: two backwards are a forward,
    for all edges at once, as what is sent back from several of them adds up."""
    if not edges:
        return []
    are = [edge.node._input_metadata[edge.output_nr] for edge in edges]
    nothing = [torch.zeros(is_.shape, dtype=is_.dtype, device=is_.device) for is_ in are]
    weights = [torch.ones_like(zeros, requires_grad=True) for zeros in nothing]
    back = torch.autograd.grad(
        list(edges), outputs.edges, weights, retain_graph=True, create_graph=True, allow_unused=True
    )
    own = outputs.along_all(back, random, rows)
    if own is None:
        return nothing
    moved = torch.autograd.grad(own, weights, allow_unused=True, retain_graph=True)
    return [n if m is None else _finite(m).abs() for n, m in zip(nothing, moved, strict=True)]


def _forbidden(node: Any) -> bool:
    """Whether it says so, but only to those who hand in a gradient that is part of a graph."""
    function = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(function, "__code__", None) is _ONCE_DIFFERENTIABLE


def _between(roots: Sequence[Tensor], edges: Sequence[GradientEdge]) -> Iterator[Node]:
    """The functions that a loss is made by, as far as the outputs."""
    seen = {edge.node for edge in edges}
    stack = [r.grad_fn for r in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [n for n, _ in node.next_functions]


def _dims(node: Any, name: str, both: bool, all_dims: int) -> tuple[int, ...]:
    """The dimensions of a function's input along which it joins entries; ``both``: whether several inputs move."""
    if name in ("MultiMarginLoss", "MultilabelMarginLoss"):
        return tuple(range(1, all_dims))
    if name in ("CtcLoss", "CudnnCtcLoss"):
        return (0, 2)[: all_dims - 1]
    if name == "Cdist":  # the distances of all rows from constants, or of all from all within each matrix
        return (-2, -1) if both else (-1,)
    saved = getattr(node, "_saved_dim", None)
    found = saved if isinstance(saved, tuple) else () if saved is None else (saved,)
    return tuple(int(d) - (1 << 64 if d >= 1 << 63 else 0) for d in found) or tuple(range(all_dims))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _finite(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(0.0, 0.0, 0.0)


def _tolerance(values: Sequence[Tensor | None]) -> float:
    return max([1e-5, *(8 * torch.finfo(v.dtype).eps for v in values if v is not None)])
