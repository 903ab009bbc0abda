"""Losses that compare samples past autograd, by detached outputs or by labels, are refused; look-alikes pass."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gsm import GradSampleModule, make_private
from gsm.layout import SamplesInfluenceEachOther
from tests.gsm.training import parts

SIZES = (9, 7, 9, 6, 11, 8, 5, 12)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0])
BANK = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))


def single(z, y):
    return F.cross_entropy(z, y, reduction="none")


def importances(z, y):
    with torch.no_grad():
        weights = single(z, y).softmax(0)
    return (single(z, y) * weights).sum()


def hardest(z, y):
    losses = single(z, y)
    return (losses * (losses >= losses.detach().topk(3)[0].min())).mean()


def ranks(z, y):
    return (z[:, 0] * z[:, 0].detach().argsort().argsort()).mean()


PAST_AUTOGRAD = {
    "divided by their sum": lambda z, y: (single(z, y) / single(z, y).detach().sum()).sum(),
    "importances": importances,
    "relative to the largest": lambda z, y: (single(z, y) / single(z, y).data.max()).mean(),
    "the hardest by a mask": hardest,
    "standardised": lambda z, y: (single(z, y) / single(z, y).detach().std()).mean(),
    "centred by a constant": lambda z, y: (z - z.detach().mean(0)).square().mean(),
    "targets of the neighbour": lambda z, y: F.mse_loss(z, z.detach().roll(1, 0)),
    "ranks": ranks,
    "the largest as a number": lambda z, y: (z / float(z.detach().abs().max().sqrt() * 1)).mean()
    + (z * z.detach().mean()).mean(),
}
AS_NUMBERS = {
    "divided by itself": lambda z, y: (loss := F.cross_entropy(z, y)) / loss.item(),
    "centred": lambda z, y: (z - z.mean().item()).square().mean(),
    "standardised by two": lambda z, y: (z * 2 / float(z.detach().std()) + z.min().item()).square().mean(),
}
BY_LABELS = {
    "weights of classes": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS.to(z)),
    "squares of one class": lambda z, y: ((z[:, 0] - 1) ** 2 * (y == 0)).sum() / (y == 0).sum().clamp(min=1),
    "squares with weights": lambda z, y: ((z[:, 0] - 1) ** 2 * WEIGHTS[y]).sum() / WEIGHTS[y].sum(),
    "sums of classes": lambda z, y: (z.new_zeros(3).index_add(0, y, single(z, y)) * WEIGHTS.to(z)).sum()
    / WEIGHTS.to(z).index_select(0, y).sum(),
    "spread of the targets": lambda z, y: F.l1_loss(z[:, 0], y.float()) / (1 + y.float().var()),
}
OWN = {
    "weights of its own class": lambda z, y: (single(z, y) * WEIGHTS.to(z)[y]).mean(),
    "its own importance": lambda z, y: (single(z, y) * single(z, y).detach().neg().exp()).mean(),
    "its own mask": lambda z, y: (single(z, y) * (z.detach().max(1)[0] > 0.5)).mean(),
    "picked by its label": lambda z, y: -z.log_softmax(1)[torch.arange(len(z)), y].mean(),
    "those of some classes": lambda z, y: single(z[y > 0], y[y > 0]).sum() / len(z),
    "noise": lambda z, y: (z + torch.randn_like(z)).square().mean(),
    "dropout": lambda z, y: F.dropout(z, 0.5).square().mean(),
    "in place": lambda z, y: single(z.clone().mul_(2), y).mul_(3).mean(),
    "flipped there and back": lambda z, y: F.relu(z.flip(0)).flip(0).square().mean(),
    "smoothed by hand": lambda z, y: -(z.log_softmax(1) * (0.9 * F.one_hot(y, 3) + 0.1 / 3)).sum(1).mean(),
    "compared with a bank": lambda z, y: F.cross_entropy(z @ BANK.T.to(z), y),
    "its own pair of views": lambda z, y: F.mse_loss(z[:, :1], z[:, 1:2].detach()),
    "its own number": lambda z, y: sum(loss * loss.item() for loss in single(z, y)) / len(z),
    "a number that is logged": lambda z, y: F.cross_entropy(z, y) * 0.5 + 0 * len([z.mean().item()]),
    "one that is also written": lambda z, y: (
        0 * len([(entry > 0).mul(0.5).item() for entry in z[:, 0]]) + F.cross_entropy(z, y) * 0.5
    ),
    "a schedule": lambda z, y: F.cross_entropy(z, y) * torch.rand(()),
}


def batch(size, generator):
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def train(loss, *, make=batch, sizes=SIZES, mode="ghost", model=None, dtype=torch.float32, **options):
    """Backwards over the first batches: the number of the one that was refused, and why; None if none was."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    wrapped = GradSampleModule(nn.Linear(6, 3, dtype=dtype) if model is None else model, mode=mode, **options)
    for step, size in enumerate(sizes):
        x, y = make(size, generator)
        x = x.to(dtype) if x.is_floating_point() else x
        try:
            loss(wrapped(x), y).backward()
        except SamplesInfluenceEachOther as error:
            return step, str(error)
        wrapped.set_grad_sample_to_none()
    return None


@pytest.mark.parametrize("name", PAST_AUTOGRAD)
def test_detached_outputs_of_others_are_refused_at_the_first_backward(name):
    step, message = train(PAST_AUTOGRAD[name])
    assert step == 0 and "compares samples where autograd does not follow" in message


@pytest.mark.parametrize("name", AS_NUMBERS)
def test_numbers_that_python_takes_from_all_samples_and_gives_back_are_followed(name):
    step, message = train(AS_NUMBERS[name])
    assert step == 0 and "compares samples where autograd does not follow" in message


@pytest.mark.parametrize("name", BY_LABELS)
def test_labels_of_others_are_refused_before_they_are_sent_back_thrice(name):
    step, message = train(BY_LABELS[name])
    assert 0 < step <= 3 and "multiplies what it sends back for all by" in message and "(7,)" in message or step > 1


@pytest.mark.parametrize("name", OWN)
def test_losses_that_are_the_samples_own_pass(name, recwarn):
    assert train(OWN[name]) is None and not recwarn.list


@pytest.mark.parametrize("mode", ["hooks", "auto", "functorch", "loop"])
def test_in_every_mode(mode):
    assert train(PAST_AUTOGRAD["importances"], mode=mode)[0] == 0
    assert train(BY_LABELS["weights of classes"], mode=mode)[0] == 1
    assert train(OWN["its own importance"], mode=mode) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_precisions(dtype):
    assert train(PAST_AUTOGRAD["importances"], dtype=dtype)[0] == 0
    assert train(BY_LABELS["weights of classes"], dtype=dtype)[0] in (1, 2)
    for name in ("weights of its own class", "dropout", "compared with a bank"):
        assert train(OWN[name], dtype=dtype) is None


def test_every_pair_is_parted_in_the_first_batch():
    for i, j in ((0, 8), (8, 0), (3, 4), (6, 7), (7, 6)):

        def paired(z, y, i=i, j=j):
            return F.cross_entropy(z, y) + 0.1 * z[i, 0] * z[j, 0].detach()

        assert train(paired)[0] == 0, (i, j)
        assert train(lambda z, y, i=i: F.cross_entropy(z, y) + 0.1 * z[i, 0] * z[i, 1].detach(), sizes=(9,)) is None


def test_labels_that_change_more_than_a_factor_are_said_once(recwarn):
    """No proof: a tensor that looks like labels may be another thing."""
    assert train(lambda z, y: F.mse_loss(z[:, 0], y.float() - y.float().mean())) is None
    (warning,) = recwarn.list
    assert "replacing other samples' rows" in str(warning.message) and "per_sample_loss" in str(warning.message)


def test_sequences_and_flattened_labels():
    """A mean over all tokens of a padded batch, its labels flattened by hand before the forward, of several lengths."""

    def padded(size, generator):
        x = torch.randn(size, int(torch.randint(3, 6, (), generator=generator)), 6, generator=generator)
        y = torch.randint(-1, 3, x.shape[:2], generator=generator)
        return x, y.flatten()

    def tokens(z, y):
        return F.cross_entropy(z.flatten(0, 1), y, ignore_index=-1)

    def own(z, y):
        losses = F.cross_entropy(z.flatten(0, 1), y, ignore_index=-1, reduction="none").view(len(z), -1)
        return (losses.sum(1) / (y.view(len(z), -1) >= 0).sum(1).clamp(min=1)).mean()

    step, message = train(tokens, make=padded)
    assert 0 < step <= 2 and "it is normalised over the batch" in message
    assert train(own, make=padded) is None


def test_the_batch_in_the_second_dimension():
    def transposed(size, generator):
        x, y = torch.randn(4, size, 6, generator=generator), torch.randint(-1, 3, (4, size), generator=generator)
        return x, y

    def tokens(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1)

    def own(z, y):
        losses = F.cross_entropy(z.permute(1, 2, 0), y.t(), ignore_index=-1, reduction="none")
        return (losses.sum(1) / (y.t() >= 0).sum(1).clamp(min=1)).mean()

    assert train(tokens, make=transposed, batch_first=False)[0] == 1
    assert train(own, make=transposed, batch_first=False) is None
    assert train(own, make=transposed, batch_first=False, sizes=[4] * 8) is None


def test_batches_of_one_size_are_judged_by_their_fourth():
    found = train(BY_LABELS["squares with weights"], sizes=[9] * 8)
    assert found is not None and found[0] == 3
    assert train(OWN["weights of its own class"], sizes=[9] * 8) is None


def test_concatenated_targets_are_left_alone(recwarn):
    """Where a record's targets begin depends on the lengths of those before."""

    def speech(size, generator):
        lengths = torch.randint(1, 4, (size,), generator=generator)
        targets = torch.randint(1, 3, (int(lengths.sum()),), generator=generator)
        return torch.randn(size, 6, generator=generator), (targets, lengths)

    def alignment(z, y):
        frames = torch.stack([z, 2 * z, -z, z / 2, z, -2 * z, z], 0).log_softmax(2)
        return F.ctc_loss(frames, y[0], torch.full_like(y[1], 7), y[1], reduction="none").mean()

    assert train(alignment, make=speech) is None and not recwarn.list


def test_positions_in_the_batch_are_left_alone(recwarn):
    """Indices into the flattened output mean nothing in another place."""

    def masked(size, generator):
        x = torch.randn(size, 4, 6, generator=generator)
        return x, torch.arange(size) * 4 + torch.randint(4, (size,), generator=generator)

    for pick in (lambda flat, at: flat[at], lambda flat, at: flat.index_select(0, at)):
        assert train(lambda z, at, pick=pick: pick(z.flatten(0, 1), at).square().mean(), make=masked) is None
    assert not recwarn.list


def test_positions_in_the_labels_are_left_alone(recwarn):
    """Sequences sorted by length in the collate function, with the order that puts the labels in their places."""

    def sorted_by_length(size, generator):
        x, y = batch(size, generator)
        order = torch.randint(9, (size,), generator=generator).argsort()
        return x[order], (y, order)

    def put_back(z, y):
        return F.cross_entropy(torch.zeros_like(z).index_copy(0, y[1], z), y[0])

    for loss in (lambda z, y: F.cross_entropy(z, y[0][y[1]]), put_back):
        for sizes in ([2] * 8, [3] * 8, [4] * 8, [5] * 8, [9] * 8, SIZES):
            assert train(loss, make=sorted_by_length, sizes=sizes) is None
    assert not recwarn.list


def test_weights_of_places_in_the_batch_are_no_labels(recwarn):
    """They are the same in every batch, as far as it goes: what they add up to depends on its size only."""
    table = torch.linspace(1, 2, 12)

    def placed(size, generator):
        x, y = batch(size, generator)
        return x, (y, table[:size].clone())

    assert train(lambda z, y: (single(z, y[0]) * y[1]).sum() / y[1].sum(), make=placed, sizes=(9, 7, 8, 6)) is None
    assert not recwarn.list


def test_tables_are_no_labels(recwarn):
    """A bank of as many rows as there are samples, or twice as many, that never changes, or beside the batch."""
    for rows, moves in ((9, False), (18, False), (18, True), (36, True)):
        bank = torch.randn(rows, 3)

        def make(size, generator, bank=bank, moves=moves):
            if moves:
                bank.add_(torch.randn_like(bank))
            return batch(size, generator)

        def against(z, y, bank=bank):
            return (z @ bank.T).logsumexp(1).mean()

        assert train(against, make=make, sizes=(9, 6, 9, 3, 9, 18, 9, 6)) is None, (rows, moves)
    assert not recwarn.list


def moving(*shape):
    return lambda k: torch.randn(*shape, generator=torch.Generator().manual_seed(k))


MOVING = {
    "classes": (moving(9, 3), lambda z, y, t: F.cross_entropy(z @ t.T, y)),
    "twice as many": (moving(18, 3), lambda z, y, t: F.cross_entropy(z @ t.T, y)),
    "weights of classes": (moving(9), lambda z, y, t: (single(z, y) * t.exp()[y]).mean()),
    "a prior": (moving(9), lambda z, y, t: F.cross_entropy(z.repeat(1, 3) + t, y)),
    "weights of features": (moving(9), lambda z, y, t: (z.repeat(1, 3).square() * t.softmax(0)).sum(1).mean()),
    "a head": (moving(9, 4), lambda z, y, t: F.cross_entropy(F.linear(z, t[:, :3], t[:, 3].clone()), y)),
}


@pytest.mark.parametrize("name", MOVING)
def test_moving_tables_as_large_as_all_batches_are_no_labels(name, recwarn):
    """They do not change places with the samples."""
    draw, own = MOVING[name]
    table = torch.zeros_like(draw(0))

    def loss(z, y):
        return own(z, y, table)

    def wrong(z, y):
        return own(z, y, table) / (WEIGHTS[y].sum() / 9)

    for right, function in ((True, loss), (False, wrong)):
        steps = iter(range(1, 99))

        def make(size, generator, steps=steps):
            table.copy_(draw(next(steps)))
            return batch(size, generator)

        found = train(function, make=make, sizes=[9] * 8)
        assert found is None if right else "normalised over the batch" in found[1]
    assert not recwarn.list


def test_sets_of_negatives_may_be_the_records(recwarn):
    """Each record's own hard negative, shared within the batch, looks the same: it is said."""

    def paired(size, generator):
        return batch(size, generator)[0], torch.randn(size, 3, generator=generator)

    assert train(lambda z, others: (z @ others.T).logsumexp(1).mean(), make=paired, sizes=[9] * 6) is None
    (warning,) = recwarn.list
    assert "negatives that all samples share" in str(warning.message)


def test_sizes_that_follow_the_outputs_are_no_crash(recwarn):
    """Python has them, so they stay as they were when other outputs are put in."""

    def chosen(z, y):
        keep = z.detach()[:, 0] > 0
        count = int(keep.sum())
        return (z[keep].view(count, 3) * torch.ones(count, 3)).square().sum() / len(z)

    assert train(chosen) is None and not recwarn.list


def test_vectors_of_losses():
    """`step(loss=)`: entries that are detached weights of the batch."""
    model, optimizer, loader = make_private(*parts(), noise_multiplier=1.0)
    x, y = next(iter(loader))
    losses = single(model(x), y)
    with pytest.raises(SamplesInfluenceEachOther, match="autograd does not follow"):
        optimizer.step(loss=losses / losses.detach().sum())
    assert optimizer.releases == 0 and not optimizer.accountant.history


def test_what_is_not_deterministic_proves_nothing(monkeypatch):
    """As sums by atomic additions on a GPU: computed again, they differ by themselves."""
    from gsm.loss_replay import Replay

    exact, calls = Replay.gradients, iter(range(1, 1000))
    monkeypatch.setattr(
        Replay, "gradients", lambda self, others: [g * (1 + 5e-5 * math.sin(next(calls))) for g in exact(self, others)]
    )
    assert train(F.cross_entropy) is None


def test_what_does_not_send_back_the_same_is_not_believed():
    """A function with a gradient of its own: what is recorded of it says nothing about the backward."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z / z.sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            return g

    with pytest.warns(UserWarning, match="could not be told"):
        assert train(lambda z, y: Straight.apply(z.square()).mean() + z.mean()) is None


def test_other_losses_beside_and_a_second_backward():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    z, y = model(torch.randn(9, 6)), torch.arange(9) % 3
    good, bad = F.cross_entropy(z, y), PAST_AUTOGRAD["importances"](z, y)
    good.backward(retain_graph=True)
    with pytest.raises(SamplesInfluenceEachOther, match="autograd does not follow"):
        bad.backward()


def test_losses_made_after_the_first_of_two_backwards():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    for second in (OWN["its own importance"], PAST_AUTOGRAD["importances"]):
        z, y = model(torch.randn(9, 6)), torch.arange(9) % 3
        F.cross_entropy(z, y).backward(retain_graph=True)
        loss = second(z, y)
        if second is OWN["its own importance"]:
            loss.backward()
            model.set_grad_sample_to_none()
            model.zero_grad(set_to_none=True)
    with pytest.raises(SamplesInfluenceEachOther, match="autograd does not follow"):
        loss.backward()


def test_gradients_that_a_backward_begins_with():
    """`losses.backward(weights)`, and an output's own gradient, computed by hand."""
    x, y = torch.randn(9, 6), torch.arange(9) % 3

    def weighted(z, weights):
        losses = (z[:, 0] - y) ** 2
        losses.backward(weights(losses.detach()))

    def by_hand(z, weights):
        inside = z.detach().requires_grad_()
        (g,) = torch.autograd.grad((inside[:, 0] - y).square().mean(), inside)
        z.backward(weights(g))

    for send in (weighted, by_hand):
        for fixed in (lambda a: torch.full_like(a, 0.1), lambda a: a.tanh()):
            send(GradSampleModule(nn.Linear(6, 3), mode="ghost")(x), fixed)
        with pytest.raises(SamplesInfluenceEachOther, match="autograd does not follow"):
            send(GradSampleModule(nn.Linear(6, 3), mode="ghost")(x), lambda a: a / a.norm())


def test_a_step_is_not_recorded():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    model, optimizer, loader = make_private(*parts(), noise_multiplier=1.0)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward(retain_graph=True)
    assert _get_current_dispatch_mode_stack()  # another loss may come
    optimizer.step()
    assert not _get_current_dispatch_mode_stack()


def test_two_models_and_forwards_without_gradients_in_between():
    first, second = (GradSampleModule(nn.Linear(6, 3), mode="ghost") for _ in range(2))
    x = torch.randn(9, 6)
    for step in range(3):
        a, b = first(x), second(x)
        with torch.no_grad():
            target = first(x).softmax(1)
        loss = F.cross_entropy(a, target) + F.mse_loss(b, a.detach())
        if step == 2:
            loss = loss / b.detach().norm()
            with pytest.raises(SamplesInfluenceEachOther, match="autograd does not follow"):
                loss.backward()
        else:
            loss.backward()
        for model in (first, second):
            model.set_grad_sample_to_none()
            model.zero_grad(set_to_none=True)


def test_nothing_is_said_of_ordinary_training_and_nothing_is_left_on():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    model, optimizer, loader = make_private(*parts(), noise_multiplier=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            assert not _get_current_dispatch_mode_stack()
            optimizer.step()
    model(x)  # never sent back: recorded until the next
    F.cross_entropy(model(x), y).backward()
    assert not _get_current_dispatch_mode_stack()


def test_losses_that_other_ranks_have_a_part_in_are_not_computed_again(monkeypatch):
    """The others would not come along: the training would hang."""
    from torch.distributed import HashStore, all_reduce, destroy_process_group, init_process_group

    from gsm.recording import Program

    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, others: runs.append(self) or run(self, others))
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:

        def scaled(z, y):
            total = torch.ones(())
            all_reduce(total)
            return F.cross_entropy(z, y) / total

        assert train(scaled) is None and not runs
    finally:
        destroy_process_group()
    assert train(F.cross_entropy) is None and runs
