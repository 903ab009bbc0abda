"""An audit of a private training by its own user: canaries in, a lower bound on epsilon out.

Accounting says what epsilon is at most, if the code does what it should. An audit measures what epsilon is at least,
whatever the code does: half of ``m`` made-up records are mixed into the training data by ``m`` secret coin flips, every
release is watched, and at the end the coins are guessed. If the guesses are right more often than (epsilon, delta)
privacy allows, the training has a bug, or the claim is wrong.

Source: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torch.utils.data.dataloader import default_collate

from gsm.audit_report import AuditReport
from gsm.wrapper import GradSampleModule, _strip

CHUNK = 256  # canaries whose gradients exist at a time
# A joint estimate costs canaries^2 * entries multiplications and canaries * entries numbers per release: up to so many.
JOINT_WORK, JOINT_ENTRIES = 1 << 34, 1 << 26


class CanaryAudit:
    """One training run, audited: a lower bound on epsilon for the user's own model, settings and loop.

    Formal guarantee (Theorem 5.2 of the paper, in :func:`gsm.audit_report.p_value`): if the training is
    (epsilon, delta)-differentially private when one record is added or removed, the probability that
    :meth:`report` returns a lower bound above epsilon is at most ``1 - confidence``. It rests on the coins being fair,
    independent and unknown to the training, and on the number of guesses being fixed beforehand; the scores may be
    computed in any way from what was released. A low bound proves nothing: the attack may have been weak.

    The score of a canary is ``sum_t <noisy gradient_t, g_t / ||g_t||>`` over all releases, ``g_t`` the gradient
    of its own loss at the parameters of that moment (the paper's white-box attack on real examples). Where memory
    allows, the canaries' shares in each release are estimated jointly instead (ridge regression on their directions),
    so that canaries with similar gradients do not blur each other.

    Args:
        canaries: map-style dataset of records that do not occur in the training data, with gradients that differ from
            each other: random inputs, wrong labels. More canaries, a higher bound: with all guesses right it is about
            ``ln(guesses / 3)``. They should have gradients well above the clipping bound.
        loss: ``loss(model, batch) -> [len(batch)]``, each sample's own loss, for a collated batch of canaries.
        guesses: the share of the canaries to guess, half of them "was in" and half of them "was out".
        seed: of the coins; None takes them from the operating system.

    Raises:
        ValueError, TypeError: arguments without meaning.

    Example:
        >>> audit = CanaryAudit(canaries, loss=lambda model, batch: F.cross_entropy(
        ...     model(batch[0]), batch[1], reduction="none"))
        >>> loader = DataLoader(audit.dataset(train_set), batch_size=256)
        >>> model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0)
        >>> audit.watch(model, optimizer)
        >>> ...                                                  # the ordinary training loop
        >>> report = audit.report(delta=1e-5)
        >>> assert report.ok, report
    """

    def __init__(
        self, canaries: Any, *, loss: Callable[[Any, Any], Tensor], guesses: float = 0.1, seed: int | None = None
    ) -> None:
        if not hasattr(canaries, "__len__") or not hasattr(canaries, "__getitem__"):
            raise TypeError(f"canaries must be a map-style dataset, got {type(canaries).__name__}")
        if len(canaries) < 10:
            raise ValueError(f"{len(canaries)} canaries cannot show anything: give at least 10, better 1000")
        if not callable(loss):
            raise TypeError(f"loss must be a function of a model and a batch, got {type(loss).__name__}")
        if not 0 < guesses <= 1:
            raise ValueError(f"guesses is a share of the canaries in (0, 1], got {guesses!r}")
        self.canaries, self.loss, self.count = canaries, loss, len(canaries)
        self.each_side = max(1, int(guesses * self.count / 2))
        self.included = np.random.default_rng(seed).integers(0, 2, self.count).astype(bool)
        self.scores = torch.zeros(self.count, dtype=torch.float64)
        self.releases = 0
        self._optimizer: Any = None

    def dataset(self, training: Dataset) -> ConcatDataset:
        """The training data and the canaries that the coins chose; train on this."""
        chosen = np.flatnonzero(self.included).tolist()
        return ConcatDataset([training, Subset(self.canaries, chosen)])

    def watch(self, model: nn.Module, optimizer: Any) -> None:
        """From here on every release of ``optimizer`` is scored. ``model`` is the wrapped model that it trains.

        Raises:
            TypeError: not a private optimizer.
            ValueError: called twice, or a model without trainable parameters in this optimizer.
        """
        if not hasattr(optimizer, "attach_step_hook"):
            raise TypeError(f"watch() needs a private optimizer (from make_private), got {type(optimizer).__name__}")
        if self._optimizer is not None:
            raise ValueError("this audit watches an optimizer already: make a new CanaryAudit for another run")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        plain = getattr(model, "_module", model)
        if not any(id(p) in held for p in plain.parameters()):
            raise ValueError("the optimizer holds none of this model's parameters: nothing it releases can be watched")
        self._optimizer, self._plain = optimizer, plain
        optimizer.attach_step_hook(self._released)

    def _released(self, optimizer: Any) -> None:
        """Adds one release to the scores: ``p.grad`` is the noisy gradient, the parameters have not moved yet."""
        noisy = [p.grad for _, p in self._plain.named_parameters() if p.requires_grad]
        released = torch.cat([g.detach().flatten().double().cpu() for g in noisy if g is not None])
        entries = self.count * released.numel()
        joint = entries <= JOINT_ENTRIES and entries * self.count <= JOINT_WORK
        directions, scores = [], []
        with torch.random.fork_rng(), torch.enable_grad():
            shadow, params = self._shadow()
            held = [p for p, g in zip(params, noisy, strict=True) if g is not None]
            for start in range(0, self.count, CHUNK):
                own = self._directions(shadow, held, range(start, min(start + CHUNK, self.count)))
                scores.append(own @ released)
                if joint:
                    directions.append(own)
            shadow.cleanup()
        score = torch.cat(scores)
        if joint:
            score = _shares(torch.cat(directions), score, optimizer.noise_multiplier)
        self.scores += score
        self.releases += 1

    def _shadow(self) -> tuple[Any, list[nn.Parameter]]:
        """A copy of the model with per-sample gradients of its own: the training is not touched."""
        plain = copy.deepcopy(self._plain)
        _strip(plain)
        for p in plain.parameters():
            p.grad, p.grad_sample = None, None  # type: ignore[attr-defined, union-attr]
        shadow = GradSampleModule(plain, mode="hooks", loss_reduction="sum")
        return shadow, [p for p in plain.parameters() if p.requires_grad]

    def _directions(self, shadow: Any, params: list[Any], rows: range) -> Tensor:
        """``g_i / ||g_i||`` for the canaries in ``rows``, ``[len(rows), entries of params]``, float64."""
        losses = self.loss(shadow, self._batch(rows, params[0].device))
        if losses.shape != (len(rows),):
            raise ValueError(f"loss must return one entry per canary, [{len(rows)}], got {tuple(losses.shape)}")
        losses.sum().backward()
        grad_samples: list[Tensor] = [p.grad_sample for p in params]
        grads = torch.cat([g.detach().flatten(1).double().cpu() for g in grad_samples], 1)
        shadow.set_grad_sample_to_none()
        return torch.nn.functional.normalize(grads.nan_to_num(0.0, 0.0, 0.0), dim=1)

    def _batch(self, rows: range, device: torch.device) -> Any:
        batch = default_collate([self.canaries[i] for i in rows])
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)

    def report(self, *, delta: float, confidence: float = 0.95, epsilon: float | None = None) -> AuditReport:
        """Guesses the coins and says what that proves.

        Args:
            delta: of the claim that is tested.
            confidence: with which the lower bound holds.
            epsilon: the claim; by default what the optimizer's accountant says at ``delta``.

        Raises:
            ValueError: nothing was released yet, or no accountant and no ``epsilon``.
        """
        if not self.releases:
            raise ValueError("nothing was released: call watch(model, optimizer) before the training loop")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
        if epsilon is None:
            accountant = getattr(self._optimizer, "accountant", None)
            if accountant is None:
                raise ValueError("the optimizer has no accountant: pass the claim as epsilon=")
            epsilon = accountant.get_epsilon(delta)
        order = torch.argsort(self.scores).numpy()
        out, into = order[: self.each_side], order[-self.each_side :]
        correct = int(self.included[into].sum() + (~self.included[out]).sum())
        return AuditReport(
            canaries=self.count, guesses=2 * self.each_side, correct=correct, delta=delta, confidence=confidence,
            claimed=float(epsilon), releases=self.releases, scores=self.scores.numpy().copy(), included=self.included,
        )  # fmt: skip


def _shares(directions: Tensor, alignment: Tensor, noise_multiplier: float) -> Tensor:
    """Ridge estimate ``[canaries]`` of how much of each direction is in the release.

    The posterior mean for shares of variance 1/4 (a coin's) under the noise that is claimed, up to a factor.
    """
    gram = directions @ directions.t()
    gram.diagonal().add_(max(4 * noise_multiplier**2, 1e-6))
    return torch.linalg.solve(gram, alignment)
