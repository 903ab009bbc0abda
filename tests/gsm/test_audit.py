"""Audits of right and of deliberately broken trainings.

What the tests protect: removing the tail term, alpha or the confidence from ``p_value`` fails the tests of the bound;
a score that ignores the releases fails the tests of planted bugs.
"""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from gsm import make_private
from gsm.audit import CanaryAudit
from gsm.audit_report import AuditReport, epsilon_lower_bound, p_value
from gsm.clipping import FlatClipping

FEATURES, CLASSES, SIGMA = 100, 20, 2.5


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def canaries(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = 20 * torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def separate_canaries(features):
    """One canary per input, so that no two gradients have an entry in common."""
    return TensorDataset(30 * torch.eye(features), torch.arange(features) % 2)


def audited(
    plant=None,
    *,
    count=1500,
    hidden=24,
    features=None,
    guesses=0.1,
    steps=1,
    rate=1.0,
    mode="ghost",
    delta=1e-4,
    seed=3,
    sigma=SIGMA,
):
    """An audited training of ``steps`` releases; ``plant(model, optimizer, loader)`` breaks something first."""
    records = separate_canaries(features) if features else canaries(count)
    audit = CanaryAudit(records, loss=losses, guesses=guesses, seed=seed)
    data = audit.dataset(Subset(records, range(0)) if features else canaries(64, seed=2))
    model = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
    model = nn.Linear(features, 2, bias=False) if features else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=int(rate * len(data)))
    model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=sigma, mode=mode)
    if plant is not None:
        plant(model, optimizer, loader)
    audit.watch(model, optimizer)
    while steps > 0:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps -= 1
            if not steps:
                break
    return audit.report(delta=delta)


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "hooks", "seed": 4}, {"steps": 4, "rate": 0.5, "count": 600, "sigma": 0.7}, {"features": 3000}],
)
def test_a_right_training_is_not_contradicted(options):
    report = audited(**options)
    assert report.ok and "no contradiction" in str(report)
    assert report.epsilon > 0.1, "the attack is too weak to find anything"


def no_noise(model, optimizer, loader):
    optimizer.noise.add_ = lambda tensors, std, sensitivity: None


def noise_for_another_bound(model, optimizer, loader):
    real = optimizer.noise.add_
    optimizer.noise.add_ = lambda tensors, std, sensitivity: real(tensors, std / 8, sensitivity)


def one_layer_unclipped(model, optimizer, loader):
    class Forgetful(FlatClipping):
        def weights(self, squared_norms):
            weights = super().weights(squared_norms).expand(squared_norms.shape).clone()
            weights[0] = 1.0
            return weights

    optimizer.clipping = Forgetful(1.0)


def every_record_twice(model, optimizer, loader):
    sampler = loader.batch_sampler
    real = type(sampler).__iter__

    class Twice(type(sampler)):
        def __iter__(self):
            return (batch + batch for batch in real(self))

    sampler.__class__ = Twice


@pytest.mark.parametrize(
    ("plant", "options"),
    [
        (no_noise, {}),
        (noise_for_another_bound, {}),
        (one_layer_unclipped, {}),
        (every_record_twice, {"features": 4000, "guesses": 0.05}),
    ],
)
def test_planted_bugs_are_caught(plant, options):
    report = audited(plant, **options)
    assert not report.ok, str(report)
    assert "CONTRADICTION" in str(report) and report.epsilon > report.claimed


def test_the_training_is_not_touched():
    def train(watch):
        torch.manual_seed(7)
        audit = CanaryAudit(canaries(20), loss=losses, seed=0)
        model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(audit.dataset(canaries(40, seed=2)), batch_size=10)
        model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.0, mode="ghost")
        if watch:
            audit.watch(model, optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0)


def test_the_coins_are_fair_secret_and_obeyed():
    audit = CanaryAudit(canaries(2000), loss=losses)
    other = CanaryAudit(canaries(2000), loss=losses)
    assert abs(audit.included.mean() - 0.5) < 0.06  # 5 standard deviations
    assert not np.array_equal(audit.included, other.included)
    data = audit.dataset(canaries(5, seed=9))
    assert len(data) == 5 + audit.included.sum()
    first = int(np.flatnonzero(audit.included)[0])
    torch.testing.assert_close(data[5][0], audit.canaries[first][0])


# -- the bound itself --------------------------------------------------------------------------------------------------


def test_without_delta_the_p_value_is_a_binomial_tail():
    """Theorem 5.2 for delta = 0: randomised response of accuracy e^eps / (1 + e^eps) is the worst case."""
    success = np.exp(1.0) / (1 + np.exp(1.0))
    assert p_value(100, 40, 35, 1.0, 0.0) == pytest.approx(stats.binom.sf(34, 40, success))


def test_delta_costs_what_the_theorem_says():
    """alpha by the definition, one i at a time."""
    m, r, v, epsilon, delta = 60, 30, 25, 0.7, 1e-3
    w = stats.binom(r, np.exp(epsilon) / (1 + np.exp(epsilon)))
    alpha = max((w.cdf(v - 1) - w.cdf(v - i - 1)) / i for i in range(1, m + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(w.sf(v - 1) + 2 * m * delta * alpha)


@pytest.mark.parametrize(("guesses", "correct"), [(100, 100), (100, 80), (1000, 600)])
def test_the_lower_bound_is_where_the_p_value_crosses(guesses, correct):
    bound = epsilon_lower_bound(1000, guesses, correct, 1e-6)
    assert p_value(1000, guesses, correct, bound, 1e-6) < 0.05 <= p_value(1000, guesses, correct, bound + 1e-2, 1e-6)


def test_chance_proves_nothing_and_certainty_proves_ln_of_a_third():
    assert epsilon_lower_bound(1000, 100, 50, 1e-5) == 0.0
    assert epsilon_lower_bound(1000, 1000, 1000, 0.0) == pytest.approx(np.log(1000 / 3), abs=0.02)


def test_randomised_response_is_contradicted_no_more_often_than_promised():
    """An (eps, 0)-private mechanism that is as bad as allowed: the bound exceeds eps in at most 5 % of the runs."""
    rng, epsilon, runs = np.random.default_rng(0), 1.0, 2000
    right = rng.binomial(200, np.exp(epsilon) / (1 + np.exp(epsilon)), runs)
    bounds = {int(v): epsilon_lower_bound(200, 200, int(v), 0.0) for v in set(right)}
    exceeded = sum(bounds[int(v)] > epsilon for v in right) / runs
    assert 0.01 < exceeded <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_a_plot_of_the_result(tmp_path):
    included = np.arange(40) % 2 == 0
    report = AuditReport(40, 10, 9, 1e-5, 0.95, 1.0, 3, included + np.linspace(0, 1, 40), included)
    figure = report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 5000
    bars = figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == [report.epsilon, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CanaryAudit(3, loss=losses), TypeError, "map-style dataset"),
        (lambda: CanaryAudit({1, 2}, loss=losses), TypeError, "map-style dataset"),
        (lambda: CanaryAudit(type("NoLength", (), {"__getitem__": id})(), loss=losses), TypeError, "map-style dataset"),
        (lambda: CanaryAudit(canaries(5), loss=losses), ValueError, "at least 10"),
        (lambda: CanaryAudit(canaries(20), loss=None), TypeError, "loss must be a function"),
        (lambda: CanaryAudit(canaries(20), loss=losses, guesses=0), ValueError, "share of the canaries"),
        (lambda: CanaryAudit(canaries(20), loss=losses).report(delta=1e-5), ValueError, "nothing was released"),
        (lambda: CanaryAudit(canaries(20), loss=losses).watch(nn.Linear(2, 2), None), TypeError, "private optimizer"),
        (lambda: p_value(10, 20, 5, 1.0, 0.0), ValueError, "correct <= guesses <= canaries"),
        (lambda: p_value(10, 5, 5, -1.0, 0.0), ValueError, "epsilon must be 0 or more"),
        (lambda: p_value(10, 5, 5, 1.0, 1.0), ValueError, "epsilon must be 0 or more and delta in"),
    ],
)
def test_misuse_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def watching(loss=losses):
    """An audit that watches an optimizer, and a function that makes a release."""
    audit = CanaryAudit(separate_canaries(20), loss=loss, seed=0)
    model = nn.Linear(20, 2)
    loader = DataLoader(audit.dataset(separate_canaries(20)), batch_size=10)
    model, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0
    )
    audit.watch(model, optimizer)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    return audit, optimizer, optimizer.step


def test_watching_and_asking_are_checked():
    audit, optimizer, step = watching()
    with pytest.raises(ValueError, match="watches an optimizer already"):
        audit.watch(nn.Linear(2, 2), optimizer)
    with pytest.raises(ValueError, match="none of this model's parameters"):
        CanaryAudit(canaries(20), loss=losses).watch(nn.Linear(2, 2), optimizer)
    step()
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        audit.report(delta=1e-5, confidence=1.0)
    optimizer.of_engine, optimizer.accountant = False, None  # as one that was made by hand
    with pytest.raises(ValueError, match="no accountant: pass the claim"):
        audit.report(delta=1e-5)
    assert audit.report(delta=1e-5, epsilon=100.0).ok


def test_a_loss_that_is_reduced_over_the_canaries_is_refused():
    _, _, step = watching(lambda model, batch: losses(model, batch).mean())
    with pytest.raises(ValueError, match=r"one entry per canary, \[20\], got \(\)"):
        step()


def test_an_audit_leaves_the_trainings_random_numbers_alone():
    """A loss with random numbers of its own (dropout in the model, say)."""
    _, _, step = watching(lambda model, batch: losses(model, (batch[0] + torch.rand(()), batch[1])))
    _, optimizer, plain = watching()
    optimizer.step_hooks.clear()
    before = torch.random.get_rng_state()  # behind the numbers that drew the batches: they cannot be noise
    plain()
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    step()
    assert torch.equal(torch.random.get_rng_state(), after)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    included = np.arange(10) % 2 == 0
    with pytest.raises(ImportError, match="pip install matplotlib"):
        AuditReport(10, 10, 9, 1e-5, 0.95, 1.0, 3, included + 0.0, included).plot()


def test_a_canary_whose_gradient_is_not_finite_scores_nothing_and_spoils_nothing():
    audit, _, step = watching(lambda model, batch: losses(model, batch) * torch.where(batch[1] == 1, math.inf, 1.0))
    step()
    assert audit.scores.isfinite().all() and audit.scores.abs().max() > 0
