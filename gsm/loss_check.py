"""Losses computed outside of the model: does one sample's loss, or its weight, depend on other samples?

Clipping bounds what one record changes only if every sample's loss is its own. Before a backward the loss is
differentiated twice, and computed again with other samples in the place of some (:mod:`gsm.loss_compare`). The gradient
that it sends back to the model's output shows what it weighs the samples with (:mod:`gsm.loss_shares`). A vector handed
to ``step(loss=)`` is differentiated, half of its entries at a time, with respect to the outputs of the other half. All
of this is done in the first batches and in a few later ones; between them nothing is installed but a counter.

What is refused is wrong. What is not refused need not be right: what a loss reads through Python numbers or numpy, and
labels that are not rows of tensors, leave no such trace. ``verify(model, inputs, loss=...)`` shows those.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gsm import ledger, loss_roots
from gsm.layout import SamplesInfluenceEachOther
from gsm.loss_compare import compare, compare_inputs, judging
from gsm.loss_labels import Labels
from gsm.loss_marks import Mark, in_a_graph, marked
from gsm.loss_shares import HISTORY, Rows, Shares, depends_on_neighbours, other_reduction
from gsm.structures import named_tensors, tensors_in
from gsm.tape import Tape
from gsm.window import window

FIRST, THEN = 8, 64  # the first batches, and every so many afterwards
RARELY = 16 * THEN  # differentiating twice and computing again takes as long as ten steps of small models, or of losses
MOST_PASSES = 16  # of a batch whose inputs are looked at: a recurrent cell may be called a thousand times
MOST_CLASSES = 1 << 20
_CHECKS: weakref.WeakKeyDictionary[Tape, weakref.ref[LossCheck]] = weakref.WeakKeyDictionary()

NORMALISED = (
    "{name}: the loss is normalised over the batch. Samples count differently in it (from {low:.3g} to {high:.3g}) and "
    "their weights always add up to {total:.3g}, so what one sample counts depends on its neighbours, and no clipping "
    "bounds what one record changes. A mean over all tokens of a padded batch does that, and so do weight= and "
    "ignore_index= with reduction='mean'. Take the mean within each sample first and over the samples last: "
    "gsm.transformers.per_sample_loss(outputs, labels).mean(), or reduction='none', then weight, then average."
)
OTHER = (
    "{name}: the loss is the {is_} of the samples' own losses, but the model is wrapped with loss_reduction={said!r}: "
    "every per-sample gradient is off by a factor of the batch size, which depends on the other samples. Use a loss "
    "that is a {said}, or pass loss_reduction={is_!r} to make_private (or to GradSampleModule and DPOptimizer)."
)
ENTRIES = (
    "loss= must have one entry per sample, made from that sample alone, but {entry} depends on the model's output for "
    "sample {other}: a contrastive loss (in-batch negatives), or one that is normalised or standardised over the "
    "batch. No clipping of single records makes such a loss private. Compute every entry from its own sample's "
    "outputs, as gsm.transformers.per_sample_loss does."
)


class LossCheck:
    """Watches what one wrapped model's outputs are used for.

    Args:
        tape: what captures the model's gradients; without it (in a copy of a model) nothing is checked.
    """

    def __init__(self, tape: Tape | None = None):
        self.tape, self.batches, self.passes, self.judged = tape, 0, 0, 0
        self.said, self.beside, self.labelled = False, False, False  # warnings
        self.history: dict[tuple[str, int], deque[Shares]] = {}
        self.fresh: list[tuple[str, int]] = []
        self.labels = Labels()
        if tape is not None:
            tape.before_pass.append(self.before)
            tape.after_pass.append(self.after)
            tape.after_backward.append(self.judge)
            _CHECKS[tape] = weakref.ref(self)

    def __reduce__(self) -> Any:
        return LossCheck, ()  # copies of the model are not watched

    # -- forward -------------------------------------------------------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether the loss of this batch is looked at before its backward."""
        return self.batches <= FIRST or self.batches % RARELY == 0

    @property
    def soon(self) -> bool:
        """Whether that of the next one is."""
        return self.batches < FIRST or (self.batches + 1) % RARELY == 0

    def before(self, path: str, args: Any, kwargs: Any) -> None:
        """Called before a forward: of the model, or of a part that a training calls by itself.

        Raises:
            SamplesInfluenceEachOther: what it is given was made of several samples' outputs of another.
        """
        window().pause()  # what the model computes is none of the loss's
        self.passes += 1
        if self.passes == 1 or self.passes % THEN == 0:  # outputs that are never sent back make no batch of their own
            self.batches += 1
        if self.compares:
            compare_inputs(path, tensors_in((args, kwargs)), self.judged, self.passes <= MOST_PASSES)
        window().renew()

    def after(self, path: str, module: nn.Module, output: Any, size: int) -> None:
        """Called after a forward on ``size`` samples."""
        if self.batches <= FIRST or self.batches % THEN == 0:
            outputs = list(named_tensors(output).values())
            for x in (*outputs, *_kept(module)):
                self._mark(x, size)
            for k, x in enumerate(outputs):
                if in_a_graph(x):
                    self._read((path, k), x, size, self._batch_dim(x))
        window().open()

    def _batch_dim(self, x: Tensor) -> int:
        return 0 if x.dim() < 2 or (self.tape is not None and self.tape.batch_first) else 1

    def _mark(self, x: Tensor, size: int) -> None:
        """Leaves word in the graph, where it can be found again."""
        first = self._batch_dim(x)
        dims = [d for d in (first, 1 - first) if d < x.dim() and x.shape[d] == size]
        if dims and in_a_graph(x):
            mark = Mark(self, size, dims, x.numel())
            mark.leave(x)
            if self.compares:
                loss_roots.wait(mark, compare)
                mark.number = window().give(mark, x, size, dims)

    def _read(self, k: tuple[str, int], x: Tensor, size: int, batch_dim: int) -> None:
        """Has the gradient of output ``k`` of a forward read when it comes."""
        if x.dim() < 2 or x.shape[batch_dim] != size:
            return
        views = [lambda t: t.movedim(batch_dim, 0)]
        if x.dim() > 2:  # classes last, or second as in segmentation
            views.append(lambda t: t.movedim(batch_dim, 0).movedim(1, -1))
        rows = [(view, Rows(view(x))) for view in views if 2 <= view(x).shape[-1] <= MOST_CLASSES]
        check = weakref.ref(self)

        def read(g: Tensor) -> None:
            owner = check()
            if owner is None or owner.tape is None or owner.tape.judging:
                return
            with torch.no_grad():
                found = next((s for view, r in rows if (s := r.shares(view(g))) is not None), None)
            if found is not None:
                owner.history.setdefault(k, deque(maxlen=HISTORY)).append(found)
                owner.fresh.append(k)

        x.register_hook(read)

    # -- backward ------------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Compares the batches read so far; called after every backward.

        Raises:
            SamplesInfluenceEachOther: with proof that the loss is normalised over the batch, or of another reduction.
        """
        fresh, self.fresh, self.passes = self.fresh, [], 0
        for k in set(fresh):
            assert self.tape is not None
            history, said = list(self.history[k]), self.tape.loss_reduction
            name = f"the output of {k[0]}" if k[0] else "the model's output"
            name += f" {k[1]}" if k[1] else ""
            if depends_on_neighbours(history, said):
                last = next(s for s in reversed(history) if not s.even)
                low, high = float(last.weights.min()), float(last.weights.max())
                raise SamplesInfluenceEachOther(NORMALISED.format(name=name, low=low, high=high, total=last.total))
            if other_reduction(history, said):
                is_ = "sum" if said == "mean" else "mean"
                raise SamplesInfluenceEachOther(OTHER.format(name=name, is_=is_, said=said))

    # -- a vector of losses --------------------------------------------------------------------------------------------

    def entries(self, loss: Tensor) -> None:
        """Differentiates a vector of losses, half of its entries at a time, with respect to the other half's outputs.

        Raises:
            SamplesInfluenceEachOther: an entry that depends on another sample's outputs.
        """
        size = len(loss)
        found = [(edge, mark.dims) for edge, mark in marked([loss]) if mark.size == size]
        if size < 2 or not found:
            return
        bit = self.batches % (size - 1).bit_length()  # halves that in time part every two samples
        half = (torch.arange(size, device=loss.device) >> bit) % 2 == 0
        with judging([self]):
            for own in (half, ~half):
                for edge, where in found:
                    other = _reached(loss[own].sum(), edge, where, ~own)
                    if other is not None:
                        raise SamplesInfluenceEachOther(_naming(loss, edge, where, own, other))


def _check_of(params: Sequence[nn.Parameter]) -> LossCheck | None:
    tape = ledger.tape_of(params[0]) if params else None
    return _CHECKS.get(tape, lambda: None)() if tape is not None else None


def looks_at_the_next(params: Sequence[nn.Parameter]) -> bool:
    """Whether the loss of the next batch that the model with these parameters sees will be looked at."""
    check = _check_of(params)
    return check is not None and check.soon


def check_entries(params: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Checks a vector of losses (see :meth:`LossCheck.entries`) if the model's last forward is one of those checked."""
    check = _check_of(params)
    if check is not None and loss.grad_fn is not None:
        check.entries(loss)


def _kept(model: nn.Module) -> list[Tensor]:
    """What a forward left on the model's modules, from which a loss can be made as from its output."""
    own = nn.Module().__dict__.keys()
    kept = [v for m in model.modules() for name, v in m.__dict__.items() if name not in own]
    found = tensors_in([v for v in kept if isinstance(v, Tensor | list | tuple | dict)])
    return [x for x in found if type(x) is Tensor]  # what is made of parameters alone is no sample's


def _reached(value: Tensor, edge: GradientEdge, dims: list[int], others: Tensor) -> int | None:
    """One of the samples ``others [batch]`` whose outputs ``value`` depends on, None if on none.

    Where the batch may lie in either dimension, one of them without such a sample is enough.
    """
    (g,) = torch.autograd.grad(value, edge, retain_graph=True, allow_unused=True)
    found = None
    for dim in dims if g is not None else ():
        rows = g.movedim(dim, 0).reshape(g.shape[dim], -1).nan_to_num(0.0, 0.0, 0.0).abs().amax(1)
        far = rows * others.to(rows.device)
        if far.max() <= max(1e-5, 8 * torch.finfo(g.dtype).eps) * rows.max():
            return None
        found = int(far.argmax()) if found is None else found
    return found


def _naming(loss: Tensor, edge: GradientEdge, dims: list[int], own: Tensor, other: int) -> str:
    only = torch.arange(len(loss), device=loss.device) == other
    for j in own.nonzero().flatten().tolist()[:16]:
        if _reached(loss[j], edge, dims, only) is not None:
            return ENTRIES.format(entry=f"entry {j}", other=other)
    return ENTRIES.format(entry="an entry", other=other)
