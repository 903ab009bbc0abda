"""Recurrent layers, as they are, in the wrapper: per-sample gradients and norms against the one-sample loop."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from gsm.ledger import collect
from gsm.wrapper import GradSampleModule
from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss

small = st.integers(1, 4)


class Everything(nn.Module):
    """A recurrent layer with all its outputs batch first; packs its input if told the lengths."""

    def __init__(self, rnn: nn.Module, ordered: bool = False):
        super().__init__()
        self.rnn, self.ordered = rnn, ordered

    def forward(self, x, lengths=None, *states):
        hx = [s.transpose(0, 1).contiguous() for s in states]
        hx = None if not hx else tuple(hx) if len(hx) == 2 else hx[0]
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        elif not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y, last = self.rnn(x, hx)
        if lengths is not None:
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=None)
            y = y.sum(1)  # so that the output of a sample does not know the longest of the others
        elif not self.rnn.batch_first:
            y = y.transpose(0, 1)
        return y, [t.transpose(0, 1) for t in (last if isinstance(last, tuple) else (last,))]


def check(model, inputs, expected=None, *, loss=projection_loss, modes=("hooks", "ghost")):
    """`grad_sample`, or norms and a weighted sum, against the loop; returns the wrapped models after their backward."""
    expected = per_sample_loop(model, inputs, loss=loss) if expected is None else expected
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)[None]
    wrapped = []
    for mode in modes:
        gsm = GradSampleModule(copy.deepcopy(model), mode=mode, loss_reduction="sum")
        loss(gsm(*inputs)).backward()
        if mode == "hooks":
            found = {n: p.grad_sample for n, p in gsm._module.named_parameters() if p.requires_grad}
            assert_close_per_sample(found, expected)
        else:
            torch.testing.assert_close(gsm.per_sample_gradient_norms[None], norms, rtol=1e-8, atol=1e-12)
            names, params = zip(*gsm.trainable_parameters(), strict=True)
            (captured,) = collect(params)
            weights = torch.linspace(-0.5, 1.5, captured.batch_size, dtype=torch.float64)
            sums = dict(zip(names, (total[None] for total in captured.weighted_sum(weights)), strict=True))
            assert_close_per_sample(sums, {n: torch.tensordot(weights, g, dims=1)[None] for n, g in expected.items()})
        wrapped.append(gsm)
    return wrapped


@st.composite
def layers(draw):
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    hidden = draw(small)
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    return kind(draw(small), hidden, **options).double()


def states_for(rnn: nn.Module, batch: int) -> list[torch.Tensor]:
    sizes = [getattr(rnn, "proj_size", 0) or rnn.hidden_size, rnn.hidden_size][: 1 + (rnn.__class__ is nn.LSTM)]
    rows = rnn.num_layers * (1 + rnn.bidirectional)
    return [torch.randn(batch, rows, n, dtype=torch.float64) for n in sizes]


@settings(max_examples=20)
@given(layers(), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_any_options(rnn, batch, length, given_states):
    x = torch.randn(batch, length, rnn.input_size, dtype=torch.float64)
    check(Everything(rnn), (x, None, *(states_for(rnn, batch) if given_states else [])))


@settings(max_examples=15)
@given(layers(), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans())
def test_packed_sequences(rnn, lengths, ordered):
    lengths = sorted(lengths, reverse=True) if ordered else lengths
    x = torch.randn(len(lengths), 5, rnn.input_size, dtype=torch.float64)
    check(Everything(rnn, ordered), (x, torch.tensor(lengths)))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("size", [3, 4])
def test_as_many_steps_as_samples(kind, size):
    """Shapes cannot tell the batch from the steps, also in packed sequences whose longest is that long."""
    x = torch.randn(size, size, 3, dtype=torch.float64)
    for batch_first in (True, False):
        check(Everything(kind(3, size, num_layers=2, batch_first=batch_first).double()), (x,))
    check(Everything(kind(3, size, bidirectional=True).double()), (x, torch.tensor([1, 2, size, 1][:size])))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_second_dimension_as_the_batch(batch_first):
    """`batch_first=False` of the wrapper: sequences `[T, B, D]`, T equal to B."""
    model = nn.LSTM(3, 4, bidirectional=True).double()
    x = torch.randn(5, 5, 3, dtype=torch.float64)

    def loss(out):
        return projection_loss((out[0], *out[1]), batch_dim=1)

    expected = per_sample_loop(model, x, loss=loss, batch_dim=1)
    gsm = GradSampleModule(model, batch_first=False, loss_reduction="sum")
    loss(gsm(x)).backward()
    assert_close_per_sample({n: p.grad_sample for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("name", ["DPRNN", "DPGRU", "DPLSTM"])
@pytest.mark.parametrize("packed", [False, True])
def test_opacus_layers(name, packed):
    """Compared with the loop over PyTorch's own layer with the same weights (Opacus rounds last states to float32)."""
    from opacus import layers as opacus_layers

    options = {"num_layers": 2, "bidirectional": True, "batch_first": not packed}
    theirs = getattr(opacus_layers, name)(3, 4, **options).double()
    native = getattr(nn, name[2:])(3, 4, **options).double()
    native.load_state_dict(theirs.state_dict())
    inputs = (torch.randn(5, 6, 3, dtype=torch.float64), *([torch.tensor([3, 6, 1, 2, 6])] if packed else []))
    expected = per_sample_loop(Everything(native), inputs)
    wrapped = check(Everything(theirs), inputs, expected)
    assert {entry.rung for entry in wrapped[0].plan.entries.values()} == {"sampler"}


def test_opacus_layer_with_dropout_on_the_states():
    """For one layer and one sample the seed draws the same in Opacus's own forward."""
    from opacus.layers import DPGRU

    model = DPGRU(3, 4, batch_first=True, dropout=0.5).double()
    gsm = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    gsm(x)  # the probe before the first batch is over
    gsm.set_grad_sample_to_none()
    torch.manual_seed(3)
    gsm(x)[0].sum().backward()
    found = {n: p.grad_sample for n, p in gsm._module.named_parameters()}
    torch.manual_seed(3)
    model(x)[0].sum().backward()
    assert_close_per_sample(found, {n: p.grad[None] for n, p in model.named_parameters()})


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_in_a_loop(kind, bias):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(3, 4, bias=bias)

        def forward(self, x):
            state, outputs = None, []
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1)

    check(Loop().double(), (torch.randn(4, 4, 3, dtype=torch.float64),))


class Classifier(nn.Module):
    """Embedding, two layers of LSTM, linear; the first state is a parameter if asked for."""

    def __init__(self, learned_state=False, checkpointed=False, twice=False):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 3), nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.head, self.checkpointed, self.twice = nn.Linear(4, 2), checkpointed, twice
        self.state = nn.Parameter(torch.randn(2, 1, 4)) if learned_state else None

    def forward(self, ids):
        x, hx = self.embedding(ids), None
        if self.state is not None:
            hx = (self.state.expand(-1, len(ids), -1).contiguous(), torch.zeros(2, len(ids), 4).to(x))
        run = (lambda *a: checkpoint(self.rnn, *a, use_reentrant=False)) if self.checkpointed else self.rnn
        y, last = run(x, hx)
        if self.twice:
            y, _ = run(x.flip(1), last)
        return self.head(torch.relu_(y)[:, -1])


@pytest.mark.parametrize("options", [{}, {"learned_state": True}, {"checkpointed": True}, {"twice": True}], ids=str)
def test_whole_model(options):
    """Working in place on the layer's output included."""
    model = Classifier(**options).double()
    check(model, (torch.randint(11, (5, 6)),))
    check(model, (torch.randint(11, (1, 1)),))


def test_sentences_of_words_of_letters():
    """The layer's batch is samples and words together."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.letters, self.words = nn.GRU(3, 4, batch_first=True), nn.LSTM(4, 5, batch_first=True)

        def forward(self, x):
            each = self.letters(x.flatten(0, 1))[1][-1]
            return self.words(each.view(*x.shape[:2], 4))[0]

    check(Words().double(), (torch.randn(4, 4, 4, 3, dtype=torch.float64),))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_learned_prompts_through_a_recurrent_layer(kind):
    """The layer sees parameters alone: its output meets the samples later."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompts, self.rnn, self.head = nn.Embedding(4, 3), kind(3, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            prompts = self.rnn(self.prompts(torch.arange(4))[None])[0].expand(len(x), -1, -1)
            return self.head(torch.tanh(torch.cat([prompts, x], 1) * x.sum(1, keepdim=True)))

    check(Prompted().double(), (torch.randn(4, 2, 3, dtype=torch.float64),))


def test_frozen_weights():
    rnn = nn.LSTM(3, 4, bidirectional=True, batch_first=True).double()
    for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l0_reverse", "bias_ih_l0_reverse"):
        getattr(rnn, name).requires_grad_(False)
    check(Everything(rnn), (torch.randn(3, 5, 3, dtype=torch.float64),))


def test_gradients_of_the_input_are_the_ordinary_ones():
    rnn = nn.GRU(3, 4, num_layers=2, batch_first=True).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(projection_loss(rnn(x, h)[0]), [x, h])
    gsm = GradSampleModule(rnn)
    projection_loss(gsm(x, h)[0]).backward()
    torch.testing.assert_close([x.grad, h.grad], list(want), rtol=1e-9, atol=1e-12)


def test_empty_batch_and_batches_of_other_sizes():
    model = Everything(nn.LSTM(3, 4, batch_first=True).double())
    gsm = GradSampleModule(model, loss_reduction="sum")
    for size, length in ((0, 5), (3, 5), (5, 4), (0, 5)):
        x = torch.randn(size, length, 3, dtype=torch.float64)
        expected = per_sample_loop(copy.deepcopy(model.rnn), x, size=size, loss=lambda out: projection_loss(out[0]))
        projection_loss(gsm(x)[0]).backward()
        assert_close_per_sample({f"{n[4:]}": p.grad_sample for n, p in model.named_parameters()}, expected)
        gsm.zero_grad()
        gsm.set_grad_sample_to_none()


def test_a_packed_sequence_as_the_model_input():
    rnn = nn.LSTM(3, 4).double()
    x, lengths = torch.randn(5, 4, 3, dtype=torch.float64), [2, 5, 1, 3]

    def loss(out):
        return projection_loss([t.transpose(0, 1) for t in out[1]])

    expected = per_sample_loop(
        lambda *parts: rnn(PackedSequence(*parts)),
        x,
        params=dict(rnn.named_parameters()),
        select=lambda _, i: pack_padded_sequence(x[: lengths[i], i : i + 1], [lengths[i]]),
        size=4,
        loss=loss,
    )
    check(rnn, (pack_padded_sequence(x, lengths, enforce_sorted=False),), expected, loss=loss)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_under_autocast(kind):
    """The projections run in bfloat16, the recurrence in float32; gradients agree to bfloat16's accuracy."""
    rnn = kind(8, 16, batch_first=True)
    x = torch.randn(4, 6, 8)
    expected = per_sample_loop(Everything(rnn), (x,))
    gsm = GradSampleModule(Everything(rnn), loss_reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        out = gsm(x)
    projection_loss([t.float() for t in (out[0], *out[1])]).backward()
    for name, p in rnn.named_parameters():
        want = expected[f"rnn.{name}"]
        assert (p.grad_sample - want).norm() < 0.05 * want.norm()
