"""Parameters used several times: exact ghost norms, and nothing materialised for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gsm.groups
from tests.compare import MODES, check


class Tied(nn.Module):
    """An embedding that is also the output layer: by module, by function, or transposed."""

    def __init__(self, how: str, padding_idx: int | None = None, vocab: int = 7, width: int = 4):
        super().__init__()
        self.how = how
        self.emb = nn.Embedding(vocab, width, padding_idx=padding_idx)
        self.mid = nn.Linear(width, width)
        if how == "module":
            self.head = nn.Linear(width, vocab)
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mid(self.emb(ids))) + self.emb(ids.flip(1))
        if self.how == "module":
            return self.head(h)
        return F.linear(h, self.emb.weight) if self.how == "function" else h @ self.emb.weight.t()


class Deep(nn.Module):
    """One layer at every depth (ALBERT), one use of it on another number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.norm(self.layer(x)))
        return x + self.layer(x.mean(1, keepdim=True)) + x @ self.layer.weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["module", "function", "transposed"])
@given(padding=st.sampled_from([None, 0, 3]), size=st.integers(1, 4), length=st.integers(1, 6))
def test_tied_embedding_and_output_layer(mode: str, how: str, padding: int | None, size: int, length: int) -> None:
    torch.manual_seed(size * 10 + length)
    check(Tied(how, padding), torch.randint(0, 7, (size, length)), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@given(size=st.integers(1, 4), length=st.integers(1, 5))
def test_layer_shared_across_depth(mode: str, size: int, length: int) -> None:
    torch.manual_seed(size * 10 + length)
    check(Deep(), torch.randn(size, length, 4), mode=mode)


@pytest.mark.parametrize("model", [Tied("module", vocab=200, width=30), Tied("transposed", vocab=200, width=30)])
def test_nothing_is_materialised_for_tied_weights(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(held: object) -> Tensor:
        raise AssertionError("a shared gradient was materialised")

    monkeypatch.setattr(gsm.groups, "_total", fail)
    check(model, torch.randint(0, 200, (3, 4)), mode="ghost")


class Parts(nn.Module):
    """One parameter of which every use takes a part."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.stack = how, nn.Parameter(torch.randn(3, 4, 4))
        self.fused, self.line = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(11))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "experts":
            return torch.bmm(torch.stack([x, x.sin(), x.cos()]), self.stack).sum(0) + x @ self.fused.t()[:, :4]
        if self.how == "chunks":
            q, k, v = (F.linear(x, w) for w in self.fused.chunk(3))
            return q * k.sigmoid() + v + x @ self.stack[0]
        if self.how == "columns":
            return (x[:, :2] @ self.fused.t()[:2] + x[:, 2:] @ self.fused.t()[2:])[:, :4] + x @ self.stack[1].t()
        if self.how == "overlapping":
            return F.linear(x, self.fused[:6])[:, 2:] * F.linear(x, self.fused[5:])[:, :4] + x @ self.stack[2]
        if self.how == "again":  # a part that is used twice, and another
            return (
                F.linear(F.linear(x, self.fused[:4]), self.fused[:4]) + F.linear(x, self.fused[4:8]) + x @ self.stack[0]
            )
        if self.how == "windows":  # a view in which an entry stands several times, and another part
            return (
                F.linear(x, self.line[:7].unfold(0, 4, 1)) + F.linear(x, self.line[7:].view(1, 4)) + x @ self.stack[0]
            )
        if self.how == "copies":  # they lie apart, and stand for the same entries
            scaled, again = (self.fused * 2)[:4], self.fused.flip(0)[8:]
            return F.linear(F.linear(x, scaled).sin(), again) + x @ self.stack[0]
        assert self.how == "interleaved"
        return F.linear(x, self.fused[::3]) + F.linear(x.sin(), self.fused[1::3]) + x @ self.stack[0]


APART = {"experts", "chunks"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [*sorted(APART), "columns", "overlapping", "again", "interleaved", "windows", "copies"])
def test_parts_of_a_parameter(how: str, mode: str) -> None:
    check(Parts(how), torch.randn(5, 4), mode=mode)


@pytest.mark.parametrize("how", sorted(APART))
def test_nothing_is_materialised_for_parts_that_lie_apart(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(held: object) -> Tensor:
        raise AssertionError("the whole gradient was materialised")

    monkeypatch.setattr(gsm.groups, "_total", fail)
    check(Parts(how), torch.randn(5, 4), mode="ghost")
