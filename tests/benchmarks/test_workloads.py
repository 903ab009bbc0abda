"""The table of workloads: reproducible problems, and a per-sample loss whose mean is the loss."""

import pytest
import torch

from benchmarks import models, resnet
from benchmarks.workloads import ACCELERATOR, CPU, SIZES, WORKLOADS

PLAIN = [w.name for w in WORKLOADS.values() if w.make.__name__ not in ("_gpt2", "_vit")]


def test_names_are_unique_and_sizes_complete():
    assert len(WORKLOADS) == len(CPU) + len(ACCELERATOR)
    for row in WORKLOADS.values():
        assert set(getattr(row, SIZES[0])) - {"vocab"} <= set(getattr(row, SIZES[1])) | {"patch", "classes"}, row.name


@pytest.mark.parametrize("name", PLAIN)
def test_the_mean_of_the_per_sample_losses_is_the_loss(name):
    problem = WORKLOADS[name].problem("quick", dtype="float64")
    logits = problem.model(problem.inputs)
    each = problem.per_sample_loss(logits, problem.targets)
    assert each.shape == (len(problem.inputs),)
    torch.testing.assert_close(each.mean(), problem.loss(logits, problem.targets))


def test_problems_are_reproducible():
    a, b = (WORKLOADS["lm"].problem("quick") for _ in range(2))
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_sizes_can_be_changed_one_at_a_time():
    assert len(WORKLOADS["classifier"].problem("quick", batch=7).inputs) == 7


def test_the_sizes_that_are_reported():
    def parameters(model):
        return sum(p.numel() for p in model.parameters())

    assert parameters(WORKLOADS["mlp"].problem().model) == 1_863_690
    assert parameters(models.mnist_net()) == 26_010  # Opacus's example
    assert parameters(resnet.resnet50()) == 25_557_032  # torchvision's resnet50


def test_lora_trains_only_adapters_and_head():
    names = [n for n, p in WORKLOADS["lora"].problem("quick").model.named_parameters() if p.requires_grad]
    assert names and all(n.startswith("head.") or n.endswith(("down.weight", "up.weight")) for n in names)
    assert not any(".base." in n for n in names)
