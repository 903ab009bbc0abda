"""Parameters that see how they are used.

While a wrapped model runs, each of its trainable parameters is replaced, as an attribute of its module, by a
:class:`Tracked` tensor. Functions of tracked tensors and constants alone give tracked tensors (a transpose,
``1 + weight``, a weight norm, an embedding of position ids). Where a tracked tensor meets a tensor that depends on the
samples, the use is resolved, by the first of these that applies:

1. a known function (:mod:`grad_samplers.functional`): the output is tapped and a sampler reads it;
2. a function that broadcasts (:mod:`gsm.resolve`): the tracked tensor is expanded to one copy per sample and
   autograd delivers the per-sample gradient;
3. otherwise :class:`gsm.layout.Unresolvable`, and the plan hands the subtree to ``torch.func`` or to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from gsm.tape import Tape

# Functions that read only shape, type or device of their further arguments.
SHAPE_ONLY = {"to", "type_as", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "size", "dim"}
# Functions that only move, pick or convert entries: the norm of a gradient survives their backward.
_MOVES = {"t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "movedim"}
_MOVES |= {"contiguous", "swapaxes", "moveaxis", "view_as", "reshape_as", "clone", "narrow", "select", "chunk", "split"}
_MOVES |= {"to", "float", "double", "half", "bfloat16", "type_as", "unbind"}
_NO_GRADIENT = {"detach", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "requires_grad_", "__repr__"}


class Tracked(torch.Tensor):
    """A parameter, or a function of parameters alone, that resolves its uses by sample."""

    gsm_tape: Tape
    gsm_value: Tensor
    gsm_plain: Tensor
    gsm_param: nn.Parameter | None
    gsm_leaves: tuple[Tracked, ...]
    gsm_isometric: bool

    @staticmethod
    def of_parameter(tape: Tape, param: nn.Parameter) -> Tracked:
        value = param.detach().requires_grad_()
        value.register_post_accumulate_grad_hook(partial(_lost, tape.names.get(id(param), "A parameter")))
        new = Tracked._make(tape, value, isometric=True)
        new.gsm_param, new.gsm_leaves, new._is_param = param, (new,), True  # type: ignore[attr-defined]
        return new

    @staticmethod
    def derived(tape: Tape, value: Tensor, leaves: tuple[Tracked, ...], isometric: bool) -> Tracked:
        new = Tracked._make(tape, value, isometric)
        new.gsm_param, new.gsm_leaves = None, leaves
        return new

    @staticmethod
    def _make(tape: Tape, value: Tensor, isometric: bool) -> Tracked:
        # With the graph of its value: what takes tensors without asking __torch_function__ (the apply of an
        # autograd.Function, vmap, a scripted function) leads back to the parameter, where it is noticed.
        new = value.as_subclass(Tracked)
        new.gsm_tape, new.gsm_value, new.gsm_isometric = tape, value, isometric
        new.gsm_plain = value.detach()
        return new

    @property
    def gsm_name(self) -> str:
        """The names of the parameters behind it."""
        return " + ".join(self.gsm_tape.names.get(id(leaf.gsm_param), "?") for leaf in self.gsm_leaves)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _resolve(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"A tracked parameter ({self.gsm_name}) lives only while its model runs; save the model instead."
        )


def _lost(name: str, value: Tensor) -> None:
    """A gradient that came past every use that was resolved: it belongs to no sample."""
    value.grad = None
    raise RuntimeError(
        f"{name} is used where its gradient cannot be taken apart by sample (by a torch.autograd.Function, torch.vmap "
        "or a scripted function, perhaps in a branch that the first batch did not take). Put that use in a module "
        "of its own that holds the parameter, wrap with mode='functorch' or 'loop', or freeze the parameter."
    )


def _resolve(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    global _resolve
    from gsm.resolve import resolve  # which imports this class; looked up once

    _resolve = resolve
    return resolve(func, args, kwargs)


def plain_value(value: Any) -> Any:
    """``value``, or the plain tensor, without a graph, that a tracked one stands for."""
    return value.gsm_plain if type(value) is Tracked else value


def tracked_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tracked]:
    """All tracked tensors among the arguments, also one list or tuple deep, in order."""
    found: list[Tracked] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tracked):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tracked)]
    return found


def plain(value: Any) -> Any:
    """``value`` with every tracked tensor replaced by its value; the graph back to the parameters stays."""
    if isinstance(value, Tracked):
        return value.gsm_value
    if isinstance(value, (list, tuple, dict)):
        return tree_map_only(Tracked, lambda t: t.gsm_value, value)
    return value


def apply_to_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a function of parameters and constants alone; what still depends on a parameter stays tracked."""
    tracked = tracked_in(args, kwargs)
    out = func(*[plain(a) for a in args], **{k: plain(v) for k, v in kwargs.items()})
    if not torch.is_grad_enabled() or getattr(func, "__name__", "") in _NO_GRADIENT:
        return out
    name = getattr(func, "__name__", "")
    moves = len(tracked) == 1 and tracked[0].gsm_isometric and _only_moves(func, name, args, kwargs)
    leaves = tuple({id(leaf): leaf for t in tracked for leaf in t.gsm_leaves}.values())

    def wrap(t: Tensor) -> Tensor:
        if isinstance(t, Tracked) or not t.requires_grad:
            return t
        if len(tracked) == 1 and t is tracked[0].gsm_value:
            return tracked[0]
        return Tracked.derived(tracked[0].gsm_tape, t, leaves, moves)

    if isinstance(out, Tensor):
        return wrap(out)
    return tree_map_only(Tensor, wrap, out) if isinstance(out, (list, tuple, dict)) else out


def _only_moves(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every entry of the result is one entry of the argument, and none is used twice."""
    if name in _MOVES or func in _TRANSPOSES:
        return True
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index)
    if name == "embedding" and isinstance(args[0], Tensor) and isinstance(args[1], Tracked):
        plain_table = len(args) == 2 and kwargs.get("padding_idx") is None and not kwargs.get("scale_grad_by_freq")
        return plain_table and args[0].unique().numel() == args[0].numel()
    return False


_TRANSPOSES = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
