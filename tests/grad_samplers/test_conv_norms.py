"""Three ways to the norms of a convolution's gradients, and which of them is taken."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from grad_samplers import conv, conv_capture, conv_norms
from tests.grad_samplers.check import check
from tests.grad_samplers.test_conv import CONV, TRANSPOSE, options, per_dim


@pytest.mark.parametrize("way", ["gradient", "windows", "pixels"])
def test_every_way_to_the_norm(way):
    """Each gives the loop's norms, for all options; which one is taken is a matter of time alone."""

    @settings(max_examples=60)
    @given(options(), st.data())
    def compare(drawn, data):
        rank, kwargs = drawn
        assume(kwargs["groups"] == 1)
        padding = per_dim(data.draw, rank, 0, 2)
        spans = [d * (k - 1) + 1 for k, d in zip(kwargs["kernel_size"], kwargs["dilation"], strict=True)]
        transposed = data.draw(st.booleans())
        size = [span + data.draw(st.integers(0, 4)) for span in spans]
        layer = (TRANSPOSE if transposed else CONV)[rank](**kwargs, padding=padding)
        lengths = zip(size, layer.stride, spans, padding, strict=True)
        assume(not transposed or all((n - 1) * s + span - 2 * p > 0 for n, s, span, p in lengths))
        check(layer, torch.randn(data.draw(st.integers(1, 3)), layer.in_channels, *size, dtype=torch.float64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "cheapest", lambda captured: way)
        compare()


def way_of(layer, *size, batch=32):
    x = torch.randn(batch, layer.in_channels, *size)
    return conv_norms.cheapest(conv_capture.convolution(layer, [x], layer(x).detach(), transposed=False))


def test_the_way_that_was_the_fastest_is_taken():
    assert way_of(nn.Conv2d(128, 128, 3, padding=1), 8, 8) == "pixels"
    assert way_of(nn.Conv1d(128, 100, 5, padding=2), 128) == "pixels"
    assert way_of(nn.Conv2d(3, 512, 14, stride=14), 112, 112, batch=4) == "windows"  # many pixels, few positions
    assert way_of(nn.Conv2d(32, 32, 3, padding=1), 32, 32, batch=4) == "gradient"
    assert way_of(nn.Conv3d(32, 32, 3, padding=1), 6, 6, 6, batch=4) == "gradient"
    assert way_of(nn.Conv2d(256, 256, 3, padding=1, groups=2), 4, 4) == "gradient"  # no formula for groups
    assert way_of(nn.Conv2d(64, 64, 3, padding=1), 4, 4, batch=1) == "gradient"  # too small for anything else


def test_a_kernel_that_reaches_beyond_the_input_on_both_sides():
    """Some entries of the kernel see nothing but padding, at every position."""
    layer = nn.Conv2d(2, 3, 5, padding=4, dilation=2, stride=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "cheapest", lambda captured: "pixels")
        check(layer, torch.randn(3, 2, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize("way", ["gradient", "windows", "pixels"])
def test_the_norm_in_chunks_of_samples(way, monkeypatch):
    monkeypatch.setattr("grad_samplers.tensors.CPU_CHUNK_NUMEL", 2000)
    monkeypatch.setattr(conv, "cheapest", lambda captured: way)
    check(nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6, dtype=torch.float64))


def test_terms_that_cancel_are_not_taken_for_less():
    """Two positions with opposite output gradients and nearly equal windows: rounding may not hide the rest."""
    torch.manual_seed(0)
    layer = nn.Conv1d(64, 64, 3, bias=False)
    x = torch.randn(2, 64, 1).expand(2, 64, 4).clone()
    x[:, :, 3] += 1e-4 * torch.randn(2, 64)
    g = torch.randn(2, 64, 1) * torch.tensor([1.0, -1.0])
    captured = conv_capture.convolution(layer, [x], g, transposed=False)
    exact = conv_capture.convolution(layer.double(), [x.double()], g.double(), transposed=False)
    expected = conv_norms.norms_by_pixels(exact)
    assert bool((conv_norms.norms_by_pixels(captured).double() >= expected).all())
