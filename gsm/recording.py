"""What is computed with some tensors, recorded operation by operation, and computed again from others.

A :class:`Recording` is a mode of PyTorch's dispatcher: while it is on, every operation of its thread passes by, below
autograd, so `detach`, `no_grad`, `.data`, masks and integers are seen as well. Computed again, the same paths carry
gradients.

Followed are also single floats that Python takes (`item()`) and gives back as they were. Not followed: what Python
computes with them, other numbers, numpy, and compiled kernels.
A recording holds no intermediate results, only what came from outside, and ends by itself when it grows long.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

MOST_OPERATIONS = 4096
FAILS = (RuntimeError, IndexError, TypeError, ValueError)
"""What computing again with other values may end in: sizes that depend on them were Python's."""
_COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional")
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
_UPDATES_STATISTICS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")  # and do not say so
_ROOT = os.path.dirname(torch.__file__)
_GUARDED = tuple(
    os.path.join(_ROOT, *path)
    for path in (("_dynamo", ""), ("_functorch", ""), ("_higher_order_ops", ""), ("fx", ""), ("autograd", "graph.py"))
)
_DIGITS = 12  # of a float that nobody has written by hand
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Ref:
    """A recorded value where it is used, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded call."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    graph: bool
    """Whether gradients were on."""
    random: tuple[torch.Generator, Tensor] | None
    """The generator that it draws from, and its state before."""
    writes: tuple[int, ...]
    """The values that it changes in place."""

    @property
    def reads(self) -> list[Ref]:
        return [r for r in tree_leaves((self.args, self.kwargs)) if isinstance(r, Ref)]


class Recording(TorchDispatchMode):
    """Records the operations of this thread from :meth:`start` to :meth:`stop`."""

    supports_higher_order_operators = True  # torch.cond and the like pass by; without this they would be errors

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.given: dict[int, Tensor] = {}
        """Values that came from outside, as they were when they were first used."""
        self.lost = False
        """Something passed by that could not be recorded, or too much."""
        self.on, self._entered = False, False
        self._guards: frozenset[int] = frozenset()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._read: dict[float, int] = {}  # the numbers of values that Python has
        self._memory: list[int] = []  # for each value the first one in the same memory
        self._process = os.getpid()

    # Compiled functions stay compiled: PyTorch would leave each that it meets under an ordinary mode eager for good.

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    # -- on and off ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Records from here on, unless another mode is active: those have to be left in the order of entering."""
        if not self._entered:
            if _get_current_dispatch_mode_stack():
                return
            self._entered, self._guards = True, _guards()
            self.__enter__()
        self.on = True

    def stop(self) -> None:
        """Records no more. Where the mode cannot be left yet it stays, doing nothing, until it is stopped again."""
        self.on = False
        if self._entered and _guards() <= self._guards:
            stack = _get_current_dispatch_mode_stack()
            if stack and stack[-1] is self:
                self._entered = False
                self.__exit__(None, None, None)

    def clear(self) -> None:
        """Forgets everything."""
        self.operations, self.given, self._memory, self.lost = [], {}, [], False
        self._numbers, self._read = WeakIdKeyDictionary(), {}

    # -- recording -----------------------------------------------------------------------------------------------------

    def give(self, x: Tensor) -> int:
        """Makes ``x`` a value from outside, whatever made it; returns its number."""
        self._numbers[x] = number = self._new(x, ())
        self.given[number] = x.detach()
        return number

    def number(self, x: Tensor) -> int | None:
        """The number of a value, None if it was not seen."""
        return self._numbers.get(x)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.on or self.lost or self._process != os.getpid():  # a worker of a loader, forked meanwhile
            return func(*args, **kwargs)
        if torch._C._len_torch_dispatch_stack():  # PyTorch's own modes lie behind this one: somebody traces or exports
            return func(*args, **kwargs)
        recordable = isinstance(func, torch._ops.OpOverload) and _all_plain((args, kwargs))
        if not recordable or len(self.operations) >= MOST_OPERATIONS:
            self._give_up()
        if self.lost or func.__name__.partition(".")[0] in _UNWRITTEN:
            return func(*args, **kwargs)  # memory is from outside: what fills it may not pass by
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        args_, kwargs_ = tree_map_only(Tensor, self._ref, (args, kwargs))
        if self._read:
            args_, kwargs_ = tree_map_only(float, self._back, (args_, kwargs_))
        written = [x for x in _written(func, args, kwargs) if isinstance(x, Tensor)]
        self._keep(written)
        random = _random(func, used, kwargs)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not _all_plain(made):  # sparse, say
            self._give_up()
            return result
        for x in made:
            if not any(x is w for w in written):
                self._numbers[x] = self._new(x, used)
        numbers = (*(self._numbers[x] for x in made), *self._taken(result))
        writes = tuple(self._numbers[x] for x in written)
        self.operations.append(Operation(func, args_, kwargs_, numbers, torch.is_grad_enabled(), random, writes))
        return result

    def _taken(self, result: Any) -> tuple[int, ...]:
        """The number of a value that Python takes as a float, as by ``item()``, if it can be told when it comes back.

        One of few digits cannot: the same may be written in the program.
        """
        if not isinstance(result, float) or len(repr(result)) < _DIGITS:
            return ()
        self._read[result] = len(self._memory)
        self._memory.append(self._read[result])
        return (self._read[result],)

    def _back(self, value: float) -> Ref | float:
        return Ref(self._read[value]) if value in self._read else value

    def _give_up(self) -> None:
        self.lost, self.operations, self.given = True, [], {}

    def _ref(self, x: Tensor) -> Ref:
        number = self._numbers.get(x)
        return Ref(self.give(x) if number is None else number)

    def _new(self, x: Tensor, made_from: Sequence[Tensor]) -> int:
        number = len(self._memory)
        place = _storage(x)
        same = next((self._numbers[y] for y in made_from if _storage(y) == place), number)
        self._memory.append(self._memory[same] if same != number else number)
        return number

    def _keep(self, written: Sequence[Tensor]) -> None:
        """Takes copies of values from outside before they are changed."""
        places = {_storage(x) for x in written}
        for number, x in self.given.items():
            if places and _storage(x) in places:
                self.given[number] = x.clone()

    # -- what made a value ---------------------------------------------------------------------------------------------

    def made(self, roots: Sequence[int]) -> Program:
        """The operations that the values ``roots`` are made by."""
        needed = {self._memory[r] for r in roots}
        found = []
        for op in reversed(self.operations):
            if needed.isdisjoint(self._memory[n] for n in (*op.results, *op.writes)):
                continue
            found.append(op)
            needed.update(self._memory[r.number] for r in op.reads)
        writes = {self._memory[n] for op in found for n in op.writes}
        given = {n: x for n, x in self.given.items() if self._memory[n] in needed}
        return Program(found[::-1], given, {n for n in given if self._memory[n] in writes})


class Program:
    """Operations in order, and the values from outside that they begin with.

    Args:
        operations: what to compute.
        given: the values from outside, by number.
        changed: those of them that operations write to.
    """

    def __init__(self, operations: Sequence[Operation], given: dict[int, Tensor], changed: set[int]):
        self.operations, self.given, self.changed = list(operations), given, changed

    @property
    def repeatable(self) -> bool:
        """Whether it can be computed again: other ranks do not come along."""
        return not any(getattr(op.call, "namespace", "") in _COLLECTIVE for op in self.operations)

    def run(self, others: dict[int, Tensor]) -> dict[int, Tensor]:
        """All values, computed with ``others`` in the place of some of those given."""
        values = {n: others[n] if n in others else x for n, x in self.given.items()}
        values |= {n: values[n].clone() for n in self.changed}
        for op in self.operations:
            with torch.set_grad_enabled(op.graph), _drawing(op.random):
                args, kwargs = tree_map_only(Ref, lambda ref: values[ref.number], (op.args, op.kwargs))
                result = op.call(*args, **kwargs)
            found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            values.update(zip(op.results, found or [result][: len(op.results)], strict=True))
        return values


def _guards() -> frozenset[int]:
    """The calls around this one after which PyTorch puts the dispatcher's state back: compiled functions, backwards.

    A mode that was entered before one of them must not be left inside: PyTorch would look for it at the next operation.
    One that was entered inside is no more heard of afterwards, and can be left.
    """
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_GUARDED) and not _only_disables(frame):
            found.append(id(frame))
        frame = frame.f_back
    return frozenset(found)


def _only_disables(frame: Any) -> bool:
    """Whether it is a call of what :func:`torch.compiler.disable` made, which touches no dispatcher."""
    return "self" in frame.f_code.co_freevars and type(frame.f_locals["self"]).__name__ == "DisableContext"


class _drawing:
    """Random numbers from a recorded state, which the generator does not keep."""

    def __init__(self, random: tuple[torch.Generator, Tensor] | None):
        self.random = random
        self.now: Tensor | None = None

    def __enter__(self) -> None:
        if self.random is not None:
            self.now = self.random[0].get_state()
            self.random[0].set_state(self.random[1])

    def __exit__(self, *error: Any) -> None:
        if self.random is not None and self.now is not None:
            self.random[0].set_state(self.now)


def _random(func: Any, used: Sequence[Tensor], kwargs: dict[str, Any]) -> tuple[torch.Generator, Tensor] | None:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = kwargs.get("generator")
    if generator is None:
        device = torch.device(kwargs.get("device") or (used[0].device if used else "cpu"))
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        else:
            generator = torch.default_generator
    return generator, generator.get_state()


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call writes to, as its schema says."""
    if func.__name__.partition(".")[0] in _UPDATES_STATISTICS:
        return list(args[3:5])
    if not func._schema.is_mutable:
        return []
    found = []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[k] if k < len(args) else kwargs.get(argument.name))
    return found


def _all_plain(values: Any) -> bool:
    """Whether all tensors are ordinary ones, with memory of their own."""
    return all(plain(x) for x in tree_leaves(values) if isinstance(x, Tensor))


def plain(x: Tensor) -> bool:
    """Whether it is an ordinary tensor, with memory of its own."""
    return type(x) in _PLAIN and x.layout is torch.strided and not x.is_inference()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
