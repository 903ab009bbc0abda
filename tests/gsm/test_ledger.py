"""What lies on the parameters is one batch after the other, or an error."""

import weakref

import pytest
import torch
from torch import nn

from gsm.contributions import Paired
from gsm.ledger import Joint, Materialised, collect, discard, in_memory_order, norm, stack_rows, weighted
from gsm.wrapper import GradSampleModule


def held(*entries):
    """A parameter with per-sample gradients of these batch sizes, as Opacus's wrapper leaves them."""
    p = nn.Parameter(torch.zeros(2))
    p.grad_sample = [torch.ones(n, 2) for n in entries]
    return p


def test_parameters_with_different_numbers_of_batches_are_refused():
    with pytest.raises(ValueError, match="different numbers of grad_sample entries"):
        collect([held(3, 3), held(3)])


def test_parameters_with_batches_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"different batch sizes \(\[3, 4\]\)"):
        collect([held(3), held(4)])
    (batch,) = collect([held(3), held(3)])
    assert batch.batch_size == 3


def test_two_models_that_saw_different_numbers_of_backwards_are_refused():
    models = [GradSampleModule(nn.Linear(2, 1), mode="ghost") for _ in range(2)]
    x = torch.randn(3, 2)
    for model in (*models, models[0]):
        model(x).sum().backward()
    params = [p for model in models for p in model.parameters()]
    with pytest.raises(ValueError, match=r"different number of backward passes.*\[1, 2\]"):
        collect(params)
    discard(params)
    assert collect(params) == []


@pytest.mark.parametrize("deep", [False, True], ids=["vectors", "positions"])
def test_what_was_captured_goes_as_soon_as_it_is_summed(deep):
    """At the end of a large model's backward the captured pairs are what fills the memory; the sums come on top."""
    layers = [nn.Linear(64, 64) for _ in range(3)]  # vectors: small and of one shape, so also read together
    model = GradSampleModule(nn.Sequential(*layers), mode="ghost")
    model(torch.randn(3, 2, 64) if deep else torch.randn(3, 64)).pow(2).sum().backward()
    params = list(model.parameters())
    (batch,) = collect(params)
    held = [weakref.ref(c.record.backprops) for own in batch._held for c in own if isinstance(c, Paired)]
    expected = batch.weighted_sum(torch.ones(3))
    discard(params)
    assert held and all(ref() is not None for ref in held)
    found = batch.weighted_sum(torch.ones(3), last=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(ref() is None for ref in held)


def test_parts_of_different_sizes_are_not_one_batch():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    parts = [Materialised([p], [torch.ones(3, 2)], 3), Materialised([q], [torch.ones(4, 2)], 4)]
    with pytest.raises(ValueError, match="batches of different sizes"):
        Joint([p, q], parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_and_sums_of_half_precision_do_not_overflow(dtype):
    """Squares of 300 are beyond float16; 2049 ones are beyond what its sum can count."""
    grads = torch.full((2, 5), 300.0, dtype=dtype)
    assert norm(grads).dtype == norm(grads[:, 0]).dtype == torch.float32
    assert norm(grads).tolist() == pytest.approx([5**0.5 * float(grads[0, 0])] * 2)
    assert norm(grads[:, 0]).tolist() == pytest.approx([float(grads[0, 0])] * 2)
    assert weighted(torch.ones(2049, 3, dtype=dtype), torch.ones(2049)).tolist() == [2049.0] * 3


def test_rows_of_several_kinds_take_the_widest():
    p = nn.Parameter(torch.zeros(2))
    exact = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    found = stack_rows([torch.ones(2), None, exact], [p, p, p], 2)
    assert found.tolist() == [[1.0, 1.0], [0.0, 0.0], exact.tolist()]
    assert stack_rows([None, None], [p, p], 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dims", [(1, 2, 3), (2, 1, 3), (3, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_in_any_order_of_memory_are_read_as_they_are(dims, expanded):
    """A thin layer's gradients are transposed products: flattening them in their own order would copy them."""
    torch.manual_seed(0)
    grads, weights = torch.randn(5, 3, 4, 6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    grads = (grads[:, :1].expand(-1, 3, -1, -1) if expanded else grads).permute(0, *dims)
    rows = grads.reshape(5, -1)
    torch.testing.assert_close(norm(grads), rows.norm(dim=1), rtol=1e-12, atol=0)
    total = weighted(grads, weights)
    torch.testing.assert_close(total, (weights @ rows).view(grads.shape[1:]), rtol=1e-12, atol=1e-14)
    assert total.is_contiguous()
    assert expanded or in_memory_order(grads).is_contiguous()
