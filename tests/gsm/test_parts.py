"""Trainings that call parts of the wrapped model one by one: gradients are those of the loop, and what is computed
between the parts, or inside of one, must not mix samples."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gsm import GradSampleModule, make_private
from gsm.layout import SamplesInfluenceEachOther
from tests.compare import MODES, captured
from tests.gsm.training import dataset
from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss


class Block(nn.Module):
    """A part with a forward of its own."""

    def __init__(self, centred=False, remembers=False, checkpointed=False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.centred, self.remembers, self.checkpointed = centred, remembers, checkpointed

    def run(self, x):
        h = self.first(x).tanh()
        return self.second(h - h.mean(0) if self.centred else h)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


class Pictures(nn.Module):
    """A recurrent part whose batch is the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.cell(x.view(len(x), 2, 3).transpose(0, 1))[0][-1])


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Autoencoder(nn.Module):
    """`encode`, `decode`, and a forward that does both."""

    def __init__(self, encoder, middle=nn.Tanh):
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Sequential(nn.Linear(4, 5), middle(), nn.Linear(5, 6))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        return self.decode(self.encode(x))


ENCODERS = {"block": Block, "checkpointed": lambda: Block(checkpointed=True), "recurrent": Pictures}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_of_the_loop(encoder, mode, recwarn):
    torch.manual_seed(0)
    model = Autoencoder(ENCODERS[encoder]()).double()
    original = copy.deepcopy(model)
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    for size in (5, 3, 8):
        x = torch.randn(size, 6, dtype=torch.float64)
        projection_loss(wrapped.decode(wrapped.encode(x))).backward()
        assert_close_per_sample(captured(model), per_sample_loop(original, x))
        wrapped.set_grad_sample_to_none()
        wrapped._tape.discard(wrapped._tape.params)
    assert not [w for w in recwarn.list if issubclass(w.category, UserWarning)]


def variational(model, x, y):
    z = model.encode(x)
    mean, log_std = z[:, :2].repeat(1, 2), z[:, 2:].repeat(1, 2)
    out = model.decode(mean + log_std.exp() * torch.randn_like(mean))
    divergence = (mean.square() + (2 * log_std).exp() - 2 * log_std).sum(1)
    return ((out - x).square().sum(1) + divergence).mean()


def twice(model, x, y):
    z = model.encode(x)
    return F.mse_loss(model.decode(z), x) + F.mse_loss(model.decode(z.detach() * 2), x)


def concatenated(model, x, y):
    """Two looks at each record, in one call of a part."""
    z = model.encode(x)
    a, b = model.decode(torch.cat([z, z * 2])).chunk(2)
    return F.mse_loss(a, x) + F.mse_loss(b, x)


def again(model, x, y):
    for _ in range(3):
        x = model.decode(model.encode(x))
    return x.square().mean()


RIGHT = {"variational": variational, "a part twice": twice, "in turn": again}


def step(loss, mode="ghost", sizes=(8, 5, 7, 9), encoder=Block, middle=nn.Tanh):
    torch.manual_seed(0)
    model = GradSampleModule(Autoencoder(encoder(), middle), mode=mode)
    for size in sizes:
        x = torch.randn(size, 6)
        loss(model, x, (x[:, 0] > 0).long()).backward()
        model.set_grad_sample_to_none()
        model._tape.discard(model._tape.params)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name, recwarn):
    for mode in MODES:
        step(RIGHT[name], mode)
    assert not recwarn.list


def between(mix):
    return lambda model, x, y: F.mse_loss(model.decode(mix(model.encode(x))), x)


MIXED_BETWEEN = {
    "centred": lambda z: z - z.mean(0),
    "centred by a constant": lambda z: z - z.detach().mean(0),
    "attention over the batch": lambda z: (z @ z.T).softmax(1) @ z,
    "of the neighbour": lambda z: z.roll(1, 0),
    "without gradients": lambda z: (z / z.std()).detach(),
    "relative to the largest": lambda z: z / z.abs().max(),
}


@pytest.mark.parametrize("name", MIXED_BETWEEN)
def test_what_mixes_samples_between_parts_is_refused_at_once(name):
    with pytest.raises(SamplesInfluenceEachOther, match=r"decoder was given a tensor of shape \(8, 4\) in which a"):
        step(between(MIXED_BETWEEN[name]))


def test_what_each_sample_does_with_its_own_passes(recwarn):
    for own in (lambda z: F.layer_norm(z, (4,)), lambda z: z / z.detach().norm(dim=1, keepdim=True), F.dropout):
        step(between(own))
    assert not recwarn.list


def test_every_pair_between_parts():
    for i, j in ((0, 7), (7, 0), (3, 4)):

        def paired(z, i=i, j=j):
            out = z.clone()
            out[i] = out[i] + 0.1 * z[j]
            return out

        with pytest.raises(SamplesInfluenceEachOther, match="decoder was given"):
            step(between(paired), sizes=(8,))


def test_a_part_that_mixes_inside_is_refused_like_a_model():
    """Each by itself, though what they are given is alike."""
    with pytest.raises(SamplesInfluenceEachOther, match="encoder"):
        step(between(lambda z: z), encoder=lambda: Block(centred=True))
    with pytest.raises(SamplesInfluenceEachOther, match="decoder"):
        step(between(lambda z: z), middle=Centred)


def test_no_derivatives_are_taken_through_parts():
    """That would be a second backward of the model's own."""
    backwards = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            backwards.append(len(g))
            return g

    class Middle(nn.Module):
        def forward(self, x):
            return Watched.apply(x)

    model = GradSampleModule(Autoencoder(Block(), Middle), mode="ghost")
    x = torch.randn(8, 6)
    loss = variational(model, x, None)
    backwards.clear()
    loss.backward()
    assert backwards == [8]


@pytest.mark.parametrize("name", ["of the last part", "of the first part", "detached", "by labels"])
def test_losses_of_parts_are_looked_at(name):
    def loss(model, x, y):
        z = model.encode(x)
        out = model.decode(z)
        plain = F.mse_loss(out, x)
        if name == "of the last part":
            return plain.sqrt()
        if name == "of the first part":
            return plain + (z @ z.T).square().mean()
        if name == "detached":
            return plain / z.detach().square().sum() + z.square().mean()
        return ((out - x).square().sum(1) * (y == 0)).sum() / (y == 0).sum().clamp(min=1)

    with pytest.raises(SamplesInfluenceEachOther, match="compares samples|normalised over the batch"):
        step(loss)


class Skips(nn.Module):
    """A decoder that adds what the encoder left on the model: it runs on that batch only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), Added()

    def decode(self, z):
        return self.second(z)

    def forward(self, x):
        self.second.kept = self.first(x)
        return self.second.kept.tanh()


class Added(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.kept = None

    def forward(self, z):
        return super().forward(z) + self.kept


def test_a_part_that_runs_on_one_batch_only_is_said():
    model = GradSampleModule(Skips(), mode="ghost")
    x = torch.randn(6, 6)
    z = model(x)
    with pytest.warns(UserWarning, match="second was called by itself and could not be run on a few samples alone"):
        out = model.decode(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out.square().mean().backward()
    assert model.per_sample_gradient_norms.shape == (6,)


def test_a_part_without_anything_to_train_is_called_as_ever():
    model = GradSampleModule(Autoencoder(Block()), mode="ghost")
    step_of = between(lambda z: z)
    x = torch.randn(6, 6)
    step_of(model, x, None).backward()
    model.set_grad_sample_to_none()
    model._module.decoder.requires_grad_(False)
    step_of(model, x, None).backward()
    assert model.per_sample_gradient_norms.shape == (6,)


def test_a_cell_called_many_times_is_looked_at_in_its_first_calls(monkeypatch):
    from gsm import loss_compare

    looked, look = [], loss_compare.mixed_inputs
    monkeypatch.setattr(loss_compare, "mixed_inputs", lambda *args: looked.append(1) or look(*args))
    model = GradSampleModule(nn.Sequential(nn.Linear(3, 3)), mode="ghost")
    for _ in range(2):
        h = torch.randn(5, 3)
        for _ in range(30):
            h = model(h.tanh())
        h.square().mean().backward()
        model.set_grad_sample_to_none()
        model._tape.discard(model._tape.params)
    assert len(looked) == 32


def test_made_private():
    """The contract's loop with a variational autoencoder whose parts are called one by one."""
    torch.manual_seed(0)
    model = Autoencoder(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=20)
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            optimizer.zero_grad()
            variational(model, x, y).backward()
            optimizer.step()
    assert optimizer.releases == len(loader)


def test_a_part_that_turns_out_to_be_of_a_whole_is_an_error():
    """The plan may change while a part runs for the first time."""
    model = GradSampleModule(Autoencoder(Block()), mode="hooks")
    plan = model._captured
    part = plan.capture.forwards["encoder.first"]
    plan.subtrees["encoder"] = "functorch"
    plan._rebuild()
    with pytest.raises(RuntimeError, match=r"encoder\.first was called by itself, but .* call that one, or the model"):
        part(torch.randn(5, 6))
