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

#: What is asked: ``judge(roots, grads, again)`` with the tensors and the gradients that a backward is to begin with,
#: and whether their graph is kept for another.
Judge = Callable[[Sequence[Tensor], Sequence[Any], bool], None]

_WAITING: weakref.WeakKeyDictionary[Any, Judge] = weakref.WeakKeyDictionary()


def wait(token: Any, judge: Judge) -> None:
    """Has ``judge`` asked before each backward, as long as ``token`` lives and until :func:`done` with it."""
    _WAITING[token] = judge
    if not hasattr(torch.autograd.backward, "_gsm_ordinary"):
        torch.autograd.backward = _asking(torch.autograd.backward)


def done(token: Any) -> None:
    """Ends what :func:`wait` began with this token."""
    _WAITING.pop(token, None)


def _asking(ordinary: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(ordinary)
    def backward(
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        roots = list(tensors) if isinstance(tensors, Sequence) else [tensors]
        grads = list(grad_tensors) if isinstance(grad_tensors, Sequence) else [grad_tensors] * len(roots)
        for judge in dict.fromkeys(_WAITING.values()):
            judge(roots, grads, bool(retain_graph or create_graph))
        if not _WAITING and torch.autograd.backward is backward:
            torch.autograd.backward = ordinary
        ordinary(tensors, grad_tensors, retain_graph, create_graph, *args, **kwargs)

    backward._gsm_ordinary = ordinary  # type: ignore[attr-defined]
    return backward
