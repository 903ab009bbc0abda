"""Escalation ends: with a plan that holds, or with the error itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gsm.layout import SamplesInfluenceEachOther, Unresolvable
from gsm.ledger import tape_of
from gsm.subtree import NotPerSample, VmapFails
from gsm.wrapper import GradSampleModule
from tests.compare import captured, check
from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss


def plan():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    return GradSampleModule(model)._captured


def test_an_error_that_names_nothing_is_passed_on():
    with pytest.raises(Unresolvable, match="no idea"):
        plan()._escalate(Unresolvable("no idea"))


def test_nothing_is_above_the_model_itself():
    with pytest.raises(NotPerSample, match="no batch"):
        plan()._escalate(NotPerSample("no batch", subtree=""))


def test_a_subtree_is_not_given_to_the_same_rung_twice():
    """Without this guard the model would be planned anew for ever."""
    captured = plan()
    captured._escalate(VmapFails("vmap fails", subtree="0"))
    assert captured.subtrees == {"0": "loop"}
    with pytest.raises(VmapFails):
        captured._escalate(VmapFails("vmap fails", subtree="0"))


def test_a_parameter_that_no_module_left_can_own_is_an_error():
    captured = plan()
    captured.subtrees = {"": "loop"}
    with pytest.raises(Unresolvable, match="again"):
        captured._escalate(Unresolvable("again", ("1.weight",)))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)])
def test_layers_that_mix_samples_are_listed_or_refused(layer):
    model = nn.Sequential(layer, nn.Linear(2, 1))
    (error,) = GradSampleModule.validate(model)
    assert isinstance(error, SamplesInfluenceEachOther) and str(error).startswith("0 is a")
    with pytest.raises(SamplesInfluenceEachOther, match="^0 is a"):
        GradSampleModule.validate(model, strict=True)
    assert not GradSampleModule.is_supported(model) and GradSampleModule.is_supported(nn.Linear(2, 1))


def test_fixed_statistics_are_fine_and_the_batchs_own_are_not_even_in_eval_mode():
    assert GradSampleModule.validate(nn.BatchNorm1d(2).eval()) == []
    assert GradSampleModule.validate(nn.BatchNorm1d(2, track_running_stats=False).eval())


def test_a_removed_capture_says_so():
    wrapped = GradSampleModule(nn.Linear(2, 1))
    wrapped.remove_hooks()
    for ask in (lambda: wrapped.plan, lambda: wrapped.per_sample_gradient_norms):
        with pytest.raises(RuntimeError, match="add_hooks"):
            ask()
    wrapped.add_hooks()
    wrapped(torch.randn(3, 2)).sum().backward()
    assert wrapped.weight.grad_sample.shape == (3, 1, 2)


def test_a_wrapper_without_its_model_has_no_attributes():
    """While it is being unpickled; without the guard this is endless recursion."""
    with pytest.raises(AttributeError):
        getattr(GradSampleModule.__new__(GradSampleModule), "weight")  # noqa: B009


def test_a_model_that_mixes_samples_is_refused_when_it_is_wrapped():
    with pytest.raises(SamplesInfluenceEachOther, match="^1 is a BatchNorm1d in training mode"):
        GradSampleModule(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    GradSampleModule(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), strict=False)


def test_force_functorch_is_a_mode():
    wrapped = GradSampleModule(nn.Linear(2, 1), force_functorch=True)
    assert wrapped.mode == "functorch" and wrapped.plan.rung("weight") == "functorch"


def test_a_stray_gradient_does_not_stay():
    model = nn.Linear(2, 1)
    wrapped = GradSampleModule(model)
    with pytest.raises(RuntimeError, match="weight received an ordinary gradient"):
        (wrapped(torch.randn(3, 2)).sum() + model.weight.square().sum()).backward()
    assert model.weight.grad is None


D = 4


class Moody(nn.Module):
    """Where the batch is when it meets the parameter depends on the kind of input; all sizes are the same."""

    def __init__(self):
        super().__init__()
        self.emb, self.p = nn.Embedding(9, D), nn.Parameter(torch.randn(()))

    def forward(self, x, turned=None, straight=None):
        if straight is None and (x.dim() == 3 or not x.is_floating_point()):
            x = self.emb(x) if not x.is_floating_point() else x
            return (x.transpose(0, 1) * self.p).transpose(0, 1)
        return x * self.p


FLOATS, DEEP, IDS = torch.randn(D, D).double(), torch.randn(D, D, D).double(), torch.randint(9, (D, D))


@pytest.mark.parametrize(
    "first, second",
    [
        ({"x": DEEP}, {"x": FLOATS}),
        ({"x": IDS}, {"x": FLOATS}),
        ({"x": DEEP, "turned": FLOATS}, {"x": DEEP, "straight": FLOATS}),
    ],
    ids=["rank", "ids", "keyword"],
)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_every_kind_of_input_is_tried_by_itself(first, second, mode):
    """What was learned for one kind would be wrong for the other, and would fit it."""
    model = Moody().double()
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    for batch in (first, second, first):
        expected = per_sample_loop(model, batch)
        projection_loss(wrapped(**batch)).backward()
        assert_close_per_sample(captured(model), expected)
        wrapped.zero_grad()


def test_a_removed_wrapper_leaves_nothing_behind():
    model = nn.Linear(3, 2)
    wrapped = GradSampleModule(model, mode="ghost")
    wrapped(torch.randn(4, 3)).sum().backward()
    tape = wrapped._tape
    assert tape.groups and tape_of(model.weight) is tape
    wrapped.remove_hooks()
    assert tape.groups == [] and not tape.live and tape_of(model.weight) is None


class Weights(nn.Module):
    """One layer runs with weights made from another's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.a, {"weight": 2 * self.b.weight, "bias": self.b.bias.tanh()}, (x,))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_weights_that_the_model_hands_to_a_layer_are_the_ones_it_uses(mode: str) -> None:
    check(Weights(), torch.randn(4, 3), mode=mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
def test_weights_that_are_handed_to_a_wrapped_model_are_the_ones_it_uses(mode: str) -> None:
    wrapped, x = GradSampleModule(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), mode=mode), torch.randn(4, 3)
    other = {name: torch.zeros_like(p) for name, p in wrapped.named_parameters()}
    for _ in range(2):
        assert functional_call(wrapped, other, (x,)).abs().max() == 0
        assert wrapped(x).abs().min() > 0


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_weights_for_a_layer_that_is_handled_as_a_whole_are_refused(mode: str) -> None:
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), mode=mode)
    other = {name: torch.zeros_like(p) for name, p in wrapped.named_parameters()}
    with pytest.raises(RuntimeError, match="other tensors in place of its parameters weight, bias"):
        functional_call(wrapped, other, (torch.randn(4, 3),))


def _replaced(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(3, 3))


def _assigned(model: nn.Sequential) -> None:
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.named_parameters()}, assign=True)


def _another_layer(model: nn.Sequential) -> None:
    model[0] = nn.Linear(3, 3)


def _one_more(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


def _one_less(model: nn.Sequential) -> None:
    del model[1]


@pytest.mark.parametrize("change", [_replaced, _assigned, _another_layer, _one_more, _one_less])
def test_what_is_replaced_after_the_first_batch_is_captured(change: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(x).sum().backward()
    wrapped.zero_grad()
    change(model)
    expected = copy.deepcopy(model)(x)
    out = wrapped(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(p.grad is None and p.grad_sample.shape == (4, *p.shape) for p in model.parameters())


def test_what_mixes_is_refused_after_the_first_batch_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wrapped = GradSampleModule(model)
    wrapped(torch.randn(4, 3))
    model[1] = nn.BatchNorm1d(3, affine=False)
    with pytest.raises(SamplesInfluenceEachOther, match="BatchNorm1d"):
        wrapped(torch.randn(4, 3))


class CentredInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) if self.training else x)


def test_what_mixes_in_training_only_is_refused_after_a_batch_in_evaluation() -> None:
    model = nn.Sequential(CentredInTraining(3, 3))
    wrapped = GradSampleModule(model)
    wrapped.eval()
    wrapped(torch.randn(4, 3))
    wrapped.train()
    with pytest.raises(SamplesInfluenceEachOther):
        wrapped(torch.randn(4, 3))


def test_the_plan_tells_what_sent_a_part_to_the_loop_and_not_only_that_vmap_fails() -> None:
    captured = plan()
    captured._escalate(Unresolvable("used in some way", parameters=("0.0.weight",)))
    (path,) = captured.subtrees
    captured._escalate(VmapFails("vmap fails", subtree=path))
    assert captured.reasons[path] == "used in some way; vmap fails"
