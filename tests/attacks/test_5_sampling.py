"""Class 5: sampling that is not what was accounted."""

import warnings
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler, Sampler, Subset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from accountants import PLDAccountant, PRVAccountant
from gsm import PrivacyEngine, make_private
from gsm.loader import DPDataLoader
from gsm.passes import unwatched
from gsm.sampling import PoissonSampler, Words, inclusion_threshold
from tests.attacks.tools import CE, RECORDS, Watch, data, mlp, step, training

X, Y = data(8).tensors


@pytest.mark.parametrize("rate", [1e-7, 1 / 3, 1e-3, 0.1 + 0.2])
def test_no_rate_is_rounded_up(rate):
    """Guard: 62-bit thresholds; 24-bit floats draw 19 % more than 1e-7."""
    assert Fraction(inclusion_threshold(rate), 2**62) <= Fraction(rate) < Fraction(inclusion_threshold(rate) + 1, 2**62)


@pytest.mark.parametrize("batches", [
    lambda d: {"sampler": WeightedRandomSampler(torch.ones(len(d)).tolist(), len(d)), "batch_size": 8},
    lambda d: {"batch_sampler": [[0, 1, 2]] * 5},
    lambda d: {"sampler": torch.utils.data.SubsetRandomSampler(range(10)), "batch_size": 5},
])  # fmt: skip
def test_other_sampling_is_never_silently_replaced(batches):
    """Guard: ``loader._check_replaceable``."""
    records, model = data(), mlp()
    with pytest.raises(ValueError, match="which Poisson sampling would replace"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=1), DataLoader(records, **batches(records)),
                     noise_multiplier=1.0)  # fmt: skip


def test_a_part_of_the_data_is_sampled_at_its_own_rate():
    """The way out that the message names: a Subset; the rate is per record of the subset."""
    _, optimizer, loader = training(dataset=Subset(data(), range(10)), batch_size=5)
    assert optimizer.sample_rate == 0.5 and max(max(b, default=0) for b in loader.batch_sampler) < 10


def test_equal_seeds_on_all_ranks_draw_independently():
    """Guard: ``Words.fork``; otherwise the k-th records of all shards enter together."""
    masks = [Words(torch.Generator().manual_seed(0)).fork(rank).below(4000, 1 << 61) for rank in range(2)]
    agree = (masks[0] == masks[1]).mean()
    assert 0.45 < agree < 0.55


def test_drop_last_drops_nobody_and_the_rate_is_the_one_charged():
    """Guard: the rate follows the loader's length, and the accountant gets the same number."""
    model = mlp()
    loader = DataLoader(data(), batch_size=12, drop_last=True)
    _, optimizer, private = make_private(model, torch.optim.SGD(model.parameters(), lr=1), loader, noise_multiplier=1.0)
    assert optimizer.sample_rate == private.batch_sampler.sample_rate == 1 / 3
    drawn = {i for _ in range(20) for batch in private.batch_sampler for i in batch}
    assert drawn == set(range(RECORDS))


def test_an_empty_batch_has_no_rows_and_is_released_and_charged():
    """Guard: collate functions for nobody; a made-up record would be a contribution that the noise does not cover."""
    model, optimizer, loader = training(batch_size=1)
    empty = 0
    for x, y in loader:
        empty += len(x) == 0
        step(model, optimizer, x, y)
    assert empty > 5 and sum(n for *_, n in optimizer.accountant.history) == len(loader) == len(optimizer.noise.sums)


def test_skipped_empty_batches_are_said():
    """Guard: ``DPDataLoader._watched``; the steps that are missing say which batches were empty."""
    model, optimizer, loader = training(batch_size=1)
    with pytest.warns(UserWarning, match="empty batch.* got no optimizer.step"):
        for x, y in loader:
            if len(x):
                step(model, optimizer, x, y)


LOOPS = {  # which batches get no step, and whether that is said
    "a few, by their loss": (lambda k, loss: loss > 1.3, True),
    "none": (lambda k, loss: False, False),
    "the first ones, to go on where one was": (lambda k, loss: k < 4, False),
    "four of five": (lambda k, loss: k % 5, False),
    "all": (lambda k, loss: True, False),
}


@pytest.mark.parametrize("name", LOOPS)
def test_batches_left_out_for_what_the_model_makes_of_them_are_said(name):
    """Guard: ``DPDataLoader._watched``; which batches count would tell about the records in them."""
    leaves_out, said = LOOPS[name]
    model, optimizer, loader = training(batch_size=2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for k, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) if len(x) else model(x).sum()
            if leaves_out(k, float(loss)):
                continue
            loss.backward()
            optimizer.step()
    assert any("batches of this pass were run through the model" in str(w.message) for w in found) == said


def test_batches_left_out_without_the_model_are_nobodys_business(recwarn):
    """Every tenth batch is put aside before anything is computed; a pass ends early."""
    model, optimizer, loader = training(batch_size=4)
    recwarn.clear()
    for k, (x, y) in enumerate(loader):
        if k % 10 == 3:
            continue
        step(model, optimizer, x, y)
    for k, (x, y) in enumerate(loader):
        step(model, optimizer, x, y)
        model(x)
        if k == 5:
            model(x)
            break
    assert not [w for w in recwarn.list if "run through the model" in str(w.message)]


def test_made_up_records_for_empty_batches_are_refused():
    """Guard: ``rand_on_empty`` must be False."""
    with pytest.raises(ValueError, match="made-up record"):
        DPDataLoader(data(), sample_rate=0.1, rand_on_empty=True)


def test_fixed_batches_are_never_reported_as_poisson_without_a_word():
    """Guard: ``preparation.check_assumption``."""
    with pytest.warns(UserWarning, match="epsilon is computed for Poisson sampling"):
        training(poisson_sampling=False)


def test_fixed_batches_have_a_certified_price(recwarn):
    """The way out that the message names: an accountant that is told what the loader does, at a higher price."""
    accountant = PRVAccountant(sampling="shuffled", relation="zero_out")
    model, optimizer, loader = training(poisson_sampling=False, accountant=accountant)
    poisson = PRVAccountant()
    for x, y in loader:
        step(model, optimizer, x, y)
    poisson.history = accountant.history
    assert accountant.get_epsilon(1e-5) > poisson.get_epsilon(1e-5)
    assert not [w for w in recwarn if "epsilon is computed for Poisson" in str(w.message)]


OTHERWISE = {
    ("shuffled", "replacement"): lambda d: {"sampler": RandomSampler(d, replacement=True)},
    ("unsampled", "weighted"): lambda d: {"sampler": WeightedRandomSampler([1.0] * len(d), len(d))},
    ("shuffled", "several rounds"): lambda d: {"sampler": RandomSampler(d, num_samples=3 * len(d))},
    ("shuffled", "padded"): lambda d: {"sampler": DistributedSampler(d, num_replicas=3, rank=0)},
    ("cyclic", "poisson"): lambda d: {"batch_sampler": PoissonSampler(num_samples=len(d), sample_rate=0.2)},
    ("fixed_size", "shuffle"): lambda d: {"shuffle": True},
    ("fixed_size", "in order"): lambda d: {},
}


@pytest.mark.parametrize("assumed, draws", OTHERWISE, ids=["-".join(key) for key in OTHERWISE])
def test_a_loader_that_draws_in_another_way_than_the_accountant_was_told(assumed, draws):
    """Guard: ``preparation.other_than``; a certified number for batches that are drawn otherwise certifies nothing."""
    options = OTHERWISE[assumed, draws](data())
    loader = DataLoader(data(), **({} if "batch_sampler" in options else {"batch_size": 8}), **options)
    accountant = PLDAccountant(sampling=assumed, relation="replace_one")
    with pytest.raises(ValueError, match=f"sampling='{assumed}', but the loader"):
        private_with(loader, accountant)


class OwnBatches(list):
    """What a user's own batch sampler draws is not known here."""


@pytest.mark.parametrize("assumed", ["shuffled", "cyclic", "unsampled", "fixed_size"])
def test_what_fits_and_what_is_not_known_is_taken(assumed):
    d = data()
    own = DataLoader(d, batch_sampler=OwnBatches([[1, 2], [3]]))
    once = [DataLoader(d, batch_size=8, shuffle=True), DataLoader(d, batch_size=8, drop_last=True)]
    once.append(DataLoader(d, batch_size=8, sampler=DistributedSampler(d, num_replicas=2, rank=0)))
    for loader in [own] if assumed == "fixed_size" else [own, *once]:
        found = private_with(loader, PLDAccountant(sampling=assumed, relation="replace_one"))[2]
        assert unwatched(found) is loader


def private_with(loader, accountant, **options):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return make_private(
        model, optimizer, loader, noise_multiplier=1.0, poisson_sampling=False, accountant=accountant, **options
    )


def test_the_original_loader_is_noticed():
    """Guard: ``BatchWatch.compare`` counts what the returned loader's sampler drew."""
    model = mlp()
    original = DataLoader(data(), batch_size=8)
    model, optimizer, _ = make_private(model, torch.optim.SGD(model.parameters(), lr=0.0), original,
                                       noise_multiplier=1.0)  # fmt: skip
    with pytest.warns(UserWarning, match="more releases than batches drawn"):
        for x, y in original:
            step(model, optimizer, x, y)


def test_an_accountant_shared_by_two_optimizers_counts_both():
    """Right by construction: every release is charged where it happens."""
    accountant = PRVAccountant()
    for _ in range(2):
        model, optimizer, loader = training(accountant=accountant)
        for x, y in loader:
            step(model, optimizer, x, y)
    assert accountant.history == [(1.0, 0.2, 10)]


def test_independent_samples_joined_by_virtual_step_are_charged_at_their_joint_rate():
    """Guard: ``independent_batches``; the same record may be in both, so bounds and rates add up."""
    model, optimizer, loader = training()
    batches = iter(loader)
    with pytest.warns(UserWarning, match="drew independently"):
        for last in (False, True):
            x, y = next(batches)
            CE(model(x), y).backward()
            optimizer.step() if last else optimizer.virtual_step()
    assert optimizer.noise.stds == [2.0] and optimizer.accountant.history == [(1.0, 0.4, 1)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_whole_batches_are_not_made_parts_by_a_signal(ahead):
    """Guard: ``begin_sample``; signal_skip_step is for parts of one batch, and the loader knows what it drew."""
    model, optimizer, loader = training()

    def batches():
        waiting = []
        for batch in loader:
            waiting.append(batch)
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting

    with pytest.warns(UserWarning, match="drew independently"):
        for done, (x, y) in enumerate(batches(), 1):
            optimizer.zero_grad()
            optimizer.signal_skip_step(done < 5)
            CE(model(x), y).backward()
            optimizer.step()
    assert optimizer.noise.stds == [5.0] and optimizer.accountant.history == [(1.0, 1.0, 1)]


def parts(x, y):
    return ((x[: len(x) // 2], y[: len(x) // 2], True), (x[len(x) // 2 :], y[len(x) // 2 :], False))


def test_parts_cut_by_hand_are_parts(recwarn):
    """No false alarm: every batch is cut in two in the loop."""
    model, optimizer, loader = training()
    for batch in loader:
        for x, y, more in parts(*batch):
            optimizer.signal_skip_step(more)
            step(model, optimizer, x, y)
    assert optimizer.noise.stds == [1.0] * 5 and optimizer.accountant.history == [(1.0, 0.2, 5)]
    assert not [w for w in recwarn if "drew independently" in str(w.message)]


@pytest.mark.parametrize("sampling", ["unsampled", "fixed_size", "poisson"])
def test_batches_of_ones_own_that_may_overlap_add_up(sampling):
    """Guard: ``draws_afresh``; where a record may be in any two batches, virtual_step does not join them."""

    class Afresh(Sampler):
        def __len__(self):
            return 5

        def __iter__(self):
            return (torch.randperm(40)[:8].tolist() for _ in range(5))

    batches = PoissonSampler(num_samples=40, sample_rate=0.2) if sampling == "poisson" else Afresh()
    accountant = PLDAccountant(sampling=sampling, relation="replace_one")
    model, optimizer, loader = private_with(DataLoader(data(), batch_sampler=batches), accountant)
    optimizer.noise = Watch()
    with pytest.warns(UserWarning, match="drew independently"):
        for done, (x, y) in enumerate(loader, 1):
            CE(model(x), y).backward()
            optimizer.step() if done == 5 else optimizer.virtual_step()
    assert optimizer.noise.stds == [5.0] and accountant.history == [(1.0, 1.0, 1)]


class Drawn(Sampler):
    """16 of the 40 records, without replacement, a hundred times."""

    def __len__(self):
        return 100

    def __iter__(self):
        return (torch.randperm(40)[:16].tolist() for _ in range(100))


@pytest.mark.parametrize("physical", [None, 5])
def test_batches_of_a_fixed_size_are_charged_at_no_smaller_share(physical):
    """Guard: ``LARGER``; 1 / len(loader) is the share only where the batches of a pass are as many as fit in one."""
    accountant = PLDAccountant(sampling="fixed_size", relation="replace_one")
    loader = DataLoader(data(), batch_sampler=Drawn())
    model, optimizer, loader = private_with(loader, accountant, max_physical_batch_size=physical)
    with pytest.raises(ValueError, match=r"16 of 40 records.*share of 0.01.*sample_rate = 0.4 "):
        for x, y in loader:
            step(model, optimizer, x, y)
    assert not accountant.history
    optimizer.sample_rate = 0.4
    for x, y in loader:
        step(model, optimizer, x, y)
    assert accountant.history == [(1.0, 0.4, 100)]


def test_secure_mode_takes_no_seed():
    """Guard: a seed in secure mode is refused, and torch.manual_seed does not reach the sampler."""
    with pytest.raises(ValueError, match="prohibited"):
        training(secure_mode=True, noise_generator=torch.Generator())
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(list(PoissonSampler(num_samples=200, sample_rate=0.5, secure_mode=True)))
    assert draws[0] != draws[1]


@pytest.mark.parametrize("own", [False, True])
def test_the_same_batches_again_are_said(own, recwarn):
    """Guard: ``drawn_once``; a generator seeded anew for each epoch draws one sample, charged as fresh ones."""
    generator = torch.Generator() if own else None
    torch.manual_seed(0)
    inner = DataLoader(data(), batch_size=8, generator=generator)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = make_private(
        model, optimizer, inner, noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(7)
    )

    def epoch(seed):
        (generator or torch).manual_seed(seed)
        return [x.sum().item() for x, y in loader if step(model, optimizer, x, y) is None]

    first = epoch(0)
    epoch(1)
    assert not [w for w in recwarn if "same batches" in str(w.message)]
    with pytest.warns(UserWarning, match="the same batches are drawn again"):
        assert epoch(0) == first


def test_the_same_batch_again_within_a_pass_is_said(recwarn):
    """Guard: ``Words.again``; something in the loop seeds torch, and noise of its own does not notice."""
    def epoch(seed):
        model, optimizer, loader = training(noise_generator=torch.Generator().manual_seed(7))
        drawn = []
        for done, (x, y) in enumerate(loader):
            drawn.append(x.sum().item())
            torch.manual_seed(seed(done))
            step(model, optimizer, x, y)
        return drawn

    epoch(lambda done: 11 + done)
    assert not [w for w in recwarn if "same batches" in str(w.message)]
    with pytest.warns(UserWarning, match="at an earlier batch or pass"):
        drawn = epoch(lambda done: 10)
    assert drawn[1] == drawn[2] == drawn[3] == drawn[4]


@pytest.mark.parametrize("own", [False, True])
def test_the_noise_does_not_tell_who_was_drawn(own):
    """Guard: sampling and noise share ``Used``; from one seed, noise and sampling would be the same numbers."""
    torch.manual_seed(3)
    inner = DataLoader(data(), batch_size=8, generator=torch.Generator().manual_seed(3) if own else None)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(3)
    model, optimizer, loader = make_private(
        model, optimizer, inner, noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(3)
    )
    x, y = next(iter(loader))
    with pytest.raises(RuntimeError, match="another generator was given the same seed"):
        step(model, optimizer, x, y)
    assert all(p.grad is None for p in model.parameters())


def test_two_optimizers_of_an_engine_never_draw_the_same_noise():
    """Guard: all noise of an engine shares ``Used``; the same noise under two sums cancels out."""
    engine, made = PrivacyEngine(), []
    inner = DataLoader(data(), batch_size=8)
    for seed in (1, 2, 1):
        model = mlp()
        made.append(engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=inner,
            noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=torch.Generator().manual_seed(seed),
        ))  # fmt: skip
    for model, optimizer, loader in made[:2]:
        step(model, optimizer, *next(iter(loader)))
    with pytest.raises(RuntimeError, match="the same noise would be added again"):
        step(*made[2][:2], *next(iter(made[2][2])))
