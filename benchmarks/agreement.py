"""Do all columns compute the same thing? One step without noise, compared with clipping one sample at a time.

A fast step is worth nothing if its gradients are wrong, and more than one peer is wrong without saying so on some
workload; so every table says what agreed. In float64, on the small problem.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.columns import BASE, CLIP, LEARNING_RATE, make
from benchmarks.timing import reason
from benchmarks.workloads import Problem, Workload


@dataclass
class Agreement:
    """One cell: the relative error of the update (l2, all parameters), and why there is none, or none in float64."""

    workload: str
    column: str
    error: float | None = None
    dtype: str = "float64"
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def expected_update(problem: Problem) -> Tensor:
    """The update of one noiseless private step, by ordinary autograd, each sample alone in its batch."""
    model = copy.deepcopy(problem.model)
    params = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    for x, y in zip(problem.inputs.split(1), problem.targets.split(1), strict=True):
        grads = torch.autograd.grad(problem.loss(model(x), y), params)
        flat = torch.cat([g.flatten() for g in grads])
        total += flat * (CLIP / flat.norm()).clamp(max=1)
    return -LEARNING_RATE * total / len(problem.targets)


def _trained(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def _error(column: str, workload: Workload, dtype: str) -> float:
    problem = workload.problem("quick", dtype=dtype)
    trainer = make(column, problem, noise=0.0)
    before = _trained(trainer.model).clone()
    trainer.step()
    got, want = _trained(trainer.model) - before, expected_update(problem)
    if [n for n, _ in trainer.model.named_parameters()] != [n for n, _ in problem.model.named_parameters()]:
        got, want = got.sort().values, want.sort().values  # DPLSTM keeps its weights in another order
    return float((got - want).norm() / want.norm())


def compare(workload: Workload, columns: Sequence[str]) -> list[Agreement]:
    """The error of every private column on the workload's small problem, in float64 (float32 where that fails)."""
    out = []
    for column in columns:
        result = Agreement(workload.name, column)
        for dtype in ("float64", "float32"):
            if column != BASE and result.error is None:
                try:
                    result.error, result.dtype = _error(column, workload, dtype), dtype
                except Exception as error:  # noqa: BLE001 - whatever a peer raises is a result
                    result.failure = result.failure or reason(error)
        gc.collect()  # a wrapped model refers to itself
        if column != BASE:
            out.append(result)
    return out
