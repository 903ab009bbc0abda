"""`make_private`: the contract's signature, both ways to choose the noise, and what is missing is named."""

import inspect

import pytest
import torch
from torch import nn

import accountants
from gsm.private_training import make_private
from tests.gsm.training import flat, parts, train

CONTRACT = {
    "noise_multiplier": None,
    "target_epsilon": None,
    "target_delta": None,
    "epochs": None,
    "max_grad_norm": 1.0,
    "mode": "auto",
    "clipping": "flat",
    "accountant": "prv",
    "poisson_sampling": True,
    "max_physical_batch_size": None,
    "secure_mode": False,
    "noise_generator": None,
    "loss_reduction": "mean",
    "batch_first": True,
}


def test_names_and_defaults_of_the_contract():
    found = inspect.signature(make_private).parameters
    assert list(found)[:3] == ["model", "optimizer", "loader"]
    assert {name: found[name].default for name in CONTRACT} == CONTRACT


@pytest.mark.parametrize("mode", ["auto", "hooks", "ghost", "functorch", "loop", "ew"])
def test_the_ordinary_loop_in_every_mode(mode):
    model, optimizer, loader = make_private(*parts(), noise_multiplier=1.1, mode=mode)
    before = flat(model)
    train(model, optimizer, loader)
    assert optimizer.accountant.history == [(1.1, 1 / 6, 6)]
    assert not torch.equal(before, flat(model))
    assert 0 < optimizer.accountant.get_epsilon(delta=1e-5) < 10


def test_a_budget_instead_of_noise():
    model, optimizer, loader = make_private(*parts(), target_epsilon=3.0, target_delta=1e-5, epochs=10)
    train(model, optimizer, loader, steps=60)
    assert 2.97 <= optimizer.accountant.get_epsilon(delta=1e-5) <= 3.0


def test_it_learns():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, optimizer, loader = make_private(
        *parts(batch_size=60, lr=0.5), noise_multiplier=0.7, noise_generator=generator
    )
    train(model, optimizer, loader, steps=80)
    x, y = loader.dataset.tensors
    assert (model(x).argmax(1) == y).float().mean() > 0.7  # 0.47 for the most frequent class


def test_sum_reduction_and_options_reach_their_parts():
    accountant = accountants.RDPAccountant()
    model, optimizer, loader = make_private(
        *parts(),
        noise_multiplier=1.0,
        loss_reduction="sum",
        accountant=accountant,
        clipping="adaptive",
        target_unclipped_quantile=0.8,
        max_physical_batch_size=5,
    )
    train(model, optimizer, loader, criterion=nn.CrossEntropyLoss(reduction="sum"))
    assert accountant.history == [(1.0, 1 / 6, 6)] and optimizer.accountant is accountant
    assert optimizer.clipping.target_unclipped_quantile == 0.8 and loader.max_physical_batch_size == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give noise_multiplier, or the whole budget: target_epsilon and target_delta is missing"),
        ({"target_epsilon": 1.0, "epochs": 1}, "target_delta is missing"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5}, "exactly one of epochs and total_steps"),
        ({"noise_multiplier": 1.0, "epochs": 3}, "noise_multiplier fixes the noise, so epochs cannot be given"),
        ({"noise_multiplier": 1.0, "learning_rate": 3}, r"unknown keyword argument\(s\) learning_rate"),
    ],
)
def test_what_is_missing_or_too_much_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_private(*parts(), **options)
