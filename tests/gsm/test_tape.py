"""What counts as one batch: forwards in flight together, unless a new batch was drawn in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gsm.ledger import collect, discard, tape_of
from gsm.loader import DPDataLoader
from gsm.wrapper import GradSampleModule
from tests.compare import MODES, captured
from tests.loop import assert_close_per_sample


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_batches_drawn_apart_stay_apart_even_in_one_backward(mode: str) -> None:
    """Added per record they would let one record change the clipped sum by twice the bound."""
    model = GradSampleModule(nn.Linear(3, 2), mode=mode)
    loader = DPDataLoader(TensorDataset(torch.randn(4, 3)), sample_rate=1.0, steps=2)
    loss = sum(model(x).sum() for (x,) in loader)
    loss.backward()
    assert [b.batch_size for b in collect(list(model.parameters()))] == [4, 4]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_two_looks_at_one_batch_are_one_batch(mode: str) -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode=mode)
    loader = DPDataLoader(TensorDataset(torch.randn(4, 3)), sample_rate=1.0, steps=1)
    for (x,) in loader:
        (model(x) - model(x.flip(1))).square().sum().backward()
    assert [b.batch_size for b in collect(list(model.parameters()))] == [4]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_backwards_one_after_the_other_are_batches_of_their_own(mode: str) -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode=mode)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
    assert len(collect(list(model.parameters()))) == 3
    model.zero_grad()
    assert collect(list(model.parameters())) == []


def test_zero_grad_between_forward_and_backward_keeps_the_forward() -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    model(torch.randn(4, 3)).sum().backward()
    loss = model(torch.randn(5, 3)).sum()
    model.zero_grad()
    loss.backward()
    assert [b.batch_size for b in collect(list(model.parameters()))] == [5]


def test_a_wrapped_model_is_freed() -> None:
    model = GradSampleModule(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), mode="ghost")
    model(torch.randn(4, 3)).sum().backward()
    gone = weakref.ref(model)
    weight = weakref.ref(model._module[0])
    del model
    gc.collect()
    assert gone() is None and weight() is None


def test_the_raw_model_keeps_its_capture_alive() -> None:
    inner = nn.Linear(3, 2)
    GradSampleModule(inner, mode="ghost")
    gc.collect()
    inner(torch.randn(4, 3)).sum().backward()
    assert [b.batch_size for b in collect(list(inner.parameters()))] == [4]


def test_norms_before_any_backward_are_an_error() -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    with pytest.raises(RuntimeError, match="run a forward and a backward first"):
        model.per_sample_gradient_norms  # noqa: B018


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_forwards_of_different_sizes_are_batches_of_their_own(mode: str) -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode=mode)
    (model(torch.randn(4, 3)).sum() + model(torch.randn(5, 3)).sum()).backward()
    assert sorted(b.batch_size for b in collect(list(model.parameters()))) == [4, 5]


def test_rows_are_compared_with_the_records_of_their_own_batch() -> None:
    """A batch with too many rows is forgotten as soon as the next one is right."""
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    loader = DPDataLoader(TensorDataset(torch.randn(4, 3)), sample_rate=1.0, steps=2)
    seen = []
    for k, (x,) in enumerate(loader):
        model(x.repeat(3 - 2 * k, 1)).sum().backward()
        model.zero_grad()
        seen.append(model._tape.more_rows)
    assert seen == [(12, 4), None]


def test_a_loop_that_holds_batches_back_is_silent() -> None:
    """What fetches ahead: the batch at hand is smaller or larger than the one drawn last."""
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    generator = torch.Generator().manual_seed(1)
    loader = DPDataLoader(TensorDataset(torch.randn(40, 3)), sample_rate=0.5, generator=generator)
    for ahead in (1, 2):
        waiting: list[torch.Tensor] = []
        for _ in range(5):
            for (x,) in loader:
                waiting.append(x)
                if len(waiting) > ahead:
                    model(waiting.pop(0)).sum().backward()
                    model.zero_grad()
                    assert model._tape.more_rows is None


def test_a_second_backward_through_the_same_forward_is_a_batch_again() -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    loss = model(torch.randn(4, 3)).sum()
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert [b.batch_size for b in collect(list(model.parameters()))] == [4]


def test_batches_of_which_no_drawing_is_known_have_no_further_rows() -> None:
    """Another loader's batches: there is nothing to compare their rows with."""
    model = GradSampleModule(nn.Linear(3, 2))
    model(torch.randn(4, 3)).sum().backward()
    tape = tape_of(model.weight)
    assert tape is not None and tape.more_rows is None


def test_two_models_of_one_optimizer_keep_their_own_gradients() -> None:
    """Taken for one model's, the other's would be left out of the sum without a word."""
    one, two = (GradSampleModule(nn.Linear(3, 2), mode="ghost") for _ in range(2))
    x = torch.randn(4, 3)
    (one(x).sum() + two(2 * x).sum()).backward()
    (batch,) = collect([*one.parameters(), *two.parameters()])
    sums = batch.weighted_sum(torch.ones(4))
    for actual, rows in zip(sums[::2], (x, 2 * x), strict=True):
        torch.testing.assert_close(actual, 4 * rows.sum(0).expand(2, 3))  # a mean of 4: each gradient counts 4 times


def test_two_optimizers_of_one_model_take_each_their_own() -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    model(torch.randn(4, 3)).sum().backward()
    discard([model.weight])
    assert collect([model.weight]) == [] and len(collect([model.bias])) == 1


def test_two_looks_at_one_batch_stay_one_batch_if_something_is_forgotten_in_between() -> None:
    model = GradSampleModule(nn.Linear(3, 2), mode="ghost")
    params, x = list(model.parameters()), torch.randn(4, 3)
    first = model(x)
    discard(params)
    (first - model(x.flip(1))).square().sum().backward()
    assert [b.batch_size for b in collect(params)] == [4]


def adversarial(model: nn.Module, x: Tensor) -> Tensor:
    """One step of projected gradient ascent on the input, then the loss there."""
    delta = torch.zeros_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(model(x + delta).square().mean(1).mean(), delta)
    return model(x + 0.1 * g.sign()).square().mean(1).mean()


def adversarial_backward(model: nn.Module, x: Tensor) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    model(x + delta).square().mean(1).mean().backward(inputs=[delta])
    return model(x + 0.1 * delta.grad.sign()).square().mean(1).mean()


def saliency(model: nn.Module, x: Tensor) -> Tensor:
    """The same forward's graph, twice."""
    x = x.clone().requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    return (out.square().mean(1) * g.norm(dim=1)).mean()


def implicit(model: nn.Module, x: Tensor) -> Tensor:
    """A fixed point whose backward solves a linear system by products with the layer's Jacobian (deep equilibrium)."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(40):
            z = model(z) * 0.3 + x
    z = model(z) * 0.3 + x
    z0 = z.detach().requires_grad_()
    f0 = model(z0) * 0.3 + x

    def solve(g: Tensor) -> Tensor:
        y = g
        for _ in range(40):
            y = torch.autograd.grad(f0, z0, y, retain_graph=True)[0] + g
        return y

    z.register_hook(solve)
    return z.square().mean(1).mean()


INPUTS_ALONE = [adversarial, adversarial_backward, saliency, implicit]


@pytest.mark.parametrize("loss", INPUTS_ALONE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_a_backward_for_inputs_alone_leaves_nothing(mode: str, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """What it brought to the layers was taken for a share of the loss's gradient, without a word."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 3).double()
    params = dict(plain.named_parameters())
    rows = [torch.autograd.grad(loss(plain, row[None]), list(params.values())) for row in x]
    expected = {n: torch.stack([r[k] for r in rows]) for k, n in enumerate(params)}
    model = GradSampleModule(plain, mode=mode)
    for _ in range(2):
        loss(model, x).backward()
        assert_close_per_sample(captured(plain), expected, 1e-8)
        model.zero_grad()


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_a_loss_may_hold_derivatives_of_the_output_where_the_message_says_so(mode: str) -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double(), torch.randn(4, 3).double()

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (out.squeeze(1) + (g.norm(dim=1) - 1).square()).mean()

    params = dict(plain.named_parameters())
    rows = [torch.autograd.grad(penalised(plain, r[None]), list(params.values()), allow_unused=True) for r in x]
    zero = {n: torch.zeros_like(p) for n, p in params.items()}
    expected = {n: torch.stack([zero[n] if r[k] is None else r[k] for r in rows]) for k, n in enumerate(params)}
    penalised(GradSampleModule(plain, mode=mode), x).backward()
    assert_close_per_sample(captured(plain), expected, 1e-8)
