"""What reentrant checkpoints make impossible is refused by that name, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsm import GradSampleModule
from gsm.layout import Unresolvable
from gsm.reentrant import inside_reentrant_checkpoint
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_is_seen_from_inside_and_only_there(reentrant: bool) -> None:
    seen = []

    def piece(h: Tensor) -> Tensor:
        seen.append(inside_reentrant_checkpoint())
        return h.sin()

    checkpoint(piece, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert seen == [False, reentrant] and not inside_reentrant_checkpoint()
