"""Losses computed outside of the model: does one sample's loss, or its weight, depend on other samples?

Clipping bounds what one record changes only if every sample's loss is its own. The loss of the ordinary loop is
differentiated twice before its backward (:mod:`gsm.loss_influence`), and the gradient that it sends back to the model's
output shows what it weighs the samples with (:mod:`gsm.loss_shares`); a vector handed to ``step(loss=)`` is
differentiated, half of its entries at a time, with respect to the outputs of the other half. All of this is done in the
first batches and in a few later ones; between them nothing is installed but a counter.

What is refused is wrong. What is not refused need not be right: labels that change a loss other than cross entropy, and
weights made of detached outputs, leave no such trace. ``verify(model, inputs, loss=...)`` shows those.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gsm import ledger, loss_roots
from gsm.layout import SamplesInfluenceEachOther
from gsm.loss_influence import NotJudged, Outputs, influence, informed
from gsm.loss_shares import HISTORY, Rows, Shares, depends_on_neighbours, other_reduction
from gsm.structures import named_tensors, tensors_in
from gsm.tape import Tape

FIRST, THEN = 8, 64  # the first forwards, and every so many afterwards
RARELY = 4 * THEN  # what differentiates twice takes as long as two steps of the smallest models
MOST_CLASSES = 1 << 20
MOST_ENTRIES = 1 << 24
"""Entries of a loss's outputs beyond which it is not differentiated twice, which takes several times their memory."""
_MARK = "gsm.loss_check"
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
COMPARES = (
    "the loss compares samples: {how}. Contrastive losses (in-batch negatives), rankings, the batch's hardest samples, "
    "the root of a mean, variances and other statistics of a batch do that. What one record changes is then no longer "
    "bounded by clipping its own gradient. Use a mean (or sum) of terms that each depend on one sample's outputs: "
    "compare with a constant bank or with classes instead of the batch, take roots within each sample."
)

UNJUDGED = (
    "Whether the loss compares samples could not be told, as it cannot be differentiated twice ({error}). If each of "
    "its terms is made of one sample's outputs, all is well: gsm.verify(model, inputs, loss=...) shows it."
)

BESIDE = (
    "The loss is also made of {n} trainable parameter(s) beside the wrapped model (the first of shape {shape}), whose "
    "gradients depend on its outputs: they arrive without clipping and noise, and whoever trains with them publishes "
    "what no epsilon covers. Make them part of the model before it is wrapped, or freeze them."
)


class Mark:
    """What an output was, left in the graph at its place."""

    __slots__ = ("check", "size", "dims", "entries", "__weakref__")

    def __init__(self, check: LossCheck, size: int, dims: list[int], entries: int):
        self.check, self.size, self.dims, self.entries = weakref.ref(check), size, dims, entries


class LossCheck:
    """Watches what one wrapped model's outputs are used for.

    Args:
        module: the model, which gets a forward hook; without it (in a copy of a model) nothing is checked.
        tape: what captures its gradients.
    """

    def __init__(self, module: nn.Module | None = None, tape: Tape | None = None):
        self.tape, self.forwards, self.judged, self.said, self.beside = tape, 0, 0, False, False
        self.history: dict[int, deque[Shares]] = {}
        self.fresh: list[int] = []
        self._handle: Any = None
        if module is not None and tape is not None:
            self._handle = module.register_forward_hook(self)
            tape.after_backward.append(self.judge)
            _CHECKS[tape] = weakref.ref(self)

    def __reduce__(self) -> Any:
        return LossCheck, ()  # copies of the model are not watched

    def close(self) -> None:
        """Takes the forward hook away."""
        if self._handle is not None:
            self._handle.remove()

    # -- forward -------------------------------------------------------------------------------------------------------

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook."""
        tape = self.tape
        if tape is None or not tape.groups or not tape.enabled or not torch.is_grad_enabled():
            return
        self.forwards += 1
        if self.forwards > FIRST and self.forwards % THEN:
            return
        size = tape.groups[-1].batch_size
        if size == 0 or torch._C._current_graph_task_id() != -1:  # activation checkpointing of the whole model
            return
        outputs = list(named_tensors(output).values())
        for x in (*outputs, *_kept(module)):
            self._mark(x, size)
        for k, x in enumerate(outputs):
            if _in_a_graph(x):
                self._read(k, x, size, self._batch_dim(x))

    def _batch_dim(self, x: Tensor) -> int:
        return 0 if x.dim() < 2 or (self.tape is not None and self.tape.batch_first) else 1

    def _mark(self, x: Tensor, size: int) -> None:
        """Leaves word in the graph, where what the loss compares can be found again."""
        first = self._batch_dim(x)
        dims = [d for d in (first, 1 - first) if d < x.dim() and x.shape[d] == size]
        if dims and _in_a_graph(x):
            node: Any = x.grad_fn
            node.metadata.setdefault(_MARK, {})[x.output_nr] = mark = Mark(self, size, dims, x.numel())
            if self.forwards <= FIRST or self.forwards % RARELY == 0:
                loss_roots.wait(mark, compare)

    def _read(self, k: int, x: Tensor, size: int, batch_dim: int) -> None:
        """Has the gradient of output ``k`` read when it comes."""
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
        fresh, self.fresh = self.fresh, []
        for k in set(fresh):
            assert self.tape is not None
            history, said = list(self.history[k]), self.tape.loss_reduction
            name = "the model's output" if k == 0 else f"the model's output {k}"
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
        marked = [(edge, mark.dims) for edge, mark in _marked([loss]) if mark.size == size]
        if size < 2 or not marked:
            return
        bit = self.forwards % (size - 1).bit_length()  # halves that in time part every two samples
        half = (torch.arange(size, device=loss.device) >> bit) % 2 == 0
        with _judging([self]):
            for own in (half, ~half):
                for edge, where in marked:
                    other = _reached(loss[own].sum(), edge, where, ~own)
                    if other is not None:
                        raise SamplesInfluenceEachOther(_naming(loss, edge, where, own, other))


@contextmanager
def _judging(checks: Sequence[LossCheck]) -> Iterator[None]:
    """What is differentiated inside is no backward of a training: nothing is captured, and no weights are read."""
    tapes = [check.tape for check in checks if check.tape is not None]
    try:
        for tape in tapes:
            tape.judging = True
        yield
    finally:
        for tape in tapes:
            tape.judging = False


def check_entries(params: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Checks a vector of losses (see :meth:`LossCheck.entries`) if the model's last forward is one of those checked."""
    tape = ledger.tape_of(params[0]) if params else None
    check = _CHECKS.get(tape, lambda: None)() if tape is not None else None
    if check is not None and loss.grad_fn is not None:
        check.entries(loss)


def _in_a_graph(x: Tensor) -> bool:
    return x.is_floating_point() and x.requires_grad and x.grad_fn is not None and x.numel() > 0


def _kept(model: nn.Module) -> list[Tensor]:
    """What a forward left on the model's modules, from which a loss can be made as from its output."""
    own = nn.Module().__dict__.keys()
    kept = [v for m in model.modules() for name, v in m.__dict__.items() if name not in own]
    found = tensors_in([v for v in kept if isinstance(v, Tensor | list | tuple | dict)])
    return [x for x in found if type(x) is Tensor]  # what is made of parameters alone is no sample's


def compare(roots: Sequence[Any], grads: Sequence[Any], again: bool) -> None:
    """Asked before a backward that begins with ``roots``: whether they are the samples' own losses.

    Raises:
        SamplesInfluenceEachOther: a loss that compares samples.
    """
    if not all(isinstance(root, Tensor) for root in roots):
        return
    marked = _marked(roots)
    if not again:
        for _, mark in marked:
            loss_roots.done(mark)
    checks = list(dict.fromkeys(check for check in (mark.check() for _, mark in marked) if check is not None))
    if not checks or sum(mark.entries for _, mark in marked) > MOST_ENTRIES:
        return
    # At first by as many halves as part every two samples, later by one at a time.
    judged = max(check.judged for check in checks)
    edges, sizes = [edge for edge, _ in marked], [mark.size for _, mark in marked]
    for check in checks:
        check.judged = judged + 1
    try:
        # Where the batch may lie in either dimension, one of them in which samples are apart is enough.
        with _judging(checks):
            ways = sorted({tuple(mark.dims[at] for _, mark in marked) for at in (0, -1)})
            found = [influence(roots, grads, Outputs(edges, sizes, dims), judged or None) for dims in ways]
            _look_beside(checks, informed(roots, grads, Outputs(edges, sizes, ways[0])))
    except NotJudged as error:
        found = []
        if not any(check.said for check in checks):
            warnings.warn(UNJUDGED.format(error=error), stacklevel=4)
        for check in checks:
            check.said = True
    if found and all(found):
        raise SamplesInfluenceEachOther(COMPARES.format(how=found[0]))


def _look_beside(checks: Sequence[LossCheck], leaves: Sequence[Tensor]) -> None:
    """Says, once, which of the ``leaves`` are parameters whose gradients nobody clips."""
    free = [p for p in leaves if isinstance(p, nn.Parameter) and ledger.tape_of(p) is None]
    if free and not any(check.beside for check in checks):
        warnings.warn(BESIDE.format(n=len(free), shape=tuple(free[0].shape)), stacklevel=5)
    for check in checks:
        check.beside = check.beside or bool(free)


def _marked(roots: Sequence[Tensor]) -> list[tuple[GradientEdge, Mark]]:
    """The outputs of watched forwards in the graph of ``roots``."""
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
