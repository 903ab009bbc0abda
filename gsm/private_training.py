"""`make_private`: the one line that makes a training private."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gsm.engine import PrivacyEngine


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    *,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    epochs: float | None = None,
    total_steps: int | None = None,
    max_grad_norm: float | Sequence[float] = 1.0,
    mode: str = "auto",
    clipping: Any = "flat",
    accountant: Any = "prv",
    poisson_sampling: bool = True,
    max_physical_batch_size: int | None = None,
    secure_mode: bool = False,
    noise_generator: torch.Generator | None = None,
    loss_reduction: str = "mean",
    batch_first: bool = True,
    **clipping_options: Any,
) -> tuple[Any, Any, Any]:
    """Private counterparts of a model, an optimizer and a data loader, for the ordinary training loop.

    Args:
        model: any model in train mode in which samples do not influence each other.
        optimizer: a ``torch.optim`` optimizer over its parameters.
        loader: its length gives the sample rate, ``1 / len(loader)``.
        noise_multiplier: noise standard deviation over the sensitivity of the sum; or instead of it
        target_epsilon, target_delta: the budget, and how long the training will be:
        epochs, total_steps: exactly one of the two.
        max_grad_norm: bound on one record's gradient norm; a list, one per parameter, with "per_layer".
        mode: "auto", "hooks", "ghost", "functorch" or "loop"; "ew" and "no_op" are Opacus's own wrappers.
        clipping: "flat", "per_layer", "automatic", "adaptive", or a ``gsm.clipping.Clipping``.
        accountant: "prv", "pld", "rdp", "gdp", or an accountant object.
        poisson_sampling: False keeps the loader's own batches, and warns what epsilon then means.
        max_physical_batch_size: split logical batches into pieces of at most so many records.
        secure_mode: cryptographic sampling and noise.
        noise_generator: seeded source of the noise, for reproducible experiments.
        loss_reduction: "mean" or "sum": how the training loss reduces over the batch.
        batch_first: whether the batch is the first dimension of the model's inputs (else the second).
        clipping_options: options of the clipping, such as ``target_unclipped_quantile`` for "adaptive".

    Returns:
        ``(model, optimizer, loader)``; ``optimizer.accountant.get_epsilon(delta)`` is the budget spent. What is
        guaranteed, under which assumptions, is in :mod:`gsm.engine`.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them and the fix.
        opacus.validators.errors.UnsupportedModuleError: layers in which samples influence each other.

    Example:
        >>> model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.1)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.accountant.get_epsilon(delta=1e-5)
    """
    engine = PrivacyEngine(accountant=accountant, secure_mode=secure_mode)
    common: dict[str, Any] = {
        "module": model,
        "optimizer": optimizer,
        "data_loader": loader,
        "max_grad_norm": max_grad_norm,
        "grad_sample_mode": mode,
        "clipping": clipping,
        "poisson_sampling": poisson_sampling,
        "max_physical_batch_size": max_physical_batch_size,
        "noise_generator": noise_generator,
        "loss_reduction": loss_reduction,
        "batch_first": batch_first,
        **clipping_options,
    }
    budget = {"target_epsilon": target_epsilon, "target_delta": target_delta}
    length = {"epochs": epochs, "total_steps": total_steps}
    if noise_multiplier is not None:
        given = [name for name, value in {**budget, **length}.items() if value is not None]
        if given:
            raise ValueError(f"noise_multiplier fixes the noise, so {', '.join(given)} cannot be given as well")
        private = engine.make_private(noise_multiplier=noise_multiplier, **common)
    else:
        missing = [name for name, value in budget.items() if value is None]
        if missing:
            raise ValueError(f"give noise_multiplier, or the whole budget: {' and '.join(missing)} is missing")
        private = engine.make_private_with_epsilon(**budget, **length, **common)  # type: ignore[arg-type]
    return private[0], private[1], private[2]
