"""Which models can be trained privately, and how to fix those that cannot.

A model is refused where samples influence each other: then "the gradient of one record" does not exist and clipping
bounds nothing. Opacus's registry of validators and fixers decides, with two differences: layers that Opacus asks to be
replaced only because it has no per-sample gradients for them (recurrent layers, multi-head attention) are fine here,
and normalisation that mixes samples or keeps statistics of them is refused in train mode even where its parameters are
frozen or absent, because it does so all the same.
"""

from __future__ import annotations

import copy
from typing import Any

from opacus.validators.errors import IllegalModuleConfigurationError, ShouldReplaceModuleError, UnsupportedModuleError
from opacus.validators.module_validator import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

HANDLED_HERE = (nn.RNN, nn.GRU, nn.LSTM, nn.MultiheadAttention)


def _layer_errors(layer: nn.Module) -> list[Exception]:
    trainable = any(p.requires_grad for p in layer.parameters(recurse=False))
    keeps_statistics = isinstance(layer, _BatchNorm | _InstanceNorm)
    if type(layer) in HANDLED_HERE or not (trainable or (keeps_statistics and layer.training)):
        return []
    if isinstance(layer, _BatchNorm):
        return [
            ShouldReplaceModuleError(
                "BatchNorm makes every sample's output depend on the other samples of its batch, so a clipped gradient "
                "does not bound what one record contributes"
            )
        ]
    validator = ModuleValidator.VALIDATORS.get(type(layer))
    return validator(layer) if validator else []


def module_errors(module: nn.Module) -> list[Exception]:
    """What stands in the way of training ``module`` privately: one error per layer, with its path and the fix.

    Args:
        module: any model; the samples' influence on each other is judged by layer type, not by tracing.

    Returns:
        Opacus's error types; empty if there is nothing to object to.
    """
    errors: list[Exception] = []
    if not module.training:
        errors.append(IllegalModuleConfigurationError("Model needs to be in training mode: call model.train() first"))
    for path, layer in module.named_modules():
        for error in _layer_errors(layer):
            frozen = not any(p.requires_grad for p in layer.parameters())
            fix = "model = PrivacyEngine.get_compatible_module(model), before the optimizer is made"
            if frozen:
                fix += f", or model.get_submodule({path!r}).eval() to use its stored statistics"
            errors.append(type(error)(f"{path or 'the model itself'} ({type(layer).__name__}): {error}. Fix: {fix}."))
    return errors


def validate(module: nn.Module) -> None:
    """Raises ``opacus.validators.errors.UnsupportedModuleError`` if :func:`module_errors` finds anything."""
    errors = module_errors(module)
    if errors:
        raise UnsupportedModuleError(errors)


def get_compatible_module(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which every layer that cannot be trained privately is replaced by one that can.

    Batch normalisation becomes group normalisation, instance normalisation stops tracking statistics (Opacus's fixers
    do it); everything else, the weights included, is as it was. Make the optimizer after this: the parameters are new.

    Raises:
        UnsupportedModuleError: a layer has no registered fix, or the model is in eval mode.

    Example:
        >>> get_compatible_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]
        GroupNorm(8, 8, eps=1e-05, affine=True)
    """
    module = copy.deepcopy(module)
    replaced: dict[nn.Module, nn.Module] = {}
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        fixer = ModuleValidator.FIXERS.get(type(layer))
        if fixer is None or not _layer_errors(layer):
            continue
        if layer not in replaced:
            replaced[layer] = _moved_like(layer, fixer(layer))
        module = _with_replacement(module, path, replaced[layer])
    validate(module)
    return module


def _moved_like(old: nn.Module, new: nn.Module) -> nn.Module:
    reference: Any = next(old.parameters(), None)
    new.train(old.training)
    if reference is None:
        return new
    for p in new.parameters():
        p.requires_grad_(reference.requires_grad)
    return new.to(device=reference.device, dtype=reference.dtype)


def _with_replacement(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
    return root
