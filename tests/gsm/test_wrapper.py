"""The wrapper against the one-sample loop: bare parameters, reuse, order, structure, options."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule as OpacusGradSampleModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsm.optimizer import DPOptimizer
from gsm.wrapper import GradSampleModule
from tests.compare import MODES, captured, check
from tests.loop import assert_close_per_sample, per_sample_loop, projection_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class LinearWithExtraParam(nn.Module):
    """The model of Opacus's pull request on functorch gradients."""

    def __init__(self, d: int = 5, p: int = 3, hidden: int = 8):
        super().__init__()
        self.fc = nn.Linear(d, hidden)
        self.extra_param = nn.Parameter(torch.randn(hidden, p))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).matmul(self.extra_param)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.scale, self.out = inner, nn.Parameter(torch.randn(width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)) * self.scale)


class TwiceCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.extra_param = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x))) @ self.extra_param + self.fc(x)


class Extreme(nn.Module):
    """A bare parameter at the root, above ordinary convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4 * 16, 8), nn.Linear(8, 4)
        self.extra_param = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1)))).matmul(self.extra_param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["plain", "nested", "frozen", "twice", "extreme"])
def test_the_seed_case_counts_every_gradient_once(mode: str, which: str) -> None:
    x = torch.randn(4, 5)
    model: nn.Module
    if which == "plain":
        model = LinearWithExtraParam()
    elif which == "nested":
        model = Nested(Nested(Nested(LinearWithExtraParam(p=3), 3), 3), 3)
    elif which == "frozen":
        model = Nested(LinearWithExtraParam(), 3)
        model.inner.fc.requires_grad_(False)
    elif which == "twice":
        model, x = TwiceCalled(), torch.randn(4, 4)
    else:
        model, x = Extreme(), torch.randn(3, 1, 8, 8)
    wrapped = check(model, x, mode=mode)
    assert {n for e in wrapped.plan for n in e.parameters} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_children_of_a_subtree_carry_no_hooks(mode: str) -> None:
    wrapped = GradSampleModule(LinearWithExtraParam(), mode=mode)
    assert wrapped.plan.rung("fc.weight") == mode == wrapped.plan.rung("extra_param")
    fc = wrapped._module.fc
    assert "forward" not in fc.__dict__ and not fc._forward_hooks and not fc._backward_hooks


class Uses(nn.Module):
    """Bare parameters used in the ways that models use them."""

    def __init__(self) -> None:
        super().__init__()
        d, t = 6, 5
        self.token, self.position = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, t + 1, d))
        self.weight, self.gamma, self.bias = (nn.Parameter(torch.randn(d)) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(()))
        self.relative = nn.Embedding(9, 2)
        self.table = nn.Parameter(torch.randn(7, d))
        self.query = nn.Parameter(torch.randn(2, d))
        self.heads = nn.Parameter(torch.randn(2, d, 3))
        self.proj = nn.Parameter(torch.randn(4, d))
        self.mask_token = nn.Parameter(torch.randn(1, 1, d))
        self.pos_emb = nn.Embedding(t + 1, d)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        b, t, d = x.shape
        x = torch.cat([self.token.expand(b, -1, -1), x], dim=1) + self.position
        x = x + self.pos_emb(torch.arange(t + 1)[None])
        x = self.weight * x / x.pow(2).mean(-1, keepdim=True).add(1e-3).sqrt() + (1 + self.gamma) * x + self.bias
        x = x * self.scale.exp()
        x = torch.where(ids[:, :1, None] > 3, self.mask_token, x)
        distance = (torch.arange(t + 1)[:, None] + torch.arange(t + 1)[None]) % 9
        bias = self.relative(distance).permute(2, 0, 1)[None]
        scores = (x @ x.transpose(1, 2))[:, None] + bias
        y = (scores.softmax(-1) @ x[:, None]).sum(1)
        y = y + self.table[ids].mean(1, keepdim=True)
        y = y + torch.einsum("btd,hde->bthe", y, self.heads).sum((2, 3))[..., None]
        pooled = (self.query @ y.transpose(1, 2)).transpose(1, 2)
        return y @ self.proj.t() + F.linear(y, self.proj) + pooled.sum(-1, keepdim=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 5, 6])
def test_bare_parameters(mode: str, size: int) -> None:
    """Also where the sequence is as long as the batch (5, 6)."""
    wrapped = check(Uses(), (torch.randn(size, 5, 6), torch.randint(0, 7, (size, 4))), mode=mode)
    if mode == "hooks":
        assert all(e.rung in ("sampler", "tracked") for e in wrapped.plan), str(wrapped.plan)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(F.relu_(self.fc(x)) + x)
        return x


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_called_several_times_with_in_place_activations(mode: str) -> None:
    check(Reused(), torch.randn(3, 2, 4), mode=mode)


class Checkpointed(Reused):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing(mode: str) -> None:
    check(Checkpointed(), torch.randn(3, 2, 4), mode=mode)


class CheckpointedAttention(nn.Module):
    """The attention's output projection is used by its parent, which owns no trainable parameter here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.attention.in_proj_weight.requires_grad_(False)
        self.attention.in_proj_bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return checkpoint(self.attention, x, x, x, use_reentrant=False)[0]


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_a_module_that_uses_its_childs_parameters(mode: str) -> None:
    check(CheckpointedAttention(), torch.randn(3, 2, 4), mode=mode)


@dataclass
class Out:
    first: Tensor
    rest: dict


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.emb = nn.Linear(3, 4), nn.Linear(4, 2), nn.Embedding(5, 4)

    def forward(self, ids: Tensor, *, x: Tensor, flag: bool = True, nothing: None = None) -> Out:
        h = self.a(x) + self.emb(ids)
        return Out(h, {"out": (self.b(h), ids), "flag": flag})


@pytest.mark.parametrize("mode", MODES)
def test_structured_outputs_and_keyword_arguments(mode: str) -> None:
    check(Structured(), {"ids": torch.randint(0, 5, (3,)), "x": torch.randn(3, 3)}, mode=mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_then_two_backwards(mode: str, order: tuple[int, int]) -> None:
    """Two forwards in flight together are two looks at the same records: their gradients add up, as in Opacus."""
    model = LinearWithExtraParam().double()
    xs = torch.randn(2, 4, 5).double()
    want = [per_sample_loop(model, x) for x in xs]
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    losses = [projection_loss(wrapped(x)) for x in xs]
    for i in order:
        losses[i].backward()
    assert_close_per_sample(captured(model), {n: want[0][n] + want[1][n] for n in want[0]})


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_different_batch_sizes_in_flight_stay_apart(mode: str) -> None:
    from gsm.ledger import collect

    model = LinearWithExtraParam().double()
    xs = [torch.randn(n, 5).double() for n in (4, 2)]
    want = [per_sample_loop(model, x) for x in xs]
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    losses = [projection_loss(wrapped(x)) for x in xs]
    losses[1].backward()
    losses[0].backward()
    params = list(model.parameters())
    got = {b.batch_size: b for b in collect(params)}
    assert sorted(got) == [2, 4]
    for w in want:
        size = w["fc.bias"].shape[0]
        total = got[size].weighted_sum(torch.ones(size, dtype=torch.float64))
        for (name, _), t in zip(model.named_parameters(), total, strict=True):
            torch.testing.assert_close(t, w[name].sum(0))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_forwards_without_a_backward_leave_nothing(mode: str) -> None:
    model = LinearWithExtraParam().double()
    x = torch.randn(4, 5).double()
    want = per_sample_loop(model, x)
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    wrapped(torch.randn(4, 5).double())
    with torch.no_grad():
        wrapped(torch.randn(3, 5).double())
    projection_loss(wrapped(x)).backward()
    assert_close_per_sample(captured(model), want)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, which: bool = True) -> Tensor:
        return self.used(x) if which else self.unused(x)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_a_batch_does_not_reach_have_gradient_zero(mode: str) -> None:
    check(Branch(), torch.randn(3, 3), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0, 1, 4])
def test_batch_sizes_and_mean_reduction(mode: str, size: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x = torch.randn(size, 5).double()
    want = per_sample_loop(model, x, loss=lambda y: y.pow(2).sum())
    wrapped = GradSampleModule(model, mode=mode)
    wrapped(torch.randn(3, 5).double()).pow(2).sum(1).mean().backward()
    wrapped.zero_grad()
    wrapped(x).pow(2).sum(1).mean().backward()
    got = captured(model)
    if size:
        assert_close_per_sample(got, want)
    else:
        for p in model.parameters():
            if mode not in ("ghost", "auto"):
                assert p.grad_sample.shape == (0, *p.shape)


@pytest.mark.parametrize("mode", MODES)
def test_batch_second(mode: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))
    check(model, torch.randn(3, 4, 5), mode=mode, batch_first=False)
    check(model, torch.randn(4, 4, 5), mode=mode, batch_first=False)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_freezing_and_unfreezing_later(mode: str) -> None:
    model = LinearWithExtraParam().double()
    model.fc.weight.requires_grad_(False)
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    x = torch.randn(4, 5).double()
    projection_loss(wrapped(x)).backward()
    assert set(captured(model)) == {"fc.bias", "extra_param"}
    wrapped.zero_grad()
    model.fc.weight.requires_grad_(True)
    model.fc.bias.requires_grad_(False)
    plain = LinearWithExtraParam().double()
    plain.load_state_dict(model.state_dict())
    plain.fc.bias.requires_grad_(False)
    projection_loss(wrapped(x)).backward()
    assert_close_per_sample(captured(model), per_sample_loop(plain, x))


@pytest.mark.parametrize("mode", MODES)
def test_parameters_moved_or_replaced_after_wrapping(mode: str) -> None:
    """`.double()`, `.to(device)` and `p.data = ...` give a parameter other memory."""
    model = LinearWithExtraParam()
    wrapped = GradSampleModule(model, mode=mode, loss_reduction="sum")
    wrapped(torch.randn(4, 5)).sum().backward()
    wrapped.zero_grad()
    wrapped.double()
    x = torch.randn(4, 5).double()
    for _ in range(2):
        plain = LinearWithExtraParam().double()
        plain.load_state_dict(model.state_dict())
        projection_loss(wrapped(x)).backward()
        assert_close_per_sample(captured(model), per_sample_loop(plain, x))
        wrapped.zero_grad()
        model.extra_param.data = torch.randn(8, 3).double()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_capture_on_their_own(mode: str, how: str) -> None:
    wrapped = GradSampleModule(LinearWithExtraParam().double(), mode=mode, loss_reduction="sum")
    x = torch.randn(4, 5).double()
    projection_loss(wrapped(x)).backward()
    wrapped.zero_grad()
    other = copy.deepcopy(wrapped) if how == "deepcopy" else pickle.loads(pickle.dumps(wrapped))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    projection_loss(other(x)).backward()
    plain = LinearWithExtraParam().double()
    plain.load_state_dict(other._module.state_dict())
    assert_close_per_sample(captured(other._module), per_sample_loop(plain, x))
    assert all(getattr(p, "grad_sample", None) is None for p in wrapped.parameters())


def test_cleanup_leaves_the_model_as_it_was() -> None:
    model = Nested(LinearWithExtraParam(), 3)
    model.inner.forward = model.inner.forward  # an instance's own forward survives
    before = [(n, dict(m.__dict__)) for n, m in model.named_modules()]
    wrapped = GradSampleModule(model)
    wrapped(torch.randn(4, 5)).sum().backward()
    assert wrapped.to_standard_module() is model
    for (name, was), (_, module) in zip(before, model.named_modules(), strict=True):
        assert set(module.__dict__) == set(was), name
        assert module.__dict__.get("forward") == was.get("forward"), name
    for p in model.parameters():
        assert not any(hasattr(p, a) for a in ("grad_sample", "_forward_counter", "_current_grad_sample"))
        assert not p._post_accumulate_grad_hooks
    model(torch.randn(4, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attributes_and_state_dict_go_through() -> None:
    model = LinearWithExtraParam()
    wrapped = GradSampleModule(model)
    assert wrapped.fc is model.fc and wrapped.extra_param is model.extra_param
    assert set(wrapped.state_dict()) == {f"_module.{k}" for k in model.state_dict()}
    with pytest.raises(AttributeError, match="nothing_here"):
        wrapped.nothing_here  # noqa: B018


def test_the_raw_model_is_captured_too() -> None:
    model = LinearWithExtraParam().double()
    x = torch.randn(4, 5).double()
    want = per_sample_loop(model, x)
    GradSampleModule(model, mode="ghost", loss_reduction="sum")
    projection_loss(model(x)).backward()
    assert_close_per_sample(captured(model), want)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0, keepdim=True)
        return self.fc(x)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_refused_with_its_path(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3, affine=affine)))
    with pytest.raises(ValueError, match=r"1\.0.*BatchNorm1d.*GroupNorm"):
        GradSampleModule(model)(torch.randn(4, 3))


def test_batch_norm_with_fixed_statistics_is_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].eval()
    for mode in MODES:
        check(model, torch.randn(4, 3), mode=mode)


def test_batch_statistics_in_disguise_are_refused() -> None:
    with pytest.raises(ValueError, match="influence each other"):
        GradSampleModule(Mixing())(torch.randn(4, 3))


def test_a_parameter_used_outside_the_model_is_named() -> None:
    wrapped = GradSampleModule(LinearWithExtraParam())
    loss = wrapped(torch.randn(4, 5)).sum() + wrapped._module.fc.weight.pow(2).sum()
    with pytest.raises(RuntimeError, match=r"fc\.weight received an ordinary gradient"):
        loss.backward()


def test_create_graph_is_refused() -> None:
    wrapped = GradSampleModule(LinearWithExtraParam())
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(wrapped(x).sum(), x, create_graph=True)


def test_a_model_that_opacus_wrapped_is_refused() -> None:
    """Its hooks would go on materialising every gradient beside ours."""
    with pytest.raises(ValueError, match="The model is wrapped already"):
        GradSampleModule(OpacusGradSampleModule(nn.Linear(2, 2)))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
def test_parameters_outside_of_the_optimizer_are_named_as_what_accumulates(mode: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = GradSampleModule(plain, mode=mode)
    model.forbid_grad_accumulation()
    head = DPOptimizer(
        torch.optim.SGD(plain[2].parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    model(torch.randn(4, 4)).sum().backward()
    head.step()
    head.zero_grad()
    with pytest.raises(ValueError, match=r"wait only at 0.weight, 0.bias: .* freeze them .* or put them into"):
        model(torch.randn(4, 4)).sum().backward()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradients_that_a_step_has_used_are_named_as_what_accumulates(mode: str) -> None:
    """The loop of a GAN: the generator's backward goes through the discriminator after its step."""
    model = GradSampleModule(nn.Linear(4, 1), mode=mode)
    model.forbid_grad_accumulation()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    made = torch.randn(4, 4, requires_grad=True)
    if mode == "hooks":  # p.grad_sample stays readable until zero_grad()
        with pytest.raises(ValueError, match=r"last step\(\) are still there: call the private optimizer's zero_grad"):
            model(made).sum().backward()
    optimizer.zero_grad()
    model(made).sum().backward()
    with pytest.raises(ValueError, match=r"max_physical_batch_size=\.$"):  # neither is the cause here
        model(made).sum().backward()
