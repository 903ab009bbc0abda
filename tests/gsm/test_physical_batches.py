"""Physical batches: one release per logical batch with exactly its records, whatever the training loop does."""

import warnings

import opacus.grad_sample
import opacus.optimizers
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gsm import drawn
from gsm.loader import DPDataLoader
from gsm.optimizer import DPOptimizer
from gsm.physical_batches import BatchMemoryManager, PhysicalBatchLoader
from gsm.wrapper import GradSampleModule

N = 40


class Roll(nn.Module):
    """The gradient of record ``i`` is the ``i``-th unit vector, so a release shows who is in it and how often."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Linear(N, 1, bias=False)

    def forward(self, ids):
        return self.seen(nn.functional.one_hot(ids, N).float())[:, 0]


PARTS = {
    "gsm": (lambda model: GradSampleModule(model, loss_reduction="sum", mode="ghost"), DPOptimizer),
    "opacus": (
        lambda model: opacus.grad_sample.GradSampleModule(model, loss_reduction="sum"),
        opacus.optimizers.DPOptimizer,
    ),
}


@pytest.fixture(params=PARTS, autouse=True)
def parts(request, monkeypatch):
    """Every test runs with this library's wrapper and optimizer and with Opacus's."""
    monkeypatch.setattr(Run, "parts", PARTS[request.param])


def members(optimizer):
    """The records in a release, each as often as it is in it."""
    counts = optimizer.params[0].grad[0].round().int()
    return [i for i in range(N) for _ in range(int(counts[i]))]


class Run:
    """A training run without noise or clipping that records the members of every release."""

    parts: tuple = ()

    def __init__(self, *, size=None, poisson=True, batch_size=16, workers=0, persistent=False, **options):
        loader = DataLoader(
            TensorDataset(torch.arange(N)),
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(7),
        )
        self.logical = DPDataLoader.from_data_loader(loader) if poisson else loader
        wrap, make_optimizer = self.parts
        self.model = wrap(Roll())
        inner = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.optimizer = make_optimizer(
            inner, noise_multiplier=0.0, max_grad_norm=1e3, expected_batch_size=None, loss_reduction="sum"
        )
        # The hook holds no reference to the run: torch is slow to end the workers of a loader in a reference cycle.
        self.releases = releases = []
        self.optimizer.attach_step_hook(lambda optimizer: releases.append(members(optimizer)))
        self.loader = self.logical
        if size is not None:
            self.loader = PhysicalBatchLoader(self.logical, size, self.optimizer, **options)

    def backward(self, ids):
        self.optimizer.zero_grad()
        self.model(ids).sum().backward()

    def train(self, ids):
        self.backward(ids)
        self.optimizer.step()

    def epoch(self):
        for (ids,) in self.loader:
            self.train(ids)
        return self.releases


def logical_batches(**options):
    return Run(size=None, **options).epoch()


@pytest.mark.parametrize(
    ("size", "workers", "persistent"),
    [(1, 0, False), (3, 0, False), (8, 0, False), (100, 0, False), (3, 2, False), (1, 2, True), (8, 2, True)],
)
def test_pieces_add_up_to_the_logical_batches(size, workers, persistent):
    run, plain = Run(size=size, workers=workers, persistent=persistent), logical_batches()
    assert [sorted(r) for r in run.epoch()] == plain
    assert len(plain) == len(run.logical) == 3 and all(0 < len(r) for r in plain)


def test_pieces_are_small_and_even():
    run = Run(size=5)
    sizes = [len(ids) for (ids,) in iter_stepping(run)]
    assert max(sizes) <= 5 and min(sizes) >= 3
    assert len(sizes) > 3


def iter_stepping(run):
    for batch in run.loader:
        run.train(*batch)
        yield batch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 2, 3, 4])
def test_an_abandoned_epoch_leaves_nothing_behind(workers, seen):
    run = Run(size=4, workers=workers, persistent=workers > 0)
    for k, (ids,) in enumerate(run.loader):
        run.train(ids)
        if k + 1 == seen:
            break
    before = list(run.releases)
    run.releases.clear()
    fresh = run.epoch()
    assert len(fresh) == 3 and all(len(set(r)) == len(r) for r in fresh)
    plain = logical_batches()
    assert before == plain[: len(before)]


def test_left_between_backward_and_step():
    run = Run(size=4)
    for (ids,) in run.loader:
        run.backward(ids)
        break
    assert all(len(set(r)) == len(r) for r in run.epoch()) and len(run.releases) == 3


def test_an_abandoned_logical_batch_does_not_reach_another_loaders_release():
    run = Run(size=4)
    for (ids,) in run.loader:
        run.train(ids)  # a first piece: accumulated, not released
        break
    assert run.releases == []
    other = torch.tensor([0, 1])
    run.train(other)
    assert run.releases == [[0, 1]]


def test_a_piece_taken_out_by_hand_is_never_released_alone():
    run = Run(size=4)
    (ids,) = next(iter(run.loader))
    run.train(ids)
    assert run.releases == []


def test_an_exception_in_the_loop_leaves_nothing_behind():
    run = Run(size=4)
    with pytest.raises(KeyboardInterrupt):
        for k, (ids,) in enumerate(run.loader):
            run.train(ids)
            if k == 1:
                raise KeyboardInterrupt
    run.releases.clear()
    assert all(len(set(r)) == len(r) for r in run.epoch()) and len(run.releases) == 3


def test_an_empty_logical_batch_is_one_empty_piece_and_one_release():
    run = Run(size=4)
    run.logical.batch_sampler.threshold = 0  # nobody is ever drawn
    assert run.epoch() == [[], [], []]


def test_a_piece_without_a_step_is_an_error_that_says_so():
    run = Run(size=4)
    with pytest.raises(RuntimeError, match=r"1 physical batch\(es\) got no optimizer.step\(\).*empty batch too"):
        for k, (ids,) in enumerate(run.loader):
            if k == 1:
                continue
            run.train(ids)
    assert all(len(set(r)) == len(r) for r in run.releases)


def ahead(loader):
    """What a device prefetcher does: fetch the next batch before handing out this one."""
    batches = iter(loader)
    held = next(batches)
    for upcoming in batches:
        yield held
        held = upcoming
    yield held


def test_fetching_ahead_works_when_said_and_is_an_error_when_not():
    run = Run(size=4, lookahead=1)
    for (ids,) in ahead(run.loader):
        run.train(ids)
    assert [sorted(r) for r in run.releases] == logical_batches()
    with pytest.raises(RuntimeError, match="loader.lookahead"):
        list(ahead(Run(size=4).loader))


def test_data_that_is_only_looked_at_needs_no_step():
    run = Run(size=4)
    with torch.no_grad():
        looked = sum(len(ids) for (ids,) in run.loader)
    assert looked > 0 and run.releases == []
    assert len(run.epoch()) == 3


def test_two_iterations_at_once_are_an_error():
    run = Run(size=4)
    first = iter(run.loader)
    run.train(*next(first))
    second = iter(run.loader)
    run.train(*next(second))
    with pytest.raises(RuntimeError, match="another iteration over this loader"):
        next(first)


def test_fixed_batches_are_cut_as_well():
    run = Run(size=5, poisson=False, batch_size=16)
    assert run.epoch() == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert len(run.loader) == 10  # ceil(3 * 16 / 5)


@pytest.mark.parametrize(("size", "expected"), [(4, 10), (8, 5), (16, 3), (1000, 3)])
def test_length_is_the_expected_number_of_pieces(size, expected):
    assert len(Run(size=size).loader) == expected


def test_steps_that_never_release_are_said_once():
    """A new iterator for every step: only first pieces are ever seen."""
    run = Run(size=4)
    for k in range(6):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run.train(*next(iter(run.loader)))
        assert any("Keep one iterator" in str(w.message) for w in said) == (k == 3)
    run = Run(size=1000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            run.train(*next(iter(run.loader)))  # a whole logical batch each
        for _ in range(6):
            with torch.no_grad():
                next(iter(run.loader))
    assert not any("Keep one iterator" in str(w.message) for w in said)


def test_looks_like_the_logical_loader():
    run = Run(size=4)
    assert run.loader.dataset is run.logical.dataset
    assert run.loader.batch_sampler is run.logical.batch_sampler
    assert run.loader.sample_rate == run.logical.sample_rate


def test_a_loader_of_pieces_made_private_again_draws_logical_batches():
    """A second training on what the first one got back: its own batches and its own optimizer."""
    from gsm import make_private

    made = []
    loader = DataLoader(TensorDataset(torch.randn(50, 3)), batch_size=10)
    for poisson in (True, True, False):
        model = nn.Linear(3, 2)
        model, optimizer, loader = make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0, max_grad_norm=1.0,
            max_physical_batch_size=4, poisson_sampling=poisson,
        )  # fmt: skip
        assert len(loader.batch_sampler) == 5 and loader.optimizer is optimizer
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert optimizer.accountant.history == [(1.0, 0.2, 5)]
        made.append(loader)
    assert len({id(each) for each in made}) == 3


def test_batch_memory_manager():
    run, plain = Run(), logical_batches()
    with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer) as pieces:
        for (ids,) in pieces:
            assert len(ids) <= 3
            run.train(ids)
    assert [sorted(r) for r in run.releases] == plain


@pytest.mark.parametrize("after", [0, 1])
def test_an_exception_inside_the_memory_manager_leaves_nothing_behind(after):
    """Neither a sum nor what was told of a piece: the batches that follow are released each by itself."""
    run = Run()
    with (
        pytest.raises(KeyboardInterrupt),
        BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer) as pieces,
    ):
        held = iter(pieces)  # as a loop that the exception's traceback keeps alive
        for _ in range(after):
            run.train(*next(held))
        run.backward(*next(held))
        raise KeyboardInterrupt
    run.releases.clear()
    run.epoch()
    assert len(run.releases) == len(run.logical) and not run.optimizer._step_skip_queue


def test_opacus_memory_manager_around_it_cuts_the_logical_batches_not_the_pieces():
    from opacus.utils.batch_memory_manager import BatchMemoryManager as Theirs

    run = Run(size=4)
    with Theirs(data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer) as pieces:
        for (ids,) in pieces:
            run.train(ids)
    assert [sorted(r) for r in run.releases] == logical_batches()


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_named(size):
    with pytest.raises(ValueError, match=f"max_physical_batch_size must be at least 1, got {size}"):
        Run(size=size)


def test_a_loader_without_batches_is_named():
    with pytest.raises(ValueError, match="got list"):
        PhysicalBatchLoader([1, 2], 4, None)  # type: ignore[arg-type]


def test_an_old_iteration_that_is_closed_does_not_touch_the_new_one():
    run = Run(size=4)
    old = iter(run.loader)
    next(old)
    seen = []
    for k, (ids,) in enumerate(run.loader):
        run.train(ids)
        seen += ids.tolist()
        if k == 0:
            assert not run.releases
            old.close()
        if run.releases:
            break
    assert sorted(run.releases[0]) == sorted(seen)


def test_the_records_of_a_piece_are_counted_when_it_is_handed_out():
    run, total = Run(size=3), drawn.records()
    for (ids,) in iter_stepping(run):
        total += len(ids)
        assert drawn.records() == total


def test_a_loop_that_is_left_forgets_at_once():
    """Not only when the next one begins: a step by hand would release a part of a logical batch."""
    run = Run(size=4)
    pieces = iter(run.loader)
    run.train(*next(pieces))
    assert all(p.summed_grad is not None for p in run.optimizer.params)
    pieces.close()
    assert all(p.summed_grad is None for p in run.optimizer.params)
