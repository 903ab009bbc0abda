"""Accounts that count passes: one that is left early counts as whole, whoever asks and however the batches are cut."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accountants import PLDAccountant
from gsm import PrivacyEngine
from gsm.checkpoint_file import CheckpointError
from gsm.passes import Passes, passes_of, unwatched, watched
from gsm.preparation import charging

BATCHES = 5


def trained(sampling: str = "shuffled", batch_size: int | None = 4, noise: float = 2.0, **kwargs):
    """Model, optimizer and loader of 5 batches of 4 records, and the engine."""
    engine = PrivacyEngine(accountant=PLDAccountant(sampling=sampling, relation="zero_out"))
    model, records = nn.Linear(3, 2), torch.randn(20, 3)
    data = TensorDataset(records if batch_size else records.view(BATCHES, 4, 3))
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=noise, max_grad_norm=1.0, poisson_sampling=False, **kwargs,
    )  # fmt: skip
    return model, optimizer, loader, engine


def train(model, optimizer, loader, batches: int | None = None) -> None:
    """One pass, left after so many batches."""
    for done, (x,) in enumerate(loader, 1):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if done == batches:
            return


def passes(engine: PrivacyEngine) -> float:
    return math.fsum(rate * steps for _, rate, steps in engine.accountant.history)


def epsilon(noises: list[float]) -> float:
    """Of a record that takes part in one step at each of these noises."""
    accountant = PLDAccountant()
    accountant.history = [(sigma, 1.0, 1) for sigma in noises]
    return accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("sampling", ["shuffled", "cyclic"])
@pytest.mark.parametrize("batch_size", [4, None], ids=["batches", "items that are batches"])
def test_passes_that_are_left_count_as_whole(sampling, batch_size):
    model, optimizer, loader, engine = trained(sampling, batch_size)
    for _ in range(7):
        train(model, optimizer, loader, batches=1)
    assert engine.get_epsilon(1e-5) == pytest.approx(epsilon([2.0] * 7), rel=1e-6)
    train(model, optimizer, loader)
    assert passes(engine) == pytest.approx(8)


@pytest.mark.parametrize("how", ["virtual_step", "signal_skip_step"])
def test_a_logical_batch_over_two_passes_is_two_samples(how):
    model, optimizer, loader, engine = trained()
    noise, added = optimizer.noise.add_, []
    optimizer.noise.add_ = lambda tensors, std, bound: added.append(bound) or noise(tensors, std, bound)
    done = 0
    with pytest.warns(UserWarning, match="another pass over the data"):
        for _ in range(2):
            for (x,) in loader:
                done += 1
                optimizer.zero_grad()
                if how == "signal_skip_step":
                    optimizer.signal_skip_step(done % 2 == 1)
                model(x).square().mean().backward()
                optimizer.virtual_step() if how == "virtual_step" and done % 2 else optimizer.step()
    assert added == [1.0, 1.0, 2.0, 1.0, 1.0]  # the third holds the last batch of one pass and the first of the next
    assert engine.get_epsilon(1e-5) >= epsilon([2.0] * 2)


def test_logical_batches_of_one_pass_are_one_sample_each(recwarn):
    model, optimizer, loader, engine = trained()
    for done, (x,) in enumerate(loader):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step() if done in (2, 4) else optimizer.virtual_step()
    assert [n for _, _, n in engine.accountant.history] == [2] and engine.accountant.history[0][1] == pytest.approx(0.2)
    assert not [w for w in recwarn if "another pass" in str(w.message)]


def test_whole_passes_are_charged_as_they_are():
    model, optimizer, loader, engine = trained()
    for _ in range(3):
        train(model, optimizer, loader)
    assert engine.accountant.history == [(2.0, 1 / BATCHES, 3 * BATCHES)]


def test_looking_at_the_data_in_between_costs_nothing():
    model, optimizer, loader, engine = trained()
    batches = iter(loader)
    for _ in range(2):
        (x,) = next(batches)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert len([model(y) for (y,) in loader]) == BATCHES
    for (x,) in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    train(model, optimizer, loader)
    assert engine.accountant.history == [(2.0, 1 / BATCHES, 2 * BATCHES)]


def test_two_passes_at_once_count_as_two():
    model, optimizer, loader, engine = trained()
    for (x,), (y,) in list(zip(loader, loader, strict=True))[:1]:
        for each in (x, y):
            optimizer.zero_grad()
            model(each).square().mean().backward()
            optimizer.step()
    one, other = iter(loader), iter(loader)
    for batches in (one, other, one):
        (x,) = next(batches)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert math.ceil(passes(engine) - 1e-9) >= 3


def test_what_a_pass_lacks_is_charged_at_its_least_noise():
    model, optimizer, loader, engine = trained()
    train(model, optimizer, loader)
    batches = iter(loader)
    for noise in (4.0, 3.0, 5.0):
        optimizer.noise_multiplier = noise
        (x,) = next(batches)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    train(model, optimizer, loader, batches=1)
    noise, rate, steps = engine.accountant.history[-2]
    assert (noise, steps) == (3.0, 1) and rate == pytest.approx(2 / BATCHES)
    assert passes(engine) == pytest.approx(2 + 1 / BATCHES)


def test_a_resumed_run_begins_a_pass_of_its_own(tmp_path):
    model, optimizer, loader, engine = trained()
    train(model, optimizer, loader, batches=2)
    engine.save_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
    model, optimizer, loader, engine = trained()
    engine.load_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
    train(model, optimizer, loader, batches=1)
    assert passes(engine) == pytest.approx(1 + 1 / BATCHES)


def test_the_journal_has_it_first(tmp_path):
    model, optimizer, loader, engine = trained()
    engine.keep_journal(tmp_path / "journal")
    for _ in range(2):
        train(model, optimizer, loader, batches=1)
    assert engine.journal is not None
    assert engine.journal.history() == engine.accountant.history and passes(engine) == pytest.approx(1 + 1 / BATCHES)
    engine.journal.close()
    with pytest.raises(CheckpointError, match="closed"):
        train(model, optimizer, loader, batches=1)


def test_batches_in_pieces():
    model, optimizer, loader, engine = trained(max_physical_batch_size=3)
    assert len(loader) == 7  # 20 records in pieces of 3
    for _ in range(4):
        train(model, optimizer, loader, batches=2)  # the two pieces of one batch
    assert engine.get_epsilon(1e-5) == pytest.approx(epsilon([2.0] * 4), rel=1e-6)


def test_opacus_own_optimizer_is_charged_the_same():
    """As Opacus's step hooks charge: its optimizer under DistributedDataParallel is not made here."""
    accountant = PLDAccountant(sampling="shuffled", relation="zero_out")
    loader = watched(DataLoader(torch.arange(20), batch_size=4), counted=True)
    charge = charging(accountant, loader, 1 / BATCHES)
    for _ in range(3):
        next(iter(loader))
        charge(SimpleNamespace(noise_multiplier=2.0, accumulated_iterations=1))
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon([2.0] * 3), rel=1e-6)
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        charge(SimpleNamespace(noise_multiplier=2.0, accumulated_iterations=1))


def test_batches_of_another_loader_are_said():
    model, optimizer, loader, engine = trained()
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        train(model, optimizer, unwatched(loader))
    assert passes_of(unwatched(loader)) is None and passes_of(loader) is not None


def test_a_loader_that_came_back_goes_in_again():
    model, optimizer, loader, engine = trained()
    other = PrivacyEngine()
    plain = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, poisson = other.make_private(
            module=plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
    assert poisson.sample_rate == 1 / BATCHES


def test_other_accountants_leave_the_loader_as_it_is():
    model = nn.Linear(3, 2)
    loader = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=4)
    with pytest.warns(UserWarning, match="Poisson sampling"):
        *_, same = PrivacyEngine(accountant="pld").make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip
    assert same is loader


def test_it_is_the_order_it_watches():
    order = Passes([[1, 2], [3]])
    assert list(order) == [[1, 2], [3]] and len(order) == 2 and order.drawn == 2
    with pytest.raises(AttributeError):
        order.batch_size  # noqa: B018 - a list has none
    for again in (copy.deepcopy(order), pickle.loads(pickle.dumps(order))):
        assert list(again) == [[1, 2], [3]] and again.drawn == 4


def test_unsampled_batches_of_two_passes_are_two_samples():
    """A record is in each pass; within one, parts of a logical batch may be joined, and a batch be used again."""
    engine = PrivacyEngine(accountant=PLDAccountant(sampling="unsampled"))
    model = nn.Linear(3, 2)
    loader = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=4)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=2.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    scales, add = [], optimizer.noise.add_
    optimizer.noise.add_ = lambda tensors, std, bound: (scales.append((std, bound)), add(tensors, std, bound))

    def step(x, skip=False):
        optimizer.zero_grad()
        optimizer.signal_skip_step(skip)
        model(x).square().mean().backward()
        optimizer.step()

    batches = [x for (x,) in loader]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step(batches[0])  # again: charged again, nothing wrong
        for k, (x,) in enumerate(loader):
            step(x, skip=k < 4)
    assert scales == [(2.0, 1.0)] * 3 and engine.accountant.history == [(2.0, 1 / BATCHES, 3)]
    for (x,), skip in zip(loader, [True, True, False], strict=False):
        step(x, skip)
    for (x,), skip in zip(loader, [True], strict=False):
        step(x, skip)
    with pytest.warns(UserWarning, match="another pass over the data"):
        for (x,), skip in zip(loader, [False], strict=False):
            step(x, skip)
    assert scales[3:] == [(2.0, 1.0), (4.0, 2.0)]


def test_rows_of_two_batches_in_one_forward_are_said():
    model, optimizer, loader, engine = trained()
    with pytest.warns(UserWarning, match="called on 8 rows, but the loader had drawn 4 records"):
        for (x,), (other,) in zip(loader, loader, strict=True):
            optimizer.zero_grad()
            model(torch.cat([x, other])).square().mean().backward()
            optimizer.step()
