"""Does one sample's value depend on another's? Change one sample, and look at everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gsm.structures import tensors_in
from gsm.verify_samples import Inputs

Trace = list[tuple[str, str, list[Tensor]]]


def influence(model: nn.Module, batch: Inputs, rtol: float, alone: Any) -> list[str]:
    """A sentence naming the first module whose values for one sample moved when only another sample did.

    Args:
        alone: the model's output for one sample, which shows where the batch lies in the outputs; None: unknown.
    """
    before, output = _traced(model, batch)
    for changed in (0, batch.size - 1):
        rows = torch.arange(batch.size)
        rows[changed] = rows[changed - 1]
        after, new = _traced(model, batch.pick(rows))
        others = [i for i in range(batch.size) if i != changed]
        moved = _moved(tensors_in(output), tensors_in(new), batch, others, rtol, tensors_in(alone))
        if moved is None:
            continue
        path, kind = "the model's output", type(model).__name__
        for (name, type_name, x), (_, _, y) in zip(before, after, strict=False):
            inside = _moved(x, y, batch, others, rtol, [])
            if inside is not None:
                path, kind, moved = name or "the model itself", type_name, inside
                break
        sample, size = moved
        return [
            f"Samples influence each other, first seen in the output of {path} ({kind}): the values for sample "
            f"{sample} moved by {size:.2g} (relative) when only sample {changed} was changed, so no clipping bounds "
            "what one record contributes. Let that layer, or the code in front of it, treat every sample alone "
            "(GroupNorm or LayerNorm for BatchNorm)."
        ]
    return []


def alone_differs(together: Any, alone: list[Any], rtol: float) -> list[str]:
    """A sentence if a sample's output is another one when the sample is alone (a division by the batch size, say)."""
    pieces = [tensors_in(out) for out in alone]
    for k, x in enumerate(tensors_in(together)):
        dim = _batch_dim(x, pieces[0][k], len(alone))
        if dim is None or not x.is_floating_point():
            continue
        for i, piece in enumerate(pieces):
            y = piece[k]
            if y.shape != x.narrow(dim, i, 1).shape:
                break
            size = _relative(x.narrow(dim, i, 1), y)
            if size > rtol:
                return [
                    f"The output for sample {i} alone is not the one in the batch (relative difference {size:.2g}): "
                    "the model's values depend on the number of samples or on the other samples."
                ]
    return []


def _traced(model: nn.Module, batch: Inputs) -> tuple[Trace, Any]:
    trace: Trace = []
    handles = []

    def remember(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            trace.append((path, type(module).__name__, [x.detach() for x in tensors_in(out)]))

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(remember(path)))
    try:
        torch.manual_seed(0)
        output = batch(model)
    finally:
        for handle in handles:
            handle.remove()
    return trace, output


def _batch_dim(x: Tensor, alone: Tensor | None, size: int) -> int | None:
    if alone is not None:
        dims = [i for i in range(x.dim()) if x.dim() == alone.dim() and x.shape[i] != alone.shape[i]]
        return dims[0] if len(dims) == 1 and x.shape[dims[0]] == size else None
    return 0 if x.dim() and x.shape[0] == size else None


def _moved(
    before: list[Tensor], after: list[Tensor], batch: Inputs, others: list[int], rtol: float, alone: list[Tensor]
) -> tuple[int, float] | None:
    """The first of the other samples that moved, and by how much."""
    for k, (x, y) in enumerate(zip(before, after, strict=False)):
        if x.shape != y.shape or not x.is_floating_point():
            continue
        dim = _batch_dim(x, alone[k] if k < len(alone) else None, batch.size)
        if dim is None and not alone and not batch.batch_first and x.dim() > 1 and x.shape[1] == batch.size:
            dim = 1
        if dim is None:
            continue
        for i in others:
            size = _relative(x.select(dim, i), y.select(dim, i))
            if size > rtol:
                return i, size
    return None


def _relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double().nan_to_num(), y.detach().double().nan_to_num()
    if not x.numel():
        return 0.0
    scale = max(x.abs().max().item(), y.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (x - y).abs().max().item() / scale
