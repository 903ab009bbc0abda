"""What stands in front of a module's forward while it is wrapped.

A :class:`CapturedForward` is set as the instance's `forward`, on the model itself and on every module below it that
holds trainable parameters; taking it away restores the module exactly. The outermost one that is called opens a pass:
it puts the tracked parameters in the modules' places and takes them out again, whatever happens.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map_only

from gsm.bags import bags_in, has_bags
from gsm.compiled import eager_runner
from gsm.functions import Poison
from gsm.layout import Unresolvable
from gsm.structures import tensors_in
from gsm.tape import Tape
from gsm.tracked import Tracked

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since PyTorch 2.7
Runner = Callable[["Capture", "CapturedForward", tuple[Any, ...], dict[str, Any]], Any]


class CapturedForward:
    """In front of one module's forward. Without a capture (in a copy of the module) it only calls that forward."""

    def __init__(self, module: nn.Module, capture: Capture | None, runner: Runner | None = None, path: str = ""):
        self.module, self.capture, self.runner, self.path = module, capture, runner, path
        self.previous: Any = module.__dict__.get("forward")
        self.bypass = False
        self.tracked: dict[str, nn.Parameter] = {}  # the module's own parameters that the capture tracks, by name

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward it stands for: transformers' `generate` and `Trainer` look at it."""
        return inspect.signature(self.previous or types.MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> Any:
        """Of the forward it stands for: `torch.export` looks where it was written."""
        return getattr(self.previous or type(self.module).forward, "__code__", type(self).original.__code__)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capture = self.capture
        if capture is None or self.bypass or not capture.tape.enabled or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if capture.tape.active is None:
            if torch.jit.is_tracing() or _is_exporting():  # what comes of it trains nothing
                return self.original(*args, **kwargs)
            return capture.eagerly(capture.open, self, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.capture is not None
        held = self.module._parameters
        swapped = [name for name, p in self.tracked.items() if held.get(name) is not p]
        if swapped:
            return self._run_swapped(swapped, args, kwargs)
        return self.original(*args, **kwargs) if self.runner is None else self.runner(self.capture, self, args, kwargs)

    def _run_swapped(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With other tensors in its parameters' places for this call (`torch.func.functional_call`): they show."""
        if self.runner is not None:
            raise RuntimeError(
                f"{type(self.module).__name__} is handled as a whole, and was called with other tensors in place of "
                f"its parameters {', '.join(names)} (torch.func.functional_call): their gradients cannot be taken "
                "apart by sample. Wrap with mode='hooks' or 'ghost', and hand weights to modules without a sampler "
                "of their own."
            )
        places = {name: self.module.__dict__.pop(name) for name in names if name in self.module.__dict__}
        try:
            return self.original(*args, **kwargs)
        finally:
            self.module.__dict__.update(places)

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        if self.previous is not None:
            self.module.__dict__["forward"] = self.previous
        elif self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedForward:
        new = copy(self)
        memo[id(self)] = new
        new.capture, new.runner, new.tracked = None, None, {}
        new.module, new.previous = deepcopy(self.module, memo), deepcopy(self.previous, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "capture": None, "runner": None, "tracked": {}}


class Capture:
    """The captured forwards and tracked parameters of one wrapped model."""

    def __init__(self, root: nn.Module, tape: Tape):
        self.root, self.tape = root, tape
        self.has_bags = has_bags(root)
        self.eagerly = eager_runner()
        self.forwards: dict[str, CapturedForward] = {}
        self._sites: list[tuple[dict[str, Any], str, Tracked]] = []
        self._inside: dict[str, list[tuple[dict[str, Any], str, Tracked]]] = {}
        # What runs a call from outside: of the model itself, or of a part of it.
        self.whole: Callable[[CapturedForward, tuple[Any, ...], dict[str, Any], int], Any] | None = None

    def attach(self, runners: dict[str, Runner], subtrees: set[str], covered: set[str]) -> None:
        """Installs captured forwards, and tracks all trainable parameters.

        Those inside a subtree are tracked for uses from outside it; while it runs, it hides them.

        Args:
            runners: what runs in place of a module's forward, by path; by default the forward itself.
            subtrees: roots of the subtrees that are handled as a whole.
            covered: the modules below those roots: they get nothing.
        """
        self.tape.templates = {}  # they hold the tracked parameters of an earlier attachment
        tracked: dict[int, Tracked] = {}
        for path, module in self.root.named_modules():
            inside = next((r for r in subtrees if r == path or not r or path.startswith(r + ".")), None)
            own = [(n, p) for n, p in module._parameters.items() if p is not None and p.requires_grad]
            # Modules above a parameter too: checkpointing may run any of them again, apart from the model's forward.
            if path not in covered and (module is self.root or any(p.requires_grad for p in module.parameters())):
                forward = CapturedForward(module, self, runners.get(path), path)
                forward.tracked = dict(own)
                forward.install()
                self.forwards[path] = forward
            for name, p in own:
                if id(p) not in tracked:
                    tracked[id(p)] = Tracked.of_parameter(self.tape, p)
                site = (module.__dict__, name, tracked[id(p)])
                self._sites.append(site)
                if inside is not None:
                    self._inside.setdefault(inside, []).append(site)

    @contextmanager
    def hidden(self, subtree: str) -> Iterator[None]:
        """Inside, the modules of a subtree show their own parameters again."""
        sites = [site for site in self._inside.get(subtree, ()) if site[1] in site[0]]
        for place, name, _ in sites:
            del place[name]
        try:
            yield
        finally:
            for place, name, tracked in sites:
                place[name] = tracked

    def detach(self) -> None:
        for forward in self.forwards.values():
            forward.remove()
        self.forwards, self._sites, self._inside = {}, [], {}

    def check_all_seen(self, outputs: list[Tensor]) -> None:
        """Refuses a use that was not resolved: the outputs' graph must not lead to a parameter itself."""
        names = {id(t.gsm_value): t.gsm_name for _, _, t in self._sites}
        left, seen = [x.grad_fn for x in outputs], set()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = names.get(id(getattr(node, "variable", None)))
            if name is not None:
                raise Unresolvable(
                    f"{name}: used where its gradient cannot be followed (by a torch.autograd.Function, torch.vmap or "
                    "a scripted function)",
                    parameters=(name,),
                )
            left += [parent for parent, _ in node.next_functions]

    def stale(self) -> bool:
        """Whether a parameter was given other storage since it was tracked (`model.to(...)`, `p.data = ...`)."""
        return any(
            t.gsm_param is not None and t.gsm_value.data_ptr() != t.gsm_param.data_ptr() for _, _, t in self._sites
        )

    def open(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a forward as a pass of its own."""
        recomputed = torch._C._current_graph_task_id() != -1 and self.tape.groups
        if recomputed:  # activation checkpointing: a piece of the forward again, its batch anywhere
            return self.run_pass(forward, args, kwargs, self.tape.groups[-1].batch_size)
        bags = bags_in((args, kwargs)) if self.has_bags else None
        size = batch_size(args, kwargs, self.tape.batch_first) if bags is None else len(bags.offsets)
        if size is None:
            raise ValueError(
                f"{type(forward.module).__name__} was called without any tensor among its arguments, so the batch "
                "size is unknown: pass the inputs as tensors (in tuples, lists or dicts if need be)."
            )
        if size == 0:
            return self._without_samples(forward, args, kwargs)
        self.tape.calls += 1
        for told in self.tape.before_pass:
            told(forward.path, args, kwargs)
        out = self._run_whole(forward, args, kwargs, size)
        for asked in self.tape.after_pass:
            asked(forward.path, forward.module, out, size)
        return out

    def _run_whole(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Any:
        if self.whole is None:
            return self.run_pass(forward, args, kwargs, size)
        return self.whole(forward, args, kwargs, size)

    def _without_samples(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An empty batch: as it is where the model can, there and back, else as :mod:`gsm.empty` says."""
        from gsm import empty  # it needs what is built on this module

        out, failed = None, None
        try:
            out = self._run_whole(forward, args, kwargs, 0)
            if empty.has_backward(forward, self.root, self.tape, args, kwargs):
                return out
        except Exception as error:
            failed = error
        for fill in (0, 1):
            try:
                with torch.no_grad():
                    row = forward.original(*empty.with_one_row(args, fill), **empty.with_one_row(kwargs, fill))
            except Exception:
                continue
            tracked = list({id(t): t for _, _, t in self._sites}.values())
            return empty.cut(row, self.tape.begin(0), tracked, self.tape.batch_first)
        if failed is not None:
            raise failed
        return out

    def run_pass(
        self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, log: Any = None
    ) -> Any:
        self.tape.active = self.tape.begin(size, log)
        try:
            for place, name, tracked in self._sites:
                place[name] = tracked
            out = forward.run(args, kwargs)
        finally:
            self.tape.active = None
            for place, name, _ in self._sites:
                place.pop(name, None)
        return _released(out, self.tape)


def _released(out: Any, tape: Tape) -> Any:
    """A parameter that leaves the model without having met a sample has no per-sample gradient to give."""

    def release(t: Tracked) -> Tensor:
        return Poison.apply(tape.anchor, t.gsm_value.detach(), t.gsm_name)

    if isinstance(out, Tracked):
        return release(out)
    if isinstance(out, Tensor) or out is None:
        return out
    if isinstance(out, (tuple, list, dict)):
        leaves, _ = tree_flatten(out)
        if any(isinstance(leaf, Tracked) for leaf in leaves):
            return tree_map_only(Tracked, release, out)
    return out


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], batch_first: bool) -> int | None:
    """The size of the batch dimension of the first tensor among the arguments, None if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, PackedSequence):
            return int(value.batch_sizes[0])
        for x in tensors_in(value):
            if x.dim() == 1 or (x.dim() > 1 and batch_first):
                return x.shape[0]
            if x.dim() > 1:
                return x.shape[1]
    return None
