"""The ghost criterion: per-sample reduction first, an ordinary tensor out."""

import pytest
import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from gsm.criterion import GhostCriterion


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "output", "target"),
    [
        (nn.CrossEntropyLoss, torch.randn(4, 3), torch.tensor([0, 1, 2, 1])),
        (nn.MSELoss, torch.randn(4, 3, 2), torch.randn(4, 3, 2)),
        (nn.CrossEntropyLoss, torch.randn(4, 3, 5), torch.randint(0, 3, (4, 5))),
        (nn.BCEWithLogitsLoss, torch.randn(4), torch.rand(4)),
    ],
)
def test_equals_the_plain_criterion_where_samples_weigh_the_same(reduction, loss, output, target):
    plain = loss(reduction=reduction)
    assert torch.allclose(GhostCriterion(loss(reduction=reduction), reduction)(output, target), plain(output, target))


def test_backward_and_arithmetic_are_a_tensors_own():
    output = torch.randn(4, 3, requires_grad=True)
    loss = GhostCriterion(nn.CrossEntropyLoss())(output, torch.tensor([0, 1, 2, 1]))
    assert isinstance(loss, torch.Tensor) and isinstance(loss.item(), float)
    (loss * 2 + 1).backward()
    assert output.grad is not None


@pytest.mark.parametrize("flattened", [False, True])
def test_padding_of_one_sample_does_not_change_anothers_loss(flattened):
    """A mean over all tokens would divide every sample's loss by a count that depends on the others."""
    output = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    criterion = GhostCriterion(nn.CrossEntropyLoss(ignore_index=-100))

    def first_samples_gradient(second_target):
        target = torch.stack([torch.tensor([1, 2, -100, 3, 4]), second_target])
        if flattened:
            loss = criterion(output.reshape(10, 7), target.reshape(10), shape=(2, 5, 7))
        else:
            loss = criterion(output.transpose(1, 2), target)
        return torch.autograd.grad(loss, output)[0][0]

    full = first_samples_gradient(torch.tensor([1, 1, 1, 1, 1]))
    padded = first_samples_gradient(torch.tensor([1, -100, -100, -100, -100]))
    assert torch.equal(full, padded)
    own = nn.functional.cross_entropy(output[0], torch.tensor([1, 2, -100, 3, 4]), ignore_index=-100)
    assert torch.allclose(full, torch.autograd.grad(own, output)[0][0] / 2)


def test_a_sample_of_padding_only_is_zero_not_nan():
    target = torch.full((2, 3), -100)
    loss = GhostCriterion(nn.CrossEntropyLoss())(torch.randn(2, 5, 3), target)
    assert loss.item() == 0.0


def test_a_function_that_returns_one_loss_per_sample():
    def distance(a, b):
        return (a - b).abs().sum(1)

    assert GhostCriterion(distance)(torch.zeros(2, 3), torch.ones(2, 3)).item() == 3.0
    assert GhostCriterion(distance, "sum")(torch.zeros(2, 3), torch.ones(2, 3)).item() == 6.0


def test_the_criterion_is_left_as_it_was():
    criterion = nn.CrossEntropyLoss()
    wrapped = GhostCriterion(criterion)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        wrapped(torch.randn(2, 3), torch.tensor([7, 9, 1]))
    assert criterion.reduction == "mean"
    assert isinstance(wrapped, DPLossFastGradientClipping)


def test_errors():
    with pytest.raises(ValueError, match="'batchmean' and loss_reduction is 'mean'"):
        GhostCriterion(nn.KLDivLoss(reduction="batchmean"))
    with pytest.raises(ValueError, match="one loss per sample"):
        GhostCriterion(lambda a, b: (a - b).mean())(torch.zeros(2), torch.ones(2))
