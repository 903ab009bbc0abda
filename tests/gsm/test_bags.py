"""Models over `nn.EmbeddingBag` with offsets: the samples are the bags, however many ids there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gsm.bags import bags_in, regrouped
from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.loop import assert_close_per_sample


class Classifier(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(10, 4, mode=mode), nn.Linear(4, 3)

    def forward(self, text: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.table(text, offsets, weights)))


def bags(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    ids = [torch.randint(0, 10, (n,)) for n in lengths]
    return ids, torch.cat(ids), torch.tensor([0, *lengths[:-1]]).cumsum(0)


@pytest.mark.parametrize("lengths", [[2, 3, 3], [1, 1, 1, 1], [0, 2, 0, 3], [3] * 5, [4]], ids=str)
@pytest.mark.parametrize("kind", ["sum", "mean", "weights"])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
def test_bags_are_samples(lengths: list[int], kind: str, mode: str):
    ids, text, offsets = bags(lengths)
    model = Classifier("sum" if kind == "weights" else kind).double()
    weights = torch.rand(len(text), dtype=torch.float64) if kind == "weights" else None
    each = weights.split(lengths) if weights is not None else [None] * len(lengths)
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(model(i, torch.tensor([0]), w).square().sum(), list(params.values()))
        for i, w in zip(ids, each, strict=True)
    ]
    expected = {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(params)}

    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    wrapped(text, offsets, weights).square().sum().backward()
    (captured,) = collect(list(params.values()))
    # One sample at a time: the others are silenced, which must not disturb whose ids are whose.
    alone = [captured.weighted_sum(one) for one in torch.eye(len(lengths), dtype=torch.float64)]
    assert_close_per_sample({n: torch.stack([row[k] for row in alone]) for k, n in enumerate(params)}, expected)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()])
    torch.testing.assert_close(captured.squared_norms().sqrt(), norms, rtol=1e-8, atol=1e-12)
    assert {e.rung for e in wrapped.plan} == {"sampler"}


def test_offsets_are_recognised():
    ids, text, offsets = bags([2, 3, 1])
    assert bags_in((text, offsets)) == (text, offsets)
    assert bags_in(({"text": text, "offsets": offsets},)) is not None
    assert bags_in((text, offsets + 1)) is None  # does not begin at 0
    assert bags_in((text, torch.tensor([0, 3, 2]))) is None
    assert bags_in((text, torch.tensor([0, 7]))) is None  # beyond the end
    assert bags_in((text.view(2, 3), offsets)) is None


def test_regrouping_keeps_bags_whole():
    ids, text, offsets = bags([2, 3, 1])
    weights = torch.arange(6.0)
    found = bags_in((text, offsets))
    (new_text, new_offsets, new_weights), made = regrouped((text, offsets, weights), found, [(2, 0), (1, 1)])
    assert new_text.tolist() == [*ids[2].tolist(), ids[1][2], ids[1][0], ids[1][1]]
    assert new_offsets.tolist() == [0, 1] and new_weights.tolist() == [5.0, 4.0, 2.0, 3.0]
    assert len(made) == 3


def test_bags_that_are_the_same_for_every_sample():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(10, 4)
            self.register_buffer("text", torch.tensor([1, 4, 4, 7, 9]))
            self.register_buffer("offsets", torch.tensor([0, 2, 3]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table(self.text, self.offsets).t()

    model = Table().double()
    x = torch.randn(3, 4, dtype=torch.float64)  # as many samples as bags
    expected = [torch.autograd.grad(model(row[None]).square().sum(), model.table.weight)[0] for row in x]
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(x).square().sum().backward()
    assert_close_per_sample({"w": model.table.weight.grad_sample}, {"w": torch.stack(expected)})
