"""`make_private` and `PrivacyEngine`: an ordinary model, optimizer and loader become private ones.

Formal guarantee. With ``poisson_sampling=True`` the training loop over the returned objects is the Poisson-subsampled
Gaussian mechanism, composed over the steps taken (Abadi et al. 2016, algorithm 1): every record is in every batch with
probability at most the charged rate (:mod:`gsm.sampling`), contributes at most its clipping bound to one noisy sum
(:mod:`gsm.optimizer`), and every such sum is charged to the accountant before the parameters move. Neighbouring
datasets differ by one record added or removed, their size being public (the rate and the divisor follow it): one that
is removed contributes nothing, as under "zero-out" (Kairouz et al. 2021). Assumptions: the gradients of a batch come
from the returned model, and nothing else that depends on the data (a validation score, a count, a choice between runs)
is published for free.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import accountants
from gsm import checkpoint, preparation, validation
from gsm.clipping_user import UserClipping
from gsm.criterion import GhostCriterion
from gsm.engine_account import EngineAccount
from gsm.journal import Journal
from gsm.passes import unwatched
from gsm.physical_batches import PhysicalBatchLoader, logical_batches
from gsm.repeated import warn_if_repeated

CALIBRATION = ("alphas", "eps_error", "delta_error", "epsilon_tolerance")


class PrivacyEngine:
    """Makes training objects private and keeps the account, with the interface of ``opacus.PrivacyEngine`` 1.6.

    Args:
        accountant: "prv", "pld", "rdp", "gdp", a name registered with ``accountants`` or Opacus, or an object.
        secure_mode: cryptographic randomness for sampling and noise, and noise made for floating-point attacks.

    Example:
        >>> engine = PrivacyEngine()
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
        >>> # the ordinary training loop
        >>> engine.get_epsilon(delta=1e-5)
    """

    def __init__(self, *, accountant: Any = "prv", secure_mode: bool = False) -> None:
        self._account = EngineAccount(preparation.make_accountant(accountant))
        self.secure_mode = secure_mode
        self.secure_rng = None
        if not secure_mode:
            warnings.warn(
                "Secure RNG turned off: sampling and noise come from seedable pseudo-random generators, good for "
                "experiments. Train the model that you publish with secure_mode=True.",
                stacklevel=2,
            )

    @property
    def accountant(self) -> Any:
        """Who keeps the account."""
        return self._account.accountant

    @accountant.setter
    def accountant(self, value: Any) -> None:
        self._account.accountant = value

    @property
    def dataset(self) -> Any:
        """What the loader made private last reads."""
        return self._account.dataset

    @property
    def journal(self) -> Journal | None:
        """What :meth:`keep_journal` opened."""
        return self._account.journal

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        criterion: Any = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: Any = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        max_physical_batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Private counterparts of a model, an optimizer and a loader; the training loop stays as it is.

        Args:
            module: the model, in train mode.
            optimizer: a ``torch.optim`` optimizer over the model's parameters.
            data_loader: its length gives the sample rate, ``1 / len(data_loader)``.
            noise_multiplier: noise standard deviation divided by the sensitivity of the sum; 0 gives no privacy.
            max_grad_norm: bound on one record's gradient norm; a list of one per parameter with "per_layer".
            criterion: only with ``grad_sample_mode="ghost"``: also return it, reducing per sample first.
            batch_first: whether the batch is the first dimension of the model's inputs (else the second).
            loss_reduction: "mean" or "sum": how the training loss reduces over the batch.
            poisson_sampling: False keeps the loader's own batches, and warns what epsilon then means.
            clipping: "flat", "per_layer", "automatic", "adaptive", or a ``gsm.clipping.Clipping``.
            noise_generator: seeded source of the noise, for reproducible experiments.
            grad_sample_mode: "hooks", "ghost", "auto", "functorch", "loop"; "ew" and "no_op" are Opacus's own wrappers.
            wrap_model: False: train the model you passed; the returned object only serves to ``cleanup()``.
            rand_on_empty: must be False (see :class:`gsm.loader.DPDataLoader`).
            max_physical_batch_size: split logical batches into pieces of at most so many records.
            kwargs: options of the clipping, such as ``target_unclipped_quantile`` for "adaptive".

        Returns:
            ``(model, optimizer, loader)``, or ``(model, optimizer, criterion, loader)`` where a criterion was given in
            ghost mode.

        Raises:
            ValueError, TypeError: arguments that do not fit together; the message names them and the fix.
            UnsupportedModuleError: layers in which samples influence each other, with their paths.
        """
        if noise_generator is not None and self.secure_mode:
            raise ValueError("Passing seed is prohibited in secure mode: noise_generator must be None")
        data_loader = unwatched(logical_batches(data_loader))
        preparation.check_parameters(module, optimizer)
        preparation.check_assumption(self.accountant, poisson_sampling, data_loader)
        distributed = preparation.is_distributed(module)
        loader = preparation.private_loader(
            data_loader,
            poisson_sampling=poisson_sampling,
            distributed=distributed,
            secure_mode=self.secure_mode,
            accountant=self.accountant,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )
        sample_rate = preparation.rate_of(loader)
        private = preparation.private_optimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=preparation.expected_batch_size(loader, sample_rate, distributed),
            loss_reduction=loss_reduction,
            clipping=clipping,
            generator=noise_generator,
            secure_mode=self.secure_mode,
            distributed=distributed,
            mode=grad_sample_mode,
            clipping_options={name: value for name, value in kwargs.items() if name not in CALIBRATION},
        )
        if not isinstance(getattr(private, "clipping", None), UserClipping):
            warn_if_repeated(loader.dataset)
        returned = loader
        if max_physical_batch_size is not None:
            returned = PhysicalBatchLoader(loader, max_physical_batch_size, private)
        loss = GhostCriterion(criterion, loss_reduction) if criterion is not None else None
        # The model comes last: if anything above failed, it is as it was.
        model = preparation.private_model(
            module, mode=grad_sample_mode, batch_first=batch_first, loss_reduction=loss_reduction, wrap_model=wrap_model
        )
        if poisson_sampling:
            model.forbid_grad_accumulation()
        self._account.enter(private, loader, sample_rate, poisson_sampling)
        if loss is not None and grad_sample_mode == "ghost":
            return model, private, loss, returned
        return model, private, returned

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        max_grad_norm: float | Sequence[float],
        epochs: float | None = None,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """:meth:`make_private` with the noise that spends ``target_epsilon`` at ``target_delta`` after the training.

        Args:
            module, optimizer, data_loader, max_grad_norm: as for :meth:`make_private`.
            target_epsilon, target_delta: the budget at the end.
            epochs, total_steps: how long the training will be; one of them.
            kwargs: everything else that :meth:`make_private` takes, and ``alphas``, ``eps_error``, ``delta_error``,
                ``epsilon_tolerance`` for the calibration.

        Raises:
            ValueError: both or neither of ``epochs`` and ``total_steps``; a budget that no noise meets.
        """
        if (epochs is None) == (total_steps is None):
            raise ValueError("say how long the training will be: exactly one of epochs and total_steps")
        taken = sum(entry[2] for entry in self.accountant.history)
        if taken:
            warnings.warn(
                f"{taken} steps are already on this engine's account: the noise is chosen for a fresh "
                "start, so the total will exceed target_epsilon. Use a new engine for a new training.",
                stacklevel=2,
            )
        steps = {"steps": total_steps} if epochs is None else {"epochs": preparation.passes(data_loader, epochs)}
        noise_multiplier = accountants.get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=preparation.rate_of(data_loader),
            accountant=preparation.meter(self.accountant),
            **steps,
            **{name: value for name, value in kwargs.items() if name in CALIBRATION},
        )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            **kwargs,
        )

    def keep_journal(self, path: Any) -> None:
        """Writes every charge to ``path`` before its noise is drawn, and counts what an earlier, crashed run wrote.

        Without a journal, what was released between the last checkpoint and a crash is not on the account of the run
        that resumes. Call it before the first step, with one file per run, and again when resuming (before or after
        :meth:`load_checkpoint`). It costs one ``fsync`` per release.

        Raises:
            CheckpointError: a file that is no journal, one with fewer releases than this account, or one that is open
                already, in this process or another.
            ValueError: an optimizer that does not charge by itself (several processes).
        """
        self._account.keep_journal(path)

    def get_epsilon(self, delta: float, **kwargs: Any) -> float:
        """Epsilon spent so far, at the given ``delta``."""
        return self.accountant.get_epsilon(delta, **kwargs)

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether :meth:`validate` has nothing to object to."""
        return not validation.module_errors(module)

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise ``UnsupportedModuleError`` where samples influence each other; path and fix are in the message."""
        validation.validate(module)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """A copy of the model with the layers replaced that :meth:`validate` objects to."""
        return validation.get_compatible_module(module)

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        lr_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write model, optimizer (with the clipping's state), accountant and schedulers to ``path``, all or nothing.

        Args:
            path: file name or binary file object.
            module, optimizer, noise_scheduler, grad_clip_scheduler, lr_scheduler: what to save; the model is needed.
            checkpoint_dict: further entries: tensors and plain values.
            module_state_dict_kwargs, torch_save_kwargs: for ``module.state_dict`` and ``torch.save``.

        Raises:
            CheckpointError: in the middle of a logical batch, or entries that could not be loaded safely.
        """
        checkpoint.save(
            path,
            module=module,
            accountant=self.accountant,
            optimizer=optimizer,
            schedulers=_schedulers(noise_scheduler, grad_clip_scheduler, lr_scheduler),
            extra=checkpoint_dict,
            module_kwargs=module_state_dict_kwargs,
            save_kwargs=torch_save_kwargs,
        )

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        lr_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint written by this class or by Opacus; noise and batches continue with fresh randomness.

        Args:
            path: file name or binary file object.
            module, optimizer, noise_scheduler, grad_clip_scheduler, lr_scheduler: what to load into.
            module_load_dict_kwargs, torch_load_kwargs: for ``module.load_state_dict`` and ``torch.load``.

        Returns:
            The checkpoint's entries, those of ``checkpoint_dict`` among them.

        Raises:
            CheckpointError: unreadable, corrupted, unsafe, incomplete, or with another accountant.
        """
        state = checkpoint.load(
            path,
            module=module,
            accountant=self.accountant,
            optimizer=optimizer,
            schedulers=_schedulers(noise_scheduler, grad_clip_scheduler, lr_scheduler),
            module_kwargs=module_load_dict_kwargs,
            load_kwargs=torch_load_kwargs,
        )
        self._account.resume(optimizer)
        return state


def _schedulers(noise: Any, grad_clip: Any, lr: Any) -> dict[str, Any]:
    return {
        "noise_scheduler_state_dict": noise,
        "grad_clip_scheduler_state_dict": grad_clip,
        "lr_scheduler_state_dict": lr,
    }
