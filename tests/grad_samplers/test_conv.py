"""Convolutions and transposed convolutions: every option, against the loop."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import grad_samplers
from grad_samplers import conv
from tests.grad_samplers.check import check

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def per_dim(draw, rank, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


@st.composite
def options(draw):
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    return rank, {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": per_dim(draw, rank, 1, 3),
        "stride": per_dim(draw, rank, 1, 3),
        "dilation": per_dim(draw, rank, 1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


def folded(fold):
    """Channels as few as the tests' are read from the unfolded input: the folded convolution has to be asked for."""
    return patch.object(conv, "patches_are_faster", lambda _: False) if fold else nullcontext()


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=160)
@given(options(), st.data(), st.booleans())
def test_conv(drawn, data, fold):
    rank, kwargs = drawn
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        kwargs["stride"] = 1
    if padding == "numbers":
        padding = per_dim(data.draw, rank, 0, 2)
    spans = [d * (k - 1) + 1 for k, d in zip(kwargs["kernel_size"], kwargs["dilation"], strict=True)]
    size = [span + data.draw(st.integers(2, 4)) for span in spans]
    layer = CONV[rank](**kwargs, padding=padding, padding_mode=mode)
    batch = data.draw(st.integers(0 if mode == "zeros" else 1, 3))
    with folded(fold):
        check(layer, torch.randn(batch, layer.in_channels, *size, dtype=torch.float64))


@settings(max_examples=160)
@given(options(), st.data(), st.booleans())
def test_conv_transpose(drawn, data, fold):
    rank, kwargs = drawn
    padding = per_dim(data.draw, rank, 0, 2)
    limits = [max(s, d) - 1 for s, d in zip(kwargs["stride"], kwargs["dilation"], strict=True)]
    extra = tuple(data.draw(st.integers(0, limit)) for limit in limits)
    size = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    layer = TRANSPOSE[rank](**kwargs, padding=padding, output_padding=extra)
    lengths = zip(size, layer.stride, layer.dilation, layer.kernel_size, padding, extra, strict=True)
    assume(all((n - 1) * s + d * (k - 1) + 1 - 2 * p + e > 0 for n, s, d, k, p, e in lengths))
    batch = data.draw(st.integers(0, 3))
    with folded(fold):
        check(layer, torch.randn(batch, layer.in_channels, *size, dtype=torch.float64))


def test_transposed_output_that_is_all_margin():
    """Padding crops away everything that the weight reaches: its gradient is zero."""
    layer = nn.ConvTranspose1d(2, 2, kernel_size=1, stride=3, padding=1, output_padding=2)
    check(layer, torch.randn(3, 2, 1, dtype=torch.float64))


def test_transposed_with_output_size():
    """`output_size` given in the call decides the margin, so it can't be read off the layer's options."""
    layer = nn.ConvTranspose2d(2, 3, kernel_size=3, stride=2).double()
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    g = torch.randn(3, 3, 10, 12, dtype=torch.float64)
    found = grad_samplers.per_sample_gradients(layer, [x], g)[layer.weight]
    for i in range(3):
        output = layer(x[i : i + 1], output_size=[10, 12])
        expected = torch.autograd.grad(output, layer.weight, g[i : i + 1])[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


def test_both_ways_to_the_gradient(monkeypatch):
    """The unfolded input and the folded convolution give the same, for every option that both cover."""
    for _ in range(2):
        check(nn.Conv2d(2, 40, (2, 3), stride=(2, 3), padding=1, dilation=2), torch.randn(3, 2, 7, 8).double())
        check(nn.Conv2d(4, 5, 1, stride=2), torch.randn(3, 4, 5, 6).double())
        check(nn.Conv1d(4, 5, 5, padding_mode="reflect", padding=2), torch.randn(3, 4, 6).double())
        check(nn.ConvTranspose1d(4, 5, 3, stride=3, output_padding=2), torch.randn(3, 4, 6).double())
        monkeypatch.setattr(conv, "patches_are_faster", lambda _: False)


def test_the_norm_in_chunks_of_samples(monkeypatch):
    monkeypatch.setattr("grad_samplers.tensors.CPU_CHUNK_NUMEL", 400)
    check(nn.Conv2d(3, 4, 3), torch.randn(5, 3, 8, 8, dtype=torch.float64))
    check(nn.Conv2d(8, 9, 3), torch.randn(5, 8, 3, 4, dtype=torch.float64))


def test_non_contiguous_and_channels_last():
    layer = nn.Conv2d(4, 6, 3)
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    check(layer, x.to(memory_format=torch.channels_last))
    check(layer, x.transpose(2, 3))


def test_frozen_weight():
    layer = nn.Conv1d(2, 3, 2)
    layer.weight.requires_grad_(False)
    check(layer, torch.randn(3, 2, 5, dtype=torch.float64))


def test_half_precision_inputs_are_read_in_float32():
    layer = nn.Conv2d(3, 4, 3).bfloat16()
    a, g = torch.randn(3, 3, 8, 8).bfloat16(), torch.randn(3, 4, 6, 6).bfloat16()
    wide = nn.Conv2d(3, 4, 3).double()
    exact = grad_samplers.per_sample_gradients(wide, [a.double()], g.double())[wide.weight]
    norms = grad_samplers.per_sample_norms(layer, [a], g)[layer.weight]
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_input_without_batch_is_an_error():
    with pytest.raises(ValueError, match="a batch has 4 dimensions"):
        conv.conv_grad_sample(nn.Conv2d(2, 2, 3), [torch.randn(2, 5, 5)], torch.randn(2, 3, 3))


def test_a_subclass_with_its_own_convolution_is_refused():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    assert "_conv_forward" in (grad_samplers.reason_unsupported(Standardised(2, 2, 3)) or "")

    class Cropped(nn.ConvTranspose1d):
        def _output_padding(self, *args, **kwargs):
            return [0]

    assert "_output_padding" in (grad_samplers.reason_unsupported(Cropped(2, 2, 3)) or "")
