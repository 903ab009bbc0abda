"""Empty batches through models that cannot run on zero rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gsm.optimizer import DPOptimizer
from gsm.wrapper import GradSampleModule
from tests.compare import MODES


class Reshaping(nn.Module):
    """`view(0, 2, -1)` is ambiguous: the model itself stops on zero rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).view(x.shape[0], 2, -1)
        return {"out": self.b(h).sum(1), "hidden": h}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_a_release_without_samples_is_noise_alone(mode: str, first: bool) -> None:
    model = Reshaping()
    with pytest.raises(RuntimeError):
        model(torch.zeros(0, 4))
    before = [p.detach().clone() for p in model.parameters()]
    wrapped = GradSampleModule(model, mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    for x in [torch.zeros(0, 4)] if first else [torch.randn(3, 4), torch.zeros(0, 4)]:
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        out = wrapped(x)["out"]
        assert out.shape == (len(x), 2)
        nn.functional.cross_entropy(out, torch.zeros(len(x), dtype=torch.long)).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_a_model_that_fails_on_one_row_too_shows_its_own_error() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"cannot take {x.shape[0]} rows")

    with pytest.raises(ValueError, match="cannot take 0 rows"):
        GradSampleModule(Failing(2, 2))(torch.zeros(0, 2))
