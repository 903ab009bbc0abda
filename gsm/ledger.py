"""What the backward pass left behind, and what the optimizer reads.

One :class:`Group` is one physical batch: for every parameter the contributions that reached it. A contribution can
answer three questions - its per-sample norms, its weighted sum, and, at a price, its per-sample gradients - and a
group combines them when a parameter was used several times. Clipping sees only :class:`PerSampleGradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from gsm.tape import Tape

# Which tape captures a parameter: how an optimizer finds its gradients without being introduced to a wrapper.
# The tape is held weakly, as it holds the parameter: its wrapper, or the wrapped modules, keep it.
_TAPES: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Parameters that a `gsm.DPOptimizer` holds: it scales the noise by how often a record may have been clipped. Opacus's
# does not.
_SCALED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class PerSampleGradients(Protocol):
    """The per-sample gradients of one physical batch, without saying how they are kept."""

    batch_size: int
    params: list[nn.Parameter]

    def squared_norms(self) -> Tensor:
        """Squared l2 norm of every sample's gradient, ``[len(params), batch]``, float32 or better."""

    def weighted_sum(self, weights: Tensor, *, last: bool = False) -> list[Tensor]:
        """``sum_i weights[i] * grad_i`` per parameter; ``weights`` is ``[batch]`` or ``[len(params), batch]``.

        A weight of 0 silences a sample even if its gradient is not finite (and 0 * inf would be NaN). ``last``: nothing
        is asked afterwards, so that what was captured for a parameter can go as soon as its sum is there.
        """


class Materialised:
    """Per-sample gradients that exist as tensors ``[batch, *p.shape]``; None stands for zero."""

    def __init__(self, params: Sequence[nn.Parameter], grads: Sequence[Tensor | None], batch_size: int):
        self.params, self.grads, self.batch_size = list(params), list(grads), batch_size

    def squared_norms(self) -> Tensor:
        rows = [norm(g) if g is not None else None for g in self.grads]
        return stack_rows(rows, self.params, self.batch_size).square_()

    def weighted_sum(self, weights: Tensor, *, last: bool = False) -> list[Tensor]:
        silenced = bool((weights == 0).any())
        out = []
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            own = row(weights, i)
            if g is not None and silenced:
                rows = torch.nonzero(own).flatten()
                g, own = g[rows.to(g.device)], own[rows]
            out.append(zeros_for(p) if g is None else weighted(g, own))
        return out


class Joint:
    """One physical batch whose gradients lie in several places (two wrapped models under one optimizer)."""

    def __init__(self, params: Sequence[nn.Parameter], parts: Sequence[PerSampleGradients]):
        sizes = {part.batch_size for part in parts}
        if len(sizes) != 1:
            raise ValueError(
                f"The optimizer's parameters saw batches of different sizes ({sorted(sizes)}): one record must be one "
                "row everywhere. Use one optimizer per model, or give every model the same samples."
            )
        self.params, self.parts, self.batch_size = list(params), list(parts), sizes.pop()
        place = {id(p): i for i, p in enumerate(self.params)}
        self._places = [[place[id(p)] for p in part.params] for part in parts]

    def squared_norms(self) -> Tensor:
        pieces = [part.squared_norms() for part in self.parts]
        out = pieces[0].new_zeros(len(self.params), self.batch_size)
        for places, piece in zip(self._places, pieces, strict=True):
            out[places] = piece
        return out

    def weighted_sum(self, weights: Tensor, *, last: bool = False) -> list[Tensor]:
        out: list[Tensor | None] = [None] * len(self.params)
        for places, part in zip(self._places, self.parts, strict=True):
            own = weights[places] if weights.dim() == 2 else weights
            for i, total in zip(places, part.weighted_sum(own, last=last), strict=True):
                out[i] = total
        return [t if t is not None else zeros_for(p) for t, p in zip(out, self.params, strict=True)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, weights and sums are computed in float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm(grad: Tensor) -> Tensor:
    """``[batch]`` norms of ``[batch, ...]``, accumulated in float32 or better."""
    if grad.dim() == 1:
        return grad.to(accumulation_dtype(grad.dtype)).abs()
    if not grad.shape[0]:
        return grad.new_zeros(0, dtype=accumulation_dtype(grad.dtype))
    return torch.linalg.vector_norm(in_memory_order(grad).flatten(1), dim=1, dtype=accumulation_dtype(grad.dtype))


def weighted(grad: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights[i] * grad[i]`` in float32 or better (a non-finite row has to be left out, not weighted by 0)."""
    dtype = accumulation_dtype(grad.dtype)
    if grad.shape[0] == 0:
        return grad.new_zeros(grad.shape[1:], dtype=dtype)
    ordered = in_memory_order(grad)
    out = torch.mv(ordered.reshape(grad.shape[0], -1).to(dtype).t(), weights.to(dtype)).view(ordered.shape[1:])
    return out if ordered is grad else out.permute(_back(grad)).contiguous()


def in_memory_order(grad: Tensor) -> Tensor:
    """``[batch, ...]`` with the other dimensions as they lie in memory, so that flattening copies nothing."""
    return grad if grad.is_contiguous() else grad.permute(0, *_order(grad))


def _order(grad: Tensor) -> list[int]:
    return sorted(range(1, grad.dim()), key=grad.stride, reverse=True)


def _back(grad: Tensor) -> list[int]:
    """The permutation that undoes :func:`in_memory_order` for a sum over the batch."""
    order = _order(grad)
    return [order.index(d) for d in range(1, grad.dim())]


def row(weights: Tensor, i: int) -> Tensor:
    return weights[i] if weights.dim() == 2 else weights


def zeros_for(p: Tensor) -> Tensor:
    return torch.zeros(p.shape, dtype=accumulation_dtype(p.dtype), device=p.device)


def stack_rows(rows: Sequence[Tensor | None], params: Sequence[Tensor], batch_size: int) -> Tensor:
    """Rows ``[batch]`` (None: zero) to one ``[len(params), batch]`` in the widest of their types."""
    like = next((r for r in rows if r is not None), None)
    if like is None:
        return torch.zeros(len(rows), batch_size, device=params[0].device)
    if not all(r is not None and r.dtype == like.dtype and r.device == like.device for r in rows):
        wide = any(r is not None and r.dtype == torch.float64 for r in rows)
        like = torch.zeros(batch_size, dtype=torch.float64 if wide else torch.float32, device=like.device)
        rows = [like if r is None else r.to(like) for r in rows]
    return torch.stack(rows)  # type: ignore[arg-type]


def noise_is_scaled(params: Sequence[nn.Parameter]) -> bool:
    """Whether optimizers of this library hold all of ``params``."""
    return all(p in _SCALED for p in params)


def scales_noise(params: Sequence[nn.Parameter]) -> None:
    """An optimizer of this library holds ``params`` from now on."""
    for p in params:
        _SCALED[p] = True


def register_tape(param: nn.Parameter, tape: Tape) -> None:
    _TAPES[param] = ref(tape)


def forget_tape(param: nn.Parameter, tape: Tape) -> None:
    if tape_of(param) is tape:
        del _TAPES[param]


def tape_of(param: nn.Parameter) -> Tape | None:
    """The tape that captures this parameter's gradients, or None."""
    held = _TAPES.get(param)
    return None if held is None else held()


def _by_tape(params: Sequence[nn.Parameter]) -> list[tuple[Tape, list[nn.Parameter]]]:
    """The tapes of these parameters, each with its own."""
    first = tape_of(params[0]) if params else None
    if first is not None and first.holds(params):  # nearly always: one model, one optimizer
        return [(first, list(params))]
    found: dict[int, tuple[Tape, list[nn.Parameter]]] = {}
    for p in params:
        tape = tape_of(p)
        if tape is not None:
            found.setdefault(id(tape), (tape, []))[1].append(p)
    return list(found.values())


def collect(params: Sequence[nn.Parameter]) -> list[PerSampleGradients]:
    """Everything captured for ``params`` since the last :func:`discard`, one entry per physical batch.

    Args:
        params: the parameters of one optimizer.
    Returns:
        One :class:`PerSampleGradients` per physical batch in order of their backward passes; empty if there is none.
    Raises:
        ValueError: if the parameters saw different numbers of batches or batches of different sizes.
    """
    params = list(params)
    sources: list[list[PerSampleGradients]] = []
    held = [p for p in params if getattr(p, "grad_sample", None) is not None]
    if held:
        sources.append(_from_attributes(held))
    for tape, own in _by_tape(params):
        own = [p for p in own if getattr(p, "grad_sample", None) is None] if held else own
        groups = [g for g in tape.groups if g.delivered and g.holds_any(own)]
        if groups:
            sources.append([g.view(own) for g in groups])
    if not sources:
        return []
    if len({len(s) for s in sources}) != 1:
        raise ValueError(
            "Some of the optimizer's parameters saw a different number of backward passes than others "
            f"({sorted(map(len, sources))}): call zero_grad() between steps, and one backward per model and batch."
        )
    return [parts[0] if _covers(parts[0], params) else Joint(params, parts) for parts in zip(*sources, strict=True)]


def _covers(part: PerSampleGradients, params: list[nn.Parameter]) -> bool:
    return len(part.params) == len(params) and all(a is b for a, b in zip(part.params, params, strict=True))


def _from_attributes(params: list[nn.Parameter]) -> list[PerSampleGradients]:
    held = [getattr(p, "grad_sample", None) for p in params]
    lists = [h if isinstance(h, list) else [h] for h in held]
    if len({len(x) for x in lists}) != 1:
        raise ValueError("Parameters hold different numbers of grad_sample entries: call zero_grad() between steps.")
    out: list[PerSampleGradients] = []
    for entries in zip(*lists, strict=True):
        sizes = {e.shape[0] for e in entries}
        if len(sizes) != 1:
            raise ValueError(
                f"Parameters hold per-sample gradients of different batch sizes ({sorted(sizes)}): one record must be "
                "one row everywhere."
            )
        out.append(Materialised(params, entries, sizes.pop()))
    return out


def discard(params: Sequence[nn.Parameter]) -> None:
    """Forgets everything captured for ``params``: their gradients were used, or zero_grad() was called."""
    for p in params:
        if getattr(p, "grad_sample", None) is not None:
            p.grad_sample = None  # type: ignore[attr-defined]
    for tape, own in _by_tape(params):
        tape.discard(own)
