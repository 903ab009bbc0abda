"""Random numbers that a model draws while it is only tried: the same again, or the same for any batch size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Given = dict[str, Any]  # the arguments of a random function by their names

_SETTLED: dict[str, Callable[[Given], Any]] = {
    "rand": lambda given: 0.5,
    "randn": lambda given: 0.5,  # not zero, which would hide what it is divided by
    "randint": lambda given: given.get("low", 0),
    "random": lambda given: given.get("from", 0),
    "randperm": lambda given: torch.arange(given["n"]),
    "uniform": lambda given: (given["from"] + given["to"]) / 2,
    "normal": lambda given: given["mean"] + given["std"] / 2,
    "log_normal": lambda given: math.exp(given["mean"] + given["std"] / 2),
    "cauchy": lambda given: given["median"] + given["sigma"] / 2,
    "exponential": lambda given: 1 / given["lambd"],
    "geometric": lambda given: 1 / given["p"],
    "bernoulli": lambda given: given.get("p", given["self"]),
    "poisson": lambda given: given["self"],
    "binomial": lambda given: given["count"] * given["prob"],
    "multinomial": lambda given: given["self"].argmax(-1, keepdim=True),
    "_standard_gamma": lambda given: given["self"],
    "_sample_dirichlet": lambda given: given["self"] / given["self"].sum(-1, keepdim=True),
}
_SET_PYTHON, _SET_NUMPY = random.setstate, numpy.random.set_state  # :func:`same_at_every_call` replaces both
# How many numbers these take from a generator depends on their arguments: another sample's leave it elsewhere.
_UNEVEN = {"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}


class Settled(TorchDispatchMode):
    """Random numbers are what their distribution alone tells (about its mean).

    Args:
        all_of_them: each is then the same for any batch size; else only those are settled without which the same
            state of a generator would not give the same numbers again.
    """

    def __init__(self, all_of_them: bool):
        super().__init__()
        self.names = _SETTLED.keys() if all_of_them else _UNEVEN

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_like").removesuffix("_")
        if name in self.names:
            parameters = func._schema.arguments
            given = {p.name: p.default_value for p in parameters if p.has_default_value()}
            given |= {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
            value = _SETTLED[name]({k: v for k, v in given.items() if v is not None})
            on = [x.device for x in args if isinstance(x, Tensor) and x.is_cuda]
            with torch.random.fork_rng(devices=on):  # what comes next starts from the same state
                out = func(*args, **kwargs)
            return out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)
        if name.startswith("rrelu_with_noise"):
            args = (*args[:4], False, *args[5:])  # slopes in the middle, as in evaluation
        return func(*args, **kwargs)


@contextmanager
def same_at_every_call() -> Iterator[None]:
    """Functions of the modules ``random`` and ``numpy.random`` start from the same state each time.

    What is drawn sample by sample is then the same for each; what is drawn for all at once only for the first.
    """
    before, patched = RandomNumbers([]), []

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*args: Any, **kwargs: Any) -> Any:
            before.again_besides()
            return function(*args, **kwargs)

        return drawn

    for module in (random, numpy.random):
        for name, function in vars(module).copy().items():
            if isinstance(getattr(function, "__self__", None), (random.Random, numpy.random.RandomState)):
                patched.append((module, name, function))
                setattr(module, name, again(function))
    try:
        yield
    finally:
        for module, name, function in patched:
            setattr(module, name, function)
        before.again_besides()


class RandomNumbers:
    """What the generators of torch, numpy and Python were when this was made."""

    def __init__(self, devices: list[int]):
        self._devices = devices
        self._before = self._states()

    def _states(self) -> list[Any]:
        name, numbers, *rest = numpy.random.get_state()
        of_torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]
        return [random.getstate(), (name, tuple(numbers), *rest), *of_torch]

    def drawn(self) -> bool:
        """Whether any were used since."""
        return self.drawn_besides() or not all(map(torch.equal, self._before[2:], self._states()[2:]))

    def drawn_besides(self) -> bool:
        """Whether numpy's or Python's were, which nothing settles."""
        return self._before[:2] != self._states()[:2]

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
