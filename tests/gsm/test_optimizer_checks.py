"""Settings and parameters that the optimizer refuses, and the messages that name them."""

import pytest
import torch
from torch import nn

from gsm.clipping import FlatClipping
from gsm.optimizer import DPOptimizer
from gsm.wrapper import GradSampleModule
from tests.gsm.optimizer_tools import Spy, deliver, gradients, parameters, private

GOOD = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 4}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"expected_batch_size": None}, ValueError, "expected_batch_size"),
        ({"expected_batch_size": 0}, ValueError, "expected_batch_size must be positive"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction: 'none'"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"max_grad_norm": float("inf")}, ValueError, "max_grad_norm must be positive and finite"),
        ({"max_grad_norm": [1.0, 1.0]}, ValueError, 'clipping="per_layer"'),
        ({"max_grad_norm": [1.0], "clipping": "per_layer"}, ValueError, "list of 1 bounds.*3 trainable"),
        ({"clipping": "ghost"}, ValueError, "Unknown clipping 'ghost'.*adaptive.*flat"),
        ({"clipping": FlatClipping}, TypeError, "clipping is a name or"),
        ({"generator": 7}, TypeError, "torch.Generator, got int"),
        ({"generator": torch.Generator(), "secure_mode": True}, ValueError, "predicted"),
        ({"noise": Spy(), "secure_mode": True}, ValueError, "its own randomness"),
        ({"noise": Spy(), "generator": torch.Generator()}, ValueError, "its own randomness"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        DPOptimizer(torch.optim.SGD(parameters(), lr=0.1), **(GOOD | options))


def test_only_optimizers_are_wrapped_and_only_once():
    with pytest.raises(TypeError, match="wraps a torch.optim.Optimizer, got list"):
        DPOptimizer(parameters(), **GOOD)
    with pytest.raises(ValueError, match="private already"):
        DPOptimizer(private(parameters()), **GOOD)


def test_a_part_handed_in_takes_the_optimizers_bound():
    part = FlatClipping(5.0)
    optimizer = private(parameters(), max_grad_norm=2.0, clipping=part)
    assert optimizer.clipping is part and part.max_grad_norm == 2.0


def test_parameters_that_nothing_captures_are_named():
    params = parameters()
    stranger = nn.Parameter(torch.zeros(7, 7))
    optimizer = private([*params, stranger])
    deliver(params, gradients(params, 2))
    with pytest.raises(ValueError, match=r"1 trainable parameter.*\['params'\]\[3\] of shape \(7, 7\)"):
        optimizer.step()


def test_wrapper_and_optimizer_must_agree_on_the_loss_reduction():
    model = GradSampleModule(nn.Linear(3, 2), loss_reduction="sum")
    optimizer = private(list(model.parameters()))
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="wrapped with loss_reduction='sum'.*Give both the same"):
        optimizer.step()


def test_a_bad_sample_that_cannot_be_left_out_stops_the_run_and_is_named(monkeypatch):
    """The last line of defence: whatever holds the gradients, a NaN never reaches the sum without an error."""
    monkeypatch.setattr("gsm.ledger.torch.nonzero", lambda weights: torch.arange(len(weights))[:, None])
    params = parameters()
    optimizer = private(params)
    grads = gradients(params, 4)
    grads[1][2, 0] = float("nan")
    deliver(params, grads)
    with pytest.raises(FloatingPointError, match=r"sample\(s\) \[2\].*\['params'\]\[1\] of shape \(4,\)"):
        optimizer.step()
    assert all((p == 0).all() for p in params)


def test_parameters_that_come_later_are_checked_too():
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, 3))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    deliver(params, gradients(params, 3))
    with pytest.raises(ValueError, match="1 trainable parameter.* that no GradSampleModule captures"):
        optimizer.step()


def test_several_processes_are_refused(monkeypatch):
    params = parameters()
    optimizer = private(params)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    deliver(params, gradients(params, 3))
    with pytest.raises(ValueError, match="torch.distributed has 2"):
        optimizer.step()


def test_a_build_of_torch_without_processes_is_not_asked_how_many_there_are(monkeypatch):
    params = parameters()
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    optimizer = private(params)
    deliver(params, gradients(params, 3))
    optimizer.step()
    assert optimizer.releases == 1


@pytest.mark.parametrize("change", [{"expected_batch_size": None}, {"loss_reduction": "none"}])
def test_settings_assigned_later_are_checked_before_anything_is_charged(change):
    params = parameters()
    optimizer = private(params)
    deliver(params, gradients(params, 4))
    charged = []
    optimizer.accountant = type("A", (), {"step": lambda self, **kw: charged.append(kw), "history": []})()
    optimizer.sample_rate = 0.1
    for name, value in change.items():
        setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="loss_reduction"):
        optimizer.step()
    assert not charged
