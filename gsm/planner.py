"""Which reading of a capture to keep: the per-sample gradients, or the pair they are made of.

To be measured: see `benchmarks/`.
"""

from __future__ import annotations

from typing import Any

from gsm.contributions import Record


class Planner:
    """Decides per layer and shape whether a materialised gradient is worth its memory."""

    def __init__(self, mode: str, memory_budget: int | None = None):
        self.mode, self.memory_budget = mode, memory_budget

    def keeps(self, record: Record, key: Any) -> bool:
        return False
