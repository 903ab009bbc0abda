"""Time, side by side: every private step runs right after a non-private one, and the pair gives one ratio.

On a machine that others use too, the two halves of a pair see about the same disturbance, which is what makes the
median ratio worth more than a quotient of two medians.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.columns import BASE, Step, make
from benchmarks.workloads import Workload


@dataclass
class Timing:
    """One cell: seconds per step, the ratio to the non-private step, its spread; or why there is none."""

    workload: str
    column: str
    seconds: float | None = None
    base_seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    failure: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reason(error: BaseException) -> str:
    """Type and first line of an error: what a table has room for."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(step: Step, device: str, clock: str = "wall") -> float:
    """Time of one call, to the end of what it started on the device.

    ``clock="cpu"`` is the processor time of this process, over all its threads: with one thread it is what the wall
    clock would say on an idle machine, also on a busy one.
    """
    start = CLOCKS[clock]()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def time_columns(
    workload: Workload,
    columns: Sequence[str],
    *,
    size: str = "full",
    pairs: int = 7,
    warmup: int = 2,
    budget: float = 20.0,
    clock: str = "wall",
    device: str = "cpu",
    dtype: str = "float32",
    **changes: Any,
) -> list[Timing]:
    """Times columns of one workload in this process, step against step in turn.

    Args:
        workload: the row.
        columns: keys of :data:`benchmarks.columns.COLUMNS`; the non-private step is the other half of every pair.
        size: "full" or "quick".
        pairs: pairs per column.
        warmup: steps of each column before anything is timed.
        budget: seconds after which a column gets no further pairs (it always gets two).
        clock: "wall", or "cpu" on a machine that others use too (then with one thread).
        device: "cpu" or "cuda".
        dtype: of parameters and inputs.
        **changes: replace single entries of the workload's size.

    Returns:
        One :class:`Timing` per column, in order; a column that cannot run says why in ``failure``.
    """
    problem = workload.problem(size, device=device, dtype=dtype, **changes)
    base = make(BASE, problem).step
    for _ in range(warmup):
        seconds(base, device)
    out = []
    for column in columns:
        result = Timing(workload.name, column, options=changes)
        try:
            step = make(column, problem).step
            for _ in range(warmup):
                seconds(step, device)
            _fill(result, base, step, pairs, budget, device, clock)
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is a result
            result.failure = reason(error)
        step = None  # type: ignore[assignment]
        if size == "full":
            gc.collect()  # a wrapped model refers to itself
        out.append(result)
    return out


def _fill(result: Timing, base: Step, step: Step, pairs: int, budget: float, device: str, clock: str) -> None:
    plain: list[float] = []
    private: list[float] = []
    start = time.perf_counter()
    while len(plain) < pairs and (len(plain) < 2 or time.perf_counter() - start < budget):
        plain.append(seconds(base, device, clock))
        private.append(seconds(step, device, clock))
    ratios = sorted(b / a for a, b in zip(plain, private, strict=True))
    result.seconds, result.base_seconds, result.ratio = median(private), median(plain), median(ratios)
    result.low, result.high, result.pairs = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4], len(ratios)
