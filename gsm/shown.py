"""What two forwards show: where the batch lies, and whether samples influence each other."""

from __future__ import annotations

import torch
from torch import Tensor

from gsm.layout import UNKNOWN, Layout, SamplesInfluenceEachOther
from gsm.locate import Log, Seen
from gsm.ownership import owners_in_layout

BOTH_ENDS = (0, -1)


Layouts = dict[tuple[str, int], Layout | None]


def learned(one: Log, other: Log, first: int, second: int) -> Layouts:
    """The layouts that two forwards show."""
    layouts: Layouts = {}
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
    return layouts


def check_uses(one: Log, other: Log, layouts: Layouts, first: int, second: int, ends: tuple[int, ...]) -> None:
    """Refuses two forwards in which samples influence those at ``ends``."""
    for key, a in one.items():
        if key in other and not (a.picked or other[key].picked):
            check_influence(a.x, other[key].x, first, second, layouts[key], key[0], ends)


Outputs = dict[str, Tensor]


def learned_outputs(
    one: Outputs, other: Outputs, first: int, second: int, ends: tuple[int, ...]
) -> dict[str, Layout | None]:
    """The layouts of what two forwards gave; the samples at ``ends`` are checked for influence."""
    layouts: dict[str, Layout | None] = {}
    for name in [name for name in one if name in other]:
        x, y = one[name], other[name]
        layouts[name] = compare(x, y, first, second)
        check_influence(x, y, first, second, layouts[name], name, ends)
        if ends and layouts[name] is None and x.requires_grad and x.numel() != 1 and not same(x.detach(), y.detach()):
            raise SamplesInfluenceEachOther(
                f"{name}: has no batch dimension, but depends on the samples (its shape is {tuple(x.shape)}). What a "
                "loss makes of it, all samples of the batch determine together, and no clipping bounds what one record "
                "can then reveal. Give one entry per sample, or detach() what is only looked at."
            )
    return layouts


def _alone(seen: Seen, n: int) -> Layout | None:
    """The layout of a tensor that only one batch had: a mask, say, which the other did not need."""
    x = seen.x
    if seen.depends:
        own = not seen.picked and seen.owner is not None and seen.owner.tolist() == [*range(n)]
        return Layout(0) if own else UNKNOWN
    mask = x.dim() > 1 and (x.is_floating_point() or x.dtype == torch.bool)
    return Layout(tuple(x.shape).index(n)) if mask and tuple(x.shape).count(n) == 1 else UNKNOWN


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
        elif x.is_meta or same(layout.to_front(x, first)[0], layout.to_front(y, second)[0]):
            return layout
    return UNKNOWN


def same(x: Tensor, y: Tensor) -> bool:
    """Equal but for rounding; whatever is not finite tells nothing."""
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


def check_influence(
    x: Tensor,
    y: Tensor,
    first: int,
    second: int,
    layout: Layout | None,
    site: str,
    ends: tuple[int, ...],
) -> None:
    """Compares the samples at ``ends``, which are the same in both."""
    if layout is None or layout is UNKNOWN or x.is_meta or not ends:
        return
    x, y = layout.to_front(x, first), layout.to_front(y, second)
    if not x.is_floating_point():
        ends = tuple(i for i in ends if i == 0)  # the last of some ids may be one of several of a bag
    if x.shape[1:] == y.shape[1:] and not all(same(x[i], y[i]) for i in ends):
        raise SamplesInfluenceEachOther(
            f"Samples influence each other before {site.replace(':', ' is used by ')}: the values for one sample "
            "changed when only other samples of the batch did. Batch statistics, a loss or a router over the whole "
            "batch do that; no clipping bounds what one record can then reveal. Replace that part by one that treats "
            "every sample alone (GroupNorm for BatchNorm, a router without a batch-wide balancing), or freeze "
            "everything in front of it."
        )
