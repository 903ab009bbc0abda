"""Situations that were written down before the code was looked at: neither silent nor refused without need.

Each is decided by the definition: two trainings that differ in one record, or the loop over single samples.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import Dataset

from gsm import DPOptimizer, GradSampleModule
from gsm.layout import SamplesInfluenceEachOther
from gsm.probe_buffers import DataInBuffers
from tests.attacks.tools import CE, Watch, clipped_sum, data, step, training, watched
from tests.compare import MODES, check

X, Y = data(8, scale=30.0).tensors


def sum_of(model, x):
    return model(x).square().sum(1).mean()


def largest_change(how, mode):
    """The most that one record changes the released sum, and the sensitivity that the noise was scaled by."""

    def release(x):
        torch.manual_seed(0)
        model, optimizer, watch = watched(mode=mode)
        optimizer.zero_grad()
        how(model, x)
        optimizer.step()
        return watch.sums[-1], watch.sensitivities[-1]

    whole, sensitivity = release(X)
    parts = [release(torch.cat([X[:i], X[i + 1 :]]))[0] for i in range(len(X))]
    return max(float((whole - part).norm()) for part in parts), sensitivity


def twice_in_one_loss(model, x):
    (sum_of(model, x) + sum_of(model, 2 * x)).backward()


def the_same_graph_twice(model, x):
    loss = sum_of(model, x)
    loss.backward(retain_graph=True)
    loss.backward()


def entry_by_entry(model, x):
    for entry in model(x).square().sum(1) / len(x):
        entry.backward(retain_graph=True)


def an_evaluation_in_between(model, x):
    loss = sum_of(model, x)
    model.eval()
    sum_of(model, x[:3])
    model.train()
    loss.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "how", [twice_in_one_loss, the_same_graph_twice, entry_by_entry, an_evaluation_in_between], ids=lambda f: f.__name__
)
def test_one_record_is_clipped_once(how, mode):
    """Guard: what one graph gives a sample is put together before it is clipped."""
    change, sensitivity = largest_change(how, mode)
    assert sensitivity == 1.0 and change <= 1.0 + 1e-5


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
def test_a_bound_that_is_raised_between_backward_and_step_raises_the_noise(mode):
    """Guard: the bound is read once, where it clips, and travels with the sum."""
    model, optimizer, watch = watched(mode=mode, bound=0.01)
    sum_of(model, X).backward()
    optimizer.max_grad_norm = 5.0
    optimizer.step()
    assert watch.stds == watch.sensitivities == [5.0]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradients_written_by_hand_are_not_released(mode):
    """Guard: ``p.grad`` is written by the release, whatever was there."""
    model, optimizer, watch = watched(mode=mode)
    CE(model(X), Y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    torch.testing.assert_close(watch.sums[-1], clipped_sum(model._module, X, Y), rtol=1e-5, atol=1e-5)


class Interrupted(Dataset):
    """Once, the loader is stopped in the middle of a batch."""

    def __init__(self):
        self.records, self.stops = data(), True

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        if self.stops and i == 7:
            self.stops = False
            raise KeyboardInterrupt
        return self.records[i]


@pytest.mark.parametrize("pieces", [None, 3])
def test_a_loader_that_is_interrupted_leaves_nothing_behind(pieces):
    """Guard: a new pass forgets what the old one did not release."""
    model, optimizer, loader = training(dataset=Interrupted(), max_physical_batch_size=pieces)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            for x, y in loader:
                step(model, optimizer, x, y)
    optimizer.noise.sums.clear()
    x, y = [], []
    for a, b in loader:
        x.append(a), y.append(b)
        step(model, optimizer, a, b)
        if optimizer.noise.sums:
            break
    expected = clipped_sum(model._module, torch.cat(x), torch.cat(y))
    torch.testing.assert_close(optimizer.noise.sums[0], expected, rtol=1e-5, atol=1e-5)
    assert optimizer.noise.sensitivities[-1] == 1.0


def test_batches_that_cycle_gives_again_are_said():
    """Guard: the sampler counts what it drew; `itertools.cycle` keeps the batches of its first pass."""
    model, optimizer, loader = training(max_physical_batch_size=3)
    again = itertools.islice(itertools.cycle(loader), 3 * len(loader))
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        for x, y in again:
            step(model, optimizer, x, y)


class OnPackedRows(nn.Module):
    """A layer on the rows of a packed sequence, where samples are interleaved and have several rows each."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.start = nn.Parameter(torch.randn(2, 1, 1, 4))

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, c = self.start.expand(-1, 1, len(x), 4).contiguous().unbind(0)
        out = self.rnn(packed, (h, c))[0]
        rows = PackedSequence(self.out(out.data), out.batch_sizes, out.sorted_indices, out.unsorted_indices)
        return pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])[0].sum(1)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "auto"])
def test_rows_of_packed_sequences_belong_to_their_samples(mode):
    """Guard: rows are followed to their samples through the graph."""
    check(OnPackedRows(), (torch.randn(5, 6, 3), torch.tensor([6, 2, 4, 1, 3])), mode=mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "loop"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn_like(model[0].weight))),
        lambda model: model.append(nn.Linear(3, 3)),
        lambda model: nn.utils.parametrizations.weight_norm(model[2]),
    ],
    ids=["pruned", "another weight", "another layer", "weight norm"],
)
def test_a_model_that_is_changed_after_wrapping_is_looked_at_again(change, mode):
    """Guard: ``CapturePlan.refresh``; without it new parameters would be captured by nobody."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    twin = copy.deepcopy(inner)
    model = GradSampleModule(inner, mode=mode)
    for changed in (inner, twin):
        torch.manual_seed(1)
        change(changed)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8,
        noise=Watch(),
    )  # fmt: skip
    sum_of(model, X).backward()
    optimizer.step()
    expected, params = 0.0, list(twin.parameters())
    for x in X.split(1):
        grads = torch.autograd.grad(sum_of(twin, x), params)
        flat = torch.cat([g.flatten() for g in grads])
        expected = expected + flat / flat.norm().clamp(min=1.0)
    torch.testing.assert_close(optimizer.noise.sums[-1].float(), expected, rtol=1e-4, atol=1e-5)


class Codebook(nn.Module):
    """Vector quantisation, its codes moved towards what falls to them."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("codes", torch.randn(3, 4))

    def forward(self, x):
        z = self.inner(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        found = self.codes[nearest]
        with torch.no_grad():
            for k in nearest.unique():
                self.codes[k] = 0.9 * self.codes[k] + 0.1 * z[nearest == k].mean(0)
        return self.out(z + (found - z).detach())


class Queue(nn.Module):
    """Negatives of earlier batches, kept in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.inner, self.queue = nn.Linear(5, 4), torch.randn(8, 4)

    def forward(self, x):
        z = self.inner(x)
        out = z @ self.queue.t()
        self.queue = torch.cat([self.queue, z.detach()])[-8:]
        return out


class Mixed(nn.Module):
    """What ``mix`` makes of a hidden layer."""

    def __init__(self, mix):
        super().__init__()
        self.inner, self.out, self.mix = nn.Linear(5, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        return self.out(self.mix(self.inner(x)))


def sinkhorn(h):
    q = h.exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "model, error",
    [
        (Codebook, DataInBuffers),
        (Queue, SamplesInfluenceEachOther),
        (lambda: Mixed(sinkhorn), SamplesInfluenceEachOther),
        (lambda: Mixed(lambda h: 0.7 * h + 0.3 * h[torch.randperm(len(h))]), SamplesInfluenceEachOther),
        (lambda: Mixed(lambda h: h / h.abs().max().detach()), SamplesInfluenceEachOther),
        (lambda: Mixed(lambda h: h + 0.1 * h.roll(1, 0)), SamplesInfluenceEachOther),
    ],
    ids=["codebook", "queue", "Sinkhorn", "mixup inside", "scaled by the batch's maximum", "its neighbour"],
)
def test_influence_in_other_clothes_is_refused(model, error, mode):
    """Guard: the probe of the first batch."""
    with pytest.raises(error):
        GradSampleModule(model(), mode=mode)(torch.randn(6, 5))
