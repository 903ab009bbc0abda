"""What reentrant checkpoints make impossible is refused by that name, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsm import GradSampleModule
from gsm.layout import Unresolvable
from gsm.reentrant import cut_off
from tests.compare import MODES, check

NAMED = r"use_reentrant=True runs a piece .* pass use_reentrant=False .*'use_reentrant': False"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(4))

    def forward(self, h: Tensor) -> Tensor:
        return (h * self.w).sin()


class Net(nn.Module):
    """A piece with parameters of its own is run again in the backward."""

    def __init__(self, piece: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.a, self.piece, self.c, self.reentrant = nn.Linear(4, 4), piece, nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.piece, self.a(x), use_reentrant=self.reentrant))


class Bare(Net):
    """A parameter is used in a function that is run again, outside every module's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(lambda h: h * self.piece.w, self.a(x), use_reentrant=self.reentrant))


PIECES = [lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), Scale]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("piece", PIECES, ids=["layers", "parameter"])
def test_a_reentrant_checkpoint_is_named_with_its_fix(mode: str, piece: Any) -> None:
    wrapped = GradSampleModule(Net(piece(), True), mode=mode)
    out = wrapped(torch.randn(3, 4))
    with pytest.raises(Unresolvable, match=NAMED):
        out.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("piece", PIECES, ids=["layers", "parameter"])
def test_and_the_fix_works(mode: str, piece: Any) -> None:
    check(Net(piece(), False), torch.randn(3, 4), mode=mode)


def test_a_parameter_used_by_a_function_in_a_reentrant_checkpoint() -> None:
    wrapped = GradSampleModule(Bare(Scale(), True))
    out = wrapped(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"piece\.w received an ordinary gradient: .*" + NAMED):
        out.sum().backward()


def test_another_cause_beside_a_reentrant_checkpoint_is_not_put_down_to_it() -> None:
    net = Net(Scale().requires_grad_(False), True)
    wrapped = GradSampleModule(net)
    wrapped(torch.randn(3, 4)).sum().backward()  # nothing in the piece is trained: it does no harm
    wrapped.zero_grad()
    with pytest.raises(RuntimeError, match="outside the wrapped model's forward") as held:
        (wrapped(torch.randn(3, 4)).sum() + net.a.weight.sum()).backward()
    assert "reentrant" not in str(held.value)


class Reversible(torch.autograd.Function):
    """Keeps no graph of its piece and runs it again in the backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, piece: Any) -> Tensor:
        ctx.piece = piece
        ctx.save_for_backward(x)
        return piece(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            ctx.piece(x).backward(grad)
        return x.grad, None


class Reversed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(Reversible.apply(self.a(x), self.piece))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("piece", PIECES, ids=["layers", "parameter"])
def test_layers_that_a_function_runs_again_in_its_backward_are_refused_by_its_name(mode: str, piece: Any) -> None:
    wrapped = GradSampleModule(Reversed(piece(), False), mode=mode)
    out = wrapped(torch.randn(3, 4))
    with pytest.raises(Unresolvable, match="Reversible, a torch.autograd.Function, runs a piece of the model again"):
        out.sum().backward()


def test_what_runs_the_caller_in_a_backward_is_told_and_nothing_else() -> None:
    seen = []

    def piece(h: Tensor) -> Tensor:
        seen.append(cut_off() or "")
        return h.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(piece, x, use_reentrant=True).sum().backward()
    checkpoint(piece, x, use_reentrant=False).sum().backward()
    Reversible.apply(x, piece).sum().backward()
    # inside the backward of a Function that asks for tensors, a checkpoint that is not reentrant runs the piece again
    checkpoint(lambda h: Reversible.apply(piece(h), torch.sin), x, use_reentrant=False).sum().backward()
    inside = [text.split(" ")[0].rstrip(",") for text in seen]
    assert inside == ["", "torch.utils.checkpoint", "", "", "", "Reversible", "", ""]
    assert cut_off() is None
