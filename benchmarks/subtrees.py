"""What a subtree under `torch.func` costs: a convolutional network whose modules own parameters at different heights.

A module that owns a parameter *and* has children with parameters is, for a library that knows only layers, one unit for
`torch.func`: the whole subtree. Opacus's change that made this right reports 136, 150 and 172 s on a CPU for three
models (pull request 510 of its repository, which does not list them); these follow its description:

- standard: four plain layers, each with a registered sampler;
- mid-level: the convolutional and the linear half each own one more parameter;
- extreme: the whole network owns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import mnist_net
from benchmarks.timing import Timing, time_columns
from benchmarks.workloads import Problem, Workload

REPORTED = {"standard": 136, "mid-level": 150, "extreme": 172}
COLUMNS = ("gsm auto", "gsm hooks", "gsm functorch", "opacus hooks", "opacus functorch")


class Owner(nn.Module):
    """A network whose output is multiplied by a matrix of its own: `[B, features]` or `[B, features, H, W]`."""

    def __init__(self, body: nn.Module, features: int):
        super().__init__()
        self.body = body
        self.extra = nn.Parameter(torch.eye(features) + 0.01 * torch.randn(features, features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y.matmul(self.extra) if y.dim() == 2 else (y.transpose(1, -1).matmul(self.extra)).transpose(1, -1)


def build(kind: str, channels: int) -> nn.Module:
    """One of the three models, `[B, 1, 28, 28]` to `[B, 10]`."""
    net = mnist_net(channels)
    if kind == "standard":
        return net
    if kind == "extreme":
        return Owner(net, 10)
    return nn.Sequential(Owner(net[:6], 2 * channels), Owner(net[6:], 10))


def workload(kind: str) -> Workload:
    """The model on a batch of 64 random images, the batch size of Opacus's example."""

    def make(channels: int, batch: int) -> Problem:
        return Problem(build(kind, channels), torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,)))

    return Workload(kind, kind, make, {"channels": 16, "batch": 64}, {"channels": 2, "batch": 4})


def measure(columns: Sequence[str] = COLUMNS, **options: Any) -> list[Timing]:
    """All three models; options as for :func:`benchmarks.timing.time_columns`."""
    return [row for kind in REPORTED for row in time_columns(workload(kind), columns, **options)]
