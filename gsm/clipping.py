"""Clipping: from the norms of per-sample gradients to weights, and to the sensitivity of the weighted sum.

A clipping part never sees a layer or a gradient, only squared norms ``[parameters, batch]``. What it returns bounds
what one record can contribute to the sum, and that bound - nothing else - is what the noise is scaled by.

Formal guarantee, for every part here: with the weights ``w`` returned for one batch, ``||w_i g_i|| <= sensitivity``
for every sample ``i``, up to the rounding of the norms themselves (a few units in the last place of float32; weights
below 1 are shrunk by ``8 eps`` to stay on the safe side). Adding or removing one record therefore moves ``sum_i w_i
g_i`` by at most ``sensitivity`` in l2. A sample whose gradient holds an infinity or a NaN, or whose squared norm
overflows, gets weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsm.ledger import PerSampleGradients

#: Norms of this size are sums of squares that float32 still holds.
LEAST_BOUND = 1e-15


@dataclass(frozen=True)
class Clipped:
    """What clipping says about one physical batch.

    ``weights`` is ``[batch]`` or ``[parameters, batch]``; ``sensitivity`` the l2 bound on one record's part of the
    weighted sum; ``statistic`` a scalar to be released with noise beside the sum (adaptive clipping), to which one
    record contributes at most ``statistic_sensitivity``; ``groups`` the ids of the users in this batch (user-level
    clipping).
    """

    weights: Tensor
    sensitivity: float
    statistic: Tensor | None = None
    statistic_sensitivity: float = 0.0
    groups: frozenset[Hashable] = frozenset()


class Clipping:
    """Base of the clipping parts: subclasses say how norms become weights.

    Args:
        max_grad_norm: the bound C; :class:`gsm.optimizer.DPOptimizer` overwrites it with its own ``max_grad_norm``.
    """

    #: What one record can contribute to :meth:`statistic`.
    statistic_sensitivity = 0.0

    def __init__(self, max_grad_norm: float = 1.0):
        self.max_grad_norm = max_grad_norm

    @property
    def max_grad_norm(self) -> float:
        """The l2 bound on one record's contribution to the sum."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = checked_bound(value)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Weights ``[batch]`` or ``[parameters, batch]`` from squared norms ``[parameters, batch]``."""
        raise NotImplementedError

    def statistic(self, squared_norms: Tensor) -> Tensor | None:
        """A scalar that is to be released with noise beside the sum; None for most parts."""
        return None

    def clip(self, batch: PerSampleGradients) -> Clipped:
        """Weights, and the sensitivity of the sum they give, for one physical batch."""
        norms = batch.squared_norms()
        return Clipped(self.weights(norms), self.sensitivity, self.statistic(norms), self.statistic_sensitivity)

    def gradient_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float | None = None) -> float:
        """The multiplier for the gradient's noise, so that the whole release costs ``noise_multiplier``."""
        return noise_multiplier

    def update(self, noisy_statistic: float, expected_batch_size: float | None) -> None:
        """Learns from the released (noisy) statistic; only called where there is one."""

    def statistic_noise_std(self, noise_multiplier: float, expected_batch_size: float | None) -> float:
        """Standard deviation of the statistic's noise."""
        return 0.0

    def validate(self, noise_multiplier: float, expected_batch_size: float | None, parameters: int) -> None:
        """Raises ValueError where the settings of the optimizer and of this part do not fit together."""

    def state_dict(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.max_grad_norm = state["max_grad_norm"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_grad_norm={self.max_grad_norm:g})"


class FlatClipping(Clipping):
    """Abadi et al. 2016, algorithm 1: ``w_i = min(1, C / ||g_i||)`` with the norm over all parameters.

    Example:
        >>> FlatClipping(1.0).weights(torch.tensor([[4.0, 0.25]]))
        tensor([0.5000, 1.0000])
    """

    def weights(self, squared_norms: Tensor) -> Tensor:
        return clip_factor(self.max_grad_norm, sample_norms(squared_norms))


class AutomaticClipping(Clipping):
    """AUTO-S: ``w_i = C / (||g_i|| + gamma)``, which normalises instead of clipping.

    ``||w_i g_i|| < C`` for every gradient, so the sensitivity is C as in flat clipping; C and the learning rate
    become one quantity, and nothing is left to tune. Source: Bu, Wang, Zha, Karypis 2022, "Automatic Clipping",
    equation (5), with their ``gamma = 0.01``.

    Args:
        max_grad_norm: the bound C.
        gamma: positive; keeps small gradients small.
    """

    def __init__(self, max_grad_norm: float = 1.0, *, gamma: float = 0.01):
        super().__init__(max_grad_norm)
        if not (gamma > 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma must be a positive number, got {gamma!r}.")
        self.gamma = float(gamma)

    def weights(self, squared_norms: Tensor) -> Tensor:
        norms = sample_norms(squared_norms)
        return self.max_grad_norm * _shrink(norms.dtype) / (norms + self.gamma)


class PerLayerClipping(Clipping):
    """Every parameter is clipped to its own bound ``C_l``; the sensitivity of the whole sum is ``sqrt(sum_l C_l^2)``.

    A number is split equally: ``C_l = max_grad_norm / sqrt(n)`` for ``n`` trainable parameters, so that the
    sensitivity is ``max_grad_norm``. A list gives one bound per trainable parameter, in the optimizer's order;
    ``max_grad_norm`` is then the list's l2 norm, and assigning a number to it (a scheduler) scales the list.

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", section 3.

    Args:
        max_grad_norm: a number, or one bound per trainable parameter.
    """

    def __init__(self, max_grad_norm: float | Sequence[float] = 1.0):
        self._bounds: list[float] | None = None
        self.max_grad_norm = max_grad_norm  # type: ignore[assignment]

    @property
    def max_grad_norm(self) -> float:
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | Sequence[float]) -> None:
        if isinstance(value, Sequence):
            if not value:
                raise ValueError("max_grad_norm is an empty list: give one bound for each trainable parameter.")
            self._bounds = [checked_bound(v) for v in value]
            value = math.sqrt(sum(b * b for b in self._bounds))
        value = checked_bound(value)
        if self._bounds is not None:
            scale = value / math.sqrt(sum(b * b for b in self._bounds))
            self._bounds = [b * scale for b in self._bounds]
        self._max_grad_norm = value

    def max_grad_norms(self, parameters: int) -> list[float]:
        """The bound of each of ``parameters`` trainable parameters."""
        if self._bounds is None:
            return [self.max_grad_norm / math.sqrt(parameters)] * parameters
        if len(self._bounds) != parameters:
            raise ValueError(
                f"max_grad_norm is a list of {len(self._bounds)} bounds, but the optimizer has {parameters} trainable "
                "parameters: give one bound for each of them, in the order of optimizer.params."
            )
        return list(self._bounds)

    def validate(self, noise_multiplier: float, expected_batch_size: float | None, parameters: int) -> None:
        self.max_grad_norms(parameters)

    def weights(self, squared_norms: Tensor) -> Tensor:
        bounds = self.max_grad_norms(squared_norms.shape[0])
        # One bad parameter takes the whole sample out, not only its own row.
        good = torch.isfinite(squared_norms.sum(0))
        norms = torch.where(good, squared_norms.sqrt(), math.inf)
        return clip_factor(torch.tensor(bounds, dtype=norms.dtype, device=norms.device)[:, None], norms)

    def state_dict(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm if self._bounds is None else list(self._bounds)}


def sample_norms(squared_norms: Tensor) -> Tensor:
    """``[batch]`` norms over all parameters; infinite where the gradient is not finite, so that its weight is zero."""
    total = squared_norms.sum(0)
    return torch.where(torch.isfinite(total), total.sqrt(), math.inf)


def clip_factor(bound: float | Tensor, norms: Tensor) -> Tensor:
    """``min(1, bound / norm)``, a hair smaller so that rounding never lifts ``weight * norm`` above the bound."""
    return (bound * _shrink(norms.dtype) / norms).clamp(max=1.0)


def _shrink(dtype: torch.dtype) -> float:
    return 1.0 - 8 * torch.finfo(dtype).eps


def checked_bound(value: Any) -> float:
    """A positive finite float, or a ValueError that says what a clipping bound is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"max_grad_norm must be a positive number, got {value!r}.") from None
    if not 0 < number <= torch.finfo(torch.float32).max:  # norms and weights may be float32
        raise ValueError(f"max_grad_norm must be positive and finite, got {value!r}: it is the l2 bound on one record.")
    if number < LEAST_BOUND:
        raise ValueError(
            f"max_grad_norm must be at least {LEAST_BOUND:g}, got {value!r}: in float32 the squares of gradients so "
            "small are zero, and what has no norm is not clipped. Scale the loss."
        )
    return number
