"""The planner: which reading it chooses, within which memory, and that the choice never changes the result."""

from __future__ import annotations

import torch
from torch import nn

from gsm.ledger import collect
from gsm.wrapper import GradSampleModule


def run(mode: str, budget: int | None = None, steps: int = 2) -> tuple[GradSampleModule, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16))
    model = model.double()
    wrapped = GradSampleModule(model, mode=mode, memory_budget=budget, loss_reduction="sum")
    ids = torch.randint(0, 500, (4, 32))
    for _ in range(steps):
        wrapped.zero_grad()
        wrapped(ids).pow(2).sum().backward()
    return wrapped, model


def test_small_parameters_are_kept_and_tables_are_not() -> None:
    for mode in ("ghost", "auto"):
        plan = run(mode)[0].plan
        assert plan["4.weight"].reading == "gradients kept"
        assert plan["0.weight"].reading == "norm from the pair"
        assert "KiB" in plan["1.weight"].estimate and "KiB" in str(plan)


def test_a_linear_layer_on_vectors_is_never_materialised() -> None:
    model = nn.Linear(64, 64)
    wrapped = GradSampleModule(model, mode="auto", memory_budget=1 << 30)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(torch.randn(8, 64)).sum().backward()
    assert wrapped.plan["weight"].reading == "norm from the pair"


def test_the_budget_decides_what_is_kept_in_mode_auto() -> None:
    generous, none = run("auto", budget=1 << 30)[0].plan, run("auto", budget=0)[0].plan
    assert generous["1.weight"].reading == "gradients kept"
    kept = {p for p in ("1.weight", "3.weight") if none[p].reading == "gradients kept"}
    free = {p for p, c in run("auto", budget=0)[0]._tape.planner.choices.items() if c.extra_bytes <= 0}
    assert kept == {p[0] for p in free} & {"1.weight", "3.weight"}


def convolutions(mode: str, budget: int | None) -> GradSampleModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 128, 3, stride=4), nn.Conv2d(128, 128, 3))
    wrapped = GradSampleModule(model, mode=mode, memory_budget=budget)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(torch.randn(8, 3, 32, 32)).sum().backward()
    return wrapped


def test_a_convolution_is_kept_as_what_makes_its_norm_cheap() -> None:
    """Few positions and many channels: Gram matrices. Many positions and few channels: the gradient."""
    plan = convolutions("auto", 1 << 30).plan
    assert plan["0.weight"].reading == "gradients kept"
    assert plan["2.weight"].reading == "norm from the pair"


def test_an_input_of_several_layers_is_counted_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(64, 64, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.q(x) + self.k(x) * self.v(x))

    wrapped = GradSampleModule(Heads(), mode="auto", memory_budget=0)
    wrapped(torch.randn(5, 3, 64)).sum().backward()
    planner, size = wrapped._tape.planner, 3 * 64 * 4
    assert {key[0]: c.pair_bytes for key, c in planner.choices.items()} == {
        "out.weight": 2 * size, "q.weight": size, "k.weight": size, "v.weight": size
    }  # fmt: skip
    assert planner._shared_bytes == size and not planner._held


def test_every_choice_gives_the_same_norms_and_sums() -> None:
    results = []
    for mode, budget in (("ghost", None), ("auto", None), ("auto", 0), ("auto", 1 << 30), ("hooks", None)):
        _, model = run(mode, budget)
        (batch,) = collect(list(model.parameters()))
        weights = torch.linspace(0.1, 1, 4, dtype=torch.float64)
        results.append([batch.squared_norms(), *batch.weighted_sum(weights)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
