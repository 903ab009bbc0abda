"""Does what a loss sends back for one sample change when other samples are replaced?

Derivatives do not show what goes past autograd: weights made of detached outputs, and labels. So what a thread computes
from the model's outputs is recorded until their backward (:mod:`gsm.recording`), and computed again in full precision
with some samples replaced by others of the same batch: outputs and labels (:mod:`gsm.loss_labels`) alike. What is sent
back for the samples that stay must stay (:func:`judge`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import torch
from torch import Tensor

from gsm.loss_influence import Outputs
from gsm.loss_labels import Along, Labels, are_positions
from gsm.loss_marks import Mark
from gsm.recording import Program, Recording
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


class Replay:
    """The recorded program of one loss.

    Args:
        program: what made it.
        roots, grads: the numbers of the values that the backward begins with, and its gradients there.
        outputs: the model's outputs in its graph.
        numbers: theirs.
    """

    def __init__(
        self,
        program: Program,
        roots: Sequence[int],
        grads: Sequence[Tensor | None],
        outputs: Outputs,
        numbers: Sequence[int],
    ):
        self.program, self.roots, self.grads = program, roots, grads
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
        program = recording.made(made)
        last = [k for k, mark in enumerate(marks) if not mark.feeds]
        if not last or not program.repeatable or not all(n in program.given for n in numbers):
            return None
        try:
            replay = cls(program, made, grads, outputs, numbers)
            edges = [outputs.edges[k] for k in last]
            real = torch.autograd.grad(roots, edges, grads, retain_graph=True, allow_unused=True)
        except RuntimeError:  # an in-place change of what autograd needs, seen only by one of them
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
            found = torch.autograd.grad(roots, leaves, list(self.grads), allow_unused=True)
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
        for k, (b, a, rows) in enumerate(zip(self.base, after, source, strict=True)):
            stays = self.outputs.along(k, b, rows == torch.arange(len(rows)))
            if not _alike(a * stays, b * stays, 1, _largest(b)):
                return after
        return None

    def permutes(self, labels: dict[int, Along]) -> bool:
        """Whether samples that change places take along what is sent back to them, if ``labels`` go with them."""
        source = [torch.arange(size).flip(0) for size in self.outputs.sizes]
        try:
            after = self._with(source, labels)
        except (RuntimeError, IndexError):  # sizes that depend on the labels
            return False
        pairs = zip(after, self.base, self.outputs.dims, source, strict=True)
        return all(_alike(a, b.index_select(dim, rows.to(b.device)), 10) for a, b, dim, rows in pairs)

    def _with(self, source: Sequence[Tensor], labels: dict[int, Along]) -> list[Tensor]:
        """What is sent back with samples replaced, see :meth:`changed`."""
        given = self.program.given
        outputs = zip(self.numbers, self.outputs.dims, source, strict=True)
        others = {n: given[n].index_select(dim, rows.to(given[n].device)) for n, dim, rows in outputs}
        others |= {n: along.take(given[n], source[0], len(source[0])) for n, along in labels.items()}
        return self.gradients(others)

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


def judge(replay: Replay, labels: Labels, digit: int | None) -> Found | None:
    """What in a loss changes for one sample when others are replaced; None if nothing does.

    Args:
        replay: its program.
        labels: what was seen in batches before.
        digit: see :meth:`gsm.loss_influence.Outputs.halves`.
    """
    outputs = replay.outputs
    alike = len(set(outputs.sizes)) == 1
    seen = labels.look(replay.program, replay.numbers, outputs.sizes[0]) if alike else []
    chosen = labels.choose(seen, outputs.dims[0])
    found = _first_change(replay, chosen, digit)
    if found is not None and found.labels:
        rows = _rows(replay, chosen)
        if are_positions(replay.program, [*replay.numbers, *rows], chosen):
            rows = {}
        found = _first_change(replay, rows, digit) if len(rows) < len(chosen) else found
    return found if found is not None and replay.repeats() else None


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
    for source in _sources(replay.outputs, digit):
        if chosen:
            try:
                after = replay.changed(source, chosen)
            except (RuntimeError, IndexError):  # sizes that depend on the labels
                chosen, after = {}, None
            if after is not None and replay.changed(source, {}) is None:
                shapes = tuple(tuple(replay.program.given[n].shape) for n in chosen)
                return Found(True, replay.factor(after, source), shapes)
        else:
            after = replay.changed(source, {})
        if after is not None:
            return Found(False, replay.factor(after, source))
    return None


def mixed_inputs(window: Window, inputs: Sequence[Tensor], digit: int | None) -> int | None:
    """Which of the ``inputs`` of a forward mixes samples of earlier outputs; None if none is seen to.

    Args:
        window: with what was computed since.
        inputs: tensors.
        digit: see :meth:`gsm.loss_influence.Outputs.halves`.
    """
    recording = window.recording
    numbers = [recording.number(x) for x in inputs]
    made = {k: n for k, n in enumerate(numbers) if n is not None and n not in recording.given}
    if recording.lost or not made:
        return None
    program = recording.made(list(made.values()))
    outputs = [(n, *window.outputs[n]) for n in program.given if n in window.outputs]
    if len({size for _, size, _ in outputs}) != 1 or not program.repeatable:
        return None
    size = outputs[0][1]
    try:
        before = program.run({})
        for k, n in made.items():
            ways = [(d, along) for d in (0, -1) for along in Along.all(inputs[k].shape, size)]
            moves = (
                _moves(program, n, before[n], [(m, dims[d]) for m, _, dims in outputs], along, size, digit)
                for d, along in ways
            )
            if ways and _alike(before[n], inputs[k]) and all(moves):
                return k
    except (RuntimeError, IndexError):  # sizes that depend on values
        return None
    return None


def _moves(
    program: Program,
    number: int,
    before: Tensor,
    outputs: Sequence[tuple[int, int]],
    along: Along,
    size: int,
    digit: int | None,
) -> bool:
    """Whether rows of samples that stay move when others are replaced in the ``outputs`` (numbers and dimensions)."""
    for (source,) in _sources(Outputs([], [size], []), digit):
        others = {n: program.given[n].index_select(dim, source.to(before.device)) for n, dim in outputs}
        after = program.run(others)[number]
        stay = (source == torch.arange(size)).nonzero().flatten()
        if not _alike(along.take(after, stay, size), along.take(before, stay, size), 1, _largest(before)):
            return True
    return False


def _sources(outputs: Outputs, digit: int | None) -> Iterator[list[Tensor]]:
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
