"""Losses that a model computes inside: is the loss of a batch made of the losses of its samples?

A model that is given labels often returns the mean over all tokens of the batch. Another sample's padding then changes
the weight of this sample's tokens: its gradient depends on its neighbours, and noise that covers one record does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsm.layout import SamplesInfluenceEachOther
from gsm.structures import named_tensors

_IGNORED = -100  # the label that `torch.nn.functional.cross_entropy` leaves out by default


def named_scalars(output: Any) -> dict[str, Tensor]:
    """The outputs of one entry that a loss could be differentiated through, by name."""
    return {name: x for name, x in named_tensors(output).items() if x.numel() == 1 and x.requires_grad}


def uneven_labels(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with half of the second sample's token labels ignored, as padding would have it."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 2 or labels.shape[1] < 2:
        return kwargs
    labels = labels.clone()
    labels[1, labels.shape[1] // 2 :] = _IGNORED
    return {**kwargs, "labels": labels}


def check_scalars(together: Any, alone: list[Any], reduction: str) -> None:
    """Compares a batch's scalar outputs with those of its samples, each alone.

    Args:
        together: the model's output for the batch.
        alone: its output for each of the samples.
        reduction: "mean" or "sum", what the batch's loss is of the samples' losses.

    Raises:
        gsm.layout.SamplesInfluenceEachOther: naming the output, and what to do instead.
    """
    pieces = [named_scalars(output) for output in alone]
    for name, value in named_scalars(together).items():
        own = [p[name].detach().double().reshape(()) for p in pieces if name in p]
        if len(own) != len(pieces) or not all(torch.isfinite(v) for v in (*own, value)):
            continue
        total = torch.stack(own)
        expected = total.mean() if reduction == "mean" else total.sum()
        if (value.detach().double().reshape(()) - expected).abs() > 1e-4 * total.abs().max() + 1e-9:
            raise SamplesInfluenceEachOther(_reason(name, reduction))


def _reason(name: str, reduction: str) -> str:
    if "aux" in name or "router" in name or "balanc" in name:
        return (
            f"{name}: a load-balancing loss over the tokens of the whole batch, so samples influence each other. Turn "
            "it off with model.config.output_router_logits = False (and do not pass output_router_logits=True)."
        )
    other = "sum" if reduction == "mean" else "mean"
    return (
        f"{name}: the model's own loss for a batch is not the {reduction} of its samples' losses, so samples influence "
        "each other (in a mean over the tokens of the whole batch, another sample's padding changes this sample's "
        "weight). Leave labels out of the model's call, and use the "
        f"{reduction} of gsm.transformers.per_sample_loss(outputs, labels). If the model balances the load of experts, "
        f"set model.config.output_router_logits = False; if the loss is a {other}, say so: loss_reduction='{other}'."
    )


def compare_alone(run: Callable[[Any, int], Any], arguments: Callable[[int, int], Any], reduction: str) -> None:
    """Runs two samples together and alone, and compares (see :func:`check_scalars`)."""
    together = run(arguments(0, 2), 2)
    if named_scalars(together):
        check_scalars(together, [run(arguments(i, 1), 1) for i in range(2)], reduction)
