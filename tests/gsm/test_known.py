"""Templates: what is known of a call is not worked out again, and is never used for another one."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grad_samplers
from grad_samplers import registry
from gsm import known
from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.compare import check

MODES = pytest.mark.parametrize("mode", ["hooks", "ghost"])


class Norms(nn.Module):
    """One weight, several calls that differ in a constant only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        one = F.layer_norm(x, (4,), self.weight, self.bias, 1e-5)
        two = F.layer_norm(x, (4,), self.weight, self.bias, eps=0.5)
        three = F.layer_norm(x, [4], self.weight, self.bias, 2.0)  # a list: no key, worked out every time
        return one * two + three


@MODES
def test_calls_with_other_constants_have_other_templates(mode: str) -> None:
    wrapped = check(Norms(), torch.randn(3, 2, 4), mode=mode)
    assert len(wrapped._tape.templates) == 2


@MODES
def test_a_call_seen_before_is_not_bound_again(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    wrapped = GradSampleModule(model, mode=mode)
    wrapped(torch.randn(5, 4)).sum().backward()
    wrapped.set_grad_sample_to_none()
    with mock.patch.object(known, "bind", side_effect=AssertionError("bound again")):
        wrapped(torch.randn(7, 4)).sum().backward()
        with pytest.raises(AssertionError, match="bound again"):
            wrapped(torch.randn(7, 3, 4))  # another rank is another call


def test_a_sampler_registered_later_is_used_from_then_on() -> None:
    wrapped = GradSampleModule(nn.Linear(3, 2, bias=False))
    wrapped(torch.randn(5, 3)).sum().backward()
    wrapped.set_grad_sample_to_none()
    before = registry._SAMPLERS[nn.Linear]
    try:

        @grad_samplers.register_grad_sampler(nn.Linear)
        def zero(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict:
            return {layer.weight: torch.zeros(len(backprops), *layer.weight.shape)}

        wrapped(torch.randn(5, 3)).sum().backward()
        assert bool((next(wrapped._module.parameters()).grad_sample == 0).all())
    finally:
        registry._SAMPLERS[nn.Linear] = before


def test_a_moved_model_has_new_templates() -> None:
    wrapped = GradSampleModule(nn.Linear(3, 2))
    wrapped(torch.randn(5, 3)).sum().backward()
    wrapped.set_grad_sample_to_none()
    before = list(wrapped._tape.templates.values())
    wrapped.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    wrapped(x).sum().backward()
    assert not set(before) & set(wrapped._tape.templates.values())
    torch.testing.assert_close(wrapped._module.weight.grad_sample, 5 * x.unsqueeze(1).expand(5, 2, 3))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 6), nn.Conv1d(4, 6, 2), nn.ConvTranspose1d(4, 6, 2), nn.LayerNorm(4), nn.GroupNorm(2, 4)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
def test_small_parameters_are_made_and_large_ones_paired(layer: nn.Module, frozen: str | None) -> None:
    for p in layer.parameters():
        p.requires_grad_(True)
    if frozen is not None:
        getattr(layer, frozen).requires_grad_(False)
    check(layer, torch.randn(3, 4, 4), mode="ghost")
    check(layer, torch.randn(200, 4, 4), mode="auto")


@MODES
@pytest.mark.parametrize("length", [31, 64, 65, 130, 512])
def test_gram_matrices_by_blocks(mode: str, length: int) -> None:
    check(nn.Linear(40, 50), torch.randn(3, length, 40), mode=mode)


class Sorted(nn.Module):
    """Tokens are sorted by their values before a layer, as many of them as the batch has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).flatten(0, 1)
        order = rows.detach().sum(1).argsort()
        return self.second(rows[order])[order.argsort()].view_as(x)


@MODES
def test_rows_in_the_order_of_the_data_are_looked_up_every_time(mode: str) -> None:
    check(Sorted(), torch.randn(4, 1, 4), mode=mode)
    check(Sorted(), torch.randn(4, 3, 4), mode=mode)


class Shortened(nn.Module):
    """From its second life on only the first samples reach the layer."""

    keep = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[: self.keep])


@MODES
def test_a_part_of_the_batch_is_not_taken_for_all_of_it(mode: str) -> None:
    model = Shortened().double()
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    x = torch.randn(5, 4, dtype=torch.float64)
    wrapped(x).sum().backward()
    wrapped.set_grad_sample_to_none()
    model.keep = 3
    wrapped(x).sum().backward()
    (batch,) = collect([model.second.weight])
    expected = model.first(x).detach().norm(dim=1) * 2**0.5
    torch.testing.assert_close(batch.squared_norms()[0].sqrt(), expected * torch.tensor([1, 1, 1, 0, 0]))


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight)


def test_values_computed_from_parameters_leave_no_templates() -> None:
    wrapped = check(Doubled(), torch.randn(3, 4))
    wrapped(torch.randn(3, 4).double()).sum().backward()
    assert wrapped._tape.templates == {}


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["layer", "group"])
def test_normalisation_under_autocast_is_that_of_the_layer(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        found = GradSampleModule(model)(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    model = nn.GroupNorm(2, 4)
    x = torch.randn(3, 4, 5, 6).to(memory_format=memory_format)
    expected = model(x)  # whose own backward crashes in float64 and channels_last (torch 2.13): not called
    found = GradSampleModule(model)(x)
    assert found.stride() == expected.stride() and torch.equal(found, expected)


def test_the_statistics_of_half_precision_are_computed_again_in_full() -> None:
    """A mean near a hundred, rounded to bfloat16, would be off by a quarter of the deviation."""
    layer = nn.LayerNorm(64).bfloat16()
    x, g = (100 + torch.randn(3, 5, 64)).bfloat16(), torch.randn(3, 5, 64).bfloat16()
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    wrapped(x).backward(g)
    exact = copy.deepcopy(layer).double()
    for i in range(3):
        (expected,) = torch.autograd.grad((exact(x[i : i + 1].double()) * g[i : i + 1]).sum(), exact.weight)
        torch.testing.assert_close(layer.weight.grad_sample[i].double(), expected, rtol=2e-2, atol=2e-2)


class CallsLayerNorm(nn.Module):
    """Its own parameters, used by the function of a layer: the layer's sampler reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (4,), self.weight, self.bias)


@pytest.mark.parametrize("model", [nn.LayerNorm(4), CallsLayerNorm()], ids=["layer", "function"])
def test_a_users_sampler_gets_the_layers_inputs_and_nothing_else(model: nn.Module) -> None:
    """Ours also get the statistics that the forward computed: a sampler written to the contract knows no such thing."""
    before = registry._SAMPLERS[nn.LayerNorm]
    numbers = []
    try:

        @grad_samplers.register_grad_sampler(nn.LayerNorm)
        def own(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict:
            numbers.append(len(activations))
            normal = F.layer_norm(activations[0], layer.normalized_shape)
            return {layer.weight: normal * backprops, layer.bias: backprops}

        check(model, torch.randn(3, 4))
    finally:
        registry._SAMPLERS[nn.LayerNorm] = before
    assert set(numbers) == {1}


class Sequences(nn.Module):
    """An embedding's output, transposed, goes to several convolutions; ``how`` tells what happens in between."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.table = how, nn.Embedding(20, 4)
        self.one, self.two = nn.Conv1d(4, 3, 2), nn.Conv1d(4, 3, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        if self.how == "without a graph at first":
            with torch.no_grad():
                first = self.one(x)
        else:
            first = self.one(x)
        return first.relu().amax(2) + self.two(x).amax(2)


@MODES
def test_convolutions_that_share_a_transposed_input(mode: str) -> None:
    check(Sequences("with a graph"), torch.randint(20, (3, 6)), mode=mode)


def test_a_copy_made_without_a_graph_is_not_used_with_one() -> None:
    wrapped = GradSampleModule(Sequences("without a graph at first"))
    wrapped(torch.randint(20, (3, 6))).sum().backward()
    assert wrapped._module.table.weight.grad_sample.abs().sum() > 0


def test_a_transposed_input_is_copied_once_and_only_on_the_way_to_convolutions() -> None:
    model = nn.Sequential(nn.Conv1d(4, 3, 2))
    tape = GradSampleModule(model)._captured.tape
    active = tape.begin(3)
    x = torch.randn(3, 6, 4).transpose(1, 2)
    copied = active.in_order(x)
    assert copied.is_contiguous() and torch.equal(copied, x) and active.in_order(x) is copied
    assert active.in_order(copied) is copied
    x.add_(1)
    assert active.in_order(x) is not copied and torch.equal(active.in_order(x), x)
    assert active.in_order(x.detach()) is not active.in_order(x)
