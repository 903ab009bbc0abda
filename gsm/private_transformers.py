"""`PrivacyEngine` with the interface of the private_transformers library (Li et al. 2022).

The model stays the object it is and is called directly; an optimizer is made private in place, and takes the vector of
the samples' losses: `optimizer.step(loss=losses)`, or `optimizer.virtual_step(loss=losses)` for all but the last part
of a logical batch. Parameter sharing (tied embeddings, ALBERT) needs no preparation.

Formal guarantee: as in :class:`gsm.optimizer.DPOptimizer`. The engine does not see the data loader. That every record
is in a batch with probability at most `batch_size / sample_size`, independently of the others (Poisson sampling), and
that the parts joined by `virtual_step` hold different records, are therefore assumptions; :mod:`gsm.sampling` draws
such batches. An epoch that ends within a logical batch is followed by `optimizer.discard_pending()`, or by a step. For
shuffled batches of fixed size, as in that library's own examples, epsilon is an approximation.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import accountants
from gsm.clipping import Clipping, FlatClipping, PerLayerClipping
from gsm.measured import Measured
from gsm.noise import GaussianNoise, Noise
from gsm.optimizer import DPOptimizer
from gsm.secure_noise import SecureNoise
from gsm.wrapper import GradSampleModule

#: clipping_mode -> how gradients are kept, and how they are clipped. Only speed and memory differ in the first two.
CLIPPING_MODES: dict[str, tuple[str, type[Clipping]]] = {
    "default": ("auto", FlatClipping),
    "ghost": ("ghost", FlatClipping),
    "per_layer": ("auto", PerLayerClipping),
}
#: accounting_mode -> the accountants asked; the first one chooses the noise. "glw" is what Gopi, Lee and Wutschitz 2021
#: describe, known elsewhere as PRV.
ACCOUNTING_MODES: dict[str, tuple[str, ...]] = {
    "rdp": ("rdp",),
    "glw": ("prv",),
    "prv": ("prv",),
    "pld": ("pld",),
    "all": ("rdp", "prv"),
}
ASSUMPTION = (
    "epsilon is computed for Poisson sampling at the rate batch_size / sample_size, and this engine cannot see how "
    "your batches are drawn. gsm.loader.DPDataLoader.from_data_loader(loader) draws them so; for shuffled batches of "
    "fixed size the number is an approximation, not a guarantee."
)
_ADDED = (
    "step", "zero_grad", "virtual_step", "discard_pending", "get_privacy_spent", "get_training_stats", "privacy_engine"
)  # fmt: skip


class PrivacyEngine:
    """Makes an optimizer private in place.

    Args:
        module: the model; parameters that are not to be trained have `requires_grad=False` before this.
        batch_size: expected size of a logical batch; the noisy sum is divided by it.
        sample_size: number of records in the training set.
        max_grad_norm: l2 bound on one record's gradient.
        epochs: length of the training, to choose the noise for `target_epsilon`.
        noise_multiplier: noise standard deviation over `max_grad_norm`; or
        target_epsilon: the budget after `epochs` passes, from which it is computed.
        target_delta: by default `1 / (2 * sample_size)`.
        alphas: orders tried by the "rdp" accountant.
        record_snr: measure signal and noise for :meth:`get_training_stats` (one more copy of the gradient per step).
        named_params: pairs of names and parameters that are trained; by default all that require a gradient.
        clipping_mode: "default" (fastest), "ghost" (least memory), "per_layer".
        accounting_mode: "rdp", "glw" or "prv" (the same), "pld", "all".
        eps_error: allowed error of the "prv" accountant; it is added to epsilon.
        noise_generator, secure_mode: where the noise comes from, as in :class:`gsm.optimizer.DPOptimizer`.

    Raises:
        ValueError: arguments that make no sense, or neither noise nor a complete budget.

    Example:
        >>> engine = PrivacyEngine(
        ...     model, batch_size=10, sample_size=50_000, epochs=3, max_grad_norm=0.1, target_epsilon=3)
        >>> engine.attach(optimizer)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> optimizer.step(loss=losses)
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_size: int,
        sample_size: int,
        max_grad_norm: float,
        epochs: float | None = None,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        alphas: Sequence[float] | None = None,
        record_snr: bool = True,
        named_params: Iterable[tuple[str, nn.Parameter]] | None = None,
        clipping_mode: str = "default",
        accounting_mode: str = "rdp",
        eps_error: float = 0.05,
        noise_generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        _check(batch_size, sample_size, epochs, clipping_mode, accounting_mode)
        self.module = module
        self.batch_size, self.sample_size, self.epochs = batch_size, sample_size, epochs
        self.sample_rate = batch_size / sample_size
        self.max_grad_norm = max_grad_norm
        self.target_epsilon = target_epsilon
        self.target_delta = 1 / (2 * sample_size) if target_delta is None else target_delta
        self.clipping_mode, self.accounting_mode = clipping_mode, accounting_mode
        self.alphas, self.eps_error = alphas, eps_error
        self.record_snr, self.secure_mode, self.noise_generator = record_snr, secure_mode, noise_generator
        self.named_params = _trained(module, named_params)
        if noise_multiplier is None:
            if target_epsilon is None or epochs is None:
                raise ValueError("give noise_multiplier, or target_epsilon and epochs, from which it is computed")
            noise_multiplier = self._noise_for(target_epsilon, epochs)
        self.noise_multiplier = noise_multiplier
        self.accountant = accountants.create_accountant(ACCOUNTING_MODES[accounting_mode][0])
        self.optimizer: Optimizer | None = None
        self._private: DPOptimizer | None = None
        self._capture: GradSampleModule | None = None
        self._stats: Measured | None = None
        self._loading: RemovableHandle | None = None

    def _noise_for(self, target_epsilon: float, epochs: float) -> float:
        mechanism = ACCOUNTING_MODES[self.accounting_mode][0]
        return accountants.get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=self.target_delta,
            sample_rate=self.sample_rate,
            epochs=epochs,
            accountant=mechanism,
            **self._options(mechanism),
        )

    def _options(self, mechanism: str) -> dict[str, Any]:
        if mechanism == "rdp":
            return {} if self.alphas is None else {"alphas": self.alphas}
        return {"eps_error": self.eps_error} if mechanism == "prv" else {}

    @property
    def steps(self) -> int:
        """Releases so far."""
        return self.accountant.num_steps

    # -- the optimizer -------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> None:
        """Makes `optimizer.step`, `virtual_step` and `zero_grad` private, and starts to capture the model's gradients.

        Raises:
            ValueError: an engine or an optimizer that is attached already, or an optimizer that holds other trainable
                parameters than the engine.
        """
        if self.optimizer is not None:
            raise ValueError("this engine is attached to an optimizer already: detach() first")
        if hasattr(optimizer, "privacy_engine"):
            raise ValueError("this optimizer has an engine already: call optimizer.privacy_engine.detach() first")
        self._check_parameters(optimizer)
        mode, clipping = CLIPPING_MODES[self.clipping_mode]
        noise: Noise = SecureNoise() if self.secure_mode else GaussianNoise(self.noise_generator)
        self._stats = Measured(clipping, noise, self.record_snr)
        private = DPOptimizer(
            optimizer,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.batch_size,
            clipping=self._stats.clipping,
            noise=self._stats,
        )
        private.accountant, private.sample_rate = self.accountant, self.sample_rate
        self._capture = GradSampleModule(self.module, mode=mode)
        self.optimizer, self._private = optimizer, private
        self._loading = optimizer.register_load_state_dict_post_hook(self._resumed)
        if optimizer.state:  # loaded before
            self._resumed(optimizer)
        warnings.warn(ASSUMPTION, stacklevel=2)
        _patch(optimizer, private, self)

    def _resumed(self, optimizer: Optimizer) -> None:
        """The noise continues with fresh randomness: the same noise under the sums of two runs gives both away."""
        if self._private is not None:
            self._private.discard_pending()
            self._private.noise.refresh()

    def detach(self) -> None:
        """Takes everything away again: model and optimizer are as they were before :meth:`attach`."""
        if self.optimizer is None or self._capture is None or self._private is None:
            return
        self._private.discard_pending()
        if self._loading is not None:
            self._loading.remove()
        for name in _ADDED:
            self.optimizer.__dict__.pop(name, None)
        self.optimizer.__dict__.update(self._private.__dict__.pop("_replaced"))
        self._capture.remove_hooks()
        self.optimizer = self._private = self._capture = None

    def _check_parameters(self, optimizer: Optimizer) -> None:
        ours = {id(p) for _, p in self.named_params}
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        strangers = [p for p in held if id(p) not in ours]
        if strangers:
            raise ValueError(
                f"the optimizer updates {len(strangers)} trainable tensors (the first has shape "
                f"{tuple(strangers[0].shape)}) that the engine does not hold: make both from the same model, and "
                "freeze what is not to be trained, with requires_grad_(False), before the engine is made"
            )
        if not held:
            raise ValueError("nothing to train: none of the optimizer's parameters requires a gradient")

    # -- accounting and statistics -------------------------------------------------------------------------------------

    def get_privacy_spent(
        self, steps: int | None = None, accounting_mode: str | None = None, lenient: bool = False
    ) -> dict[str, float]:
        """What the training has cost.

        Args:
            steps: number of releases; by default those taken.
            accounting_mode: by default the engine's own.
            lenient: accepted for compatibility; an accountant that fails says so either way.

        Returns:
            "eps_rdp" and "alpha_rdp" for "rdp". For the others "eps_upper", what that accountant says, and from below
            "eps_low" and "eps_estimate", a certified lower bound and the middle of the certified interval. "all": both.
        """
        mode = accounting_mode or self.accounting_mode
        if mode not in ACCOUNTING_MODES:
            raise ValueError(f"unknown accounting_mode {mode!r}: choose one of {', '.join(ACCOUNTING_MODES)}")
        history = list(self.accountant.history)
        if steps is not None:
            history = [(self.noise_multiplier, self.sample_rate, steps)] if steps else []
        spent: dict[str, float] = {}
        for mechanism in ACCOUNTING_MODES[mode]:
            accountant: Any = accountants.create_accountant(mechanism)
            accountant.history = history
            if mechanism == "rdp":
                epsilon, order = accountant.get_privacy_spent(delta=self.target_delta, **self._options("rdp"))
                spent.update(eps_rdp=float(epsilon), alpha_rdp=float(order))
                continue
            certified = accountants.PLDAccountant()
            certified.history = history
            low, high = certified.get_epsilon_bounds(self.target_delta)
            upper = accountant.get_epsilon(self.target_delta, **self._options(mechanism))
            spent.update(eps_low=low, eps_estimate=(low + high) / 2, eps_upper=max(high, upper))
        return spent

    def get_training_stats(self) -> dict[str, float | None]:
        """Clipping factors, signal and noise of the last step; None before it, or with `record_snr=False`.

        All but "noise_limit" depend on the data without noise and are not covered by epsilon: for whoever holds the
        data, not for publication.
        """
        stats = self._stats.values if self._stats is not None else {}
        names = ("med_clip", "max_clip", "min_clip", "snr", "signal", "noise")
        size = sum(p.numel() for _, p in self.named_params)
        limit = math.sqrt(size) * self.noise_multiplier * self.max_grad_norm
        return {**{name: stats.get(name) for name in names}, "noise_limit": limit}

    def __repr__(self) -> str:
        shown = ["target_epsilon", "target_delta", "noise_multiplier", "epochs", "max_grad_norm", "sample_rate"]
        shown += ["batch_size", "accounting_mode", "clipping_mode"]
        return f"PrivacyEngine({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"


def _patch(optimizer: Optimizer, private: DPOptimizer, engine: PrivacyEngine) -> None:
    """Puts the private methods in front of the optimizer's own, which the private optimizer still reaches."""
    original_step, original_zero_grad = optimizer.step, optimizer.zero_grad
    running: list[str] = []

    def step(self: Optimizer, closure: Any = None, *, loss: Tensor | None = None) -> Any:
        if "step" in running:  # the private step itself asks for the update
            return original_step() if closure is None else original_step(closure)
        running.append("step")
        try:
            return private.step(closure, loss=loss)
        finally:
            running.remove("step")

    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        if "zero_grad" in running:
            return original_zero_grad(set_to_none)
        running.append("zero_grad")
        try:
            private.zero_grad(set_to_none)
        finally:
            running.remove("zero_grad")

    def virtual_step(self: Optimizer, *, loss: Tensor | None = None) -> None:
        private.virtual_step(loss=loss)

    private.__dict__["_replaced"] = {n: optimizer.__dict__[n] for n in _ADDED if n in optimizer.__dict__}
    added: Any = optimizer
    added.step = types.MethodType(step, optimizer)
    added.zero_grad = types.MethodType(zero_grad, optimizer)
    added.virtual_step = types.MethodType(virtual_step, optimizer)
    added.discard_pending = private.discard_pending
    added.get_privacy_spent, added.get_training_stats = engine.get_privacy_spent, engine.get_training_stats
    added.privacy_engine = engine


def _trained(
    module: nn.Module, named_params: Iterable[tuple[str, nn.Parameter]] | None
) -> tuple[tuple[str, nn.Parameter], ...]:
    trainable = tuple((n, p) for n, p in module.named_parameters() if p.requires_grad)
    if named_params is None:
        return trainable
    chosen = tuple(named_params)
    strangers = [n for n, p in chosen if not any(p is q for _, q in trainable)]
    if strangers:
        raise ValueError(f"named_params holds {', '.join(strangers[:3])}, not trainable parameters of the model")
    return chosen


def _check(batch_size: Any, sample_size: Any, epochs: Any, clipping_mode: str, accounting_mode: str) -> None:
    if not 0 < batch_size <= sample_size:
        raise ValueError(f"batch_size must be in (0, sample_size={sample_size}], got {batch_size}")
    if epochs is not None and not epochs > 0:
        raise ValueError(f"epochs must be positive, got {epochs}")
    for name, value, known in (
        ("clipping_mode", clipping_mode, CLIPPING_MODES),
        ("accounting_mode", accounting_mode, ACCOUNTING_MODES),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
