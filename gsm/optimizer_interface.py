"""The part of the private optimizer that is only an interface: settings, hooks, state, pickling."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import torch
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch.utils.hooks import RemovableHandle

from gsm.batch_watch import BatchWatch
from gsm.clipping import Clipping
from gsm.noise import Noise
from gsm.optimizer_checks import SCALED
from gsm.release import PendingRelease


class Accountant(Protocol):
    history: Any

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None: ...


class OptimizerInterface(OpacusDPOptimizer):
    """What :class:`gsm.optimizer.DPOptimizer` shares with ``torch.optim`` and Opacus, apart from taking steps.

    ``param_groups``, ``state``, ``defaults``, ``params``, ``grad_samples`` and ``signal_skip_step`` are Opacus's own.
    """

    clipping: Clipping
    noise: Noise
    _pending: PendingRelease
    _accountant: Accountant | None = None
    #: A :class:`gsm.journal.Journal`: charges are on the disk before the noise is drawn. None: they are not.
    journal: Any = None
    _watch: BatchWatch
    sample_rate: float | None
    independent_batches: bool
    loss_reduction: str
    #: True where a :class:`gsm.PrivacyEngine` made this optimizer and reads the account that it charges.
    of_engine = False

    def _reset(self) -> None:
        raise NotImplementedError

    def discard_pending(self) -> None:
        raise NotImplementedError

    def _init_hooks(self) -> None:
        #: How many noisy sums this object has handed to the wrapped optimizer.
        self.releases = 0
        self._watch = BatchWatch()
        self._warned: set[str] = set()
        self.step_hooks: list[Callable[[Any], None]] = []
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()

    def warn_once(self, message: str) -> None:
        """Warns, if no message of this kind was given before."""
        kind = message[:40]  # the numbers in it may differ
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    @property
    def sampler(self) -> Any:
        """The sampler whose batches this optimizer is to use; it counts them in ``drawn``. None: not known."""
        return self._watch.sampler

    @sampler.setter
    def sampler(self, value: Any) -> None:
        self._watch.follow(value)

    @property
    def records(self) -> int | None:
        """How many records there are, where the accountant assumes batches of a fixed share of them."""
        return self._watch.records

    @records.setter
    def records(self, value: int | None) -> None:
        self._watch.records = value

    @property
    def accumulates(self) -> bool:
        """Whether a logical batch is under way, of which a part was clipped and summed."""
        return self._pending.samples > 0

    def begin_sample(self) -> None:
        """A batch was drawn by itself: records of an earlier one can be in it, whatever was said to join the two."""
        self._pending.joins = False

    def only_looked_at(self) -> None:
        """A batch that was drawn is for no release: it was asked for where no gradient is computed."""
        self._watch.only_looked_at()

    # -- settings ------------------------------------------------------------------------------------------------------

    @property
    def noise_multiplier(self) -> float:
        """Read at every release, so that a scheduler can set it."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"noise_multiplier must be 0 (no privacy) or a positive number, got {value!r}.")
        self._noise_multiplier = number

    @property
    def max_grad_norm(self) -> float:
        """The clipping part's bound; assigning to it takes effect at the next clipping."""
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.max_grad_norm = value

    @property
    def expected_batch_size(self) -> float | None:
        """What the noisy sum is divided by with ``loss_reduction="mean"``."""
        return self._expected_batch_size

    @expected_batch_size.setter
    def expected_batch_size(self, value: float | None) -> None:
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise ValueError(f"expected_batch_size must be positive, got {value!r}.")
        self._expected_batch_size = value

    @property
    def secure_mode(self) -> bool:
        """Whether the noise is cryptographic; decided when the optimizer is made."""
        return self._secure_mode

    @secure_mode.setter
    def secure_mode(self, value: bool) -> None:
        if value != self.__dict__.get("_secure_mode", value):
            raise ValueError("secure_mode is chosen when the optimizer is made: its noise would stay what it is.")
        self._secure_mode = value

    @property
    def generator(self) -> torch.Generator | None:
        """The seedable source of the noise, if it has one."""
        return getattr(self.noise, "generator", None)

    @property
    def accountant(self) -> Accountant | None:
        """Charged once per release, at ``sample_rate`` per sample; None: nobody keeps the account."""
        return self._accountant

    @accountant.setter
    def accountant(self, value: Accountant | None) -> None:
        if self.of_engine and value is not self._accountant:
            raise ValueError(
                "optimizer.accountant is the one of the PrivacyEngine that made this optimizer, whose get_epsilon() "
                "would fall behind: choose it before, with PrivacyEngine(accountant=...), or attach_step_hook("
                "accountant.get_optimizer_hook_fn(sample_rate)) to keep a second account."
            )
        self._accountant = value

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Calls ``fn(optimizer)`` at every release, after the noise and before the update.

        Hooks add up: attaching one never detaches another, nor ``accountant``.
        """
        if not callable(fn):
            raise TypeError(f"A step hook is a function of the optimizer, got {type(fn).__name__}.")
        self.step_hooks.append(fn)

    @property
    def step_hook(self) -> Callable[[Any], None] | None:
        """The hook attached last."""
        return self.step_hooks[-1] if self.step_hooks else None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's GradScaler asks before a step."""
        raise ValueError(SCALED)

    # -- torch.optim's interface ---------------------------------------------------------------------------------------

    def _run_hooks(self, hooks: OrderedDict[int, Any], closure: Any) -> None:
        for hook in list(hooks.values()):
            if hook(self, (self, closure), {}) is not None:
                raise RuntimeError("A step hook of a private optimizer cannot replace the arguments of step().")

    def register_step_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Calls ``hook(optimizer, args, kwargs)`` before every update, with the noisy gradients in place."""
        return _register(self._optimizer_step_pre_hooks, hook)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Calls ``hook(optimizer, args, kwargs)`` after every update."""
        return _register(self._optimizer_step_post_hooks, hook)

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.original_optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.original_optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.original_optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.original_optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; only between logical batches, as their part of the pending sum would be missing."""
        if self._pending.samples:
            raise ValueError("add_param_group() in the middle of a logical batch: call it after step().")
        self.original_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's state, and the clipping part's under "clipping" (plain numbers)."""
        return {**self.original_optimizer.state_dict(), "clipping": self.clipping.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, of Opacus's, or of the plain optimizer.

        A logical batch under way is forgotten. The noise continues with fresh randomness even if it was seeded: a
        resumed run that repeats the noise of the interrupted one would give the difference of the two sums away.
        """
        inner = {k: v for k, v in state_dict.items() if k != "clipping"}
        self.original_optimizer.load_state_dict(inner)
        if "clipping" in state_dict:
            self.clipping.load_state_dict(state_dict["clipping"])
        self.discard_pending()
        self.noise.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a logical batch under way (its un-noised sum must not end up in a file)."""
        left_out = {"_pending", "_step_skip_queue", "_released", "step", "journal"}
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()
        self.noise.refresh()  # the copy and the original must not draw the same noise

    def __repr__(self) -> str:
        return (
            f"DPOptimizer(noise_multiplier={self.noise_multiplier:g}, clipping={self.clipping!r}, "
            f"expected_batch_size={self.expected_batch_size}, loss_reduction={self.loss_reduction!r}, "
            f"noise={self.noise!r})\n{self.original_optimizer!r}"
        )


def _register(hooks: OrderedDict[int, Any], hook: Callable[..., None]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
