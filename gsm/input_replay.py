"""Is each sample's row of what a forward is given made of that sample alone?

What was computed since the loader handed out the batch, and since earlier forwards, is computed again with some samples
replaced. Rows may come in another order than the loader's, as long as all of a batch's forwards see the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gsm.loss_influence import Outputs
from gsm.loss_labels import Along
from gsm.loss_replay import sources
from gsm.recording import FAILS, Program
from gsm.window import Window

_ORDERING = ("sort", "argsort", "topk", "unique", "_unique2", "unique_dim", "unique_consecutive", "msort")


@dataclass(frozen=True)
class Mixed:
    """An input in which rows are not their own sample's: its place, and whether by the batch alone."""

    place: int
    loaded: bool


def mixed_inputs(window: Window, inputs: Sequence[Tensor], digit: int | None) -> Mixed | None:
    """Which of the ``inputs`` of a forward mixes samples; None if none is seen to. Notes the batch's order.

    Args:
        window: with what was computed since the last batch or forward.
        inputs: tensors.
        digit: see :meth:`gsm.loss_influence.Outputs.halves`.
    """
    recording, first = window.recording, window.fresh
    if recording.lost:
        return None
    found: dict[int, str] = {}
    for k, x in enumerate(inputs):
        number = recording.number(x)
        program = recording.made([] if number is None else [number])
        if number is None or not program.operations:  # as it was handed out, or from elsewhere
            if number in window.batch:
                found[k] = "own"
        else:
            known = _known(window, program)
            try:
                found[k] = "" if known is None else _compare(program, number, x, known, digit, first)
            except FAILS:
                continue
            if found[k] == "mixed":
                return Mixed(k, not any(n in window.outputs for n in known or ()))
    if first:
        kinds = set(found.values())
        if {"own", "moved"} <= kinds:
            return Mixed(next(k for k, kind in found.items() if kind == "moved"), True)
        window.in_order = True if "own" in kinds else False if kinds & {"moved", "sorted"} else None
    return None


def _known(window: Window, program: Program) -> dict[int, tuple[int, list[int]]] | None:
    """The values in ``program`` that are known to have a row for each sample, as :attr:`Window.outputs`."""
    found = {n: window.outputs[n] for n in program.given if n in window.outputs}
    if window.fresh or window.in_order:
        rows = {n: window.rows(n) for n in program.given if n in window.batch}
        found |= {n: (window.records, [d, d]) for n, d in rows.items() if d is not None}
    return found if len({size for size, _ in found.values()}) == 1 else None


def _compare(
    program: Program,
    number: int,
    x: Tensor,
    known: dict[int, tuple[int, list[int]]],
    digit: int | None,
    first: bool,
) -> str:
    """How the rows of ``x`` go with the samples of the ``known`` values.

    "own": each with its own; "moved", "sorted": each with one, in another order, which depends on values if sorted;
    "mixed"; or "", where nothing can be said.
    """
    (size,) = {size for size, _ in known.values()}
    before = program.run({})[number]
    names = {op.call.__name__.partition(".")[0] for op in program.operations}
    if not program.repeatable or before.shape != x.shape or _far(before, x):
        return ""
    found = []
    for at, along in ((at, along) for at in (0, -1) for along in Along.all(x.shape, size)):
        dims = {n: dims[at] for n, (_, dims) in known.items()}
        moves = _moves(program, number, before, dims, along, size, digit)
        if moves is None:
            return ""
        own, astray, both, same = moves
        if not astray:
            found.append("own" if own else "")
        elif not first:
            found.append("mixed")
        elif not both:
            found.append("moved")
        elif names.isdisjoint(_ORDERING):
            found.append("mixed")
        else:  # noise that was added stays where it is
            noisy = any(op.random is not None for op in program.operations)
            found.append("sorted" if same or noisy else "mixed")
    return next((kind for kind in ("own", "", "sorted", "moved", "mixed") if kind in found), "")


def _moves(
    program: Program,
    number: int,
    before: Tensor,
    dims: dict[int, int],
    along: Along,
    size: int,
    digit: int | None,
) -> tuple[bool, bool, bool, bool] | None:
    """Whether rows move with their own samples, with others, with several; and whether all rows are among those before.

    None if their number depends on the samples.

    Args:
        dims: of each value in which samples are replaced, their dimension.
    """
    base = along.rows(before, size)
    own = astray = both = False
    same = True
    for one, other in _pairs(size, digit):
        moved = []
        for source in (one, other):
            others = {n: program.given[n].index_select(d, source.to(program.given[n].device)) for n, d in dims.items()}
            after = program.run(others)[number]
            if after.shape != before.shape:
                return None
            rows = along.rows(after, size)
            moved.append(_differ(rows, base))
            stay = (source == torch.arange(size)).to(rows.device)
            own, astray = own or bool((moved[-1] & ~stay).any()), astray or bool((moved[-1] & stay).any())
            same = same and _among(rows, base)
        both = both or bool((moved[0] & moved[1]).any())
    return own, astray, both, same


def _pairs(size: int, digit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """By which one each sample is replaced: half of them by the other half, and the other way."""
    found = [source for (source,) in sources(Outputs([], [size], []), digit)]
    return zip(found[::2], found[1::2], strict=True)


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return (
        x.nan_to_num(0.0, 0.0, 0.0).to(torch.float64 if x.dtype is torch.float64 else torch.float32)
        if x.is_floating_point()
        else x.to(torch.float64)
    )


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Which rows differ by more than rounding, ``[rows]``."""
    if not a.is_floating_point():
        return (a != b).any(1)
    scale = max(1e-5, 2 * torch.finfo(a.dtype).eps) * _largest(b)
    return (_wide(a) - _wide(b)).abs().amax(1) > scale


def _far(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel()) and bool(_differ(a.reshape(1, -1), b.reshape(1, -1)).any())


def _largest(x: Tensor) -> float:
    return float(_wide(x).abs().max()) if x.numel() else 0.0


def _among(a: Tensor, b: Tensor) -> bool:
    """Whether each row of ``a`` is one of ``b``'s, as one number for each tells."""
    weights = torch.arange(1, a.shape[1] + 1, dtype=torch.float64, device=a.device).cos()
    one, two = _wide(a).double() @ weights, _wide(b).double() @ weights
    return bool(((one[:, None] - two).abs().amin(1) <= 1e-5 * max(1e-30, float(two.abs().max()))).all())
