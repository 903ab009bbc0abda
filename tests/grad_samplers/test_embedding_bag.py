"""`nn.EmbeddingBag`: two-dimensional input, and one-dimensional input cut into bags by offsets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from tests.grad_samplers.check import check

ROWS = 5
modes = st.sampled_from(["sum", "mean"])
paddings = st.one_of(st.none(), st.integers(0, ROWS - 1))


@settings(max_examples=60)
@given(st.integers(0, 4), st.integers(1, 6), modes, paddings, st.booleans(), st.booleans())
def test_two_dimensional(batch, length, mode, padding_idx, weighted, sparse):
    layer = nn.EmbeddingBag(ROWS, 3, mode=mode, padding_idx=padding_idx, sparse=sparse)
    ids = torch.randint(0, ROWS, (batch, length))
    if weighted and mode == "sum":
        weights = torch.randn(batch, length, dtype=torch.float64)
        check(Weighted(layer), ids, weights)
    else:
        check(layer, ids)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), modes, paddings, st.booleans(), st.booleans())
def test_offsets(lengths, mode, padding_idx, weighted, include_last):
    """Bags of any length, empty ones among them."""
    layer = nn.EmbeddingBag(ROWS, 3, mode=mode, padding_idx=padding_idx, include_last_offset=include_last)
    ids = torch.randint(0, ROWS, (sum(lengths),))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = [ids, bounds if include_last else bounds[:-1]]
    if weighted and mode == "sum":
        inputs.append(torch.randn(len(ids), dtype=torch.float64))

    def bag(inputs, index):
        start, end = bounds[index], bounds[index + 1]
        offsets = torch.tensor([0, int(end - start)] if include_last else [0])
        return (inputs[0][start:end], offsets, *(w[start:end] for w in inputs[2:]))

    check(layer, *inputs, select=bag, size=len(lengths))


def test_indices_after_the_last_offset_belong_to_the_last_bag():
    """That is how PyTorch reads `include_last_offset` where the last offset is not the end."""
    layer = nn.EmbeddingBag(ROWS, 3, mode="mean", include_last_offset=True).double()
    ids, offsets = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 3])
    output = layer(ids, offsets)
    g = torch.randn_like(output)
    found = grad_samplers.per_sample_gradients(layer, [ids, offsets], g)[layer.weight]
    for bag in range(2):
        expected = torch.autograd.grad(output[bag], layer.weight, g[bag], retain_graph=True)[0]
        torch.testing.assert_close(found[bag], expected)


class Weighted(nn.EmbeddingBag):
    """Two-dimensional ids with weights, `forward(ids, weights)`; covered by nn.EmbeddingBag's functions."""

    def __init__(self, bag):
        nn.Module.__init__(self)
        self.__dict__.update(bag.__dict__)

    def forward(self, ids, weights):
        return super().forward(ids, per_sample_weights=weights)


@pytest.fixture(autouse=True, scope="module")
def weighted_is_covered():
    sampler = grad_samplers.registered()[nn.EmbeddingBag]
    grad_samplers.register_grad_sampler(Weighted)(sampler.grad)
    grad_samplers.register_norm_sampler(Weighted)(sampler.norm)
    grad_samplers.register_weighted_sampler(Weighted)(sampler.weighted)
    yield
    grad_samplers.unregister(Weighted)


@pytest.mark.parametrize(
    "options, name",
    [({"mode": "max"}, "mode"), ({"max_norm": 1.0}, "max_norm"), ({"scale_grad_by_freq": True}, "freq")],
)
def test_refused_options(options, name):
    assert name in (grad_samplers.reason_unsupported(nn.EmbeddingBag(5, 3, **options)) or "")


def test_one_dimensional_input_without_offsets_is_an_error():
    layer = nn.EmbeddingBag(5, 3)
    with pytest.raises(ValueError, match="without offsets"):
        grad_samplers.per_sample_gradients(layer, [torch.zeros(4, dtype=torch.int64)], torch.randn(2, 3))
