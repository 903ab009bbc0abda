"""What is refused, or handed to the subtree above, when a parameter meets something that no rule covers."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import grad_samplers
from gsm import resolve
from gsm.layout import Layout, Rows, Unresolvable
from gsm.wrapper import GradSampleModule
from tests.compare import MODES, check

D = 3


class Cached(nn.Module):
    """Keeps a value made of its parameter from one forward for later."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.weight * 2
        return x * self.weight


def test_a_value_of_an_earlier_forward_is_not_used_outside_of_one() -> None:
    wrapped = GradSampleModule(Cached())
    wrapped(torch.randn(2, D))
    with pytest.raises(RuntimeError, match="weight during an earlier forward is used outside"):
        wrapped.kept * 2


class Borrowing(nn.Module):
    """Uses a parameter that belongs to another module, in a function without a rule."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.scale, self.owner = nn.Parameter(torch.randn(D, D)), [owner]

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(x, self.scale) * self.owner[0].weight


class Lender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))
        self.inner = Borrowing(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_subtree_that_borrows_a_parameter_is_taken_with_its_owner(mode: str) -> None:
    wrapped = check(Lender(), torch.randn(4, D), mode=mode)
    assert wrapped.plan.rung("weight") == "functorch"
    assert "inner: it also uses weight from outside" in wrapped.plan["weight"].why


def test_a_layer_whose_sampler_was_removed_is_taken_as_a_subtree() -> None:
    kept = grad_samplers.sampler_of(nn.Linear)
    grad_samplers.unregister(nn.Linear)
    try:
        wrapped = check(nn.Sequential(nn.Linear(D, 2)), torch.randn(4, D))
        assert wrapped.plan.rung("0.weight") == "functorch"
    finally:
        grad_samplers.register_grad_sampler(nn.Linear, supports=kept.supports)(kept.grad)
        grad_samplers.register_norm_sampler(nn.Linear)(kept.norm)
        grad_samplers.register_weighted_sampler(nn.Linear)(kept.weighted)
    assert grad_samplers.sampler_of(nn.Linear) == kept


class Pickling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        pickle.dumps(self.weight)
        return x * self.weight


def test_a_tracked_parameter_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="weight.* lives only while its model runs"):
        GradSampleModule(Pickling())(torch.randn(2, D))


def test_parameters_hidden_in_nested_arguments_are_not_overlooked() -> None:
    with pytest.raises(Unresolvable, match="argument structure"):
        resolve.resolve(torch.cat, ([[torch.ones(2)]],), {})


class Places:
    """A pass in which the batch lies where a test says."""

    log = None

    def __init__(self, *layouts: Any) -> None:
        self.layouts, self.batch_size = iter(layouts), 2

    def layout(self, site: str, x: Tensor, batch_dim: int | None = None) -> Any:
        found = next(self.layouts)
        if isinstance(found, Exception):
            raise found
        return found


TARGET: Any = SimpleNamespace(gsm_name="weight")


@pytest.mark.parametrize(
    "one, other",
    [
        (Layout(0), Layout(1)),
        (Layout(0, "major"), Layout(0, "minor")),
        (Layout(0, "middle", 2), Layout(0, "middle", 3)),
        (Rows(torch.tensor([0, 1])), Rows(torch.tensor([1, 0]))),
    ],
)
def test_operands_with_their_batch_in_different_places_are_not_combined(one: Any, other: Any) -> None:
    operands = (torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(Unresolvable, match="their batch in different places"):
        resolve.reference(Places(one, other), [TARGET], "addcmul", operands, {})  # type: ignore[arg-type]
    assert resolve.reference(Places(one, one), [TARGET], "addcmul", operands, {}) is not None  # type: ignore[arg-type]


def test_what_cannot_be_located_is_not_taken_for_a_constant() -> None:
    active: Any = Places(Unresolvable("nobody knows"))
    with pytest.raises(Unresolvable, match="weight: used by add, but nobody knows") as caught:
        resolve.layout_of(active, TARGET, "add", torch.ones(2))
    assert caught.value.parameters == ("weight",)


class Forces(nn.Module):
    """A derivative with respect to the inputs as output, by one of torch's ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.energy, self.how = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "autograd":
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        if self.how == "of inputs alone":
            return self.energy(x) + vmap(grad(lambda v: v.pow(3).sum()))(x)
        return vmap(grad(lambda v: self.energy(v).sum()))(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["of inputs alone", "torch.func"])
def test_derivatives_in_the_forward(how: str, mode: str) -> None:
    check(Forces(how), torch.randn(5, 4), mode=mode)


def test_a_graph_of_the_derivative_takes_a_whole_subtree() -> None:
    check(Forces("autograd"), torch.randn(5, 4), mode="functorch")
    with pytest.raises(RuntimeError, match="Wrap with mode='functorch'"):
        check(Forces("autograd"), torch.randn(5, 4), mode="ghost")
