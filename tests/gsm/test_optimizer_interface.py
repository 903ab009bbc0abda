"""The private optimizer behaves as a torch.optim optimizer and as Opacus's."""

import copy
import io
import pickle

import opacus.optimizers
import pytest
import torch
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from opacus.schedulers import ExponentialGradClip, LambdaNoise, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from gsm.optimizer import DPOptimizer
from gsm.sampling import PoissonSampler
from tests.gsm.optimizer_tools import Spy, clipped_sum, deliver, gradients, parameters, private

BATCH = 5


def release(optimizer, params, seed=0):
    optimizer.zero_grad()
    deliver(params, gradients(params, BATCH, seed=seed))
    optimizer.step()


def test_it_is_an_opacus_and_a_torch_optimizer():
    optimizer = private(parameters())
    assert isinstance(optimizer, OpacusDPOptimizer) and isinstance(optimizer, torch.optim.Optimizer)


def test_groups_state_and_defaults_are_the_wrapped_optimizers():
    params = parameters()
    inner = torch.optim.Adam([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
    assert optimizer.original_optimizer is inner
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults and [p is q for p, q in zip(optimizer.params, params, strict=True)]
    release(optimizer, params)
    assert set(optimizer.state) == set(params)
    optimizer.param_groups[0]["lr"] = 0.0
    before = params[0].clone()
    release(optimizer, params)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, lr=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
        lambda ps: torch.optim.RMSprop(ps, lr=0.1),
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
        lambda ps: torch.optim.NAdam(ps, lr=0.1),
    ],
)
def test_any_optimizer_sees_exactly_the_clipped_mean(make):
    params, twins = parameters(), parameters()
    optimizer = DPOptimizer(make(params), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=BATCH)
    plain = make(twins)
    for seed in range(3):
        release(optimizer, params, seed)
        for p, total in zip(twins, clipped_sum(gradients(twins, BATCH, seed=seed)), strict=True):
            p.grad = total / BATCH
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_update_is_opacuss_own_up_to_its_slack():
    params, twins = parameters(), parameters()
    ours, theirs = (
        private(params, max_grad_norm=0.5),
        OpacusDPOptimizer(
            torch.optim.SGD(twins, lr=1.0), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=1
        ),
    )
    for optimizer, ps in ((ours, params), (theirs, twins)):
        release(optimizer, ps)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=0)


# -- schedulers --------------------------------------------------------------------------------------------------------


def test_opacus_schedulers_act_at_the_next_release():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=2.0, max_grad_norm=1.0, noise=spy)
    schedulers = [StepNoise(optimizer, step_size=1, gamma=0.5), ExponentialGradClip(optimizer, gamma=3.0)]
    for _ in range(3):
        release(optimizer, params)
        for scheduler in schedulers:
            scheduler.step()
    assert spy.sensitivities == [1.0, 3.0, 9.0]
    assert spy.stds == [2.0, 1.0 * 3.0, 0.5 * 9.0]
    LambdaNoise(optimizer, noise_lambda=lambda epoch: 10.0)
    assert optimizer.noise_multiplier == 2.5


@pytest.mark.filterwarnings("error")
def test_learning_rate_schedulers_of_torch_work_and_survive_copies():
    params = parameters()
    optimizer = private(params, lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    release(optimizer, params)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    OneCycleLR(private(parameters()), max_lr=0.1, total_steps=10)
    assert pickle.loads(pickle.dumps(optimizer)).noise_multiplier == 0.0


# -- hooks and accounting ----------------------------------------------------------------------------------------------


def test_step_hooks_add_up_and_never_detach_the_accountant():
    params, spy, calls = parameters(), Spy(), []
    optimizer = private(params, noise_multiplier=1.0)
    optimizer.accountant, optimizer.sample_rate = spy, 0.25
    assert optimizer.step_hook is None
    optimizer.attach_step_hook(lambda o: calls.append(("first", o.accumulated_iterations)))
    optimizer.attach_step_hook(lambda o: calls.append(("second", o is optimizer)))
    optimizer.signal_skip_step(True)
    release(optimizer, params)
    assert calls == spy.charges == []
    release(optimizer, params)
    assert calls == [("first", 1), ("second", True)] and spy.charges == [(1.0, 0.25)]
    assert optimizer.step_hook is optimizer.step_hooks[-1]


def test_the_accountant_is_charged_before_the_parameters_move():
    params = parameters()
    optimizer = private(params)

    class Witness:
        def step(self, *, noise_multiplier, sample_rate):
            self.moved = any((p != 0).any() for p in params)
            self.noisy = any(p.grad is not None for p in params)

    optimizer.accountant, optimizer.sample_rate = Witness(), 0.1
    release(optimizer, params)
    assert not optimizer.accountant.moved and not optimizer.accountant.noisy
    assert any((p != 0).any() for p in params)


def test_opacuss_accountants_own_hook_charges_the_same():
    from opacus.accountants import RDPAccountant

    params, accountant = parameters(), RDPAccountant()
    optimizer = private(params, noise_multiplier=1.0)
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    for _ in range(3):
        release(optimizer, params)
    assert accountant.history == [(1.0, 0.1, 3)]


def test_an_accountant_without_a_rate_is_an_error_before_anything_leaves():
    params = parameters()
    optimizer = private(params)
    optimizer.accountant = Spy()
    with pytest.raises(ValueError, match="optimizer.sample_rate is not"):
        release(optimizer, params)
    assert all((p == 0).all() for p in params)


def test_torchs_step_hooks_run_around_every_update_and_no_skipped_step():
    params, calls = parameters(), []
    optimizer = private(params)
    pre = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: calls.append(
            ("pre", o is optimizer, params[0].grad is not None, bool((params[0] == 0).all()))
        )
    )
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", bool((params[0] == 0).all()))))
    optimizer.signal_skip_step(True)
    release(optimizer, params)
    assert calls == []
    release(optimizer, params)
    assert calls == [("pre", True, True, True), ("post", False)]
    pre.remove()
    release(optimizer, params)
    assert len(calls) == 3
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, kwargs))
    with pytest.raises(RuntimeError, match="cannot replace"):
        release(optimizer, params)


def test_a_step_hook_is_a_function():
    with pytest.raises(TypeError, match="function of the optimizer"):
        private(parameters()).attach_step_hook(3)


# -- Opacus's batch memory manager -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_opacuss_batch_memory_manager_gives_the_same_update():
    from opacus.grad_sample import GradSampleModule

    weights = []
    for physical in (8, 3):
        torch.manual_seed(0)
        model = GradSampleModule(nn.Linear(4, 2).double())
        spy = Spy()
        optimizer = private(list(model.parameters()), expected_batch_size=8)
        optimizer.accountant, optimizer.sample_rate = spy, 0.5
        loader = DataLoader(TensorDataset(torch.randn(16, 4).double()), batch_size=8)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as pieces:
            for (x,) in pieces:
                assert len(x) <= physical
                optimizer.zero_grad()
                model(x).square().sum(1).mean().backward()
                optimizer.step()
        assert len(spy.charges) == 2
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# -- state, pickle, deepcopy -------------------------------------------------------------------------------------------


def trained(**options):
    params = parameters()
    optimizer = DPOptimizer(
        torch.optim.Adam(params, lr=0.1), noise_multiplier=1.0, max_grad_norm=2.0, expected_batch_size=4, **options
    )
    release(optimizer, params)
    return params, optimizer


def test_state_dict_goes_through_weights_only_loading_and_comes_back():
    _, optimizer = trained()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = trained()[1]
    other.max_grad_norm = 9.0
    other.load_state_dict(state)
    assert other.max_grad_norm == 2.0
    for p, q in zip(optimizer.params, other.params, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_state_dicts_go_both_ways_between_us_opacus_and_torch():
    _, optimizer = trained()
    plain = torch.optim.Adam(parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    theirs = OpacusDPOptimizer(
        torch.optim.Adam(parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    theirs.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(theirs.state_dict())


def test_a_resumed_run_does_not_repeat_its_noise():
    def run(state=None):
        params = parameters()
        optimizer = private(params, noise_multiplier=1.0, generator=torch.Generator().manual_seed(0))
        if state is not None:
            optimizer.load_state_dict(state)
        release(optimizer, params)
        return params[0].grad, optimizer.state_dict()

    first, state = run()
    assert torch.equal(first, run()[0])
    assert not (run(state)[0] == first).any() and not (run(state)[0] == run(state)[0]).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_work_and_carry_no_unfinished_batch(copied):
    params, optimizer = trained(clipping="adaptive", generator=torch.Generator().manual_seed(0))
    optimizer.sampler = PoissonSampler(num_samples=10, sample_rate=0.1)
    optimizer.zero_grad()
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    other = copied(optimizer)
    assert other.sampler is None and optimizer.sampler is not None and other.journal is None
    optimizer.sampler = None
    assert other._pending.samples == 0 and optimizer._pending.samples == 1
    assert other.max_grad_norm == optimizer.max_grad_norm and other.clipping is not optimizer.clipping
    own = other.params
    assert all(p is not q and torch.equal(p, q) for p, q in zip(own, params, strict=True))
    for p in own:
        p.grad_sample = None
    optimizer.discard_pending()
    for o, ps in ((optimizer, params), (other, own)):
        release(o, ps)
    assert not any((p.grad == q.grad).any() for p, q in zip(params, own, strict=True))  # not the same noise twice


def test_repr_shows_the_privacy_settings_and_the_wrapped_optimizer():
    text = repr(trained()[1])
    assert "noise_multiplier=1" in text and "FlatClipping(max_grad_norm=2)" in text and "Adam" in text


def test_grad_samples_are_readable_until_zero_grad():
    params = parameters()
    optimizer = private(params)
    grads = gradients(params, BATCH)
    deliver(params, grads)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.grad_samples, grads, strict=True))
    optimizer.zero_grad()
    assert all(p.grad_sample is None and p.grad is None for p in params)
    optimizer.zero_grad(set_to_none=False)


def test_new_parameters_join_between_logical_batches_only():
    params, extra = parameters(), parameters([(2,)])
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    with pytest.raises(ValueError, match="middle of a logical batch"):
        optimizer.add_param_group({"params": extra})
    optimizer.discard_pending()
    optimizer.add_param_group({"params": extra})
    release(optimizer, [*params, *extra])
    assert (extra[0] != 0).all()


def test_opacus_has_no_public_method_that_we_lack():
    public = {name for name in dir(opacus.optimizers.DPOptimizer) if not name.startswith("_")}
    assert public <= set(dir(private(parameters())))


def test_no_logical_batch_is_under_way_right_after_a_release():
    """Without noise too, where the sum itself stays readable."""
    params = parameters()
    optimizer = private(params)
    release(optimizer, params)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 2
