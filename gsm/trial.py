"""A forward on a few of the samples, to see what it does: nothing of it stays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from gsm.bags import bags_in, regrouped
from gsm.capture import Capture, CapturedForward
from gsm.layout import SamplesInfluenceEachOther
from gsm.locate import Log
from gsm.structures import make_known, named_tensors, tensors_in
from gsm.tracked import Tracked
from gsm.undisturbed import attributes_restored, undisturbed

_SIZES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


def sizes_for(inputs: list[Tensor]) -> tuple[int, int]:
    """Two batch sizes that are not the size of any dimension of the inputs (but for the batch itself)."""
    taken = {n for x in inputs for n in x.shape}
    free = [n for n in _SIZES if n not in taken]
    return (free[0], free[1]) if len(free) > 1 else (_SIZES[0], _SIZES[1])


def resized(
    value: Any,
    size: int,
    new: int,
    batch_first: bool,
    skip: int = 0,
    bags: bool = False,
    other: int | None = None,
    mild: bool = False,
) -> Any:
    """The arguments with ``new`` samples in place of ``size``; the one at ``other`` (0 or -1) exchanged.

    The first and the last sample stay; between them are the second and following ones, ``skip`` of them left out.
    Where there are too few, they come again. Two calls with different ``skip`` have the first and the last sample in
    common and no other. Both are needed: what runs along the batch (a sum so far, a recurrence that takes the batch for
    time) reaches only later samples.

    Of floating numbers, samples that come again are changed (rolled along the last dimension and scaled), so that no
    two are alike; not if ``mild``, which leaves only what the batch itself holds. Integers are those of another sample,
    as they may be indices into tables of different lengths, unless there is only one.
    """
    turns = [(min(i, size - 1), max(0, i - size + 1)) for i in [0, *range(1 + skip, new - 1 + skip), size - 1]]
    if other is not None:
        turns[other] = (turns[other][0], 1)
    done: list[Tensor] = []
    found = bags_in(value) if bags else None
    if found is not None:
        value, done = regrouped(value, found, turns)

    def pick(x: Any, dim: int | None = None) -> Any:
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            return pack_padded_sequence(pick(padded, 1), pick(lengths), enforce_sorted=x.sorted_indices is None)
        if not isinstance(x, Tensor) or x.dim() == 0 or size not in x.shape or any(x is y for y in done):
            return x
        if dim is None:
            preferred = 0 if batch_first or x.dim() < 2 else 1
            dim = preferred if x.shape[preferred] == size else list(x.shape).index(size)
        floating = x.is_floating_point()
        invented = not mild and (floating or (size == 1 and not x.is_cuda))
        if x.dim() == 1 and not floating:
            rows = [x.select(dim, i) for i in _in_order(x, [i for i, _ in turns], other)]
        elif invented:
            rows = [_changed(x.select(dim, i), times) for i, times in turns]
        else:
            rows = [x.select(dim, (i + times) % size) for i, times in turns]
        if skip and invented and floating:  # neighbours that outweigh both: a maximum over the batch shows
            rows[1:-1] = [3 * row for row in rows[1:-1]]
        out = torch.stack(rows, dim)
        return out.detach().requires_grad_(x.requires_grad) if floating else out

    return tree_map(pick, value, is_leaf=lambda x: isinstance(x, PackedSequence))


def _in_order(numbers: Tensor, samples: list[int], other: int | None) -> list[int]:
    """Whose numbers ``samples`` get: their own, the last one repeated, so that lengths that were sorted stay sorted.

    The one at ``other`` gets those of a sample from here to its neighbour: where it was first the least, where it was
    last the greatest. A model that pads or cuts to the batch's longest or shortest sample shows it.
    """
    samples = list(samples)
    if other is None or numbers.is_meta:
        return samples
    end = len(numbers) - 1
    others = range(1, samples[1] + 1) if other == 0 else range(samples[-2], end)
    if others:
        samples[other] = (min if other == 0 else max)(others, key=numbers.tolist().__getitem__)
    return samples


def _changed(sample: Tensor, times: int) -> Tensor:
    if times and sample.dim():
        sample = sample.roll(times, -1)
    return sample * (1 + 0.25 * times) if times and sample.is_floating_point() else sample


Tried = tuple[Log, dict[str, Tensor]]  # what a forward met, and what it gave


@dataclass
class Trial:
    """The first batch's call of the model, to be made with fewer samples.

    Args:
        capture: the wrapper's.
        forward: the model's forward.
        args: its arguments, for ``size`` samples.
        kwargs: those given by name.
        size: the batch size.
        mild: only samples as they are in the batch: invented ones may be out of what the model can take.
        measures: whether the memory for activations is measured.
        suspected: what was seen before it was known where the batch lies.
    """

    capture: Capture
    forward: CapturedForward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    mild: bool = False
    measures: bool = True
    suspected: SamplesInfluenceEachOther | None = None

    def inputs(self, n: int, skip: int = 0, other: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for ``n`` samples, see :func:`resized`."""
        batch_first, bags = self.capture.tape.batch_first, self.capture.has_bags
        args, kwargs = resized(
            (self.args, self.kwargs), self.size, n, batch_first, skip, bags, other, self.mild
        )
        return args, kwargs

    def call(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], n: int, log: Log | None = None) -> Any:
        """What the model gives; without ``log``, what is met is neither noted nor resolved."""
        if log is None:
            log = Log()
            log.dry = True
        return self.capture.run_pass(self.forward, *inputs, n, log)

    def failed_plainly(self) -> tuple[int, Exception] | None:
        """The number of samples that the model itself fails on, and how, where it takes the batch; else None."""
        enabled, self.capture.tape.enabled = self.capture.tape.enabled, False
        first, second = sizes_for(tensors_in(*make_known((self.args, self.kwargs))))
        n, skip = self.size, None  # the batch as it is
        try:
            for n, skip in ((self.size, None), (first, 0), (second, first)):
                args, kwargs = (self.args, self.kwargs) if skip is None else self.inputs(n, skip)
                with undisturbed(self.capture.root), attributes_restored(self.capture.root):
                    self.forward.original(*args, **kwargs)
        except Exception as error:
            return None if skip is None else (n, error)
        finally:
            self.capture.tape.enabled = enabled
        return None

    def tried(
        self, n: int, skip: int = 0, other: int | None = None, mode: AbstractContextManager[Any] | None = None
    ) -> Tried:
        """A forward on other samples inside ``mode``, always from the same random state on."""
        log = Log()
        log.dry = True
        return log, self.given(self.inputs(n, skip, other), n, log, mode)

    def given(
        self,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        n: int,
        log: Log | None = None,
        mode: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Tensor]:
        """What a forward gives, and what it leaves on the model, by name; always from the same random state on."""
        with undisturbed(self.capture.root), attributes_restored(self.capture.root) as left, mode or nullcontext():
            out = self.call(inputs, n, log)
        return all_given(out, left)


def all_given(output: Any, left: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an output and, as a loss may use them too, those with a graph that stayed on the model.

    A tracked one is a function of parameters alone (an old-style weight norm leaves the weight).
    """
    kept = {name: x for name, x in left.items() if not isinstance(x, Tracked) and x.requires_grad}
    return {**named_tensors(output), **kept}
