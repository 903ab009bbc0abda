"""Class 3: a record counted twice, or left over from before."""

import warnings

import opacus.optimizers
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from gsm import DPOptimizer, GradSampleModule
from gsm.clipping_user import UserClipping
from tests.attacks.tools import CE, RECORDS, clipped_sum, data, step, training, watched

X, Y = data(8, scale=30.0).tensors


def right(model, watch, x, y, release=-1):
    torch.testing.assert_close(watch.sums[release], clipped_sum(model._module, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_exception_between_backward_and_step_leaves_nothing_for_the_next_batch(mode):
    """Guard: ``zero_grad`` forgets captures; without it the next release holds both batches."""
    model, optimizer, watch = watched(mode=mode)
    with pytest.raises(KeyboardInterrupt):
        CE(model(X[:4]), Y[:4]).backward()
        raise KeyboardInterrupt
    step(model, optimizer, X[4:], Y[4:])
    right(model, watch, X[4:], Y[4:])
    assert watch.stds == [1.0]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_exception_after_the_forward_leaves_nothing(mode):
    """Guard: a forward without a backward belongs to no release."""
    model, optimizer, watch = watched(mode=mode)
    with pytest.raises(ValueError, match="batch_size"):
        CE(model(X), Y[:3])
    step(model, optimizer, X[4:], Y[4:])
    right(model, watch, X[4:], Y[4:])


def test_two_backwards_before_a_step_are_an_error_under_poisson_sampling():
    """Guard: ``forbid_grad_accumulation``."""
    model, optimizer, _ = training()
    CE(model(X), Y).backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        CE(model(X), Y).backward()


def test_an_epoch_abandoned_half_way_leaves_no_piece_behind():
    """Guard: ``PhysicalBatchLoader`` makes the optimizer forget what was not released."""
    model, optimizer, loader = training(max_physical_batch_size=2)
    for n, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        if n == 1:
            break
    optimizer.noise.sums.clear()
    pieces = []
    for x, y in loader:
        pieces.append((x, y))
        step(model, optimizer, x, y)
        if optimizer.noise.sums:
            break
    right(model, optimizer.noise, *(torch.cat(t) for t in zip(*pieces, strict=True)), release=0)


def test_a_step_that_a_gradient_scaler_would_skip_is_refused():
    """Guard: ``_step_supports_amp_scaling``; torch's own message would be an assertion about inf checks."""
    model, optimizer, _ = training()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(CE(model(X), Y)).backward()
    with pytest.raises(ValueError, match="GradScaler cannot drive a private optimizer"):
        scaler.step(optimizer)


def test_a_disabled_scaler_changes_nothing():
    """The other side of the guard: loops written for both kinds of precision go on working."""
    model, optimizer, watch = watched()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(CE(model(X), Y)).backward()
    scaler.step(optimizer)
    scaler.update()
    right(model, watch, X, Y)


def test_the_same_gradients_never_enter_two_releases():
    """Guard: gradients are marked or forgotten once used."""
    model, optimizer, watch = watched()
    step(model, optimizer, X, Y)
    with pytest.raises(ValueError, match="No per-sample gradients|still there"):
        optimizer.step()
    assert len(watch.sums) == 1


def test_a_second_optimizer_over_the_same_parameters_gets_nothing():
    """Guard: one release takes the captures away; a second one would be free of charge."""
    from gsm import DPOptimizer

    model, optimizer, _ = watched()
    second = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0,
                         expected_batch_size=8)  # fmt: skip
    step(model, optimizer, X, Y)
    with pytest.raises(ValueError, match="No per-sample gradients|still there"):
        second.step()


def test_workers_that_fetch_ahead_do_not_shift_the_ends_of_logical_batches():
    """Guard: the optimizer is told about a piece when it is handed out, not when it is fetched."""
    model, optimizer, loader = training(max_physical_batch_size=2, batch_size=20)
    sizes, watch = [], optimizer.noise
    for x, y in loader:
        sizes.append(len(x))
        step(model, optimizer, x, y)
    assert len(watch.sums) == 2 and max(sizes) <= 2 and optimizer.accountant.history == [(1.0, 0.5, 2)]


def test_a_batch_released_twice_is_said():
    """Guard: ``BatchWatch.compare``; two epochs over one drawn batch are no two Poisson samples."""
    model, optimizer, loader = training()
    x, y = next(iter(loader))
    step(model, optimizer, x, y)
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        step(model, optimizer, x, y)


def test_batches_that_were_only_looked_at_excuse_no_second_release(recwarn):
    """Guard: ``only_looked_at``; a pass that measures the accuracy draws, but what it drew is not released."""
    model, optimizer, loader = training()
    for _ in range(2):
        with torch.no_grad():
            for x, _ in loader:
                model(x)
        for x, y in loader:
            step(model, optimizer, x, y)
    assert not [w for w in recwarn if "more releases" in str(w.message)]
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        step(model, optimizer, x, y)


def test_a_user_in_two_pieces_of_a_logical_batch_is_an_error():
    """Guard: ``PendingRelease.check``."""
    from gsm.clipping_user import UserClipping

    model, optimizer, _ = watched(clipping=UserClipping())
    for last in (False, True):
        optimizer.clipping.set_users([0, 1, 2, 3])
        CE(model(X[:4]), Y[:4]).backward()
        if not last:
            optimizer.virtual_step()
    with pytest.raises(ValueError, match="spread over several physical batches"):
        optimizer.step()


def test_every_record_is_in_an_epochs_batches_as_often_as_the_rate_says():
    """Right by construction: no record is favoured, none is twice in one batch."""
    _, _, loader = training()
    seen = torch.zeros(RECORDS)
    sampler = loader.batch_sampler
    for _ in range(60):
        for batch in sampler:
            assert len(set(batch)) == len(batch)
            seen[batch] += 1
    expected = 60 * len(sampler) * sampler.sample_rate
    assert (seen - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("ours", [False, True], ids=["opacus's optimizer", "this library's"])
def test_two_backwards_under_opacuss_own_optimizer_are_said(ours, recwarn):
    """Guard: ``_warn_if_side_by_side``; Opacus's optimizer clips both and adds noise for one."""
    model = GradSampleModule(torch.nn.Linear(3, 2))
    kind = DPOptimizer if ours else opacus.optimizers.DPOptimizer
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = kind(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    x = torch.randn(4, 3)
    for _ in range(2):  # a step forgotten, or an exception in between
        model(x).square().sum(1).mean().backward()
    said = [str(w.message) for w in recwarn if "2 backward passes without zero_grad()" in str(w.message)]
    assert len(said) == (0 if ours else 1)
    optimizer.zero_grad()
    recwarn.clear()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        optimizer.step()
    assert not [w for w in recwarn if "backward passes" in str(w.message)]


class Keys(Dataset):
    """Takes names, and has the length of what they are taken from."""

    def __getitem__(self, key):
        return X[0], Y[0]

    def __len__(self):
        return 2


WHOLE = data()
REPEATED = {
    "bootstrap": (Subset(WHOLE, [0, 1, 1, 5]), 1),
    "from the end": (Subset(WHOLE, [0, -len(WHOLE)]), 1),
    "itself": (ConcatDataset([WHOLE, WHOLE]), len(WHOLE)),
    "nested": (ConcatDataset([Subset(Subset(WHOLE, [4, 5, 6]), [0, 2]), Subset(WHOLE, torch.tensor([6, 7]))]), 1),
}
ONCE = {
    "parts": ConcatDataset([Subset(WHOLE, range(5)), Subset(WHOLE, range(5, 9))]),
    "the same positions of others": ConcatDataset([Subset(WHOLE, [0, 1]), Subset(data(), [0, 1])]),
    "keys": Subset(Keys(), ["a", "b", "c"]),
    "positions beyond": Subset(Keys(), [7, 8]),
}


@pytest.mark.parametrize("what", REPEATED)
def test_a_dataset_that_holds_records_twice_is_said(what):
    """Guard: ``repeated.warn_if_repeated``; every item is clipped on its own, so such a record counts twice."""
    dataset, n = REPEATED[what]
    with pytest.warns(UserWarning, match=rf"holds {n} of its {len(dataset)} items more than once"):
        training(dataset=dataset, batch_size=1)


@pytest.mark.parametrize("what", [*ONCE, "items of users"])
def test_a_dataset_that_holds_records_once_is_not_said_to_repeat_them(what):
    users = {"clipping": UserClipping()} if what == "items of users" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*more than once")
        training(dataset=REPEATED["bootstrap"][0] if users else ONCE[what], batch_size=1, **users)
