"""`nn.Embedding` with its options."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from tests.grad_samplers.check import check


@settings(max_examples=60)
@given(
    st.integers(0, 4),
    st.lists(st.integers(1, 6), max_size=3),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 5)),
    st.sampled_from([{}, {"scale_grad_by_freq": True}, {"sparse": True}]),
)
def test_embedding(batch, shape, rows, padding_idx, options):
    """Few rows, so ids repeat within and between the samples."""
    if padding_idx is not None and padding_idx >= rows:
        padding_idx = rows - 1
    layer = nn.Embedding(rows, 3, padding_idx=padding_idx, **options)
    check(layer, torch.randint(0, rows, (batch, *shape)))


def test_int32_ids_and_non_contiguous_ids():
    check(nn.Embedding(5, 3), torch.randint(0, 5, (6, 4), dtype=torch.int32).t())


def test_negative_padding_idx():
    check(nn.Embedding(5, 3, padding_idx=-1), torch.randint(0, 5, (4, 6)))


def test_slots_number_equal_ids_equally():
    ids = torch.tensor([[7, 3, 7, 7], [1, 2, 2, 0]])
    found = grad_samplers.embedding.slots(ids)
    assert found.tolist() == [[1, 0, 1, 1], [1, 2, 2, 0]]


def test_the_norm_needs_no_table():
    """A table of a million rows: a materialised gradient would be 8 * 4 GB."""
    layer = nn.Embedding(1_000_000, 1024, _weight=torch.empty(1, 1024).expand(1_000_000, 1024))
    ids, g = torch.randint(0, 1_000_000, (8, 16)), torch.randn(8, 16, 1024)
    norms = grad_samplers.per_sample_norms(layer, [ids], g)[layer.weight]
    torch.testing.assert_close(norms, g.flatten(1).norm(dim=1))


def test_half_precision_sums_in_float32():
    layer = nn.Embedding(2, 3).bfloat16()
    ids, g = torch.zeros(2, 1000, dtype=torch.int64), torch.full((2, 1000, 3), 1.0).bfloat16()
    gradients = grad_samplers.per_sample_gradients(layer, [ids], g)[layer.weight]
    assert gradients[:, 0].eq(1000).all() and gradients.dtype == torch.float32


def test_max_norm_is_refused():
    assert "max_norm" in (grad_samplers.reason_unsupported(nn.Embedding(5, 3, max_norm=1.0)) or "")


def test_frozen():
    layer = nn.Embedding(5, 3).requires_grad_(False)
    ids, g = torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 3, 3)
    assert grad_samplers.per_sample_gradients(layer, [ids], g) == {}
    assert grad_samplers.per_sample_norms(layer, [ids], g) == {}
    assert grad_samplers.weighted_sum(layer, [ids], g, torch.ones(2)) == {}
