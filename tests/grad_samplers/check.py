"""Compare the three readings of a layer with the one-sample loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import grad_samplers
from tests.loop import assert_close_per_sample, batch_size, call, per_sample_loop, projection_loss, sample

RTOL = 1e-8


def backprops_of(module: nn.Module, inputs: Any, select: Callable, size: int) -> Tensor:
    """The gradient of each sample's own loss with respect to the output, stacked: `[B, ...]`."""
    rows = []
    for index in range(size):
        output = call(module, select(inputs, index)).detach().requires_grad_()
        rows.append(torch.autograd.grad(projection_loss(output), output)[0])
    if rows:
        return torch.cat(rows)
    return call(module, inputs).detach()


def check(layer: nn.Module, *inputs: Tensor, select: Callable | None = None, size: int | None = None) -> None:
    """Gradients, norms and weighted sum of `layer(*inputs)`, all in float64, against `per_sample_loop`."""
    layer = layer.double()
    assert grad_samplers.reason_unsupported(layer) is None, grad_samplers.reason_unsupported(layer)
    select = select or sample
    size = batch_size(inputs) if size is None else size
    expected = per_sample_loop(layer, inputs, select=select, size=size)
    names = {p: name for name, p in layer.named_parameters()}
    backprops = backprops_of(layer, inputs, select, size)
    readings = list(inputs)

    def named(found: dict[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        return {names[p]: value for p, value in found.items()}

    gradients = named(grad_samplers.per_sample_gradients(layer, readings, backprops))
    assert_close_per_sample(gradients, expected, RTOL)

    true_norms = {name: torch.linalg.vector_norm(g.flatten(1), dim=1) for name, g in expected.items()}
    for small in (grad_samplers.linear.SMALL, 0):  # zero: Gram matrices also for layers as small as these
        with mock.patch.object(grad_samplers.linear, "SMALL", small):
            norms = named(grad_samplers.per_sample_norms(layer, readings, backprops))
        assert_close_per_sample(norms, true_norms, RTOL)

    weights = torch.linspace(-0.5, 1.5, size, dtype=torch.float64)
    sums = named(grad_samplers.weighted_sum(layer, readings, backprops, weights))
    true_sums = {name: torch.tensordot(weights, g, dims=1)[None] for name, g in expected.items()}
    assert_close_per_sample({name: s[None] for name, s in sums.items()}, true_sums, RTOL)
