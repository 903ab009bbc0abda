"""What :func:`gsm.verify` found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gsm.layout import SamplesInfluenceEachOther


@dataclass(frozen=True)
class Check:
    """One reading of one parameter against the one-sample loop."""

    parameter: str
    mode: str
    reading: str
    """"gradient", "norm" or "weighted sum"."""
    error: float
    """Largest error over the samples, relative to what is allowed to be 1 (so at most rtol is fine)."""
    samples: list[int]
    """The samples that are off; for a weighted sum, all of them together: empty."""
    handled: str
    """How the plan handles the parameter."""
    ok: bool


@dataclass
class VerificationReport:
    """Whether per-sample gradients are right, and what is wrong if not; ``print(report)`` is meant to be read.

    Attributes:
        problems: one sentence for everything that is wrong; empty if nothing is.
        checks: every comparison made.
        notes: what was done on the way (dropout switched off, half precision checked in float32).
    """

    batch_size: int
    rtol: float
    modes: tuple[str, ...]
    problems: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if gradients were compared and nothing is wrong."""
        return bool(self.checks) and not self.problems

    def compare(
        self, parameter: str, mode: str, reading: str, handled: str, errors: Tensor, scales: Tensor
    ) -> None:
        """Adds a comparison: ``errors`` and ``scales`` are per sample, ``[batch]`` (``[1]`` for a sum)."""
        relative = (errors / scales.clamp(min=torch.finfo(scales.dtype).tiny)).nan_to_num(nan=float("inf"))
        relative = torch.where(errors == 0, torch.zeros_like(relative), relative)
        off = (relative > self.rtol).nonzero().flatten().tolist()
        worst = relative.max().item() if relative.numel() else 0.0
        samples = off if reading != "weighted sum" else []
        self.checks.append(Check(parameter, mode, reading, worst, samples, handled, not off))
        if off and not any(c.parameter == parameter and not c.ok for c in self.checks[:-1]):
            which = f" for sample{'s' if len(samples) > 1 else ''} {_listed(samples)}" if samples else ""
            self.problems.append(
                f"{parameter} ({handled}), mode {mode!r}: {_WRONG[reading]}{which}, relative error {worst:.2g} "
                f"(allowed {self.rtol:g})."
            )

    def refused(self, mode: str, error: Exception) -> None:
        """Adds that the library itself does not take the model, unless that only repeats what is known already."""
        text = f"{type(error).__name__}: {error}"
        known = isinstance(error, SamplesInfluenceEachOther) and self.problems
        if not known and not any(p.endswith(text) for p in self.problems):
            self.problems.append(f"mode {mode!r} refuses the model: {text}")

    def __str__(self) -> str:
        verdict = "OK" if self.ok else "NOT OK"
        names = {c.parameter for c in self.checks}
        worst = max((c.error for c in self.checks), default=0.0)
        head = (
            f"verify: {verdict} - {len(names)} parameters, {self.batch_size} samples, "
            f"mode{'s' if len(self.modes) > 1 else ''} {', '.join(self.modes)}"
        )
        head += f"; largest relative error {worst:.2g} (allowed {self.rtol:g})" if self.checks else "; nothing compared"
        lines = [head]
        lines += [f"  - {p}" for p in self.problems]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


_WRONG = {
    "gradient": "wrong per-sample gradient",
    "norm": "wrong per-sample gradient norm",
    "weighted sum": "wrong weighted sum of per-sample gradients",
}


def _listed(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:5])) + (f" and {len(samples) - 5} more" if len(samples) > 5 else "")
