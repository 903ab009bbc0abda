"""Taking a batch apart into samples, and outputs to scalars: what :func:`gsm.verify` needs of a model's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from gsm.capture import batch_size
from gsm.structures import tensors_in

Loss = Callable[[Any, Tensor], Tensor]


class Inputs:
    """A model's arguments, and how to pick samples from them.

    Args:
        values: a tensor, a tuple (positional) or a mapping (keywords).
        batch_first: whether the batch is the first dimension of tensors with two or more.
    """

    def __init__(self, values: Any, batch_first: bool):
        self.batch_first = batch_first
        self.kwargs: dict[str, Any] = dict(values) if isinstance(values, Mapping) else {}
        self.args: tuple[Any, ...] = ()
        if not isinstance(values, Mapping):
            self.args = values if isinstance(values, tuple) and not isinstance(values, PackedSequence) else (values,)
        size = batch_size(self.args, self.kwargs, batch_first)
        if size is None:
            raise ValueError("inputs holds no tensor, so there is no batch: pass a tensor, a tuple or a dict of them.")
        if size < 2:
            raise ValueError(f"inputs holds {size} sample(s): whether samples mix shows with at least two.")
        self.size = size

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor changed."""
        return self._with(lambda x: change(x) if isinstance(x, Tensor) else x._replace(data=change(x.data)))

    def pick(self, rows: Tensor) -> Inputs:
        """The samples ``rows``, in that order; tensors without a batch dimension stay as they are."""

        def select(x: Any) -> Any:
            if isinstance(x, PackedSequence):
                padded, lengths = pad_packed_sequence(x)
                return pack_padded_sequence(padded[:, rows], lengths[rows], enforce_sorted=False)
            dim = 0 if self.batch_first or x.dim() < 2 else 1
            if x.dim() == 0 or x.shape[dim] != self.size:
                return x
            return x.detach().index_select(dim, rows.to(x.device)).requires_grad_(x.requires_grad)

        picked = self._with(select)
        picked.size = len(rows)
        return picked

    def _with(self, function: Callable[[Any], Any]) -> Inputs:
        other = object.__new__(Inputs)
        other.batch_first, other.size = self.batch_first, self.size
        other.args, other.kwargs = tree_map(
            lambda x: function(x) if isinstance(x, (Tensor, PackedSequence)) else x,
            (self.args, self.kwargs),
            is_leaf=lambda x: isinstance(x, PackedSequence),
        )
        return other

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def own_loss(together: Any, alone: Any, reduction: str) -> Loss:
    """A loss that exercises every number of an output that depends on a sample.

    Each is multiplied by a fixed random number that depends on its place within its sample, so the sum over a batch is
    the sum over its samples, and by one that depends on the sample: equal output gradients would hide a backward that
    mixes them (a hook that takes their mean off). Outputs whose shape is the same for one sample and for the batch are
    left out: there is nothing to take apart in them.

    Args:
        together, alone: the model's outputs for the batch and for one sample of it.
        reduction: "mean" or "sum" over the samples.
    """
    weights: list[Tensor | None] = []
    dims: list[int | None] = []  # where the batch is, if it is a dimension of its own
    for k, (x, y) in enumerate(zip(tensors_in(together), tensors_in(alone), strict=True)):
        weights.append(None)
        differ = [i for i, (n, m) in enumerate(zip(x.shape, y.shape, strict=False)) if n != m]
        dims.append(differ[0] if len(differ) == 1 and y.shape[differ[0]] == 1 else None)
        if x.is_floating_point() and x.requires_grad and x.dim() == y.dim() and x.shape != y.shape:
            shape = [n if n == m else 1 for n, m in zip(x.shape, y.shape, strict=True)]
            generator = torch.Generator().manual_seed(k)
            weights[-1] = torch.randn(shape, generator=generator, dtype=torch.float64).to(x)
    if all(w is None for w in weights):
        raise ValueError(
            "No output of the model has an entry per sample, so there is nothing to differentiate by default: "
            "pass loss=, a function from the output to a scalar."
        )

    def loss(output: Any, rows: Tensor) -> Tensor:
        terms = [
            (_by_sample(x, dim, rows) * w).sum()
            for x, w, dim in zip(tensors_in(output), weights, dims, strict=True)
            if w is not None
        ]
        total = torch.stack(terms).sum()
        return total / len(rows) if reduction == "mean" else total

    return loss


def _by_sample(x: Tensor, dim: int | None, rows: Tensor) -> Tensor:
    """``x`` with every sample's entries multiplied by a number of its own."""
    if dim is None:
        return x
    own = (1.5 + torch.sin(rows + 1.0)).to(x)
    return x * own.view([-1 if i == dim else 1 for i in range(x.dim())])


def users_loss(function: Callable[..., Tensor]) -> Loss:
    """``function(output)`` or ``function(output, rows)`` as the latter; raises ValueError if it gives no scalar."""
    try:
        inspect.signature(function).bind(None, None)
        takes_rows = True
    except TypeError:
        takes_rows = False
    except ValueError:  # a builtin without a signature
        takes_rows = False

    def loss(output: Any, rows: Tensor) -> Tensor:
        value = function(output, rows) if takes_rows else function(output)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a scalar tensor, got {got}.")
        return value

    return loss
