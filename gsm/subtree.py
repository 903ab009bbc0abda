"""Whole subtrees: `vmap` over the samples, or a loop where `vmap` cannot go.

The subtree runs with one copy of its parameters per sample (sharing their memory), each sample as a batch of one;
autograd through that run gives every sample's own gradient, in the same single backward, random numbers included. The
children carry no captured forwards of their own, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gsm.capture import Capture, CapturedForward, Runner
from gsm.layout import Layout, Rows, Unresolvable
from gsm.random_numbers import Settled
from gsm.resolve import expanded
from gsm.structures import make_known
from gsm.tape import Pass
from gsm.tracked import Tracked
from gsm.undisturbed import buffers_restored, same_bits


class VmapFails(Unresolvable):
    """`vmap` cannot run the subtree, or gives something else than the loop: the loop has to be taken."""


class NotPerSample(Unresolvable):
    """The subtree's inputs or outputs do not hold one entry per sample: the subtree above has to be taken."""


class Call(NamedTuple):
    """One call of a subtree: what it is called with, flattened, and where each of that has its batch of ``size``."""

    module: nn.Module
    path: str
    size: int
    leaves: list[Any]
    layouts: list[Layout | None]
    spec: Any


def run_subtree(path: str, tracked: dict[str, Tracked], loop: bool) -> Runner:
    """A runner for the subtree at ``path``; ``tracked`` has its trainable parameters by name within the subtree."""

    def run(capture: Capture, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active, module = capture.tape.active, forward.module
        assert active is not None
        if any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values())):
            raise NotPerSample(
                f"{path or 'the model'}: a PackedSequence cannot be taken apart by sample in mode="
                f"{'loop' if loop else 'functorch'!r}. Use mode='hooks', 'ghost' or 'auto', or pack inside the model.",
                subtree=path,
            )
        if torch._C._functorch.maybe_current_level() is not None:
            raise NotPerSample(f"{path}: it runs under torch.vmap or another function transform", subtree=path)
        leaves, spec = tree_flatten(make_known((args, kwargs)))
        if any(isinstance(x, Tracked) for x in leaves):
            raise NotPerSample(f"{path}: its input is a parameter that has not met a sample", subtree=path)
        found = [_layout(active, path, i, x) for i, x in enumerate(leaves)]
        if active.log is not None and active.log.dry:
            active.log.skipped = True
            with _inside(capture, forward, path):
                return _plain(module, tracked, args, kwargs)
        layouts = [lay for lay in found if not isinstance(lay, Rows)]
        if len(layouts) < len(found):
            raise NotPerSample(f"{path}: the rows of its inputs are ordered by the data", subtree=path)
        if not any(layouts) and path:
            raise NotPerSample(f"{path}: none of its inputs depends on the samples", subtree=path)
        with _inside(capture, forward, path):
            if active.batch_size == 0:
                return _empty(active, module, tracked, args, kwargs)
            call = Call(module, path, active.batch_size, leaves, layouts, spec)
            if not loop and active.log is not None:
                _check_vmap(call, tracked)
            copies = {n: expanded(active, t) for n, t in tracked.items()}
            try:
                with DenseGradients():
                    outputs, rebuild = (_looped if loop else _mapped)(call, copies)
            except Exception as error:
                if active.log is None or isinstance(error, Unresolvable):
                    raise
                # It ran on the whole batch before: something beside its arguments has the batch's size (a cache).
                raise NotPerSample(f"{path}: one sample alone fails ({error})", subtree=path) from error
            return rebuild([_joined(o, layouts, active, path, tracked) for o in outputs])

    return run


@contextmanager
def _inside(capture: Capture, forward: CapturedForward, path: str) -> Iterator[None]:
    """The subtree's modules show their own parameters; those of others met inside are an error (`gsm.resolve`)."""
    before = capture.tape.inside
    forward.bypass, capture.tape.inside = True, path
    try:
        with capture.hidden(path):
            yield
    finally:
        forward.bypass, capture.tape.inside = False, before


def _layout(active: Pass, path: str, i: int, x: Any) -> Layout | Rows | None:
    if not isinstance(x, Tensor) or not x.dim():
        return None
    try:
        return active.layout(f"{path}:input{i}", x)
    except Unresolvable as error:
        if active.log is not None and active.log.dry:
            return None  # looked at again, once more is known
        raise NotPerSample(f"{path}: {error}", subtree=path) from None


Outputs = tuple[Sequence[Tensor], Callable[[list[Any]], Any]]


class WithoutHooks(nn.Module):
    """The forward of a subtree's root. Its hooks run around the whole batch, and must not change a sample again.

    What hooks before the forward do to the module itself is done for each sample: from its own parameters they make
    the weights (``torch.nn.utils.weight_norm`` and ``prune``).
    """

    def __init__(self, root: nn.Module):
        super().__init__()
        self.root = root

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        root = self.root
        for key, hook in list(root._forward_pre_hooks.items()):
            seen_args, seen_kwargs = tree_map(_own_memory, (args, kwargs))  # one may write to its input
            if key in root._forward_pre_hooks_with_kwargs:
                hook(root, seen_args, seen_kwargs)
            else:
                hook(root, seen_args)
        return root.forward(*args, **kwargs)


def _own_memory(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _call(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's forward with ``tensors`` in the places of its parameters and buffers."""
    named = {f"root.{n}": t for n, t in tensors.items()}
    return functional_call(WithoutHooks(module), named, args, kwargs, tie_weights=True)


def _one(call: Call, params: dict[str, Tensor], leaves: list[Any], box: dict[str, Any]) -> list[Tensor]:
    """The subtree on one sample; its output's tensors, the rest of the structure left in ``box``."""
    args, kwargs = tree_unflatten(leaves, call.spec)
    out, box["spec"] = tree_flatten(make_known(_call(call.module, params, args, kwargs)))
    for leaf in out:
        if not isinstance(leaf, (Tensor, bool, str, type(None), torch.dtype, torch.device)):
            what = f"the number {leaf}" if isinstance(leaf, (int, float)) else f"a {type(leaf).__name__}"
            cache = " A cache of transformers is left out by model.config.use_cache = False." if "Cache" in what else ""
            raise NotPerSample(
                f"{type(call.module).__name__} returns {what}, and runs one sample at a time: that of the batch is not "
                "known. Return tensors with a batch dimension (in tuples, lists, dicts or dataclasses), and make the "
                f"rest of them outside of the model.{cache}",
                subtree=call.path,
            )
    box["leaves"] = out
    return [x for x in out if isinstance(x, Tensor)]


def _rebuild(box: dict[str, Any]) -> Callable[[list[Any]], Any]:
    def rebuild(tensors: list[Any]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in box["leaves"]], box["spec"])

    return rebuild


def _sample_first(call: Call) -> list[Any]:
    """Every batched leaf as `[B, ...]`, where the rest is the sample as a batch of one (or its rows)."""
    out = []
    for x, layout in zip(call.leaves, call.layouts, strict=True):
        if layout is None:
            out.append(x)
        else:
            front = layout.to_front(x, call.size)
            out.append(front if layout.flat else front.unsqueeze(1 + layout.dim))
    return out


def _mapped(call: Call, copies: dict[str, Tensor]) -> Outputs:
    box: dict[str, Any] = {}
    rows = _sample_first(call)
    batched = [x for x, lay in zip(rows, call.layouts, strict=True) if lay is not None]

    def one(params: dict[str, Tensor], samples: list[Tensor]) -> list[Tensor]:
        rest = iter(samples)
        full = [next(rest) if lay is not None else x for x, lay in zip(rows, call.layouts, strict=True)]
        return _one(call, params, full, box)

    with RepairedForVmap():
        return vmap(one, randomness="different")(copies, batched), _rebuild(box)


def _looped(call: Call, copies: dict[str, Tensor]) -> Outputs:
    box: dict[str, Any] = {}
    rows = _sample_first(call)
    results = []
    buffers = dict(call.module.named_buffers())
    before = {n: b.detach().clone() for n, b in buffers.items()} if call.size > 1 else {}
    written: list[str] = []
    for i in range(call.size):
        sample = [x if lay is None else x[i] for x, lay in zip(rows, call.layouts, strict=True)]
        # The model runs once: a counter or a power iteration goes one step on, and every sample starts from the same.
        given = {n: before[n].clone() for n in written}
        results.append(_one(call, {**{n: c[i] for n, c in copies.items()}, **given}, sample, box))
        if i == 0 and before:
            now = dict(call.module.named_buffers())
            written = [n for n, b in before.items() if now.get(n) is not buffers[n] or not same_bits(buffers[n], b)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)], _rebuild(box)


class DenseGradients(TorchFunctionMode):
    """Tables built with ``sparse=True``: a sparse gradient cannot go back into one of the parameter's copies."""

    _PLACES = {F.embedding: 6, F.embedding_bag: 7}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        place = self._PLACES.get(func)
        if place is None:
            return func(*args, **(kwargs or {}))
        return func(*args[:place], *((False,) if len(args) > place else ()), *args[place + 1 :], **self._dense(kwargs))

    @staticmethod
    def _dense(kwargs: Any) -> dict[str, Any]:
        return {n: False if n == "sparse" else v for n, v in (kwargs or {}).items()}


class RepairedForVmap(TorchFunctionMode):
    """Functions whose batching rule drops an option: `embedding` under `vmap` gives `padding_idx` a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None) if func is F.embedding else None
        out = func(*args, **kwargs)
        if padding is None:
            return out
        ids, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        padding = padding + weight.shape[0] if padding < 0 else padding
        return torch.where((ids == padding).unsqueeze(-1), out.detach(), out)


def _check_vmap(call: Call, tracked: dict[str, Tracked]) -> None:
    """Before the first batch: `vmap` is trusted with this subtree if outputs and gradients are the loop's."""
    results = []
    call = call._replace(leaves=[x.detach() if isinstance(x, Tensor) else x for x in call.leaves])
    path, size = call.path or "the model", call.size
    for each in (_mapped, _looped):
        copies = {n: t.gsm_value.detach().expand(size, *t.shape).clone().requires_grad_() for n, t in tracked.items()}
        try:
            # The same random numbers for all samples at once as for one after the other, and the same buffers.
            with Settled(0.3, 0.3), buffers_restored(call.module), DenseGradients():
                outputs, _ = each(call, copies)
                floating = [o for o in outputs if o.requires_grad]
                total = sum(
                    (
                        (o.double() * torch.arange(1, o.numel() + 1, device=o.device).reshape(o.shape).sin()).sum()
                        for o in floating
                    ),
                    torch.zeros((), dtype=torch.float64),
                )
                grads = torch.autograd.grad(total, list(copies.values()), allow_unused=True)
        except Unresolvable:
            raise
        except Exception as error:
            if each is _mapped:
                raise VmapFails(f"{path}: vmap fails ({str(error).splitlines()[0]})", subtree=call.path) from error
            raise
        results.append([*floating, *[g for g in grads if g is not None]])
    if len(results[0]) != len(results[1]) or not all(map(_close, *results)):
        raise VmapFails(f"{path}: vmap and the loop give different gradients", subtree=call.path)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = 1e-8 if a.dtype == torch.float64 else 1e-3
    return bool((a - b).abs().max() <= tolerance * b.abs().max() + 1e-12) if a.numel() else True


def _joined(out: Tensor, layouts: list[Layout | None], active: Pass, path: str, tracked: dict[str, Tracked]) -> Tensor:
    """`[B, *output of one sample]` as the output of the whole batch."""
    layout = next((lay for lay in layouts if lay is not None), Layout(0))
    if layout.flat == "major" and out.dim() > 1:
        return out.flatten(0, 1)
    dim = layout.dim
    if out.dim() < 2 + dim or out.shape[1 + dim] != 1 or layout.flat:
        raise NotPerSample(
            f"{path or 'the model'} ({', '.join(tracked)}): its output of shape {tuple(out.shape[1:])} for one sample "
            "has no batch dimension",
            subtree=path,
        )
    return out.squeeze(1 + dim).movedim(0, dim)


def _empty(
    active: Pass, module: nn.Module, tracked: dict[str, Tracked], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """No samples: the subtree runs on the empty batch, and its parameters' gradient is zero."""
    params = {n: t.gsm_value.detach() + expanded(active, t).sum(0) for n, t in tracked.items()}
    return _call(module, params, args, kwargs)


def _plain(module: nn.Module, tracked: dict[str, Tracked], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole batch at once, with nothing captured: all that a first look at the model needs."""
    params = {n: t.gsm_value.detach().requires_grad_() for n, t in tracked.items()}
    return _call(module, params, args, kwargs)
