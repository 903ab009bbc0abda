"""The registry: who is covered by which function."""

import inspect

import pytest
import torch
from torch import nn

import grad_samplers
from grad_samplers import (
    lookup,
    reason_unsupported,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
    registered,
    unregister,
)


class Scale(nn.Module):
    """y = x * weight, x [B, d]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x * self.weight


def scale_grad_sample(layer, activations, backprops):
    return {layer.weight: activations[0] * backprops}


@pytest.fixture
def scale():
    register_grad_sampler(Scale)(scale_grad_sample)
    yield Scale()
    if Scale in registered():
        unregister(Scale)


def test_register_and_remove_at_run_time(scale):
    assert registered()[Scale].grad is scale_grad_sample and lookup(scale).cls is Scale
    assert unregister(Scale).grad is scale_grad_sample
    assert lookup(scale) is None and Scale not in registered()
    assert reason_unsupported(scale) == "no sampler is registered for Scale"
    with pytest.raises(KeyError, match="Scale"):
        unregister(Scale)


def test_norm_and_weighted_sum_have_defaults(scale):
    x, g, w = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    gradients = grad_samplers.per_sample_gradients(scale, [x], g)[scale.weight]
    torch.testing.assert_close(gradients, x * g)
    torch.testing.assert_close(grad_samplers.per_sample_norms(scale, [x], g)[scale.weight], (x * g).norm(dim=1))
    torch.testing.assert_close(grad_samplers.weighted_sum(scale, [x], g, w)[scale.weight], w @ (x * g))


def test_defaults_compute_in_float32_what_a_sampler_returned_in_half_precision(scale):
    x, g, w = torch.full((4, 3), 200.0).half(), torch.full((4, 3), 300.0).half(), torch.full((4,), 1e-3)
    exact = 60000 * torch.ones(4, 3)
    half = scale.half()
    assert grad_samplers.per_sample_gradients(half, [x], g)[half.weight].dtype == torch.float16
    norms = grad_samplers.per_sample_norms(half, [x], g)[half.weight]
    torch.testing.assert_close(norms, exact.norm(dim=1), rtol=1e-3, atol=0)  # beyond float16: infinite there
    total = grad_samplers.weighted_sum(half, [x], g, 1000 * w)[half.weight]
    torch.testing.assert_close(total, exact.sum(0), rtol=1e-3, atol=0)


def test_registered_norm_and_weighted_samplers_are_used(scale):
    register_norm_sampler(Scale)(lambda layer, a, g: {layer.weight: torch.full((4,), 7.0)})
    register_weighted_sampler([Scale])(lambda layer, a, g, w: {layer.weight: torch.full((3,), 8.0)})
    x = torch.randn(4, 3)
    assert grad_samplers.per_sample_norms(scale, [x], x)[scale.weight].eq(7).all()
    assert grad_samplers.weighted_sum(scale, [x], x, torch.ones(4))[scale.weight].eq(8).all()


def test_registering_again_forgets_the_old_norm_and_weighted_samplers(scale):
    """They belong to the function that is gone; kept, they would report norms of other gradients."""
    register_norm_sampler(Scale)(lambda layer, a, g: {layer.weight: torch.full((4,), 7.0)})
    register_grad_sampler(Scale)(lambda layer, a, g: {layer.weight: 2 * a[0] * g})
    x = torch.randn(4, 3)
    torch.testing.assert_close(grad_samplers.per_sample_norms(scale, [x], x)[scale.weight], (2 * x * x).norm(dim=1))


def test_norm_sampler_without_grad_sampler_is_an_error():
    with pytest.raises(ValueError, match=r"register_grad_sampler\(Scale\) comes first"):
        register_norm_sampler(Scale)(scale_grad_sample)
    with pytest.raises(TypeError, match="for a class"):
        register_grad_sampler(Scale())


def test_a_subclass_is_covered_if_it_inherits_the_forward():
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class OtherCall(nn.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    assert lookup(Same(2, 3)).cls is nn.Linear
    assert lookup(Other(2, 3)) is None and lookup(OtherCall(2, 3)) is None
    assert "does not run the forward of Linear" in reason_unsupported(Other(2, 3))


def test_a_forward_replaced_on_the_instance_is_not_covered():
    layer = nn.Linear(2, 3)
    assert lookup(layer) is not None
    layer.forward = lambda x: x
    assert lookup(layer) is None


def test_further_parameters_are_not_lost():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.scale = nn.Parameter(torch.ones(3))

    assert "further parameter 'scale'" in reason_unsupported(Scaled())
    x, g = torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="returned nothing for the trainable parameter 'scale'"):
        grad_samplers.per_sample_gradients(Scaled(), [x], g)


def test_supports_is_asked():
    register_grad_sampler(Scale, supports=lambda layer: "no such weight" if len(layer.weight) > 2 else None)(
        scale_grad_sample
    )
    assert reason_unsupported(Scale()) == "no such weight"
    unregister(Scale)


def test_a_wrong_shape_is_named(scale):
    x = torch.randn(4, 3)
    register_grad_sampler(Scale)(lambda layer, a, g: {layer.weight: (a[0] * g).sum(0)})
    with pytest.raises(ValueError, match=r"sampler of Scale returned shape \(3,\) for 'weight', expected \(4, 3\)"):
        grad_samplers.per_sample_gradients(scale, [x], x)
    with pytest.raises(ValueError, match="one per sample"):
        grad_samplers.weighted_sum(scale, [x], x, torch.ones(3))


def test_an_uncovered_layer_is_an_error():
    with pytest.raises(LookupError, match="no sampler covers Scale"):
        grad_samplers.per_sample_gradients(Scale(), [torch.randn(4, 3)], torch.randn(4, 3))


def test_frozen_parameters_are_left_out_of_what_a_sampler_returns(scale):
    scale.weight.requires_grad_(False)
    x = torch.randn(4, 3)
    assert grad_samplers.per_sample_gradients(scale, [x], x) == {}


def test_dotted_names_wait_for_their_package():
    name = f"{Scale.__module__}.{Scale.__qualname__}"
    assert lookup(Scale()) is None
    register_grad_sampler(name)(scale_grad_sample)
    assert lookup(Scale()).grad is scale_grad_sample and Scale in registered()
    register_grad_sampler("a_package_that_is_not_there.Layer")(scale_grad_sample)
    assert all(isinstance(cls, type) for cls in registered())
    unregister("a_package_that_is_not_there.Layer")
    assert unregister(Scale).cls == name


def test_every_layer_of_torch_with_its_own_parameters_is_covered():
    """All but those that mix the samples, and those made of several uses of several parameters."""
    mixing = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
    composite = {nn.modules.rnn, nn.modules.activation, nn.modules.container, nn.modules.transformer}
    composite |= {nn.modules.adaptive, nn.modules.loss}
    arguments = {
        **dict.fromkeys([nn.Linear, nn.GroupNorm], (2, 4)),
        **dict.fromkeys([nn.Embedding, nn.EmbeddingBag], (4, 2)),
        **dict.fromkeys([nn.LayerNorm, nn.RMSNorm, *mixing], (4,)),
        **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], (4, 1e-5, 0.1, True)),
        **dict.fromkeys([*grad_samplers.conv.CONVOLUTIONS, nn.Bilinear], (2, 4, 3)),
        nn.PReLU: (),
    }
    names = {module.__name__ for module in composite}
    for name, cls in vars(nn).items():
        is_layer = isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module
        if not is_layer or name.startswith("Lazy") or (cls.__module__ in names and cls not in arguments):
            continue
        if cls in arguments:
            assert (reason_unsupported(cls(*arguments[cls])) is None) == (cls not in mixing), name
        else:
            assert "weight" not in inspect.get_annotations(cls) and not hasattr(cls, "reset_parameters"), name


@pytest.mark.parametrize(
    "results, what",
    [
        (lambda w, g: [g], "a list, expected a dict"),
        (lambda w, g: None, "a NoneType, expected a dict"),
        (lambda w, g: {"weight": g}, "a dict of str: Tensor, expected a dict from parameters"),
        (lambda w, g: {w: None}, "a dict of Parameter: NoneType, expected"),
    ],
)
def test_a_sampler_that_returns_something_else_is_told_what_to_return(scale, results, what):
    register_grad_sampler(Scale)(lambda layer, a, g: results(layer.weight, a[0] * g))
    with pytest.raises(TypeError, match=f"sampler of Scale returned {what}"):
        grad_samplers.per_sample_gradients(scale, [torch.ones(4, 3)], torch.ones(4, 3))
