"""What a checkpoint of a private training holds, and when it belongs to the run that loads it.

The layout is Opacus's, with one entry more (``gsm_settings``), so checkpoints go both ways. The accountant's history is
the part that must not get lost: it is loaded last and only if everything else fitted, and never by halves.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from gsm.checkpoint_file import CheckpointError, plain, read, write

MODULE, ACCOUNTANT, OPTIMIZER = "module_state_dict", "privacy_accountant_state_dict", "optimizer_state_dict"
SETTINGS = "gsm_settings"
_PREFIX = "_module."


def save(
    path: Any,
    *,
    module: nn.Module,
    accountant: Any,
    optimizer: Any = None,
    schedulers: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    module_kwargs: Mapping[str, Any] | None = None,
    save_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write the state dicts of everything given; ``schedulers`` maps entry names to schedulers or None.

    Raises:
        CheckpointError: the optimizer is in the middle of a logical batch, or ``extra`` holds objects that could not be
            loaded safely.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be the torch.nn.Module to save, got {type(module).__name__}")
    if getattr(optimizer, "_is_last_step_skipped", False):
        raise CheckpointError(
            "the optimizer is in the middle of a logical batch: save after a step that updated the parameters, or call "
            "optimizer.discard_pending() first"
        )
    state = dict(extra or {})
    state[MODULE] = module.state_dict(**(module_kwargs or {}))
    state[ACCOUNTANT] = plain(dict(accountant.state_dict()))
    if optimizer is not None:
        state[OPTIMIZER] = optimizer.state_dict()
        state[SETTINGS] = _settings(optimizer)
    state.update({name: plain(s.state_dict()) for name, s in schedulers.items() if s is not None})
    write(path, state, **(save_kwargs or {}))


def load(
    path: Any,
    *,
    module: nn.Module,
    accountant: Any,
    optimizer: Any = None,
    schedulers: Mapping[str, Any],
    module_kwargs: Mapping[str, Any] | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the objects given, and return it without the entries that were consumed.

    Raises:
        CheckpointError: unreadable, incomplete, or of another accountant; nothing is changed then.
    """
    state = read(path, **(load_kwargs or {}))
    _check_complete(state, path)
    _check_accountant(state[ACCOUNTANT], accountant)
    saved = state.pop(OPTIMIZER, None)
    if optimizer is not None and saved:
        _check_optimizer(saved, optimizer)
    module.load_state_dict(_for_module(state[MODULE], module), **(module_kwargs or {}))
    if optimizer is not None and saved:
        optimizer.load_state_dict(saved)
        _compare_settings(state.pop(SETTINGS, {}), optimizer)
    elif (optimizer is not None) != bool(saved):
        missing = "holds no optimizer state" if optimizer is not None else "holds an optimizer state, but no optimizer"
        warnings.warn(f"the checkpoint {missing}{'' if optimizer is not None else ' was given'}", stacklevel=3)
    for name, scheduler in schedulers.items():
        found = state.pop(name, None)
        if scheduler is not None and found:
            scheduler.load_state_dict(found)
    accountant.load_state_dict(state[ACCOUNTANT])
    return state


def _check_complete(state: Mapping[str, Any], path: Any) -> None:
    missing = [name for name in (MODULE, ACCOUNTANT) if name not in state]
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of private training: it has no {' and no '.join(missing)}")
    for name in (MODULE, ACCOUNTANT):
        if not isinstance(state[name], Mapping):
            raise CheckpointError(f"{path}: {name} must be a state dict, got a {type(state[name]).__name__}")


def _check_accountant(saved: Mapping[str, Any], accountant: Any) -> None:
    theirs, ours = saved.get("mechanism"), accountant.mechanism()
    if theirs != ours:
        raise CheckpointError(
            f"the checkpoint's accountant is {theirs!r} and this engine's is {ours!r}: make the engine with "
            f"PrivacyEngine(accountant={theirs!r})"
        )
    for name, usual in (("sampling", "poisson"), ("relation", "add_remove")):
        was, now = saved.get(name, usual), getattr(accountant, name, usual)
        if was != now:
            raise CheckpointError(
                f"the checkpoint's accountant assumes {name}={was!r} and this engine's {name}={now!r}: loading would "
                f"make of the one the other. Give the engine an accountant with {name}={was!r}, as the steps so far "
                "were charged"
            )
    try:
        copy.deepcopy(accountant).load_state_dict(saved)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint's accountant state is not valid: {error}") from error
    taken = sum(entry[2] for entry in accountant.history)
    if taken:
        warnings.warn(
            f"{taken} steps on this engine's account are replaced by the checkpoint's: if anything of them "
            "was published or kept, they must be accounted for separately",
            stacklevel=4,
        )


def _check_optimizer(saved: Mapping[str, Any], optimizer: Any) -> None:
    """Torch loads the state of any optimizer into any other, which then fails, or not, at its next step."""
    ours = set(optimizer.defaults)
    for group in saved.get("param_groups", ()):
        missing, unknown = sorted(ours - set(group)), set(group) - ours - {"params", "param_names", "initial_lr"}
        if missing and unknown:  # one of them alone: another version of torch, or a scheduler's entries
            name = type(getattr(optimizer, "original_optimizer", optimizer)).__name__
            raise CheckpointError(
                f"the checkpoint's optimizer is no {name}: it has no {', '.join(missing)}. Load it with the kind of "
                "optimizer that it was written with, or without optimizer=, to begin anew with another"
            )


def _settings(optimizer: Any) -> dict[str, Any]:
    names = ("noise_multiplier", "sample_rate", "expected_batch_size", "loss_reduction")
    return {name: plain(getattr(optimizer, name, None)) for name in names}


def _compare_settings(saved: Mapping[str, Any], optimizer: Any) -> None:
    """Warn where the run continues with other settings. Each step is charged with its own: the account stays right."""
    now = _settings(optimizer)
    differing = [f"{n} was {saved[n]} and is now {now[n]}" for n in now if n in saved and saved[n] != now[n]]
    if differing:
        warnings.warn(
            f"the training continues with other settings than the checkpoint's: {'; '.join(differing)}. Steps so far "
            "stay charged as they were, later ones are charged with the new settings.",
            stacklevel=4,
        )


def _for_module(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A model's state with or without the wrapper's prefix, as ``module`` has it."""
    wrapped = all(key.startswith(_PREFIX) for key in state) and bool(state)
    wants = all(key.startswith(_PREFIX) for key in module.state_dict())
    if wrapped and not wants:
        return {key.removeprefix(_PREFIX): value for key, value in state.items()}
    return {_PREFIX + key: value for key, value in state.items()} if wants and not wrapped else dict(state)
