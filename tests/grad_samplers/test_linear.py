"""`nn.Linear` and what runs its forward, on inputs of any rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from grad_samplers import linear
from tests.grad_samplers.check import check

sizes = st.integers(1, 7)


@given(st.integers(0, 4), st.lists(sizes, max_size=3), sizes, sizes, st.booleans())
def test_any_rank(batch, middle, d, p, bias):
    check(nn.Linear(d, p, bias=bias), torch.randn(batch, *middle, d, dtype=torch.float64))


@pytest.mark.parametrize("length", [2, 8, 40, 60])
def test_both_ways_to_the_norm(length, monkeypatch):
    """A short sequence goes through Gram matrices, a long one through the gradient itself."""
    monkeypatch.setattr(linear, "SMALL", 0)
    assert linear.ghost_is_cheaper(3, length, 50, 40) == (length < 22)
    check(nn.Linear(40, 50), torch.randn(3, length, 40, dtype=torch.float64))


def test_the_norm_in_chunks_of_samples(monkeypatch):
    monkeypatch.setattr("grad_samplers.tensors.CPU_CHUNK_NUMEL", 30)
    check(nn.Linear(3, 4), torch.randn(5, 20, 3, dtype=torch.float64))
    check(nn.Linear(30, 40), torch.randn(5, 2, 30, dtype=torch.float64))


def test_non_contiguous_input():
    check(nn.Linear(4, 3), torch.randn(5, 4, 6, dtype=torch.float64).transpose(1, 2)[::2])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_left_out(frozen):
    layer = nn.Linear(4, 3)
    getattr(layer, frozen).requires_grad_(False)
    check(layer, torch.randn(5, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 3, 50])
def test_half_precision_inputs_are_read_in_float32(length):
    layer = nn.Linear(6, 5).bfloat16()
    a, g = torch.randn(4, length, 6).bfloat16(), torch.randn(4, length, 5).bfloat16()
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double())
    norms = grad_samplers.per_sample_norms(layer, [a], g)[layer.weight]
    total = grad_samplers.weighted_sum(layer, [a], g, torch.ones(4))[layer.weight]
    gradients = grad_samplers.per_sample_gradients(layer, [a], g)[layer.weight]
    assert norms.dtype == total.dtype == gradients.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), exact.sum(0), rtol=1e-5, atol=1e-5)


def test_a_gradient_that_cancels_is_not_underestimated():
    """Two positions with opposite gradients: in float32 the Gram product is little but rounding."""
    torch.manual_seed(0)
    a = torch.randn(64, 1, 300).repeat(1, 2, 1) * 100
    a[:, 1] += 0.01 * torch.randn(64, 300)
    g = torch.randn(64, 1, 200).repeat(1, 2, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    layer = nn.Linear(300, 200)
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double()).flatten(1).norm(dim=1)
    assert linear.ghost_is_cheaper(64, 2, 200, 300)
    norms = grad_samplers.per_sample_norms(layer, [a], g)[layer.weight].double()
    assert (norms >= exact).all()


def test_transformers_conv1d():
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    from transformers.pytorch_utils import Conv1D

    check(Conv1D(5, 4), torch.randn(3, 6, 4, dtype=torch.float64))
    check(Conv1D(40, 50), torch.randn(3, 2, 50, dtype=torch.float64))
    check(Conv1D(5, 4), torch.randn(3, 4, dtype=torch.float64))


def test_opacus_rnn_linear_is_covered_by_inheritance():
    from opacus.layers.dp_rnn import RNNLinear

    check(RNNLinear(4, 3), torch.randn(5, 4, dtype=torch.float64))


def test_input_without_batch_is_an_error():
    with pytest.raises(ValueError, match="no batch dimension"):
        linear.linear_grad_sample(nn.Linear(3, 2), [torch.randn(3)], torch.randn(2))


def test_parametrized_weight_is_refused():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert "computed from other tensors" in (grad_samplers.reason_unsupported(layer) or "")
    assert "lazy" in (grad_samplers.reason_unsupported(nn.LazyLinear(2)) or "")
