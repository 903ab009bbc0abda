"""Class 7: numbers that are not numbers."""

import math

import pytest
import torch
from torch import nn

from accountants import GaussianAccountant, PLDAccountant, PRVAccountant, RDPAccountant
from gsm import GradSampleModule
from tests.attacks.tools import CE, clipped_sum, data, mlp, step, training, watched

X, Y = data(8, scale=20.0).tensors
ACCOUNTANTS = [GaussianAccountant, PLDAccountant, PRVAccountant, RDPAccountant]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_one_bad_sample_contributes_nothing_and_the_others_all(bad, mode):
    """Guard: a norm that is not finite has weight 0, and its rows leave the sum (0 * inf is NaN)."""
    x = X.clone()
    x[3, 0] = bad
    model, optimizer, watch = watched(nn.Linear(5, 3), mode=mode)
    step(model, optimizer, x, Y)
    rest = [i for i in range(8) if i != 3]
    found, others = watch.sums[0], clipped_sum(model._module, X[rest], Y[rest])
    if bad == 1e30:  # finite: clipped like any other, or left out where its square overflows
        assert (found - others).norm() <= 1.0 + 1e-5
    else:
        torch.testing.assert_close(found, others, rtol=1e-5, atol=1e-5)


def test_a_batch_of_bad_samples_releases_noise_only():
    """Guard: as above; the run goes on."""
    model, optimizer, watch = watched(nn.Linear(5, 3))
    step(model, optimizer, X * math.nan, Y)
    assert not watch.sums[0].any()


def test_norms_that_overflow_half_precision_are_finite():
    """Guard: norms in float32; 300 is fine in float16, its square is infinite."""
    model = GradSampleModule(nn.Linear(4, 2, bias=False).half(), mode="ghost", loss_reduction="sum")
    model(torch.full((3, 4), 300.0, dtype=torch.float16)).sum().backward()
    norms = model.per_sample_gradient_norms
    torch.testing.assert_close(norms, torch.full((3,), 300 * math.sqrt(8)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_noise_is_no_privacy_in_every_account(accountant):
    """Guard: sigma = 0 is infinity, not an exception or a small number."""
    made = accountant()
    made.step(noise_multiplier=0.0, sample_rate=0.1)
    assert made.get_epsilon(1e-5) == math.inf


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_nothing_released_costs_nothing(accountant):
    """Guard: empty histories, and steps that nobody took part in."""
    made = accountant()
    assert made.get_epsilon(1e-5) == 0.0
    made.step(noise_multiplier=1.0, sample_rate=0.0)
    assert made.get_epsilon(1e-5) == 0.0


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_settings_that_are_no_numbers_never_get_in(name, value):
    """Guard: checked where they are set, by a scheduler too."""
    _, optimizer, _ = watched()
    with pytest.raises(ValueError, match=name):
        setattr(optimizer, name, value)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_never_added_in_low_precision(secure):
    """Guard: ``check_dtypes``; rounding in bfloat16 would undo what the noise hides."""
    from gsm.noise import GaussianNoise
    from gsm.secure_noise import SecureNoise

    with pytest.raises(TypeError, match="float32 or better"):
        (SecureNoise() if secure else GaussianNoise()).add_([torch.zeros(3, dtype=torch.bfloat16)], 1.0, 1.0)


def test_secure_noise_lies_on_a_grid_that_the_data_do_not_choose():
    """Guard: both addends are rounded first (Mironov 2012: reachable floats give the sum away)."""
    from gsm.secure_noise import SecureNoise, grid_for

    grid = grid_for(1.0, 1.0, 4)
    for value in (0.1, 1 / 3, 7.77e-6):
        total = torch.full((4,), value, dtype=torch.float64)
        SecureNoise().add_([total], 1.0, 1.0)
        assert torch.equal(total / grid, (total / grid).round())


def test_a_resumed_run_draws_other_noise_from_the_same_seed(tmp_path):
    """Guard: ``refresh``; the same noise under two sums cancels in their difference."""
    from gsm import PrivacyEngine

    draws = []
    for resume in (False, True):
        engine, model = PrivacyEngine(), mlp()
        loader = torch.utils.data.DataLoader(data(), batch_size=8)
        model, optimizer, _ = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        if resume:
            engine.load_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
        else:
            engine.save_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
        total = torch.zeros(6)
        optimizer.noise.add_([total], 1.0, 1.0)
        draws.append(total)
    assert not torch.equal(*draws)


def test_another_noise_multiplier_after_a_resume_is_said_and_charged(tmp_path):
    """Guard: ``checkpoint._compare_settings``; each step stays charged with its own noise."""
    from gsm import PrivacyEngine

    made = {}
    for sigma in (1.0, 3.0):
        engine, model = PrivacyEngine(), mlp()
        loader = torch.utils.data.DataLoader(data(), batch_size=8)
        model, optimizer, loader = made[sigma] = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=sigma, max_grad_norm=1.0,
        )  # fmt: skip
        if sigma == 3.0:
            with pytest.warns(UserWarning, match="noise_multiplier was 1.0 and is now 3.0"):
                engine.load_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
        x, y = next(iter(loader))
        step(model, optimizer, x, y)
        engine.save_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
    assert engine.accountant.history == [(1.0, 0.2, 1), (3.0, 0.2, 1)]


def test_dropping_out_at_random_is_no_leak_and_no_nan():
    """Right by construction: random layers are captured as they ran."""
    model, optimizer, watch = watched(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)))
    step(model, optimizer, X, Y)
    assert watch.sums[0].isfinite().all() and 0 < watch.sums[0].norm() <= 8.0


def test_a_loss_of_nan_for_one_sample_only():
    """Guard: as for bad samples; the mean over the batch is NaN, the other gradients are not."""
    model, optimizer, watch = watched()
    losses = CE(model(X), Y, reduction="none") * torch.tensor([1.0] * 7 + [math.nan])
    optimizer.step(loss=losses)
    torch.testing.assert_close(watch.sums[0], clipped_sum(model._module, X[:7], Y[:7]), rtol=1e-5, atol=1e-5)


def test_training_goes_through_a_bad_record_with_noise():
    """All together: private training on data with a NaN in it ends with numbers."""
    records = data()
    records.tensors[0][5] = math.nan
    model, optimizer, loader = training(dataset=records, watch=False)
    for x, y in loader:
        step(model, optimizer, x, y)
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in optimizer.params)
