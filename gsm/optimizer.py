"""The private optimizer: clip, sum, add noise, charge the accountant, step.

One *release* is one noisy sum handed to the wrapped optimizer, and :class:`DPOptimizer` the only place where it
happens. Clipping (:mod:`gsm.clipping`) and noise (:mod:`gsm.noise`) are parts handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gsm import ledger
from gsm.accounts import has_account
from gsm.clipping import AutomaticClipping, Clipping, FlatClipping, PerLayerClipping
from gsm.clipping_adaptive import AdaptiveClipping
from gsm.clipping_user import UserClipping
from gsm.loss_check import check_entries
from gsm.noise import GaussianNoise, Noise
from gsm.optimizer_checks import (
    ACCUMULATED,
    FORGOTTEN,
    MORE_ROWS,
    NO_BACKWARD,
    OVERLAPPING,
    UNCHARGED,
    check_finite,
    check_reduction,
    check_settings,
    check_wrapped,
    checked_rate,
)
from gsm.optimizer_interface import OptimizerInterface
from gsm.passes import Passes, lacking
from gsm.release import PendingRelease
from gsm.secure_noise import SecureNoise
from gsm.window import window

CLIPPING: dict[str, type[Clipping]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "automatic": AutomaticClipping,
    "adaptive": AdaptiveClipping,
}


class DPOptimizer(OptimizerInterface):
    """Wraps a ``torch.optim`` optimizer so that its steps are differentially private.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its parameter groups and state are shared, not copied.
        noise_multiplier: standard deviation of the noise divided by the sensitivity of the sum. 0 means no privacy.
        max_grad_norm: l2 bound C on one record's gradient; with ``clipping="per_layer"`` also a list of bounds.
        expected_batch_size: what the sum is divided by with ``loss_reduction="mean"`` (never the true batch size, which
            is private under Poisson sampling).
        loss_reduction: "mean" or "sum": how the training loss reduces over the batch.
        generator: seedable source of the noise; None is torch's global generator.
        secure_mode: cryptographic noise that stands up to floating-point attacks (:mod:`gsm.secure_noise`).
        clipping: "flat", "per_layer", "automatic", "adaptive", or a :class:`gsm.clipping.Clipping`.
        noise: a :class:`gsm.noise.Noise` instead of the one that ``generator`` and ``secure_mode`` describe.

    Formal guarantee: every release is ``sum_i w_i g_i + N(0, (noise_multiplier * S)^2)``, where ``S``, given by the
    clipping part at the moment of clipping, bounds the change of the sum when one record is added or removed. With
    ``accountant`` set, each release is charged once, before a parameter moves, at ``noise_multiplier`` and
    ``sample_rate`` times the number of samples in it. If samples were drawn as the accountant assumes, this is the
    subsampled Gaussian mechanism (Abadi et al. 2016, algorithm 1). :meth:`virtual_step` takes the caller's word that
    the physical batches it joins hold different records; batches that nothing joins may hold the same ones, and their
    bounds add up.

    Example:
        >>> model = GradSampleModule(nn.Linear(8, 2))
        >>> optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0,
        ...                         max_grad_norm=1.0, expected_batch_size=64)
        >>> model(torch.randn(64, 8)).square().sum(1).mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        clipping: str | Clipping = "flat",
        noise: Noise | None = None,
    ):
        check_settings(optimizer, expected_batch_size, loss_reduction, generator, secure_mode, noise)
        self.original_optimizer = optimizer
        self.loss_reduction = loss_reduction
        self.expected_batch_size = expected_batch_size
        self.secure_mode = secure_mode
        self.clipping = _make_clipping(clipping, max_grad_norm)
        self.noise: Noise = noise or (SecureNoise() if secure_mode else GaussianNoise(generator))
        self.noise_multiplier = noise_multiplier
        self.sample_rate: float | None = None
        #: True where every batch of the loader is a random sample of its own (Poisson sampling), so that two of them
        #: can hold the same record unless the loader says, with signal_skip_step, that they are parts of one sample.
        #: Batches that a DPDataLoader hands out whole are none, whoever says so.
        self.independent_batches = False
        self._init_hooks()
        self.clipping.validate(self.noise_multiplier, expected_batch_size, len(self.params))
        self._reset()
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]
        ledger.scales_noise(self.params)

    def _reset(self) -> None:
        """No logical batch under way."""
        self._pending = PendingRelease()
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        self._iterations = 0
        self._released: TensorWeakRef | None = None
        self._released_version = -1
        self._checked: list[int] = []

    # -- one physical batch --------------------------------------------------------------------------------------------

    @property
    def accumulated_iterations(self) -> int:
        """How many backward passes wait for a step, or went into the last one until zero_grad()."""
        waiting = self._iterations or len(ledger.collect(self.params))
        if not waiting:
            raise ValueError(NO_BACKWARD)
        return waiting

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients. A sum that :meth:`virtual_step` or a skipped step has built up stays, as it still waits
        for its release; :meth:`discard_pending` forgets that too."""
        ledger.discard(self.params)
        self._released, self._iterations = None, 0
        if not self._is_last_step_skipped:
            self._drop_sums()
        self.original_optimizer.zero_grad(set_to_none)

    def discard_pending(self) -> None:
        """Forgets an unfinished logical batch: its gradients, its clipped sum, and the signals for its parts."""
        ledger.discard(self.params)
        self._drop_sums()
        self._reset()

    def clip_and_accumulate(self) -> None:
        """Clips what the backward passes left behind and adds it to the pending sum (``p.summed_grad``)."""
        window().pause()  # what a step computes is none of a loss's
        params = self.params
        if self._checked != (seen := [id(p) for p in params]):
            check_wrapped(self, params, self.loss_reduction)
            self._checked = seen
        self._refuse_used(params)
        batches = ledger.collect(params)
        if not batches:
            if self._pending.samples:
                return  # everything came through virtual_step
            raise ValueError(NO_BACKWARD)
        if len(batches) > 1:
            self.warn_once(ACCUMULATED.format(n=len(batches)))
        tape = ledger.tape_of(params[0])
        more_rows = self._watch.more_rows(batches, None if tape is None else tape.more_rows)
        if more_rows and not isinstance(self.clipping, UserClipping):
            self.warn_once(MORE_ROWS.format(rows=more_rows[0], records=more_rows[1]))
        with torch.no_grad():
            clipped = [self.clipping.clip(batch) for batch in batches]
        self._watch.compare_users(self, tape.records if tape is not None else 0, len(clipped[-1].groups))
        if isinstance(self.sampler, Passes):
            self._pending.enter(self.sampler.under_way)
        self._pending.check(clipped[0])
        # From here on the gradients count as used, whatever happens: they can never enter a second sum.
        self._mark_used(params)
        sums = [self._sum(batch, each.weights) for batch, each in zip(batches, clipped, strict=True)]
        for batch, each, total in zip(batches, clipped, sums, strict=True):
            self._pending.add(batch.params, total, each)
            self._pending.joins = False
        if self._pending.samples > max(1, len(batches)) and (self.independent_batches or self.sampler is not None):
            self.warn_once(OVERLAPPING)
        self._iterations = len(batches)
        for p, pending in self._pending.sums.items():
            p.summed_grad = pending  # type: ignore[attr-defined]

    @torch.no_grad()
    def _sum(self, batch: ledger.PerSampleGradients, weights: Tensor) -> list[Tensor]:
        sums = batch.weighted_sum(weights, last=True)
        if bool((weights == 0).any()):
            check_finite(self, batch.params, sums, weights)
        return sums

    def virtual_step(self, *, loss: Tensor | None = None) -> None:
        """Clips this physical batch and adds it to the pending sum; releases nothing, charges nothing.

        The physical batches between two releases must hold different records (parts of one logical batch). A loop
        that gives a logical batch up half-way calls :meth:`discard_pending` before it starts another.

        Args:
            loss: one entry per sample; if given, the backward pass is run here.
        """
        if loss is not None:
            self._backward(loss)
        told_to_skip = self._check_skip_next_step()
        self.clip_and_accumulate()
        ledger.discard(self.params)
        self._iterations = 0
        self._is_last_step_skipped = True
        self._pending.joins = told_to_skip or not self.independent_batches
        self._pending.by_hand = not told_to_skip

    def _backward(self, loss: Tensor) -> None:
        if not isinstance(loss, Tensor) or loss.dim() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f'loss= takes a vector with one entry per sample (reduction="none"), got {shape}.')
        size = loss.shape[0]
        check_entries(self.params, loss)
        (loss.mean() if self.loss_reduction == "mean" else loss.sum()).backward()
        seen = [batch.batch_size for batch in ledger.collect(self.params)]
        if seen and seen[-1] != size:
            ledger.discard(self.params)
            raise ValueError(f"loss= has {size} entries but the model saw {seen[-1]} samples: one entry per sample.")

    # -- one release ---------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | None = None
    ) -> Any:
        """Clips and sums like :meth:`virtual_step`, then adds noise once, charges the accountant once, and updates.

        After ``signal_skip_step(True)`` it only clips and sums.

        Args:
            closure: runs forward and backward (and zero_grad); called once.
            loss: one entry per sample; if given, the backward pass is run here.
        Returns:
            What ``closure`` returned.
        """
        if closure is not None and loss is not None:
            raise ValueError("step() takes a closure or a loss, not both: each of them runs a backward pass.")
        if closure is not None and not callable(closure):
            raise TypeError(
                f"step() takes a closure, got {type(closure).__name__}: pass a loss by its name, step(loss=...)."
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if loss is not None:
            self._backward(loss)
        if self.pre_step():
            self._run_hooks(self._optimizer_step_pre_hooks, closure)
            self.original_optimizer.step()
            self._run_hooks(self._optimizer_step_post_hooks, closure)
            self._remember_released()
        return result

    # torch would wrap an unmarked step to run its hooks; they are run above, only where there is an update.
    step.hooked = True  # type: ignore[attr-defined]

    def pre_step(self, closure: Callable[[], Any] | None = None) -> bool:  # type: ignore[override]
        """Everything before the wrapped optimizer's own step. Returns False if that step is to be skipped."""
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None  # frozen: whatever is there never went through clipping and noise
        if not self.params:
            return True
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = self._pending.joins = True
            return False
        self._is_last_step_skipped = False
        check_reduction(self.loss_reduction, self.expected_batch_size)
        self.clipping.validate(self.noise_multiplier, self.expected_batch_size, len(self.params))
        self._watch.compare(self, self._pending)
        self._charge()
        self.add_noise()
        self.releases += 1
        self.scale_grad()
        for hook in self.step_hooks:
            hook(self)
        return True

    def _charge(self) -> None:
        if self.accountant is None:
            if not self.step_hooks and has_account(self.params[0]):
                self.warn_once(UNCHARGED)
            return
        rate = min(1.0, checked_rate(self.accountant, self.sample_rate) * self._pending.samples)
        before = lacking(self.sampler, self.accountant)
        for noise_multiplier, sample_rate in [*before, (self.noise_multiplier, rate)]:
            if self.journal is not None:
                self.journal.record(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
            self.accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)

    @torch.no_grad()
    def add_noise(self) -> None:
        """Releases the pending sum: ``p.grad`` becomes the noisy sum, and the sum itself is forgotten."""
        pending, params = self._pending, self.params
        # Taken out first: whatever fails below, these records are not released again.
        self._pending = PendingRelease()
        sums = [pending.sums[p] if p in pending.sums else ledger.zeros_for(p) for p in params]
        multiplier = self.clipping.gradient_noise_multiplier(self.noise_multiplier, self.expected_batch_size)
        if multiplier == 0:
            sums = [total.clone() for total in sums]  # p.summed_grad stays readable, as there is nothing to hide
        else:
            self._drop_sums()
            self.noise.add_(sums, multiplier * pending.sensitivity, pending.sensitivity)
        for p, total in zip(params, sums, strict=True):
            p.grad = total if total.shape == p.shape and total.dtype == p.dtype else total.view_as(p).to(p.dtype)
        if pending.statistic is not None:
            self._release_statistic(pending)

    def _release_statistic(self, pending: PendingRelease) -> None:
        assert pending.statistic is not None
        unit = self.clipping.statistic_noise_std(self.noise_multiplier, self.expected_batch_size)
        value = pending.statistic.detach().double().cpu().reshape(1)
        # Noise is scaled as the sensitivity is: by the number of samples in the release.
        self.noise.add_([value], unit * pending.samples, pending.statistic_sensitivity)
        self.clipping.update(value.item(), self.expected_batch_size)

    def scale_grad(self) -> None:
        """Divides ``p.grad`` by the expected batch size (``loss_reduction="mean"``)."""
        if self.loss_reduction == "mean":
            assert self.expected_batch_size is not None
            scale = 1.0 / (self.expected_batch_size * max(self._iterations, 1))
            torch._foreach_mul_([p.grad for p in self.params], scale)

    # -- gradients are used once ---------------------------------------------------------------------------------------

    def _mark_used(self, params: Sequence[nn.Parameter]) -> None:
        """Forgets captures; ``p.grad_sample`` stays readable until zero_grad(), as in Opacus, but is marked."""
        kept = [(p, g) for p in params if (g := getattr(p, "grad_sample", None)) is not None]
        ledger.discard(params)
        for p, grad_sample in kept:
            for g in grad_sample if isinstance(grad_sample, list) else [grad_sample]:
                g._processed = True  # Opacus's own mark
            p.grad_sample = grad_sample  # type: ignore[attr-defined]

    def _refuse_used(self, params: Sequence[nn.Parameter]) -> None:
        for p in params:
            held = getattr(p, "grad_sample", None)
            if any(hasattr(g, "_processed") for g in (held if isinstance(held, list) else [held])):
                raise ValueError(FORGOTTEN)
        grad = self._released() if self._released is not None else None
        if grad is not None and grad._version == self._released_version and any(p.grad is grad for p in params):
            raise ValueError(FORGOTTEN)

    def _remember_released(self) -> None:
        for p in self.params:
            if p.grad is not None:
                self._released, self._released_version = TensorWeakRef(p.grad), p.grad._version
                return

    def _drop_sums(self) -> None:
        if self._pending.samples:
            self._pending = PendingRelease()
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]


def _make_clipping(clipping: str | Clipping, max_grad_norm: float | Sequence[float]) -> Clipping:
    if isinstance(clipping, str):
        if clipping not in CLIPPING:
            raise ValueError(f"Unknown clipping {clipping!r}: choose one of {sorted(CLIPPING)} or hand in a Clipping.")
        clipping = CLIPPING[clipping]()
    elif not isinstance(clipping, Clipping):
        raise TypeError(f"clipping is a name or a gsm.clipping.Clipping, got {type(clipping).__name__}.")
    several = isinstance(max_grad_norm, Sequence) and not isinstance(max_grad_norm, str)
    if several and not isinstance(clipping, PerLayerClipping):
        raise ValueError('A list of bounds as max_grad_norm goes with clipping="per_layer".')
    clipping.max_grad_norm = max_grad_norm  # type: ignore[assignment]
    return clipping
