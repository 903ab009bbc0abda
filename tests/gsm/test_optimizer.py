"""What a release is: one clipped, noised, charged sum; every record in it at most once and at most the bound."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.gsm.optimizer_tools import SHAPES, Spy, clipped_sum, deliver, gradients, norms, parameters, private

BATCH = 6


def released(params):
    return [p.grad for p in params]


def assert_same(actual, expected, rtol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# -- one release -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), batch=st.integers(0, 7), bound=st.floats(0.1, 10.0))
def test_without_noise_the_update_is_the_loop_of_clipped_samples(seed, batch, bound):
    params = parameters()
    grads = gradients(params, batch, seed=seed)
    optimizer = private(params, max_grad_norm=bound, expected_batch_size=4, lr=0.5)
    deliver(params, grads)
    optimizer.step()
    expected = [total / 4 for total in clipped_sum(grads, bound)] if batch else [torch.zeros(s) for s in SHAPES]
    assert_same(released(params), [e.double() for e in expected])
    assert_same([p.detach() for p in params], [-0.5 * e.double() for e in expected])


def test_loss_reduction_sum_divides_by_nothing():
    params = parameters()
    grads = gradients(params, BATCH)
    optimizer = private(params, expected_batch_size=None, loss_reduction="sum")
    deliver(params, grads)
    optimizer.step()
    assert_same(released(params), clipped_sum(grads))


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_noise_has_the_deviation_of_multiplier_times_sensitivity(clipping):
    params = parameters([(300, 200)])
    optimizer = private(params, noise_multiplier=1.5, max_grad_norm=3.0, expected_batch_size=10, clipping=clipping)
    deliver(params, gradients(params, 0))
    optimizer.step()
    assert params[0].grad.std().item() == pytest.approx(1.5 * 3.0 / 10, rel=0.02)
    assert abs(params[0].grad.mean().item()) < 5 * 0.45 / math.sqrt(60_000)


def test_secure_mode_releases_the_same_distribution():
    params = parameters([(300, 200)], dtype=torch.float32)
    optimizer = private(params, noise_multiplier=2.0, secure_mode=True)
    deliver(params, gradients(params, 0))
    optimizer.step()
    assert params[0].grad.std().item() == pytest.approx(2.0, rel=0.05)


def test_the_unnoised_sum_is_gone_after_the_release():
    params = parameters()
    optimizer = private(params, noise_multiplier=1.0)
    deliver(params, gradients(params, BATCH))
    optimizer.step()
    assert all(p.summed_grad is None for p in params) and not optimizer._pending.sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_clipped_and_summed_in_float32(dtype):
    """In float16 the squared norm overflows from a norm of 256 on, and 4096 + 1 is 4096."""
    params = parameters([(1000,)], dtype=dtype)
    optimizer = private(params, max_grad_norm=1e6)
    grads = torch.ones(4097, 1000, dtype=dtype)
    deliver(params, [grads])
    optimizer.virtual_step()
    assert params[0].summed_grad.dtype == torch.float32 and (params[0].summed_grad == 4097).all()
    optimizer.discard_pending()
    deliver(params, [torch.full((1, 1000), 60.0, dtype=dtype)])
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert params[0].grad.dtype == dtype
    assert params[0].grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)


def test_an_empty_batch_releases_noise_and_is_charged():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0)
    optimizer.accountant, optimizer.sample_rate = spy, 0.01
    deliver(params, gradients(params, 0))
    optimizer.step()
    assert all((p.grad != 0).all() for p in params) and spy.charges == [(1.0, 0.01)]


def test_a_parameter_the_batch_did_not_reach_has_gradient_zero_plus_noise():
    params = parameters()
    optimizer = private(params)
    params[0].grad_sample = gradients(params, BATCH)[0]
    optimizer.step()
    assert (params[0].grad != 0).all() and (params[1].grad == 0).all()
    optimizer.zero_grad()
    optimizer.noise_multiplier = 1.0
    params[0].grad_sample = gradients(params, BATCH)[0]
    optimizer.step()
    assert (params[1].grad != 0).all()


# -- sensitivity travels with the sum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [(1.0, 5.0), (5.0, 1.0)])
def test_a_bound_changed_within_a_logical_batch_is_covered_by_the_larger(first, second):
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=2.0, noise=spy)
    for bound in (first, second):
        optimizer.max_grad_norm = bound
        deliver(params, gradients(params, BATCH, scale=100.0))
        optimizer.virtual_step() if bound == first else optimizer.step()
    assert spy.sensitivities == [5.0] and spy.stds == [10.0]


def test_a_bound_changed_between_clipping_and_release_does_not_move_the_noise():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, max_grad_norm=4.0, noise=spy)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    optimizer.max_grad_norm = 0.1
    optimizer.step()
    assert spy.stds == [4.0]


def test_the_noise_multiplier_charged_is_the_one_used():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    optimizer.accountant, optimizer.sample_rate = spy, 0.5
    for sigma in (1.0, 0.3):
        optimizer.zero_grad()
        optimizer.noise_multiplier = sigma
        deliver(params, gradients(params, BATCH))
        optimizer.step()
    assert [sigma for sigma, _ in spy.charges] == spy.stds == [1.0, 0.3]


# -- numbers that are not numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_a_sample_that_is_not_finite_never_reaches_the_parameters(bad, clipping):
    params = parameters()
    grads = gradients(params, BATCH)
    optimizer = private(params, clipping=clipping)
    without = [torch.cat([g[:2], g[3:]]) for g in grads]
    deliver(params, without)
    optimizer.virtual_step()
    expected = [p.summed_grad.clone() for p in params]
    optimizer.discard_pending()
    grads[1][2, 0] = bad
    deliver(params, grads)
    optimizer.virtual_step()
    assert_same([p.summed_grad for p in params], expected)


def test_no_noise_multiplier_below_zero_or_beyond_numbers():
    params = parameters()
    for bad in (-1.0, math.nan, math.inf, "much", None):
        with pytest.raises(ValueError, match="noise_multiplier"):
            private(params, noise_multiplier=bad)
    optimizer = private(params)
    with pytest.raises(ValueError, match="noise_multiplier"):
        optimizer.noise_multiplier = -0.1


# -- nothing un-noised reaches the parameters --------------------------------------------------------------------------


def test_a_grad_that_somebody_put_there_is_overwritten():
    params = parameters()
    optimizer = private(params)
    grads = gradients(params, BATCH)
    for p in params:
        p.grad = torch.full_like(p, 1e9)
    deliver(params, grads)
    optimizer.step()
    assert_same([p.detach() for p in params], [-total for total in clipped_sum(grads)])


def test_a_frozen_parameter_with_a_grad_does_not_move():
    params = parameters()
    params[0].requires_grad_(False)
    params[0].grad = torch.ones_like(params[0])
    optimizer = private(params)
    grads = gradients(params, BATCH)[1:]
    deliver(params[1:], grads)
    optimizer.step()
    assert (params[0] == 0).all() and params[0].grad is None
    assert_same(released(params[1:]), clipped_sum(grads))


def test_a_parameter_frozen_within_a_logical_batch_takes_no_part_in_the_release():
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    params[0].requires_grad_(False)
    deliver(params[1:], gradients(params, BATCH)[1:])
    optimizer.step()
    assert (params[0] == 0).all() and all((p != 0).all() for p in params[1:])


# -- losses and closures -----------------------------------------------------------------------------------------------


def wrapped_linear():
    """Opacus's own wrapper, so that this file does not depend on ours."""
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(1)
    model = GradSampleModule(nn.Linear(3, 2).double())
    return model, torch.randn(8, 3, dtype=torch.float64), private(list(model.parameters()), expected_batch_size=8)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_the_private_transformers_loop_with_and_without_loss():
    """Gradient accumulation of the FAQ: virtual_step three times, then step and zero_grad."""
    updates = []
    for given_loss in (True, False):
        model, x, optimizer = wrapped_linear()
        for i, part in enumerate(x.split(2), 1):
            losses = model(part).square().sum(1)
            if not given_loss:
                losses.mean().backward()
            options = {"loss": losses} if given_loss else {}
            if i % 4 == 0:
                optimizer.step(**options)
                optimizer.zero_grad()
            else:
                optimizer.virtual_step(**options)
        updates.append([p.detach() for p in model.parameters()])
    model, x, optimizer = wrapped_linear()
    optimizer.step(loss=model(x).square().sum(1))
    updates.append([p.detach() for p in model.parameters()])
    assert_same(updates[0], updates[2])
    assert_same(updates[1], updates[2])


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("shape", ["scalar", "per token"])
def test_a_loss_that_is_not_one_number_per_sample_is_refused(shape):
    model, x, optimizer = wrapped_linear()
    losses = model(x).square().sum(1)
    loss = losses.mean() if shape == "scalar" else losses.repeat(2)
    with pytest.raises(ValueError, match="one entry per sample"):
        optimizer.step(loss=loss)


def test_a_closure_runs_once_and_its_value_is_returned():
    params, calls = parameters(), []
    optimizer = private(params)
    grads = gradients(params, BATCH)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        deliver(params, grads)
        return 1.25

    with torch.no_grad():
        assert optimizer.step(closure) == 1.25
    assert calls == [True]
    assert_same(released(params), clipped_sum(grads))
    with pytest.raises(ValueError, match="closure or a loss"):
        optimizer.step(closure, loss=torch.zeros(2))


def test_many_releases_stay_silent():
    params = parameters()
    optimizer = private(params, noise_multiplier=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            deliver(params, gradients(params, BATCH))
            optimizer.step()


def test_one_record_more_or_less_moves_the_sum_by_at_most_the_bound():
    params = parameters()
    grads = gradients(params, BATCH, scale=3.0)
    sums = []
    for keep in (BATCH, BATCH - 1):
        optimizer = private(params, max_grad_norm=0.7)
        deliver(params, [g[:keep] for g in grads])
        optimizer.virtual_step()
        sums.append([p.summed_grad for p in params])
        optimizer.discard_pending()
    moved = norms([(a - b)[None] for a, b in zip(*sums, strict=True)]).item()
    assert moved == pytest.approx(0.7, rel=1e-9)
