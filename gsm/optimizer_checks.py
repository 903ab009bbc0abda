"""What :class:`gsm.optimizer.DPOptimizer` refuses, and the messages a user gets."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from gsm import ledger, unsaved  # noqa: F401  (unsaved: what pickled parameters leave out)

NO_BACKWARD = (
    "No per-sample gradients: nothing was captured since the last step() or zero_grad(). Run a forward of the wrapped "
    "model in train mode and loss.backward() (without inputs=) before step(), and no zero_grad() between the two. If "
    "you did, the optimizer holds other parameters than that model: it was copied, or its parameters were replaced "
    "(load_state_dict(assign=True)) after the optimizer was made."
)
FORGOTTEN = (
    "The gradients of the last step() are still there: call optimizer.zero_grad() once per step (before the next "
    "backward), or the same records would enter two releases."
)
ACCUMULATED = (
    "{n} backward passes before one step(). They may hold the same records, so their clipping bounds add up and the "
    "noise is scaled by the total. If they are disjoint parts of one logical batch, call optimizer.virtual_step() "
    "after each of them but the last."
)
OVERLAPPING = (
    "virtual_step() or signal_skip_step() joined batches that the loader drew independently (Poisson sampling, or "
    "another pass over the data), so one record can be in several of them: their clipping bounds add up and the noise "
    "is scaled by the total. For a large logical batch in small pieces, pass max_physical_batch_size= to "
    "make_private() and call step() for every piece; call discard_pending() before another pass begins."
)

MORE_RECORDS = (
    "{batches} release(s) held {rows} records, where expected_batch_size={expected:g} was promised for each. The "
    "accountant is charged for a sample rate of {rate}: if that comes from the same batch size, epsilon is too small. "
    "Give the size of a whole logical batch (and the rate that belongs to it)."
)
UNCHARGED = (
    "This optimizer has no accountant, and a PrivacyEngine keeps an account for the parameters that it trains: what it "
    "releases is missing there. Use the optimizer that make_private returned, or set optimizer.accountant and "
    "optimizer.sample_rate."
)
JOINED = (
    "virtual_step() joined {parts} parts of {rows} records in all to one logical batch, where {expected:g} records are "
    "expected: parts left over by an epoch that ended within a logical batch? A record that is in the next epoch's "
    "first parts, too, contributes twice the bound. Call discard_pending() before another pass begins (and after the "
    "last step), or take a step() for what is left."
)
SCALED = (
    "torch's GradScaler cannot drive a private optimizer: it skips the steps in which some gradient overflowed, which "
    "tells something about single records without noise, and it multiplies the gradients that are to be clipped. Use "
    "bfloat16 autocast, which needs no scaler, or GradScaler(enabled=False): overflowing samples are left out anyway."
)
UNDRAWN = (
    "There were more releases than batches drawn by the loader that make_private returned for this optimizer: a batch "
    "was used twice, or came from somewhere else (the original loader?). The accountant charges every release as a "
    "batch that this loader drew for it, so its epsilon does not hold for this loop. Take one step() per batch of the "
    "returned loader."
)
MORE_ROWS = (
    "The model was called on {rows} rows, but the loader had drawn {records} records: every row is clipped on its own, "
    "so a record with several rows (tokens, windows, augmentations, two drawn batches put together) contributes "
    "several times the bound. Keep one row per record (positions in a further dimension), take a step for every batch, "
    "or clip all rows of a record together with clipping=UserClipping(). If the further rows are no private data, "
    "nothing is wrong."
)
FEWER_ROWS = (
    "The model was called on {rows} rows, fewer than the loader had drawn records ({records}). Where rows are cut off "
    "by number (x[:n], to fit the memory) or several records are packed into one row, one record more in the batch "
    "moves another one's contribution: the sum changes by up to twice the bound, and epsilon does not hold. For large "
    "batches use max_physical_batch_size=, and give every record a row of its own. If each row was left out for what "
    "it holds alone, nothing is wrong."
)
LARGER = (
    "This batch holds {rows} of {records} records, and the accountant is to be charged for batches of a share of "
    "{rate:.6g}: its epsilon would be too small. make_private took 1 / len(loader) for the share. Let the batch "
    "sampler's length be the number of records over the batch size, or set optimizer.sample_rate = {share:.6g} (and "
    "choose the noise for that rate)."
)
LOWER = (
    "optimizer.sample_rate is {rate:g}, and the loader draws every record with probability {drawn:g}: the accountant "
    "would be charged too little. Leave the rate as make_private set it, or give the loader another one."
)
SHARED = (
    "The {records} records of this batch belong to {users} users. The loader draws records, each with probability "
    "{rate:g}, and that is what the accountant is charged; a user with k records is drawn with probability "
    "1 - (1 - {rate:g})^k, so epsilon does not hold for users. Make one item of the dataset of all records of a user, "
    "or set optimizer.sample_rate to that probability for the user with most records."
)
SEVERAL_RANKS = (
    "gsm.DPOptimizer works in one process, and torch.distributed has {n}: nothing would be summed over them, so every "
    "process would clip, noise and charge on its own and end with weights of its own. Wrap the model in "
    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel and pass it to make_private(..., mode='hooks'), "
    "whose optimizer sums over the processes. To train independent models, start them without init_process_group."
)


def check_settings(
    optimizer: Any,
    expected_batch_size: float | None,
    loss_reduction: str,
    generator: Any,
    secure_mode: bool,
    noise: Any,
) -> None:
    """Raises TypeError or ValueError for arguments of DPOptimizer that make no sense."""
    check_alone()
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"DPOptimizer wraps a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, OpacusDPOptimizer):
        raise ValueError("This optimizer is private already: wrap optimizer.original_optimizer instead.")
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise ValueError(
            f"{type(optimizer).__name__} cannot be private: "
            + (
                "it evaluates the loss several times per step and compares the values, which no noise covers. "
                if isinstance(optimizer, torch.optim.LBFGS)
                else "which rows of a gradient are zero tells which tokens occurred, so a release is dense. "
            )
            + "Use SGD, Adam or another first-order optimizer for dense gradients."
        )
    check_reduction(loss_reduction, expected_batch_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if secure_mode and generator is not None:
        raise ValueError(
            "secure_mode takes its key from the operating system; a torch.Generator can be predicted. Pass only one."
        )
    if noise is not None and (secure_mode or generator is not None):
        raise ValueError("noise= brings its own randomness: pass it without generator= and secure_mode=.")


def check_reduction(loss_reduction: str, expected_batch_size: float | None) -> None:
    """What the sum is divided by must be known; both can be assigned between two steps."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"Unexpected value for loss_reduction: {loss_reduction!r}; it is 'mean' or 'sum'.")
    if loss_reduction == "mean" and expected_batch_size is None:
        raise ValueError("You must provide expected_batch_size if loss_reduction is mean: the sum is divided by it.")


def check_wrapped(optimizer: Optimizer, params: Sequence[nn.Parameter], loss_reduction: str) -> None:
    """Raises ValueError for parameters that no wrapper captures, or whose wrapper scales gradients otherwise."""
    check_alone()  # the processes may have been connected after the optimizer was made
    tapes = [ledger.tape_of(p) for p in params]
    lost = [p for p, tape in zip(params, tapes, strict=True) if tape is None and not hasattr(p, "grad_sample")]
    if lost:
        names = ", ".join(describe(optimizer, p) for p in lost[:5])
        raise ValueError(
            f"Per sample gradient not found: the optimizer holds {len(lost)} trainable parameter(s) that no "
            f"GradSampleModule captures ({names}). Wrap the model that owns them, or take "
            "them out of the optimizer, or freeze them."
        )
    other = {tape.loss_reduction for tape in tapes if tape is not None} - {loss_reduction}
    if other:
        raise ValueError(
            f"The model was wrapped with loss_reduction={other.pop()!r}, the optimizer has loss_reduction="
            f"{loss_reduction!r}: per-sample gradients would be scaled by the batch size. Give both the same."
        )


def check_alone() -> None:
    """Raises ValueError where several processes train: this optimizer does not sum over them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(SEVERAL_RANKS.format(n=dist.get_world_size()))


def checked_rate(accountant: Any, sample_rate: float | None) -> float:
    """The sample rate; raises TypeError or ValueError where nothing could be charged."""
    if not callable(getattr(accountant, "step", None)):
        raise TypeError(
            f"optimizer.accountant must be an accountant, got {accountant!r}: accountants.create_accountant makes one."
        )
    if sample_rate is None:
        raise ValueError("optimizer.accountant is set but optimizer.sample_rate is not: set both.")
    if not (isinstance(sample_rate, Real) and 0 <= sample_rate <= 1):
        raise ValueError(f"optimizer.sample_rate must lie in [0, 1], got {sample_rate!r}.")
    return float(sample_rate)


def check_finite(optimizer: Optimizer, params: Sequence[nn.Parameter], sums: Sequence[Tensor], weights: Tensor) -> None:
    """Raises FloatingPointError where a sample that was excluded still reached a sum (0 * inf is NaN)."""
    for p, total in zip(params, sums, strict=True):
        if not bool(torch.isfinite(total).all()):
            silenced = weights if weights.dim() == 1 else weights.amin(0)
            samples = (silenced == 0).nonzero().flatten().tolist()[:5]
            raise FloatingPointError(
                f"The gradient of sample(s) {samples} of this batch is not finite and could not be left out of the "
                f"sum for {describe(optimizer, p)}. Look for an overflow in the "
                "forward pass (half precision?) or for bad input."
            )


def describe(optimizer: Optimizer, param: nn.Parameter) -> str:
    """A name for a parameter: the model's own if known, else its place in the optimizer."""
    tape = ledger.tape_of(param)
    name = tape.names.get(id(param)) if tape is not None else None
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p is param and name is None:
                name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}]['params'][{j}]"
    return f"{name} of shape {tuple(param.shape)}"
