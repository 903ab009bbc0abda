"""The two autograd functions through which gradients are captured.

Both save what they need through autograd, so activation checkpointing, saved-tensor hooks and the check for tensors
modified in place work as everywhere; both answer "no gradient" for the parameter, so autograd never computes the
batch gradient that nobody needs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Use(Protocol):
    """Who is told when the gradient of an output arrives."""

    batch_size: int

    def receive(self, saved: tuple[Tensor, ...], grad: Any) -> None: ...


class Tap(torch.autograd.Function):
    """Hands a layer's saved inputs and its output gradient to a use; the identity otherwise.

    The output is marked dirty rather than returned as a view or a copy, so that activations may work on it in place.
    That is wrong for outputs that autograd saved for their own backward (sigmoid) and costs a copy for views:
    then ``copy`` it is.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, use: Use, copy: bool, *saved: Tensor) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(*saved)
        if copy:
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        ctx.use.receive(saved, grad)
        return (grad, None, None, None) + (None,) * len(saved)


class TapMany(torch.autograd.Function):
    """:class:`Tap` for a layer with several outputs; gradients that never arrive count as zero."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, use: Use, n_out: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.use, ctx.n_out, ctx.n_all = use, n_out, len(tensors)
        ctx.save_for_backward(*tensors[n_out:])
        return tuple(y.clone() for y in tensors[:n_out])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.use.receive(ctx.saved_tensors, list(grads))
        return (None, None, None, *grads) + (None,) * (ctx.n_all - ctx.n_out)


class Expand(torch.autograd.Function):
    """One copy of a parameter per sample, ``[batch, *shape]``, sharing its memory: its gradient is per sample."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, use: Use, value: Tensor) -> Tensor:
        ctx.use = use
        return value.unsqueeze(0).expand(use.batch_size, *value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.use.receive((), grad)
        return None, None, None


class Poison(torch.autograd.Function):
    """A value whose gradient nobody can take apart by sample: asking for it is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, name: str) -> Tensor:
        ctx.name = name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            f"The model returned {ctx.name} without combining it with any sample, and the loss depends on it: its "
            "per-sample gradient is not defined. Use it inside the model's forward, or freeze it."
        )
