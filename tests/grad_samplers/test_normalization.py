"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm."""

from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from grad_samplers import normalization
from tests.grad_samplers.check import check

shapes = st.lists(st.integers(1, 5), max_size=2)
normalized = st.lists(st.integers(2, 5), min_size=1, max_size=2)


def scatter_parameters(layer):
    """Weights away from one and zero, where a formula that forgets them would be right by luck."""
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@given(st.integers(0, 4), shapes, normalized, st.booleans(), st.sampled_from([1e-5, 0.3]))
def test_layer_norm(batch, middle, shape, bias, eps):
    layer = scatter_parameters(nn.LayerNorm(shape, eps=eps, bias=bias))
    check(layer, torch.randn(batch, *middle, *shape, dtype=torch.float64))


@given(st.integers(0, 4), shapes, normalized, st.sampled_from([None, 1e-5, 0.3]))
def test_rms_norm(batch, middle, shape, eps):
    layer = scatter_parameters(nn.RMSNorm(shape, eps=eps))
    check(layer, torch.randn(batch, *middle, *shape, dtype=torch.float64))


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(2, 4), max_size=3))
def test_group_norm(batch, groups, per_group, size):
    assume(per_group > 1 or size)  # the layer itself refuses to normalise a single value
    layer = scatter_parameters(nn.GroupNorm(groups, groups * per_group, eps=0.1))
    check(layer, torch.randn(batch, groups * per_group, *size, dtype=torch.float64))


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(2, 4), min_size=1, max_size=3))
def test_instance_norm(batch, channels, size):
    cls = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][len(size) - 1]
    layer = scatter_parameters(cls(channels, affine=True))
    check(layer, torch.randn(batch, channels, *size, dtype=torch.float64))


def test_instance_norm_of_an_empty_batch():
    """The layer's own forward fails on it; the sampler need not."""
    layer, x = nn.InstanceNorm1d(3, affine=True), torch.randn(0, 3, 5)
    assert grad_samplers.per_sample_gradients(layer, [x], x)[layer.weight].shape == (0, 3)
    assert grad_samplers.weighted_sum(layer, [x], x, torch.ones(0))[layer.bias].eq(0).all()


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False), nn.InstanceNorm1d(4)]
)
def test_without_parameters(layer):
    x = torch.randn(2, 4, 4)
    assert grad_samplers.per_sample_gradients(layer, [x], x) == {}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_left_out(frozen):
    layer = nn.LayerNorm(4)
    getattr(layer, frozen).requires_grad_(False)
    check(layer, torch.randn(3, 2, 4, dtype=torch.float64))


def test_half_precision_rms_norm_uses_the_layers_own_default_eps():
    """Without eps the layer takes its input dtype's; small inputs show which one."""
    layer = nn.RMSNorm(8).bfloat16()
    a = (torch.randn(3, 8) * 1e-3).bfloat16()
    g = torch.ones(3, 8).bfloat16()
    found = grad_samplers.per_sample_gradients(layer, [a], g)[layer.weight]
    torch.testing.assert_close(found, layer(a).float(), rtol=1e-2, atol=1e-4)
    assert found.dtype == torch.float32


def test_running_statistics_are_refused():
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    assert "track_running_stats" in (grad_samplers.reason_unsupported(layer) or "")


def test_a_subclass_with_its_own_normalisation_is_refused():
    class Shifted(nn.InstanceNorm2d):
        def _apply_instance_norm(self, x):
            return super()._apply_instance_norm(x) + 1

    assert "_apply_instance_norm" in (grad_samplers.reason_unsupported(Shifted(3, affine=True)) or "")


def test_inputs_without_batch_are_errors():
    instance = nn.InstanceNorm1d(4, affine=True)
    for layer, x in [(nn.LayerNorm(4), torch.randn(4)), *((instance, torch.randn(*n)) for n in [(4, 6), (2, 4, 6, 6)])]:
        with pytest.raises(ValueError, match="a batch has"):
            grad_samplers.per_sample_gradients(layer, [x], x)


@given(st.integers(1, 3), shapes, normalized, st.sampled_from([None, "weight", "bias"]), st.booleans())
def test_statistics_kept_from_the_forward_change_nothing(batch, middle, shape, frozen, long):
    layer = scatter_parameters(nn.LayerNorm(shape, eps=0.1)).double()
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    x, g = (torch.randn(batch, *middle, *shape, dtype=torch.float64) for _ in range(2))
    kept = torch.native_layer_norm(x, shape, None, None, layer.eps)[1:]
    expected = grad_samplers.per_sample_gradients(layer, [x], g)
    with mock.patch.object(normalization, "LONG", 0 if long else 1 << 14):
        found = grad_samplers.per_sample_gradients(layer, [x, *kept], g)
    assert found.keys() == expected.keys()
    for p in expected:
        torch.testing.assert_close(found[p], expected[p], rtol=1e-10, atol=1e-10)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(2, 4), min_size=1, max_size=2))
def test_statistics_of_groups_kept_from_the_forward_change_nothing(batch, groups, per_group, size):
    channels = groups * per_group
    layer = scatter_parameters(nn.GroupNorm(groups, channels, eps=0.1)).double()
    x, g = (torch.randn(batch, channels, *size, dtype=torch.float64) for _ in range(2))
    count = torch.Size(size).numel()
    kept = torch.native_group_norm(x, None, None, batch, channels, count, groups, layer.eps)[1:]
    expected = grad_samplers.per_sample_gradients(layer, [x], g)
    found = grad_samplers.per_sample_gradients(layer, [x, *kept], g)
    for p in expected:
        torch.testing.assert_close(found[p], expected[p], rtol=1e-10, atol=1e-10)
