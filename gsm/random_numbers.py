"""Random numbers that a model draws while it is only tried: the same again, or the same for any batch size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Given = dict[str, Any]  # the arguments of a random function by their names

# What each gives where a uniform number is u (the inverse of its distribution, or near it).
_SETTLED: dict[str, Callable[[Given, Tensor], Any]] = {
    "rand": lambda given, u: u,
    "uniform": lambda given, u: given["from"] + (given["to"] - given["from"]) * u,
    "randn": lambda given, u: 4 * u - 2,
    "normal": lambda given, u: given["mean"] + given["std"] * (4 * u - 2),
    "log_normal": lambda given, u: (given["mean"] + given["std"] * (4 * u - 2)).exp(),
    "cauchy": lambda given, u: given["median"] + given["sigma"] * (math.pi * (u - 0.5)).tan(),
    "exponential": lambda given, u: -(-u).log1p() / given["lambd"],
    "geometric": lambda given, u: ((-u).log1p() / math.log1p(-given["p"])).ceil(),
    "bernoulli": lambda given, u: u < (given["p"] if "p" in given else given["self"]),
    # One of a batch is then neither the first sample nor, where there are three, the last.
    "randint": lambda given, u: (given.get("low", 0) + given["high"]) // 2,
    "random": lambda given, u: (given.get("from", 0) + given.get("to", 2)) // 2,
    "randperm": lambda given, u: torch.arange(given["n"]).roll(-1),
    "multinomial": lambda given, u: _middle(given["self"]),
    "poisson": lambda given, u: given["self"],
    "binomial": lambda given, u: given["count"] * given["prob"],
    "_standard_gamma": lambda given, u: given["self"],
    "_sample_dirichlet": lambda given, u: given["self"] / given["self"].sum(-1, keepdim=True),
}
# How many numbers these take from a generator depends on their arguments: another sample's leave it elsewhere.
_UNEVEN = {"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}
_SET_PYTHON, _SET_NUMPY = random.setstate, numpy.random.set_state  # :func:`settled` replaces both


def _middle(weights: Tensor) -> Tensor:
    """The first index with at least half of the weight up to it."""
    below = weights.cumsum(-1) < 0.5 * weights.sum(-1, keepdim=True)
    return below.sum(-1, keepdim=True)


class Settled(TorchDispatchMode):
    """Random numbers are what their distribution alone tells, not the generator.

    Args:
        ends: the uniform number, between 0 and 1, behind the first and the last entries of the first dimension. They
            do not change with its size, so that samples at either end get the same in any batch.
        between: the one behind all others: what a maximum or a mean over the batch makes of them does change. None:
            only those numbers are settled without which the same random state would not give the same again.
    """

    def __init__(self, ends: float = 0.5, between: float | None = None):
        super().__init__()
        self.names = _UNEVEN if between is None else _SETTLED.keys()
        self.ends, self.between = ends, between or 0.5

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_like").removesuffix("_")
        if name.startswith("rrelu_with_noise"):
            args = (*args[:4], False, *args[5:])  # slopes in the middle, as in evaluation
        if name not in self.names:
            return func(*args, **kwargs)
        parameters = func._schema.arguments
        given = {p.name: p.default_value for p in parameters if p.has_default_value()}
        given |= {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items() if v is not None}
        on = [x.device for x in args if isinstance(x, Tensor) and x.is_cuda]
        with torch.random.fork_rng(devices=on):  # what comes next starts from the same state
            out = func(*args, **kwargs)
        u = torch.full(out.shape, self.between, dtype=torch.float64, device=out.device)
        if u.dim() and len(u):
            u[0] = u[-1] = self.ends
        value = _SETTLED[name](given, u if u.dim() else u.fill_(self.ends))
        return out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)


#: Pairs of uniform numbers, for :class:`Settled`: coins fall on either side, and neither end is always the larger.
TURNS = ((0.1, 0.3), (0.9, 0.7), (0.3, 0.9), (0.7, 0.1))


@contextmanager
def settled(turn: int) -> Iterator[Settled]:
    """Random numbers that do not depend on the batch size, in one of several ways.

    Functions of the modules ``random`` and ``numpy.random`` start from the same state each time: what is drawn sample
    by sample is then the same for each, what is drawn for all at once only for the first. torch's are settled by what
    is yielded.
    """
    original, patched = RandomNumbers([]), []
    random.seed(turn)
    numpy.random.seed(turn)
    start = RandomNumbers([])

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*args: Any, **kwargs: Any) -> Any:
            start.again_besides()
            return function(*args, **kwargs)

        return drawn

    for module in (random, numpy.random):
        for name, function in vars(module).copy().items():
            if isinstance(getattr(function, "__self__", None), (random.Random, numpy.random.RandomState)):
                patched.append((module, name, function))
                setattr(module, name, again(function))
    try:
        yield Settled(*TURNS[turn])
    finally:
        for module, name, function in patched:
            setattr(module, name, function)
        original.again_besides()


class RandomNumbers:
    """What the generators of torch, numpy and Python were when this was made, and ``own`` generators of a model."""

    def __init__(self, devices: list[int], own: Sequence[OwnGenerator] = ()):
        self._devices, self._own = devices, own
        self._own_before = [_state_of(generator) for generator in own]
        self._before = self._states()

    def _states(self) -> list[Any]:
        name, numbers, *rest = numpy.random.get_state()
        of_torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]
        return [random.getstate(), (name, tuple(numbers), *rest), *of_torch]

    def drawn(self) -> bool:
        """Whether any were used since."""
        return self.drawn_besides() or not all(map(torch.equal, self._before[2:], self._states()[2:]))

    def drawn_besides(self) -> bool:
        """Whether numpy's or Python's were, which are settled in part only."""
        own = repr([_state_of(generator) for generator in self._own]) != repr(self._own_before)
        return own or self._before[:2] != self._states()[:2]

    def again(self) -> None:
        """From here on the same numbers once more."""
        self.again_besides()
        of_torch, *of_devices = self._before[2:]
        torch.set_rng_state(of_torch)
        for device, state in zip(self._devices, of_devices, strict=True):
            torch.cuda.set_rng_state(state, device)

    def again_besides(self) -> None:
        """Those of numpy and Python alone."""
        _SET_PYTHON(self._before[0])
        _SET_NUMPY(self._before[1])
        for generator, state in zip(self._own, self._own_before, strict=True):
            if isinstance(generator, random.Random):
                generator.setstate(state)
            elif isinstance(generator, numpy.random.RandomState):
                generator.set_state(state)
            else:
                generator.bit_generator.state = state


OwnGenerator = random.Random | numpy.random.RandomState | numpy.random.Generator
_OWN = (random.Random, numpy.random.RandomState, numpy.random.Generator)


def own_generators(model: nn.Module) -> list[OwnGenerator]:
    """Generators, other than torch's, that the model's modules hold."""
    return [value for m in model.modules() for value in vars(m).values() if isinstance(value, _OWN)]


def _state_of(generator: OwnGenerator) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if isinstance(generator, numpy.random.RandomState) else generator.bit_generator.state
