"""Before the first batch: does the model write what it sees into its buffers, or past the optimizer into parameters?

A buffer that follows the data (a running mean, a codebook, a cache) is part of the state dict and leaves the training
without noise; so does a parameter that the forward writes to, frozen or not (a codebook, scales set from the first
batch), and what a module adds to the state dict by `get_extra_state`. What changes in the same way whatever the data
are (counters, the power iteration of spectral normalisation) is fine. What is written only once, without a buffer that
says so, is over before this looks: of parameters that is said, and of anything that is written for the first time
later, when it happens.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from gsm.structures import stored
from gsm.undisturbed import buffers_restored

#: A module, its path, and the dictionary of its tensors in which the name stands.
Owner = tuple[str, nn.Module, dict, str]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Parameters:
    """What the parameters of a model are, to see later which of them were written to. Nothing is copied: a frozen
    backbone may take most of the memory."""

    def __init__(self, model: nn.Module):
        self._owners: list[Owner] = [
            (path, m, m._parameters, name)
            for path, m in model.named_modules()
            for name, p in m._parameters.items()
            if p is not None
        ]
        self._marks = [_mark(held[name]) for *_, held, name in self._owners]

    def written(self) -> list[Owner]:
        """Those that changed."""
        now = [_mark(held[name]) for *_, held, name in self._owners]
        return [o for o, before, after in zip(self._owners, self._marks, now, strict=True) if before != after]


LATE = (
    "The forward wrote to {name} for the first time now, and not when the model was looked at before its first batch. "
    "If what it writes depends on the data, that leaves the training without noise (it is in the state dict), and no "
    "epsilon covers it: switch it off, or do it with public data before training."
)
ONCE = (
    "The model's first forward wrote to {names}, and the next one did not (scales set from the first batch do that). "
    "If what it wrote depends on the data, that is in the model without noise, and no epsilon covers it: run the model "
    "once on public data before it is wrapped."
)


class Written:
    """What is in the state dict and no optimizer moves, to see when a forward writes to it: buffers, frozen parameters.

    Those that the first forward of a kind wrote to were looked at by :func:`check_buffers`; of others it is said.
    """

    def __init__(self, model: nn.Module):
        self._places: list[tuple[str, dict, str]] = []
        for path, m in model.named_modules():
            kept = [n for n in m._buffers if n not in m._non_persistent_buffers_set]
            self._places += [(f"{path}.{n}" if path else n, m._buffers, n) for n in kept]
            frozen = [n for n, p in m._parameters.items() if p is not None and not p.requires_grad]
            self._places += [(f"{path}.{n}" if path else n, m._parameters, n) for n in frozen]
        self._known: set[str] = set()

    def marks(self) -> list[tuple[int, int]]:
        """To be taken before a forward."""
        held = [place.get(name) for _, place, name in self._places]
        return [(0, 0) if t is None else (id(t), _version(t)) for t in held]

    def compare(self, marks: list[tuple[int, int]], looked_at: bool) -> None:
        """Warns of what changed since then, unless it changed before or was looked at this time."""
        now = self.marks()
        if now == marks:
            return
        for (path, _, _), before, after in zip(self._places, marks, now, strict=True):
            if before != after and path not in self._known:
                self._known.add(path)
                if not looked_at:
                    warnings.warn(LATE.format(name=path), stacklevel=6)


class ExtraStates:
    """What modules add to the state dict by `get_extra_state`, where `set_extra_state` can put it back."""

    def __init__(self, model: nn.Module):
        own = [
            (path, m)
            for path, m in model.named_modules()
            if type(m).get_extra_state is not nn.Module.get_extra_state
            and type(m).set_extra_state is not nn.Module.set_extra_state
        ]
        self._devices = _devices(model)
        self._held = [(path, m, copy.deepcopy(m.get_extra_state())) for path, m in own]

    def restore(self) -> None:
        """Puts back what was found."""
        for _, m, state in self._held:
            m.set_extra_state(copy.deepcopy(state))

    def check(self, run: Callable[[Any], None], inputs: Any, resize: Callable[[], Any]) -> None:
        """Runs the model on ``inputs``, on others and on another number, and compares; the states are put back.

        Raises:
            DataInBuffers: names the module.
        """
        if not self._held:
            return
        first, others = self._after(run, inputs), self._after(run, _others(inputs))
        try:
            more = self._after(run, resize())
        except Exception:  # not a number of samples that this model takes
            more = first
        self.restore()
        for (path, m, _), *states in zip(self._held, first, others, more, strict=True):
            if len(set(states)) > 1:
                raise DataInBuffers(
                    f"What get_extra_state() of {path or 'the model'} ({type(m).__name__}) returns changes with the "
                    "data seen in training, or their number. It is in the state dict without noise, and no epsilon "
                    "covers it: switch its update off, leave it out of the state dict, or fix it with public data."
                )


    def _after(self, run: Callable[[Any], None], values: Any) -> list[bytes]:
        self.restore()
        with torch.random.fork_rng(devices=self._devices):
            run(values)
        return [_frozen(m.get_extra_state()) for _, m, _ in self._held]


def _frozen(state: Any) -> bytes:
    """Equal where the states are."""
    numbers = tree_map(lambda x: x.detach().cpu().numpy() if isinstance(x, Tensor) else x, state)
    return pickle.dumps(numbers)


class DataInBuffers(ValueError):
    """A buffer or parameter of the model changes with the data, and no noise covers it."""


def check_buffers(
    model: nn.Module,
    run: Callable[[Any], None],
    inputs: Any,
    written: Sequence[Owner] = (),
    resize: Callable[[], Any] | None = None,
) -> None:
    """Runs the model on ``inputs`` and on other values of the same shapes, and compares its buffers afterwards, and
    the parameters that it writes to. Those that any forward writes to may not tell how many samples it had, either.

    Args:
        model: its buffers are put back.
        run: runs the model on inputs; random numbers are the same in both runs.
        inputs: nested tensors; integers are exchanged, floating numbers flipped and scaled.
        written: parameters that a forward changed (:class:`Parameters`).
        resize: gives ``inputs`` for another number of samples.

    Raises:
        DataInBuffers: names the buffer or parameter.
    """
    owners: list[Owner] = [
        (path, m, m._buffers, n) for path, m in model.named_modules() for n, b in m._buffers.items() if b is not None
    ]
    owners += written
    if not owners:
        return
    devices = _devices(model)
    before = [held[name].detach().clone() for *_, held, name in owners]
    parameters = [(held, name, held[name], held[name].detach().clone()) for *_, held, name in written]

    drew = False

    def after(values: Any) -> list[Tensor]:
        nonlocal drew
        with torch.random.fork_rng(devices=devices), buffers_restored(model):
            states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
            run(values)
            now = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
            drew = drew or not all(map(torch.equal, states, now))
            found = [held[name].detach().clone() for *_, held, name in owners]
        for held, name, p, value in parameters:
            held[name] = p
            with torch.no_grad():
                p.copy_(value)
        return found

    first = after(inputs)
    once = [o for o, a, b in zip(owners, first, before, strict=True) if o[2] is o[1]._parameters and _equal(a, b)]
    if once:
        names = ", ".join(f"{path}.{name}" if path else name for path, *_, name in once)
        warnings.warn(ONCE.format(names=names), stacklevel=6)
    if all(map(_equal, first, before)):
        return
    others = _others(inputs)
    for (path, module, held, name), a, b in zip(owners, first, after(others), strict=True):
        if not _equal(a, b):
            where = f"{path}.{name}" if path else name
            if held is module._parameters:
                raise DataInBuffers(
                    f"The forward of {type(module).__name__} writes to its parameter {where} what depends on the data: "
                    "that leaves the training without noise (it is in the state dict), and no epsilon covers it. "
                    "Switch it off (moving averages, scales set from the first batch), or do it once with public data "
                    "before training."
                )
            raise DataInBuffers(
                f"The buffer {where} of {type(module).__name__} changes with the data it sees in training: running "
                "statistics leave the model without noise (they are in its state dict), and no epsilon covers them. "
                "Switch the update off (eval mode, momentum 0, track_running_stats=False), make it a trainable "
                "parameter, or fix it with public data before training."
            )
    if resize is not None and not drew:  # other numbers, not the samples, would change what random numbers fill
        try:
            found = after(resize())
        except Exception:  # not a number of samples that this model takes
            return
        _check_number(owners, first, found)


def _check_number(owners: Sequence[Owner], first: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Refuses what is in the state dict and follows the number of samples, which Poisson sampling keeps private."""
    for (path, module, held, name), a, b in zip(owners, first, found, strict=True):
        persistent = held is module._parameters or name not in module._non_persistent_buffers_set
        if persistent and not _equal(a, b):
            raise DataInBuffers(
                f"{path}.{name}".lstrip(".") + f" of {type(module).__name__} follows the number of samples in a batch: "
                "true batch sizes leave the model without noise (it is in its state dict), and no epsilon covers them. "
                "Count batches instead of samples, or register the buffer with persistent=False."
            )


def _mark(p: Tensor) -> tuple[int, int, float]:
    """Changes with the values, however they are written: what goes through ``p.data`` leaves no version behind (of
    packed integers and other types that have no norm, nothing else is looked at)."""
    if p.dtype not in FLOATS:
        return p.data_ptr(), _version(p), 0.0
    total = torch.linalg.vector_norm(p.detach(), dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
    return p.data_ptr(), _version(p), total.nan_to_num().item()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _devices(model: nn.Module) -> list[int]:
    return sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.is_cuda})


def _others(inputs: Any) -> Any:
    return tree_map(_other, inputs, is_leaf=lambda x: isinstance(x, PackedSequence))


def _other(x: Any) -> Any:
    if isinstance(x, PackedSequence):
        return x._replace(data=_other(x.data))
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.numel():
        return x
    flipped = x.flip(tuple(range(x.dim())))
    return (flipped * 0.5 + 0.25).to(x.dtype) if x.is_floating_point() else flipped


def _equal(a: Tensor, b: Tensor) -> bool:
    pairs = zip(stored(a), stored(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)
