"""Walking the tree: how each module is handled, and what to do when the first batch shows that a plan does not hold."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks as OpacusHooks
from opacus.grad_sample import GradSampleHooksFastGradientClipping as OpacusGhostHooks
from torch import Tensor, nn

import grad_samplers
from grad_samplers import Sampler, lookup
from grad_samplers.compositions import composition
from gsm.capture import Capture, CapturedForward, Runner
from gsm.compiled import warn_if_compiled
from gsm.layers import run_sampler
from gsm.layout import SamplesInfluenceEachOther, Unresolvable
from gsm.plan import Entry, Plan, covers_functionally, initial_entry, joined, own_trainable
from gsm.probe import OnlyWhole, probe
from gsm.probe_buffers import ExtraStates, Parameters, Written, check_buffers
from gsm.reentrant import cut_off
from gsm.structures import tensors_in
from gsm.subtree import VmapFails, run_subtree
from gsm.tape import Tape
from gsm.tracked import Tracked
from gsm.trial import Trial
from gsm.undisturbed import undisturbed

OUTSIDE = (
    "it was used outside the wrapped model's forward (in the loss, say), so that share of its per-sample gradient is "
    "unknown. Compute it inside the model's forward, or freeze the parameter."
)

PART = (
    "{path} was called by itself, but its parameters' gradients can only be taken apart by sample with the module "
    "above it as a whole: call that one, or the model."
)
UNPROBED = (
    "{path} was called by itself and could not be run on a few samples alone, so whether samples influence each other "
    "in it is not known: {error}"
)


class CapturePlan:
    """A wrapped model's plan, and the capture that carries it out."""

    def __init__(self, root: nn.Module, tape: Tape, mode: str, strict: bool):
        self.root, self.tape, self.mode, self.strict = root, tape, mode, strict
        self.subtrees: dict[str, str] = {}  # path -> "functorch" or "loop"
        self.reasons: dict[str, str] = {}
        self.probed: dict[Any, Any] = {}
        self.guards: list[Any] = []
        self.build()

    def build(self) -> None:
        """Decides from the tree alone, and installs the capture."""
        self.plan = Plan()
        self.everything = list(self.root.parameters())
        self.seen = _state(self.everything)
        self.tree = [(m, list(m._modules.values()), dict(m._parameters)) for m in self.root.modules()]
        self.trainable = [p for p in self.everything if p.requires_grad]
        self.written = Written(self.root)
        self.tape.params = self.trainable
        self.tape.names = {id(p): n for n, p in self.root.named_parameters(remove_duplicate=True)}
        covered: set[str] = set()
        roots: set[str] = set()
        runners: dict[str, Runner] = {}
        tracked: dict[int, Tracked] = {}
        for path, module in self.root.named_modules():
            if path in covered:
                continue
            own = own_trainable(module)
            if path in self.subtrees or (self.mode in ("functorch", "loop") and own):
                rung = self.subtrees.get(path, self.mode)
                roots.add(path)
                names = [n for n, p in module.named_parameters() if p.requires_grad]
                covered |= {joined(path, n) for n, _ in module.named_modules() if n}
                views = {n: self._tracked(tracked, p) for n, p in module.named_parameters() if p.requires_grad}
                runners[path] = run_subtree(path, views, loop=rung == "loop")
                why = self.reasons.get(path, f"mode={self.mode!r}")
                self.plan.entries[path] = Entry(
                    path, type(module).__name__, [joined(path, n) for n in names], rung, why
                )
                continue
            if not own and composition(module) is None:
                continue
            sampler, composed = own_sampler(module), composition(module)
            if sampler is not None and own:
                runners[path] = run_sampler(sampler, path, self.strict)
            elif composed is not None and any(p.requires_grad for p in module.parameters()):
                runners[path] = _composed(composed)
            if own:
                entry = initial_entry(path, module, composed is not None and sampler is None)
                if sampler is not None:
                    entry.rung, entry.why = "sampler", f"registered for {type(module).__name__}"
                self.plan.entries[path] = entry
        self.capture = Capture(self.root, self.tape)
        self.capture.attach(runners, roots, covered)
        self.capture.whole = self._whole
        for p in self.trainable:
            self.guards.append(p.register_post_accumulate_grad_hook(_weakly(self._caught)))
        if self.strict:
            for path, module in self.root.named_modules():
                if isinstance(module, MIXING):
                    self.guards.append(module.register_forward_pre_hook(partial(_refuse_mixing, path)))

    def _tracked(self, made: dict[int, Tracked], p: nn.Parameter) -> Tracked:
        if id(p) not in made:
            made[id(p)] = Tracked.of_parameter(self.tape, p)
        return made[id(p)]

    def _caught(self, p: Tensor) -> None:
        """A handled parameter got an ordinary gradient: something used it where nothing saw it."""
        if not self.tape.enabled:
            return
        p.grad = None
        why = cut_off() or OUTSIDE
        raise RuntimeError(f"{self.tape.names.get(id(p), 'A parameter')} received an ordinary gradient: {why}")

    def described(self) -> Plan:
        """The plan, with the reading chosen for each layer once a batch was seen."""
        for entry in self.plan:
            for (key, *_), choice in self.tape.planner.choices.items():
                if self.tape.mode != "hooks" and any(str(key) == name for name in entry.parameters):
                    entry.reading = "gradients kept" if choice.keep else "norm from the pair"
                    entry.estimate = choice.summary()
        return self.plan

    # -- before a batch ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Builds the plan anew if parameters were frozen, unfrozen, moved, converted or replaced since, or modules."""
        if self.seen != _state(self.everything) or any(_changed(*known) for known in self.tree):
            self._rebuild()

    def _rebuild(self) -> None:
        from gsm.ledger import forget_tape, register_tape

        for p in self.trainable:
            forget_tape(p, self.tape)
        self._detach()
        self.tape.layouts = {}
        self.probed = {}
        self.build()
        for p in self.trainable:
            register_tape(p, self.tape)

    def _whole(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Any:
        """A call of the model or of a part: probed before its first batch and the first of each other kind of input."""
        self.refresh()
        while True:
            try:
                here = self._again(forward)
                if here is None:
                    return forward.original(*args, **kwargs)
                forward = here
                new = self._know(forward, args, kwargs, size)
                marks = self.written.marks() if self.strict else []
                out = self.capture.run_pass(forward, args, kwargs, size)
                if self.strict:
                    self.written.compare(marks, looked_at=new)
                if new:
                    self.capture.check_all_seen(tensors_in(out))
                return out
            except Unresolvable as error:  # of the probe, or of a batch that took a path which the probe did not
                self._escalate(error)

    def _again(self, forward: CapturedForward) -> CapturedForward | None:
        """What stands before the same module in the present plan; None if it has nothing to train any more."""
        here = self.capture.forwards.get(forward.path)
        if here is not None and here.module is forward.module:
            return here
        if any(p.requires_grad and id(p) in self.tape.names for p in forward.module.parameters()):
            raise Unresolvable(PART.format(path=forward.path))
        return None

    def _know(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> bool:
        """Fills ``tape.layouts`` for this kind of input; whether it is a new one."""
        kind = forward.path, signature(args, kwargs), *(m.training for m, *_ in self.tree)
        new = kind not in self.probed and size > 0
        before = self.tape.layouts if forward.path else {}  # of other parts, which checkpoints may run once more
        if new:
            warn_if_compiled(self.root)
            parameters = Parameters(self.root) if self.strict else None
            extra = ExtraStates(self.root)
            known = self._probe(forward, args, kwargs, size)
            extra.restore()
            if parameters is not None and known:
                with undisturbed(self.root), torch.no_grad():
                    run, written = (lambda values: forward.original(*values[0], **values[1])), parameters.written()
                    more = partial(Trial(self.capture, forward, args, kwargs, size).inputs, size + 1)
                    extra.check(run, (args, kwargs), more)
                    check_buffers(self.root, run, (args, kwargs), written, more)
            self.probed[kind] = self.tape.layouts
        self.tape.layouts = {**before, **self.probed.get(kind, {})}
        return new

    def _probe(self, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> bool:
        """Fills ``tape.layouts``; False if a part of the model runs on this batch only, as with what another left."""
        try:
            probe(self.capture, forward, args, kwargs, size, self.strict)
        except OnlyWhole as error:
            if not forward.path:
                raise
            warnings.warn(UNPROBED.format(path=forward.path, error=error), stacklevel=2)
            self.tape.layouts = {}
            return False
        return True

    def _escalate(self, error: Unresolvable) -> None:
        """Hands the module that owns the parameter to the next rung, or the module above it."""
        if error.subtree is None and not error.parameters:
            raise error
        rung = "loop" if self.mode == "loop" or isinstance(error, VmapFails) else "functorch"
        if isinstance(error, VmapFails):
            path = error.subtree or ""
        elif error.subtree is None:
            path = self._next_owner(error)
        elif error.subtree == "":
            raise error
        else:
            path = self._above(error.subtree)
        if self.subtrees.get(path) in (rung, "loop"):
            raise error
        before = self.reasons.get(path) if isinstance(error, VmapFails) else None
        self.subtrees[path], self.reasons[path] = rung, f"{before}; {error}" if before else str(error)
        for below in [p for p in self.subtrees if p != path and (not path or p.startswith(path + "."))]:
            del self.subtrees[below]
        self._rebuild()

    def _next_owner(self, error: Unresolvable) -> str:
        """A module that holds the parameter and is not yet handled as a whole: shared parameters have several."""
        param = dict(self.root.named_parameters()).get(error.parameters[0])
        for path, module in self.root.named_modules():
            inside = any(not s or path == s or path.startswith(s + ".") for s in self.subtrees)
            if param is not None and not inside and any(p is param for p in module._parameters.values()):
                return path
        # It is used outside of every module that owns it: the one above is the next that can be taken whole.
        for path in [p for p in self.subtrees if p and param is not None]:
            if any(p is param for p in self.root.get_submodule(path).parameters()):
                return self._above(path)
        raise error

    def _above(self, path: str) -> str:
        """The nearest module above that has a forward of its own."""
        while path:
            path = path.rpartition(".")[0]
            module = self.root.get_submodule(path)
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                return path
        return ""

    # -- on and off --------------------------------------------------------------------------------------------------

    def set_enabled(self, enabled: bool) -> None:
        self.tape.enabled = enabled

    def _detach(self) -> None:
        for guard in self.guards:
            guard.remove()
        self.guards = []
        self.capture.detach()

    def close(self) -> None:
        self._detach()
        self.tape.groups, self.tape.live = [], False


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep its object alive: the garbage collector cannot see a cycle through a parameter."""
    held = weakref.WeakMethod(method)

    def hook(p: Tensor) -> None:
        live = held()
        if live is not None:
            live(p)

    return hook


def _state(params: list[nn.Parameter]) -> list[tuple[bool, int]]:
    """What a plan depends on: whether a parameter wants a gradient, and where its values lie."""
    return [(p.requires_grad, p.data_ptr()) for p in params]


def _changed(module: nn.Module, children: list[Any], parameters: dict[str, Any]) -> bool:
    """Whether a module has other children or parameters now (but for tensors put in place of them for one call)."""
    now = module._parameters
    if len(now) != len(parameters) or any(map(operator.is_not, module._modules.values(), children)):
        return True
    if len(module._modules) != len(children):
        return True
    others = (now.get(name) for name, p in parameters.items() if now.get(name) is not p)
    return any(other is None or isinstance(other, nn.Parameter) for other in others)


def prepare(root: nn.Module, tape: Tape, *, mode: str, strict: bool) -> CapturePlan:
    """Plans and installs the capture of a model."""
    return CapturePlan(root, tape, mode, strict)


def _composed(function: Callable[..., Any]) -> Runner:
    def run(capture: Capture, forward: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(forward.module, *args, **kwargs)

    return run


def own_sampler(module: nn.Module) -> Sampler | None:
    """The sampler that has to see the module's call itself: a user's, or one that no known function stands for."""
    users = registered_with_opacus(module)
    if users is not None or covers_functionally(module):
        return users
    sampler = lookup(module)
    return sampler if sampler is not None and grad_samplers.reason_unsupported(module) is None else None


def registered_with_opacus(module: nn.Module) -> Sampler | None:
    """A sampler that a user registered with `opacus.grad_sample.register_grad_sampler` for exactly this class."""
    function = OpacusHooks.GRAD_SAMPLERS.get(type(module))
    if function is None or _came_with_opacus(type(module), function):
        return None
    norm = OpacusGhostHooks.NORM_SAMPLERS.get(type(module))
    return Sampler(type(module), grad=function, norm=None if _came_with_opacus(type(module), norm) else norm)


def _came_with_opacus(cls: type, function: Any) -> bool:
    builtin = cls.__module__.startswith(("torch.", "opacus."))
    return builtin and getattr(function, "__module__", "").startswith("opacus.")


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What distinguishes one kind of call of the model from another: which arguments are tensors of which rank."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", value.dim(), value.is_floating_point())
        if isinstance(value, (list, tuple)):
            return tuple(kind(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, kind(v)) for k, v in value.items())
        return type(value).__name__

    return kind(args), kind(kwargs), torch.is_autocast_enabled()


MIXING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _refuse_mixing(path: str, module: nn.Module, args: Any) -> None:
    """Refuses to run a module that mixes samples; one that the model owns but does not call does no harm."""
    reason = mixing_reason(path, module)
    if reason and torch.is_grad_enabled():
        raise SamplesInfluenceEachOther(reason)


def mixing_modules(root: nn.Module) -> list[str]:
    """One sentence for each module below ``root`` that is known to make samples influence each other."""
    found = [mixing_reason(path, module) for path, module in root.named_modules()]
    return [reason for reason in found if reason]


def mixing_reason(path: str, module: nn.Module) -> str | None:
    """Why a module makes samples influence each other, if it is one of those that do."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return (
            f"{path or 'the model'} is a {type(module).__name__} in training mode: batch statistics make samples "
            "influence each other, so no clipping bounds one record's contribution. Replace it by GroupNorm or "
            "LayerNorm (opacus.validators.ModuleValidator.fix(model) does), or put it in eval mode to use fixed "
            "statistics."
        )
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats and module.training:
        return (
            f"{path or 'the model'} is a {type(module).__name__} with track_running_stats=True: its running "
            "statistics leave the model without noise. Build it with track_running_stats=False."
        )
    return None
