"""`GradSampleModule`: a model, unmodified, whose backward gives per-sample gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample import GradSampleHooks as OpacusHooks
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gsm.capture import CapturedForward
from gsm.compiled import EAGER
from gsm.layout import SamplesInfluenceEachOther
from gsm.ledger import forget_tape, noise_is_scaled, register_tape
from gsm.loss_check import LossCheck
from gsm.plan import Plan
from gsm.planner import Planner
from gsm.tape import Tape
from gsm.walk import CapturePlan, mixing_modules, prepare

ACCUMULATES = (
    "Poisson sampling is not compatible with grad accumulation. You need to call optimizer.step() after "
    "every forward/backward pass, or split logical batches with max_physical_batch_size=."
)
USED = (
    " Here the gradients of the last step() are still there: call the private optimizer's zero_grad() before this "
    "backward (with a GAN, before the generator's backward through the discriminator, too)."
)
OUTSIDE = (
    " Here an earlier backward's gradients wait only at {names}: if the private optimizer does not hold them, freeze "
    "them with requires_grad_(False) before make_private, or put them into the optimizer."
)
SIDE_BY_SIDE = (
    "{n} backward passes without zero_grad() in between: p.grad_sample is a list of all their samples. Opacus's "
    "DPOptimizer clips every row of it on its own, adds noise for one bound and charges one step: a record that is in "
    "several of them is not covered by its epsilon. Call zero_grad() before a new backward, or use gsm.DPOptimizer, "
    "which scales the noise. If all rows are of different records, nothing is wrong."
)
MODES = ("auto", "hooks", "ghost", "functorch", "loop")


class GradSampleModule(AbstractGradSampleModule):
    """Wraps a model so that one ordinary backward yields every sample's own gradient.

    Args:
        model: the model; its code, parameters and buffers stay as they are.
        batch_first: the batch is the first dimension of the inputs; False: the second (of tensors with two or more).
        loss_reduction: "mean" or "sum", how the loss combines the samples' own losses.
        strict: refuse models in which samples influence each other, and losses that show it (:mod:`gsm.loss_check`).
            False is for experiments without privacy claims.
        force_functorch: the same as `mode="functorch"`.
        mode: "hooks" leaves `p.grad_sample`, `[batch, *p.shape]`, on every trainable parameter; "ghost" and "auto"
            keep only what norms and weighted sums need ("ghost" the least memory, "auto" the least time within
            `memory_budget`); "functorch" and "loop" compute `p.grad_sample` that way for every module.
        memory_budget: bytes that materialised gradients may take in mode "auto"; by default as much
            as the non-private step's activations and a tenth (:mod:`gsm.planner`), measured before the first batch.

    Raises:
        ValueError: for an unknown mode or reduction, a model without trainable parameters or already wrapped, or (if
            strict) in which samples influence each other.

    Example:
        >>> model = GradSampleModule(nn.Linear(3, 2))
        >>> model(torch.randn(5, 3)).mean().backward()
        >>> model.weight.grad_sample.shape
        torch.Size([5, 2, 3])
    """

    # Opacus's table, under its name: what its `register_grad_sampler` fills, and scripts read or write directly.
    GRAD_SAMPLERS = OpacusHooks.GRAD_SAMPLERS
    _warned = False  # of a compiled caller

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        mode: str = "hooks",
        memory_budget: int | None = None,
    ):
        _check(model, loss_reduction, mode)
        if strict:
            self.validate(model, strict=True)
        super().__init__(model, batch_first=batch_first, loss_reduction=loss_reduction)
        self.strict, self.force_functorch = strict, force_functorch
        self.mode = "functorch" if force_functorch else mode
        self.memory_budget = memory_budget
        self.grad_accumulation_allowed = True
        self.hooks_enabled = False
        self._captured: CapturePlan | None = None
        self.add_hooks()

    # -- hooks, in Opacus's words ------------------------------------------------------------------------------------

    def add_hooks(self, **_: Any) -> None:
        """Puts the capture in place (again, after :meth:`remove_hooks`)."""
        if self._captured is not None:
            raise ValueError("Trying to add hooks twice to the same model")
        reading = {"functorch": "hooks", "loop": "hooks"}.get(self.mode, self.mode)
        tape = Tape(
            mode=reading,
            batch_first=self.batch_first,
            loss_reduction=self.loss_reduction,
            planner=Planner(reading, self.memory_budget),
        )
        self._captured = prepare(self._module, tape, mode=self.mode, strict=self.strict)
        tape.after_backward.append(self._after_backward)
        self._losses = LossCheck(tape) if self.strict else LossCheck()
        for p in tape.params:
            register_tape(p, tape)
        self.hooks_enabled = True

    def remove_hooks(self) -> None:
        """Takes the capture away; the model is exactly as before it was wrapped."""
        if self._captured is not None:
            self._captured.close()
            for p in self._captured.tape.params:
                forget_tape(p, self._captured.tape)
            self._captured = None
        self.hooks_enabled = False

    def disable_hooks(self) -> None:
        """Forwards are ordinary until :meth:`enable_hooks`."""
        self.hooks_enabled = False
        if self._captured is not None:
            self._captured.set_enabled(False)

    def enable_hooks(self) -> None:
        """The opposite of :meth:`disable_hooks`."""
        self.hooks_enabled = True
        if self._captured is not None:
            self._captured.set_enabled(True)

    def forbid_grad_accumulation(self) -> None:
        """A second backward before the first one's gradients are used or cleared is an error from now on."""
        self.grad_accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """The opposite of :meth:`forbid_grad_accumulation`."""
        self.grad_accumulation_allowed = True

    def _warn_if_side_by_side(self) -> None:
        held = next((getattr(p, "grad_sample", None) for p in self._tape.params if p.requires_grad), None)
        if not isinstance(held, list) or noise_is_scaled([p for p in self._tape.params if p.requires_grad]):
            return
        unused = [g for g in held if not hasattr(g, "_processed")]
        if unused[1:]:
            warnings.warn(SIDE_BY_SIDE.format(n=len(unused)), stacklevel=2)

    def _after_backward(self) -> None:
        if self.grad_accumulation_allowed:
            return self._warn_if_side_by_side()
        tape = self._tape
        trainable = [p for p in tape.params if p.requires_grad]
        earlier = {p: h[:-1] for p in trainable if isinstance(h := getattr(p, "grad_sample", None), list) and h[1:]}
        before = [g for g in tape.groups if g.delivered][:-1]
        if not earlier and not before:
            return
        used = bool(earlier) and all(hasattr(g, "_processed") for held in earlier.values() for g in held)
        left = [p for p in trainable if p in earlier or any(g.holds_any([p]) for g in before)]
        why = ACCUMULATES
        if used and not before:
            why += USED
        elif 0 < len(left) < len(trainable):
            why += OUTSIDE.format(names=", ".join(tape.names[id(p)] for p in left[:5]))
        raise ValueError(why)

    # -- what a user looks at ----------------------------------------------------------------------------------------

    @property
    def _tape(self) -> Tape:
        if self._captured is None:
            raise RuntimeError("The hooks of this GradSampleModule were removed: call add_hooks() first.")
        return self._captured.tape

    @property
    def plan(self) -> Plan:
        """How every trainable parameter is handled; `print(model.plan)` is a table."""
        if self._captured is None:
            raise RuntimeError("The hooks of this GradSampleModule were removed: call add_hooks() first.")
        return self._captured.described()

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        """Norms `[batch]` of the per-sample gradients of the last backward, over all trainable parameters."""
        held = [getattr(p, "grad_sample", None) for p in self._tape.params if p.requires_grad]
        if any(h is not None for h in held):
            last = [h[-1] if isinstance(h, list) else h for h in held if h is not None]
            return torch.stack([g.flatten(1).norm(dim=1) for g in last]).norm(dim=0)
        return self._tape.norms_of_last_batch()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        captured, compiled = self._captured, torch.compiler.is_dynamo_compiling()
        if not compiled and self._module._compiled_call_impl is None:
            return self._module(*args, **kwargs)
        if captured is None or not captured.tape.enabled or not torch.is_grad_enabled():
            return self._module(*args, **kwargs)
        return captured.capture.eagerly(self._compiled_forward if compiled else self._module, *args, **kwargs)

    def _compiled_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward, reached from a compiled function: `torch.compile(wrapped)`, a compiled training step."""
        if not self._warned:
            self._warned = True
            warnings.warn(EAGER.format(what="What calls the wrapped model"), stacklevel=2)
        return self._module(*args, **kwargs)

    def trainable_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Named parameters of the model with `requires_grad`."""
        return ((n, p) for n, p in self._module.named_parameters() if p.requires_grad)

    def set_grad_sample_to_none(self) -> None:
        """Forgets all per-sample gradients."""
        super().set_grad_sample_to_none()
        if self._captured is not None:
            self._tape.discard(self._tape.params)

    def __getattr__(self, item: str) -> Any:
        try:
            return nn.Module.__getattr__(self, item)
        except AttributeError:
            if item == "_module":
                raise
            try:
                return getattr(self._module, item)
            except AttributeError:
                raise AttributeError(
                    f"neither {type(self).__name__} nor its {type(self._module).__name__} has an attribute {item!r}"
                ) from None

    # -- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Without the capture: hooks on live parameters are put back by whoever unpickles.

        Single records' gradients that still wait for their step are an error; those that a step has used stay out of
        the file (:mod:`gsm.unsaved`).
        """
        for name, p in self._module.named_parameters():
            held = getattr(p, "grad_sample", None)
            for g in held if isinstance(held, list) else [held]:
                if g is not None and not hasattr(g, "_processed"):
                    raise ValueError(
                        f"{name} holds per-sample gradients that wait for optimizer.step(): they would end up in the "
                        "copy or file without noise. Copy or save the model after step() or zero_grad(), or save "
                        "model.state_dict()."
                    )
        return {**self.__dict__, "_captured": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _strip(self._module)
        if self.hooks_enabled:
            self.add_hooks()

    @classmethod
    def is_supported(cls, module: nn.Module) -> bool:
        """Whether a module can be wrapped (everything but what :meth:`validate` complains about)."""
        return not cls.validate(module)

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[Exception]:
        """What is wrong with a model: layers whose samples influence each other.

        Raises:
            SamplesInfluenceEachOther: with ``strict=True``, instead of returning it.
        """
        errors: list[Exception] = [SamplesInfluenceEachOther(text) for text in mixing_modules(module)]
        if errors and strict:
            raise errors[0]
        return errors


def _check(model: nn.Module, loss_reduction: str, mode: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, AbstractGradSampleModule) or isinstance(model.__dict__.get("forward"), CapturedForward):
        raise ValueError(
            "The model is wrapped already: trying to add hooks twice to the same model. Pass the wrapped model that "
            "you have to make_private (a further one takes it as it is), or call its remove_hooks() first (an engine "
            "of private_transformers: detach())."
        )
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum', not {loss_reduction!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    for path, module in model.named_modules():
        if getattr(module.__dict__.get("forward"), "capture", None) is not None:
            raise ValueError(
                f"{path} is wrapped already, by itself or in another model: each of the two would take its gradients "
                "for its own. Wrap one module that holds everything, or call remove_hooks() on the other wrapper."
            )
        if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"{path or 'the model'} is a TorchScript module, whose parameters cannot be followed: wrap "
                "the Python module that it was made from"
            )
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"{path or 'the model'} has max_norm={module.max_norm}: every forward rescales the rows that the batch "
                "uses, without noise, so the table tells who was in it. Build it with max_norm=None."
            )
    complex_ones = [n for n, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if complex_ones:
        raise ValueError(
            f"{', '.join(complex_ones[:5])} are complex: norms and noise are defined for real parameters. Keep real "
            "and imaginary parts as one real parameter, [..., 2], and use torch.view_as_complex in the forward."
        )
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} have no shape yet: run the lazy model on one batch before wrapping it")


def _strip(model: nn.Module) -> None:
    """Removes what a copied or unpickled model still carries of its original's capture."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, CapturedForward):
            forward.module = module
            forward.remove()
