"""The criterion of Opacus's ghost-clipping loop: per-sample losses, reduced, and an ordinary ``backward()``.

Opacus's version runs two backward passes inside ``loss.backward()``. Here the wrapper needs one, so the loss is an
ordinary tensor: ``item()``, arithmetic, ``torch.autograd`` and mixed-precision scalers work on it as on any other.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor


class GhostCriterion(DPLossFastGradientClipping):
    """Reduces a criterion per sample first and over the batch second.

    With padding (``ignore_index``) the two are not the same: a mean over all tokens of a batch divides each sample's
    loss by a count that the other samples determine, and then a sample's gradient depends on its neighbours.

    Args:
        criterion: a loss with a ``reduction`` attribute (``torch.nn`` losses), or a function that returns one loss per
            sample.
        loss_reduction: "mean" or "sum" over the batch; the criterion's own reduction must be the same.

    Raises:
        ValueError: a criterion whose reduction is another one.

    Example:
        >>> criterion = GhostCriterion(nn.CrossEntropyLoss(), "mean")
        >>> criterion(model(x), y).backward()
    """

    def __init__(self, criterion: Any, loss_reduction: str = "mean") -> None:
        own = getattr(criterion, "reduction", loss_reduction)
        if own != loss_reduction:
            raise ValueError(
                f"the criterion reduces by {own!r} and loss_reduction is {loss_reduction!r}: make them the same "
                "('mean' or 'sum')"
            )
        self.criterion, self.loss_reduction = criterion, loss_reduction

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> Tensor:
        """The reduced loss, a scalar tensor.

        Args:
            args, kwargs: for the criterion.
            shape: ``(batch, length, ...)`` where the criterion was given ``batch * length`` flattened positions.
        """
        losses = self._unreduced(*args, **kwargs)
        if losses.dim() == 0:
            raise ValueError("the criterion returned a scalar: it must return one loss per sample (reduction='none')")
        if shape is not None and losses.shape[0] == shape[0] * shape[1]:
            losses = losses.reshape(shape[0], shape[1], *losses.shape[1:])
        if losses.dim() > 1:
            losses = self._per_sample(losses, args, kwargs)
        return losses.mean() if self.loss_reduction == "mean" else losses.sum()

    def _unreduced(self, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self.criterion, "reduction"):
            return self.criterion(*args, **kwargs)
        kept, self.criterion.reduction = self.criterion.reduction, "none"
        try:
            return self.criterion(*args, **kwargs)
        finally:
            self.criterion.reduction = kept

    def _per_sample(self, losses: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """``[batch, ...]`` losses to ``[batch]``; a mean leaves out the positions that the criterion ignores."""
        flat = losses.flatten(1)
        if self.loss_reduction == "sum":
            return flat.sum(1)
        ignored = getattr(self.criterion, "ignore_index", None)
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        if ignored is None or not isinstance(target, torch.Tensor) or target.numel() != flat.numel():
            return flat.mean(1)
        counted = (target.reshape(flat.shape) != ignored).sum(1).clamp(min=1)
        return flat.sum(1) / counted
