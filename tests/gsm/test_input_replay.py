"""What is computed between the loader and the forward: records must stay apart there, in labels too."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gsm import make_private
from gsm.layout import SamplesInfluenceEachOther
from tests.gsm.test_loss_replay import single

RECORDS = 120


def records():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(RECORDS, 6, generator=generator), torch.randint(3, (RECORDS,), generator=generator)
    return TensorDataset(x, y, torch.randn(RECORDS, generator=generator), torch.randn(RECORDS, 4, generator=generator))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 5), nn.Linear(5, 6)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        return self.decode(self.encode(x))


def train(loss, model=None, batch_size=12, collate=None, **options):
    """An epoch: the batch that was refused, the releases before, and the message; None if none was."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3) if model is None else model
    loader = DataLoader(records(), batch_size=batch_size, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0, **options)
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        try:
            loss(model, *batch).backward()
        except SamplesInfluenceEachOther as error:
            return step, optimizer.releases, str(error)
        optimizer.step()
    return None


def given(change):
    return lambda model, x, y, r, t: F.cross_entropy(model(change(x, y)), y)


def centred_in_place(x, y):
    return x.sub_(x.mean(0))


def cut(x, y):
    other = x.clone()
    other[:, :2] = x[torch.randperm(len(x))][:, :2]
    return other


MIXED = {
    "standardised": lambda x, y: (x - x.mean(0)) / x.std(0),
    "centred in place": centred_in_place,
    "mixup": lambda x, y: 0.7 * x + 0.3 * x[torch.randperm(len(x))],
    "cutmix": cut,
    "relative to the largest": lambda x, y: x / x.abs().max(),
    "noise as large as the batch's": lambda x, y: x + x.std() * torch.randn_like(x),
    "labels of others": lambda x, y: x + y.float().mean(),
    "neighbours by rank": lambda x, y: x + 0.1 * x[x[:, 0].argsort()],
}
APART = {
    "constants": lambda x, y: (x - 0.1) / 1.3,
    "its own scale, in place": lambda x, y: x.div_(x.norm(dim=1, keepdim=True)),
    "noise and flips": lambda x, y: torch.where(torch.rand(len(x), 1) < 0.5, -x, x) + 0.1 * torch.randn_like(x),
    "numpy": lambda x, y: torch.from_numpy(x.numpy() * 2),
    "another type": lambda x, y: x.double().float(),
    "crops": lambda x, y: torch.stack([x.roll(k, 1) for k in range(3)], 1)[torch.arange(len(x)), y],
}


@pytest.mark.parametrize("name", MIXED)
def test_records_that_are_mixed_before_the_model_are_refused_before_a_release(name):
    step, releases, message = train(given(MIXED[name]))
    assert step == releases == 0
    assert "the model was given a tensor of shape" in message and "between the loader and this forward" in message


@pytest.mark.parametrize("name", APART)
def test_what_is_done_with_each_record_passes(name, recwarn):
    assert train(given(APART[name])) is None
    assert not [w for w in recwarn.list if "batch" in str(w.message)]


def test_the_same_records_as_others_negatives_are_refused():
    class Compared(nn.Linear):
        def forward(self, x, other):
            return super().forward(x) - super().forward(other)

    step, _, message = train(lambda m, x, y, r, t: F.cross_entropy(m(x, x.roll(1, 0)), y), Compared(6, 3))
    assert step == 0 and "between the loader" in message
    assert train(lambda m, x, y, r, t: F.cross_entropy(m(x, x.roll(1, 1)), y), Compared(6, 3)) is None


SORTED = {
    "shuffled": lambda r: torch.randperm(len(r)),
    "sorted": lambda r: r.sort(descending=True)[1],
}


@pytest.mark.parametrize("name", SORTED)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_records_in_another_order_pass(name, noise, recwarn):
    """As recurrent networks sort theirs by length: labels come in the same order."""

    def loss(model, x, y, r, t):
        order = SORTED[name](r)
        rows = x[order] + noise * torch.randn_like(x) if noise else x[order]
        return F.cross_entropy(model(rows), y[order])

    assert train(loss) is None and not [w for w in recwarn.list if "batch" in str(w.message)]


def test_outputs_are_looked_at_whatever_the_order():
    def loss(model, x, y, r, t):
        order = r.argsort()
        losses = single(model(x[order]), y[order])
        return (losses * losses.detach().softmax(0)).sum()

    assert train(loss)[:2] == (0, 0)


def balanced(model, x, y, r, t):
    counts = torch.bincount(y, minlength=3).clamp(min=1)
    return (single(model(x), y) / counts[y]).mean()


def standardised(model, x, y, r, t):
    target = (r - r.mean()) / r.std()
    return F.mse_loss(model(x)[:, 0], target)


def ranked(model, x, y, r, t):
    target = r.argsort().argsort() / len(r)
    return F.mse_loss(model(x)[:, 0], target)


def advantages(model, x, y, r, t):
    log_p = model(x).log_softmax(1).gather(1, y[:, None])[:, 0]
    return -(log_p * (r - r.mean())).mean()


def centred_teacher(model, x, y, r, t):
    target = (t[:, :3] - t[:, :3].mean(0)).softmax(1)
    return -(target * model(x).log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("loss", [balanced, standardised, ranked, advantages, centred_teacher])
def test_labels_prepared_from_the_batch_are_refused_when_they_are_records_for_sure(loss, recwarn):
    """In the third batch: in one or two, a tensor may have as many rows as there are records by chance."""
    step, releases, message = train(loss)
    assert 2 <= step == releases <= 4 and "replacing other samples' rows" in message and "whole data set" in message
    assert "changes what it sends back for those that stay. Weights, targets and baselines counted" in message
    assert not [w for w in recwarn.list if "samples" in str(w.message)]


def test_weights_normalised_before_the_forward_are_refused_before_a_release():
    def loss(model, x, y, r, t):
        weights = r.exp() / r.exp().sum()
        return (weights * (model(x)[:, 0] - r) ** 2).sum()

    step, releases, message = train(loss)
    assert step == releases == 0 and "normalised over the batch" in message


OWN = {
    "targets of its own": lambda m, x, y, r, t: F.mse_loss(m(x), (t[:, :3] * 2).tanh()),
    "weights": lambda m, x, y, r, t: (single(m(x), y) * r.exp()).mean(),
    "smoothed": lambda m, x, y, r, t: F.cross_entropy(m(x), F.one_hot(y, 3) * 0.9 + 0.1 / 3),
    "noise in some": lambda m, x, y, r, t: F.dropout(m(x)[y > 0], 0.5).square().sum() / len(x),
    "counted, not used": lambda m, x, y, r, t: single(m(x), y).mean() + 0 * len(torch.bincount(y)),
    "some classes": lambda m, x, y, r, t: single(m(x)[y > 0], y[y > 0]).sum() / len(x),
}


@pytest.mark.parametrize("name", OWN)
def test_labels_prepared_from_their_own_record_pass(name, recwarn):
    assert train(OWN[name]) is None
    assert not [w for w in recwarn.list if "samples" in str(w.message)]


def test_random_numbers_for_some_rows_are_no_proof(recwarn):
    """How many are drawn depends on the labels, so that those of the others move; that is said, not refused."""

    def loss(model, x, y, r, t):
        chosen = y > 0
        drawn = torch.randint(3, (int(chosen.sum()), 1))
        return model(x)[chosen].gather(1, drawn).sum() / len(x)

    assert train(loss) is None


def test_labels_between_parts_are_the_records_own():
    def shifted(model, x, y, r, t):
        return F.mse_loss(model.decode(model.encode(x) + r.mean()), x)

    def own(model, x, y, r, t):
        return F.mse_loss(model.decode(model.encode(x) + r[:, None]), x)

    step, releases, message = train(shifted, Parts())
    assert step == releases == 0 and "decoder was given" in message
    assert train(own, Parts()) is None


def test_numbers_between_parts():
    """What a part is given need not be of floating point."""

    class Codes(Parts):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Embedding(5, 6)

    def nearest(model, x, y, r, t):
        z = model.encode(x)
        return F.mse_loss(model.decode(z.argmax(1)), x) + z.square().mean()

    def ranks(model, x, y, r, t):
        z = model.encode(x)
        return F.mse_loss(model.decode(z[:, 0].argsort().argsort() % 5), x) + z.square().mean()

    assert train(nearest, Codes()) is None
    assert train(ranks, Codes())[0] == 0


def test_concatenated_targets_and_rows_in_two_dimensions_are_left_alone(recwarn):
    """As many targets as records by chance, or as many columns: then nothing is taken for rows."""

    def collate(items):
        x, y, r, t = (torch.stack(values) for values in zip(*items, strict=True))
        lengths = (r > 0).long() + (r > 1).long()
        return x, y, lengths, torch.arange(float(lengths.sum())) % 3

    def spans(model, x, y, lengths, targets):
        ends, places = lengths.cumsum(0)[:, None], torch.arange(len(targets))
        within = ((places >= ends - lengths[:, None]) & (places < ends)).float()
        return (within @ targets * model(x)[:, 0]).mean()

    assert train(spans, collate=collate) is None

    def square(items):
        x, y, r, t = (torch.stack(values) for values in zip(*items, strict=True))
        return x, y, r, torch.arange(float(len(x) * len(x))).view(len(x), -1)

    assert train(lambda m, x, y, r, t: (m(x)[:, 0] * t.sum(0)).mean(), collate=square) is None
    assert not [w for w in recwarn.list if "samples" in str(w.message)]


def test_physical_batches_are_looked_at_too():
    step, releases, message = train(given(MIXED["standardised"]), max_physical_batch_size=5)
    assert step == releases == 0
    assert train(given(APART["noise and flips"]), max_physical_batch_size=5) is None


def test_nothing_is_left_on():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(records(), batch_size=12)
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0)
    for _ in loader:
        break  # nothing but looked at
    assert not _get_current_dispatch_mode_stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the batches without a step
        for k, (x, y, _, _) in enumerate(loader):
            assert bool(_get_current_dispatch_mode_stack()) is (k < 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            assert not _get_current_dispatch_mode_stack()
            optimizer.step()
    assert not _get_current_dispatch_mode_stack()
