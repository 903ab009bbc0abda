"""Adaptive clipping: the bound follows a quantile of the gradient norms, privately."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gsm.clipping import FlatClipping, checked_bound


class AdaptiveClipping(FlatClipping):
    """Flat clipping whose bound follows the ``target_unclipped_quantile`` of the norms.

    After every release ``C <- C * exp(-eta * (b - quantile))``, where ``b`` is a noisy estimate of the fraction of
    samples that were not clipped. Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning
    with Adaptive Clipping", algorithm 1.

    Formal guarantee (their theorem 1): beside the clipped sum with noise multiplier ``z_g``, the release contains
    ``sum_i (b_i - 1/2) + N(0, s^2)`` with ``b_i`` in {0, 1} and ``s = unclipped_num_std``. One record changes the
    pair, each part divided by its standard deviation, by at most ``sqrt(z_g^-2 + (2 s)^-2)``. With ``z_g = (z^-2 - (2
    s)^-2)^(-1/2)`` that is ``1 / z``: both together are one Gaussian mechanism with multiplier ``z``, which is what
    is charged. The fraction is estimated with the *expected* batch size; the true one is private.

    Args:
        max_grad_norm: the bound to start from.
        target_unclipped_quantile: the fraction of samples that shall not be clipped, in [0, 1].
        clipbound_learning_rate: eta, positive.
        min_clipbound, max_clipbound: limits of the bound.
        unclipped_num_std: ``s``; must exceed half the noise multiplier. None: ``expected_batch_size / 20`` as in the
            paper, but
            at least the noise multiplier, so that the gradient's noise grows by at most 16 %.
    """

    statistic_sensitivity = 0.5

    def __init__(
        self,
        max_grad_norm: float = 1.0,
        *,
        target_unclipped_quantile: float = 0.5,
        clipbound_learning_rate: float = 0.2,
        min_clipbound: float = 1e-6,
        max_clipbound: float = 1e8,
        unclipped_num_std: float | None = None,
    ):
        super().__init__(max_grad_norm)
        if not 0 <= target_unclipped_quantile <= 1:
            raise ValueError(f"target_unclipped_quantile must lie in [0, 1], got {target_unclipped_quantile!r}.")
        if not (clipbound_learning_rate > 0 and math.isfinite(clipbound_learning_rate)):
            raise ValueError(f"clipbound_learning_rate must be positive, got {clipbound_learning_rate!r}.")
        if max_clipbound <= min_clipbound:
            raise ValueError("max_clipbound must be larger than min_clipbound.")
        if unclipped_num_std is not None and not (unclipped_num_std > 0 and math.isfinite(unclipped_num_std)):
            raise ValueError(f"unclipped_num_std must be positive, got {unclipped_num_std!r}.")
        self.target_unclipped_quantile = float(target_unclipped_quantile)
        self.clipbound_learning_rate = float(clipbound_learning_rate)
        self.min_clipbound, self.max_clipbound = checked_bound(min_clipbound), checked_bound(max_clipbound)
        self.unclipped_num_std = unclipped_num_std

    def statistic(self, squared_norms: Tensor) -> Tensor:
        """``sum_i (b_i - 1/2)``, a float64 scalar; a sample that is not finite counts as nothing at all."""
        total = squared_norms.double().sum(0)
        unclipped = (total <= self.max_grad_norm**2).double() - 0.5
        return torch.where(torch.isfinite(squared_norms.sum(0)), unclipped, 0.0).sum()

    def statistic_noise_std(self, noise_multiplier: float, expected_batch_size: float | None) -> float:
        if noise_multiplier == 0:
            return 0.0
        if self.unclipped_num_std is not None:
            return self.unclipped_num_std
        return max((expected_batch_size or 0.0) / 20, noise_multiplier)

    def gradient_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float | None = None) -> float:
        if noise_multiplier == 0:
            return 0.0
        std = self.statistic_noise_std(noise_multiplier, expected_batch_size)
        if noise_multiplier >= 2 * std:
            raise ValueError(
                f"noise_multiplier must be smaller than 2 * unclipped_num_std (theorem 1 of Andrew et al. 2021), but "
                f"{noise_multiplier} >= 2 * {std}: raise unclipped_num_std."
            )
        return (noise_multiplier**-2 - (2 * std) ** -2) ** -0.5

    def validate(self, noise_multiplier: float, expected_batch_size: float | None, parameters: int) -> None:
        if expected_batch_size is None:
            raise ValueError("Adaptive clipping needs expected_batch_size, to turn a count into a fraction.")
        self.gradient_noise_multiplier(noise_multiplier, expected_batch_size)

    def update(self, noisy_statistic: float, expected_batch_size: float | None) -> None:
        assert expected_batch_size is not None
        fraction = noisy_statistic / expected_batch_size + 0.5
        # A fraction outside of [0, 1] is noise; without the limit one draw could move the bound by orders of magnitude.
        step = self.clipbound_learning_rate * (min(max(fraction, 0.0), 1.0) - self.target_unclipped_quantile)
        self.max_grad_norm = min(max(self.max_grad_norm * math.exp(-step), self.min_clipbound), self.max_clipbound)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"unclipped_num_std": self.unclipped_num_std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.unclipped_num_std = state.get("unclipped_num_std", self.unclipped_num_std)
