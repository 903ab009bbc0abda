"""One architecture against the one-sample loop: gradients in hooks mode, norms and weighted sums in ghost mode."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsm.layout import SamplesInfluenceEachOther
from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.compare import captured
from tests.loop import per_sample_loop, projection_loss
from tests.transformers.architectures import Architecture, NotBuilt, build, inputs_for
from tests.transformers.precision import float64_throughout

SHAPES = ((3, 8), (4, 4))  # batch and sequence length; the second has both alike, and as many heads
TOLERANCE = 1e-8
LOOSE = 2e-4  # where a model computes in float32 inside, and this run leaves it at that


@dataclass
class Result:
    """What became of one architecture in one shape and mode."""

    architecture: str
    shape: str
    mode: str
    verdict: str  # right, refused, error, WRONG, not built
    error: float = 0.0
    reason: str = ""
    rungs: dict[str, int] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    seconds: float = 0.0
    mixes: bool = False


def loss_of(output: Any) -> Tensor:
    """A scalar from the logits: every number times a fixed random one."""
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return projection_loss(logits)


def run(architecture: Architecture, shapes: Any = SHAPES, modes: tuple[str, ...] = ("hooks", "ghost")) -> list[Result]:
    """All shapes and modes of one architecture."""
    results = []
    for shape in shapes:
        exact = shape[0] == shape[1] or not _runs_in_float64(architecture, shape)
        with float64_throughout() if exact else contextlib.nullcontext():
            results += _run_shape(architecture, shape, modes, TOLERANCE if exact else LOOSE)
    return results


def _runs_in_float64(architecture: Architecture, shape: tuple[int, int]) -> bool:
    """Whether the model takes float64 as it is (some mix it with tensors that they make in float32)."""
    try:
        model = build(architecture)
        if not torch.isfinite(model(**inputs_for(architecture, model, *shape))["logits"]).all():
            return False
    except RuntimeError:
        return False
    except Exception:
        return True
    return all(p.dtype == torch.float64 for p in model.parameters())  # some cast their own parameters


def _run_shape(
    architecture: Architecture, shape: tuple[int, int], modes: tuple[str, ...], tolerance: float
) -> list[Result]:
    name, label = str(architecture), f"B={shape[0]} T={shape[1]}"
    try:
        model = build(architecture)
        inputs = inputs_for(architecture, model, *shape)
        torch.manual_seed(0)
        copy.deepcopy(model)(**inputs)
    except NotBuilt as error:
        return [Result(name, label, "-", "not built", reason=str(error))]
    except Exception as error:  # the plain model doesn't run: nothing of ours was involved
        return [Result(name, label, "-", "not built", reason=f"{type(error).__name__}: {error}")]
    try:
        expected = per_sample_loop(copy.deepcopy(model), inputs, loss=loss_of, seed=0)  # which may leave a state
        if not all(torch.isfinite(g).all() for g in expected.values()):
            return [Result(name, label, "-", "not built", reason="the plain model's gradients are not finite")]
        mixes = mixing(model, inputs)
    except Exception as error:
        if "more than 1 value per channel" not in str(error):  # batch normalisation, of a single value
            return [Result(name, label, "-", "not built", reason=f"one sample alone: {type(error).__name__}: {error}")]
        expected, mixes = {}, True
    out = []
    for mode in modes:
        start = time.perf_counter()
        result = _run_mode(copy.deepcopy(model), inputs, expected, mode, tolerance)
        result.architecture, result.shape, result.mode, result.mixes = name, label, mode, mixes
        result.seconds = round(time.perf_counter() - start, 2)
        out.append(result)
    return out


def mixing(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the plain model itself gives a sample other logits in a batch than alone."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(0)
        together = model(**inputs)["logits"]
        for i in range(together.shape[0]):
            torch.manual_seed(0)
            alone = model(**{k: v[i : i + 1] for k, v in inputs.items()})["logits"][0]
            if (together[i] - alone).abs().max() > 1e-4 * together.abs().max():
                return True
    return False


def _run_mode(model: nn.Module, inputs: Any, expected: dict[str, Tensor], mode: str, tolerance: float) -> Result:
    result = Result("", "", mode, "right")
    wrapped = None
    try:
        wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
        torch.manual_seed(0)
        loss_of(wrapped(**inputs)).backward()
        result.error = _largest_error(model, expected, mode, tolerance)
        if not result.error <= tolerance:
            result.verdict = "WRONG"
        rungs: Counter[str] = Counter()
        for entry in wrapped.plan:
            rungs[entry.rung] += len(entry.parameters)
            if entry.rung in ("functorch", "loop"):
                result.slow.append(f"{entry.path} ({entry.type}) {entry.rung}: {entry.why}"[:300])
        result.rungs = dict(rungs)
    except SamplesInfluenceEachOther as error:
        result.verdict, result.reason = "refused", str(error)
    except Exception as error:
        refused = isinstance(error, ValueError) and ("influence each other" in str(error) or "no epsilon" in str(error))
        result.verdict, result.reason = "refused" if refused else "error", f"{type(error).__name__}: {error}"
    finally:
        if wrapped is not None:
            wrapped.remove_hooks()
    return result


def _largest_error(model: nn.Module, expected: dict[str, Tensor], mode: str, tolerance: float) -> float:
    """The largest error of any parameter's gradients or norms, relative to that parameter's gradients.

    A gradient that is itself only rounding counts as that: 1e-9 of the largest parameter's, 1e-6 if float32 is inside.
    """
    floor = 1e-9 if tolerance <= TOLERANCE else 1e-6
    got = captured(model)
    params = [p for p in model.parameters() if p.requires_grad]
    norms = collect(params)[0].squared_norms().sqrt() if mode == "ghost" else None
    worst = 0.0
    overall = max(w.norm().item() for w in expected.values())
    for i, (name, want) in enumerate(expected.items()):
        rows = want.double().flatten(1)
        scale = torch.maximum(rows.norm(dim=1), 1e-3 * rows.norm(dim=1).max()).clamp(min=floor * overall + 1e-300)
        errors = [((got[name].double().flatten(1) - rows).norm(dim=1) / scale).max().item()]
        if norms is not None:
            errors.append(((norms[i].double() - rows.norm(dim=1)).abs() / scale).max().item())
        if any(e != e for e in errors):
            return float("inf")
        worst = max(worst, *errors)
    return worst


def as_dict(result: Result) -> dict[str, Any]:
    return asdict(result)
