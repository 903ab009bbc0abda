"""The probe: layouts from movement, not from sizes; samples that influence each other; nothing left behind."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsm.layout import Layout, SamplesInfluenceEachOther
from gsm.probe_buffers import Parameters, check_buffers
from gsm.shown import compare
from gsm.trial import sizes_for
from gsm.wrapper import GradSampleModule
from tests.compare import MODES, check


def test_layouts_are_told_by_what_moves() -> None:
    a, b = torch.arange(2 * 3.0), torch.arange(5 * 3.0)
    assert compare(a.view(2, 3), b.view(5, 3), 2, 5) == Layout(0)
    assert compare(a.view(2, 3).t(), b.view(5, 3).t(), 2, 5) == Layout(1)
    assert compare(torch.ones(3), torch.ones(3), 2, 5) is None
    rows, more = torch.randn(2, 4), torch.randn(5, 4)
    more[:2] = rows
    assert compare(rows.flatten(), more.flatten(), 2, 5) == Layout(0, "major")
    assert compare(rows.t().flatten(), more.t().flatten(), 2, 5) == Layout(0, "minor")


def test_probe_sizes_are_no_other_dimension_of_the_input() -> None:
    first, second = sizes_for([torch.zeros(4, 2, 5), torch.zeros(3)])
    assert len({first, second} | {2, 3, 4, 5}) == 6


class SequenceFirstInside(nn.Module):
    """Positions lead inside: only the probe can know, when there are as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x.transpose(0, 1))) * self.scale
        y = self.b(y.reshape(-1, 4)).view(x.shape[1], x.shape[0], 2)
        return y.transpose(0, 1)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch", "loop"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_as_many_positions_as_samples(mode: str, size: int) -> None:
    check(SequenceFirstInside(), torch.randn(size, 3, 4), mode=mode)
    check(SequenceFirstInside(), torch.randn(3, size, 4), mode=mode)


class Mixed(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "centred":
            h = h - h.mean(0)
        elif self.how == "functional batch norm":
            h = F.batch_norm(h, None, None, training=True)
        elif self.how == "softmax over the batch":
            h = h.softmax(0)
        elif self.how == "attention over the batch":
            h = (h @ h.t()).softmax(-1) @ h
        elif self.how == "neighbour":
            h = h + h.roll(1, 0)
        elif self.how == "largest":
            h = h / h.abs().amax()
        return self.b(h) if self.how != "output" else self.b(h) / self.b(h).abs().sum()


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize(
    "how",
    [
        "centred",
        "functional batch norm",
        "softmax over the batch",
        "attention over the batch",
        "neighbour",
        "largest",
        "output",
    ],
)
def test_influence_is_refused(how: str, size: int) -> None:
    with pytest.raises(ValueError, match="influence each other"):
        GradSampleModule(Mixed(how), mode="ghost")(torch.randn(size, 4))


class Counting(nn.Module):
    """Buffers, random numbers and dropout."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.drop(self.fc(x)), 0.3, self.training)


def test_the_probe_leaves_no_trace() -> None:
    torch.manual_seed(1)
    plain = Counting()
    wrapped = Counting()
    wrapped.load_state_dict(plain.state_dict())
    model = GradSampleModule(wrapped)
    x = torch.randn(6, 4)
    torch.manual_seed(2)
    expected, after = plain(x), torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.rand(3), after)
    assert wrapped.calls == 1 and wrapped.drop.training


def test_not_strict_lets_samples_mix() -> None:
    GradSampleModule(Mixed("centred"), strict=False)(torch.randn(4, 4)).sum().backward()


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class ByFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        q = super().forward(x)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5) + F.dropout(q) + F.alpha_dropout(q)


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


DROPPING = {
    "attention": lambda: SelfAttention(4, 2, dropout=0.5, batch_first=True),
    "function": lambda: ByFunction(4, 4),
    "recurrent": lambda: Recurrent(4, 4, num_layers=2, dropout=0.5, batch_first=True),
    "layer": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_no_influence_and_goes_on_as_if_nothing_had_been_tried(name: str) -> None:
    """Off while probing (or every value would change), on again afterwards, with the random numbers it had before."""
    plain = DROPPING[name]()
    x = torch.randn(3, 5, 4)
    torch.manual_seed(1)
    expected = plain(x)
    wrapped = GradSampleModule(plain)
    torch.manual_seed(1)
    out = wrapped(x)
    assert torch.equal(out, expected) or name == "recurrent"  # whose masks are drawn in another order
    assert not torch.equal(wrapped(x), wrapped(x))


class Shifted(nn.Module):
    """Every sample but the last sees the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(50, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        return self.fc(h + torch.cat([h[1:], 0 * h[:1]]))


class Centred(nn.Module):
    """The mean of the batch is taken off, which no scalar output shows: it is zero together and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - x.mean(0)) * self.p).sum()


class Averaged(nn.Module):
    def __init__(self, ids: bool, width: int) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(50, width) if ids else nn.Identity(), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        return self.fc(h + h.mean(0))


@pytest.mark.parametrize(
    "model, x",
    [
        (Shifted(), torch.arange(8).view(4, 2)),
        (Centred(), torch.randn(4, 3)),
        (Averaged(True, 3), torch.tensor([[3, 5, 8, 9]])),
        (Averaged(False, 1), torch.tensor([[2.0]])),
    ],
    ids=["neighbour", "inside", "one sample of ids", "one number"],
)
def test_influence_that_hardly_shows_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="Samples influence each other"):
        GradSampleModule(model)(x)


class Leading(nn.Module):
    """One record of the batch has a place of its own: every other sample is compared with it, or masked as it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.out = how, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "backwards inside":
            return self.out(self.fc(x.flip(0)).flip(0))
        if self.how == "output turned":
            return self.out(self.fc(x)).flip(0)
        h = self.fc(x)
        if self.how == "first":
            h = h - h[:1].detach()
        elif self.how == "last":
            h = h + h[-1:]
        elif self.how == "mask of the first":
            h = h * (x[0] > x[0].mean())
        elif self.how == "the one before":
            h = h + torch.cat([h[:1] * 0, h[:-1]])
        elif self.how == "the one after":
            h = h + torch.cat([h[1:], h[:1] * 0])
        elif self.how == "one that is large":
            h = h * (1 + (x.max() > 2))
        elif self.how == "taken off again":  # so that the output does not show it, but the gradient does
            after = torch.cat([h[1:], h[:1] * 0]).detach()
            return self.out(h + after) - F.linear(after, self.out.weight.detach())
        return self.out(h) / len(x) if self.how == "their number" else self.out(h)


LEADING = ["first", "last", "mask of the first", "backwards inside", "output turned", "the one before", "the one after"]
LEADING += ["one that is large", "taken off again", "their number"]


@pytest.mark.parametrize("how", LEADING)
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 4)], ids=["two rows", "three rows"])  # are tried
def test_the_first_and_the_last_sample_are_neighbours_too(how: str, shape: tuple[int, ...]) -> None:
    """They stand at the ends of both batches that are tried, so each of them has to be changed once."""
    torch.manual_seed(0)
    x = 0.9 + 0.1 * torch.rand(shape)
    with pytest.raises(ValueError, match="Samples influence each other"):
        GradSampleModule(Leading(how))(x)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Random(nn.Module):
    """Forwards that draw their own random numbers: each sample alone, or mixed by one more operation."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.a, self.b, self.times = how, nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(10, 4)
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "latent":  # a variational autoencoder's
            h = h + torch.randn_like(h) * (0.5 * h).exp()
        elif self.how == "times":  # a diffusion model's
            h = h + self.times(torch.randint(10, (len(x),)))
        elif self.how == "paths":  # stochastic depth of one's own
            h = x + h * h.new_empty(len(x), 1).bernoulli_(0.5)
        elif self.how == "rows":
            h = (h.unsqueeze(1) + torch.randn(len(x), 3, 4, dtype=x.dtype)).flatten(0, 1)
            return self.b(h).view(len(x), -1)
        elif self.how == "mean":
            h = h + torch.randn_like(h) - h.mean(0)
        elif self.how == "order":
            h = h[torch.randperm(len(x))] + h
        elif self.how == "largest":
            h = torch.rand_like(h) + h / h.detach().abs().max()
        elif self.how == "one in the middle":
            h = torch.rand_like(h) + h + h[(len(h) - 1) // 2 : (len(h) + 1) // 2].sum(0)
        elif self.how == "kept":
            self.last = h = h + torch.randn_like(h)
        elif self.how == "number":  # of the samples, and nothing else of them
            h = (h + torch.rand_like(h)) / len(x)
        elif self.how == "number of the output":
            return self.b(h + torch.rand_like(h)) * len(x)
        elif self.how == "number inside":
            return F.linear((h + torch.rand_like(h)) / len(x), self.b.weight) * len(x)
        elif self.how == "at random":
            h = h + h[(len(h) - 1) // 2 : (len(h) + 1) // 2].sum(0) * (torch.rand_like(h) - torch.rand_like(h))
        elif self.how == "number, by numpy":
            h = h / len(x) + numpy.random.rand()
        elif self.how == "rows by numpy":
            h = h * torch.as_tensor(numpy.random.rand(len(x), 1)).to(h)
        elif self.how == "masks by numpy":  # as of speech: sample by sample, twice
            for _ in range(2):
                masks = [numpy.random.choice(4, 2, replace=False) for _ in x]
                h = h.scatter(1, torch.tensor(numpy.stack(masks)), 0.0)
        elif self.how == "of one's own":
            h = h + torch.randn(h.shape, generator=self.generator, dtype=h.dtype)
        elif self.how == "slopes":
            h = torch.nn.functional.rrelu(h, training=True)
        elif self.how == "chosen":
            h = h + self.times(torch.multinomial(h.detach().softmax(-1), 2, replacement=True)).sum(1)
        elif self.how == "gumbel":
            h = torch.nn.functional.gumbel_softmax(h)
        elif self.how == "parts":  # which are left out, the same for all
            h = h[:, torch.randperm(4)] + h
        elif self.how == "counts":
            h = h + torch.poisson(2 * h.detach().exp()) * torch.distributions.Gamma(h.exp(), 1.0).rsample()
        elif self.how == "python":
            h = h * (2 + random.random()) + numpy.random.rand()
        return self.b(h)


MIXING = ["mean", "order", "largest", "one in the middle", "at random"]
MIXING += ["number", "number inside", "number of the output", "number, by numpy"]
ALONE = ["latent", "times", "paths", "rows", "slopes", "chosen", "gumbel", "parts", "python", "of one's own"]
ALONE += ["counts", "rows by numpy", "masks by numpy"]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("how", ALONE)
def test_random_numbers_are_no_influence(how: str, mode: str) -> None:
    """The truth is ordinary autograd of each sample's loss through the whole batch's forward, same random numbers."""
    model, x = Random(how).double(), torch.randn(5, 4, dtype=torch.float64)
    params = list(model.parameters())

    def seed() -> None:
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)
        model.generator.manual_seed(3)

    seed()
    losses = model(x).pow(2).sum(1)
    each = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    norms = [sum(g.pow(2).sum() for g in grads if g is not None).sqrt() for grads in each]
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    seed()  # the probe leaves the random state as it was
    wrapped(x).pow(2).sum().backward()
    torch.testing.assert_close(wrapped.per_sample_gradient_norms, torch.stack(norms), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "loop"])
@pytest.mark.parametrize("how", MIXING)
def test_random_numbers_hide_no_influence(how: str, mode: str) -> None:
    with pytest.raises(SamplesInfluenceEachOther):
        GradSampleModule(Random(how), mode=mode)(torch.randn(5, 4))


def test_random_numbers_are_no_state() -> None:
    GradSampleModule(Random("kept"))(torch.randn(5, 4)).sum().backward()


@pytest.mark.parametrize("mode", ["functorch", "loop"])
@pytest.mark.parametrize("how", ALONE)
def test_random_numbers_run_in_subtrees(how: str, mode: str) -> None:
    wrapped = GradSampleModule(Random(how), mode=mode)
    wrapped(torch.randn(5, 4)).pow(2).sum().backward()
    assert all(p.grad_sample.shape == (5, *p.shape) for p in wrapped._module.b.parameters())


def test_random_numbers_go_on_as_if_nothing_had_been_tried() -> None:
    plain, x = Noisy(3, 2), torch.randn(4, 3)
    torch.manual_seed(1)
    expected = plain(x)
    wrapped = GradSampleModule(plain, strict=False)
    torch.manual_seed(1)
    assert torch.equal(wrapped(x), expected)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1), nn.GELU()])
def test_the_probes_graphs_are_freed(activation):
    """Operations that save their own result made a cycle that nothing could collect."""

    def nodes() -> int:
        gc.collect()
        return sum(type(x).__name__ == "TapBackward" for x in gc.get_objects())

    before = nodes()
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 2)), mode="ghost")
    wrapped(torch.randn(6, 4))
    assert nodes() == before


class Remembers(nn.Module):
    """Leaves its output for the next forward, which may or may not use it."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.fc, self.uses, self.state = nn.Linear(4, 4), uses, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.uses and self.state is not None:
            y = y + self.state.detach().mean(0)
        self.state, self.last = y, y.detach()
        return y


def test_a_state_for_the_next_batch_is_refused() -> None:
    with pytest.raises(SamplesInfluenceEachOther, match=r"what the forward before left on it \(0.last, 0.state\)"):
        GradSampleModule(nn.Sequential(Remembers(True)))(torch.randn(5, 4))


def test_what_nobody_uses_may_stay_and_the_probe_takes_its_own_away() -> None:
    model = Remembers(False)
    wrapped = GradSampleModule(model)
    wrapped(torch.randn(5, 4)).sum().backward()
    assert model.state.shape == (5, 4) and model.fc.weight.grad_sample.shape == (5, 4, 4)
    with pytest.raises(SamplesInfluenceEachOther):
        GradSampleModule(Remembers(True))(torch.randn(5, 4))
    refused = Remembers(True)
    wrapped = GradSampleModule(refused)
    with pytest.raises(SamplesInfluenceEachOther):
        wrapped(torch.randn(5, 4))
    assert refused.state is None and not hasattr(refused, "last")


class OwnDropout(nn.Dropout):
    """Draws its mask itself: only its `training` says that it is off."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 1 - self.p)) if self.training else x


def test_a_dropout_layer_of_ones_own_is_off_while_probing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), OwnDropout(0.5), nn.Linear(4, 4))
    GradSampleModule(model)(torch.randn(5, 4)).sum().backward()
    assert model[1].training


class Replaces(nn.Linear):
    """Its forward puts another tensor in the buffer's place."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen.clone()
        return super().forward(x)


def test_looking_at_buffers_puts_the_same_tensors_back() -> None:
    model = Replaces()
    before = model.seen
    check_buffers(model, lambda values: model(*values[0]), ((torch.randn(3, 4),), {}))
    assert model.seen is before


class Counts(nn.Linear):
    """Counts its calls in a frozen parameter: what it writes does not depend on the data."""

    def __init__(self, replaces: bool) -> None:
        super().__init__(4, 2)
        self.calls, self.replaces = nn.Parameter(torch.zeros(()), requires_grad=False), replaces

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.calls = nn.Parameter(self.calls + 1, requires_grad=False)
        else:
            self.calls.data.add_(1)
        return super().forward(x)


@pytest.mark.parametrize("replaces", [False, True])
def test_looking_at_parameters_puts_them_back(replaces: bool) -> None:
    model = Counts(replaces)
    before, marks = model.calls, Parameters(model)
    model(torch.randn(3, 4))
    held = model.calls
    check_buffers(model, lambda values: model(*values[0]), ((torch.randn(3, 4),), {}), marks.written())
    assert model.calls is held and model.calls.item() == 1 and (held is before) != replaces


class Dropping(nn.Module):
    """Dropout of some kind, and values divided by ``number`` or by the number of samples."""

    def __init__(self, how: str, number: int | None = None):
        super().__init__()
        self.how, self.a, self.drop = how, nn.Linear(4, 4), (OwnDropout if how == "own layer" else nn.Dropout)(0.5)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.number, self.calls = number, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = x / (self.number or len(x))
        if self.how in ("layer", "own layer"):
            h = self.drop(h)
        elif self.how == "function":
            h = F.dropout(h, 0.5, self.training)
        elif self.how == "attention":
            h = self.attention(h.unsqueeze(1), h.unsqueeze(1), h.unsqueeze(1), need_weights=False)[0].squeeze(1)
        else:
            p = 0.5 if self.training else 0.0
            h = F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 2)] * 3, dropout_p=p).flatten(1)
        return self.a(h)


DROPOUTS = ["layer", "own layer", "function", "attention", "attention as a function"]


@pytest.mark.parametrize("how", DROPOUTS)
def test_dropout_hides_no_dependence_on_the_number_of_samples(how: str) -> None:
    with pytest.raises(SamplesInfluenceEachOther):
        GradSampleModule(Dropping(how))(torch.randn(5, 4))


@pytest.mark.parametrize("how", DROPOUTS)
def test_dropout_is_off_while_probing(how: str) -> None:
    """A model without random numbers is probed with fewer forwards, and what they show is known for certain."""
    models = Dropping(how, 3), Dropping(how, 3).eval()
    for model in models:
        GradSampleModule(model)(torch.randn(5, 4))
    assert models[0].calls == models[1].calls


@dataclass
class Given:
    y: Any
    aux: Any


OUTPUTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "tuple": lambda model, y, aux: (y, aux),
    "in a dict": lambda model, y, aux: (y, {"losses": {"aux": aux}}),
    "in a list": lambda model, y, aux: (y, [aux, aux]),
    "in a dataclass": lambda model, y, aux: Given(y, [aux]),
    "in an object": lambda model, y, aux: SimpleNamespace(y=y, aux=aux),
    "of one entry": lambda model, y, aux: (y, aux.reshape(1)),
    "expanded": lambda model, y, aux: (y, aux.expand(len(y))),
    "left on the model": lambda model, y, aux: (setattr(model, "aux", aux), y)[1],
}


class Router(nn.Module):
    """An auxiliary value beside the output, of the batch or of its samples."""

    def __init__(self, out: Callable[[Any, Tensor, Tensor], Any], of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.a, self.b, self.out, self.of = nn.Linear(3, 4), nn.Linear(3, 2), out, of

    def forward(self, x: Tensor) -> Any:
        return self.out(self, self.b(x), self.of(self.a(x).softmax(1)))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("form", OUTPUTS)
def test_an_auxiliary_loss_over_the_batch_is_refused_wherever_it_is(form: str, mode: str) -> None:
    model = Router(OUTPUTS[form], lambda load: load.mean(0).square().sum())
    with pytest.raises(SamplesInfluenceEachOther):
        GradSampleModule(model, mode=mode)(torch.randn(5, 3))


@pytest.mark.parametrize("of", [lambda load: load.mean(0), lambda load: load.t() @ load], ids=["load", "Gram matrix"])
def test_a_value_of_the_batch_without_a_batch_dimension_is_refused(of: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(SamplesInfluenceEachOther, match="has no batch dimension, but depends on the samples"):
        GradSampleModule(Router(OUTPUTS["tuple"], of))(torch.randn(5, 3))
    GradSampleModule(Router(OUTPUTS["tuple"], lambda load: of(load).detach()))(torch.randn(5, 3))


@pytest.mark.parametrize("form", [form for form in OUTPUTS if form != "expanded"])
def test_a_mean_of_the_samples_own_values_is_fine(form: str) -> None:
    GradSampleModule(Router(OUTPUTS[form], lambda load: load.square().sum(1).mean()))(torch.randn(5, 3))


def test_what_depends_on_parameters_alone_needs_no_batch_dimension() -> None:
    model = Router(OUTPUTS["tuple"], lambda load: load.sum(1))
    model.out = lambda model, y, aux: (y, model.a.weight.exp())
    with pytest.raises(RuntimeError, match="without combining it"):  # at the backward, or as soon as it is known
        out = GradSampleModule(model)(torch.randn(5, 3))
        (out[0].sum() + out[1].sum()).backward()


class Mixture(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return torch.distributions.Normal(y - y.mean(0), 1.0)


def test_samples_that_mix_inside_a_distribution_are_seen() -> None:
    with pytest.raises(SamplesInfluenceEachOther):
        GradSampleModule(Mixture(3, 2))(torch.randn(5, 3))


class Opaque(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return lambda: y


def test_an_output_in_which_nothing_is_found_is_refused() -> None:
    with pytest.raises(ValueError, match="returned a function, in which no tensor was found"):
        GradSampleModule(Opaque(3, 2))(torch.randn(5, 3))


class RandomLoss(nn.Linear):
    """A loss of its own, the mean of its samples', with random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + torch.randn(len(x), self.out_features)).square().sum(1).mean()


def test_a_mean_loss_with_random_numbers_is_the_mean_of_its_samples() -> None:
    GradSampleModule(RandomLoss(3, 2))(torch.randn(5, 3)).backward()


class Factors(nn.Module):
    """Users and items in one table of indices, of different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, 3), nn.Embedding(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0].long()) * self.items(x[:, 1].long())).sum(1)


class Likelihood(nn.Linear):
    """Takes probabilities only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.binary_cross_entropy(super().forward(x).sigmoid(), x, reduction="none").sum(1)


class Packed(nn.Module):
    """Wants the longest sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 3), nn.GRU(3, 3, batch_first=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True)
        return self.cell(packed)[1][0]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 32])
@pytest.mark.parametrize("kind", ["indices", "indices as floats", "probabilities", "zeros and ones", "sorted lengths"])
def test_samples_are_tried_that_the_model_can_take(kind: str, size: int) -> None:
    torch.manual_seed(size)
    x = torch.stack([torch.randint(20, 50, (size,)), torch.randint(4, (size,))], 1)
    model: nn.Module = Factors() if "indices" in kind else Packed() if "lengths" in kind else Likelihood(3, 3)
    if kind == "sorted lengths":
        args: tuple[Tensor, ...] = torch.randint(9, (size, 7)), torch.randint(1, 8, (size,)).sort(descending=True)[0]
    elif "indices" in kind:
        args = (x.float() if "floats" in kind else x,)
    else:
        args = (torch.rand(size, 3).round() if "ones" in kind else torch.rand(size, 3),)
    wrapped = GradSampleModule(model)
    wrapped(*args).sum().backward()
    assert wrapped.per_sample_gradient_norms.shape == (size,)


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    with pytest.raises(IndexError):
        GradSampleModule(Factors())(torch.full((4, 2), 20))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_power_iteration_that_goes_on_is_no_influence(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 8, 3)), nn.Flatten(), nn.Linear(8, 1))
    GradSampleModule(model)(torch.randn(4, 3, 5, 5)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16])
def test_frozen_parameters_may_be_of_any_type(dtype):
    """Packed weights have no norm by which a change would show; nothing is asked of them."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ (self.packed.real if self.packed.is_complex() else self.packed.float()))

    model, x = GradSampleModule(Packed()), torch.randn(3, 4)
    model(x).sum().backward()
    expected = 3 * x.sum(1).view(3, 1, 1).expand(3, 2, 4)  # a mean's share of 1/3 is undone
    torch.testing.assert_close(model.out.weight.grad_sample, expected)


class Scaled(nn.Linear):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__(3, 4)
        scale = torch.randn(4, 4)
        self.register_buffer("scale", scale.to_sparse() if sparse else scale)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h @ self.scale if h.dim() > 2 or not self.scale.is_sparse else torch.sparse.mm(self.scale, h.t()).t()


def test_another_kind_of_input_leaves_the_forward_before_its_buffers() -> None:
    """They were put back by writing to them, and the backward of the forward before was refused."""
    model = GradSampleModule(Scaled())
    (model(torch.randn(4, 3)).sum() + model(torch.randn(4, 2, 3)).sum()).backward()
    assert all(p.grad_sample.shape == (4, *p.shape) for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_sparse_buffers(mode: str) -> None:
    """A graph's adjacency, say: it has no storage to look at."""
    check(Scaled(sparse=True), torch.randn(4, 3), mode=mode)


class Segments(nn.Module):
    """Positions of one segment after the other meet a parameter: there are as many as the probe has samples, once."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.inner, self.positions, self.length = nn.Linear(4, 4), nn.Linear(4, 4), length

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 4]
        out, table = [], torch.linspace(0, 1, 16).view(4, 4).to(x)
        for n, segment in enumerate(self.inner(x).split(self.length, 1)):
            r = self.positions(table[: self.length + n])
            out.append(torch.einsum("bid,jd->bij", torch.tanh(segment * (n + 1)), r).sum(-1))
        return torch.cat(out, 1)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("mode", ["hooks", "auto"])
def test_uses_that_a_shape_hid_are_not_compared_with_others(mode: str, length: int) -> None:
    """As many positions as samples were tried looked like samples, and the next use like one that others influence."""
    check(Segments(length), torch.randn(4, 2 * length, 4), mode=mode)


class Gated(nn.Module):
    """A noisy gate, as mixtures of experts write it, on rows that are not yet part of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.noise = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 6]
        rows = x.reshape(-1, 6)
        logits = rows @ self.gate
        return (logits + torch.randn_like(logits) * F.softplus(rows @ self.noise)).view(len(x), -1, 4)


class Sparsemax(nn.Module):
    """Of parameters alone, by way of whole numbers that nobody tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.rand(3, 5))

    def forward(self, x: Tensor) -> Tensor:  # [B, 5]
        z = self.logits.sort(-1, descending=True).values
        held = (1 + torch.arange(1, 6) * z > z.cumsum(-1)).sum(-1, keepdim=True)
        tau = (z.cumsum(-1).gather(-1, held - 1) - 1) / held
        return x @ (self.logits - tau).clamp(min=0).t()


@pytest.mark.parametrize(("model", "x"), [(Gated(), torch.randn(4, 3, 6)), (Sparsemax(), torch.randn(4, 5))],
                         ids=["gate", "sparsemax"])  # fmt: skip
def test_uses_behind_one_that_a_shape_misled_are_looked_at_again(model: nn.Module, x: Tensor) -> None:
    """Not at the second look, where they are met for the first time, but once what lies in front of them is known."""
    wrapped = GradSampleModule(model)
    wrapped(x).sum().backward()
    assert {entry.rung for entry in wrapped.plan} == {"tracked"}


class CentredProducts(nn.Module):
    """Mixes the samples in front of a use without a rule; one sample at a time would hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(x - x.mean(0), self.centres)


def test_influence_is_not_forgotten_over_a_use_without_a_rule() -> None:
    with pytest.raises(SamplesInfluenceEachOther, match="centres is used by inner"):
        GradSampleModule(CentredProducts())(torch.randn(6, 4))


class ToTheLongest(nn.Module):
    """Padded to the batch's longest sample (or cut to its shortest), as `pad_packed_sequence` does; and averaged."""

    def __init__(self, ordered: bool, cut: bool = False) -> None:
        super().__init__()
        self.rnn, self.out, self.ordered, self.cut = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2), ordered, cut

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.cut:
            return self.out(self.rnn(x[:, : int(lengths.min())])[0].mean(1))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(padded.mean(1))


class OverItsOwn(ToTheLongest):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(padded.sum(1) / lengths[:, None])


LENGTHS = [[6, 5, 4, 2, 1], [6, 6, 4, 2, 2], [6, 2, 3, 2, 4], [2, 3, 1, 2, 6], [5, 2, 6, 3, 3]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["padded", "cut"])
def test_lengths_of_other_samples_are_an_influence(lengths: list[int], cut: bool) -> None:
    model = GradSampleModule(ToTheLongest(lengths == sorted(lengths, reverse=True), cut), mode="ghost")
    with pytest.raises(SamplesInfluenceEachOther, match="changed when only other samples of the batch did"):
        model(torch.randn(5, 7, 3), torch.tensor(lengths))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_an_average_over_a_samples_own_length_is_none(lengths: list[int]) -> None:
    check(OverItsOwn(lengths == sorted(lengths, reverse=True)), (torch.randn(5, 7, 3), torch.tensor(lengths)))


class SetFromTheFirst(nn.Module):
    """Scales set from the first batch, as ActNorm does; that it is done, no buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.done = nn.Parameter(torch.ones(3)), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.scale.data.copy_(1 / (x.std(0) + 1))
            self.done = True
        return x * self.scale


@pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch", "loop"])
def test_parameters_that_only_the_first_forward_writes_to_are_named(mode: str) -> None:
    model = GradSampleModule(nn.Sequential(nn.Linear(3, 3), SetFromTheFirst()), mode=mode)
    with pytest.warns(UserWarning, match=r"first forward wrote to 1\.scale, and the next one did not"):
        model(torch.randn(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 3))
