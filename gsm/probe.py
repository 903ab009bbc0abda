"""Before the first batch: forwards on a few samples, to learn where the batch lies and whether samples mix.

The model runs at two batch sizes that occur nowhere in its input's shapes. A dimension that moved with the batch is the
batch; a value that changed for the same sample although only its neighbours did is a sample influencing another.
Dropout is off, random state and buffers are put back; the model's own parameters are not touched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from gsm.capture import Capture, CapturedForward
from gsm.layout import UNKNOWN, Layout, Rows, SamplesInfluenceEachOther, Unresolvable
from gsm.locate import Log
from gsm.random_numbers import TURNS, Settled, settled
from gsm.scalars import compare_alone, named_scalars, uneven_labels
from gsm.shown import BOTH_ENDS, check_influence, check_uses, learned, learned_outputs, same
from gsm.structures import make_known, named_tensors, tensors_in
from gsm.trial import Trial, Tried, all_given, sizes_for
from gsm.undisturbed import attributes_restored, buffers_restored, saved_bytes, undisturbed


class OnlyWhole(ValueError):
    """The model runs on the batch, but not on a few of its samples."""


def probe(
    capture: Capture,
    forward: CapturedForward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    strict: bool = True,
) -> None:
    """Fills ``tape.layouts``; ``strict`` also checks that samples do not influence each other.

    What a tensor was taken for decides which of them are looked at next, so the model runs again until
    everything was taken for what it turned out to be.

    Raises:
        gsm.layout.Unresolvable: if a parameter's use has no rule (the caller escalates to the subtree and tries again).
        SamplesInfluenceEachOther: if a sample's values change with its neighbours.
        OnlyWhole: if the model runs on this batch only.
    """
    trial = Trial(capture, forward, args, kwargs, size)
    try:
        _probe(trial, strict)
    except Unresolvable:
        if trial.suspected is not None:
            raise trial.suspected from None
        raise
    except SamplesInfluenceEachOther:
        raise
    except Exception as error:
        if _HOOKS in str(error):
            trial.measures = False
        else:
            # Numbers in between or beyond those of the batch may be none that the model takes (probabilities, columns
            # with a meaning of their own). If it was not that, the same comes again.
            trial.mild = True
        try:
            _probe(trial, strict)
        except Exception as again:
            failed = trial.failed_plainly()
            if failed is None:
                raise
            raise OnlyWhole(_ONLY_WHOLE.format(n=failed[0], size=size, error=repr(again))) from again


_ONLY_WHOLE = (
    "Before the first batch the model is run on {n} samples of it, to see whether samples influence each other; that "
    "failed ({error}), though it takes the batch of {size}. A private model must run on any number of records, as "
    "batches vary: take that number from the input (x.shape[0]), and let every input whose first dimension is the "
    "batch hold one row per record (graphs: one padded graph per row, not all their nodes in one long list)."
)
_HOOKS = "saved tensor hooks"  # how torch.func.grad inside of a model says that it does not run under `saved_bytes`


def _probe(trial: Trial, strict: bool) -> None:
    capture, tape = trial.capture, trial.capture.tape
    tape.layouts = {}
    first, second = sizes_for(tensors_in(*make_known((trial.args, trial.kwargs))))
    left: dict[str, Tensor] = {}
    met: set[tuple[str, int]] = set()
    fresh = True  # uses were met that were not before: those behind them may have been misled
    for attempt in range(4):
        logs: list[Log] = []
        outputs = []
        with undisturbed(capture.root) as random_numbers:
            for n, skip in ((first, 0), (second, first)):
                log = Log()
                log.dry = fresh and attempt < 3
                inputs = trial.inputs(n, skip)
                restored = buffers_restored(capture.root), attributes_restored(capture.root)
                measured: AbstractContextManager[dict[int, int]] = nullcontext({})
                if trial.measures:
                    measured = saved_bytes(capture.root)
                with measured as saved, restored[0], restored[1] as left:
                    out = trial.call(inputs, n, log)
                outputs.append(all_given(out, left))
                logs.append(log)
                tape.planner.activation_bytes = sum(saved.values()) / n
            # A model that draws random numbers draws others at another size: compared with the same ones, below.
            draws, besides = random_numbers.drawn(), random_numbers.drawn_besides()
        ends = BOTH_ENDS if strict and not draws else ()
        tape.layouts = learned(logs[0], logs[1], first, second)
        skipped = logs[0].skipped or logs[1].skipped
        is_settled = not skipped and all(_as_taken(log, tape.layouts) for log in logs)
        try:
            check_uses(logs[0], logs[1], tape.layouts, first, second, ends)
        except SamplesInfluenceEachOther as error:
            # A use that a shape hid in one of the two makes the site's later ones look like other tensors.
            if is_settled or attempt == 3:
                raise
            trial.suspected = error
        if is_settled:
            break
        fresh = not met.issuperset((*logs[0], *logs[1]))
        met.update(*logs)
    of_outputs = learned_outputs(outputs[0], outputs[1], first, second, ends)
    if strict:
        if not outputs[0]:
            raise ValueError(
                f"The model returned a {type(out).__name__}, in which no tensor was found: whether samples influence "
                "each other cannot be told. Return tensors, or tuples, lists, dicts or dataclasses of them."
            )
        small, scalars = (logs[0], outputs[0]), named_scalars(outputs[0])
        del outputs, out  # of logits, say, the larger ones
        if draws:  # numbers that nothing settles are the same for the first sample only
            _check_number(trial, (first, second), (0,) if besides else BOTH_ENDS)
        _check_neighbours(trial, small, of_outputs, (first, second), draws)
        if left:
            _check_forgets(trial, first, left)
        if scalars:
            _check_scalars(trial, draws)


def _check_number(trial: Trial, sizes: tuple[int, int], ends: tuple[int, ...]) -> None:
    """Refuses a model that draws random numbers and in which the number of samples changes those at ``ends``."""
    for turn in range(len(TURNS)):
        with settled(turn) as mode:
            one, two = (trial.tried(n, skip, mode=mode) for n, skip in zip(sizes, (0, sizes[0]), strict=True))
        check_uses(one[0], two[0], learned(one[0], two[0], *sizes), *sizes, ends)
        learned_outputs(one[1], two[1], *sizes, ends)


def _check_neighbours(
    trial: Trial, small: Tried, of_outputs: dict[str, Layout | None], sizes: tuple[int, int], draws: bool
) -> None:
    """Refuses a model in which samples are moved by as many other ones, random numbers being the same."""
    # Samples left out, the one that is changed; then those that are the same as before.
    others: list[tuple[int, int | None, tuple[int, ...]]] = [(0, 0, (-1,)), (0, -1, (0,))]
    n, base, mode = sizes[0], small, None
    if draws:
        others.append((sizes[1], None, (0, -1)))
        mode = Settled()
        n, base = sizes[1], trial.tried(sizes[1], mode=mode)  # at least 3: some are between
    for skip, other, ends in others:
        new = trial.tried(n, skip, other, mode)
        _check_same_size(trial.capture.tape.layouts, of_outputs, n, base, new, ends)


def _check_same_size(
    layouts: dict[tuple[str, int], Layout | None],
    of_outputs: dict[str, Layout | None],
    size: int,
    base: Tried,
    new: Tried,
    ends: tuple[int, ...],
) -> None:
    """Refuses a model in which other samples move those at ``ends``: as many of them, and the same random numbers."""
    for key, seen in base[0].items():
        if key in new[0] and not seen.picked and not new[0][key].picked:
            check_influence(seen.x, new[0][key].x, size, size, layouts.get(key), key[0], ends)
    for name, x in base[1].items():
        if name in new[1]:
            check_influence(x, new[1][name], size, size, of_outputs.get(name), name, ends)


def _check_forgets(trial: Trial, size: int, left: dict[str, Tensor]) -> None:
    """Refuses a model whose output depends on what an earlier forward left on it: batches influence each other."""
    inputs = trial.inputs(size)
    with undisturbed(trial.capture.root) as random_numbers, attributes_restored(trial.capture.root):
        with buffers_restored(trial.capture.root):
            one = named_tensors(trial.call(inputs, size))
        random_numbers.again()
        two = named_tensors(trial.call(inputs, size))
    if not all(same(x.detach(), two[name].detach()) for name, x in one.items()):
        raise SamplesInfluenceEachOther(
            f"The model's output depends on what the forward before left on it ({', '.join(sorted(left)[:3])}): the "
            "records of one batch would influence the gradients of the next, and no clipping bounds that. Switch the "
            "state off (use_cache=False, for a cache), or set it back at the beginning of forward."
        )


def _check_scalars(trial: Trial, draws: bool) -> None:
    """Refuses outputs such as a loss that are not the mean (or the sum) of what the samples alone give."""
    batch_first = trial.capture.tape.batch_first
    args, kwargs = trial.inputs(2)
    pair = args, uneven_labels(kwargs)

    def run(values: tuple[tuple[Any, ...], dict[str, Any]], n: int) -> Any:
        if not draws:
            return trial.given(values, n)
        with settled(0) as mode:  # the same random numbers for two samples and for one
            return trial.given(values, n, mode=mode)

    def pick(start: int, n: int) -> Any:
        def of(x: Any) -> Any:
            if not isinstance(x, Tensor) or 2 not in x.shape[:2] or n == 2:
                return x
            dim = 0 if x.shape[0] == 2 and (batch_first or x.dim() == 1) else list(x.shape).index(2)
            return x.narrow(dim, start, n)

        return tree_map(of, pair)

    compare_alone(run, pick, trial.capture.tape.loss_reduction)


def _as_taken(log: Log, layouts: dict[tuple[str, int], Layout | None]) -> bool:
    return all(
        seen.told or (isinstance(seen.taken, Rows) if layouts[key] is UNKNOWN else seen.taken == layouts[key])
        for key, seen in log.items()
    )
