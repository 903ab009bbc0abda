"""Does what a loss sends back for one sample change when other samples are replaced?

Derivatives do not show what goes past autograd: weights made of detached outputs, and labels. So what a thread computes
from the model's outputs is recorded until their backward (:mod:`gsm.recording`), and computed again
with some samples replaced by others of the same batch: outputs and labels (:mod:`gsm.loss_labels`) alike. What is sent
back for the samples that stay must stay (:func:`judge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch
from torch import Tensor

from gsm.loss_influence import Outputs
from gsm.loss_labels import Along, Labels, Seen, are_positions
from gsm.loss_marks import Mark
from gsm.recording import FAILS, Program, Recording
from gsm.window import Window

MOST_SETS = 32
"""Of labels that are tried."""


@dataclass(frozen=True)
class Found:
    """What changes with other samples."""

    labels: bool
    """With their labels; otherwise with their outputs."""
    factor: float | None
    """By what all samples' gradients are multiplied, if they all are."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the labels."""
    sure: bool | None = False
    """Whether they are records' for sure; None: that is still to be seen."""


class Replay:
    """The recorded program of one loss.

    Args:
        program: what made it.
        roots, grads: the numbers of the values that the backward begins with, and its gradients there.
        outputs: the model's outputs in its graph.
        numbers: theirs.
        sent: those of the gradients that were computed, too, as in ``losses.backward(weights)``.
    """

    def __init__(
        self,
        program: Program,
        roots: Sequence[int],
        grads: Sequence[Tensor | None],
        outputs: Outputs,
        numbers: Sequence[int],
        sent: Sequence[int | None] = (),
    ):
        self.program, self.roots, self.grads, self.sent = program, roots, grads, sent or [None] * len(roots)
        self.outputs, self.numbers = outputs, numbers
        self.base = self.gradients({})

    @classmethod
    def of(
        cls,
        recording: Recording,
        roots: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        outputs: Outputs,
        marks: Sequence[Mark],
    ) -> Replay | None:
        """The program of a backward's ``roots``; None if it was not recorded as a whole.

        It must send back what the backward does, but to outputs that feed other parts of the model: these go on there.
        """
        made = [n for root in roots if (n := recording.number(root)) is not None]
        numbers = [mark.number for mark in marks if mark.number is not None]
        if recording.lost or len(made) < len(roots) or len(numbers) < len(marks):
            return None
        sent = [None if g is None else recording.number(g) for g in grads]
        program = recording.made([*made, *(n for n in sent if n is not None)])
        last = [k for k, mark in enumerate(marks) if not mark.feeds]
        if not last or not program.repeatable or not all(n in program.given for n in numbers):
            return None
        try:
            replay = cls(program, made, grads, outputs, numbers, sent)
            edges = [outputs.edges[k] for k in last]
            real = torch.autograd.grad(roots, edges, grads, retain_graph=True, allow_unused=True)
        except FAILS:  # an in-place change of what autograd needs, seen only by one of them
            return None
        same = (g is None or _alike(_finite(g), replay.base[k], 10) for k, g in zip(last, real, strict=True))
        return replay if all(same) else None

    def gradients(self, others: dict[int, Tensor]) -> list[Tensor]:
        """What is sent back to each output, with ``others`` in the place of values from outside."""
        given = {**self.program.given, **others}
        leaves = [given[n].detach().clone().requires_grad_() for n in self.numbers]
        with torch.enable_grad():
            values = self.program.run({**others, **dict(zip(self.numbers, leaves, strict=True))})
            roots = [values[r] for r in self.roots]
            grads = [g if n is None else values[n].detach() for g, n in zip(self.grads, self.sent, strict=True)]
            found = torch.autograd.grad(roots, leaves, grads, allow_unused=True)
        return [torch.zeros_like(x) if g is None else _finite(g) for g, x in zip(found, leaves, strict=True)]

    def repeats(self) -> bool:
        """Whether it sends back the same again: what is not deterministic shows nothing."""
        return all(_alike(a, b, 0.1) for a, b in zip(self.gradients({}), self.base, strict=True))

    def changed(self, source: Sequence[Tensor], labels: dict[int, Along]) -> list[Tensor] | None:
        """What is sent back to each output where samples were replaced, if others' are another; else None.

        Args:
            source: for each output, for each sample, by which one it is replaced.
            labels: which tensors go with the samples.
        """
        after = self._with(source, labels)
        if after is None:
            return None
        for k, (b, a, rows) in enumerate(zip(self.base, after, source, strict=True)):
            stays = self.outputs.along(k, b, rows == torch.arange(len(rows)))
            if not _alike(a * stays, b * stays, 1, _largest(b)):
                return after
        return None

    def permutes(self, labels: dict[int, Along]) -> bool:
        """Whether samples that change places take along what is sent back to them, if ``labels`` go with them."""
        source = [torch.arange(size).flip(0) for size in self.outputs.sizes]
        after = self._with(source, labels)
        if after is None:
            return False
        pairs = zip(after, self.base, self.outputs.dims, source, strict=True)
        return all(_alike(a, b.index_select(dim, rows.to(b.device)), 10) for a, b, dim, rows in pairs)

    def _with(self, source: Sequence[Tensor], labels: dict[int, Along]) -> list[Tensor] | None:
        """What is sent back with samples replaced, see :meth:`changed`; None if it cannot be computed with them."""
        given = self.program.given
        outputs = zip(self.numbers, self.outputs.dims, source, strict=True)
        others = {n: given[n].index_select(dim, rows.to(given[n].device)) for n, dim, rows in outputs}
        others |= {n: along.take(given[n], source[0], len(source[0])) for n, along in labels.items()}
        try:
            return self.gradients(others)
        except FAILS:
            return None

    def factor(self, after: Sequence[Tensor], source: Sequence[Tensor]) -> float | None:
        """By what everything that stays is multiplied; None if not everything is multiplied by the same."""
        stay = [
            (b * m, a * m)
            for k, (b, a, rows) in enumerate(zip(self.base, after, source, strict=True))
            for m in [self.outputs.along(k, b, rows == torch.arange(len(rows)))]
        ]
        square = sum(float((b * b).sum()) for b, _ in stay)
        if not square:
            return None
        factor = sum(float((b * a).sum()) for b, a in stay) / square
        same = all(_alike(factor * b, a, 10) for b, a in stay)
        return factor if same else None


def judge(replays: Sequence[Replay], window: Window, labels: Labels, digit: int | None) -> Found | None:
    """What in a loss changes for one sample when others are replaced; None if nothing does.

    Args:
        replays: its program, in all ways in which the samples may lie: one in which they are apart is enough.
        window: what is known of the batch that it is made of.
        labels: what was seen in batches before.
        digit: see :meth:`gsm.loss_influence.Outputs.halves`.
    """
    first, sizes = replays[0], replays[0].outputs.sizes
    seen = labels.look(first.program, first.numbers, sizes[0]) if len(set(sizes)) == 1 else []
    found = [_changes(replay, window, labels, seen, digit) for replay in replays]
    return None if None in found else found[0]


def _changes(
    replay: Replay, window: Window, labels: Labels, seen: Sequence[tuple[int, Sequence[Seen]]], digit: int | None
) -> Found | None:
    outputs = replay.outputs
    chosen = labels.choose(seen, outputs.dims[0], window.layouts(replay.program, outputs.sizes[0])) if seen else {}
    found = _first_change(replay, chosen, digit)
    if found is not None and found.labels:
        rows = _rows(replay, chosen)
        if are_positions(replay.program, [*replay.numbers, *rows], chosen, outputs.sizes[0]):
            rows = {}
        found = _first_change(replay, rows, digit) if len(rows) < len(chosen) else found
        if found is not None:
            found = replace(found, sure=_sure(replay, window, labels, [(n, past) for n, past in seen if n in rows]))
    return found if found is not None and replay.repeats() else None


def _sure(
    replay: Replay, window: Window, labels: Labels, rows: Sequence[tuple[int, Sequence[Seen]]]
) -> bool | None:
    """Whether the labels are records' for sure; None: that is still to be seen."""
    if not all(n in window.batch for n, _ in rows):
        return False
    sure = labels.sure([past for _, past in rows])
    if sure and any(op.random is not None for op in replay.program.operations):  # as many numbers as labels say?
        return False
    return sure


def _rows(replay: Replay, chosen: dict[int, Along]) -> dict[int, Along]:
    """Those ``chosen`` that are no tables: as large as the batch by chance, but not in the order of its samples.

    What is sent back follows samples that change places only with their own labels, and without moving a table. A set
    (negatives that all samples share) can be either; it stays. All do where places count, as with noise.
    """
    for kept in islice((c for n in range(len(chosen), -1, -1) for c in combinations(chosen, n)), MOST_SETS):
        labels = {n: chosen[n] for n in kept}
        if replay.permutes(labels):
            return labels
    return chosen


def _first_change(replay: Replay, chosen: dict[int, Along], digit: int | None) -> Found | None:
    """Outputs first, whatever the labels are: those of other samples might be any."""
    for source in sources(replay.outputs, digit):
        after = replay.changed(source, {})
        if after is not None:
            return Found(False, replay.factor(after, source))
    for source in sources(replay.outputs, digit) if chosen else ():
        after = replay.changed(source, chosen)
        if after is not None:
            shapes = tuple(tuple(replay.program.given[n].shape) for n in chosen)
            return Found(True, replay.factor(after, source), shapes)
    return None


def sources(outputs: Outputs, digit: int | None) -> Iterator[list[Tensor]]:
    """For each output and sample, by which one it is replaced: half of them by the other half, then the other way."""
    for halves in outputs.halves(digit):
        for half in (halves, [~h for h in halves]):
            yield [_replaced(h) for h in half]


def _replaced(stays: Tensor) -> Tensor:
    """The samples themselves where they stay, elsewhere those that stay, in turn."""
    own, place = torch.arange(len(stays)), stays.nonzero().flatten()
    if not len(place):
        return own
    return torch.where(stays, own, place[own % len(place)])


def _finite(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(0.0, 0.0, 0.0)


def _alike(a: Tensor, b: Tensor, times: float = 1, scale: float | None = None) -> bool:
    """Whether they differ by no more than rounding, ``times`` what may be expected."""
    return _largest(a - b) <= times * _tolerance(b) * (_largest(b) if scale is None else scale)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _tolerance(x: Tensor) -> float:
    return max(1e-5, 2 * torch.finfo(x.dtype).eps)
