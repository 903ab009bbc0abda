"""The recurrent layers written with known functions, against the built-in ones: outputs and input gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from grad_samplers.compositions import composition
from grad_samplers.functional import linear_around
from grad_samplers.recurrent_packed import Lengths

small = st.integers(1, 4)


@st.composite
def layers(draw):
    """A recurrent layer of `torch.nn` with any options, in float64, its parameters frozen."""
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    hidden = draw(small)
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    return kind(draw(small), hidden, **options).double().requires_grad_(False)


def first_states(layer: nn.Module, batch: int, given: bool) -> list[torch.Tensor]:
    """Random first states that want a gradient; none if they are not given."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + isinstance(layer, nn.LSTM)]
    return [torch.randn(rows, batch, n, dtype=torch.float64).requires_grad_() for n in sizes] if given else []


def tensors(out) -> list[torch.Tensor]:
    y, last = out
    return [y.data if isinstance(y, PackedSequence) else y, *(last if isinstance(last, tuple) else (last,))]


def compare(layer: nn.Module, x, states: list[torch.Tensor], wrt: list[torch.Tensor]) -> tuple:
    """Outputs equal to 1e-10, and the gradients of a random combination of them to 1e-9."""
    hx = None if not states else tuple(states) if isinstance(layer, nn.LSTM) else states[0]
    function = composition(layer)
    assert function is not None
    mine, theirs = function(layer, x, hx), layer(x, hx)
    weights = [torch.randn_like(t) for t in tensors(theirs)]
    for got, want in zip(tensors(mine), tensors(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    found = []
    for out in (mine, theirs):
        total = sum((t * w).sum() for t, w in zip(tensors(out), weights, strict=True))
        found.append(torch.autograd.grad(total, wrt, retain_graph=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    return mine, theirs


@given(layers(), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_padded_sequences(layer, length, batch, given_states):
    shape = (batch, length) if layer.batch_first else (length, batch)
    x = torch.randn(*shape, layer.input_size, dtype=torch.float64).requires_grad_()
    states = first_states(layer, batch, given_states)
    compare(layer, x, states, [x, *states])


@given(layers(), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_packed_sequences(layer, lengths, ordered, given_states):
    lengths = sorted(lengths, reverse=True) if ordered else lengths
    x = torch.randn(max(lengths), len(lengths), layer.input_size, dtype=torch.float64).requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=ordered)
    states = first_states(layer, len(lengths), given_states)
    mine, theirs = compare(layer, packed, states, [x, *states])
    for got, want in zip(mine[0][1:], theirs[0][1:], strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_packing_there_and_back(lengths):
    x = torch.randn(max(lengths), len(lengths), 2)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    known = Lengths.of(packed)
    assert known.lengths.tolist() == lengths
    padded = known.padded(packed)
    assert torch.equal(padded, x * known.mask)
    assert torch.equal(known.packed(padded).data, packed.data)
    assert torch.equal(known.reversed(known.reversed(padded)), padded)
    for i, n in enumerate(lengths):
        assert torch.equal(known.reversed(padded)[:n, i], padded[:n, i].flip(0))
        assert torch.equal(known.last(padded)[i], padded[n - 1, i])


@given(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]), st.booleans(), st.booleans(), st.booleans())
def test_cells(kind, bias, given_states, relu):
    options = {"nonlinearity": "relu"} if relu and kind is nn.RNNCell else {}
    cell = kind(3, 4, bias=bias, **options).double().requires_grad_(False)
    x, *states = (torch.randn(5, n, dtype=torch.float64).requires_grad_() for n in (3, 4, 4))
    hx = None if not given_states else tuple(states) if kind is nn.LSTMCell else states[0]
    mine, theirs = (o if isinstance(o, tuple) else (o,) for o in (composition(cell)(cell, x, hx), cell(x, hx)))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        got, want = (torch.autograd.grad(v.square().sum(), x, retain_graph=True)[0] for v in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_dropout_between_layers_draws_as_the_layer_does():
    layer = nn.LSTM(3, 4, num_layers=3, dropout=0.5).double().requires_grad_(False)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    mine, _ = composition(layer)(layer, x)
    torch.manual_seed(1)
    theirs, _ = layer(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(composition(layer)(layer, x)[0], layer(x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["DPRNN", "DPGRU", "DPLSTM"])
def test_opacus_layers_with_dropout_on_the_states(name):
    """Dropout at p = 1 leaves nothing of the states; at other rates it has the right mean and no influence in eval."""
    opacus = pytest.importorskip("opacus.layers", reason="Opacus is not installed")
    layer = getattr(opacus, name)(3, 4, num_layers=2, dropout=1.0).double().requires_grad_(False)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    assert not composition(layer)(layer, x)[0].any()
    layer.eval()
    torch.testing.assert_close(composition(layer)(layer, x)[0], layer(x)[0], rtol=1e-10, atol=1e-12)


def test_sequences_without_batch_or_steps_are_refused():
    layer = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="give its input one"):
        composition(layer)(layer, torch.randn(6, 3))
    with pytest.raises(ValueError, match="at least one step"):
        composition(layer)(layer, torch.randn(0, 2, 3))
    cell = nn.GRUCell(3, 4)
    with pytest.raises(ValueError, match="give it .batch, features."):
        composition(cell)(cell, torch.randn(3))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        composition(layer)(layer, torch.randn(6, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))


def test_a_known_value_never_loses_a_gradient_silently():
    layer = nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match="track or freeze"):
        linear_around(torch.randn(2, 3), layer.weight, layer.bias, value=torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="track or freeze"):
        composition(nn.GRU(3, 4))(nn.GRU(3, 4), torch.randn(6, 2, 3))


def test_a_subclass_with_its_own_forward_is_not_rewritten():
    class Mine(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    class Renamed(nn.LSTM):
        pass

    assert composition(Mine(3, 4)) is None
    assert composition(Renamed(3, 4)) is not None
    replaced = nn.GRU(3, 4)
    replaced.forward = lambda x: (x, None)
    assert composition(replaced) is None


def test_shapes_that_would_broadcast_are_refused_as_by_the_layer():
    layer = nn.GRU(3, 4).requires_grad_(False)
    with pytest.raises(RuntimeError, match="input.size"):
        composition(layer)(layer, torch.randn(6, 2, 1))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        composition(layer)(layer, torch.randn(6, 2, 3), torch.zeros(1, 1, 4))


def test_a_second_derivative_is_an_error_and_not_zero():
    layer = nn.GRU(3, 4).requires_grad_(False)
    x = torch.randn(6, 2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(composition(layer)(layer, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_opacus_layers_with_cells_of_ones_own_run_step_by_step():
    opacus = pytest.importorskip("opacus.layers", reason="Opacus is not installed")
    from opacus.layers import dp_rnn

    class DPGRUCell(dp_rnn.DPGRUCell):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    class OwnCell(dp_rnn.DPGRUCell):
        pass

    for kind, changed in ((DPGRUCell, True), (OwnCell, False)):
        kind.__module__ = "elsewhere" if changed else "opacus.layers.dp_rnn"
        layer = opacus.DPGRU(3, 4).double().requires_grad_(False)
        layer.cells[0].__class__ = kind
        x = torch.randn(6, 5, 3, dtype=torch.float64)
        torch.testing.assert_close(composition(layer)(layer, x)[0], layer(x)[0], rtol=1e-10, atol=1e-12)
