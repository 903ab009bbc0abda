"""Subtrees handled as a whole: what cannot be taken apart by sample goes to the subtree above, or is an error."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gsm import subtree
from gsm.layout import Unresolvable
from gsm.walk import CapturePlan
from gsm.wrapper import GradSampleModule
from tests.compare import check

D = 3


class Odd(nn.Module):
    """A parameter in a function without a rule: handled by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return torch.special.xlog1py(x, self.weight)


class OnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.token = Odd(), nn.Parameter(torch.randn(1, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(x) * self.odd(self.token)


class OnConstant(OnParameter):
    def forward(self, x: Tensor) -> Tensor:
        return self.odd(x) * self.token * self.odd(torch.ones(2, D).to(x)).sum(0)


class OnPickedRows(OnParameter):
    """As many rows as the data have it, in the data's order."""

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.token
        keep = x[..., 0] > 0
        out[keep] = self.odd(out[keep], x)
        return out


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize(
    "model, shape, why",
    [
        (OnParameter, (4, D), "odd: its input is a parameter"),
        (OnConstant, (4, D), "odd: none of its inputs depends on the samples"),
        (OnPickedRows, (4, 5, D), "indexing with a boolean mask"),
    ],
)
def test_a_call_that_is_not_per_sample_is_taken_with_the_module_above(
    model: Any, shape: Any, why: str, mode: str
) -> None:
    wrapped = check(model(), torch.randn(*shape), mode=mode)
    assert wrapped.plan.rung("odd.weight") in ("functorch", "loop")
    assert wrapped.plan["odd.weight"].path == "" and why in wrapped.plan["odd.weight"].why


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(0)


def test_an_output_without_a_batch_has_no_per_sample_gradient() -> None:
    with pytest.raises(subtree.NotPerSample, match="weight.*has no batch dimension"):
        GradSampleModule(Summed(), mode="functorch")(torch.randn(4, D))


def test_vmap_is_not_trusted_where_it_differs_from_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batching rule with a bug, as embedding's was: outputs right, gradients doubled."""
    mapped = subtree._mapped

    def doubled(module: nn.Module, copies: dict[str, Tensor], *rest: Any) -> Any:
        return mapped(module, {n: 2 * c - c.detach() for n, c in copies.items()}, *rest)

    monkeypatch.setattr(subtree, "_mapped", doubled)
    wrapped = check(nn.Sequential(nn.Linear(D, D), nn.Softplus(), Odd()), torch.randn(4, D))
    assert wrapped.plan.rung("2.weight") == "loop"
    assert "different gradients" in wrapped.plan["2.weight"].why


def test_what_fails_on_one_sample_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise ZeroDivisionError("needs two samples")

    monkeypatch.setattr(subtree, "_looped", failing)
    with pytest.raises(ZeroDivisionError, match="needs two samples"):
        GradSampleModule(Odd())(torch.rand(4, D))


def test_inputs_whose_samples_cannot_be_told_are_left_to_the_subtree_above() -> None:
    def layout(site: str, x: Tensor) -> Any:
        raise Unresolvable("nobody knows")

    active: Any = SimpleNamespace(layout=layout, log=None)
    with pytest.raises(subtree.NotPerSample, match="inner: nobody knows") as caught:
        subtree._layout(active, "inner", 0, torch.ones(2))
    assert caught.value.subtree == "inner"


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(50))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.weight)


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_every_sample_draws_its_own_random_numbers(mode: str) -> None:
    wrapped = GradSampleModule(Dropped(), mode=mode)
    out = wrapped(torch.ones(2, 1))
    assert not torch.equal(out[0], out[1])


class Packed(nn.Module):
    """A recurrent layer that is handed a packed sequence, and one that packs it."""

    def __init__(self, packs: bool) -> None:
        super().__init__()
        self.lstm, self.inner = nn.LSTM(3, 4, batch_first=True), Packed(False) if packs else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.inner is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.inner(x) + self.lstm(x)[1][0][-1]
        return self.lstm(x)[1][0][-1]


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_a_packed_sequence_belongs_inside_a_subtree(mode: str) -> None:
    x, lengths = torch.randn(4, 5, 3), torch.tensor([5, 3, 2, 1])
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    with pytest.raises(RuntimeError, match=f"a PackedSequence cannot be taken apart by sample in mode='{mode}'"):
        GradSampleModule(Packed(False), mode=mode)(packed)
    model = Packed(True)
    wrapped = GradSampleModule(model, mode=mode)
    wrapped(x, lengths).sum().backward()
    assert [entry.path for entry in wrapped.plan] == [""]


class StateInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.state = nn.Parameter(torch.rand(D) + 0.5), None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:] = torch.special.xlog1py(x, self.weight) + self.state  # the state has the whole batch's size
        return out


class StateFromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(D, D), StateInside()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.state = torch.zeros(len(x), D, dtype=x.dtype)
        return self.inner(self.first(x))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_attribute_of_the_batchs_size_is_met_by_the_subtree_that_sets_it(mode: str) -> None:
    wrapped = check(StateFromOutside(), torch.rand(3, D), mode=mode)
    assert [entry.path for entry in wrapped.plan] == [""]


def test_rows_ordered_by_the_data_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    escalate = CapturePlan._escalate
    monkeypatch.setattr(CapturePlan, "_escalate", lambda self, e: said.append(str(e)) or escalate(self, e))
    check(OnPickedRows(), torch.randn(4, 5, D))
    assert any("odd: the rows of its inputs are ordered by the data" in text for text in said)


class Twice(nn.Linear):
    """Two draws: one sample after the other gets other numbers than all at once."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) + torch.randn(x.shape[0], self.out_features)
        return y * torch.rand_like(y)


def test_random_numbers_do_not_make_vmap_look_different_from_the_loop() -> None:
    wrapped = GradSampleModule(Twice(3, 2), mode="functorch")
    state = torch.get_rng_state()
    wrapped(torch.randn(4, 3)).sum().backward()
    assert {entry.rung for entry in wrapped.plan} == {"functorch"}
    assert not torch.equal(state, torch.get_rng_state())


def twice(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def scaled_by_its_bias(layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * layer.bias.exp(),)


def in_place(layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
    args[0].mul_(3.0)


def hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
    layer = model[2]
    if kind == "forward":
        layer.register_forward_hook(twice)
    elif kind == "of the parameter":
        layer.register_forward_hook(lambda layer, inputs, output: output * layer.weight.norm())
    elif kind == "before":
        layer.register_forward_pre_hook(scaled_by_its_bias)
    elif kind == "before, in place":
        layer.register_forward_pre_hook(in_place, with_kwargs=True)
    elif kind == "backward":
        layer.register_full_backward_hook(lambda layer, inwards, outwards: (3 * inwards[0],))
    return model


KINDS = ["forward", "of the parameter", "before", "before, in place", "backward"]


@pytest.mark.parametrize("mode", ["functorch", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_a_subtree_changes_a_sample_once(kind: str, mode: str) -> None:
    check(hooked(kind), torch.randn(4, D), mode=mode)


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_a_hook_that_makes_the_weights_makes_each_samples_own(mode: str) -> None:
    """Equalised learning rates, and `torch.nn.utils.prune`: the weight is made anew before every forward."""

    layer: Any = nn.Linear(D, D)
    layer.weight_orig = layer._parameters.pop("weight")
    layer.weight = layer.weight_orig.detach()
    layer.register_forward_pre_hook(lambda layer, inputs: setattr(layer, "weight", layer.weight_orig * 2))
    check(layer, torch.randn(4, D), mode=mode)


class Counting(nn.Module):
    """Follows the number of forwards, as annealing does; no two of them have the same gradients."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.weight, self.in_place = nn.Parameter(torch.randn(D, D)), in_place
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.steps += 1
        else:
            self.steps = self.steps + 1
        return x @ self.weight * self.steps


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_one_forward_is_one_step_of_a_buffer_for_all_samples(mode: str, in_place: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Counting(in_place), nn.Tanh()), torch.randn(4, D)
    wrapped = GradSampleModule(model, mode=mode)
    for step in range(1, 3):
        wrapped.zero_grad()
        out = wrapped(x)
        out.sum(1).mean().backward()
        assert model[0].steps == step
        plain = torch.tanh(step * x @ model[0].weight)
        torch.testing.assert_close(out, plain)
        (expected,) = torch.autograd.grad(plain.sum(1).mean(), model[0].weight)
        torch.testing.assert_close(model[0].weight.grad_sample.mean(0), expected)


def test_a_model_whose_buffers_move_with_every_forward_is_run_by_vmap_all_the_same() -> None:
    model = nn.Sequential(Counting(True), nn.Tanh())
    wrapped = GradSampleModule(model, mode="functorch")
    wrapped(torch.randn(4, D)).sum().backward()
    assert wrapped.plan.rung("0.weight") == "functorch"


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_the_power_iteration_goes_one_step_for_all_samples(mode: str) -> None:
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))) for _ in range(2))
    for vector in (model[0].parametrizations.weight[0]._u, model[0].parametrizations.weight[0]._v):
        vector.copy_(torch.eye(16)[0])  # far from the end
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    torch.testing.assert_close(GradSampleModule(model, mode=mode)(x), twin(x))


class Looked(nn.Module):
    """A table with sparse gradients, in its own module or as a function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.out = kind, nn.Linear(D, 2)
        self.table: Any = nn.Embedding(7, D, sparse=True)
        if kind == "bag":
            self.table = nn.EmbeddingBag(7, D, mode="sum", sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        if self.kind == "function":
            return self.out(nn.functional.embedding(ids, self.table.weight, sparse=self.table.sparse)).sum(1)
        found = self.table(ids)
        return self.out(found if self.kind == "bag" else found.sum(1))


@pytest.mark.parametrize("mode", ["functorch", "loop"])
@pytest.mark.parametrize("kind", ["module", "function", "bag"])
def test_sparse_gradients_are_taken_dense(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    model, ids = Looked(kind), torch.randint(7, (4, 5))
    twin = copy.deepcopy(model)
    twin.table.sparse = False
    wrapped = GradSampleModule(model, mode=mode)
    wrapped(ids).square().sum(1).mean().backward()
    for found, one in zip(model.table.weight.grad_sample, ids.split(1), strict=True):
        (expected,) = torch.autograd.grad(twin(one).square().sum(), twin.table.weight)
        torch.testing.assert_close(found, expected)
