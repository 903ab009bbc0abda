"""Rows in an order of their own: who owns them is read off the graph, never off their number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsm.layout import Layout, Rows
from gsm.ownership import owners_in_layout, owners_of
from gsm.wrapper import GradSampleModule
from tests.compare import check


class _Use:
    """What a tapped output remembers."""

    batch_size, out_layout, lead = 3, Layout(0), None

    def receive(self, saved: tuple, grad: Tensor) -> None: ...


def _tapped(*shape: int) -> Tensor:
    from gsm.functions import Tap

    return Tap.apply(torch.randn(*shape), torch.zeros((), requires_grad=True), _Use(), False)


STEPS = {
    "flattened": (lambda x: x.view(6, 4), [0, 0, 1, 1, 2, 2]),
    "elementwise": (lambda x: F.silu(x.view(6, 4)) * 2 + 1, [0, 0, 1, 1, 2, 2]),
    "rows by index": (lambda x: x.view(6, 4)[torch.tensor([5, 0, 2])], [2, 0, 1]),
    "rows by mask": (lambda x: x[torch.tensor([[True, False], [True, True], [False, True]])], [0, 1, 1, 2]),
    "rows by two indices": (lambda x: x[torch.tensor([2, 1]), torch.tensor([0, 1])], [2, 1]),
    "behind a leading one": (lambda x: x.view(6, 4)[None, torch.tensor([4])].reshape(-1, 4), [2]),
    "index_select": (lambda x: x.view(6, 4).index_select(0, torch.tensor([3, 1])), [1, 0]),
    "split": (lambda x: x.view(6, 4).split([1, 4, 1])[1], [0, 1, 1, 2]),
    "split evenly": (lambda x: x.view(6, 4).split(2)[1], [1, 1]),
    "joined features": (lambda x: torch.cat([x.view(6, 4), x.view(6, 4)], -1), [0, 0, 1, 1, 2, 2]),
    "chunk of features": (lambda x: x.view(6, 4).chunk(2, -1)[1], [0, 0, 1, 1, 2, 2]),
    "one sample": (lambda x: x[1], [1, 1]),
    "repeated": (lambda x: x.view(6, 4).repeat(2, 1), [0, 0, 1, 1, 2, 2] * 2),
    "repeat_interleave": (lambda x: x.view(6, 4).repeat_interleave(2, 0), [0] * 4 + [1] * 4 + [2] * 4),
    "joined": (lambda x: torch.cat([x.view(6, 4)[4:], x.view(6, 4)[:1]]), [2, 2, 0]),
    "sliced": (lambda x: x.view(6, 4)[1::2], [0, 1, 2]),
    "folded back": (lambda x: x.view(6, 4).view(3, 2, 4), [0, 1, 2]),
    "softmax": (lambda x: x.view(6, 4).softmax(-1), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", STEPS)
def test_rows_are_followed(name: str) -> None:
    step, owner = STEPS[name]
    found = owners_of(step(_tapped(3, 2, 4)), 3)
    assert found is not None and found.owner.tolist() == owner


def test_a_way_that_leads_nowhere_says_nothing_about_the_rows() -> None:
    """The query of an attention is unbound from a permuted tensor; the residual beside it shows whose the rows are."""
    x = _tapped(3, 2, 4)
    found = owners_of(x.transpose(0, 1).unbind(0)[0] + x.sum(1), 3)
    assert found is not None and found.owner.tolist() == [0, 1, 2] and not found.picked


class Adapted(nn.Module):
    """Attention whose projections are frozen, with an adapter of rank 2 beside them, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.requires_grad_(False)
        self.down, self.up, self.out = nn.Linear(8, 2), nn.Linear(2, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        qkv = self.qkv(z) + self.up(self.down(z))
        q, k, v = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(self.out(x + mixed))


def test_adapters_on_data_without_a_graph_need_no_fallback() -> None:
    wrapped = check(Adapted(), torch.randn(4, 5, 8), mode="ghost")
    assert {entry.rung for entry in wrapped.plan} == {"sampler"}


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.cumsum(0),
        lambda x: x.view(2, 3, 4),  # a row made of two samples' values
        lambda x: x.flip(0),
        lambda x: x.mean(0, keepdim=True),
        lambda x: x.softmax(0),
        lambda x: x.permute(1, 0, 2),
    ],
)
def test_what_mixes_or_moves_rows_in_other_ways_has_no_owner(step: object) -> None:
    assert owners_of(step(_tapped(3, 2, 4)), 3) is None  # type: ignore[operator]


def test_layouts_say_the_same_as_their_owners() -> None:
    x = torch.arange(24)
    for layout in (Layout(0, "major"), Layout(0, "minor"), Layout(0, "middle", 2), Rows(torch.arange(24) % 3)):
        owner = owners_in_layout(layout, (24,), 3)
        front = layout.to_front(x, 3)
        assert front.shape[0] == 3
        for i in range(3):
            assert sorted(front[i].tolist()) == x[owner == i].tolist()
        copies = torch.arange(3.0)
        assert layout.spread(copies, 0, 24, 3).tolist() == owner.tolist()


class Experts(nn.Module):
    """Tokens go to experts; how many each gets depends on the data and may happen to be the batch size."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.gate, self.stacked = nn.Linear(4, 3), stacked
        self.up = nn.Parameter(torch.randn(3, 5, 4)) if stacked else nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
        self.norm, self.down = nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        rows, out = x.reshape(-1, 4) * self.gate(x).sigmoid().reshape(-1, 3)[:, :1], []
        total = torch.zeros_like(rows)
        for e in range(3):
            mine = (choice.reshape(-1) == e).nonzero()[:, 0]
            if len(mine):
                h = F.linear(rows[mine], self.up[e]) if self.stacked else self.up[e](rows[mine])
                total = total.index_add(0, mine, self.down(self.norm(F.silu(h))))
        out.append(total)
        return x + out[0].view_as(x)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("stacked", [True, False])
def test_as_many_rows_as_samples_are_not_taken_for_the_samples(mode: str, stacked: bool) -> None:
    """Expert 0 gets as many tokens as there are samples, all of them of the first two."""
    choice = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 2, 2]])
    check(Experts(stacked), (torch.randn(3, 3, 4), choice), mode=mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_expert_that_the_probe_never_saw(mode: str) -> None:
    """Only the last sample reaches expert 2: the small batches that the model is tried on do not hold it."""
    choice = torch.tensor([[0, 1, 1]] * 5 + [[2, 2, 0]])
    check(Experts(False), (torch.randn(6, 3, 4), choice), mode=mode)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        rows = self.fc(x).flatten(0, 1)
        sorted_choice, order = choice.flatten().sort(stable=True)
        ends = torch.bincount(sorted_choice, minlength=3).cumsum(0).int()
        y = F.grouped_mm(rows[order], self.weight, offs=ends)
        return torch.zeros_like(y).index_copy(0, order, y).view(*x.shape[:2], 8)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_grouped_matrix_products(mode: str) -> None:
    """They have no float64 kernel on the CPU: float32 against a loop over the samples in float32."""
    model, x, choice = Grouped(), torch.randn(4, 3, 4), torch.randint(0, 3, (4, 3))
    want = []
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1], choice[i : i + 1]).pow(2).sum().backward()
        want.append(model.weight.grad.clone())
    model.zero_grad()
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    wrapped(x, choice).pow(2).sum().backward()
    from tests.compare import captured

    torch.testing.assert_close(captured(model)["weight"].float(), torch.stack(want), rtol=1e-4, atol=1e-5)
    assert wrapped.plan.rung("weight") == "tracked"


class Clusters(nn.Module):
    """``AdaptiveLogSoftmaxWithLoss`` squeezes the indices of a cluster's rows: none is left where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.clusters = nn.Linear(4, 4), nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.clusters(self.fc(x), y).loss


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_index_without_dimensions_picks_one_row(mode: str) -> None:
    torch.manual_seed(0)
    model, x, y, want = Clusters(), torch.randn(5, 4), torch.tensor([0, 4, 8, 1, 2]), []
    for i in range(5):
        model.zero_grad()
        model(x[i : i + 1], y[i : i + 1]).backward()
        want.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
    model.zero_grad()
    wrapped = GradSampleModule(model, mode=mode)
    wrapped(x, y).backward()
    norms = wrapped.per_sample_gradient_norms
    torch.testing.assert_close(norms, torch.stack(want))


def test_a_search_that_leads_too_far_ends() -> None:
    x = _tapped(3, 2, 4)
    for _ in range(5000):
        x = x + 1
    assert owners_of(x, 3) is None
