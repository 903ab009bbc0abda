"""Who trains it: one function per kind of step, from a problem to something that can be called again and again.

Every call of a :class:`Step` is the body of the user's loop: forward, loss, backward, optimizer step, zero_grad. The
last stands at the end rather than at the beginning, so that nothing is left behind for whoever runs next, and the time
to give the memory back is paid by whoever took it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.workloads import Problem

LEARNING_RATE, CLIP = 0.01, 1.0
Step = Callable[[], None]


@dataclass
class Trainer:
    """A step, and the model that it changes, so that two of them can be compared."""

    step: Step
    model: nn.Module


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def _loop(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        problem.loss(model(problem.inputs), problem.targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def non_private(problem: Problem, noise: float) -> Trainer:
    model = copy.deepcopy(problem.model)
    return Trainer(_loop(problem, model, _sgd(model)), model)


def gsm(problem: Problem, noise: float, *, mode: str) -> Trainer:
    """This library, in the ordinary loop."""
    from gsm.optimizer import DPOptimizer
    from gsm.wrapper import GradSampleModule

    model = copy.deepcopy(problem.model)
    wrapped = GradSampleModule(model, mode=mode)
    optimizer = DPOptimizer(
        _sgd(model), noise_multiplier=noise, max_grad_norm=CLIP, expected_batch_size=len(problem.targets)
    )
    return Trainer(_loop(problem, wrapped, optimizer), model)


def opacus(problem: Problem, noise: float, *, mode: str) -> Trainer:
    """Opacus 1.6; its own replacements stand in for layers that it does not take (nn.LSTM)."""
    from opacus.grad_sample.utils import wrap_model
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from opacus.validators import ModuleValidator

    model = copy.deepcopy(problem.model)
    if not ModuleValidator.is_valid(model):
        model = ModuleValidator.fix(model).train()
    ghost = mode == "ghost"
    extra = {"max_grad_norm": CLIP, "use_ghost_clipping": True} if ghost else {}
    wrapped = wrap_model(model, grad_sample_mode=mode, **extra)
    optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        _sgd(model), noise_multiplier=noise, max_grad_norm=CLIP, expected_batch_size=len(problem.targets)
    )

    def ghost_step() -> None:
        losses = problem.per_sample_loss(wrapped(problem.inputs), problem.targets)
        DPTensorFastGradientClipping(wrapped, optimizer, losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(ghost_step if ghost else _loop(problem, wrapped, optimizer), model)


def opake(problem: Problem, noise: float) -> Trainer:
    """opake: clipped gradients of a function of the parameters under `torch.func`; no optimizer object, no hooks."""
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.random import key

    model = copy.deepcopy(problem.model)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(torch.func.functional_call(model, params, (x.unsqueeze(0),)), y.unsqueeze(0))

    count = len(problem.targets)
    gradients, clip_state = clipped_grad(loss, clipping_norm=CLIP, batch_argnums=(1, 2), normalize_by=count)
    add_noise, noise_state = gaussian_noise(noise_multiplier=noise, key=key(0)) if noise else (None, None)

    def step() -> None:
        nonlocal clip_state, noise_state
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap's remarks about operations without a batching rule
            clipped, clip_state = gradients(params, problem.inputs, problem.targets, state=clip_state)
        if add_noise is None:
            released = clipped
        else:
            released, noise_state = add_noise(clipped, noise_state)
        for name, p in params.items():
            p.sub_(released.pytree[name], alpha=LEARNING_RATE)

    return Trainer(step, model)


Maker = Callable[[Problem, float], Trainer]
BASE = "non-private"
OURS = ("auto", "ghost", "hooks", "functorch", "loop")
COLUMNS: dict[str, Maker] = {
    BASE: non_private,
    **{f"gsm {mode}": partial(gsm, mode=mode) for mode in OURS},
    **{f"opacus {mode}": partial(opacus, mode=mode) for mode in ("hooks", "ghost", "functorch", "ew")},
    **({"opake": opake} if find_spec("opake") else {}),
}
# The loop over samples is a definition, not a competitor: it is timed on request only.
DEFAULT_COLUMNS = [name for name in COLUMNS if name != "gsm loop"]


def make(column: str, problem: Problem, noise: float = 1.0) -> Trainer:
    """The trainer of one column.

    Args:
        column: a key of :data:`COLUMNS`.
        problem: its model is copied, not changed.
        noise: noise multiplier (0 to compare updates).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        return COLUMNS[column](problem, noise)
