"""`nn.Bilinear` on inputs of any rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.grad_samplers.check import check

sizes = st.integers(1, 5)


@given(st.integers(0, 4), st.lists(sizes, max_size=2), sizes, sizes, sizes, st.booleans())
def test_any_rank(batch, middle, m, n, p, bias):
    x, z = (torch.randn(batch, *middle, size, dtype=torch.float64) for size in (m, n))
    check(nn.Bilinear(m, n, p, bias=bias), x, z)


@pytest.mark.parametrize("length", [3, 80])
def test_both_ways_to_the_norm(length):
    check(nn.Bilinear(6, 5, 4), *(torch.randn(3, length, d, dtype=torch.float64) for d in (6, 5)))


def test_frozen_weight():
    layer = nn.Bilinear(2, 3, 4)
    layer.weight.requires_grad_(False)
    check(layer, torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64))
