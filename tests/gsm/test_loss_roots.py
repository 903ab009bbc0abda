"""Backwards are looked at while somebody waits for one, and PyTorch is as it was afterwards."""

import gc
import warnings

import pytest
import torch
from torch import nn

from gsm import GradSampleModule, loss_roots
from gsm.window import window

ORDINARY = torch.autograd.backward


class Token:
    pass


@pytest.fixture(autouse=True)
def nobody_waits():
    gc.collect()
    yield
    gc.collect()
    torch.ones(1, requires_grad=True).sum().backward()
    assert torch.autograd.backward is ORDINARY


def test_roots_and_gradients_are_handed_over():
    seen = []
    token = Token()
    loss_roots.wait(token, lambda roots, grads, again: seen.append((roots, grads, again)))
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.backward(torch.ones(2), retain_graph=True)
    torch.autograd.backward([y.sum(), y.prod()], inputs=x)
    y = (x * 3).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cycle that this makes, once per process
        y.backward(create_graph=True)
    (roots, _, made), (given, nothing, _) = [[s[k] for s in seen] for k in (0, 1)]
    assert [again for *_, again in seen] == [True, False, True]
    assert len(roots) == len(given) == 1 and torch.equal(given[0], torch.ones(2))
    assert nothing == [None, None] and made[0] is y
    assert torch.equal(x.grad, torch.tensor([2 + 2 + 4 + 3.0] * 2))
    loss_roots.done(token)


def test_an_error_of_the_judge_stops_the_backward():
    def judge(roots, grads, again):
        raise ValueError("no")

    token, x = Token(), torch.ones(2, requires_grad=True)
    loss_roots.wait(token, judge)
    with pytest.raises(ValueError, match="no"):
        x.sum().backward()
    assert x.grad is None
    loss_roots.done(token)


def test_one_judge_is_asked_once_for_all_who_wait():
    seen = []

    def judge(roots, grads, again):
        seen.append(roots)

    tokens = [Token(), Token()]
    for token in tokens:
        loss_roots.wait(token, judge)
    torch.ones(1, requires_grad=True).sum().backward()
    assert len(seen) == 1
    for token in tokens:
        loss_roots.done(token)


def test_who_does_not_live_waits_no_longer():
    token = Token()
    loss_roots.wait(token, lambda *_: pytest.fail("asked for a token that is gone"))
    assert torch.autograd.backward is not ORDINARY
    del token
    gc.collect()
    torch.ones(1, requires_grad=True).sum().backward()
    assert torch.autograd.backward is ORDINARY


def test_who_replaced_it_in_the_meantime_is_left_in_place():
    token = Token()
    loss_roots.wait(token, lambda *_: None)
    ours, calls = torch.autograd.backward, []

    def theirs(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    torch.autograd.backward = theirs
    loss_roots.done(token)
    torch.ones(1, requires_grad=True).sum().backward()
    assert torch.autograd.backward is theirs and len(calls) == 1
    torch.autograd.backward = ORDINARY


def test_a_training_leaves_pytorch_as_it_was():
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        assert torch.autograd.backward is ORDINARY
    model(torch.randn(4, 3))  # an output that nobody uses
    gc.collect()


def test_what_is_said_points_at_the_line_of_the_backward():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    for loss in (
        lambda z, y: (z * nn.Parameter(torch.ones(()))).mean(),
        lambda z, y: ((z[:, 0] - y + y.mean()) ** 2).mean(),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for size in (5, 4, 3, 5):
                x, y = torch.randn(size, 6), torch.randn(size)
                loss(model(x), y).backward()
                model.set_grad_sample_to_none()
        assert [w.filename for w in said] == [__file__]


def test_a_step_that_is_compiled_as_a_whole_does_not_trace_who_looks():
    """The tracer would warn of what it cannot follow, and take seconds for the rest."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    torch._dynamo.reset()
    window().pause()
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    asked, told = [], []
    token = Token()
    loss_roots.wait(token, lambda *_: asked.append(torch.compiler.is_compiling() or told.append(1)))

    @torch.compile(backend="eager")
    def step(x):
        model(x).square().mean().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for usual in ("What calls the wrapped model is compiled", "The .grad attribute of a Tensor that is not a leaf"):
            warnings.filterwarnings("ignore", message=usual)
        for _ in range(3):
            step(torch.randn(5, 6))
            assert not _get_current_dispatch_mode_stack()
            model.set_grad_sample_to_none()
            model.zero_grad(set_to_none=True)
    assert asked == [None] * 3 and told == [1] * 3
    loss_roots.done(token)
