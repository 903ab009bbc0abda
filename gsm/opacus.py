"""Opacus's own names, with this library behind them: an unmodified script that imports ``opacus`` runs on ``gsm``.

Everything a script gets hold of by name - engine, wrappers, optimizers, loaders, samplers of batches, accountants,
calibration - is replaced in every ``opacus`` module that holds it, so ``from opacus.optimizers import DPOptimizer`` and
Opacus's own helper functions see the same classes. What has no counterpart here stays Opacus's: the modes "ew" and
"no_op", the optimizers for several processes, its layers, validators and schedulers. Samplers registered with
``opacus.grad_sample.register_grad_sampler`` are honoured with and without this.

What a script already holds (``from opacus import PrivacyEngine`` before ``install()``) it keeps.

Example:
    >>> import gsm.opacus
    >>> gsm.opacus.install()
    >>> from opacus import PrivacyEngine          # gsm.PrivacyEngine
    >>> with gsm.opacus.installed():              # or for a while only
    ...     run_the_script()
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import opacus
from opacus.accountants import registry as opacus_registry

import accountants
import accountants.registry
from gsm import opacus_classes
from gsm.engine import PrivacyEngine
from gsm.loader import DPDataLoader
from gsm.optimizer import DPOptimizer
from gsm.physical_batches import BatchMemoryManager
from gsm.sampling import DistributedPoissonSampler, PoissonSampler
from gsm.wrapper import GradSampleModule

#: Where a name is defined in Opacus, and what stands for it here.
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "opacus.privacy_engine": {"PrivacyEngine": PrivacyEngine},
    "opacus.grad_sample.grad_sample_module": {
        "GradSampleModule": GradSampleModule,
        "GradSampleHooks": GradSampleModule,
    },
    "opacus.grad_sample.grad_sample_module_fast_gradient_clipping": {
        "GradSampleModuleFastGradientClipping": opacus_classes.GradSampleModuleFastGradientClipping,
        "GradSampleHooksFastGradientClipping": opacus_classes.GradSampleModuleFastGradientClipping,
    },
    "opacus.optimizers.optimizer": {"DPOptimizer": DPOptimizer},
    "opacus.optimizers.optimizer_fast_gradient_clipping": {"DPOptimizerFastGradientClipping": DPOptimizer},
    "opacus.optimizers.perlayeroptimizer": {"DPPerLayerOptimizer": opacus_classes.DPPerLayerOptimizer},
    "opacus.optimizers.adaclipoptimizer": {"AdaClipDPOptimizer": opacus_classes.AdaClipDPOptimizer},
    "opacus.data_loader": {"DPDataLoader": DPDataLoader},
    "opacus.utils.uniform_sampler": {
        "UniformWithReplacementSampler": PoissonSampler,
        "DistributedUniformWithReplacementSampler": DistributedPoissonSampler,
    },
    "opacus.utils.batch_memory_manager": {
        "BatchMemoryManager": BatchMemoryManager,
        "wrap_data_loader": opacus_classes.wrap_data_loader,
    },
    "opacus.utils.fast_gradient_clipping_utils": {
        "DPLossFastGradientClipping": opacus_classes.DPLossFastGradientClipping
    },
    "opacus.utils.adaptive_clipping.adaptive_clipping_utils": {
        "PrivacyEngineAdaptiveClipping": opacus_classes.PrivacyEngineAdaptiveClipping
    },
    "opacus.accountants.rdp": {"RDPAccountant": accountants.RDPAccountant},
    "opacus.accountants.gdp": {"GaussianAccountant": accountants.GaussianAccountant},
    "opacus.accountants.prv": {"PRVAccountant": accountants.PRVAccountant},
    "opacus.accountants.utils": {"get_noise_multiplier": opacus_classes.get_noise_multiplier},
}

# Further modules that hold some of these names and that `import opacus` may leave out.
_HOLDERS = ("opacus.schedulers", "opacus.utils.per_sample_gradients_utils", "opacus.lightning")
# Opacus's own numerics, which its accountants go on using where a script holds one of them.
_LEFT_ALONE = "opacus.accountants.analysis"

_MISSING = object()
# What was there before: (dictionary, key, original); empty while nothing is installed.
_undo: list[tuple[dict[str, Any], str, Any]] = []


def install() -> None:
    """Put this library behind Opacus's names. Calling it again changes nothing; one :func:`uninstall` undoes it.

    Raises:
        ImportError: an Opacus that lacks a name to replace (this is written for 1.6); nothing is replaced then.
    """
    if _undo:
        return
    ours = {id(theirs): replacement for (_, theirs), replacement in _pairs()}
    for place in _places():
        for name, value in list(place.items()):
            if id(value) in ours:
                _put(place, name, ours[id(value)])
    for name, accountant in accountants.registry._ACCOUNTANTS.items():
        _put(opacus_registry._ACCOUNTANTS, name, accountant)


def uninstall() -> None:
    """Put everything back as it was before :func:`install`, also in modules that were imported since then."""
    if not _undo:
        return
    known = {id(place) for place, _, _ in _undo}
    for place, name, original in reversed(_undo):
        if original is _MISSING:
            place.pop(name, None)
        else:
            place[name] = original
    _undo.clear()
    theirs = {(name, id(replacement)): original for (name, original), replacement in _pairs()}
    for place in _places():
        if id(place) not in known:
            place.update({n: theirs[n, id(v)] for n, v in place.items() if (n, id(v)) in theirs})


@contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for a ``with`` block, which leaves everything as it found it, nested or not."""
    before = bool(_undo)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _put(place: dict[str, Any], name: str, value: Any) -> None:
    _undo.append((place, name, place.get(name, _MISSING)))
    place[name] = value


def _pairs() -> list[tuple[tuple[str, Any], Any]]:
    """``((name, Opacus's object), ours)``; only right while nothing is installed."""
    pairs = []
    for module, names in REPLACEMENTS.items():
        for name, replacement in names.items():
            try:
                pairs.append(((name, getattr(importlib.import_module(module), name)), replacement))
            except (ImportError, AttributeError) as error:
                raise ImportError(
                    f"Opacus {opacus.__version__} has no {module}.{name}: install() is written for Opacus 1.6 "
                    '(pip install "opacus>=1.6,<1.7"), or use the classes of gsm directly.'
                ) from error
    return pairs


def _places() -> list[dict[str, Any]]:
    """The name tables of all Opacus modules that are loaded or that can be."""
    for holder in _HOLDERS:
        with suppress(ImportError):  # lightning is optional
            importlib.import_module(holder)
    loaded = [(n, m) for n, m in list(sys.modules.items()) if n == "opacus" or n.startswith("opacus.")]
    return [vars(m) for n, m in loaded if m is not None and not n.startswith(_LEFT_ALONE)]
