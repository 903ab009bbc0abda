"""A group: everything the backward passes of one set of records delivered, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grad_samplers.stacked import LinearStack, stackable
from gsm.contributions import Contribution, Dense, Paired, Record
from gsm.ledger import norm, stack_rows, zeros_for
from gsm.sharing import shared_squared_norms


class Group:
    """One physical batch. ``scale`` turns captured gradients into those of each sample's own loss."""

    def __init__(self, batch_size: int, scale: float):
        self.batch_size, self.scale = batch_size, scale
        self.delivered = False
        self.drawn = 0  # when it was opened, in batches drawn (`gsm.drawn`)
        self.contributions: dict[int, list[Contribution]] = {}
        self._attributes: dict[int, Tensor] = {}

    # -- ghost: contributions ----------------------------------------------------------------------------------------

    def add(self, param: nn.Parameter, contribution: Contribution) -> None:
        held = self.contributions.setdefault(id(param), [])
        if isinstance(contribution, Dense) and held and isinstance(held[-1], Dense):
            held[-1] = Dense(held[-1].grad + contribution.grad)
        else:
            held.append(contribution)

    def holds_any(self, params: Sequence[nn.Parameter]) -> bool:
        return any(id(p) in self.contributions for p in params)

    def drop(self, params: Sequence[nn.Parameter]) -> None:
        for p in params:
            self.contributions.pop(id(p), None)

    def view(self, params: Sequence[nn.Parameter]) -> GroupView:
        return GroupView(self, params)

    # -- hooks: p.grad_sample ----------------------------------------------------------------------------------------

    def add_to_attribute(self, param: nn.Parameter, grad: Tensor) -> None:
        """Adds to this group's entry of ``p.grad_sample``; earlier groups' entries make it a list, as in Opacus."""
        grad = grad * self.scale
        mine, held = self._attributes.get(id(param)), getattr(param, "grad_sample", None)
        if mine is not None and (held is mine or (isinstance(held, list) and held and held[-1] is mine)):
            mine.add_(grad)  # type: ignore[union-attr]
            return
        self._attributes[id(param)] = grad
        if held is None:
            param.grad_sample = grad  # type: ignore[attr-defined]
        else:
            held = held if isinstance(held, list) else [held]
            param.grad_sample = [*held, grad]  # type: ignore[attr-defined]

    def fill_attribute(self, param: nn.Parameter) -> None:
        """A parameter this batch did not reach has the gradient zero, not none."""
        if id(param) not in self._attributes:
            zero = torch.zeros(self.batch_size, *param.shape, dtype=param.dtype, device=param.device)
            self.add_to_attribute(param, zero)


class GroupView:
    """A group seen through one optimizer's parameters (:class:`gsm.ledger.PerSampleGradients`)."""

    def __init__(self, group: Group, params: Sequence[nn.Parameter]):
        self.params, self.batch_size, self._scale = list(params), group.batch_size, group.scale
        self._held: list[Sequence[Contribution]] = [group.contributions.get(id(p), ()) for p in self.params]
        self._stacks: list[tuple[list[Record], LinearStack]] | None = None

    def squared_norms(self) -> Tensor:
        for records, stack in self._stacked():
            weight, bias = stack.norms()
            for record, w, b in zip(records, weight.unbind(0), bias.unbind(0), strict=True):
                record.known_norms({record.layer.weight: w, record.layer.bias: b})
        rows: list[Tensor | None] = []
        for held in self._held:
            if not held:
                rows.append(None)
            elif len(held) == 1:
                rows.append(held[0].norms())
            else:
                shared = shared_squared_norms(held)
                rows.append(shared.sqrt() if shared is not None else norm(_total(held)))
        return stack_rows(rows, self.params, self.batch_size).mul_(self._scale).square_()

    def weighted_sum(self, weights: Tensor, *, last: bool = False) -> list[Tensor]:
        weights = weights * self._scale
        # A silenced sample (weight 0) may hold infinities, and 0 * inf is NaN: its rows are left out of the sum.
        silenced = bool((weights == 0).any())
        answers = {} if weights.dim() == 2 else self._answered(weights, silenced)
        if last:
            self._stacks = []
        out = []
        for i, p in enumerate(self.params):
            own, rows = _rows(weights[i] if weights.dim() == 2 else weights, silenced)
            total: Tensor | None = None
            for c in self._held[i]:
                piece = _weighted(c, own, rows, None if weights.dim() == 2 else answers)
                total = piece if total is None else total + piece
            out.append(zeros_for(p) if total is None else total)
            if last:
                self._held[i] = ()
        return out

    def _answered(self, weights: Tensor, silenced: bool) -> dict[int, dict]:
        """Weighted sums by record, of those that are read together."""
        own, rows = _rows(weights, silenced)
        answers: dict[int, dict] = {}
        for records, stack in self._stacked():
            for record, w, b in zip(records, *(t.unbind(0) for t in stack.weighted(own, rows)), strict=True):
                answers[id(record)] = {record.layer.weight: w, record.layer.bias: b}
        return answers

    def _stacked(self) -> list[tuple[list[Record], LinearStack]]:
        """The records of small linear layers of one shape."""
        if self._stacks is None:
            found: dict[Any, dict[int, Record]] = {}
            for held in self._held:
                for c in held:
                    r = c.record if isinstance(c, Paired) else None
                    if r is not None and r.sampler.cls is nn.Linear and stackable(r.activations[0], r.backprops):
                        key = r.activations[0].shape, r.backprops.shape, r.backprops.dtype, r.backprops.device
                        found.setdefault(key, {})[id(r)] = r
            several = [list(records.values()) for records in found.values() if len(records) > 1]
            self._stacks = [
                (records, LinearStack([r.activations[0] for r in records], [r.backprops for r in records]))
                for records in several
            ]
        return self._stacks


def _rows(weights: Tensor, silenced: bool) -> tuple[Tensor, Tensor | None]:
    """The weights that count, and whose they are (None: everybody's)."""
    if not silenced:
        return weights, None
    rows = torch.nonzero(weights).flatten()
    return weights[rows], rows


def _weighted(c: Contribution, weights: Tensor, rows: Tensor | None, answers: dict[int, dict] | None) -> Tensor:
    """One contribution's weighted sum; parameters of one layer (weight and bias) share the layer's answer."""
    if answers is None or not isinstance(c, Paired):
        return c.weighted(weights, rows)
    record: Record = c.record
    if id(record) not in answers:
        answers[id(record)] = dict(record.weighted(weights, rows))
    return answers[id(record)][c.parameter]


def _total(held: Sequence[Contribution]) -> Tensor:
    total = held[0].gradient()
    for c in held[1:]:
        total = total + c.gradient()
    return total
