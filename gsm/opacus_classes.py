"""Opacus's further names for what is one class with a part swapped here: signatures differ, the work does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping as OpacusGhostHooks
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import accountants
from gsm.clipping import Clipping, PerLayerClipping
from gsm.clipping_adaptive import AdaptiveClipping
from gsm.criterion import GhostCriterion
from gsm.engine import PrivacyEngine
from gsm.ledger import collect
from gsm.optimizer import DPOptimizer
from gsm.physical_batches import PhysicalBatchLoader
from gsm.wrapper import GradSampleModule


class GradSampleModuleFastGradientClipping(GradSampleModule):
    """``GradSampleModule(model, mode="ghost")`` with Opacus's arguments and its ways to ask for norms.

    Args:
        m: the model.
        batch_first, loss_reduction, strict, force_functorch: as for :class:`gsm.GradSampleModule`.
        max_grad_norm: only for :meth:`get_clipping_coef`; what clips is the optimizer's own bound.
        use_ghost_clipping: False keeps the same numbers; which layers materialise is the plan's choice either way.
    """

    NORM_SAMPLERS = OpacusGhostHooks.NORM_SAMPLERS

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ):
        super().__init__(
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=strict,
            force_functorch=force_functorch,
            mode="ghost",
        )
        self.max_grad_norm, self.use_ghost_clipping = max_grad_norm, use_ghost_clipping
        self._last_norms: Tensor | None = None

    def add_hooks(self, **options: Any) -> None:
        super().add_hooks(**options)
        self._tape.after_backward.append(self._keep_norms)

    def _keep_norms(self) -> None:
        """Norms outlive ``zero_grad()``, as in Opacus; the optimizer needs them anyway, so they cost nothing more."""
        params = [p for p in self._tape.params if p.requires_grad]
        squared = collect(params)[-1].squared_norms()
        for p, row in zip(params, squared, strict=True):
            p._norm_sample = row.sqrt()  # type: ignore[attr-defined]
        self._last_norms = squared.sum(0).sqrt()

    def get_norm_sample(self) -> Tensor:
        """Norms ``[batch]`` of the per-sample gradients of the last backward."""
        if self._last_norms is None:
            raise RuntimeError("There are no per-sample gradient norms: run a forward and a backward first.")
        return self._last_norms

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        """The same as :meth:`get_norm_sample`."""
        return self.get_norm_sample()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_norms": None}

    def get_clipping_coef(self) -> Tensor:
        """``min(1, max_grad_norm / norm)`` per sample, ``[batch]``; to look at: the optimizer computes its own."""
        return (self.max_grad_norm / (self.get_norm_sample() + 1e-6)).clamp(max=1.0)


class DPLossFastGradientClipping(GhostCriterion):
    """:class:`gsm.criterion.GhostCriterion` with Opacus's arguments.

    Args:
        module, optimizer: the wrapped model and its optimizer; only their ``loss_reduction`` is read.
        criterion: a loss with a ``reduction`` attribute, or a function that returns one loss per sample.
        loss_reduction: "mean" or "sum".

    Raises:
        ValueError: the four do not agree on the reduction.
    """

    def __init__(self, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean"):
        reductions = {"module": module.loss_reduction, "optimizer": optimizer.loss_reduction}
        other = [f"the {name}'s is {value!r}" for name, value in reductions.items() if value != loss_reduction]
        if other:
            raise ValueError(f"loss_reduction={loss_reduction!r} but {' and '.join(other)}: make them the same.")
        super().__init__(criterion, loss_reduction)
        self.module, self.optimizer = module, optimizer


class _ByClipping(type):
    """``isinstance`` asks which clipping part an optimizer has, not which class made it."""

    part: type[Clipping]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, DPOptimizer) and isinstance(instance.clipping, cls.part)


class DPPerLayerOptimizer(DPOptimizer, metaclass=_ByClipping):
    """``DPOptimizer(..., clipping="per_layer")``: ``max_grad_norm`` is a list of one bound per parameter."""

    part = PerLayerClipping

    def __init__(self, optimizer: Optimizer, *, max_grad_norm: Sequence[float], **options: Any):
        super().__init__(optimizer, max_grad_norm=max_grad_norm, clipping="per_layer", **options)


class AdaClipDPOptimizer(DPOptimizer, metaclass=_ByClipping):
    """``DPOptimizer(..., clipping=AdaptiveClipping(...))`` with Opacus's arguments."""

    part = AdaptiveClipping

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_grad_norm: float,
        target_unclipped_quantile: float,
        clipbound_learning_rate: float,
        max_clipbound: float,
        min_clipbound: float,
        unclipped_num_std: float,
        **options: Any,
    ):
        part = AdaptiveClipping(
            max_grad_norm,
            target_unclipped_quantile=target_unclipped_quantile,
            clipbound_learning_rate=clipbound_learning_rate,
            min_clipbound=min_clipbound,
            max_clipbound=max_clipbound,
            unclipped_num_std=unclipped_num_std,
        )
        super().__init__(optimizer, max_grad_norm=max_grad_norm, clipping=part, **options)


class PrivacyEngineAdaptiveClipping(PrivacyEngine):
    """``PrivacyEngine`` with ``clipping="adaptive"``; the options keep the defaults they have under Opacus's name."""

    def make_private(self, **arguments: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """As :meth:`gsm.engine.PrivacyEngine.make_private`."""
        defaults = {
            "target_unclipped_quantile": 0.5,
            "min_clipbound": 1.0,
            "max_clipbound": 1e8,
            "clipbound_learning_rate": 0.2,
        }
        return super().make_private(**{**defaults, **arguments, "clipping": "adaptive"})


def get_noise_multiplier(*, accountant: Any = "rdp", **arguments: Any) -> float:
    """:func:`accountants.get_noise_multiplier` with Opacus's default, which scripts account with afterwards."""
    return accountants.get_noise_multiplier(accountant=accountant, **arguments)


def wrap_data_loader(
    *, data_loader: DataLoader, max_batch_size: int, optimizer: torch.optim.Optimizer
) -> PhysicalBatchLoader:
    """:class:`gsm.physical_batches.PhysicalBatchLoader` under Opacus's name and arguments."""
    return PhysicalBatchLoader(data_loader, max_batch_size, optimizer)
