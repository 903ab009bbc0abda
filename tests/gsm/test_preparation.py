"""Parts of private training, each made from its ordinary counterpart (through `make_private`: test_engine.py)."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gsm import preparation
from gsm.clipping import AutomaticClipping, FlatClipping
from tests.gsm.training import parts


@pytest.mark.parametrize(
    "clipping, mode",
    [("automatic", "hooks"), (FlatClipping(), "hooks"), ("adaptive", "loop"), ("flat", "ghost"), ("per_layer", "auto")],
)
def test_over_processes_both_the_clipping_and_the_mode_must_fit(clipping, mode):
    """Opacus's optimizer would clip flat, whatever was asked for, and finds nothing in the other modes."""
    with pytest.raises(ValueError, match="DistributedDataParallel takes clipping='flat' or 'per_layer'"):
        preparation.private_optimizer(
            parts()[1],
            clipping=clipping,
            mode=mode,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=10,
            loss_reduction="mean",
            generator=None,
            secure_mode=False,
            distributed=True,
            clipping_options={},
        )


@pytest.mark.parametrize("clipping, has", [("flat", "no further ones"), ("automatic", "gamma"), ("none", "no further")])
def test_options_that_a_clipping_does_not_have_are_named_with_those_that_it_has(clipping, has):
    with pytest.raises(ValueError, match=f"argument.s. gama: clipping='{clipping}' takes {has}"):
        preparation.make_clipping(clipping, {"gama": 1.0})


def test_a_finished_clipping_takes_no_options():
    with pytest.raises(ValueError, match="gamma: clipping=AutomaticClipping.* takes no further ones"):
        preparation.make_clipping(AutomaticClipping(), {"gamma": 1.0})


@pytest.mark.parametrize("records, batch, size", [(10, 4, 3), (49, 1, 1), (12, 4, 4)])
def test_the_expected_batch_size_is_rounded_down_as_in_opacus(records, batch, size):
    loader = DataLoader(TensorDataset(torch.zeros(records, 1)), batch_size=batch)
    assert preparation.expected_batch_size(loader, preparation.rate_of(loader), distributed=False) == size
    assert preparation.expected_batch_size(loader, 0.01, distributed=False) == records / 100
