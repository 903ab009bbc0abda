"""Compiled parts of a model run eagerly while its per-sample gradients are captured.

Tracked parameters resolve their uses while Python runs. A forward that `torch.compile` traced runs without them, on
shapes and layouts of another call, and can leave the batch's gradient in every row. So a captured forward, and all
that it calls (compiled modules, functions decorated with `torch.compile`), runs as it was written. Forwards without
gradients stay compiled. Compiled autograd, which traces the backward, is refused.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

EAGER = (
    "{what} is compiled (torch.compile). It runs eagerly while per-sample gradients are captured: they are exact, but "
    "training gains nothing from torch.compile here. Forwards under torch.no_grad() stay compiled."
)
BACKWARD = (
    "Per-sample gradients cannot be captured in a backward that is compiled itself (compiled autograd): switch "
    "torch._dynamo.config.compiled_autograd off, and call loss.backward() outside of its context."
)


@cache
def eager_runner() -> Callable[..., Any]:
    """`run(function, *args, **kwargs)` calls the function with nothing traced or compiled, whoever calls it.

    Made when the first model is wrapped: it loads the compiler's Python side (as any `torch.optim` optimizer does).
    """
    # What torch.compiler.set_stance calls; making its context anew takes twice the time, at every forward.
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._dynamo.eval_frame import DynamoStance, _set_stance

    eager, lock = DynamoStance("force_eager"), threading.Lock()
    inside, before = 0, eager  # the stance is one for all threads: the first one sets it, the last restores it

    def run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside, before
        if torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None:
            return outside(function, *args, **kwargs)
        with lock:
            before = before if inside else _set_stance(eager)
            inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            with lock:
                inside -= 1
                if not inside:
                    _set_stance(before)

    # With torch.compile(fullgraph=True) the compiler's own error names this function.
    def per_sample_gradients_are_captured_eagerly(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return run(function, *args, **kwargs)

    outside = torch.compiler.disable(per_sample_gradients_are_captured_eagerly)
    return run


def untraced(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, which a step that is compiled as a whole does not trace."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    if torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None:
        return torch.compiler.disable(function)(*args, **kwargs)
    return function(*args, **kwargs)


def warn_if_compiled(root: nn.Module) -> None:
    """Warns if a module of the model is compiled: it stays so without gradients only."""
    from torch._dynamo import OptimizedModule

    for path, module in root.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            warnings.warn(EAGER.format(what=path or "The model"), stacklevel=2)
            return


def refuse_compiled_backward() -> None:
    """Called where a gradient arrives.

    Raises:
        RuntimeError: within compiled autograd, which traces hooks and custom functions with assumptions of its own.
    """
    if getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False):
        raise RuntimeError(BACKWARD)
