"""The library against the one-sample loop, in every mode: what each test of the wrapper calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.loop import assert_close_per_sample, batch_size, call, double, per_sample_loop, projection_loss

MODES = ("hooks", "ghost", "auto", "functorch", "loop")


def captured(model: nn.Module) -> dict[str, Tensor]:
    """The per-sample gradients that one backward left, by parameter name, whatever the mode keeps."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    (batch,) = collect(list(params.values()))
    rows = torch.eye(batch.batch_size, dtype=torch.float64)
    sums = [batch.weighted_sum(row) for row in rows]
    return {n: torch.stack([s[k] for s in sums]) for k, n in enumerate(params)} if sums else {}


def check(
    model: nn.Module,
    inputs: Any,
    *,
    mode: str = "hooks",
    loss: Callable[[Any], Tensor] | None = None,
    batch_first: bool = True,
    rtol: float = 1e-8,
    **loop: Any,
) -> GradSampleModule:
    """One forward and one backward in ``mode``; gradients, norms and weighted sums are those of the loop.

    Returns the wrapped model, for further questions.
    """
    dim = 0 if batch_first else 1
    model = copy.deepcopy(model).double()
    inputs = double(inputs)
    expected = per_sample_loop(model, inputs, loss=loss, batch_dim=dim, **loop)
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum", batch_first=batch_first)
    output = call(wrapped, inputs)
    value = projection_loss(output, batch_dim=dim) if loss is None else loss(output)
    value.backward()
    assert all(p.grad is None for p in model.parameters()), "an ordinary gradient was computed"
    size = loop.get("size") or batch_size(inputs, dim)
    if mode in ("hooks", "functorch", "loop"):
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert_close_per_sample({n: p.grad_sample for n, p in trainable}, expected, rtol)
    assert_close_per_sample(captured(model), expected, rtol)
    params = [p for p in model.parameters() if p.requires_grad]
    (batch,) = collect(params)
    norms = torch.stack([expected[n].reshape(size, -1).norm(dim=1) for n in expected])
    torch.testing.assert_close(
        batch.squared_norms().sqrt(), norms, rtol=max(rtol, 1e-7), atol=1e-7 * float(norms.max() + 1e-30)
    )
    return wrapped
