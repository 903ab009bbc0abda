"""Which sample does a row belong to? Read off the autograd graph.

Tokens sorted by expert, rows picked by a mask, pieces of a split: their shape says nothing about the samples, and may
even look like a batch. The graph knows: it is followed from the tensor backwards, through operations that keep rows
apart, to an output that was tapped and whose layout is known. Operations that are not listed end the search without
an answer; nothing is assumed about them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsm.layout import Layout, Rows

# Every row of the output is a function of the same row of the inputs that have as many rows.
_ELEMENTWISE = frozenset(
    """Add Sub Mul Div Rsub Neg Pow Exp Exp2 Expm1 Log Log1P Log2 Sqrt Rsqrt Abs Sign Reciprocal Sin Cos Tanh Sigmoid
    LogSigmoid Silu Gelu Relu Elu Selu Celu LeakyRelu Mish Hardswish Hardtanh Hardsigmoid Softplus Softshrink Threshold
    Erf Atan2 Clamp ClampMin ClampMax Maximum Minimum Where MaskedFill ToCopy Clone Contiguous Alias Lerp Addcmul
    Addcdiv NativeDropout FusedDropout Floor Ceil Round Frac Trunc Fmod Remainder Square Xlogy Logaddexp Sinc Prelu
    NativeLayerNorm NativeGroupNorm FusedRmsNorm ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
    ScaledDotProductEfficientAttention ScaledDotProductFusedAttentionOverrideable Convolution Bmm Glu""".split()
)
# ... if they work along another dimension than the first.
_ALONG = frozenset(
    "Softmax LogSoftmax Cumsum Cumprod Logcumsumexp Gather Topk Sort Sum Mean Amax Amin Max Min Logsumexp Prod Var Std "
    "Norm LinalgVectorNorm Flip Roll Scatter ScatterAdd Unfold Diagonal".split()
)
_LIMIT = 400


@dataclass(frozen=True)
class Owners:
    """The sample of each row; ``picked`` if the rows were selected on the way, so that shapes tell nothing."""

    owner: Tensor
    picked: bool


def owners_of(x: Tensor, batch_size: int) -> Owners | None:
    """The sample that each entry of the first dimension of ``x`` belongs to, or None if the graph does not tell."""
    if x.grad_fn is None or x.dim() == 0:
        return None
    search = _Search(batch_size)
    found = search.follow(x.grad_fn, x.output_nr, torch.arange(x.shape[0], device=x.device))
    return None if found is None else Owners(found, search.picked)


def owners_in_layout(layout: Layout | Rows, shape: tuple[int, ...], batch_size: int) -> Tensor:
    """For a tensor of this leading shape, the sample of each entry."""
    n = shape[layout.dim]
    if isinstance(layout, Rows):
        along = layout.owner
    elif not layout.flat:
        along = torch.arange(n)
    else:
        outer, inner = layout.factors(n, batch_size)
        along = torch.arange(batch_size).repeat_interleave(inner).repeat(outer)
    view = [1] * len(shape)
    view[layout.dim] = n
    return along.view(view).expand(shape)


def _shape(fn: Any, nr: int) -> tuple[int, ...]:
    return tuple(fn._input_metadata[nr].shape)


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


class _Search:
    """One walk; ``rows`` are always indices into the first dimension of the output at hand."""

    def __init__(self, batch_size: int):
        self.batch_size, self.left, self.picked = batch_size, _LIMIT, False

    def follow(self, fn: Any, nr: int, rows: Tensor) -> Tensor | None:
        self.left -= 1
        if fn is None or self.left < 0:
            return None
        shape = _shape(fn, nr)
        if shape and rows.numel() > shape[0]:  # reshapes multiply what is asked; a deep graph would ask without end
            rows, places = rows.unique(return_inverse=True)
            found = self.follow(fn, nr, rows)
            return None if found is None else found[places]
        name = type(fn).__name__
        if name == "TapBackward":
            return self._tapped(fn.use, _shape(fn, nr), rows)
        if name == "ExpandBackward":  # one copy of a parameter per sample
            return rows
        kind = name.rstrip("0123456789").removesuffix("Backward")
        special = getattr(self, "_" + kind.lower(), None)
        if special is not None:
            return special(fn, nr, rows, shape)
        if kind in _ELEMENTWISE:
            return self._same_row(fn, rows, shape[0], len(shape))
        if kind in _ALONG:
            dims = fn._saved_dim if hasattr(fn, "_saved_dim") else None
            dims = dims if isinstance(dims, (tuple, list)) else (dims,)
            sizes = getattr(fn, "_saved_self_sym_sizes", None) or shape
            if dims and all(isinstance(d, int) and _signed(d) % len(sizes) != 0 for d in dims):
                return self._same_row(fn, rows, shape[0])
        return None

    def _tapped(self, use: Any, shape: tuple[int, ...], rows: Tensor) -> Tensor | None:
        layout = getattr(use, "out_layout", None)
        if layout is None:
            return None
        self.picked |= isinstance(layout, Rows)
        lead = getattr(use, "lead", None)
        if lead is not None:  # the call was made on flattened rows
            return owners_in_layout(layout, tuple(lead), self.batch_size).reshape(-1).to(rows.device)[rows]
        return owners_in_layout(layout, shape[:1], self.batch_size).to(rows.device)[rows] if layout.dim == 0 else None

    def _same_row(self, fn: Any, rows: Tensor, count: int, dims: int | None = None) -> Tensor | None:
        for parent, nr in fn.next_functions:
            if parent is None:
                continue
            shape = _shape(parent, nr)
            if shape and shape[0] == count and dims in (None, len(shape)):
                picked = self.picked
                found = self.follow(parent, nr, rows)
                if found is not None:
                    return found
                self.picked = picked  # what lay on a way that led nowhere says nothing about the rows
        return None

    def _parent(self, fn: Any, rows: Tensor, at: int = 0) -> Tensor | None:
        parent, nr = fn.next_functions[at]
        return self.follow(parent, nr, rows)

    def _agreeing(self, fn: Any, blocks: Tensor) -> Tensor | None:
        """Rows made of several rows of the parent, ``blocks [n, k]``: they have an owner if all of these agree."""
        if blocks.shape[1] == 0:
            return None
        found = self._parent(fn, blocks.reshape(-1))
        if found is None:
            return None
        found = found.view(blocks.shape)
        return found[:, 0] if bool((found == found[:, :1]).all()) else None

    # -- operations that move rows -----------------------------------------------------------------------------------

    def _view(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = tuple(fn._saved_self_sym_sizes)
        if not before or not shape:
            return None
        if before[0] == 1 and len(before) > 1 and before[1] == shape[0]:
            found = self._behind_one(fn.next_functions[0][0], rows)
            if found is not None:
                return found
        if before[0] == shape[0]:
            return self._parent(fn, rows)
        size = math.prod(shape[1:])
        inner = math.prod(before[1:])
        if inner and size and inner % size == 0:  # [B, T, d] to [B * T, d]
            return self._parent(fn, rows // (inner // size))
        if inner and size % inner == 0:  # [B * T, d] to [B, T, d]
            k = size // inner
            return self._agreeing(fn, rows[:, None] * k + torch.arange(k, device=rows.device))
        return None

    def _behind_one(self, fn: Any, rows: Tensor) -> Tensor | None:
        """``rows`` index the second dimension, the first has one entry: ``x[None, index]``."""
        kind = type(fn).__name__.rstrip("0123456789").removesuffix("Backward")
        if kind == "Unsqueeze" and _signed(fn._saved_dim) == 0:
            return self._parent(fn, rows)
        if kind == "Index":
            indices: list[Tensor | None] = list(fn._saved_indices)
            second = indices[1] if len(indices) == 2 and indices[0] is None else None
            if second is not None and second.dim() == 1:
                self.picked = True
                picked = second.nonzero()[:, 0] if second.dtype == torch.bool else second
                return self._behind_one(fn.next_functions[0][0], picked[rows])
        return None

    _unsafeview = _reshapealias = _view

    def _transpose(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        moved = {_signed(fn._saved_dim0) % len(shape), _signed(fn._saved_dim1) % len(shape)}
        return self._parent(fn, rows) if 0 not in moved or len(moved) == 1 else None

    def _permute(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return self._parent(fn, rows) if _signed(fn._saved_dims[0]) % len(shape) == 0 else None

    def _unsqueeze(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return self._parent(fn, rows) if _signed(fn._saved_dim) % len(shape) != 0 else None

    def _squeeze(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = fn._saved_self_sym_sizes
        return self._parent(fn, rows) if shape and before[0] == shape[0] else None

    def _expand(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = fn._saved_self_sym_sizes
        return self._parent(fn, rows) if len(before) == len(shape) and before[0] == shape[0] else None

    def _repeat(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = fn._saved_self_sym_sizes
        return self._parent(fn, rows % before[0]) if len(before) == len(shape) and before[0] else None

    def _select(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = fn._saved_self_sym_sizes
        if _signed(fn._saved_dim) % len(before) != 0:
            return self._parent(fn, rows)
        self.picked = True
        return self._parent(fn, torch.full_like(rows, _signed(fn._saved_index) % before[0]))

    def _unbind(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if _signed(fn._saved_dim) % (len(shape) + 1) != 0:
            return self._parent(fn, rows)
        self.picked = True
        return self._parent(fn, torch.full_like(rows, nr))

    def _slice(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        before = fn._saved_self_sym_sizes
        if _signed(fn._saved_dim) % len(before) != 0 or before[0] == shape[0]:
            return self._parent(fn, rows)
        self.picked = True
        start = _signed(fn._saved_start)
        start = max(start + before[0], 0) if start < 0 else start
        return self._parent(fn, rows * fn._saved_step + start)

    def _split(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if _signed(fn._saved_dim) % len(shape) != 0:
            return self._parent(fn, rows)
        self.picked = True
        return self._parent(fn, rows + nr * fn._saved_split_size)

    def _splitwithsizes(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if _signed(fn._saved_dim) % len(shape) != 0:
            return self._parent(fn, rows)
        self.picked = True
        return self._parent(fn, rows + sum(fn._saved_split_sizes[:nr]))

    def _indexselect(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if _signed(fn._saved_dim) % len(shape) != 0:
            return self._parent(fn, rows)
        self.picked = True
        return self._parent(fn, fn._saved_index.reshape(-1)[rows])  # an index without dimensions is one of one row

    def _index(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        indices = fn._saved_indices
        given = [i for i, t in enumerate(indices) if t is not None]
        if indices[0] is None:  # x[:, index]: the first dimension stays in front if the indices are adjacent
            return self._parent(fn, rows) if given == list(range(given[0], given[-1] + 1)) else None
        self.picked = True
        masks = [t for t in indices if t is not None and t.dtype in (torch.bool, torch.uint8)]
        if masks:  # a mask over the leading dimensions picks entries in order; beside other indices it is not followed
            if len(given) > 1:
                return None
            return self._parent(fn, masks[0].nonzero()[:, 0][rows])
        first = torch.broadcast_tensors(*[t for t in indices if t is not None])[0]
        if first.dim() == 1:
            return self._parent(fn, first[rows])
        return self._agreeing(fn, first[rows].flatten(1)) if first.dim() else None

    def _cat(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if _signed(fn._saved_dim) % len(shape) != 0:
            return self._same_row(fn, rows, shape[0])
        if any(parent is None for parent, _ in fn.next_functions):
            return None
        out, start = torch.full_like(rows, -1), 0
        for parent, at in fn.next_functions:
            count = _shape(parent, at)[0]
            mine = (rows >= start) & (rows < start + count)
            if bool(mine.any()):
                found = self.follow(parent, at, rows[mine] - start)
                if found is None:
                    return None
                out[mine] = found
            start += count
        return out if start == shape[0] else None

    def _mm(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return self._parent(fn, rows, 0)

    def _addmm(self, fn: Any, nr: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return self._parent(fn, rows, 1)
