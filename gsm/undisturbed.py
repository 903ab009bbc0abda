"""What surrounds a forward that is only a try: no dropout, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gsm.random_numbers import RandomNumbers, own_generators
from gsm.structures import stored


class NoDropout(TorchFunctionMode):
    """Functional dropout and attention dropout switched off; random numbers come from the default generator."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if "dropout" in name and args and isinstance(args[0], Tensor):
            return args[0]
        if func is F.scaled_dot_product_attention:
            args = args[:4] + (0.0,) + args[5:] if len(args) > 4 else args
            kwargs = {k: (0.0 if k == "dropout_p" else v) for k, v in kwargs.items()}
        if isinstance(kwargs.get("generator"), torch.Generator):  # of the model's own: it is not put back afterwards
            kwargs["generator"] = None
        return func(*args, **kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[RandomNumbers]:
    """No dropout inside; random state and buffers as before afterwards."""
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    # Attention and recurrent layers hand their dropout to functions that hide it from NoDropout.
    hidden: list[tuple[Any, float]] = [
        (m, m.dropout) for m in model.modules() if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))
    ]
    devices = sorted({b.device.index or 0 for b in (*model.parameters(), *model.buffers()) if b.is_cuda})
    random_numbers = RandomNumbers(devices, own_generators(model))
    try:
        for m in dropouts:
            m.training = False
        for layer, _ in hidden:
            layer.dropout = 0.0
        with NoDropout(), buffers_restored(model):
            yield random_numbers
    finally:
        random_numbers.again()
        for m in dropouts:
            m.training = True
        for layer, p in hidden:
            layer.dropout = p


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """What a forward writes into buffers (running means, a power iteration) is gone afterwards.

    A buffer that was only read is not written to either: the graph of another forward may have saved it.
    """
    named = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    held = [(m, name, b, b.detach().clone()) for m, name, b in named]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, b, before in held:
                module._buffers[name] = b  # a forward may have put another tensor in its place
                if b.shape == before.shape and not same_bits(b, before):
                    b.copy_(before)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, whatever way the two are stored."""
    pairs = list(zip(stored(one), stored(other), strict=True))
    return all(a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(x: Tensor) -> Tensor:
    x = x.int_repr() if x.is_quantized else x.resolve_conj().resolve_neg()
    return x.contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Tensors that a forward leaves on its modules (a state for the next one) are taken away again afterwards.

    Yields a dict that is filled, at the end, with those that were there, by name.
    """
    before = [(path, m, {k: v for k, v in m.__dict__.items() if _may_hold(v)}) for path, m in model.named_modules()]
    left: dict[str, Tensor] = {}
    try:
        yield left
    finally:
        for path, m, held in before:
            for name, value in list(m.__dict__.items()):
                if isinstance(value, Tensor) and value is not held.get(name):
                    left[f"{path}.{name}" if path else name] = value
                    if name in held:
                        m.__dict__[name] = held[name]
                    else:
                        del m.__dict__[name]


def _may_hold(value: Any) -> bool:
    return value is None or isinstance(value, Tensor)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd saves inside, by address, the model's own tensors left out."""
    own = {s.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) for s in stored(t)}
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        for storage in [part.untyped_storage() for part in stored(x)]:
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # an operation that saves its own output would otherwise keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield found
