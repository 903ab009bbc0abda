"""On whose account a model was trained: a further engine on the same records would count from zero."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# By parameter, which outlives wrappers and optimizers: the accountant, and the data set.
_TRAINED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_one_account(params: Iterable[nn.Parameter], accountant: Any, dataset: Any) -> None:
    """Remembers that ``accountant`` is charged for ``params`` on ``dataset``; warns where another one was before.

    Composition adds up over all releases about a record (Abadi et al. 2016, theorem 2.1, holds for one sequence of
    them). Only the same objects are recognised: a copied model, or another object with the same records, is not.
    """
    lost = 0
    for p in params:
        earlier, data = _TRAINED.get(p, (None, None))
        spent = list(getattr(earlier, "history", ()))
        if list(getattr(accountant, "history", spent))[: len(spent)] != spent and data() is dataset:
            lost = max(lost, sum(entry[2] for entry in spent))
        _TRAINED[p] = (accountant, _weakly(dataset))
    if lost:
        warnings.warn(
            f"This model was trained on this data set before, on another account with {lost} steps: get_epsilon() of "
            "this engine leaves them out. Keep one engine for all rounds, or give each the same accountant, "
            "PrivacyEngine(accountant=first.accountant). If the model was set back to weights that never saw the "
            "data, and the earlier ones stay unpublished, ignore this.",
            stacklevel=4,
        )


def has_account(param: nn.Parameter) -> bool:
    """Whether an engine keeps an account for this parameter."""
    return param in _TRAINED


def _weakly(held: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(held)
    except TypeError:  # a list, say
        return lambda: held
