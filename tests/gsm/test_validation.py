"""Which models are refused, with what message, and what the fix does."""

import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import nn

from gsm.validation import get_compatible_module, module_errors, validate


def frozen(layer):
    for p in layer.parameters():
        p.requires_grad_(False)
    return layer


class Named(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), layer)


MIXING = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "BatchNorm3d": lambda: nn.BatchNorm3d(8),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "frozen": lambda: frozen(nn.BatchNorm2d(8)),
    "InstanceNorm with statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "InstanceNorm with statistics, not affine": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
}


@pytest.mark.parametrize("case", MIXING)
def test_layers_that_mix_samples_or_keep_statistics_are_refused_by_path(case):
    model = Named(MIXING[case]())
    with pytest.raises(UnsupportedModuleError, match=r"body\.1 \(.*get_compatible_module"):
        validate(model)
    fixed = get_compatible_module(model)
    assert module_errors(fixed) == []
    assert module_errors(model) != []  # the original is as it was


FINE = {
    "frozen BatchNorm in eval mode": lambda: frozen(nn.BatchNorm2d(8)).eval(),
    "InstanceNorm": lambda: nn.InstanceNorm2d(8, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "LSTM": lambda: nn.LSTM(3, 4),
    "GRU": lambda: nn.GRU(3, 4),
    "RNN": lambda: nn.RNN(3, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("case", FINE)
def test_layers_that_are_fine_stay(case):
    model = Named(FINE[case]())
    validate(model)
    assert type(get_compatible_module(model).body[1]) is type(model.body[1])


def test_eval_mode_is_named():
    with pytest.raises(UnsupportedModuleError, match=r"training mode: call model.train\(\)"):
        validate(nn.Linear(2, 2).eval())


def test_everything_else_is_copied():
    model = Named(nn.BatchNorm2d(8)).double()
    fixed = get_compatible_module(model)
    assert torch.equal(fixed.body[0].weight, model.body[0].weight)
    assert fixed.body[0].weight is not model.body[0].weight
    assert isinstance(fixed.body[1], nn.GroupNorm) and fixed.body[1].weight.dtype == torch.float64


def test_frozen_layers_stay_frozen():
    fixed = get_compatible_module(Named(frozen(nn.BatchNorm2d(8))))
    assert not any(p.requires_grad for p in fixed.body[1].parameters())


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(8)
    fixed = get_compatible_module(nn.Sequential(norm, nn.ReLU(), norm))
    assert fixed[0] is fixed[2] and isinstance(fixed[0], nn.GroupNorm)


def test_the_root_itself():
    assert isinstance(get_compatible_module(nn.BatchNorm2d(8)), nn.GroupNorm)
    assert "the model itself" in str(module_errors(nn.BatchNorm2d(8))[0])
