"""Class 4: samples that influence each other. Then no clipping bounds what one record changes."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from opacus.validators.errors import UnsupportedModuleError
from torch import nn

from gsm import GradSampleModule, verify
from gsm.clipping_user import UserClipping
from gsm.layout import SamplesInfluenceEachOther
from tests.attacks.tools import CE, FEATURES, data, mlp, step, training, watched

X, Y = data(8).tensors
TRAINABLE = [nn.BatchNorm1d, nn.SyncBatchNorm, nn.LazyBatchNorm1d]


@pytest.mark.parametrize("layer", [*TRAINABLE, lambda n=None: nn.BatchNorm1d(4, affine=False)])
def test_every_batch_norm_is_refused_with_its_path(layer):
    """Guard: ``validation.validate``; frozen or without parameters they mix samples all the same."""
    norm = layer() if layer is nn.LazyBatchNorm1d else layer(4)
    with pytest.raises(UnsupportedModuleError, match="1 .*BatchNorm.*get_compatible_module"):
        training(nn.Sequential(nn.Linear(FEATURES, 4), norm, nn.Linear(4, 3)))


def test_a_batch_norm_switched_to_training_later_is_refused():
    """Guard: checked at every forward, not only when wrapped."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4).eval().requires_grad_(False), nn.Linear(4, 3))
    wrapped, optimizer, _ = watched(model)
    step(wrapped, optimizer, X, Y)
    wrapped.train()
    with pytest.raises(SamplesInfluenceEachOther, match="1 is a BatchNorm1d in training mode"):
        wrapped(X)


class Disguised(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.out, self.what = nn.Linear(FEATURES, 4), nn.Linear(4, 3), what

    def forward(self, x):
        h = self.layer(x)
        if self.what == "standardised":
            h = (h - h.mean(0)) / (h.std(0) + 1e-3)
        elif self.what == "softmax over the batch":
            h = h.softmax(0)
        elif self.what == "attention over the batch":
            h = (h @ h.t()).softmax(1) @ h
        elif self.what == "divided by the largest":
            h = h / h.abs().max()
        elif self.what == "the neighbour added":
            h = h + h.roll(1, 0)
        elif self.what == "cumulative":
            h = h.cumsum(0)
        return self.out(h)


@pytest.mark.parametrize("what", ["standardised", "softmax over the batch", "attention over the batch",
                                  "divided by the largest", "the neighbour added", "cumulative"])  # fmt: skip
def test_batch_statistics_in_disguise_are_refused_at_the_first_batch(what):
    """Guard: the probe compares the first and the last sample's values with other neighbours between them.

    What shows only with rare values (a maximum that the two themselves hold) is for ``verify``.
    """
    x = X.clone()
    x[1:-1] *= 3
    with pytest.raises(SamplesInfluenceEachOther, match="[Ss]amples influence each other"):
        GradSampleModule(Disguised(what))(x)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_that_takes_the_batch_for_time_is_refused(layer):
    """Guard: as above, the last sample: with ``batch_first=False`` it sees all samples before it."""

    class Mistaken(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.out = layer(FEATURES, 4, batch_first=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.recurrent(x)[0][:, -1])

    with pytest.raises(ValueError, match="influence each other|batch"):
        GradSampleModule(Mistaken())(torch.randn(8, 6, FEATURES))


TARGETS = torch.tensor([0, 1, 2, 0, 1, -100, 2, 0])


@pytest.mark.parametrize("loss", [
    lambda out, rows: F.cross_entropy(out, TARGETS[rows]),  # ignore_index: the mean is over the others' count
    lambda out, rows: F.cross_entropy(out, Y[rows], weight=torch.tensor([1.0, 2.0, 5.0])),
    lambda out, rows: F.cross_entropy(out @ out.t(), torch.arange(len(out))),  # contrastive
    lambda out, rows: out.std(),
    lambda out, rows: out.sum() / out.abs().max(),
])  # fmt: skip
def test_losses_over_the_batch_are_shown_by_verify(loss):
    """Guard: ``verify(loss=)`` compares with one sample alone, whatever the loss; the loop sees only some of these."""
    report = verify(mlp(), X, loss=loss)
    assert not report.ok
    assert verify(mlp(), X, loss=lambda out, rows: F.cross_entropy(out, Y[rows])).ok


def test_class_weights_are_right_as_a_loss_per_sample():
    """The way out that SECURITY.md names: ``step(loss=)`` with reduction="none" weights every sample by itself."""
    weight = torch.tensor([1.0, 2.0, 5.0])
    model, optimizer, watch = watched(bound=1e6)
    optimizer.step(loss=CE(model(X), Y, weight=weight, reduction="none"))
    with_all = watch.sums[0]
    optimizer.zero_grad()
    optimizer.step(loss=CE(model(X[:7]), Y[:7], weight=weight, reduction="none"))
    optimizer.zero_grad()
    optimizer.step(loss=CE(model(X[7:]), Y[7:], weight=weight, reduction="none"))
    torch.testing.assert_close(with_all, watch.sums[1] + watch.sums[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 5])
def test_rows_taken_for_records_are_said(rows):
    """Guard: ``Tape._compare_rows``; a record with five rows contributes five times the bound."""
    model, optimizer, loader = training()
    x, y = next(iter(loader))
    with pytest.warns(UserWarning, match=f"called on {rows * len(x)} rows, but the loader had drawn {len(x)} records"):
        step(model, optimizer, x.repeat_interleave(rows, 0), y.repeat_interleave(rows))


@pytest.mark.parametrize("ahead", [0, 1])
def test_rows_cut_off_by_number_are_said(ahead):
    """Guard: ``FEWER_ROWS`` in ``BatchWatch.compare``; one record more moves another one out of the batch."""
    torch.manual_seed(2)
    model, optimizer, loader = training()
    batches = iter(loader)
    x, y = next(batches)
    sizes = [len(x), *(len(next(batches)[0]) for _ in range(ahead))]
    with pytest.warns(UserWarning, match=rf"on 2 rows, fewer than the loader had drawn records \({min(sizes)}\)"):
        step(model, optimizer, x[:2], y[:2])


def test_a_batch_in_pieces_or_fetched_ahead_is_not_said_to_be_cut_off():
    model, optimizer, loader = training(max_physical_batch_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            step(model, optimizer, x, y)
    model, optimizer, loader = training()
    batches = iter(loader)
    waiting = next(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for following in batches:
            step(model, optimizer, *waiting)
            waiting = following


def test_two_drawn_batches_in_one_are_said():
    """Guard: the largest batch drawn, not all of them together; a record in both has two rows."""
    model, optimizer, loader = training()
    batches = iter(loader)
    x, y = (torch.cat(parts) for parts in zip(next(batches), next(batches), strict=True))
    with pytest.warns(UserWarning, match="two drawn batches put together"):
        step(model, optimizer, x, y)


@pytest.mark.parametrize("rows", [1, 3])
def test_users_that_are_drawn_record_by_record_are_said(rows):
    """Guard: ``BatchWatch.compare_users``; a user with ten records is drawn about ten times as often as charged."""
    model, optimizer, loader = training(clipping=UserClipping())
    x, y = (each.repeat_interleave(rows, 0) for each in next(iter(loader)))
    optimizer.clipping.set_users((torch.arange(len(x)) // rows) % 3)
    with pytest.warns(UserWarning, match="belong to 3 users.*epsilon does not hold for users"):
        step(model, optimizer, x, y)


def test_users_whose_own_rate_is_charged_need_no_warning(recwarn):
    """The way out that the message names."""
    model, optimizer, loader = training(clipping=UserClipping())
    optimizer.sample_rate = 1 - (1 - 0.2) ** 10
    x, y = next(iter(loader))
    recwarn.clear()
    optimizer.clipping.set_users(torch.arange(len(x)) % 3)
    step(model, optimizer, x, y)
    assert not recwarn.list


def test_rows_of_one_record_clipped_together_need_no_warning(recwarn):
    """The way out that the message names."""
    model, optimizer, loader = training(clipping=UserClipping(reduction="mean"))
    x, y = next(iter(loader))
    recwarn.clear()
    optimizer.clipping.set_users(torch.arange(len(x)).repeat_interleave(3))
    step(model, optimizer, x.repeat_interleave(3, 0), y.repeat_interleave(3))
    assert not recwarn.list
    assert optimizer.noise.sums[0].norm() <= len(x) * 1.0


def test_the_ordinary_loop_is_silent(recwarn):
    """The other side of all warnings: nothing is said where nothing is wrong, pieces and empty batches included."""
    model, optimizer, loader = training(batch_size=1, max_physical_batch_size=2)
    recwarn.clear()
    for x, y in loader:
        step(model, optimizer, x, y)
    assert not recwarn.list


def test_users_of_batches_that_hold_every_record_are_charged_right():
    """At a rate of one a user is drawn as surely as a record: nothing is to be said."""
    model, optimizer, loader = training(batch_size=len(data()), clipping=UserClipping())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            optimizer.clipping.set_users([i // 2 for i in range(len(x))])
            step(model, optimizer, x, y)


@pytest.mark.parametrize("ids", [5, None])
def test_ids_of_users_that_are_no_sequence_are_named(ids):
    with pytest.raises(TypeError, match="set_users.. takes one id per sample, a tensor or a list, got "):
        UserClipping().set_users(ids)
