"""Before the first batch: does the model write what it sees into its buffers?

A buffer that follows the data (a running mean, a codebook, a cache) is part of the state dict and leaves the training
without noise. Buffers that change in the same way whatever the data are (counters, the power iteration of spectral
normalisation) are fine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from gsm.structures import stored
from gsm.undisturbed import buffers_restored


class DataInBuffers(ValueError):
    """A buffer of the model changes with the data, and no noise covers it."""


def check_buffers(model: nn.Module, run: Callable[[Any], None], inputs: Any) -> None:
    """Runs the model on ``inputs`` and on other values of the same shapes, and compares its buffers afterwards.

    Args:
        model: its buffers are put back.
        run: runs the model on inputs; random numbers are the same in both runs.
        inputs: nested tensors; integers are exchanged, floating numbers flipped and scaled.

    Raises:
        DataInBuffers: names the buffer.
    """
    owners = [(path, m, name) for path, m in model.named_modules() for name, b in m._buffers.items() if b is not None]
    if not owners:
        return
    before = [m._buffers[name].detach().clone() for _, m, name in owners]  # type: ignore[union-attr]
    devices = sorted({b.device.index or 0 for b in model.buffers() if b.is_cuda})

    def after(values: Any) -> list[Tensor]:
        with torch.random.fork_rng(devices=devices), buffers_restored(model):
            run(values)
            return [m._buffers[name].detach().clone() for _, m, name in owners]  # type: ignore[union-attr]

    first = after(inputs)
    if all(map(_equal, first, before)):
        return
    others = tree_map(_other, inputs, is_leaf=lambda x: isinstance(x, PackedSequence))
    for (path, module, name), a, b in zip(owners, first, after(others), strict=True):
        if not _equal(a, b):
            where = f"{path}.{name}" if path else name
            raise DataInBuffers(
                f"The buffer {where} of {type(module).__name__} changes with the data it sees in training: running "
                "statistics leave the model without noise (they are in its state dict), and no epsilon covers them. "
                "Switch the update off (eval mode, momentum 0, track_running_stats=False), make it a trainable "
                "parameter, or fix it with public data before training."
            )


def _other(x: Any) -> Any:
    if isinstance(x, PackedSequence):
        return x._replace(data=_other(x.data))
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.numel():
        return x
    flipped = x.flip(tuple(range(x.dim())))
    return (flipped * 0.5 + 0.25).to(x.dtype) if x.is_floating_point() else flipped


def _equal(a: Tensor, b: Tensor) -> bool:
    pairs = zip(stored(a), stored(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)
