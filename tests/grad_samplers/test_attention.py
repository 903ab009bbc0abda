"""Multi-head attention written with known functions: what it cannot follow, it refuses."""

import pytest
import torch
from torch import nn

from grad_samplers.attention import multi_head_attention


def arguments(layer: nn.MultiheadAttention, *shape: int) -> list:
    x = torch.randn(*shape)
    weights = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    return [x, x, x, 4, 2, *weights, layer.out_proj.weight, layer.out_proj.bias]


def test_a_single_sample_is_refused() -> None:
    layer = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="give the input a batch dimension"):
        multi_head_attention(*arguments(layer, 3, 4))


@pytest.mark.parametrize("name", ["static_k", "static_v"])
def test_keys_and_values_from_outside_are_refused(name: str) -> None:
    layer = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="static_k or static_v is not supported"):
        multi_head_attention(*arguments(layer, 3, 5, 4), **{name: torch.randn(10, 3, 2)})


def test_it_is_the_built_in_function() -> None:
    layer = nn.MultiheadAttention(4, 2)
    given = arguments(layer, 3, 5, 4)
    for mine, theirs in zip(
        multi_head_attention(*given), nn.functional.multi_head_attention_forward(*given), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
