"""Whole subtrees: `vmap` over the samples, or a loop where `vmap` cannot go.

The subtree runs with one copy of its parameters per sample (sharing their memory), each sample as a batch of one;
autograd through that run gives every sample's own gradient, in the same single backward, random numbers included. The
children carry no captured forwards of their own, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from gsm.capture import Capture, CapturedForward, Runner
from gsm.layout import Layout, Unresolvable
from gsm.resolve import expanded
from gsm.tape import Pass
from gsm.tracked import Tracked


class NotPerSample(Unresolvable):
    """The subtree's inputs or outputs do not hold one entry per sample: the subtree above has to be taken."""


def run_subtree(path: str, tracked: dict[str, Tracked], loop: bool) -> Runner:
    """A runner for the subtree at ``path``; ``tracked`` has its trainable parameters by name within the subtree."""

    def run(capture: Capture, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active, module = capture.tape.active, forward.module
        assert active is not None
        leaves, spec = tree_flatten((args, kwargs))
        if any(isinstance(x, Tracked) for x in leaves):
            raise NotPerSample(f"{path}: its input is a parameter that has not met a sample", _names(path, tracked))
        layouts = [_layout(active, path, i, x) for i, x in enumerate(leaves)]
        if not any(layouts) and path:
            raise NotPerSample(f"{path}: none of its inputs depends on the samples", _names(path, tracked))
        forward.bypass = True
        try:
            if active.batch_size == 0:
                return _empty(active, module, tracked, args, kwargs)
            copies = {n: expanded(active, t) for n, t in tracked.items()}
            each = _looped if loop else _mapped
            outputs, rebuild = each(module, copies, leaves, layouts, spec, active.batch_size)
            return rebuild([_joined(o, layouts, active, path, tracked) for o in outputs])
        finally:
            forward.bypass = False

    return run


def _names(path: str, tracked: dict[str, Tracked]) -> tuple[str, ...]:
    return tuple(f"{path}.{n}" if path else n for n in tracked)


def _layout(active: Pass, path: str, i: int, x: Any) -> Layout | None:
    return active.layout(f"{path}:input{i}", x) if isinstance(x, Tensor) and x.dim() else None


Outputs = tuple[Sequence[Tensor], Callable[[list[Any]], Any]]


def _call(module: nn.Module, params: dict[str, Tensor], leaves: list[Any], spec: Any, box: dict[str, Any]) -> list[Tensor]:
    """The subtree on one sample; its output's tensors, the rest of the structure left in ``box``."""
    args, kwargs = tree_unflatten(leaves, spec)
    out, box["spec"] = tree_flatten(functional_call(module, params, args, kwargs, tie_weights=True))
    box["leaves"] = out
    return [x for x in out if isinstance(x, Tensor)]


def _rebuild(box: dict[str, Any]) -> Callable[[list[Any]], Any]:
    def rebuild(tensors: list[Any]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in box["leaves"]], box["spec"])

    return rebuild


def _sample_first(leaves: list[Any], layouts: list[Layout | None], size: int) -> list[Any]:
    """Every batched leaf as `[B, ...]`, where the rest is the sample as a batch of one (or its rows)."""
    out = []
    for x, layout in zip(leaves, layouts, strict=True):
        if layout is None:
            out.append(x)
        else:
            front = layout.to_front(x, size)
            out.append(front if layout.flat else front.unsqueeze(1 + layout.dim))
    return out


def _mapped(
    module: nn.Module, copies: dict[str, Tensor], leaves: list[Any], layouts: list[Layout | None], spec: Any, size: int
) -> Outputs:
    box: dict[str, Any] = {}
    rows = _sample_first(leaves, layouts, size)
    batched = [x for x, lay in zip(rows, layouts, strict=True) if lay is not None]

    def one(params: dict[str, Tensor], samples: list[Tensor]) -> list[Tensor]:
        rest = iter(samples)
        full = [next(rest) if lay is not None else x for x, lay in zip(rows, layouts, strict=True)]
        return _call(module, params, full, spec, box)

    return vmap(one, randomness="different")(copies, batched), _rebuild(box)


def _looped(
    module: nn.Module, copies: dict[str, Tensor], leaves: list[Any], layouts: list[Layout | None], spec: Any, size: int
) -> Outputs:
    box: dict[str, Any] = {}
    rows = _sample_first(leaves, layouts, size)
    results = []
    for i in range(size):
        sample = [x if lay is None else x[i] for x, lay in zip(rows, layouts, strict=True)]
        results.append(_call(module, {n: c[i] for n, c in copies.items()}, sample, spec, box))
    return [torch.stack(parts) for parts in zip(*results, strict=True)], _rebuild(box)


def _joined(
    out: Tensor, layouts: list[Layout | None], active: Pass, path: str, tracked: dict[str, Tracked]
) -> Tensor:
    """`[B, *output of one sample]` as the output of the whole batch."""
    layout = next((lay for lay in layouts if lay is not None), Layout(0))
    if layout.flat == "major" and out.dim() > 1:
        return out.flatten(0, 1)
    dim = layout.dim
    if out.dim() < 2 + dim or out.shape[1 + dim] != 1 or layout.flat:
        raise NotPerSample(
            f"{path or 'the model'} ({', '.join(tracked)}): its output of shape {tuple(out.shape[1:])} for one sample has "
            "no batch dimension",
            _names(path, tracked),
        )
    return out.squeeze(1 + dim).movedim(0, dim)


def _empty(
    active: Pass, module: nn.Module, tracked: dict[str, Tracked], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """No samples: the subtree runs on the empty batch, and its parameters' gradient is zero."""
    params = {n: t.gsm_value.detach() + expanded(active, t).sum(0) for n, t in tracked.items()}
    return functional_call(module, params, args, kwargs, tie_weights=True)
