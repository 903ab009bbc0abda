"""A user's wrong sampler stops the training before its first batch; one that is only unlike autograd is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grad_samplers
from gsm import GradSampleModule
from gsm.sampler_check import is_users
from tests.compare import check

D = 3


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return (x @ self.weight.t()) * scale + self.bias


class Scaled(nn.Module):
    """Calls it with an option by name."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.layer, self.scale = nn.Linear(D, D), Affine(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x), scale=self.scale)


def right(layer: Any, a: list[Tensor], g: Tensor) -> dict[Tensor, Tensor]:
    return {layer.weight: torch.einsum("bti,btj->bij", g, a[0]), layer.bias: g.sum(1)}


def wrong(change: Callable[[Tensor], Tensor], name: str = "weight") -> Callable[..., dict[Tensor, Tensor]]:
    def sampler(layer: Any, a: list[Tensor], g: Tensor) -> dict[Tensor, Tensor]:
        found = right(layer, a, g)
        return {p: change(v) if p is getattr(layer, name) else v for p, v in found.items()}

    return sampler


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    if Affine in grad_samplers.registered():
        grad_samplers.unregister(Affine)


def run(model: nn.Module, mode: str = "ghost", **options: Any) -> None:
    GradSampleModule(model, mode=mode, **options)(torch.randn(4, 5, D)).square().sum((1, 2)).mean().backward()


Change = Callable[[Tensor], Tensor]
OTHERS: dict[str, Change] = {
    "of the next sample": lambda v: v.roll(1, 0),
    "the same for all": lambda v: v.sum(0).expand_as(v),
}
ITS_OWN: dict[str, Change] = {
    "twice as large": lambda v: 2 * v,
    "constant": lambda v: torch.full_like(v, 3.0),
    "divided by the batch": lambda v: v / len(v),
    "without a part": lambda v: torch.cat([v[:, :1], torch.zeros_like(v[:, 1:])], 1),
}


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", OTHERS)
def test_gradients_of_other_samples_are_refused(change: str, name: str, mode: str) -> None:
    grad_samplers.register_grad_sampler(Affine)(wrong(OTHERS[change], name))
    with pytest.raises(ValueError, match=rf"is wrong: a sample's gradient depends on .* another for layer\.{name}"):
        run(Scaled(), mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", ITS_OWN)
def test_gradients_unlike_autograds_are_said_and_used(change: str, name: str, mode: str) -> None:
    """A bound holds for whatever is clipped and released; somebody may want it so."""
    grad_samplers.register_grad_sampler(Affine)(wrong(ITS_OWN[change], name))
    with pytest.warns(UserWarning, match=rf"for Affine gives another gradient than autograd for layer\.{name}"):
        run(Scaled(), mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad_samplers.register_grad_sampler(Affine)(right)
        run(Scaled(), mode)


def test_an_option_that_the_sampler_ignores_shows_where_it_is_used() -> None:
    grad_samplers.register_grad_sampler(Affine)(right)
    check(Scaled(), torch.randn(4, 5, D), mode="ghost")
    with pytest.warns(UserWarning, match=r"than autograd for layer\.weight \(relative error 0\.67"):
        run(Scaled(3.0))


def test_norms_and_weighted_sums_are_compared_too() -> None:
    grad_samplers.register_grad_sampler(Affine)(right)
    small: Any = grad_samplers.register_norm_sampler(Affine)
    small(lambda layer, a, g: {p: 0.5 * v.flatten(1).norm(dim=1) for p, v in right(layer, a, g).items()})
    with pytest.raises(ValueError, match=r"its norm is not that of the gradient it gives for layer\."):
        run(Scaled())
    grad_samplers.unregister(Affine)
    grad_samplers.register_grad_sampler(Affine)(right)
    unweighted: Any = grad_samplers.register_weighted_sampler(Affine)
    unweighted(lambda layer, a, g, weights: {p: v.sum(0) for p, v in right(layer, a, g).items()})
    with pytest.raises(ValueError, match=r"its weighted sum is not that of the gradients it gives for layer\."):
        run(Scaled())


def test_without_claims_about_privacy_nothing_is_compared() -> None:
    grad_samplers.register_grad_sampler(Affine)(wrong(lambda v: v.roll(1, 0)))
    run(Scaled(), strict=False)


def test_only_users_samplers_are_compared() -> None:
    theirs = grad_samplers.lookup(nn.Linear(2, 2))
    assert theirs is not None and not is_users(theirs)
    grad_samplers.register_grad_sampler(Affine)(right)
    own = grad_samplers.lookup(Affine())
    assert own is not None and is_users(own)


class Both(nn.Module):
    """A layer with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(torch.randn(5, 8).double()), nn.Parameter(torch.randn(5, 8).double())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.v.T, x @ self.w.T


class OfBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = Both()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x)
        return a * b.sigmoid()


@pytest.mark.parametrize("mode", ["auto", "hooks", "ghost"])
def test_a_layer_with_several_outputs_hands_its_sampler_a_list(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    @grad_samplers.register_grad_sampler(Both)
    def both(layer: Both, activations: list[Tensor], backprops: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        outer = [torch.einsum("ni,no->noi", activations[0], b) for b in backprops]
        return {layer.v: outer[0], layer.w: outer[1]}

    try:
        check(OfBoth(), torch.randn(4, 8, dtype=torch.float64), mode=mode)
    finally:
        grad_samplers.unregister(Both)
    assert not recwarn.list
