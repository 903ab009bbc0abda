"""Before a backward: does the loss that it begins with compare samples?

It is differentiated twice (:mod:`gsm.loss_influence`), and computed again with other samples (:mod:`gsm.loss_replay`).
So is what the parts of a model are given where a training calls them one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gsm import ledger, loss_roots
from gsm.input_replay import mixed_inputs
from gsm.layout import SamplesInfluenceEachOther
from gsm.loss_influence import NotJudged, Outputs, influence, informed
from gsm.loss_marks import Mark, in_a_graph, marked
from gsm.loss_replay import Replay, judge
from gsm.window import window

if TYPE_CHECKING:
    from gsm.loss_check import LossCheck

FEW_ENTRIES, FEW_OPERATIONS = 1 << 20, 512
"""Of a loss: beyond them a look may take seconds, and is taken by one pair of halves, in batches 1, 2, 4, 8, 1024."""
MOST_ENTRIES = 1 << 24
"""Entries of a loss's outputs beyond which it is not differentiated twice, which takes several times their memory."""
Marked = Sequence[tuple[GradientEdge, Mark]]

COMPARES = (
    "the loss compares samples: {how}. Contrastive losses (in-batch negatives), rankings, the batch's hardest samples, "
    "the root of a mean, variances and other statistics of a batch do that. What one record changes is then no longer "
    "bounded by clipping its own gradient. Use a mean (or sum) of terms that each depend on one sample's outputs: "
    "compare with a constant bank or with classes instead of the batch, take roots within each sample."
)

REPLACED = (
    "the loss compares samples where autograd does not follow: what it sends back for one sample changes when the "
    "model's outputs for others do, by values without a gradient (detach(), .data, torch.no_grad(), comparisons, "
    "ranks). What one record changes is then no longer bounded by clipping its own gradient. Make each sample's "
    "weights and targets from its own outputs, or from numbers that do not depend on the batch."
)
MIXED = (
    "{path} was given a tensor of shape {shape} in which a sample's row depends on the outputs of an earlier call for "
    "other samples: what was computed in between mixes samples (centring, standardising, attention or a maximum over "
    "the batch do), or moves rows to other places (sort or shuffle the records before the first part instead). What "
    "one record changes is then no longer bounded by clipping its own gradient. Compute each row from its own sample."
)
LOADED = (
    "{path} was given a tensor of shape {shape} in which a sample's row depends on other samples of the batch: what "
    "was computed between the loader and this forward mixes records (standardising by the batch, mixup, rows of "
    "neighbours as negatives do). One record is then in several rows, and clipping each row's gradient no longer "
    "bounds what that record changes. Compute each row from its own record: with constants that do not depend on the "
    "batch, mixing within a record only."
)
LABELLED = (
    "the loss of one sample changes with what else is in the batch: replacing other samples' rows in tensors of shape "
    "{shapes}, which go with the samples as labels do, "
)
TIMES = "multiplies what it sends back for all by {factor:.3g}: it is normalised over the batch. "
CHANGES = "changes what it sends back for those that stay. "
BATCHED = (
    "Weights, targets and baselines counted, standardised, ranked or shuffled over the batch do that: take constants "
    "of the whole data set, and means within each sample first and over the samples last "
    "(gsm.transformers.per_sample_loss does)."
)
REMEDY = (
    "Take the mean within each sample first and over the samples last: gsm.transformers.per_sample_loss(outputs, "
    "labels).mean(), or reduction='none', then weight, then average."
)
SETS = (
    " If they are no rows of the batch (negatives that all samples share, as many as there are samples, and drawn "
    "without looking at the records), nothing is wrong."
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


@contextmanager
def judging(checks: Sequence[LossCheck]) -> Iterator[None]:
    """What is differentiated inside is no backward of a training: nothing is captured, and no weights are read."""
    tapes = [check.tape for check in checks if check.tape is not None]
    try:
        for tape in tapes:
            tape.judging = True
        yield
    finally:
        for tape in tapes:
            tape.judging = False


def compare(roots: Sequence[Any], grads: Sequence[Any], again: bool) -> Callable[[], None]:
    """Asked before a backward that begins with ``roots``: whether they are the samples' own losses.

    Returns what is to be called after it: other losses may be made of outputs that still wait for theirs.

    Raises:
        SamplesInfluenceEachOther: a loss that compares samples.
    """
    window().pause()
    if all(isinstance(root, Tensor) for root in roots):
        _compare(roots, grads, again)
    return window().open


def _compare(roots: Sequence[Any], grads: Sequence[Any], again: bool) -> None:
    found = marked(roots)
    if not again:
        for _, mark in found:
            loss_roots.done(mark)
            window().done(mark)
    checks = list(dict.fromkeys(check for check in (mark.check() for _, mark in found) if check is not None))
    entries = sum(mark.entries for _, mark in found)
    if not checks or entries > MOST_ENTRIES:
        return
    large = entries > FEW_ENTRIES or len(window().recording.operations) > FEW_OPERATIONS
    if large and all(check.batches.bit_count() > 1 for check in checks):
        return
    judged = max(check.judged for check in checks)
    # At first by as many halves as part every two samples, later, and of large outputs, by one at a time.
    digit = None if judged == 0 and not large else judged
    for check in checks:
        check.judged = judged + 1
    with judging(checks):
        once = _differentiated(checks, roots, grads, found, digit)
        told = _replaced(checks, roots, grads, found, digit)
    window().renew()
    if once is not None and not told and not any(check.said for check in checks):
        warnings.warn(UNJUDGED.format(error=once), stacklevel=6)
        for check in checks:
            check.said = True


def _ways(found: Marked, others: Marked = ()) -> list[Outputs]:
    """How the samples may lie: where it may be either dimension, one of them in which they are apart is enough."""
    edges, sizes = [edge for edge, _ in found], [mark.size for _, mark in found]
    ways = sorted({tuple(m.dims[at] for _, m in found) for at in (0, -1)})
    return [Outputs(edges, sizes, dims, [edge for edge, _ in others]) for dims in ways]


def _differentiated(
    checks: Sequence[LossCheck], roots: Sequence[Any], grads: Sequence[Any], marks: Marked, digit: int | None
) -> NotJudged | None:
    """Refuses a loss whose second derivatives show that it compares samples; returns why it has none.

    Those with respect to outputs that fed other parts of the model would lead through these parts: they are left out.
    """
    last = [(edge, mark) for edge, mark in marks if not mark.feeds]
    if not last:
        return None
    ways = _ways(last, marks)
    try:
        found = [influence(roots, grads, outputs, digit) for outputs in ways]
        _look_beside(checks, informed(roots, grads, ways[0]))
    except NotJudged as error:
        return error
    if all(found):
        raise SamplesInfluenceEachOther(COMPARES.format(how=found[0]))
    return None


def _replaced(
    checks: Sequence[LossCheck],
    roots: Sequence[Any],
    grads: Sequence[Any],
    outputs: Marked,
    digit: int | None,
) -> bool:
    """Refuses a loss that changes for one sample when others are replaced; returns whether that could be told."""
    marks = [mark for _, mark in outputs]
    replays = [Replay.of(window().recording, roots, grads, way, marks) for way in _ways(outputs)]
    told = [replay for replay in replays if replay is not None]
    if len(told) < len(replays):
        return False
    found = judge(told, window(), checks[0].labels, digit)
    if found is None:
        return True
    if not found.labels:
        raise SamplesInfluenceEachOther(REPLACED)
    what = LABELLED.format(shapes=", ".join(str(shape) for shape in found.shapes))
    if found.factor is not None:
        raise SamplesInfluenceEachOther(what + TIMES.format(factor=found.factor) + REMEDY)
    if found.sure is None:
        return True
    if found.sure:
        raise SamplesInfluenceEachOther(what + CHANGES + BATCHED)
    if not any(check.labelled for check in checks):
        warnings.warn(what + CHANGES + BATCHED + SETS, stacklevel=7)
    for check in checks:
        check.labelled = True
    return True


def _look_beside(checks: Sequence[LossCheck], leaves: Sequence[Tensor]) -> None:
    """Says, once, which of the ``leaves`` are parameters whose gradients nobody clips."""
    free = [p for p in leaves if isinstance(p, nn.Parameter) and ledger.tape_of(p) is None]
    if free and not any(check.beside for check in checks):
        warnings.warn(BESIDE.format(n=len(free), shape=tuple(free[0].shape)), stacklevel=8)
    for check in checks:
        check.beside = check.beside or bool(free)


def compare_inputs(path: str, inputs: Sequence[Tensor], judged: int, looks: bool) -> None:
    """Asked before a forward: whether what it is given was made of each sample's outputs of an earlier one alone.

    Args:
        path: the module's, for the message.
        inputs: the tensors that it is given.
        judged: how many batches were looked at before.
        looks: False only notes which outputs the forward is given something of.

    Raises:
        SamplesInfluenceEachOther: an input whose rows depend on several samples' outputs.
    """
    for _, mark in marked([x for x in inputs if in_a_graph(x)]):
        mark.feeds = True
    found = mixed_inputs(window(), inputs, judged or None) if looks else None
    if found is not None:
        text, shape = LOADED if found.loaded else MIXED, tuple(inputs[found.place].shape)
        raise SamplesInfluenceEachOther(text.format(path=path or "the model", shape=shape))
