"""Finding the batch in a tensor that meets a parameter: known from the probe or from the graph, not guessed.

A site is a parameter (or a layer) and the function that uses it. :mod:`gsm.probe` fills ``tape.layouts`` before the
first batch. Shapes are asked only while probing, where a mistake costs another try, and for batches of no samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gsm.layout import UNKNOWN, Layout, Rows, Unresolvable, Untold, guess
from gsm.ownership import owners_of
from gsm.reentrant import cut_off

if TYPE_CHECKING:
    from gsm.tape import Pass

_UNSEEN: Any = object()
UNLIKE = "it did not occur, or looked different, when the model was tried on a few samples"


class Seen(NamedTuple):
    """What the probe saw at a site: the tensor, what it was taken for, and why.

    ``picked``: its rows follow the data; ``owner``: the sample of each row, if the graph tells; ``told``: by a caller;
    ``depends``: it has a graph.
    """

    x: Tensor
    taken: Layout | Rows | None
    picked: bool = False
    owner: Tensor | None = None
    told: bool = False
    depends: bool = False


class Log(dict[Any, Seen]):
    """One forward of the probe. In the first, ``dry`` one, subtrees and uses that shapes mislead run as they are."""

    dry = False
    skipped = False  # whether there were any


def locate(active: Pass, site: str, x: Tensor, batch_dim: int | None = None) -> Layout | Rows | None:
    """The layout of ``x`` at this site, None if it does not depend on the samples.

    Raises:
        gsm.layout.Untold: if it depends on the samples, but nothing shows how.
    """
    visit = active.visits[site]
    active.visits[site] = visit + 1
    key, size = (site, visit), active.batch_size
    known = active.tape.layouts.get(key, _UNSEEN)
    if active.log is not None:
        return _probing(active, key, x, known, batch_dim)
    if known is not _UNSEEN and known is not UNKNOWN and _fits(known, x, size):
        return known
    if size == 0 or not active.tape.layouts or batch_dim is not None:
        return _guess(active, x, batch_dim)
    if x.requires_grad:
        owners = owners_of(x, size)
        if owners is not None:
            return Rows(owners.owner)
    if known is UNKNOWN:
        raise Untold(f"which sample each row of a tensor of shape {tuple(x.shape)} belongs to cannot be told")
    like = _elsewhere(active, site, x)
    if like is not _UNSEEN:
        return like
    why = cut_off() or UNLIKE
    raise Untold(f"where a tensor of shape {tuple(x.shape)} has its batch cannot be told: {why}")


def _elsewhere(active: Pass, site: str, x: Tensor) -> Any:
    """The layout at the other visits of a site, if they agree and it fits."""
    like = {layout for (name, _), layout in active.tape.layouts.items() if name == site}
    if len(like) == 1 and UNKNOWN not in like and _fits(layout := like.pop(), x, active.batch_size):
        return layout
    return _UNSEEN


def _probing(active: Pass, key: Any, x: Tensor, known: Any, batch_dim: int | None) -> Layout | Rows | None:
    assert active.log is not None
    if batch_dim is not None:
        told = known if known not in (_UNSEEN, UNKNOWN, None) and _fits(known, x, active.batch_size) else None
        told = _guess(active, x, batch_dim) if told is None else told
        active.log[key] = Seen(x.detach(), told, told=True)
        return told
    if known is _UNSEEN:
        known = _elsewhere(active, key[0], x)
    owners = owners_of(x, active.batch_size) if x.requires_grad else None
    taken: Layout | Rows | None
    if owners is not None and (owners.picked or known is UNKNOWN):
        taken = Rows(owners.owner)
    elif known is UNKNOWN:
        raise Untold(f"which sample each row of a tensor of shape {tuple(x.shape)} belongs to cannot be told")
    elif known is not _UNSEEN and _fits(known, x, active.batch_size):
        taken = known
    else:
        try:
            taken = _guess(active, x, batch_dim)
        except Unresolvable:
            if owners is None:
                active.log[key] = Seen(x.detach(), None, depends=True)
                raise
            taken = Rows(owners.owner)
    picked, owner = (False, None) if owners is None else (owners.picked, owners.owner)
    active.log[key] = Seen(x.detach(), taken, picked, owner, depends=x.requires_grad)
    return taken


def _guess(active: Pass, x: Tensor, batch_dim: int | None) -> Layout | None:
    first = active.tape.batch_first
    return guess(tuple(x.shape), active.batch_size, depends=x.requires_grad, batch_first=first, batch_dim=batch_dim)


def _fits(layout: Layout | None, x: Tensor, batch_size: int) -> bool:
    return not x.requires_grad if layout is None else layout.fits(x, batch_size)
