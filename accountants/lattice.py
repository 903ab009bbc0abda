r"""Privacy-loss distributions on a lattice: one that is never below the truth, one that is never above it.

*Pessimistic* (connect the dots; Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022): the P- and Q-mass of the cell
between neighbouring points :math:`l<l+h` is split between the two so that both masses are kept. The splitting is a
mean-preserving spread of :math:`e^{-L}`, so every hockey-stick divergence grows, and it dominates also after
composition. It adds variance of at most :math:`h^2/4` to a step and shifts no mean to first order, so the error of
epsilon is of second order in h. What lies above the last point: mass :math:`e^{l}Q` stays there, the rest gets an
infinite loss. What lies below the first is rounded up to it.

*Optimistic*: merging outcomes is post-processing, so it can only lower a divergence. Two neighbouring cells of width 3h
are merged, each to a point, at losses :math:`l_1<l_2`; where two lattice points next to the mean of both lie between
:math:`l_1` and :math:`l_2`, the law on those two with the same P- and Q-mass is a mean-preserving contraction of that
on :math:`l_1,l_2`. Where not, everything is rounded down to the lattice. What lies outside the cells is dropped.

*A part of the law*, for :mod:`accountants.jumps`: the cells between two losses. A cell across the border belongs to
both parts from above and to neither from below, so parts on different lattices need no common edge.

*Rounding*: the cells come with bounds on their rounding errors; masses are moved up (or down) by that much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .pairs import UNIT, Array, Pair

MAX_POINTS = 1 << 22
OPTIMISTIC_CELL = 3


@dataclass(frozen=True)
class Lattice:
    """Mass ``mass[k]`` at loss ``offset + k * step``, and ``infinite`` at an infinite loss."""

    offset: float
    step: float
    mass: Array
    infinite: float = 0.0

    @property
    def losses(self) -> Array:
        return self.offset + self.step * np.arange(len(self.mass))


def pessimistic(
    pair: Pair, step: float, below: float, above: float, low: float = -math.inf, high: float = math.inf
) -> Lattice:
    """A law that dominates the pair's, or the part of it with losses between ``low`` and ``high``.

    Args:
        pair: of one step.
        step: distance h of the lattice points.
        below, above: P-mass that may be rounded up to the lowest point, and over the highest point.
        low, high: a cell that is only partly between them counts whole.
    """
    lowest, highest = pair.support(below, above)
    every = _edges(pair, lowest, highest, step, _count(highest - lowest, step))
    edges = every[_between(every, low, high)]
    cells = pair.cells(edges)
    p = np.where((edges[1:] > low) & (edges[:-1] <= high), cells.p + cells.p_error, 0.0)
    up = np.minimum((cells.excess + cells.excess_error) / -math.expm1(-step), p)
    mass = np.zeros(len(edges))
    mass[:-1] = p - up
    mass[1:] += up
    if low < every[0]:
        mass[0] += cells.below
    if high >= every[-1]:
        mass[-1] += max(cells.above - cells.above_excess, 0.0)
    top = cells if edges[-1] == every[-1] else pair.cells(every[-2:])
    return _trim(Lattice(float(edges[0]), step, mass, top.above_excess))


def optimistic(
    pair: Pair, step: float, below: float, above: float, low: float = -math.inf, high: float = math.inf
) -> Lattice:
    """A law that the pair's dominates; arguments as for :func:`pessimistic`, but a cell that is only partly between
    ``low`` and ``high`` does not count."""
    lowest, highest = pair.support(below, above)
    width = OPTIMISTIC_CELL * step
    pairs_of_cells = _count(highest - lowest, 2 * width)
    count = 2 * pairs_of_cells + 1
    edges = _edges(pair, lowest, highest, width, count + 1)
    if pair.anchor != "top":
        inside = _between(edges, low, high)
        odd = (
            inside.stop - inside.start
        ) % 2  # one cell on its own and the others in pairs have an even number of edges
        edges = edges[inside.start - odd : inside.stop] if inside.start else edges[: inside.stop + odd]
        count = len(edges) - 1
    cells = pair.cells(edges)
    p = np.where((edges[:-1] >= low) & (edges[1:] <= high), np.maximum(cells.p - cells.p_error, 0.0), 0.0)
    share = (cells.excess - cells.excess_error - cells.p_error) / np.maximum(p, 1e-300)
    # The loss of a cell merged to one point, above the cell's lower edge.
    inner = np.clip(-np.log1p(-np.clip(share, 0.0, 1 - 1e-9)), 0.0, width)
    # The cell with the unsampled records is merged on its own, and the lattice goes through the point that gives.
    lone = count - 1 if pair.anchor == "top" else 0
    centre = float(edges[lone] + inner[lone])
    index, mass = _merge_pairs(p, inner, edges, step, centre, slice(0, count - 1) if lone else slice(1, count))
    index, mass = np.concatenate([[0], index]), np.concatenate([[p[lone]], mass])
    lowest_index = int(index.min())
    return _trim(Lattice(centre + lowest_index * step, step, np.bincount(index - lowest_index, weights=mass)))


def _between(edges: Array, low: float, high: float) -> slice:
    """The edges of every cell that is at least partly between ``low`` and ``high``, three of them at least."""
    first = max(int(np.searchsorted(edges, low, side="left")) - 1, 0)
    last = min(int(np.searchsorted(edges, high, side="right")), len(edges) - 1)
    first = min(first, len(edges) - 3)
    return slice(first, max(last, first + 2) + 1)


def _trim(lattice: Lattice) -> Lattice:
    """Without the empty points at both ends."""
    filled = np.nonzero(lattice.mass)[0]
    if not len(filled):
        return Lattice(lattice.offset, lattice.step, lattice.mass[:1], lattice.infinite)
    first, last = int(filled[0]), int(filled[-1])
    offset = lattice.offset + first * lattice.step
    return Lattice(offset, lattice.step, lattice.mass[first : last + 1], lattice.infinite)


def _merge_pairs(p: Array, inner: Array, edges: Array, step: float, centre: float, part: slice) -> tuple[Array, Array]:
    """Indices and masses, on the lattice through ``centre``, of the cells of ``part`` merged two by two."""
    first, second = p[part][::2], p[part][1::2]
    edge, width = edges[:-1][part][::2], edges[1] - edges[0]
    low, high = inner[part][::2], width + inner[part][1::2]
    total = first + second
    safe = np.maximum(total, 1e-300)
    # Loss of the four-cell whole above its lower edge, a little too small.
    mean = -np.log1p((first * np.expm1(-low) + second * np.expm1(-high)) / safe)
    mean = np.maximum(mean - 8 * UNIT * (1 + np.abs(edge) + mean), 0.0)
    index = np.floor((edge + mean - centre) / step).astype(np.int64)
    down = centre + index * step - edge
    fits = (low <= down) & (down + step <= high) & (mean >= down)
    up = np.where(fits, total * np.expm1(-np.maximum(mean - down, 0.0)) / math.expm1(-step), 0.0)
    up = np.minimum(up, total)
    return np.concatenate([index, index + 1]), np.concatenate([total - up, up])


def midpoint(pair: Pair, step: float, below: float, above: float, mean: float) -> Lattice:
    """The law rounded to the nearest point and then shifted to the given mean (Gopi, Lee and Wutschitz 2021): no
    bound."""
    lowest, highest = pair.support(below, above)
    count = _count(highest - lowest, step)
    points = lowest + step * np.arange(count)
    cells = pair.cells(points[:-1] + step / 2)
    mass = np.concatenate([[cells.below], cells.p, [cells.above]])
    return Lattice(float(points[0] + mean - mass @ points), step, mass)


def _edges(pair: Pair, lowest: float, highest: float, step: float, count: int) -> Array:
    """``count`` equidistant losses over the support, one of them where the unsampled records' mass sits."""
    if pair.anchor == "top":
        return highest - step * np.arange(count - 1, -1, -1)
    if pair.anchor == "zero":
        return step * (math.floor(lowest / step) + np.arange(count))
    return lowest + step * np.arange(count)


def _count(length: float, step: float) -> int:
    points = length / step
    if not points <= 4 * MAX_POINTS - 3:  # nor is NaN: no plan was found where losses are in the thousands
        raise OverflowError(f"{points:g} lattice points")
    return max(math.ceil(points) + 3, 3)
