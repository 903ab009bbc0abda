"""A record contributes at most once and at most the bound, whatever was cut, interrupted or left over."""

import warnings

import pytest
import torch
from torch import nn

from accountants import RDPAccountant
from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.gsm.optimizer_tools import Spy, clipped_sum, deliver, gradients, parameters, private

BATCH = 6


def released(params):
    return [p.grad for p in params]


def assert_same(actual, expected, rtol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("cut", [[2, 4], [1, 1, 1, 1, 1, 1], [0, 6], [6, 0]])
@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("zero_between", [False, True])
def test_a_logical_batch_in_pieces_is_the_same_release(cut, signalled, zero_between):
    params, spy = parameters(), Spy()
    grads = gradients(params, BATCH)
    optimizer = private(params, expected_batch_size=BATCH)
    optimizer.accountant, optimizer.sample_rate = spy, 0.1
    for i, pieces in enumerate(zip(*(g.split(cut) for g in grads), strict=True)):
        last = i == len(cut) - 1
        if signalled:
            optimizer.signal_skip_step(not last)
        deliver(params, pieces)
        optimizer.step() if signalled or last else optimizer.virtual_step()
        if not last:
            assert spy.charges == [] and all((p == 0).all() for p in params)
            if zero_between or signalled:
                optimizer.zero_grad()
    assert_same(released(params), [total / BATCH for total in clipped_sum(grads)])
    assert spy.charges == [(0.0, 0.1)]


def test_two_releases_do_not_share_records():
    params = parameters()
    optimizer = private(params)
    for seed in (1, 2):
        optimizer.zero_grad()
        grads = gradients(params, BATCH, seed=seed)
        deliver(params, grads)
        optimizer.step()
        assert_same(released(params), clipped_sum(grads))


def test_after_virtual_steps_alone_step_releases_the_sum():
    params = parameters()
    optimizer = private(params)
    grads = gradients(params, BATCH)
    deliver(params, grads)
    optimizer.virtual_step()
    optimizer.step()
    assert_same(released(params), clipped_sum(grads))
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="No per-sample gradients"):
        optimizer.step()


def test_backward_passes_that_nothing_joined_add_their_bounds():
    """They may be two losses of the same records, so one record may be in both."""
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, max_grad_norm=2.0, noise=spy)
    optimizer.accountant, optimizer.sample_rate = spy, 0.3
    grads = [gradients(params, BATCH, seed=s) for s in range(4)]
    for g in grads:
        deliver(params, g)
    assert optimizer.accumulated_iterations == 4
    with pytest.warns(UserWarning, match="4 backward passes.*virtual_step"):
        optimizer.step()
    assert spy.sensitivities == [8.0] and spy.stds == [8.0] and spy.charges == [(1.0, 1.0)]
    expected = [sum(totals) / 4 for totals in zip(*(clipped_sum(g, 2.0) for g in grads), strict=True)]
    assert_same(released(params), expected)  # the mean over the batches, as in Opacus


def test_independent_samples_joined_by_virtual_step_add_their_bounds():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    optimizer.accountant, optimizer.sample_rate = spy, 0.1
    optimizer.independent_batches = True
    with pytest.warns(UserWarning, match="Poisson"):
        for step in (optimizer.virtual_step, optimizer.virtual_step, optimizer.step):
            deliver(params, gradients(params, BATCH))
            step()
    assert spy.sensitivities == [3.0] and spy.charges == [(1.0, pytest.approx(0.3))]


def test_parts_that_the_loader_announces_are_one_sample_even_then():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    optimizer.independent_batches = True
    for skip in (True, True, False):
        optimizer.signal_skip_step(skip)
        deliver(params, gradients(params, BATCH))
        optimizer.step()
        optimizer.zero_grad()
    assert spy.sensitivities == [1.0]


def test_announced_parts_that_go_through_virtual_step_are_one_sample():
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    optimizer.independent_batches = True
    for skip, step in ((True, optimizer.virtual_step), (True, optimizer.virtual_step), (False, optimizer.step)):
        optimizer.signal_skip_step(skip)
        deliver(params, gradients(params, BATCH))
        step()
    assert spy.sensitivities == [1.0]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((4, 4), None),
        ((4, 4, 4), "3 parts of 12 records"),  # cut from fixed batches of 8
        ((4, 4, 3), None),  # a Poisson sample of 8 may have 11
        ((10, 10, 11), None),
        ((20, 10), None),
        ((30, 12), "2 parts of 42 records"),  # but hardly 42
        ((41,), None),  # nothing was joined
    ],
)
def test_parts_left_over_by_an_epoch_are_said(sizes, said):
    params = parameters()
    optimizer = private(params, expected_batch_size=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in sizes[:-1]:
            deliver(params, gradients(params, size))
            optimizer.virtual_step()
        deliver(params, gradients(params, sizes[-1]))
        optimizer.step()
        deliver(params, gradients(params, 41))
        optimizer.zero_grad()
        deliver(params, gradients(params, 41))
        optimizer.virtual_step()
        optimizer.step()  # nothing was joined
    messages = [str(w.message) for w in caught]
    assert len(messages) == (said is not None)
    assert (not messages) if said is None else (said in messages[0] and "discard_pending" in messages[0])


def test_batches_larger_than_promised_are_said():
    """At once where it cannot be chance, or after some steps; fixed batches of that size and Poisson samples never."""
    draw = torch.Generator().manual_seed(0)
    for sizes, steps in (
        ([40] * 3, 1),
        ([10] * 600, 387),
        ([8] * 600, None),
        (torch.binomial(torch.full((600,), 890.0), torch.tensor(0.01), generator=draw).int().tolist(), None),
    ):
        params = parameters([(2,)])
        optimizer = private(params, expected_batch_size=8)
        optimizer.accountant, optimizer.sample_rate = RDPAccountant(), 0.01
        said = None
        for n, size in enumerate(sizes, 1):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                deliver(params, gradients(params, size))
                optimizer.step()
                optimizer.zero_grad()
            if caught and said is None:
                assert f"{n} release(s) held {n * size} records" in str(caught[0].message)
                said = n
        assert said == steps, (said, steps)


def test_parts_that_a_loader_announces_are_its_own_affair(recwarn):
    params = parameters()
    optimizer = private(params, expected_batch_size=8)
    for skip in (True, True, False):
        optimizer.signal_skip_step(skip)
        deliver(params, gradients(params, 8))
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.releases == 1 and not recwarn.list


def test_sums_have_no_expected_number_of_records(recwarn):
    params = parameters()
    optimizer = private(params, expected_batch_size=8, loss_reduction="sum")
    for take in (optimizer.virtual_step, optimizer.virtual_step, optimizer.step):
        deliver(params, gradients(params, 40))
        take()
    assert not recwarn.list


def test_loading_a_state_forgets_the_logical_batch_under_way():
    params = parameters()
    optimizer = private(params)
    state = optimizer.state_dict()
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    optimizer.load_state_dict(state)
    assert optimizer._pending.samples == 0 and all(p.summed_grad is None for p in params)


def test_an_exception_between_backward_and_step_leaves_nothing_behind():
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH, seed=1))  # ... and the loop dies here
    optimizer.zero_grad()
    fresh = gradients(params, BATCH, seed=2)
    deliver(params, fresh)
    optimizer.step()
    assert_same(released(params), clipped_sum(fresh))


@pytest.mark.parametrize("broken", ["accountant", "noise", "hook", "inner"])
def test_whatever_fails_inside_a_release_its_records_are_not_released_again(broken, monkeypatch):
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=Spy())
    optimizer.accountant, optimizer.sample_rate = spy, 0.1

    def fail(*args, **kwargs):
        raise OSError("disk full")

    owner, name = {
        "accountant": (spy, "step"),
        "noise": (optimizer.noise, "add_"),
        "hook": (optimizer, "step_hooks"),
        "inner": (optimizer.original_optimizer, "step"),
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, [fail] if broken == "hook" else fail)
        deliver(params, gradients(params, BATCH, seed=1))
        with pytest.raises(OSError):
            optimizer.step()
    assert len(spy.charges) == (broken != "accountant")  # never released without a charge
    optimizer.zero_grad()
    fresh = gradients(params, BATCH, seed=2)
    deliver(params, fresh)
    optimizer.step()
    assert_same(released(params), clipped_sum(fresh))


def test_clipping_that_fails_half_way_adds_nothing(monkeypatch):
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    monkeypatch.setattr(type(optimizer.clipping), "weights", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.virtual_step()
    assert optimizer._pending.samples == 0


def test_an_abandoned_logical_batch_can_be_forgotten():
    params = parameters()
    optimizer = private(params)
    for _ in range(3):
        optimizer.signal_skip_step(True)
    deliver(params, gradients(params, BATCH, seed=1))
    optimizer.step()
    optimizer.discard_pending()
    assert all(p.summed_grad is None for p in params)
    fresh = gradients(params, BATCH, seed=2)
    deliver(params, fresh)
    optimizer.step()
    assert_same(released(params), clipped_sum(fresh))


@pytest.mark.parametrize("between", ["step", "skipped step"])
def test_a_forgotten_zero_grad_is_an_error(between):
    params = parameters()
    optimizer = private(params)
    optimizer.signal_skip_step(between == "skipped step")
    for step in (1, 2):
        deliver(params, gradients(params, BATCH))
        if step == 1:
            optimizer.step()
    with pytest.raises(ValueError, match="call optimizer.zero_grad"):
        optimizer.step()


def test_a_forgotten_zero_grad_is_noticed_without_grad_samples_too():
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    optimizer.step()
    for p in params:  # a mode that keeps nothing on the parameters
        p.grad_sample = None
    deliver(params, gradients(params, BATCH))
    with pytest.raises(ValueError, match="call optimizer.zero_grad"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_the_models_own_zero_grad_counts(set_to_none):
    model = nn.ParameterList(parameters())
    params = list(model)
    for p in params:
        p.grad_sample = None
    optimizer = private(params)
    for seed in (1, 2):
        grads = gradients(params, BATCH, seed=seed)
        deliver(params, grads)
        optimizer.step()
        for p in params:
            p.grad_sample = None  # as a wrapper's zero_grad does
        model.zero_grad(set_to_none=set_to_none)
    assert_same(
        released(params) if set_to_none is False else [], [torch.zeros_like(p) for p in params][: 3 * (not set_to_none)]
    )


def test_no_backward_before_step_is_an_error():
    optimizer = private(parameters())
    for step in (optimizer.step, optimizer.virtual_step):
        with pytest.raises(ValueError, match="forward of the wrapped model"):
            step()
    with pytest.raises(ValueError, match="No per-sample gradients"):
        _ = optimizer.accumulated_iterations


def test_two_backwards_after_a_virtual_step_are_one_more_part_and_one_more_sample():
    """Only the first of them was announced as a part of the sample under way."""
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    for seed in (1, 2):
        deliver(params, gradients(params, BATCH, seed=seed))
    with pytest.warns(UserWarning, match="2 backward passes"):
        optimizer.step()
    assert spy.sensitivities == [2.0]


def test_a_sum_that_fails_half_way_has_used_its_gradients(monkeypatch):
    """Some of them are in the sum: they must not get into it once more."""
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer._pending), "add", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.virtual_step()
    with pytest.raises(ValueError, match="still there"):
        optimizer.virtual_step()


def test_a_release_that_failed_is_not_made_up_for_by_the_next_step():
    params = parameters()
    optimizer = private(params, noise_multiplier=1.0)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    optimizer.noise.add_ = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    with pytest.raises(ValueError, match="No per-sample gradients"):
        optimizer.step()


def test_a_loss_that_does_not_fit_leaves_nothing_behind():
    model = GradSampleModule(nn.Linear(3, 1), mode="ghost")
    params = list(model.parameters())
    optimizer = private(params, expected_batch_size=4)
    out = model(torch.randn(4, 3))
    with pytest.raises(ValueError, match="loss= has 3 entries but the model saw 4 samples"):
        optimizer.virtual_step(loss=out[:3, 0])
    assert collect(params) == []
    with pytest.raises(ValueError, match="No per-sample gradients"):
        optimizer.step()


def test_a_loss_of_a_model_that_nothing_captures_is_no_batch():
    optimizer = private(parameters())
    stranger = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="No per-sample gradients"):
        optimizer.step(loss=stranger(torch.randn(4, 3))[:, 0])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_vector_of_losses_is_reduced_as_the_wrapper_expects(mode, reduction):
    """Else every gradient would be off by the batch size before it is clipped."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    model = GradSampleModule(nn.Linear(3, 1).double(), mode=mode, loss_reduction=reduction)
    params = list(model.parameters())
    optimizer = private(params, expected_batch_size=1, max_grad_norm=100.0, loss_reduction=reduction)
    optimizer.step(loss=model(x)[:, 0])
    assert_same(released(params), [x.sum(0)[None], torch.tensor([4.0], dtype=torch.float64)])


def test_batches_that_are_not_independent_are_not_called_overlapping():
    """Only the loader's own drawing makes them so; two losses in one part of a logical batch do not."""
    params = parameters()
    optimizer = private(params, expected_batch_size=3 * BATCH)
    for seed in (1, 2):
        deliver(params, gradients(params, BATCH, seed=seed))
    with pytest.warns(UserWarning, match="2 backward passes before one step"):
        optimizer.virtual_step()
    deliver(params, gradients(params, BATCH, seed=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_released_gradient_that_somebody_keeps_is_not_a_forgotten_zero_grad():
    model = GradSampleModule(nn.Linear(3, 1), mode="ghost")
    optimizer = private(list(model.parameters()))
    kept = []
    for _ in range(2):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        kept.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert optimizer.releases == 2 and all(g is not None for g in kept[0])


def test_a_finished_release_still_says_how_many_backward_passes_it_had():
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, BATCH))
    optimizer.virtual_step()
    deliver(params, gradients(params, BATCH, seed=1))
    optimizer.step()
    for p in params:
        p.grad_sample = None
    assert optimizer.accumulated_iterations == 1


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_no_release_is_charged_at_a_rate_that_is_no_probability(rate):
    params, spy = parameters(), Spy()
    optimizer = private(params, noise_multiplier=1.0, noise=spy)
    optimizer.accountant, optimizer.sample_rate = spy, rate
    deliver(params, gradients(params, BATCH))
    with pytest.raises(ValueError, match=r"sample_rate must lie in \[0, 1\]"):
        optimizer.step()
    assert spy.charges == spy.stds == []
