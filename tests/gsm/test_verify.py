"""`verify` on right models, and on models and samplers with planted faults: it has to find each, and name it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule as OpacusModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import grad_samplers
from grad_samplers import register_grad_sampler, register_norm_sampler, register_weighted_sampler
from gsm.verify import verify
from gsm.verify_influence import influence
from gsm.verify_samples import Inputs
from gsm.wrapper import GradSampleModule


class Scale(nn.Module):
    """`(1 + offset) * weight * x`: a layer that nobody knows, for samplers that are right or wrong."""

    def __init__(self, features: int, offset: float = 0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(features)), offset

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.offset) * self.weight * x


def scale_gradients(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict:
    x = activations[0]
    return {layer.weight: ((1 + layer.offset) * x * backprops).reshape(len(x), -1, x.shape[-1]).sum(1)}


@contextmanager
def registered(grad=scale_gradients, norm=None, weighted=None) -> Iterator[None]:
    register_grad_sampler(Scale)(grad)
    if norm:
        register_norm_sampler(Scale)(norm)
    if weighted:
        register_weighted_sampler(Scale)(weighted)
    try:
        yield
    finally:
        grad_samplers.unregister(Scale)


def network(offset: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Scale(5, offset), nn.Linear(5, 3))


class Keywords(nn.Module):
    """Several inputs by keyword, outputs in a dict, a table that has no batch dimension."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(ids) + positions
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.out(pooled), "hidden": hidden}


RIGHT = {
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 3)),
        torch.randn(4, 2, 5, 5),
    ),
    "keywords": lambda: (
        Keywords(),
        {"ids": torch.randint(0, 7, (3, 5)), "mask": torch.ones(3, 5), "positions": torch.randn(1, 5, 4)},
    ),
    "hidden dropout": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)),
    "as many samples as steps": lambda: (nn.LSTM(4, 3, batch_first=True), torch.randn(5, 5, 4)),
    "float64": lambda: (network().double(), torch.randn(4, 4, dtype=torch.float64)),
    "half precision": lambda: (nn.Linear(4, 2).bfloat16(), torch.randn(4, 4, dtype=torch.bfloat16)),
    "two positional inputs": lambda: (nn.Bilinear(3, 4, 2), (torch.randn(4, 3), torch.randn(4, 4))),
    "statistics that stay": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval(),
        torch.randn(4, 4),
    ),
    "frozen layers": lambda: (nn.Sequential(nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 2)), torch.randn(4, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str):
    model, inputs = RIGHT[name]()
    report = verify(model, inputs)
    assert report.ok, report
    assert {c.parameter for c in report.checks} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {c.mode for c in report.checks} == {"hooks", "ghost"}
    assert str(report).startswith("verify: OK")


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto", "functorch", "loop"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_wrapped_models_in_their_own_mode(mode: str, reduction: str):
    model = GradSampleModule(network(), mode=mode, loss_reduction=reduction)
    report = verify(model, torch.randn(3, 4))
    assert report.ok, report
    assert report.modes == (mode,)


def test_the_batch_may_be_the_second_dimension():
    model = GradSampleModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), batch_first=False)
    assert verify(model, torch.randn(6, 4, 3)).ok


def test_packed_sequences():
    report = verify(nn.LSTM(3, 4), pack_sequence([torch.randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False))
    assert report.ok, report


def doubles_some(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict:
    gradient = scale_gradients(layer, activations, backprops)[layer.weight]
    return {layer.weight: torch.where(activations[0][:, :1] > 0.5, 2 * gradient, gradient)}


def test_a_wrong_sampler_is_named_with_its_samples():
    model = network()
    with torch.no_grad():  # only sample 1 gets there with a first feature above 0.5
        model[0].weight.copy_(torch.eye(5, 4))
        model[0].bias.zero_()
    x = torch.randn(4, 4)
    x[:, 0] = torch.tensor([-1.0, 2.0, 0.1, 0.2])
    with registered(doubles_some):
        report = verify(model, x)
    assert not report.ok
    (problem,) = report.problems
    assert problem.startswith("2.weight (Scale, sampler: registered for Scale)")
    assert "wrong per-sample gradient for sample 1," in problem
    wrong = [c for c in report.checks if not c.ok]
    assert {c.parameter for c in wrong} == {"2.weight"}
    assert all(c.error == pytest.approx(1.0, rel=0.01) for c in wrong if c.reading == "gradient")
    assert "NOT OK" in str(report) and problem in str(report)


def test_a_sampler_that_ignores_an_option():
    def ignores_offset(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict:
        return {layer.weight: activations[0] * backprops}

    with registered(ignores_offset):
        assert verify(network(offset=0.0), torch.randn(4, 4)).ok
        report = verify(network(offset=0.25), torch.randn(4, 4))
    assert [p.split(" ")[0] for p in report.problems] == ["2.weight"]
    assert max(c.error for c in report.checks if c.reading == "gradient") == pytest.approx(0.2, rel=0.01)


def test_a_wrong_norm_sampler():
    def norms(layer: Scale, activations: list[Tensor], backprops: Tensor) -> dict:
        return {layer.weight: 0.9 * scale_gradients(layer, activations, backprops)[layer.weight].norm(dim=1)}

    with registered(norm=norms):
        report = verify(GradSampleModule(network(), mode="ghost"), torch.randn(4, 4))
    (problem,) = report.problems
    assert "2.weight" in problem and "wrong per-sample gradient norm" in problem and "0.1" in problem


def test_a_wrong_weighted_sampler():
    def sums(layer: Scale, activations: list[Tensor], backprops: Tensor, weights: Tensor) -> dict:
        gradient = scale_gradients(layer, activations, backprops)[layer.weight]
        return {layer.weight: (weights.round() @ gradient)}

    with registered(weighted=sums):
        report = verify(GradSampleModule(network(), mode="ghost"), torch.randn(4, 4))
    (problem,) = report.problems
    assert "2.weight" in problem and "wrong weighted sum" in problem


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden - hidden.mean(0))


MIXING = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), r"1 \(BatchNorm1d\)"),
    "2d batch norm, which runs on one sample too": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()),
        r"2 \(BatchNorm2d\)",
    ),
    "batch norm without parameters": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)),
        r"1 \(BatchNorm1d\)",
    ),
    "centered over the batch": (Centered, r"second \(Linear\)"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found_where_it_first_shows(name: str):
    make, where = MIXING[name]
    report = verify(make(), torch.randn(4, 4))
    assert not report.ok
    with pytest.raises(AssertionError, match=f"Samples influence each other, first seen in the output of {where}"):
        raise AssertionError(str(report))


def test_values_that_depend_on_the_number_of_samples():
    class Divides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / len(x)

    report = verify(Divides(4, 2), torch.randn(4, 4))
    assert not report.ok
    assert any("depend on the number of samples" in p for p in report.problems)


def test_a_loss_that_counts_padding_over_the_whole_batch():
    model, x = nn.Linear(5, 3), torch.randn(4, 6, 5)
    targets = torch.randint(0, 3, (4, 6))

    def token_mean(out: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), targets[rows].flatten(), ignore_index=-100)

    assert verify(model, x, loss=token_mean).ok
    targets[0, 2:] = -100
    report = verify(model, x, loss=token_mean)
    assert not report.ok
    assert "neither the mean" in report.problems[0] and "Padding" in report.problems[0]

    def sample_mean(out: Tensor, rows: Tensor) -> Tensor:
        losses = F.cross_entropy(out.transpose(1, 2), targets[rows], ignore_index=-100, reduction="none")
        return (losses.sum(1) / (targets[rows] != -100).sum(1)).mean()

    assert verify(model, x, loss=sample_mean).ok


def test_a_sum_where_the_wrapper_was_told_mean():
    model, x, loss = nn.Linear(4, 2), torch.randn(4, 4), lambda out: out.square().sum()
    assert verify(model, x, loss=loss).ok  # a plain model: either is fine
    assert verify(GradSampleModule(model, loss_reduction="sum"), x, loss=loss).ok
    report = verify(GradSampleModule(nn.Linear(4, 2), loss_reduction="mean"), x, loss=loss)
    assert "The loss is the sum" in report.problems[0] and "loss_reduction='mean'" in report.problems[0]


class Drawing(nn.Module):
    """Draws in one of the ways models do, sample by sample; ``wrong`` lets a random neighbour in."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.first, self.second = way, nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.first(x).chunk(2, 1)
        if self.way == "posterior":
            return self.second(mean + spread.exp() * torch.randn_like(mean))
        if self.way == "stochastic depth":
            return self.second(mean + spread * torch.bernoulli(torch.full((len(x), 1), 0.8)) / 0.8)
        if self.way == "masked":
            return self.second(mean * (torch.rand(len(x), 3) > 0.4) + spread)
        if self.way == "python":
            return self.second(mean + spread * random.random())
        return self.second(mean + 0.1 * spread[torch.randperm(len(x))])


@pytest.mark.parametrize("way", ["posterior", "stochastic depth", "masked", "python"])
def test_random_forwards_are_compared_with_the_same_numbers_for_every_sample(way):
    report = verify(Drawing(way), torch.randn(4, 4))
    assert report.ok, report
    assert report.checks and "one and the same for every sample" in str(report)


def test_a_wrong_sampler_shows_behind_random_numbers():
    def double(layer, activations, backprops):
        return {p: 2 * g for p, g in scale_gradients(layer, activations, backprops).items()}

    for grad, right in ((scale_gradients, True), (double, False)):
        with registered(grad):
            assert verify(nn.Sequential(Drawing("posterior"), Scale(2)), torch.randn(4, 4)).ok is right


def test_a_random_neighbour_is_a_problem():
    report = verify(Drawing("shuffled"), torch.randn(4, 4))
    assert "Samples influence each other" in report.problems[0]


def test_forwards_that_cannot_be_held_still_are_not_compared():
    generator = numpy.random.default_rng(0)

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(generator.random())

    report = verify(Noisy(4, 2), torch.randn(4, 4))
    assert not report.ok and "cannot be held still" in report.problems[0]


def test_what_was_verified_stays_untouched():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)))
    wrapped(torch.randn(3, 4)).mean().backward()
    for one in (model, wrapped):
        state = {k: v.clone() for k, v in one.state_dict().items()}
        held = [getattr(p, "grad_sample", None) for p in one.parameters()]
        rng, python = torch.random.get_rng_state(), random.getstate()
        verify(one, torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.random.get_rng_state(), rng) and random.getstate() == python
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
        assert all(getattr(p, "grad_sample", None) is g for p, g in zip(one.parameters(), held, strict=True))
        assert all(p.grad is None for p in one.parameters())
        assert all(m.training for m in one.modules())
    assert "forward" not in vars(model)


class Total(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return super().forward(x).sum()


@pytest.mark.parametrize(
    ("model", "inputs", "loss", "error", "match"),
    [
        (nn.Linear(4, 2), torch.randn(1, 4), None, ValueError, r"1 sample\(s\)"),
        (nn.Linear(4, 2), {"input": 3}, None, ValueError, "no tensor"),
        (nn.Linear(4, 2).requires_grad_(False), torch.randn(2, 4), None, ValueError, "no trainable parameter"),
        (nn.Linear(4, 2), torch.randn(2, 4), lambda out: out, ValueError, "must return a scalar"),
        (nn.Linear(4, 2), torch.randn(2, 4), lambda out: torch.zeros(()), ValueError, "not depend on any trainable"),
        (nn.Linear(4, 2), torch.randn(2, 4), lambda out: (out @ torch.ones(2, 3)).view(6).sum(), ValueError, "rows"),
        (OpacusModule(nn.Linear(4, 2)), torch.randn(2, 4), None, TypeError, "opacus.*pass the plain model"),
        (Total(), torch.randn(2, 4), None, ValueError, "No output of the model has an entry per sample.*pass loss="),
        (nn.Linear(4, 2), torch.randn(2, 5), None, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_what_cannot_be_verified(model, inputs, loss, error, match):
    with pytest.raises(error, match=match):
        verify(model, inputs, loss=loss)


class Cumulative(nn.Linear):
    """What runs along the batch reaches later samples only (or earlier ones, backwards)."""

    def __init__(self, backwards: bool):
        super().__init__(4, 2)
        self.backwards = backwards

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.flip(0).cumsum(0).flip(0) if self.backwards else x.cumsum(0)


@pytest.mark.parametrize("backwards", [False, True])
def test_influence_in_one_direction_is_found(backwards: bool):
    first = influence(Cumulative(backwards), Inputs(torch.randn(3, 4), True), 1e-4, torch.zeros(1, 2))
    assert len(first) == 1 and f"when only sample {2 if backwards else 0} was changed" in first[0]


class MixedBackward(nn.Module):
    """Forwards keep samples apart, the gradient of one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        h.register_hook(lambda g: g - g.mean(0))
        return self.second(h)


def test_a_backward_that_mixes_samples_is_found():
    report = verify(MixedBackward(), torch.randn(4, 3))
    assert not report.ok and "first.weight" in str(report)


class Tempered(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


def test_a_parameter_that_is_one_number_is_compared() -> None:
    """A learned temperature: its per-sample gradients are `[batch]`, which ended in an IndexError."""
    report = verify(Tempered(), torch.randn(4, 3))
    assert report.ok and "temperature" in {check.parameter for check in report.checks}, report
