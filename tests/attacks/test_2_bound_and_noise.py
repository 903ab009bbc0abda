"""Class 2: the bound and the noise drift apart. The sensitivity travels with the sum."""

import math

import pytest
import torch
from opacus.schedulers import LambdaGradClip, LambdaNoise

from tests.attacks.tools import CE, clipped_sum, data, mlp, step, training, watched

X, Y = data(8, scale=30.0).tensors


def test_a_clip_scheduler_between_virtual_steps_cannot_leave_the_noise_behind():
    """Guard: ``PendingRelease`` keeps the largest bound of the logical batch; without it the noise fits the last."""
    model, optimizer, watch = watched(bound=4.0)
    scheduler = LambdaGradClip(optimizer, scheduler_function=lambda epoch: 0.25**epoch)
    CE(model(X[:4]), Y[:4]).backward()
    optimizer.virtual_step()
    scheduler.step()
    assert optimizer.max_grad_norm == 1.0
    CE(model(X[4:]), Y[4:]).backward()
    optimizer.step()
    assert watch.stds == [4.0]


def test_a_bound_set_between_backward_and_step_clips_and_scales_with_the_same_number():
    """Guard: the clipping part says weights and sensitivity together."""
    model, optimizer, watch = watched(bound=4.0)
    CE(model(X), Y).backward()
    optimizer.max_grad_norm = 0.5
    optimizer.step()
    assert watch.sensitivities == [0.5] and watch.sums[0].norm() <= 8 * 0.5


def test_a_noise_scheduler_charges_what_it_used():
    """Guard: the multiplier is read once per release, for the noise and for the accountant."""
    model, optimizer, loader = training()
    watch = optimizer.noise
    scheduler = LambdaNoise(optimizer, noise_lambda=lambda epoch: 1.0 + epoch)
    for x, y in loader:
        step(model, optimizer, x, y)
        scheduler.step()
    charged = [s for s, _, n in optimizer.accountant.history for _ in range(n)]
    assert charged == watch.stds and len(set(charged)) > 1


@pytest.mark.parametrize(("clipping", "bound", "total"), [
    ("per_layer", [1.0, 2.0, 2.0, 4.0], 5.0), ("per_layer", 3.0, 3.0), ("automatic", 3.0, 3.0), ("flat", 3.0, 3.0)
])  # fmt: skip
def test_one_record_moves_the_sum_by_at_most_what_the_noise_is_scaled_by(clipping, bound, total):
    """Guard: a clipping part's ``sensitivity`` is the l2 bound over all parameters."""
    sums = []
    for rows in (slice(0, 8), slice(0, 7)):
        torch.manual_seed(3)
        model, optimizer, watch = watched(bound=bound, clipping=clipping, loss_reduction="mean")
        step(model, optimizer, X[rows], Y[rows])
        sums.append(watch.sums[0])
        assert watch.stds[0] == pytest.approx(total)
    moved = (sums[0] - sums[1]).norm().item()
    assert 0.3 * total < moved <= total * (1 + 1e-6)


def test_two_optimizers_of_ranks_never_draw_the_same_noise_from_a_copy():
    """Guard: a copy refreshes its noise; equal noise on two sums cancels in their difference."""
    import copy

    torch.manual_seed(0)
    model, optimizer, _ = training(watch=False, noise_generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(optimizer)
    draws = []
    for each in (optimizer, other):
        t = torch.zeros(5)
        each.noise.add_([t], 1.0, 1.0)
        draws.append(t)
    assert not torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_clipped_in_float32(dtype):
    """Guard: ``accumulation_dtype``; norms in bfloat16 are 0.4 % off, and so is the bound."""
    model, optimizer, watch = watched(mlp().to(dtype), bound=1.0)
    x, y = data(8, scale=4.0).tensors
    CE(model(x.to(dtype)).float(), y).backward()
    optimizer.step()
    assert optimizer.noise.sums[0].dtype == torch.float64 and watch.sums[0].norm() <= 8.0
    one, single, alone = watched(mlp().to(dtype), bound=1e-3)
    CE(one(x[:1].to(dtype)).float(), y[:1]).backward()
    single.step()
    assert 1e-3 * (1 - 1e-4) < alone.sums[0].norm() <= 1e-3 * (1 + 1e-6)


def test_gradient_accumulation_by_hand_adds_the_bounds():
    """Guard: backwards that nothing joined may hold the same records; the noise covers the total."""
    model, optimizer, watch = watched(bound=1.0)
    for _ in range(2):
        CE(model(X), Y).backward()
    with pytest.warns(UserWarning, match="bounds add up"):
        optimizer.step()
    assert watch.stds == [2.0]
    torch.testing.assert_close(watch.sums[0], 2 * clipped_sum(model._module, X, Y), rtol=1e-5, atol=1e-5)


def test_the_adaptive_bound_moves_only_by_what_was_released():
    """Guard: the count goes through the noise; the gradient's multiplier rises so that both cost what is charged."""
    model, optimizer, watch = watched(clipping="adaptive", bound=1.0)
    step(model, optimizer, X, Y)
    gradient, count = watch.stds
    assert 1 / gradient**2 + 1 / (2 * count) ** 2 == pytest.approx(1.0)
    assert optimizer.max_grad_norm == pytest.approx(1.0 * math.exp(-0.2 * (min(max(
        watch.sums[1].item() / 8 + 0.5, 0), 1) - 0.5)))  # fmt: skip
