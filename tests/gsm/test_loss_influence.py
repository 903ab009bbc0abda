"""Scalar losses that compare samples are refused at the first backward, before any release; look-alikes pass."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsm import GradSampleModule, loss_check, loss_compare, make_private
from gsm.layout import SamplesInfluenceEachOther
from gsm.ledger import discard
from tests.gsm.training import Profiler, parts

SIZE = 9


def apart(x):
    return x[~torch.eye(len(x), dtype=torch.bool)]


def pairs(z):
    return z[:, 0][:, None] - z[:, 0][None]


def standard(z):
    return (z - z.mean(0)) / z.std(0)


def single(z, y):
    return F.cross_entropy(z, y, reduction="none")


COMPARING = {
    "contrastive": lambda z, y: F.cross_entropy(z @ z.T / 0.1, torch.arange(SIZE)),
    "contrastive with margins": lambda z, y: F.multi_margin_loss(z @ z.T, torch.arange(SIZE)),
    "supervised contrastive": lambda z, y: -((z @ z.T).log_softmax(1) * (y[:, None] == y[None])).mean(),
    "Barlow twins": lambda z, y: apart(standard(z).T @ standard(z)).square().sum() / SIZE,
    "variance": lambda z, y: z.var(0).sum(),
    "covariance": lambda z, y: torch.cov(z.T).square().sum(),
    "root of a mean": lambda z, y: F.mse_loss(z, torch.ones_like(z)).sqrt(),
    "logarithm of a mean": lambda z, y: z.exp().mean().log(),
    "mean, cut off": lambda z, y: F.mse_loss(z, z.detach() + 1).clamp(max=10),
    "distances": lambda z, y: torch.exp(-(torch.cdist(z, z) ** 2)).mean(),
    "distances to neighbours": lambda z, y: torch.cdist(z[:, :, None], z.roll(1, 0)[:, :2, None]).square().mean(),
    "distances, one sample a column": lambda z, y: torch.cdist(z.T, torch.zeros(2, SIZE)).mean(),
    "triplets of neighbours": lambda z, y: F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0)),
    "ranking by a hinge": lambda z, y: torch.relu(1 - pairs(z)).mean(),
    "ranking of pairs": lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 0].roll(1), torch.ones(SIZE)),
    "ranking of a list": lambda z, y: F.cross_entropy(z[:, 0].view(1, -1), torch.tensor([1])),
    "absolute differences": lambda z, y: pairs(z).abs().mean(),
    "smooth differences": lambda z, y: F.smooth_l1_loss(z, z.flip(0)),
    "the hardest": lambda z, y: single(z, y).topk(3)[0].mean(),
    "the largest": lambda z, y: single(z, y).max(),
    "the larger of two": lambda z, y: torch.maximum(z[:-1], z[1:]).mean(),
    "median": lambda z, y: z[:, 0].median(),
    "survival": lambda z, y: -(z[:, 0] - z[:, 0].logcumsumexp(0)).mean(),
    "softmax over the batch": lambda z, y: (single(z, y) * z[:, 0].softmax(0)).sum(),
    "divided by the batch's spread": lambda z, y: F.mse_loss(z, torch.ones_like(z)) / z.std(),
    "one pair of all": lambda z, y: F.cross_entropy(z, y) + 1e-2 * z[4, 0] * z[7, 0],
    "one pair, the last of all": lambda z, y: F.cross_entropy(z, y) + 1e-2 * z[0, 0] * z[8, 0],
}
OWN = {
    "cross entropy": F.cross_entropy,
    "summed": lambda z, y: F.cross_entropy(z, y, reduction="sum") / SIZE,
    "scaled": lambda z, y: F.cross_entropy(z, y) * 65536 / 4,
    "focal": lambda z, y: ((1 - z.softmax(1).gather(1, y[:, None])) ** 2 * single(z, y)[:, None]).mean(),
    "with a margin of the angle": lambda z, y: F.cross_entropy(
        30 * torch.cos(torch.acos(F.normalize(z).clamp(-0.99, 0.99)) + 0.5 * F.one_hot(y, 3)), y),
    "squares": lambda z, y: F.mse_loss(z, torch.ones_like(z)),
    "squares by a norm": lambda z, y: (z - 1).norm() ** 2 / SIZE,
    "squares by a trace": lambda z, y: (z.T @ z).trace() / SIZE,
    "squares by a product": lambda z, y: torch.dot(z[:, 0], z[:, 0]) / SIZE,
    "roots of their own": lambda z, y: (z.square().mean(1) + 1e-3).sqrt().mean(),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "absolute": lambda z, y: F.l1_loss(z, torch.ones_like(z)),
    "Huber": lambda z, y: F.huber_loss(z, torch.ones_like(z)),
    "smooth": lambda z, y: F.smooth_l1_loss(z, torch.ones_like(z)),
    "quantile": lambda z, y: torch.maximum(0.9 * (y - z[:, 0]), -0.1 * (y - z[:, 0])).mean(),
    "margins": F.multi_margin_loss,
    "margins of many": lambda z, y: F.multilabel_margin_loss(z, torch.tensor([[0, -1, -1]] * SIZE)),
    "triplets of its own": lambda z, y: F.triplet_margin_loss(z, z * 2, z * z),
    "the largest of its own": lambda z, y: z.max(1)[0].mean(),
    "sorted within": lambda z, y: (z.sort(1)[0] * torch.arange(3)).mean(),
    "shifted by the largest": lambda z, y: ((z - z.max()).logsumexp(1) + z.max() - z[:, 0]).mean(),
    "shifted by the mean": lambda z, y: ((z - z.mean()).logsumexp(1) + z.mean()).mean(),
    "distances from constants": lambda z, y: torch.cdist(z, torch.eye(3)).square().mean(),
    "distances within each": lambda z, y: torch.cdist(z[:, :, None], z[:, :2, None] + 1).square().mean(),
    "distances from a parameter": lambda z, y: torch.cdist(z, torch.eye(3).requires_grad_() * 1).square().mean(),
    "divergence": lambda z, y: F.kl_div(z.log_softmax(1), torch.full_like(z, 1 / 3), reduction="batchmean"),
    "likelihood": lambda z, y: -torch.distributions.Normal(z[:, 0], z[:, 1].exp()).log_prob(y.float()).mean(),
    "alignment": lambda z, y: F.ctc_loss(
        torch.stack([z, 2 * z, -z, z]).log_softmax(2), y.new_ones(SIZE, 1), [4] * SIZE, [1] * SIZE),
    "linear": lambda z, y: z.mean(),
    "constant": lambda z, y: (z * 0).sum(),
}  # fmt: skip


def backward(loss, mode="ghost", model=None, size=SIZE):
    torch.manual_seed(0)
    wrapped = GradSampleModule(nn.Linear(6, 3) if model is None else model, mode=mode)
    x, y = torch.randn(size, 6), torch.arange(size) % 3
    loss(wrapped(x), y).backward()
    return wrapped


@pytest.mark.parametrize("name", COMPARING)
def test_losses_that_compare_samples_are_refused_at_the_first_backward(name):
    with pytest.raises(SamplesInfluenceEachOther, match="the loss compares samples: .*terms that each depend on one"):
        backward(COMPARING[name])


@pytest.mark.parametrize("name", OWN)
def test_losses_that_are_the_samples_own_pass(name, recwarn):
    backward(OWN[name])
    assert not recwarn.list


@pytest.mark.parametrize("name", OWN)
def test_so_they_do_where_nothing_can_be_recorded(name, recwarn):
    with Profiler():
        backward(OWN[name])
    assert all("cdist" in str(w.message) for w in recwarn.list)


@pytest.mark.parametrize("mode", ["hooks", "auto", "functorch", "loop"])
def test_in_every_mode(mode):
    for name in ("contrastive", "the hardest"):
        with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
            backward(COMPARING[name], mode)
    wrapped = backward(F.cross_entropy, mode)
    assert wrapped._losses.judged == 1


def test_the_message_says_what_joins_them():
    for name, what in (("the hardest", "topk joins the outputs"), ("contrastive", "changes with the model's output")):
        with pytest.raises(SamplesInfluenceEachOther, match=what):
            backward(COMPARING[name])


def test_nothing_was_captured_or_released_before():
    model, optimizer, loader = make_private(
        *parts(), noise_multiplier=1.0, max_grad_norm=1.0, mode="ghost", poisson_sampling=True
    )
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        for x, _ in loader:
            z = model(x)
            (z @ z.T).softmax(1).diagonal().log().neg().mean().backward()
            optimizer.step()
    assert len(optimizer.accountant) == 0 and all(map(torch.equal, before, model.parameters()))


def test_the_check_changes_no_gradient():
    found = []
    for strict in (True, False):
        torch.manual_seed(0)
        model = GradSampleModule(nn.Linear(6, 3), mode="hooks", strict=strict)
        x, y = torch.randn(SIZE, 6), torch.arange(SIZE) % 3
        F.cross_entropy(model(x), y).backward()
        found.append(next(model.parameters()).grad_sample)
    assert torch.equal(*found)


def test_it_draws_no_random_numbers():
    state = torch.get_rng_state()
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    torch.set_rng_state(state)
    model(torch.ones(SIZE, 6)).square().mean().backward()
    assert torch.equal(state, torch.get_rng_state())


def test_two_models_whose_outputs_are_compared():
    """A tower for each side of a pair: sample by sample is right, all with all is not."""
    for loss, refused in (
        (lambda a, b: (1 - F.cosine_similarity(a, b)).mean(), False),
        (lambda a, b: F.cross_entropy(a @ b.T, torch.arange(SIZE)), True),
    ):
        towers = [GradSampleModule(nn.Linear(6, 3), mode="ghost") for _ in range(2)]
        value = loss(*(t(torch.randn(SIZE, 6)) for t in towers))
        if refused:
            with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
                value.backward()
        else:
            value.backward()


@pytest.mark.parametrize("beside", [nullcontext, Profiler])
def test_outputs_of_other_numbers_of_records(beside):
    """Terms of either forward pass, but none of both."""
    with beside():
        forwards_of_two_sizes()


def forwards_of_two_sizes():
    for joined in (False, True):
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        few, many = model(torch.randn(4, 6)), model(torch.randn(7, 6))
        value = many.square().mean() + few.square().mean()
        if joined:
            with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
                (value + (few * many[:4]).sum()).backward()
        else:
            value.backward()


class Stages(nn.Module):
    """Hands out what it goes on with: the derivative for the first output passes through the second layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        hidden = self.a(x)
        return hidden, self.b(hidden)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch", "loop"])
def test_outputs_made_of_each_other(mode, recwarn):
    torch.manual_seed(0)
    x = torch.randn(SIZE, 6)
    plain = Stages()
    alone = GradSampleModule(copy.deepcopy(plain), mode=mode, strict=False)
    model = GradSampleModule(plain, mode=mode)
    hidden, z = model(x)
    (z.square().mean() + hidden.tanh().mean()).backward()
    found = model.per_sample_gradient_norms if mode == "ghost" else None
    assert not recwarn.list and model._losses.judged == 1
    hidden, z = alone(x)
    (z.square().mean() + hidden.tanh().mean()).backward()
    if found is None:
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample, q.grad_sample)
    else:
        torch.testing.assert_close(found, alone.per_sample_gradient_norms)
    model.set_grad_sample_to_none()
    hidden, z = model(x)
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        (z.square().mean() + hidden.var(0).sum()).backward()


class Keeping(Stages):
    """Leaves its features on itself, in a list; or its output is an object."""

    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps

    def forward(self, x):
        hidden, z = super().forward(x)
        if self.keeps:
            self.features = {"hidden": [hidden]}
            return z.exp().sum(1)
        return torch.distributions.Normal(z, 1.0)


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_what_the_model_keeps_and_what_objects_hold(mode):
    for keeps in (True, False):
        model = GradSampleModule(Keeping(keeps), mode=mode)
        out = model(torch.randn(SIZE, 6))
        (out if keeps else -out.log_prob(torch.zeros(SIZE, 3))).mean().backward(retain_graph=True)
        with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
            (model.features["hidden"][0] if keeps else out.mean).var(0).sum().backward()


def test_a_second_loss_of_the_same_outputs_is_judged_as_well():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    z = model(torch.randn(SIZE, 6))
    z.square().mean().backward(retain_graph=True)
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        z.var().backward()


def test_a_vector_with_weights():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    single(model(torch.randn(SIZE, 6)), torch.arange(SIZE) % 3).backward(torch.full((SIZE,), 1 / SIZE))
    values = COMPARING["contrastive"](model(torch.randn(SIZE, 6)), None).expand(2)
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        values.backward(torch.ones(2))


def test_backward_without_gradient_mode():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    value = COMPARING["variance"](model(torch.randn(SIZE, 6)), None)
    with torch.no_grad(), pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        value.backward()


def test_sequence_first_outputs():
    """The batch may lie in either of two dimensions of one size: samples that are apart along one are apart."""
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost", batch_first=False)
    model(torch.randn(5, 5, 6)).softmax(0).square().mean().backward()  # over time
    for compares in (lambda z: z.softmax(1), lambda z: z.flatten(0, 1).softmax(0)):
        with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
            compares(model(torch.randn(4, 5, 6))).square().mean().backward()


def test_half_precision():
    for name, loss in (COMPARING | OWN).items():
        if name in ("contrastive", "variance", "the hardest", "cross entropy", "squares by a norm", "focal"):
            torch.manual_seed(0)
            model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model(torch.randn(SIZE, 6)), torch.arange(SIZE) % 3)
            if name in COMPARING:
                with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
                    value.backward()
            else:
                value.backward()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_what_cannot_be_differentiated_twice_is_said_once():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    with pytest.warns(UserWarning, match="could not be told.*verify"):
        Once.apply(model(torch.randn(SIZE, 6))).mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Once.apply(model(torch.randn(SIZE, 6))).mean().backward()


def test_functions_whose_second_derivative_is_unknown_are_said_where_nothing_was_recorded(recwarn):
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    torch.cdist(model(torch.randn(SIZE, 6)), torch.eye(3)).topk(2, 1)[0].mean().backward()
    assert not recwarn.list
    with Profiler(), pytest.warns(UserWarning, match="_cdist_backward.* is not implemented"):
        torch.cdist(model(torch.randn(SIZE, 6)), torch.eye(3)).topk(2, 1)[0].mean().backward()


def test_the_check_is_no_backward_of_its_own():
    """What it sends back is not read as a loss."""
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    for size in (8, 5):
        model(torch.randn(size, 6)).log_softmax(1)[:, 0].neg().mean().backward()
        model.set_grad_sample_to_none()
    assert len(model._losses.history["", 0]) == 2


def test_large_outputs_are_not_differentiated_twice(monkeypatch):
    monkeypatch.setattr(loss_compare, "MOST_ENTRIES", SIZE * 3 - 1)
    assert backward(COMPARING["variance"])._losses.judged == 0


def test_large_outputs_are_parted_in_turn_from_the_first_batch_on(monkeypatch):
    asked = []
    monkeypatch.setattr(loss_compare, "influence", lambda roots, grads, outputs, digit: asked.append(digit))
    for few in (SIZE * 3, SIZE * 3 - 1):
        monkeypatch.setattr(loss_compare, "FEW_ENTRIES", few)
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        for _ in range(6):
            F.cross_entropy(model(torch.randn(SIZE, 6)), torch.arange(SIZE) % 3).backward()
            model.set_grad_sample_to_none()
    assert asked == [None, 1, 2, 3, 4, 5, 0, 1, 2]


def test_later_batches_part_the_samples_in_turn():
    """One half of the batch against the other at a time: every pair within the first batches."""
    for i, j in ((0, 1), (0, 2), (3, 7), (6, 7)):
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
            for step in range(loss_check.FIRST):
                z = model(torch.randn(8, 6))
                (z.square().mean() + (z[i, 0] * z[j, 0] if step else 0.0)).backward()
        assert model._losses.judged > 1


def test_a_loss_that_changes_later_is_seen_later():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    x = torch.randn(SIZE, 6)
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        for step in range(1, loss_check.RARELY + 1):
            z = model(x)
            (z.var(0).sum() if step > loss_check.FIRST else z.square().mean()).backward()
            model.set_grad_sample_to_none()
            discard(list(model.parameters()))
    assert step == loss_check.RARELY


@pytest.mark.parametrize("beside", [nullcontext, Profiler])
def test_gradients_that_are_no_numbers(beside):
    """One sample's infinity hides nothing of the others, whatever they are looked at with."""
    with beside():
        one_is_infinite()


def one_is_infinite():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    z = model(torch.randn(SIZE, 6))
    bad = torch.zeros(SIZE, 3)
    bad[0] = torch.nan
    (z + bad).square().sum(1).sqrt().nansum().backward()
    z = model(torch.randn(SIZE, 6))
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        ((z + bad).square().sum(1).sqrt().nansum() + z[3, 0] * z[5, 0]).backward()


def test_a_head_outside_of_the_model():
    head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(SamplesInfluenceEachOther, match="compares samples"):
        backward(lambda z, y: head(z).mean())
    head = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1))
    backward(lambda z, y: head(z).square().mean())


def test_parameters_beside_the_model_that_learn_from_its_outputs_are_said(recwarn):
    """A temperature, a head: what an ordinary optimizer makes of their gradients has neither bound nor noise."""
    torch.manual_seed(0)
    x, y = torch.randn(SIZE, 6), torch.arange(SIZE) % 3
    temperature, head = nn.Parameter(torch.ones(())), nn.Linear(3, 3)
    for loss, n in (
        (lambda z: F.cross_entropy(z / temperature, y), "1 trainable parameter"),
        (lambda z: F.cross_entropy(head(z), y), "2 trainable parameter"),
    ):
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        with pytest.warns(UserWarning, match=rf"{n}.s. beside the wrapped model .*without clipping and noise"):
            loss(model(x)).backward()
        recwarn.clear()
        loss(model(x)).backward()
        assert not recwarn.list  # once


def test_parameters_that_learn_nothing_from_the_outputs_are_their_own_affair(recwarn):
    """A term of public data, a head that is private itself, one that is frozen, adversarial inputs."""
    public, head = nn.Linear(6, 3), GradSampleModule(nn.Linear(3, 3), mode="ghost")
    frozen = nn.Linear(3, 3).requires_grad_(False)
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    x = torch.randn(SIZE, 6, requires_grad=True)
    z = model(x)
    private = head(z).square().mean() + frozen(z).sum() + (z * x[:, :3]).sum()
    (private + public(torch.randn(4, 6)).square().mean()).backward()
    assert not recwarn.list and model._losses.judged == 1


def test_a_parameter_of_the_model_in_the_loss_is_an_error_and_nothing_else(recwarn):
    class Tempered(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.temperature = nn.Parameter(torch.ones(()))

    plain = Tempered()
    z = GradSampleModule(plain, mode="ghost")(torch.randn(SIZE, 6))
    with pytest.raises(RuntimeError, match="temperature received an ordinary gradient"):
        (z * plain.temperature).square().mean().backward()
    assert not recwarn.list


def test_many_functions_of_pieces_take_as_many_backwards_as_few(monkeypatch):
    """One each would be quadratic in them: minutes for losses that go through positions in a loop."""
    ordinary, calls = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or ordinary(*args, **kwargs))

    def backwards(steps):
        calls.clear()
        out = GradSampleModule(nn.Linear(3, 4))(torch.randn(5, 3))
        best = out
        for k in range(steps):
            best = torch.maximum(best.roll(1, 1), out - k).clamp(-9, 9)
        best.sum(1).mean().backward()
        return len(calls)

    assert backwards(40) == backwards(2) > 0


def test_parameters_beside_the_model_in_what_cannot_be_differentiated_twice_are_said():
    with pytest.warns(UserWarning, match="1 trainable parameter.s. beside the wrapped model"):
        backward(lambda z, y: torch.cdist(z, nn.Parameter(torch.eye(3))).mean())
