"""User-level clipping: a user with many records contributes once, bounded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gsm.clipping import Clipped, Clipping, FlatClipping
from gsm.ledger import PerSampleGradients


class UserClipping(Clipping):
    """Clips the sum (or mean) of all gradients of a user instead of every record's own.

    The same mechanism serves several augmentations of one record: give all views of a record the same id and take
    ``reduction="mean"`` (De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through
    Scale", section 3.3).

    Formal guarantee: adding or removing *all records of one user* changes the sum by at most ``sensitivity``, if all
    of them lie in one physical batch; an id that turns up in a second physical batch of the same logical batch is an
    error. The accountant's sample rate must then be the probability that a *user* is drawn. Source of user-level
    clipping: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models".

    The norm of a user's gradient is exact in every mode (materialised or ghost): it is the norm of one weighted sum
    per user. That costs about one extra weighted sum of the batch for every user with more than one record; users
    with a single record cost nothing.

    Args:
        inner: how a user's gradient is clipped: flat, automatic or per layer.
        reduction: "sum" or "mean" of the user's records.

    Example:
        >>> optimizer = DPOptimizer(..., clipping=UserClipping())
        >>> optimizer.clipping.set_users(batch["user_id"])  # before every step: one id per sample
    """

    def __init__(self, inner: Clipping | None = None, *, reduction: str = "sum"):
        self.inner = inner if inner is not None else FlatClipping()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', got {reduction!r}.")
        if not isinstance(self.inner, Clipping):
            raise TypeError(f"inner is a gsm.clipping.Clipping, such as FlatClipping(1.0), got {inner!r}.")
        if self.inner.statistic_sensitivity or isinstance(self.inner, UserClipping):
            raise ValueError(
                f"{type(self.inner).__name__} cannot be used for users: it needs the expected number of them, and only "
                "the expected number of records is known. Use flat, automatic or per-layer clipping."
            )
        self.reduction = reduction
        self._users: list[Any] | None = None

    def set_users(self, ids: Tensor | Sequence[Any]) -> None:
        """Says whose record each sample of the next physical batch is: one hashable id per sample.

        Raises:
            TypeError: no sequence.
            ValueError: an id that cannot be compared with others (a list, NaN for a missing one).
        """
        if not hasattr(ids, "__iter__") or (isinstance(ids, Tensor) and not ids.dim()):
            raise TypeError(f"set_users() takes one id per sample, a tensor or a list, got {ids!r}.")
        self._users = [_comparable(id) for id in (ids.tolist() if isinstance(ids, Tensor) else ids)]

    def clip(self, batch: PerSampleGradients) -> Clipped:
        users, self._users = self._users, None  # never used for a second batch
        if users is None:
            raise ValueError(
                "UserClipping does not know whose records these are: call optimizer.clipping.set_users(ids) with one "
                "id per sample before every step() and virtual_step()."
            )
        if len(users) != batch.batch_size:
            raise ValueError(f"set_users() got {len(users)} ids, but the batch has {batch.batch_size} samples.")
        members: dict[Any, list[int]] = {}
        for i, user in enumerate(users):
            members.setdefault(user, []).append(i)
        place = {user: k for k, user in enumerate(members)}
        weights = self.inner.weights(self._user_norms(batch, list(members.values())))
        each = weights[..., [place[user] for user in users]] if users else weights
        if self.reduction == "mean":
            each = each / torch.tensor([len(members[user]) for user in users], device=each.device)
        return Clipped(each, self.inner.sensitivity, groups=frozenset(members))

    def _user_norms(self, batch: PerSampleGradients, members: list[list[int]]) -> Tensor:
        """Squared norms ``[parameters, users]`` of every user's sum or mean."""
        own = batch.squared_norms()
        out = own[:, [rows[0] for rows in members]] if members else own
        for k, rows in enumerate(members):
            if len(rows) > 1:
                picked = torch.zeros(batch.batch_size, dtype=own.dtype, device=own.device)
                picked[rows] = 1.0 / len(rows) if self.reduction == "mean" else 1.0
                sums = batch.weighted_sum(picked)
                out[:, k] = torch.stack([s.to(own.device, own.dtype).square().sum() for s in sums])
        return out

    @property
    def max_grad_norm(self) -> float:
        return self.inner.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.inner.max_grad_norm = value

    @property
    def sensitivity(self) -> float:
        return self.inner.sensitivity

    def validate(self, noise_multiplier: float, expected_batch_size: float | None, parameters: int) -> None:
        self.inner.validate(noise_multiplier, expected_batch_size, parameters)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def __repr__(self) -> str:
        return f"UserClipping({self.inner!r}, reduction={self.reduction!r})"


def _comparable(user: Any) -> Any:
    """An id that equals itself, wherever it comes from: a tensor, like NaN, would be a user of its own each time."""
    value = user.item() if isinstance(user, Tensor) and user.numel() == 1 else user
    if not isinstance(value, Hashable) or isinstance(value, Tensor) or value != value:
        raise ValueError(
            f"set_users() got the id {user!r}, which cannot be compared with other ids, so the records of one user "
            "would be clipped as those of several: give one number or string per sample, also where it is missing."
        )
    return value
