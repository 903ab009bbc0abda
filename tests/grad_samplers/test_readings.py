"""What holds for the three readings of every layer: stand-ins, precision, layouts."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import grad_samplers
from tests.loop import assert_close_per_sample, per_sample_loop

CASES = {
    "linear": (nn.Linear(4, 5), torch.randn(3, 6, 4)),
    "conv": (nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="circular"), torch.randn(3, 4, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), torch.randn(3, 4, 9)),
    "conv_transpose": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), torch.randn(3, 4, 5, 6)),
    "embedding": (nn.Embedding(7, 4, padding_idx=1), torch.randint(0, 7, (3, 9))),
    "embedding_bag": (nn.EmbeddingBag(7, 4), torch.randint(0, 7, (3, 9))),
    "layer_norm": (nn.LayerNorm(6), torch.randn(3, 5, 6)),
    "rms_norm": (nn.RMSNorm(6, eps=1e-6), torch.randn(3, 5, 6)),
    "group_norm": (nn.GroupNorm(2, 4), torch.randn(3, 4, 5, 5)),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), torch.randn(3, 4, 5, 5)),
    "prelu": (nn.PReLU(4), torch.randn(3, 4, 5)),
}
every_layer = pytest.mark.parametrize("name", CASES)


def attributes(layer):
    """The layer's options and parameters and nothing else: no forward, no class."""
    options = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    return SimpleNamespace(**options, **layer._parameters)


def readings(layer, activations, backprops, sampler=None):
    weights = torch.linspace(0.1, 1.0, backprops.shape[0])
    return [
        grad_samplers.per_sample_gradients(layer, activations, backprops, sampler=sampler),
        grad_samplers.per_sample_norms(layer, activations, backprops, sampler=sampler),
        grad_samplers.weighted_sum(layer, activations, backprops, weights, sampler=sampler),
    ]


def assert_same(found, expected, **tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine) == set(theirs)
        for parameter, value in mine.items():
            torch.testing.assert_close(value.double(), theirs[parameter].double(), **tolerance)


@every_layer
def test_a_stand_in_with_the_attributes_is_enough(name):
    layer, x = CASES[name]
    g = torch.randn_like(layer(x))
    sampler = grad_samplers.lookup(layer)
    stand_in = attributes(layer)
    assert sampler.supports is not None and sampler.supports(stand_in) is None
    assert_same(readings(stand_in, [x], g, sampler), readings(layer, [x], g), rtol=0, atol=0)


@every_layer
def test_a_frozen_layer_has_nothing_to_say(name):
    layer, x = CASES[name]
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert readings(frozen, [x], torch.randn_like(layer(x))) == [{}, {}, {}]


@every_layer
def test_autocast_around_the_backward_costs_no_precision(name):
    layer, x = CASES[name]
    g = torch.randn_like(layer(x))
    expected = readings(layer, [x], g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = readings(layer, [x], g)
    assert_same(found, expected, rtol=0, atol=0)


@every_layer
def test_half_precision_is_widened(name):
    """bfloat16 in, float32 arithmetic: close to float64 on the same numbers, far closer than bfloat16 could be."""
    layer, x = CASES[name]
    half = x.bfloat16() if x.is_floating_point() else x
    g = torch.randn_like(layer(x)).bfloat16()
    found = readings(layer, [half], g)
    assert all(value.dtype == torch.float32 for reading in found for value in reading.values())
    exact = half.double() if x.is_floating_point() else x
    assert_same(found, readings(layer, [exact], g.double()), rtol=1e-4, atol=1e-5)


@every_layer
def test_an_expanded_output_gradient(name):
    """`output.sum().backward()` hands on a gradient of ones without memory of its own."""
    layer, x = CASES[name]
    y = layer(x)
    found = readings(layer, [x], torch.ones(()).expand_as(y))
    assert_same(found, readings(layer, [x], torch.ones_like(y)), rtol=0, atol=0)


@every_layer
def test_inputs_are_left_as_they_were(name):
    layer, x = CASES[name]
    g = torch.randn_like(layer(x))
    before = x.clone(), g.clone()
    readings(layer, [x], g)
    assert torch.equal(x, before[0]) and torch.equal(g, before[1])


@every_layer
def test_one_sample_changes_no_other_samples_gradient(name):
    layer, x = CASES[name]
    g = torch.randn_like(layer(x))
    gradients, norms, _ = readings(layer, [x], g)
    swapped = torch.tensor([0, 2, 2])
    other, other_norms, _ = readings(layer, [x[swapped]], g[swapped])
    kept = torch.tensor([0, 2])
    assert_same(
        [{p: v[kept] for p, v in reading.items()} for reading in (other, other_norms)],
        [{p: v[kept] for p, v in reading.items()} for reading in (gradients, norms)],
    )


def test_a_model_by_hand():
    """A small model whose captures are taken by plain hooks agrees with the loop over whole models."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5)
    ).double()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    captured = []

    def capture(layer, inputs, output):
        output.register_hook(lambda g: captured.append((layer, inputs[0].detach(), g)))

    for layer in model:
        layer.register_forward_hook(capture)
    model(x).square().sum().backward()
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for layer, a, g in captured:
        if grad_samplers.lookup(layer) is not None:
            found |= {names[p]: v for p, v in grad_samplers.per_sample_gradients(layer, [a], g).items()}
    for layer in model:
        layer._forward_hooks.clear()
    assert_close_per_sample(found, per_sample_loop(model, x, loss=lambda y: y.square().sum()))


@pytest.mark.parametrize("kind", ["DPRNN", "DPGRU", "DPLSTM"])
def test_opacus_recurrent_layers_are_made_of_covered_parts(kind):
    """Their cells call one linear layer per time step: the gradients of the calls add up to the layer's."""
    layers = pytest.importorskip("opacus.layers")
    model = getattr(layers, kind)(3, 4, num_layers=2, batch_first=True).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    found = {name: torch.zeros(5, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}

    def capture(layer, inputs, output):
        def add(g):
            for p, value in grad_samplers.per_sample_gradients(layer, [inputs[0].detach()], g).items():
                found[names[p]] += value

        output.register_hook(add)

    parts = [m for m in model.modules() if m._parameters and grad_samplers.lookup(m) is not None]
    handles = [m.register_forward_hook(capture) for m in parts]
    model(x)[0].square().sum().backward()
    for handle in handles:
        handle.remove()
    assert_close_per_sample(found, per_sample_loop(model, x, loss=lambda y: y[0].square().sum()))


def test_opacus_attention_is_made_of_covered_parts():
    layers = pytest.importorskip("opacus.layers")
    attention = layers.DPMultiheadAttention(4, 2, add_bias_kv=True)
    own = [m for m in attention.modules() if any(p is not None for p in m._parameters.values())]
    assert {type(m).__name__ for m in own} == {"Linear", "SequenceBias"}
    assert all(grad_samplers.reason_unsupported(m) is None for m in own)
