"""The parts of private training - model, optimizer, loader - each made from its ordinary counterpart."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import opacus.accountants
import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule, prepare_module
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from opacus.optimizers import get_optimizer_class
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler
from torch.utils.data.distributed import DistributedSampler

import accountants
from gsm import validation
from gsm.clipping import Clipping
from gsm.loader import POISSON_SAMPLERS, DPDataLoader, batches_per_epoch, with_secure_shuffle
from gsm.optimizer import CLIPPING, DPOptimizer
from gsm.optimizer_checks import UNDRAWN
from gsm.passes import BY_PASSES, lacking, passes_of, watched
from gsm.wrapper import MODES, GradSampleModule

# `isinstance(ours, opacus.accountants.IAccountant)` holds: the interface is the same.
opacus.accountants.IAccountant.register(accountants.IAccountant)

OPACUS_MODES = ("ew", "no_op")
FIXED_BATCHES = (
    "poisson_sampling=False: batches are drawn as your loader draws them, but epsilon is computed for Poisson sampling "
    "at the same rate. For shuffled or fixed batches that is an approximation, not a guarantee: quote it as such, "
    "train with poisson_sampling=True, or name to the accountant what the loader does and have that certified, "
    "PrivacyEngine(accountant=PRVAccountant(sampling='shuffled', relation='zero_out'))."
)


def is_distributed(module: nn.Module) -> bool:
    """Whether the model is wrapped for data-parallel training over several processes."""
    inner = module._module if isinstance(module, AbstractGradSampleModule) else module
    return isinstance(inner, DifferentiallyPrivateDistributedDataParallel | DistributedDataParallel)


def check_parameters(module: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimizer holds parameters of this very model, and something to train.

    Raises TypeError if one of them is something else.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    names = {id(p): name for name, p in module.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [p for p in held if id(p) not in names]
    if strangers:
        raise ValueError(
            f"Module parameters are different than optimizer Parameters: {len(strangers)} of the optimizer's "
            f"{len(held)} tensors (the first has shape {tuple(strangers[0].shape)}) are not in the model. Make the "
            "optimizer after anything that replaces layers, get_compatible_module included."
        )
    if not any(p.requires_grad for p in held):
        raise ValueError(
            f"nothing to train: none of the optimizer's {len(held)} parameters requires a gradient. Unfreeze some with "
            "p.requires_grad_(True) before make_private."
        )


def private_model(module: nn.Module, *, mode: str, batch_first: bool, loss_reduction: str, wrap_model: bool) -> Any:
    """The model with per-sample gradients; an already wrapped one is returned if it fits the arguments.

    Raises:
        UnsupportedModuleError: layers in which samples influence each other, or a model in eval mode.
        ValueError: an unknown mode, or a wrapped model with other settings.
    """
    if mode not in (*MODES, *OPACUS_MODES):
        raise ValueError(f"unknown grad_sample_mode {mode!r}: choose one of {', '.join((*MODES, *OPACUS_MODES))}")
    validation.validate(module)
    if isinstance(module, AbstractGradSampleModule):
        _check_wrapper(module, mode=mode, batch_first=batch_first, loss_reduction=loss_reduction)
        return module
    if mode in OPACUS_MODES:
        return prepare_module(
            module, mode, wrap_model=wrap_model, batch_first=batch_first, loss_reduction=loss_reduction
        )
    # Without wrapping, the object returned only serves to clean up: its hooks sit on the model itself either way.
    return GradSampleModule(module, batch_first=batch_first, loss_reduction=loss_reduction, mode=mode)


def _check_wrapper(module: AbstractGradSampleModule, **wanted: Any) -> None:
    mode = wanted.pop("mode")
    has = {name: getattr(module, name) for name in wanted}
    if isinstance(module, GradSampleModule):
        wanted, has = {**wanted, "mode": mode}, {**has, "mode": module.mode}
    differing = [f"{n} is {has[n]!r} and {wanted[n]!r} is requested" for n in wanted if has[n] != wanted[n]]
    if differing:
        raise ValueError(
            f"Pre-existing GradSampleModule doesn't match new arguments: {'; '.join(differing)}. "
            "Pass the plain model (model.to_standard_module()) instead."
        )


def private_optimizer(
    optimizer: Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float | Sequence[float],
    expected_batch_size: float,
    loss_reduction: str,
    clipping: str | Clipping,
    generator: torch.Generator | None,
    secure_mode: bool,
    distributed: bool,
    mode: str,
    clipping_options: dict[str, Any],
) -> OpacusDPOptimizer:
    """The optimizer that clips, adds noise and charges.

    Raises:
        ValueError: an unknown clipping, or options that it does not have; the message lists those that it has.
    """
    if isinstance(optimizer, OpacusDPOptimizer):
        optimizer = optimizer.original_optimizer
    common: dict[str, Any] = {
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "expected_batch_size": expected_batch_size,
        "loss_reduction": loss_reduction,
        "generator": generator,
        "secure_mode": secure_mode,
    }
    if distributed:
        return _opacus_distributed(optimizer, clipping, mode, {**common, **clipping_options})
    return DPOptimizer(optimizer, clipping=make_clipping(clipping, clipping_options), **common)


def make_clipping(clipping: str | Clipping, options: dict[str, Any]) -> str | Clipping:
    """A clipping part from its name and its own options, or as it is if there are none."""
    if not options:
        return clipping
    cls = CLIPPING.get(clipping) if isinstance(clipping, str) else None
    known = [n for n in inspect.signature(cls).parameters if n != "max_grad_norm"] if cls else []
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"unknown keyword argument(s) {', '.join(unknown)}: clipping={clipping!r} takes "
            f"{', '.join(known) or 'no further ones'}"
        )
    assert cls is not None  # else nothing is known
    return cls(**options)


def _opacus_distributed(
    optimizer: Optimizer, clipping: str | Clipping, mode: str, options: dict[str, Any]
) -> OpacusDPOptimizer:
    """Opacus's optimizers that sum over processes; they read ``p.grad_sample``, so the model must leave it there."""
    if clipping not in ("flat", "per_layer") or mode not in ("hooks", "functorch", "loop"):
        raise ValueError(
            "a model under DistributedDataParallel takes clipping='flat' or 'per_layer', with grad_sample_mode="
            f"'hooks', 'functorch' or 'loop'; got clipping={clipping!r} with {mode!r}"
        )
    if options["secure_mode"]:
        raise ValueError("secure_mode is not available for a model under DistributedDataParallel")
    return get_optimizer_class(clipping=clipping, distributed=True, grad_sample_mode="hooks")(optimizer, **options)


def private_loader(
    loader: Any,
    *,
    poisson_sampling: bool,
    distributed: bool,
    secure_mode: bool,
    accountant: Any = None,
    batch_first: bool = True,
    rand_on_empty: bool = False,
) -> Any:
    """A Poisson loader, or with ``poisson_sampling=False`` the loader as it is (shuffling securely in secure mode, and
    with its passes watched if the accountant says that a record is in each)."""
    if poisson_sampling:
        return DPDataLoader.from_data_loader(
            loader,
            distributed=distributed,
            secure_mode=secure_mode,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )
    if not hasattr(loader, "dataset"):
        raise TypeError(f"the loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}")
    loader = with_secure_shuffle(loader) if secure_mode else loader
    assumed = getattr(accountant, "sampling", None)
    return watched(loader, assumed in BY_PASSES) if assumed in (*BY_PASSES, "unsampled") else loader


def check_assumption(accountant: Any, poisson_sampling: bool, loader: Any) -> None:
    """Compare what the accountant assumes about sampling with what the loader will do; ours say it, Opacus's do not.

    What a sampler of the user's own draws is not known: there, the name given to the accountant is taken for true.

    Raises:
        ValueError: batches will be Poisson samples and the accountant was told that they are something else, or the
            loader's sampler is one that draws in another way than the accountant was told.
    """
    assumed = getattr(accountant, "sampling", "poisson")
    if not poisson_sampling and assumed == "poisson":
        warnings.warn(FIXED_BATCHES, stacklevel=4)
    if poisson_sampling and assumed not in ("poisson", "unsampled"):
        raise ValueError(
            f"the accountant assumes {assumed!r} batches and poisson_sampling=True draws others: pass "
            "poisson_sampling=False, or an accountant with sampling='poisson'"
        )
    differs = None if poisson_sampling or assumed == "poisson" else other_than(assumed, loader)
    if differs:
        raise ValueError(
            f"the accountant assumes sampling={assumed!r}, but the loader {differs}: its epsilon would be too small. "
            "Give a loader with shuffle=True or shuffle=False to an accountant with sampling='shuffled', or train with "
            "poisson_sampling=True"
        )


def other_than(assumed: str, loader: Any) -> str | None:
    """What a loader of torch's does that ``assumed`` (a name of ``accountants.assumptions.SAMPLINGS``) denies."""
    batches, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    if isinstance(batches, POISSON_SAMPLERS):
        return "draws Poisson batches"
    if type(batches) is not BatchSampler and batches is not None:
        return None  # the user's own: its name is what we have
    count = len(loader.dataset) if hasattr(loader.dataset, "__len__") else None
    if getattr(sampler, "replacement", False):
        return f"draws with replacement ({type(sampler).__name__}), so a record can be in one batch several times"
    if isinstance(sampler, RandomSampler) and count is not None and sampler.num_samples > count:
        return f"draws {sampler.num_samples} records in a pass over {count}, so a record comes several times"
    if isinstance(sampler, DistributedSampler) and sampler.total_size > len(sampler.dataset):  # type: ignore[arg-type]
        return "has a DistributedSampler that repeats records until all processes have as many (drop_last=True drops)"
    once = isinstance(sampler, RandomSampler | SequentialSampler | SubsetRandomSampler | DistributedSampler)
    if assumed == "fixed_size" and once:
        return "cuts one order of all records into batches, which are not drawn independently of each other"
    return None


def draws_afresh(accountant: Any, loader: Any) -> bool:
    """Whether a record may be in any two batches, as the loader draws Poisson samples or the accountant was told so."""
    poisson = isinstance(getattr(loader, "batch_sampler", None), POISSON_SAMPLERS)
    return poisson or getattr(accountant, "sampling", None) in ("fixed_size", "unsampled")


def make_accountant(accountant: Any) -> Any:
    """An accountant object from a name registered here or with Opacus; an object is returned as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: an object that lacks an accountant's methods.
    """
    if isinstance(accountant, str):
        try:
            return accountants.create_accountant(accountant)
        except ValueError:
            try:
                return opacus.accountants.create_accountant(accountant)
            except ValueError:
                pass
            raise
    missing = [name for name in ("step", "get_epsilon", "mechanism", "state_dict") if not hasattr(accountant, name)]
    if missing or isinstance(accountant, type):
        raise TypeError(f"accountant must be a registered name or an accountant object, got {accountant!r}")
    return accountant


def charging(accountant: Any, loader: Any, sample_rate: float) -> Callable[[Any], None]:
    """A step hook that charges ``accountant``, and says where more was released than ``loader`` has drawn."""
    charge, passes = accountant.get_optimizer_hook_fn(sample_rate=sample_rate), passes_of(loader)
    sampler = passes or getattr(loader, "batch_sampler", None)
    releases = 0

    def hook(optimizer: Any) -> None:
        nonlocal releases
        releases += 1
        if getattr(sampler, "counted", True) and releases > getattr(sampler, "drawn", releases):
            warnings.warn(UNDRAWN, stacklevel=2)
        for noise_multiplier, rate in lacking(passes, accountant):
            accountant.step(noise_multiplier=noise_multiplier, sample_rate=rate)
        charge(optimizer)

    return hook


def meter(accountant: Any) -> Any:
    """What calibration asks: ours itself, as its sampling and relation are part of the question; of Opacus's the name,
    under which ours answers."""
    return accountant if isinstance(accountant, accountants.IAccountant) else accountant.mechanism()


def rate_of(loader: Any) -> float:
    """The sample rate of a loader: its own if it draws Poisson batches, else one over its number of batches."""
    own = getattr(getattr(loader, "batch_sampler", None), "sample_rate", None)
    return own if own is not None else 1 / batches_per_epoch(loader)


def passes(loader: Any, epochs: Any) -> Any:
    """``epochs`` over a loader in passes over the data: more where its sampler draws over 1 / sample_rate batches."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    own = getattr(sampler, "sample_rate", None)
    batches = 0 if own is None else len(sampler) * own
    return epochs * batches if batches > 1 + 1e-9 else epochs


def expected_batch_size(loader: Any, sample_rate: float, distributed: bool) -> float:
    """Records per batch and process on average, rounded down as in Opacus; what the noisy sum is divided by."""
    exact = len(loader.dataset) * sample_rate
    size: float = int(exact * (1 + 1e-12)) or exact
    return size / torch.distributed.get_world_size() if distributed else size
