"""`step(loss=)` with entries that depend on several samples: refused at once; every look-alike passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsm import GradSampleModule
from gsm.layout import SamplesInfluenceEachOther
from gsm.loss_check import FIRST
from gsm.optimizer import DPOptimizer
from gsm.private_transformers import PrivacyEngine
from tests.gsm.test_loss_check import CLASSES, LENGTH, Tagger, each_token, one_label, padded


def contrastive(out, y):
    return F.cross_entropy(out @ out.t(), torch.arange(len(out)), reduction="none")


VECTORS = {
    "contrastive": (contrastive, True),
    "standardised": (lambda out, y: ((out - out.mean(0)) / out.std(0)).square().sum(1), True),
    "divided by the largest": (lambda out, y: out.square().sum(1) / out.square().sum(1).max(), True),
    "only earlier neighbours": (lambda out, y: out.sum(1).cumsum(0), True),
    "the neighbour's": (lambda out, y: out.square().sum(1).roll(1, 0), True),
    "a penalty of the batch": (lambda out, y: F.cross_entropy(out, y, reduction="none") + out.square().mean(), True),
    "own": (lambda out, y: F.cross_entropy(out, y, reduction="none"), False),
    "own, weighted": (lambda out, y: F.cross_entropy(out, y, weight=CLASSES, reduction="none"), False),
    "own, shifted by the largest": (lambda out, y: (out - out.max()).logsumexp(1) + out.max() - out[:, 0], False),
    "own, up to rounding": (lambda out, y: (0.3 * (out - out.mean()).logsumexp(1) + 0.3 * out.mean()) / 7, False),
    "own, for one class only": (lambda out, y: torch.where(y == 0, out[:, 0].exp(), 0 * out.sum(1)), False),
    "constant": (lambda out, y: out.sum(1) * 0, False),
}


def vector_step(loss, *, model=None, batch=one_label, size=8, virtual=False, **options):
    torch.manual_seed(0)
    wrapped = GradSampleModule(nn.Linear(6, 3) if model is None else model, **{"mode": "ghost", **options})
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
    )
    x, y = batch(size, torch.Generator().manual_seed(1))
    (optimizer.virtual_step if virtual else optimizer.step)(loss=loss(wrapped(x), y))
    return optimizer


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("virtual", [False, True])
def test_entries_that_depend_on_other_samples_are_refused_at_once(name, virtual):
    loss, refused = VECTORS[name]
    if not refused:
        vector_step(loss, virtual=virtual)
        return
    with pytest.raises(SamplesInfluenceEachOther, match=r"entry \d.* depends on the model's output for sample \d"):
        vector_step(loss, virtual=virtual)


def test_gradients_that_are_no_numbers_say_nothing():
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    out = model(torch.randn(4, 6))
    losses = (out - out.detach()).sqrt().sum(1)
    half = torch.arange(4) < 2
    assert torch.autograd.grad(losses[half].sum(), out, retain_graph=True)[0].isnan().any()
    model._losses.entries(losses)


def test_outputs_of_other_records_are_left_alone(recwarn):
    """Two forwards of different sizes: anchors of their own have no entry in the vector."""
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    anchors, out = model(torch.randn(5, 6)), model(torch.randn(8, 6))
    model._losses.entries(out.square().sum(1) + anchors.square().mean())


def test_the_check_of_entries_is_no_backward_of_its_own():
    """Neither captured nor read as a loss."""
    model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
    )
    for step, size in enumerate((8, 5), 1):
        x, y = one_label(size, torch.Generator().manual_seed(size))
        optimizer.step(loss=F.cross_entropy(model(x), y, reduction="none"))
        optimizer.zero_grad()
        assert len(model._losses.history["", 0]) == step and model._losses.history["", 0][-1].even


@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_one_pair_of_many_is_enough(size):
    """Every two samples are parted within the first batches, whichever they are."""
    for i in range(size):
        j = (i + 1 + size // 3) % size
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
        )

        def loss(out, i=i, j=j):
            own = out.square().sum(1)
            return own + (torch.arange(size) == i) * own[j]

        with pytest.raises(SamplesInfluenceEachOther, match=f"entry {i} depends .* sample {j}"):
            for _ in range(FIRST):
                optimizer.zero_grad()
                optimizer.step(loss=loss(model(torch.randn(size, 6))))


class Two(nn.Module):
    """Outputs in a dict: per sample, transposed, without a batch dimension, and none at all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        h = self.layer(x)
        return {"logits": h, "features": (h.tanh(), [h.t()]), "table": torch.ones(3, 3), "none": None}


def test_structured_outputs():
    vector_step(lambda out, y: F.cross_entropy(out["logits"], y, reduction="none"), model=Two())
    for size in (3, 8):  # 3: either dimension of the transposed could be the batch
        vector_step(lambda out, y: out["features"][0].sum(1) + out["features"][1][0].sum(0), model=Two(), size=size)
    with pytest.raises(SamplesInfluenceEachOther, match="depends on the model's output"):
        vector_step(lambda out, y: contrastive(out["features"][0], y), model=Two())


@pytest.mark.parametrize("mixes", [False, True])
def test_a_model_whose_output_is_the_vector(mixes):
    class Losses(nn.Linear):
        def forward(self, x):
            return super().forward(x).square().sum(1)

    if not mixes:
        vector_step(lambda out, y: out, model=Losses(6, 3))
        return
    with pytest.raises(SamplesInfluenceEachOther, match="entry 0"):
        vector_step(lambda out, y: out / out.sum(), model=Losses(6, 3))


def test_two_forwards_of_one_batch():
    """A siamese network: own pairs pass, pairs across the batch do not."""
    def steps(loss):
        model = GradSampleModule(nn.Linear(6, 3), mode="ghost")
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
        )
        a, b = torch.randn(2, 8, 6)
        optimizer.step(loss=loss(model(a), model(b)))

    steps(lambda a, b: (a - b).square().sum(1))
    with pytest.raises(SamplesInfluenceEachOther, match="entry 0"):
        steps(lambda a, b: F.cross_entropy(a @ b.t(), torch.arange(8), reduction="none"))


@pytest.mark.parametrize("size", [LENGTH, 4])
def test_sequence_first_outputs_also_where_the_length_is_the_batch(size):
    def batch(size, generator):
        ids, labels = padded(size, generator)
        return ids.t().contiguous(), labels

    def own(out, y):
        return each_token(out.transpose(0, 1), y).sum(1)

    vector_step(own, model=Tagger(), batch=batch, size=size, batch_first=False)
    with pytest.raises(SamplesInfluenceEachOther, match="entry"):
        mixed = lambda out, y: own(out, y) + out[:, 0].square().sum()  # noqa: E731
        vector_step(mixed, model=Tagger(), batch=batch, size=size, batch_first=False)


def test_private_transformers_goes_through_the_same_check():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="Poisson"):
        PrivacyEngine(model, batch_size=8, sample_size=100, max_grad_norm=1.0, noise_multiplier=1.0).attach(optimizer)
    x = torch.randn(8, 6)
    optimizer.step(loss=model(x).square().sum(1))
    optimizer.zero_grad()
    with pytest.raises(SamplesInfluenceEachOther, match="entry"):
        optimizer.step(loss=contrastive(model(x), None))
