"""Before the first batch: forwards on a few samples, to learn where the batch lies and whether samples mix.

The model runs at two batch sizes that occur nowhere in its input's shapes. A dimension that moved with the batch is the
batch; a value that changed for the same sample although only its neighbours did is a sample influencing another.
Dropout is off, random state and buffers are put back; the model's own parameters are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from gsm.bags import bags_in, regrouped
from gsm.capture import Capture, CapturedForward, tensors_in
from gsm.layout import UNKNOWN, Layout, Rows, SamplesInfluenceEachOther
from gsm.locate import Log, Seen
from gsm.ownership import owners_in_layout
from gsm.scalars import compare_alone, named_scalars, uneven_labels
from gsm.undisturbed import attributes_restored, saved_bytes, undisturbed

_SIZES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


def sizes_for(inputs: list[Tensor]) -> tuple[int, int]:
    """Two batch sizes that are not the size of any dimension of the inputs (but for the batch itself)."""
    taken = {n for x in inputs for n in x.shape}
    free = [n for n in _SIZES if n not in taken]
    return (free[0], free[1]) if len(free) > 1 else (_SIZES[0], _SIZES[1])


def resized(
    value: Any, size: int, new: int, batch_first: bool, skip: int = 0, bags: bool = False, other: int | None = None
) -> Any:
    """The arguments with ``new`` samples in place of ``size``; the one at ``other`` (0 or -1) changed.

    The first and the last sample stay; between them are the second and following ones, ``skip`` of them left out.
    Where there are too few, they come again, changed (rolled along the last dimension and, if floating, scaled): two
    calls with different ``skip`` have the first and the last sample in common and no other. Both are needed: what
    runs along the batch (a sum so far, a recurrence that takes the batch for time) reaches only later samples.
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
        # In their order, the last one repeated: lengths that were sorted stay sorted.
        rows = [_changed(x.select(dim, i), times) for i, times in turns]
        if skip and x.is_floating_point():  # neighbours that outweigh both: a maximum over the batch shows as well
            rows[1:-1] = [3 * row for row in rows[1:-1]]
        out = torch.stack(rows, dim)
        return out.detach().requires_grad_(x.requires_grad) if x.is_floating_point() else out

    return tree_map(pick, value, is_leaf=lambda x: isinstance(x, PackedSequence))


def _changed(sample: Tensor, times: int) -> Tensor:
    if times and sample.dim():
        sample = sample.roll(times, -1)
    return sample * (1 + 0.25 * times) if times and sample.is_floating_point() else sample


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
    """
    tape = capture.tape
    tape.layouts = {}
    first, second = sizes_for(tensors_in(args, kwargs))
    left: list[str] = []
    for attempt in range(4):
        logs: list[Log] = []
        outputs = []
        with undisturbed(capture.root) as random_numbers:
            for n, skip in ((first, 0), (second, first)):
                log = Log()
                log.dry = attempt == 0
                a, k = resized((args, kwargs), size, n, tape.batch_first, skip, capture.has_bags)
                with saved_bytes(capture.root) as saved, attributes_restored(capture.root) as left:
                    outputs.append(capture.run_pass(forward, a, k, n, log))
                logs.append(log)
                tape.planner.activation_bytes = sum(saved.values()) / n
            # A model that draws random numbers draws others at another size: then equal sizes are compared, below.
            draws = random_numbers.drawn()
        tape.layouts = learned(logs[0], logs[1], first, second, strict and not draws)
        if not (logs[0].skipped or logs[1].skipped) and all(_as_taken(log, tape.layouts) for log in logs):
            break
    if strict:
        if not draws:
            for x, y in zip(tensors_in(outputs[0]), tensors_in(outputs[1]), strict=False):
                _check_influence(x, y, first, second, compare(x, y, first, second), "the model's output")
        # Samples left out, the one that is changed; then those that are the same as before.
        others: list[tuple[int, int | None, tuple[int, ...]]] = [(0, 0, (-1,)), (0, -1, (0,))]
        n, base = first, (logs[0], tensors_in(outputs[0]))
        if draws:
            others.append((second, None, (0, -1)))
            n, base = second, _tried(capture, forward, args, kwargs, (size, second))  # at least 3: some are between
        pairs = zip(tensors_in(outputs[0]), tensors_in(outputs[1]), strict=False)
        layouts = [compare(x, y, first, second) for x, y in pairs]
        del outputs[1], pairs
        for skip, other, ends in others:
            new = _tried(capture, forward, args, kwargs, (size, n), skip, other)
            _check_same_size(tape.layouts, layouts, n, base, new, ends)
        if left:
            _check_forgets(capture, forward, resized((args, kwargs), size, first, tape.batch_first), first, left)
        if named_scalars(outputs[0]):
            _check_scalars(capture, forward, args, kwargs, size)


Tried = tuple[Log, list[Tensor]]


def _tried(
    capture: Capture,
    forward: CapturedForward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: tuple[int, int],
    skip: int = 0,
    other: int | None = None,
) -> Tried:
    """A forward on other samples, always with the same random numbers: what it met and what it gave."""
    log = Log()
    log.dry = True
    a, k = resized((args, kwargs), *sizes, capture.tape.batch_first, skip, capture.has_bags, other)
    with undisturbed(capture.root), attributes_restored(capture.root):
        return log, tensors_in(capture.run_pass(forward, a, k, sizes[1], log))


def _check_same_size(
    layouts: dict[tuple[str, int], Layout | None],
    of_outputs: list[Layout | None],
    size: int,
    base: Tried,
    new: Tried,
    ends: tuple[int, ...],
) -> None:
    """Refuses a model in which other samples move those at ``ends``: as many of them, and the same random numbers."""
    for key, seen in base[0].items():
        if key in new[0] and not seen.picked and not new[0][key].picked:
            _check_influence(seen.x, new[0][key].x, size, size, layouts.get(key), key[0], ends)
    for x, y, layout in zip(base[1], new[1], of_outputs, strict=False):
        _check_influence(x, y, size, size, layout, "the model's output", ends)


def _check_forgets(capture: Capture, forward: CapturedForward, inputs: Any, size: int, left: list[str]) -> None:
    """Refuses a model whose output depends on what an earlier forward left on it: batches influence each other."""
    log = Log()
    log.dry = True
    with undisturbed(capture.root) as random_numbers, attributes_restored(capture.root):
        one = tensors_in(capture.run_pass(forward, inputs[0], inputs[1], size, log))
        random_numbers.again()
        two = tensors_in(capture.run_pass(forward, inputs[0], inputs[1], size, log))
    if not all(_same(x.detach(), y.detach()) for x, y in zip(one, two, strict=True)):
        raise SamplesInfluenceEachOther(
            f"The model's output depends on what the forward before left on it ({', '.join(sorted(left)[:3])}): the "
            "records of one batch would influence the gradients of the next, and no clipping bounds that. Switch the "
            "state off (use_cache=False, for a cache), or set it back at the beginning of forward."
        )


def _check_scalars(
    capture: Capture, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> None:
    """Refuses outputs such as a loss that are not the mean (or the sum) of what the samples alone give."""
    pair = resized(args, size, 2, capture.tape.batch_first), resized(kwargs, size, 2, capture.tape.batch_first)
    pair = pair[0], uneven_labels(pair[1])

    def run(values: tuple[tuple[Any, ...], dict[str, Any]], n: int) -> Any:
        log = Log()
        log.dry = True
        with undisturbed(capture.root), attributes_restored(capture.root):
            return capture.run_pass(forward, *values, n, log)

    def pick(start: int, n: int) -> Any:
        def of(x: Any) -> Any:
            if not isinstance(x, Tensor) or 2 not in x.shape[:2] or n == 2:
                return x
            dim = 0 if x.shape[0] == 2 and (capture.tape.batch_first or x.dim() == 1) else list(x.shape).index(2)
            return x.narrow(dim, start, n)

        return tree_map(of, pair)

    compare_alone(run, pick, capture.tape.loss_reduction)


def learned(one: Log, other: Log, first: int, second: int, strict: bool) -> dict[tuple[str, int], Layout | None]:
    """The layouts that two forwards show."""
    layouts: dict[tuple[str, int], Layout | None] = {}
    for key in {**one, **other}:
        if key not in one or key not in other:
            if not (one.skipped or other.skipped):  # else what is missing was cut short
                layouts[key] = _alone(one[key], first) if key in one else _alone(other[key], second)
            continue
        a, b = one[key], other[key]
        if a.picked or b.picked:
            layouts[key] = UNKNOWN
            continue
        layouts[key] = compare(a.x, b.x, first, second, a.owner)
        if strict:
            _check_influence(a.x, b.x, first, second, layouts[key], key[0])
    return layouts


def _alone(seen: Seen, n: int) -> Layout | None:
    """The layout of a tensor that only one batch had: a mask, say, which the other did not need."""
    x = seen.x
    if seen.depends:
        own = not seen.picked and seen.owner is not None and seen.owner.tolist() == [*range(n)]
        return Layout(0) if own else UNKNOWN
    mask = x.dim() > 1 and (x.is_floating_point() or x.dtype == torch.bool)
    return Layout(tuple(x.shape).index(n)) if mask and tuple(x.shape).count(n) == 1 else UNKNOWN


def _as_taken(log: Log, layouts: dict[tuple[str, int], Layout | None]) -> bool:
    return all(
        seen.told or (isinstance(seen.taken, Rows) if layouts[key] is UNKNOWN else seen.taken == layouts[key])
        for key, seen in log.items()
    )


def compare(x: Tensor, y: Tensor, first: int, second: int, owner: Tensor | None = None) -> Layout | None:
    """The layout shown by one tensor at two batch sizes; None for no batch, `UNKNOWN` if nothing fits.

    ``owner`` is the sample of each row of ``x``, if the graph told.
    """
    if x.dim() != y.dim():
        return UNKNOWN
    moved = [i for i in range(x.dim()) if x.shape[i] != y.shape[i]]
    if not moved:
        return None
    dim = moved[0]
    exact = [i for i in moved if (x.shape[i], y.shape[i]) == (first, second)]
    if len(exact) == 1:  # others may move with the samples' lengths
        return Layout(exact[0])
    if len(moved) > 1 or x.shape[dim] % first or x.shape[dim] // first * second != y.shape[dim]:
        return UNKNOWN
    positions = x.shape[dim] // first
    outers = [n for n in range(2, positions) if positions % n == 0]
    for layout in (Layout(dim, "major"), Layout(dim, "minor"), *(Layout(dim, "middle", n) for n in outers)):
        if owner is not None and dim == 0:
            if torch.equal(owners_in_layout(layout, x.shape[:1], first), owner):
                return layout
        elif x.is_meta or _same(layout.to_front(x, first)[0], layout.to_front(y, second)[0]):
            return layout
    return UNKNOWN


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    if not x.numel():
        return True
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    scale = max(_largest(x), _largest(y))
    if scale != scale or scale == float("inf"):
        return True  # masks with infinities: nothing to learn
    return _largest(x - y) <= 1e-3 * scale + 1e-12


def _largest(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach(), float("inf")).item()  # without a copy: logits of a vocabulary are large


def _check_influence(
    x: Tensor,
    y: Tensor,
    first: int,
    second: int,
    layout: Layout | None,
    site: str,
    ends: tuple[int, ...] = (0, -1),
) -> None:
    """Compares the samples at ``ends``, which are the same in both."""
    if layout is None or layout is UNKNOWN or x.is_meta:
        return
    x, y = layout.to_front(x, first), layout.to_front(y, second)
    if not x.is_floating_point():
        ends = tuple(i for i in ends if i == 0)  # the last of some ids may be one of several of a bag
    if x.shape[1:] == y.shape[1:] and not all(_same(x[i], y[i]) for i in ends):
        raise SamplesInfluenceEachOther(
            f"Samples influence each other before {site.replace(':', ' is used by ')}: the values for one sample "
            "changed when only other samples of the batch did. Batch statistics, a loss or a router over the whole "
            "batch do that; no clipping bounds what one record can then reveal. Replace that part by one that treats "
            "every sample alone (GroupNorm for BatchNorm, a router without a batch-wide balancing), or freeze "
            "everything in front of it."
        )
