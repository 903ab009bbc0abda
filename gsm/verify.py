"""Are the per-sample gradients of this very model right? A check to run on a few samples before a long training.

What is right is what a loop finds that gives the model one sample at a time and lets autograd do the rest. Everything
runs on copies of the model; random state is put back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from torch import Tensor, nn

from gsm.contributions import Record
from gsm.ledger import collect
from gsm.planner import Planner
from gsm.random_numbers import RandomNumbers, Settled, own_generators, settled
from gsm.structures import tensors_in
from gsm.undisturbed import NoDropout
from gsm.verify_influence import alone_differs, influence
from gsm.verify_report import VerificationReport
from gsm.verify_samples import Inputs, Loss, own_loss, users_loss
from gsm.wrapper import GradSampleModule, _strip

HALF = (torch.float16, torch.bfloat16)
#: The uniform number behind what a model draws during the check: neither the middle, where noise is 0, nor an end.
DRAWN = 0.7


def verify(
    model: nn.Module, inputs: Any, *, loss: Callable[..., Tensor] | None = None, rtol: float = 1e-4
) -> VerificationReport:
    """Compares per-sample gradients and norms with a one-sample loop, and checks that no sample influences another.

    A plain model is checked in the modes "hooks" and "ghost", a wrapped one in its own mode and with its own settings.
    Dropout is off during the check, other random numbers are the same for every sample, and half precision is checked
    in float32.

    Args:
        model: wrapped or plain; it is left untouched (copies are run).
        inputs: two samples or more: a tensor, a tuple of positional or a dict of keyword arguments. Tensors whose batch
            dimension has another size are handed over as they are; choose a number of samples that is no other size.
        loss: from the model's output to a scalar, called with the batch and with each sample alone. If it needs
            targets, let it take the samples' indices too: ``lambda out, rows: F.cross_entropy(out, y[rows])``. By
            default a fixed random projection of every output.
        rtol: allowed error relative to a gradient's norm, or to 1e-2 of the whole model's (1e-6 of it in float64) where
            that is more: rounding is relative to the terms of a sum, not to the sum.

    Returns:
        A report; ``report.ok``, and ``print(report)`` names what is wrong. It says nothing about other input shapes,
        about code paths that these samples do not take, or about the noise.

    Raises:
        ValueError: fewer than two samples, no trainable parameter, a loss that is no scalar.
        Whatever the model itself raises on ``inputs``.

    Example:
        >>> report = verify(model, torch.randn(4, 3, 32, 32))
        >>> assert report.ok, report
    """
    wrapped = isinstance(model, GradSampleModule)
    if isinstance(model, AbstractGradSampleModule) and not wrapped:
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__name__}: pass the plain model.")
    settings: dict[str, Any] = {"batch_first": True, "loss_reduction": "mean", "strict": True, "memory_budget": None}
    modes: tuple[str, ...] = ("hooks", "ghost")
    if isinstance(model, GradSampleModule):
        settings, modes = {name: getattr(model, name) for name in settings}, (model.mode,)
    batch = Inputs(inputs, settings["batch_first"])
    report = VerificationReport(batch.size, rtol, modes)
    with torch.random.fork_rng(devices=_devices(model)), torch.enable_grad(), NoDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = _deterministic_copy(model._module if wrapped else model, report)
        if any(p.dtype in HALF for p in plain.parameters()):
            plain = plain.float()
            batch = batch.map(lambda x: x.float() if x.dtype in HALF else x)
            report.notes.append("half precision was checked in float32")
        _verify(report, plain, batch, loss, settings, settings["loss_reduction"] if wrapped else None)
    return report


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})


def _deterministic_copy(model: Any, report: VerificationReport) -> nn.Module:
    plain = copy.deepcopy(model)
    _strip(plain)
    if not any(p.requires_grad for p in plain.parameters()):
        raise ValueError("The model has no trainable parameter: there is no gradient to verify.")
    off = []
    for path, module in plain.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            module.training = False
            off.append(path or "the model")
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.training and module.dropout > 0:
            module.dropout = 0.0
            off.append(path or "the model")
    if off:
        report.notes.append(f"dropout was off: {', '.join(off[:5])}{' ...' if len(off) > 5 else ''}")
    return plain


def _verify(report: VerificationReport, plain: nn.Module, batch: Inputs, *how: Any) -> None:
    """:func:`_verify_settled`, with random numbers held still if the forward draws any."""
    drawn = RandomNumbers(_devices(plain), own_generators(plain))
    batch(plain)
    if not drawn.drawn() and _repeats(plain, batch):
        return _verify_settled(report, plain, batch, *how)
    with settled(0), Settled(DRAWN, DRAWN):
        if _repeats(plain, batch):
            report.notes.append("the model's random numbers were one and the same for every sample")
            return _verify_settled(report, plain, batch, *how)
    report.problems.append(
        "The forward draws random numbers, from a generator that cannot be held still, so a sample alone and the same "
        "sample in the batch cannot be compared: switch that off for the check (a layer in eval mode, a fixed noise)."
    )


def _verify_settled(
    report: VerificationReport,
    plain: nn.Module,
    batch: Inputs,
    user: Any,
    settings: dict[str, Any],
    reduction: str | None,
) -> None:
    """The comparison, for a forward that gives the same every time."""
    together, rows = _run(plain, batch), torch.arange(batch.size)
    try:
        alone = [_run(plain, batch.pick(rows[i : i + 1])) for i in range(batch.size)]
    except Exception as error:
        report.problems += influence(plain, batch, report.rtol, None)
        report.problems.append(
            f"The model cannot run on one sample alone ({type(error).__name__}: {error}), so the gradient of one "
            "sample is not defined: replace layers that need a batch, such as BatchNorm in training mode."
        )
        return
    mixing = influence(plain, batch, report.rtol, alone[0])
    report.problems += mixing or alone_differs(together, alone, report.rtol)
    loss = users_loss(user) if user else own_loss(together, alone[0], reduction or "mean")
    found = _reduction(report, loss, together, alone, rows, reduction)
    if found is None:
        return
    truth = _loop(plain, batch, loss, rows)
    settings = {**settings, "loss_reduction": found}
    for mode in report.modes:
        _compare(report, plain, batch, loss, truth, mode, settings)
        if mode in ("ghost", "auto"):
            # Other shapes than these may get the other reading, and a sampler has a function for each.
            _compare(report, plain, batch, loss, truth, mode, settings, planner=KeepsNothing(mode))


class KeepsNothing(Planner):
    """Reads every norm and every sum from the captured pair."""

    def keeps(self, record: Record, key: object) -> bool:
        return False


def _run(model: nn.Module, batch: Inputs, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return batch(model)


def _repeats(model: nn.Module, batch: Inputs) -> bool:
    """Whether the forward gives the same with other random numbers."""
    a, b = (_run(model, batch, seed) for seed in (0, 1))
    return all(torch.equal(x, y) or torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
               for x, y in zip(tensors_in(a), tensors_in(b), strict=True))


def _reduction(
    report: VerificationReport, loss: Loss, together: Any, alone: list[Any], rows: Tensor, wanted: str | None
) -> str | None:
    """How the loss combines the samples' own losses: "mean" or "sum"; None, and a problem, if it is not as wanted."""
    try:
        own = torch.stack([loss(out, rows[i : i + 1]).detach().double() for i, out in enumerate(alone)])
    except Exception as error:
        raise ValueError(
            f"loss failed on the output of one sample alone ({type(error).__name__}: {error}). If it holds the "
            "targets of the whole batch, let it take the samples' indices too: "
            "loss=lambda out, rows: criterion(out, targets[rows])."
        ) from error
    value = loss(together, rows).detach().double()
    fits = {"mean": own.mean(), "sum": own.sum()}
    allowed = {"mean": report.rtol * own.abs().mean(), "sum": report.rtol * own.abs().sum()}
    found = [name for name in fits if abs(value - fits[name]) <= allowed[name]]
    if wanted is None and found or wanted in found:
        return wanted or found[0]
    if found:
        report.problems.append(
            f"The loss is the {found[0]} of the samples' own losses, but the model is wrapped with loss_reduction="
            f"{wanted!r}: every per-sample gradient is off by a factor of the batch size. Give both the same."
        )
    else:
        report.problems.append(
            f"The loss of the batch ({value:.6g}) is neither the mean ({fits['mean']:.6g}) nor the sum "
            f"({fits['sum']:.6g}) of the samples' own losses, so one sample's share depends on the others. "
            "Padding or class weights counted over the whole batch do that: average within each sample first, then "
            "over the samples."
        )
    return None


def _loop(plain: nn.Module, batch: Inputs, loss: Loss, rows: Tensor) -> dict[str, Tensor]:
    """Ground truth ``{name: [batch, *shape]}``: the gradient of each sample's own loss, alone in its batch."""
    params = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {n: [] for n in params}
    for i in range(batch.size):
        value = loss(_run(plain, batch.pick(rows[i : i + 1])), rows[i : i + 1])
        if not value.requires_grad:
            raise ValueError("The loss does not depend on any trainable parameter: there is no gradient to verify.")
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for (name, p), g in zip(params.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g.to_dense().detach())
    return {n: torch.stack(g) for n, g in found.items()}


def _compare(
    report: VerificationReport,
    plain: nn.Module,
    batch: Inputs,
    loss: Loss,
    truth: dict[str, Tensor],
    mode: str,
    settings: dict[str, Any],
    planner: Planner | None = None,
) -> None:
    """One forward and one backward of a wrapped copy in ``mode``, and its three readings against the truth."""
    rows = torch.arange(batch.size)
    try:
        model = GradSampleModule(copy.deepcopy(plain), mode=mode, **settings)
        model._tape.planner = planner or model._tape.planner
        model._tape.trusts_samplers = True  # else the first wrong one would end the comparison
        loss(_run(model, batch), rows).backward()
        params = [p for _, p in model.trainable_parameters()]
        (captured,) = collect(params)
        norms = captured.squared_norms().sqrt()
        picked = [captured.weighted_sum(row) for row in torch.eye(batch.size, device=norms.device)]
        weights = torch.linspace(0.5, 1.5, batch.size, device=norms.device)
        sums = captured.weighted_sum(weights)
    except Exception as error:
        report.refused(mode, error)
        return
    lengths = {n: _lengths(g) for n, g in truth.items()}
    whole = torch.stack(list(lengths.values())).norm(dim=0).max()
    for k, (name, expected) in enumerate(truth.items()):
        entry = model.plan[name]
        handled = f"{entry.type}, {entry.rung}: {entry.why}"
        floor = whole * (1e-6 if expected.dtype == torch.float64 else 1e-2)
        scale = torch.maximum(lengths[name], floor)
        gradient = torch.stack([s[k] for s in picked]).to(expected.dtype)
        report.compare(name, mode, "gradient", handled, _lengths(gradient - expected), scale)
        report.compare(name, mode, "norm", handled, (norms[k].to(expected.dtype) - lengths[name]).abs(), scale)
        total = torch.tensordot(weights.to(expected.dtype), expected, 1)
        off = (sums[k].to(expected.dtype) - total).norm().reshape(1)
        report.compare(name, mode, "weighted sum", handled, off, scale.max().reshape(1))


def _lengths(gradients: Tensor) -> Tensor:
    """``[batch, *shape]`` to ``[batch]``, numbers without a shape included."""
    return gradients.reshape(len(gradients), -1).norm(dim=1)
