"""Small helpers on which every norm rests: precision, rounding on the safe side, whose parameters they are."""

import pytest
import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import nn
from torch.nn.utils import parametrize

import grad_samplers
from grad_samplers.tensors import norms_of_grams, norms_of_products, wide, widen

SINGLE, DOUBLE = torch.zeros(2), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_never_computed_in(dtype: torch.dtype) -> None:
    half = torch.zeros(2, dtype=dtype)
    assert wide(half).dtype == torch.float32 and wide(DOUBLE) is DOUBLE
    for given in ([half], [half, half], [half, SINGLE], [SINGLE, half]):
        assert {x.dtype for x in widen(*given)} == {torch.float32}
    for given in ([half, DOUBLE], [DOUBLE, half], [SINGLE, DOUBLE], [DOUBLE, SINGLE]):
        assert {x.dtype for x in widen(*given)} == {torch.float64}


def test_terms_that_cancel_give_no_less_than_their_rounding() -> None:
    """Exactly opposite terms, of which rounding left something above zero, nothing, or something below."""
    g = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).unsqueeze(2)
    left = torch.tensor([1e-7, 0.0, -3e-7])
    first = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 2, 2).repeat(3, 1, 1)
    first[:, 0, 0] += left
    norms = norms_of_grams(first, torch.bmm(g, g.mT))
    rounding = 4 * torch.finfo(torch.float32).eps * 2 * 2
    assert (norms.square() >= 0.99 * (left.clamp(min=0) + rounding)).all()


def test_terms_that_do_not_cancel_are_left_alone() -> None:
    u, v = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    exact = torch.bmm(u.double().mT, v.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms_of_products(u, v).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "layer, name",
    [
        (nn.Linear(2, 3), "weight"),
        (nn.Bilinear(2, 3, 4), "weight"),
        (nn.Bilinear(2, 3, 4), "bias"),
        (nn.PReLU(), "weight"),
        (SequenceBias(3), "bias"),
        (nn.Conv2d(2, 3, 2), "weight"),
        (nn.ConvTranspose1d(2, 3, 2), "bias"),
        (nn.Embedding(4, 3), "weight"),
        (nn.EmbeddingBag(4, 3), "weight"),
        (nn.LayerNorm(3), "weight"),
        (nn.InstanceNorm1d(3, affine=True), "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_parameter_computed_from_others_is_refused(layer: nn.Module, name: str) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    assert grad_samplers.tensors.plain_parameters(layer, *layer._parameters) is None
    sampler = grad_samplers.lookup(layer)
    assert sampler is not None and sampler.supports is not None and sampler.supports(layer) is None
    parametrize.register_parametrization(layer, name, Twice())
    assert f"{name} is computed from other tensors" in (sampler.supports(layer) or "")
