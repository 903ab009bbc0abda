"""Weights bound every sample's contribution; the sensitivity is that bound."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsm.clipping import AutomaticClipping, FlatClipping, PerLayerClipping
from gsm.ledger import Materialised
from tests.gsm.optimizer_tools import gradients, norms, parameters

PARTS = [FlatClipping, AutomaticClipping, PerLayerClipping]


def squared(rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype).square()


def test_flat_weights_are_one_up_to_the_bound_and_bound_over_norm_beyond():
    weights = FlatClipping(2.0).weights(squared([[1.0, 3.0, 0.0], [0.5, 4.0, 0.0]]))
    assert weights.tolist() == pytest.approx([1.0, 0.4, 1.0], rel=1e-14)


def test_automatic_weights_are_the_papers_formula():
    weights = AutomaticClipping(2.0, gamma=0.5).weights(squared([[3.0, 0.0]]))
    assert weights.tolist() == pytest.approx([2.0 / 3.5, 4.0], rel=1e-14)


def test_per_layer_equal_split_and_list():
    norms_ = squared([[3.0, 0.1], [1.0, 9.0]])
    split = PerLayerClipping(math.sqrt(2.0))
    assert split.weights(norms_).tolist() == [
        pytest.approx([1 / 3, 1.0], rel=1e-14),
        pytest.approx([1.0, 1 / 9], rel=1e-14),
    ]
    assert split.sensitivity == math.sqrt(2.0)
    given_ = PerLayerClipping([3.0, 4.0])
    assert given_.sensitivity == 5.0 and given_.max_grad_norm == 5.0
    assert given_.weights(norms_)[1].tolist() == pytest.approx([1.0, 4 / 9], rel=1e-14)


def test_per_layer_bounds_follow_a_scheduler_and_keep_their_proportions():
    part = PerLayerClipping([3.0, 4.0])
    part.max_grad_norm = 10.0
    assert part.max_grad_norms(2) == pytest.approx([6.0, 8.0])
    assert part.sensitivity == 10.0
    part.max_grad_norm = [1.0, 1.0]
    assert part.sensitivity == pytest.approx(math.sqrt(2.0))


def test_per_layer_list_of_the_wrong_length_names_both_numbers():
    with pytest.raises(ValueError, match="list of 3 bounds.*2 trainable"):
        PerLayerClipping([1.0, 1.0, 1.0]).weights(squared([[1.0], [1.0]]))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 9),
    bound=st.floats(1e-4, 1e4),
    exponent=st.integers(-12, 12),
)
def test_no_sample_contributes_more_than_the_sensitivity(part, dtype, seed, batch, bound, exponent):
    params = parameters(dtype=dtype)
    grads = gradients(params, batch, scale=10.0**exponent, seed=seed)
    clipped = part(bound).clip(Materialised(params, grads, batch))
    weights = clipped.weights if clipped.weights.dim() == 2 else clipped.weights.expand(len(params), batch)
    exact = [g.double() * w.double().view(-1, *[1] * (g.dim() - 1)) for g, w in zip(grads, weights, strict=True)]
    assert clipped.sensitivity <= bound * (1 + 1e-12)
    # Only the rounding of the norm itself is left: a few ulp of float32 or float64.
    assert (norms(exact) <= clipped.sensitivity * (1 + 4 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_sample_that_is_not_finite_has_weight_exactly_zero_everywhere(part, bad):
    weights = part(1.0).weights(torch.tensor([[4.0, bad, 0.25], [1.0, 1.0, 0.0]]))
    weights = weights if weights.dim() == 2 else weights[None]
    assert (weights[:, 1] == 0).all() and (weights[:, [0, 2]] > 0).all() and torch.isfinite(weights).all()


@pytest.mark.parametrize("part", PARTS)
def test_an_overflowing_squared_norm_counts_as_not_finite(part):
    weights = part(1.0).weights(torch.tensor([[3e38, 1.0], [3e38, 1.0]]))
    assert (weights[..., 0] == 0).all() and (weights[..., 1] > 0).all()


@pytest.mark.parametrize("part", PARTS)
def test_a_zero_gradient_and_an_empty_batch_have_finite_weights(part):
    assert torch.isfinite(part(1.0).weights(torch.zeros(2, 3))).all()
    assert part(1.0).weights(torch.zeros(2, 0)).numel() == 0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, 1e39, math.nan, "one", None])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        FlatClipping(bound)


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma"):
        AutomaticClipping(1.0, gamma=0.0)
    with pytest.raises(ValueError, match="gamma"):
        AutomaticClipping(1.0, gamma=math.inf)


@pytest.mark.parametrize("part", [FlatClipping(3.0), AutomaticClipping(3.0), PerLayerClipping([1.0, 2.0])])
def test_state_comes_back(part):
    other = type(part)()
    other.load_state_dict(part.state_dict())
    assert other.max_grad_norm == part.max_grad_norm
    assert torch.equal(other.weights(torch.tensor([[4.0], [9.0]])), part.weights(torch.tensor([[4.0], [9.0]])))


def test_rounding_never_lifts_a_contribution_above_the_bound():
    """Ten thousand norms in float32, compared in float64; without the shrinking about half of them exceed it."""
    norms = torch.rand(10_000) * 100 + 1.7
    weights = FlatClipping(1.7).weights(norms.square()[None])
    assert (weights.double() * norms.double() <= 1.7).all()
    assert (weights.double() * norms.double() > 1.7 * (1 - 1e-5)).all()


def test_a_bound_at_which_norms_vanish_is_refused():
    """In float32 the norm of a gradient of 1e-23 is zero: it would pass any bound."""
    assert torch.full((1, 3), 1e-23).norm() == 0
    with pytest.raises(ValueError, match="what has no norm is not clipped"):
        FlatClipping(1e-24)
    FlatClipping(1e-15)


def test_a_list_of_no_bounds_is_named():
    with pytest.raises(ValueError, match="max_grad_norm is an empty list"):
        PerLayerClipping([])
