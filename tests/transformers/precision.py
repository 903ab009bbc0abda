"""Everything in float64, also where a model casts to float32 inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DOUBLE = {torch.float32: torch.float64, "float32": torch.float64}


class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return torch.Tensor.double(args[0])
        if any(a is torch.float32 for a in args):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Casts to float32 become casts to float64, and new tensors are float64.

    Many models compute norms, rotary angles and router weights in float32 whatever the model's type. Two runs that
    differ only in the order of a float32 sum then differ by 1e-7, which hides errors of that size; here they don't.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)
