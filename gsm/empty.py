"""Models that cannot run on zero rows, on a batch of zero rows.

Poisson sampling draws empty batches, and each is a release of its own (noise, and its charge). Many models fail on
them: a reshape to `[0, T, -1]` is ambiguous. Such a model runs on one row of zeros instead, without gradients, and its
outputs are cut to no rows: what the loss sees is what the model would have returned, and every per-sample gradient
is `[0, *p.shape]`. The made-up row reaches neither the sum nor the account.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gsm.functions import Expand
from gsm.resolve import ExpandUse
from gsm.tape import Pass
from gsm.tracked import Tracked


def with_one_row(value: Any) -> Any:
    """The arguments with a row of zeros where a dimension is empty."""
    return tree_map_only(Tensor, lambda x: x.new_zeros([max(n, 1) for n in x.shape]), value)


def cut(out: Any, active: Pass, tracked: Sequence[Tracked], batch_first: bool) -> Any:
    """The output for one row, as the output for none; its gradient tells every parameter that nobody reached it."""
    nothing: Any = 0.0
    for t in tracked:
        copies = Expand.apply(active.tape.anchor, ExpandUse(active, t), t.gsm_value.detach())
        nothing = copies.sum().to(torch.float64) + nothing

    def rows(x: Tensor) -> Tensor:
        dim = 0 if batch_first or x.dim() < 2 else 1
        if x.dim() == 0 or x.shape[dim] != 1:
            return x
        none = x.detach().narrow(dim, 0, 0)
        return none + nothing.to(x.dtype) if x.is_floating_point() and tracked else none

    return tree_map_only(Tensor, rows, out)
