"""Class 6: something else leaves un-noised."""

import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from gsm import DPOptimizer, GradSampleModule, PrivacyEngine
from gsm.probe_buffers import DataInBuffers
from tests.attacks.tools import CE, FEATURES, data, mlp, step, training, watched

X, Y = data(8).tensors


class Running(nn.Module):
    """A layer with a buffer that is written to in every forward."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(FEATURES, 3), what
        self.register_buffer("held", torch.zeros(FEATURES))

    def forward(self, x):
        if self.what == "mean":
            self.held.lerp_(x.detach().mean(0), 0.1)
        elif self.what == "new tensor":
            self.held = x.detach().amax(0) if len(x) else self.held
        elif self.what == "counter":
            self.held.add_(1)
        elif self.what == "samples":
            self.held.add_(len(x))
        elif self.what == "noise":
            self.held.normal_()
        return self.layer(x + 0 * self.held)


def test_a_buffer_that_counts_samples_is_refused():
    """Guard: the other number of samples in ``probe_buffers.check_buffers``; a true batch size is private."""
    model, optimizer, loader = training(Running("samples"))
    with pytest.raises(DataInBuffers, match="held of Running follows the number of samples in a batch"):
        step(model, optimizer, X, Y)


def test_a_buffer_that_counts_samples_and_is_not_saved_is_fine():
    layer = Running("samples")
    layer._non_persistent_buffers_set.add("held")
    model, optimizer, loader = training(layer)
    step(model, optimizer, X, Y)


@pytest.mark.parametrize("what", ["mean", "new tensor"])
def test_a_buffer_that_follows_the_data_is_refused(what):
    """Guard: ``probe_buffers.check_buffers``; the buffer is in the state dict, and no noise covers it."""
    model = Running(what)
    with pytest.raises(DataInBuffers, match="buffer held of Running changes with the data"):
        GradSampleModule(model)(X)
    assert not model.held.any(), "the probe put back what it changed"


@pytest.mark.parametrize("what", ["counter", "noise", "nothing"])
def test_buffers_that_do_not_follow_the_data_are_fine(what):
    """The other side of the guard: counters, noise buffers, spectral norms."""
    model, optimizer, _ = watched(Running(what))
    step(model, optimizer, X, Y)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 3))
    GradSampleModule(normed)(X)


class Writing(nn.Module):
    """A layer with a parameter that its forward writes to."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(FEATURES, 3), what
        self.held = nn.Parameter(torch.full((7, FEATURES), 2.0), requires_grad=what == "first batch")
        self.register_buffer("ready", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            if self.what == "mean":
                self.held.lerp_(x.mean(0), 0.1)
            elif self.what == "data":
                self.held.data.mul_(0.9).add_(0.1 * x.mean(0))
            elif self.what == "first batch" and not self.ready:
                self.held.data.copy_(x.mean(0).expand(7, -1))
                self.ready.fill_(1)
            elif self.what == "copy":
                self.held[:3].lerp_(self.layer.weight, 0.1)
            elif self.what == "clamp":
                self.layer.weight.clamp_(-0.2, 0.2)
        return self.layer(x + 0 * self.held[0])


@pytest.mark.parametrize("what", ["mean", "data", "first batch"])
def test_a_parameter_that_the_forward_writes_data_to_is_refused(what):
    """Guard: ``probe_buffers._written``; such a parameter, frozen or not, leaves without noise."""
    with pytest.raises(DataInBuffers, match="writes to its parameter held what depends on the data"):
        GradSampleModule(Writing(what))(X)


@pytest.mark.parametrize("what", ["copy", "clamp", "nothing"])
def test_a_parameter_that_the_forward_writes_no_data_to_is_fine(what):
    model, optimizer, _ = watched(Writing(what))
    step(model, optimizer, X, Y)


class Remembering(nn.Module):
    """Adds to the state dict what is no tensor of the module."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what, self.calls, self.mean = nn.Linear(FEATURES, 3), what, 0, torch.zeros(FEATURES)

    def forward(self, x):
        self.calls += 1
        if self.what == "records":
            self.calls += len(x)
        if self.what == "mean":
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x)

    def get_extra_state(self):
        return {"calls": self.calls, "mean": self.mean}

    def set_extra_state(self, state):
        self.calls, self.mean = state["calls"], state["mean"]


def test_extra_state_that_follows_the_data_is_refused():
    """Guard: ``probe_buffers.ExtraStates``; it is in the state dict. Counters are fine, a probe leaves no trace."""
    for strict in (True, False):
        model = Remembering("calls")
        wrapped = GradSampleModule(nn.Sequential(model), strict=strict)
        for calls in (1, 2):
            wrapped(X)
            assert model.calls == calls
    for what in ("mean", "records"):
        with pytest.raises(DataInBuffers, match=r"get_extra_state\(\) of 0 .* changes with the data"):
            GradSampleModule(nn.Sequential(Remembering(what)))(X)
    GradSampleModule(Remembering("mean"), strict=False)(X)


def test_an_update_depends_on_the_expected_batch_size_only():
    """Right by construction: the true batch size is private under Poisson sampling."""
    for size in (2, 8):
        model, optimizer, watch = watched()
        step(model, optimizer, X[:size], Y[:size])
        released = torch.cat([p.grad.flatten() for p in optimizer.params]).double()
        torch.testing.assert_close(released, watch.sums[0] / 8)


def test_a_parameter_unfrozen_later_is_clipped_or_refused():
    """Guard: the capture is rebuilt when ``requires_grad`` changes; the optimizer reads its parameters anew."""
    plain = mlp()
    plain[0].requires_grad_(False)
    model, optimizer, watch = watched(plain)
    step(model, optimizer, X, Y)
    plain[0].requires_grad_(True)
    step(model, optimizer, X, Y)
    assert watch.sums[1].numel() > watch.sums[0].numel() and watch.sums[1].norm() <= 8.0


def test_a_frozen_parameter_with_a_grad_does_not_move():
    """Guard: ``pre_step`` drops what never went through clipping and noise."""
    model, optimizer, _ = watched(lr=1.0)
    weight = model._module[0].weight
    step(model, optimizer, X, Y)
    weight.requires_grad_(False)
    before = weight.detach().clone()
    optimizer.zero_grad()
    CE(model(X), Y).backward()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_a_grad_set_by_hand_is_overwritten_by_the_release():
    """Guard: ``add_noise`` assigns, it does not add."""
    model, optimizer, watch = watched()
    optimizer.zero_grad()
    CE(model(X), Y).backward()
    for p in optimizer.params:
        p.grad = torch.full_like(p, 1e6)
    optimizer.step()
    assert max(p.grad.abs().max() for p in optimizer.params) < 2


def test_no_ordinary_gradient_ever_exists_for_another_optimizer_to_use():
    """Guard: parameters get no gradient from autograd; the plain optimizer underneath moves nothing."""
    model, optimizer, _ = watched(lr=1.0)
    CE(model(X), Y).backward()
    before = [p.detach().clone() for p in optimizer.params]
    assert all(p.grad is None for p in optimizer.params)
    optimizer.original_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.params, strict=True))


def test_a_parameter_used_outside_of_the_model_is_an_error():
    """Guard: ``CapturePlan._caught``; a weight penalty in the loss would bypass clipping."""
    model, optimizer, _ = watched()
    with pytest.raises(RuntimeError, match="used outside the wrapped model"):
        (CE(model(X), Y) + model._module[0].weight.square().sum()).backward()


def test_parameters_added_later_are_captured_or_refused():
    """Guards: ``walk._changed`` at every batch, ``check_wrapped`` at every release with other parameters."""
    model, optimizer, watch = watched()
    step(model, optimizer, X, Y)
    model._module[2] = nn.Linear(4, 3)
    optimizer.add_param_group({"params": list(model._module[2].parameters())})
    step(model, optimizer, X, Y)
    assert watch.sums[1].numel() > watch.sums[0].numel() and watch.sums[1].norm() <= 8.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})  # the model does not have it
    CE(model(X), Y).backward()
    with pytest.raises(ValueError, match="Per sample gradient not found"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_saved_model_holds_no_gradient_of_single_records(mode):
    """Guard: ``GradSampleModule.__getstate__``; pickle takes the attributes of parameters along."""
    model, optimizer, _ = watched(mode=mode)
    step(model, optimizer, X, Y)
    held = pickle.loads(pickle.dumps(model))
    assert all(getattr(p, "grad_sample", None) is None for p in held.parameters())
    if mode == "hooks":
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        with pytest.raises(ValueError, match="wait for optimizer.step"):
            torch.save(model, io.BytesIO())


def test_a_saved_optimizer_holds_no_unfinished_sum():
    """Guard: ``__getstate__`` leaves the pending release out, ``save_checkpoint`` refuses it."""
    model, optimizer, _ = watched()
    CE(model(X), Y).backward()
    optimizer.virtual_step()
    assert not optimizer.__getstate__().keys() & {"_pending"}
    with pytest.raises(ValueError, match="middle of a logical batch"):
        PrivacyEngine().save_checkpoint(path=io.BytesIO(), module=model, optimizer=optimizer)


def test_the_unnoised_sum_is_gone_after_the_release():
    """Guard: ``_drop_sums`` before the noise."""
    model, optimizer, loader = training(watch=False)
    x, y = next(iter(loader))
    step(model, optimizer, x, y)
    assert all(p.summed_grad is None for p in optimizer.params) and not optimizer._pending.sums


def test_an_optimizer_made_before_the_model_moved_still_sees_its_parameters():
    """Guard: the capture follows a model that was converted; norms are of what the optimizer holds."""
    plain = mlp()
    inner = torch.optim.SGD(plain.parameters(), lr=0.0)
    plain.double()
    model = GradSampleModule(plain, mode="ghost")
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=8)
    step(model, optimizer, X.double(), Y)
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in optimizer.params)


def test_evaluation_mode_during_training_changes_nothing_about_the_release():
    """Right by construction: capture does not depend on ``model.training``."""
    sums = []
    for train in (True, False):
        torch.manual_seed(0)
        model, optimizer, watch = watched()
        model.train(train)
        step(model, optimizer, X, Y)
        sums.append(watch.sums[0])
    assert torch.equal(*sums)


class Late(nn.Module):
    """Keeps the largest value it has seen, but only from its third forward on (``what``: where, or what it counts)."""

    def __init__(self, what: str):
        super().__init__()
        self.l, self.what, self.forwards = nn.Linear(4, 2), what, 0
        self.register_buffer("seen", torch.zeros(()), persistent=what != "cache")
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += self.training
        if self.forwards > 20:  # the model is looked at a few times before its first batch
            if self.what == "replaced":
                self.seen = torch.maximum(self.seen, x.detach().abs().max())
            elif self.what == "frozen":
                with torch.no_grad():
                    self.frozen.copy_(x.abs().max())
            else:
                self.seen.copy_(x.detach().abs().max())
        return self.l(x)


LATE = {"buffer": "seen", "replaced": "seen", "frozen": "frozen", "cache": None}


@pytest.mark.parametrize("what, name", LATE.items(), ids=LATE)
def test_what_is_written_to_only_later_is_said_once(what, name):
    """Guard: ``Written``; what leaves with the state dict and was not looked at before the first batch."""
    model = GradSampleModule(Late(what))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            model(torch.randn(3, 4)).sum().backward()
            model.zero_grad()
    said = [str(w.message) for w in caught if "for the first time now" in str(w.message)]
    assert len(said) == (name is not None) and all(f"wrote to {name}" in text for text in said)
