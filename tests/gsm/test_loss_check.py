"""Losses outside of the model: those normalised over the batch and those of another reduction are refused; every
look-alike that is the samples' own passes."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsm import GradSampleModule, make_private
from gsm.layout import SamplesInfluenceEachOther
from gsm.loss_check import FIRST, THEN
from gsm.losses import per_sample_loss
from tests.gsm.training import Profiler, parts

WORDS, LENGTH = 9, 7
WEIGHT = torch.linspace(0.5, 2.0, WORDS)


class Tagger(nn.Module):
    """Tokens `[batch, length]` to logits `[batch, length, words]`."""

    def __init__(self, words=WORDS):
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, 6), nn.Linear(6, words)

    def forward(self, ids):
        return self.out(self.embed(ids))


def padded(size, generator):
    """Tokens, and labels of which every sample's rest is padding."""
    ids = torch.randint(WORDS, (size, LENGTH), generator=generator)
    labels = torch.randint(WORDS, (size, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (size,), generator=generator)
    labels[torch.arange(LENGTH) >= lengths[:, None]] = -100
    return ids, labels


def each_token(out, y, **options):
    return F.cross_entropy(out.transpose(1, 2), y, reduction="none", **options)


def own_mean(out, y, weight=None, **options):
    weight = torch.ones(WORDS) if weight is None else weight
    share = torch.where(y >= 0, weight[y.clamp(0)], 0.0)
    return (each_token(out, y, **options) * share).sum(1) / share.sum(1)


SIZES = (6, 9, 5, 12, 8, 7, 11, 10)


def train(loss, **options):
    """Backwards over the first batches; the number of the one that was refused, None if none was."""
    with Profiler():
        return backwards(loss, **options)


def backwards(loss, *, model=None, batch=padded, sizes=SIZES, reduction="mean", mode="ghost", autocast=None):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    wrapped = GradSampleModule(Tagger() if model is None else model, mode=mode, loss_reduction=reduction)
    for step, size in enumerate(sizes):
        x, y = batch(size, generator)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = loss(wrapped(x), y)
        try:
            value.backward()
        except SamplesInfluenceEachOther as error:
            train.message = str(error)
            return step
        wrapped.set_grad_sample_to_none()
        with torch.no_grad():
            for p in wrapped.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return None


NORMALISED = {
    "mean over the batch's tokens": lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
    "the same, shifted": lambda out, y: F.cross_entropy(out[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "the same by hand": lambda out, y: each_token(out, y).sum() / (y >= 0).sum(),
    "of log-probabilities": lambda out, y: F.nll_loss(out.log_softmax(2).flatten(0, 1), y.flatten()),
    "with weights": lambda out, y: F.cross_entropy(out.transpose(1, 2), y, weight=WEIGHT),
    "smoothed": lambda out, y: F.cross_entropy(out.transpose(1, 2), y, label_smoothing=0.1),
    "divided for accumulation": lambda out, y: F.cross_entropy(out.transpose(1, 2), y) / 3,
    "with a further loss elsewhere": lambda out, y: F.cross_entropy(out[..., :9].transpose(1, 2), y),
}
OWN = {
    "mean within each sample": lambda out, y: own_mean(out, y).mean(),
    "weighted within each sample": lambda out, y: own_mean(out, y, WEIGHT).mean(),
    "smoothed within each sample": lambda out, y: own_mean(out, y, label_smoothing=0.1).mean(),
    "helper": lambda out, y: per_sample_loss(out, y, task="token_classification").mean(),
    "divided by the length": lambda out, y: each_token(out, y).mean(),
    "summed over tokens": lambda out, y: each_token(out, y).sum(1).mean(),
    "weighted by the class": lambda out, y: each_token(out, y, weight=WEIGHT).sum(1).mean(),
    "another loss": lambda out, y: (out.logsumexp(2) * (y >= 0)).sum() / (y >= 0).sum(),
    "no labels": lambda out, y: out.square().mean(),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_losses_normalised_over_the_batch_are_refused_within_two_batches(name):
    assert train(NORMALISED[name]) == 1
    assert "always add up to" in train.message and "gsm.transformers.per_sample_loss" in train.message


@pytest.mark.parametrize("name", OWN)
def test_losses_that_are_the_samples_own_pass(name):
    assert train(OWN[name]) is None


def one_label(size, generator):
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


CLASSES = torch.tensor([0.5, 1.0, 1.5])
SINGLE = {
    "class weights": (lambda out, y: F.cross_entropy(out, y, weight=CLASSES), True),
    "their look-alike": (lambda out, y: (F.cross_entropy(out, y, reduction="none") * CLASSES[y]).mean(), False),
    "ignore_index": (lambda out, y: F.cross_entropy(out, y, ignore_index=0), True),
    "its look-alike": (lambda out, y: F.cross_entropy(out, y, ignore_index=0, reduction="none").mean(), False),
    "nothing": (lambda out, y: F.cross_entropy(out, y), False),
    "smoothed": (lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1), False),
    "binary, weighted": (lambda out, y: F.binary_cross_entropy_with_logits(
        out, F.one_hot(y, 3).float(), weight=CLASSES, pos_weight=CLASSES), False),
    "squares": (lambda out, y: F.mse_loss(out, F.one_hot(y, 3).float()), False),
    "importances": (
        lambda out, y: (F.cross_entropy(out, y, reduction="none") * out.detach().exp()[:, 0]).mean(), False),
    "importances, normalised": (
        lambda out, y: (F.cross_entropy(out, y, reduction="none") * out.detach()[:, 0].softmax(0)).sum(), True),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_one_label_a_sample(name):
    loss, refused = SINGLE[name]
    found = train(loss, model=nn.Linear(6, 3), batch=one_label)
    assert (found is not None) == refused, found


def test_segmentation_and_sequence_first():
    """Classes are the second dimension of an image's output; the batch may be the second of a sequence's."""

    def picture(size, generator):
        y = torch.randint(4, (size, 5, 5), generator=generator)
        y[torch.arange(size) % 2 == 0, 0] = 255
        return torch.randn(size, 2, 5, 5, generator=generator), y

    assert train(partial(F.cross_entropy, ignore_index=255), model=nn.Conv2d(2, 4, 1), batch=picture) == 1
    assert train(lambda out, y: F.cross_entropy(out, y.clamp(max=3)), model=nn.Conv2d(2, 4, 1), batch=picture) is None
    model = GradSampleModule(Tagger(), mode="ghost", batch_first=False)
    generator = torch.Generator().manual_seed(0)
    with Profiler(), pytest.raises(SamplesInfluenceEachOther, match="normalised over the batch"):
        for size in (6, 9, 7):
            ids, labels = padded(size, generator)
            NORMALISED["mean over the batch's tokens"](model(ids.t()), labels.t()).backward()
            assert model._losses.history["", 0][-1].size == size
            model.set_grad_sample_to_none()


@pytest.mark.parametrize("mode", ["hooks", "auto", "functorch", "loop"])
def test_every_mode_checks(mode):
    assert train(NORMALISED["with weights"], mode=mode) == 1


def test_half_precision_is_judged_with_its_own_tolerance():
    for name in ("mean over the batch's tokens", "with weights"):
        assert train(NORMALISED[name], autocast=torch.bfloat16) in (1, 2)
    for name in ("mean within each sample", "summed over tokens", "divided by the length"):
        assert train(OWN[name], autocast=torch.bfloat16) is None


def test_large_vocabularies_are_read_in_part(monkeypatch):
    monkeypatch.setattr("gsm.loss_shares.MOST_ENTRIES", 200)
    assert train(NORMALISED["mean over the batch's tokens"]) == 1
    assert train(OWN["mean within each sample"]) is None and train(OWN["summed over tokens"]) is None


def test_labels_of_equal_number_say_nothing():
    """One label of each sample left out, as the last of a shifted sequence: the count is the same in all batches."""

    def shifted(size, generator):
        ids = torch.randint(WORDS, (size, LENGTH), generator=generator)
        return ids, F.pad(ids[:, 1:], (0, 1), value=-100)

    assert train(NORMALISED["mean over the batch's tokens"], batch=shifted) is None
    assert train(NORMALISED["mean over the batch's tokens"], sizes=[1] * 8) is None


@pytest.mark.parametrize("said, used", [("mean", "sum"), ("sum", "mean")])
def test_the_other_reduction_over_the_batch_is_refused(said, used):
    def single(reduction):
        loss = partial(F.cross_entropy, reduction=reduction)
        return train(loss, model=nn.Linear(6, 3), batch=one_label, reduction=said)

    assert single(used) == 2 and f"is the {used} of the samples' own losses" in train.message
    assert single(said) is None
    tokens = train(lambda out, y: getattr(each_token(out, y).sum(1), used)(), reduction=said)
    assert tokens == 2 and f"loss_reduction='{used}'" in train.message
    assert train(lambda out, y: getattr(each_token(out, y).sum(1), said)(), reduction=said) is None


def test_batches_of_one_number_of_tokens_may_differ_in_size():
    """Batches filled up to a number of tokens, all samples of one length: factors are equal, and right."""
    shapes = iter([(12, 2), (6, 4), (8, 3), (24, 1), (4, 6)])

    def bucket(size, generator):
        ids = torch.randint(WORDS, next(shapes), generator=generator)
        return ids, ids

    assert train(NORMALISED["mean over the batch's tokens"], batch=bucket, sizes=[0] * 5) is None


def test_training_made_private_is_stopped():
    """The contract: `make_private`, the ordinary loop, a criterion with weights."""
    model, optimizer, loader = make_private(*parts(), noise_multiplier=1.0)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(SamplesInfluenceEachOther, match="normalised over the batch"):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    assert optimizer.releases <= FIRST


def test_later_batches_are_checked_now_and_then():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    generator = torch.Generator().manual_seed(0)
    read = []
    for step in range(1, 3 * THEN + 1):
        x, y = one_label(8, generator)
        loss = F.cross_entropy(model(x), y)
        before = len(model._losses.fresh)
        hooked = loss.grad_fn.next_functions[0][0].next_functions[0][0].metadata
        assert bool(hooked) == (step <= FIRST or step % THEN == 0)
        loss.backward()
        model.set_grad_sample_to_none()
        assert before == 0
        read.append(bool(hooked))
    assert sum(read) == FIRST + 3


def test_strict_false_and_evaluation_check_nothing():
    model = GradSampleModule(Tagger(), mode="ghost", strict=False)
    generator = torch.Generator().manual_seed(0)
    for size in (6, 9, 7):
        ids, labels = padded(size, generator)
        NORMALISED["mean over the batch's tokens"](model(ids), labels).backward()
        model.set_grad_sample_to_none()
    model = GradSampleModule(Tagger(), mode="ghost")
    with torch.no_grad():
        model(ids)
    assert model._losses.batches == 0


def test_the_model_is_left_as_it_was_and_copies_are_watched_on_their_own():
    plain = Tagger()
    wrapped = GradSampleModule(plain)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert copied._losses is not wrapped._losses
        assert copied._losses.tape is copied._tape
    inert = copy.deepcopy(plain)
    assert inert(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, WORDS)
    wrapped.remove_hooks()
    plain(torch.zeros(2, 3, dtype=torch.long)).square().mean().backward()
    assert wrapped._losses.batches == 0
