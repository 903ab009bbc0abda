"""Norms of a parameter used several times: the norm of a sum, which is not the sum of the norms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsm.contributions import Contribution


def shared_squared_norms(held: Sequence[Contribution]) -> Tensor | None:
    """``[batch]`` squared norms of the sum of ``held`` without materialising it, or None where no formula is known."""
    return None
