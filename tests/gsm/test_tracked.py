"""Uses of a parameter that ask no `__torch_function__`: they would give the parameter a gradient of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsm.wrapper import GradSampleModule
from tests.compare import MODES, check


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class ProductForVmap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = Product.backward


class StraightThrough(torch.autograd.Function):
    """A weight rounded to eighths: no sample is in sight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (8 * weight).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


USES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "autograd.Function": lambda layer, x: Product.apply(x, layer.weight),
    "autograd.Function with a rule for vmap": lambda layer, x: ProductForVmap.apply(x, layer.weight),
    "of the transpose": lambda layer, x: Product.apply(x, layer.weight.t()),
    "of the parameter alone": lambda layer, x: x @ StraightThrough.apply(layer.weight),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "vmap of a function": lambda layer, x: torch.vmap(lambda row: row @ layer.weight)(x),
    "no rule, outside of its module": lambda layer, x: torch.inner(x, layer.weight),
}


class Inner(nn.Module):
    """The parameter belongs to a child that is not called, or not as usual."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.layer = USES[use], nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_use_that_is_not_seen_is_taken_with_the_module_around_it(use: str, mode: str) -> None:
    """Other layers have gradients as ever, so nothing else would show that this one's are missing."""
    torch.manual_seed(0)
    check(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Inner(use), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 4), mode=mode
    )


class Branching(nn.Module):
    """Takes the hidden way only later: no probe has seen it."""

    hidden = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ StraightThrough.apply(self.layer.weight) if self.hidden else self.layer(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_the_probe_did_not_take_is_an_error_not_a_zero(mode: str) -> None:
    inner = Branching()
    model = GradSampleModule(nn.Sequential(nn.Linear(4, 4), inner), mode=mode)
    model(torch.randn(5, 4)).sum().backward()
    model.set_grad_sample_to_none()
    inner.hidden = True
    with pytest.raises(RuntimeError, match="weight is used where its gradient cannot be taken apart by sample"):
        model(torch.randn(5, 4)).sum().backward()


COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "matmul": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "convolution": lambda x, w: nn.functional.conv1d(x[:, None], w[:, None]),
    "product": lambda x, w: x * w[0],
    "constants before": lambda x, w: x @ (w * torch.tensor(1j) + 1).t(),
}


class Spectral(nn.Module):
    """Complex weights kept as real ones: the real formulas lack the conjugate."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.weight = COMPLEX[use], nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight)
        return self.use(torch.fft.fft(x).to(weight.dtype), weight).abs()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", COMPLEX)
def test_complex_numbers_are_left_to_autograd(use: str, mode: str) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(4, 4), Spectral(use)), torch.randn(5, 4), mode=mode)
