"""The losses that a backward begins with, seen before it begins: only then is their graph still whole.

PyTorch has no hook for it, so ``torch.autograd.backward`` (which ``Tensor.backward`` and everything built on it call)
is replaced while somebody waits for a loss, and put back by the backward after which nobody does.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gsm.compiled import untraced

#: What is asked: ``judge(roots, grads, again)`` with the tensors and the gradients that a backward is to begin with,
#: and whether their graph is kept for another.
Judge = Callable[[Sequence[Tensor], Sequence[Any], bool], None]

_OURS = "_gsm_asks"  # functools.wraps hands it on to whoever replaces ours
_WAITING: weakref.WeakSet[Any] = weakref.WeakSet()
_JUDGES: dict[Judge, None] = {}  # copied in one go, as other threads may train, too


def wait(token: Any, judge: Judge) -> None:
    """Has ``judge`` asked before each backward, as long as a ``token`` lives and is not :func:`done` with."""
    _JUDGES[judge] = None
    _WAITING.add(token)
    if not hasattr(torch.autograd.backward, _OURS):
        torch.autograd.backward = _asking(torch.autograd.backward)


def done(token: Any) -> None:
    """Ends what :func:`wait` began with this token."""
    _WAITING.discard(token)


def _asking(ordinary: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(ordinary)
    def backward(*args: Any, **kwargs: Any) -> None:
        untraced(_backward, backward, ordinary, *args, **kwargs)

    backward.__dict__[_OURS] = True
    return backward


def _backward(
    ours: Callable[..., None],
    ordinary: Callable[..., None],
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    roots = list(tensors) if isinstance(tensors, Sequence) else [tensors]
    grads = list(grad_tensors) if isinstance(grad_tensors, Sequence) else [grad_tensors] * len(roots)
    for judge in tuple(_JUDGES) if len(_WAITING) else ():
        judge(roots, grads, bool(retain_graph or create_graph))
    if not len(_WAITING) and torch.autograd.backward is ours:
        _JUDGES.clear()
        torch.autograd.backward = ordinary
    ordinary(tensors, grad_tensors, retain_graph, create_graph, *args, **kwargs)
