"""PReLU and Opacus's SequenceBias."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from tests.grad_samplers.check import check


@given(st.integers(0, 4), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.booleans())
def test_prelu(batch, channels, size, shared):
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    check(nn.PReLU(1 if shared else channels), x)


def test_prelu_of_single_numbers_and_of_zero():
    check(nn.PReLU(), torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64))


def test_frozen_sequence_bias():
    from opacus.layers.dp_multihead_attention import SequenceBias

    layer = SequenceBias(3, batch_first=True).requires_grad_(False)
    assert grad_samplers.per_sample_gradients(layer, [torch.randn(2, 4, 3)], torch.randn(2, 5, 3)) == {}


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_sequence_bias(batch):
    from opacus.layers.dp_multihead_attention import SequenceBias

    check(SequenceBias(3, batch_first=True), torch.randn(batch, 5, 3, dtype=torch.float64))
