"""Poisson loaders made from ordinary ones: what is kept, what is replaced, what is refused."""

import copy
import io
import logging
import pickle
import warnings

import numpy as np
import opacus.data_loader
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from gsm import drawn
from gsm.engine import PrivacyEngine
from gsm.loader import DPDataLoader, SecureShuffle, _check_replaceable, with_secure_shuffle
from gsm.sampling import DistributedPoissonSampler, PoissonSampler


class Records(Dataset):
    """Record ``i`` is ``{"id": i}``, and remembers nothing."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"id": i, "name": f"r{i}"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def ids(loader):
    return [batch["id"].tolist() for batch in loader]


def test_same_dataset_same_expected_batch_size_same_options():
    dataset, start = Records(100), lambda worker: None
    loader = DataLoader(dataset, batch_size=10, shuffle=True, num_workers=2, worker_init_fn=start, timeout=30)
    private = DPDataLoader.from_data_loader(loader)
    assert isinstance(private, opacus.data_loader.DPDataLoader)
    assert private.dataset is dataset and len(private) == 10 and private.sample_rate == 0.1
    assert (private.num_workers, private.timeout, private.worker_init_fn) == (2, 30, start)
    assert isinstance(private.batch_sampler, PoissonSampler)


@pytest.mark.parametrize(
    ("size", "drop_last", "steps"), [(64, False, 16), (64, True, 15), (1000, False, 1), (7, True, 142)]
)
def test_rate_and_steps_follow_the_loaders_length(size, drop_last, steps, caplog):
    loader = DataLoader(Records(1000), batch_size=size, drop_last=drop_last)
    with caplog.at_level(logging.WARNING):
        private = DPDataLoader.from_data_loader(loader)
    assert len(private) == steps and private.sample_rate == 1 / steps
    assert ("drop_last" in caplog.text) == drop_last


def test_batch_sizes_vary_around_the_expected_one_and_no_record_is_favoured():
    private = DPDataLoader(Records(60), sample_rate=0.25, steps=800, generator=torch.Generator().manual_seed(1))
    counts = np.zeros(60)
    sizes = []
    for batch in ids(private):
        assert len(set(batch)) == len(batch)
        counts[batch] += 1
        sizes.append(len(batch))
    assert len(set(sizes)) > 10
    assert abs(np.mean(sizes) - 15) < 0.6
    assert np.abs(counts / 800 - 0.25).max() < 5 * (0.25 * 0.75 / 800) ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_batches_keep_their_structure_from_the_first_on(workers):
    private = DPDataLoader(Records(5), sample_rate=1e-6, steps=3, num_workers=workers)
    for batch in private:
        assert batch["id"].shape == (0,) and batch["id"].dtype == torch.int64 and batch["name"] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_generator_reproduces_the_batches(workers):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Records(50), batch_size=5, generator=generator, num_workers=workers)
        return ids(DPDataLoader.from_data_loader(loader))

    assert draw(1) == draw(1) != draw(2)


def test_secure_mode_samples_from_the_operating_system():
    loader = DataLoader(Records(200), batch_size=20, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    first = ids(DPDataLoader.from_data_loader(loader, secure_mode=True))
    torch.manual_seed(0)
    assert ids(DPDataLoader.from_data_loader(loader, secure_mode=True)) != first


@pytest.mark.parametrize("make", [DPDataLoader, opacus.data_loader.DPDataLoader])
def test_a_poisson_loader_stays_one_with_its_own_rate(make):
    first = make(Records(30), sample_rate=0.3)
    again = DPDataLoader.from_data_loader(first)
    assert again.sample_rate == 0.3 and len(again) == 3
    assert again.collate_fn.collate_fn is torch.utils.data.default_collate


def test_subset_is_the_way_to_train_on_a_part():
    private = DPDataLoader.from_data_loader(DataLoader(Subset(Records(100), [3, 5, 8]), batch_size=1))
    assert set(sum(ids(private) * 1, [])) <= {3, 5, 8}


def loader_with(**options):
    return DataLoader(Records(20), **options)


class MyBatches(BatchSampler):
    pass


REFUSED = {
    "weights": (
        lambda: loader_with(batch_size=2, sampler=WeightedRandomSampler([1.0] * 20, 20)),
        ValueError,
        "WeightedRandomSampler.*independently with the same probability.*poisson_sampling=False",
    ),
    "subset sampler": (
        lambda: loader_with(batch_size=2, sampler=SubsetRandomSampler([1, 2, 3])),
        ValueError,
        "SubsetRandomSampler, which Poisson sampling would replace.*Subset instead",
    ),
    "with replacement": (
        lambda: loader_with(batch_size=2, sampler=RandomSampler(Records(20), replacement=True)),
        ValueError,
        "RandomSampler",
    ),
    "fewer samples": (
        lambda: loader_with(batch_size=2, sampler=RandomSampler(Records(20), num_samples=10)),
        ValueError,
        "RandomSampler",
    ),
    "another process's share": (
        lambda: loader_with(batch_size=2, sampler=DistributedSampler(Records(20), num_replicas=2, rank=0)),
        ValueError,
        "DistributedSampler",
    ),
    "own batch sampler": (
        lambda: loader_with(batch_sampler=MyBatches(SequentialSampler(Records(20)), 2, False)),
        ValueError,
        "MyBatches",
    ),
    "list of batches": (
        lambda: loader_with(batch_sampler=[[0, 1], [2, 3]]),
        ValueError,
        "draws its batches with a list",
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=2), ValueError, "not supported for IterableDataset"),
    "no batches": (lambda: loader_with(batch_size=None), ValueError, "batch_size=None"),
    "not a loader": (lambda: [1, 2, 3], TypeError, "needs a torch.utils.data.DataLoader, got list"),
    "nothing left": (lambda: loader_with(batch_size=30, drop_last=True), ValueError, "has no batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_refused_with_the_fix(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        DPDataLoader.from_data_loader(make())


def test_made_up_records_are_refused():
    with pytest.raises(ValueError, match="rand_on_empty=True would fill an empty batch with a made-up record"):
        DPDataLoader(Records(10), sample_rate=0.1, rand_on_empty=True)


def test_secure_shuffle():
    torch.manual_seed(0)
    loader = with_secure_shuffle(DataLoader(Records(40), batch_size=8, shuffle=True, drop_last=True))
    first = sum(ids(loader), [])
    torch.manual_seed(0)
    second = sum(ids(loader), [])
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert len(loader) == 5 and len(SecureShuffle(7)) == 7


def test_secure_shuffle_leaves_a_fixed_order_alone():
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2)
    assert with_secure_shuffle(loader) is loader


def test_a_pass_that_is_only_looked_at_is_no_skipped_step():
    """All of its batches are empty: were they counted, each would be a batch that got no step."""
    from gsm import make_private

    loader = DPDataLoader(TensorDataset(torch.zeros(10, 2)), sample_rate=1e-9, steps=3)
    model = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    _, optimizer, loader = make_private(model, inner, loader, noise_multiplier=1.0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert [len(x) for (x,) in loader] == [0, 0, 0]
    with pytest.warns(UserWarning, match=r"3 empty batch\(es\)"):
        list(loader)
    assert optimizer.releases == 0


def test_records_fetched_for_an_abandoned_pass_are_not_counted_in_the_next():
    loader = DPDataLoader(Records(60), sample_rate=0.2, num_workers=1, prefetch_factor=3, steps=5)
    next(iter(loader))
    total = drawn.records()
    for batch in loader:
        total += len(batch["id"])
        assert drawn.records() == total


def test_an_epoch_whose_full_batches_were_skipped_as_well_says_nothing_about_the_empty_ones():
    """A loop that was left out altogether (frozen epochs, a debugger) does not tell which batches were empty."""
    from gsm import make_private

    records = DPDataLoader(TensorDataset(torch.zeros(2, 2)), sample_rate=0.5, steps=12)
    model = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = make_private(model, inner, records, noise_multiplier=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes = [len(x) for (x,) in loader]
    assert 0 in sizes and max(sizes) > 0


def test_over_processes_a_share_may_be_replaced_and_other_sampling_may_not():
    share = DistributedSampler(Records(20), num_replicas=2, rank=0)
    _check_replaceable(loader_with(batch_size=2, sampler=share), True)
    with pytest.raises(ValueError, match="WeightedRandomSampler, which Poisson sampling would replace"):
        _check_replaceable(loader_with(batch_size=2, sampler=WeightedRandomSampler([1.0] * 20, 20)), True)


@pytest.mark.parametrize("first, then", [(True, False), (False, True), (True, True)])
def test_over_processes_each_draws_from_its_own_share(monkeypatch, first, then):
    """Else every record could be in the batch of every process."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    loader = DataLoader(Records(20), batch_size=2)
    again = DPDataLoader.from_data_loader(DPDataLoader.from_data_loader(loader, distributed=first), distributed=then)
    assert again.distributed and isinstance(again.batch_sampler, DistributedPoissonSampler)
    assert again.sample_rate == 0.1 and again.batch_sampler.num_samples == 10


def test_batches_that_are_items_of_the_dataset_are_shuffled_securely_too():
    loader = with_secure_shuffle(DataLoader(Records(40), batch_size=None, shuffle=True))
    orders = []
    for _ in range(2):
        torch.manual_seed(0)
        orders.append(list(loader.sampler))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]
    assert len(loader) == 40 and loader.batch_size is None and len(list(loader)) == 40


def test_the_loader_of_make_private_can_be_pickled_and_copied():
    model = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40, dtype=torch.long))
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert loader.optimizer() is optimizer
    for other in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert other.optimizer is None and len(other) == 10 and other.sample_rate == 0.1
        assert sum(len(x) for x, _ in other) > 0
    file = io.BytesIO()
    torch.save(loader, file)
    file.seek(0)
    assert len(torch.load(file, weights_only=False).dataset) == 40


def test_a_copied_loader_does_not_repeat_the_batches_of_a_seeded_one():
    loader = DPDataLoader(Records(64), sample_rate=0.5, generator=torch.Generator().manual_seed(1))
    drawn_by = [[batch["id"].tolist() for batch in each] for each in (copy.deepcopy(loader), loader)]
    assert drawn_by[0] != drawn_by[1]
