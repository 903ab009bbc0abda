"""How the cost grows with the batch, the sequence, the width and the depth, one at a time around one middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.timing import Timing, time_columns
from benchmarks.workloads import WORKLOADS

MIDDLE = {"layers": 2, "width": 128, "length": 64, "batch": 16}
AXES: dict[str, list[int]] = {
    "batch": [4, 16, 64, 256],
    "length": [16, 64, 256, 1024],
    "width": [64, 128, 256, 512],
    "layers": [1, 2, 4, 8],
}
QUICK_MIDDLE = {"layers": 1, "width": 32, "length": 16, "batch": 8}
QUICK = {"batch": [4, 16], "length": [16, 32]}
COLUMNS = ("gsm auto", "gsm ghost", "gsm hooks", "opacus hooks", "opacus ghost")


def measure(columns: Sequence[str] = COLUMNS, *, quick: bool = False, **options: Any) -> list[Timing]:
    """The transformer classifier with one entry of :data:`MIDDLE` changed at a time.

    Args:
        columns: keys of :data:`benchmarks.columns.COLUMNS`.
        quick: two axes of two short points.
        **options: as for :func:`benchmarks.timing.time_columns`.
    """
    out = []
    for axis, values in (QUICK if quick else AXES).items():
        for value in values:
            middle: dict[str, Any] = {**(QUICK_MIDDLE if quick else MIDDLE), axis: value}
            rows = time_columns(WORKLOADS["classifier"], columns, **options, **middle)
            for row in rows:
                row.options = {"axis": axis, "value": value}
            out += rows
    return out
