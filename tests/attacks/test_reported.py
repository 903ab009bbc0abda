"""Situations that users of other libraries reported: epsilon and the training came apart, or nobody could tell why it
stopped. Each docstring names the library and the number in its tracker."""

import copy
import time

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gsm.private_transformers
from accountants import create_accountant
from gsm import DPOptimizer, GradSampleModule, PrivacyEngine, make_private
from gsm.physical_batches import BatchMemoryManager
from gsm.sampling import PoissonSampler
from tests.attacks.tools import CE, CLASSES, FEATURES, RECORDS, data, mlp, step, training, watched

X, Y = torch.randn(6, FEATURES), torch.randint(CLASSES, (6,))
STEPS = torch.randn(6, 7, 4)
MEAN = {"loss": lambda model, x, y: CE(model(x), y)}


def released(model, inputs, *, bound, loss=CE, optimizer=DPOptimizer, mode="hooks"):
    """The clipped sum that moves the parameters, flat, without noise."""
    wrapped, trained = GradSampleModule(model, mode=mode), [p for p in model.parameters() if p.requires_grad]
    private = optimizer(
        torch.optim.SGD(trained, lr=1.0), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=len(inputs[0])
    )
    before = torch.cat([p.detach().flatten() for p in trained])
    loss(wrapped, *inputs).backward()
    private.step()
    return (before - torch.cat([p.detach().flatten() for p in trained])) * len(inputs[0])


def looped(model, inputs, *, bound, loss=CE):
    """The same from one sample at a time, with autograd alone."""
    total, trained = 0, [p for p in model.parameters() if p.requires_grad]
    for i in range(len(inputs[0])):
        row = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss(model, *[v[i : i + 1] for v in inputs]), trained)]
        )
        total = total + row * (bound / row.norm()).clamp(max=1)
    return total


class Positions(nn.Module):
    """Position ids of one row for all samples, as transformers' GPT-2 makes them."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(7, 4), nn.Linear(4, CLASSES)

    def forward(self, ids):
        return self.out((self.words(ids) + self.places(torch.arange(ids.shape[1])[None])).tanh().mean(1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = DPMultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.mix(x, x, x)[0].mean(1))


class Augmented(nn.Module):
    """Several views of each record, put into the batch dimension and averaged inside."""

    def __init__(self):
        super().__init__()
        self.each, self.out = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(self.each(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("optimizer", [DPOptimizer, OpacusDPOptimizer])
@pytest.mark.parametrize(
    "model, x",
    [(Positions, torch.randint(9, (6, 7))), (Attending, STEPS), (Augmented, STEPS)],
    ids=["Opacus 841: broadcast position ids", "Opacus 650: the batch second inside", "Opacus 245: views"],
)
def test_the_batch_dimension_is_found_where_the_layer_does_not_have_it_first(model, x, optimizer):
    """Opacus 841, 650, 505, 245: per-sample gradients of the wrong size, or of positions instead of records."""
    torch.manual_seed(0)
    made, bound = model(), 0.3
    expected = looped(made, (x, Y), bound=bound, **MEAN)
    assert torch.allclose(released(made, (x, Y), bound=bound, optimizer=optimizer, **MEAN), expected, atol=1e-5)


def test_a_frozen_weight_beside_a_trained_bias_through_batches_of_any_size():
    """Opacus 436, 542: the frozen weight's gradients were kept, and met those of the next batch."""
    model = nn.Linear(FEATURES, CLASSES)
    model.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    wrapped = GradSampleModule(model)
    optimizer = OpacusDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=4
    )
    for size in (4, 2, 6, 1):
        before = model.bias.detach().clone()
        expected = looped(plain, (X[:size], Y[:size]), bound=0.1, **MEAN)
        step(wrapped, optimizer, X[:size], Y[:size])
        assert torch.allclose((before - model.bias) * 4, expected, atol=1e-5)
        plain.load_state_dict(model.state_dict())


def test_nodes_of_graphs_are_no_records():
    """Opacus 588, 586: rows are nodes; guard: what fails on some rows alone says what a row must be."""

    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, nodes, edges, graph):
            h = self.each(nodes)
            h = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
            return self.out(torch.zeros(int(graph.max()) + 1, 3).index_add(0, graph, h))

    nodes, graph = torch.randn(9, 4), torch.arange(9) // 3
    edges = torch.tensor([[0, 1, 3, 4, 6, 7], [1, 2, 4, 5, 7, 8]])
    with pytest.raises(ValueError, match="takes the batch of 9.*one row per record"):
        GradSampleModule(Graphs())(nodes, edges, graph)


def test_a_gradient_penalty_is_refused_or_exact():
    """Opacus 31, 652: WGAN-GP differentiates twice, and hooks see the inner derivative."""

    def penalty(model, x):
        x = x.detach().clone().requires_grad_()
        return ((torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].norm(dim=1) - 1) ** 2).mean()

    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
    expected = []
    for i in range(len(X)):
        row = torch.autograd.grad(penalty(model, X[i : i + 1]), list(model.parameters()), allow_unused=True)
        row = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(model.parameters(), row, strict=True)
            ]
        )
        expected.append(row * (0.05 / row.norm()).clamp(max=1))
    with pytest.raises(RuntimeError, match="create_graph=True"):
        released(mlp(), (X,), bound=1.0, loss=penalty)
    got = released(model, (X,), bound=0.05, loss=penalty, mode="functorch")
    assert torch.allclose(got, torch.stack(expected).sum(0), atol=1e-5)


def test_a_discriminator_is_charged_once_a_batch_and_its_generator_needs_a_zero_grad():
    """Opacus 65, 418, 474, 523: the generator's gradients met those of the next batch, or batches counted twice."""
    public = nn.Linear(2, FEATURES)
    model, optimizer, loader = training(nn.Linear(FEATURES, 1), mode="hooks")
    bce = nn.functional.binary_cross_entropy_with_logits
    for x, _ in loader:
        fake, ones = public(torch.randn(len(x), 2)), torch.ones(len(x), 1)
        optimizer.zero_grad()
        (bce(model(x), ones) + bce(model(fake.detach()), 0 * ones)).backward()
        optimizer.step()
        with pytest.raises(ValueError, match="before the generator's backward"):
            bce(model(fake.detach()), ones).backward()
        optimizer.zero_grad()
        bce(model(fake), ones).backward()
    assert optimizer.accountant.history == [(1.0, 0.2, 5)] and public.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_in_the_ghost_criterion(reduction):
    """Opacus 792, 716: ignored positions were counted, so a record's weight followed its neighbours' lengths."""
    ids, size = torch.randint(1, 9, (6, 5)), {"mean": 6, "sum": 1}[reduction]
    labels = ids.masked_fill(torch.arange(5) >= torch.tensor([5, 2, 3, 5, 1, 4])[:, None], -100)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    expected = looped(
        model, (ids, labels), bound=0.2, loss=lambda m, x, y: CE(m(x).flatten(0, 1), y.flatten(), reduction=reduction)
    )
    wrapped, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=0.2,
        data_loader=DataLoader(TensorDataset(ids, labels), batch_size=6), loss_reduction=reduction,
        criterion=nn.CrossEntropyLoss(reduction=reduction), grad_sample_mode="ghost",
    )  # fmt: skip
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    criterion(wrapped(ids).flatten(0, 1), labels.flatten(), shape=(6, 5)).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose((before - after) * size, expected, atol=1e-5)


def test_a_closure_does_not_wash_the_noise_away():
    """Opacus 330, 313: the wrapped optimizer ran the closure again, over the noisy gradients."""
    model, optimizer, watch = watched(sigma=2.0)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = CE(model(X), Y)
        loss.backward()
        calls.append(loss)
        return loss

    optimizer.step(closure)
    assert len(calls) == 1 and watch.stds == [2.0]
    assert torch.allclose(torch.cat([p.grad.flatten() for p in model.parameters()]).double() * 8, watch.sums[0])


def test_an_engine_for_every_round_is_said():
    """Opacus 688 and federated examples: each round's engine counts its own steps only. Guard: ``keep_one_account``."""
    records, model = data(), mlp()

    def round_(model, engine, records):
        return engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0,
            data_loader=DataLoader(records, batch_size=8), noise_multiplier=1.0,
        )  # fmt: skip

    first = PrivacyEngine()
    model, optimizer, loader = round_(model, first, records)
    for x, y in loader:
        step(model, optimizer, x, y)
    with pytest.warns(UserWarning, match="another account with 5 steps.*accountant=first.accountant"):
        round_(model, PrivacyEngine(), records)
    with pytest.warns(UserWarning) as said:  # the same account, or other records: nothing is lost
        round_(model, PrivacyEngine(accountant=first.accountant), records)
        round_(model, PrivacyEngine(), data())
        round_(model, PrivacyEngine(), records.tensors[0].tolist())
    assert not [w for w in said if "another account" in str(w.message)]


def test_an_optimizer_of_ones_own_beside_the_engines_is_said(recwarn):
    """Found beside them: a second optimizer on the engine's model released without a charge. Guard: ``UNCHARGED``."""
    model, optimizer, loader = training()
    own = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
    )
    with pytest.warns(UserWarning, match="has no accountant, and a PrivacyEngine keeps an account"):
        step(model, own, X, Y)
    recwarn.clear()
    own.attach_step_hook(optimizer.accountant.get_optimizer_hook_fn(sample_rate=0.2))
    own.zero_grad()
    own._warned.clear()
    step(model, own, X, Y)
    plain = GradSampleModule(mlp())
    alone = DPOptimizer(
        torch.optim.SGD(plain.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
    )
    step(plain, alone, X, Y)
    assert not [w for w in recwarn if "has no accountant" in str(w.message)]


def test_a_rate_below_that_of_the_loader_is_refused():
    """Opacus 813, 335: what is charged and what is drawn came from different places. Guard: ``LOWER``."""
    model, optimizer, loader = training()
    optimizer.sample_rate = 0.001
    x, y = next(iter(loader))
    with pytest.raises(
        ValueError, match="sample_rate is 0.001, and the loader draws every record with probability 0.2"
    ):
        step(model, optimizer, x, y)
    assert optimizer.accountant.history == []


def test_rate_and_divisor_chosen_without_the_number_of_records():
    """Opacus 571, 819: both follow the number of records unless the user chooses them; see SECURITY.md."""
    seen = []
    for count in (RECORDS, RECORDS - 1):
        loader = DataLoader(data(count), batch_sampler=PoissonSampler(num_samples=count, sample_rate=0.1, steps=10))
        model = mlp()
        _, optimizer, loader = make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0
        )
        optimizer.expected_batch_size = 4
        seen.append((optimizer.sample_rate, optimizer.expected_batch_size, len(loader)))
    assert seen[0] == seen[1] == (0.1, 4, 10)


def test_physical_batches_without_a_private_optimizer():
    """LeakPro 322: a loop for both kinds of training ended in an attribute that SGD does not have."""
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    manager = BatchMemoryManager(
        data_loader=DataLoader(data(), batch_size=8), max_physical_batch_size=2, optimizer=optimizer
    )
    with pytest.raises(TypeError, match="need the private optimizer.*got SGD"), manager:
        pass


def test_a_model_wrapped_twice_says_what_to_do():
    """Opacus 636: a trainer that calls make_private again on the model that it keeps."""
    model = mlp()
    GradSampleModule(model)
    with pytest.raises(ValueError, match=r"wrapped already.*remove_hooks\(\)"):
        GradSampleModule(model)


def test_parameters_replaced_behind_the_optimizer_are_named():
    """Opacus 431, 432, 638: the optimizer holds tensors that the model no longer uses."""
    model, optimizer, _ = watched()
    model._module.load_state_dict({k: v.clone() for k, v in mlp().state_dict().items()}, assign=True)
    CE(model(X), Y).backward()
    with pytest.raises(ValueError, match="parameters were replaced"):
        optimizer.step()


@pytest.mark.parametrize("name", ["rdp", "prv", "pld"])
@pytest.mark.parametrize("sigma", [9e-4, 1e-5, 1e-12, 1e-29])
def test_next_to_no_noise_has_an_epsilon_at_once(name, sigma):
    """Opacus 587, 602, 637 and prv_accountant 42: hours, gigabytes or an overflow. Guard: ``TINY``.

    From one release alone: a record that is in the batch moves the sum by one, so that epsilon is at least
    1 / (2 sigma^2) up to lower orders.
    """
    accountant, start = create_accountant(name), time.perf_counter()
    accountant.history = [(sigma, 0.1, 3)]
    lower, upper = accountant.get_epsilon_bounds(1e-5)
    assert lower <= upper and upper >= 0.5 / sigma / sigma
    assert accountant.get_epsilon(1e-5) == upper and len(accountant.epsilon_curve(1e-5)) == 3
    assert time.perf_counter() - start < 30


def test_delta_is_at_most_the_probability_that_the_record_was_used():
    """Found beside it: delta at a small epsilon and little noise was a logarithm of zero. Guard: ``most_delta``."""
    for sigma in (0.1, 0.02, 1e-12):
        accountant = create_accountant("pld")
        accountant.history = [(sigma, 0.1, 3)]
        assert accountant.get_delta(1.0) == pytest.approx(1 - 0.9**3, rel=1e-4)


@pytest.mark.parametrize("name", ["rdp", "gdp", "prv", "pld"])
def test_no_epsilon_is_negative(name):
    """Opacus 585, 844: at a large delta."""
    accountant = create_accountant(name)
    accountant.history = [(2.0, 0.01, 10)]
    assert all(accountant.get_epsilon(delta) >= 0 for delta in (0.1, 0.5, 0.9, 0.999))


@pytest.mark.parametrize("mode", ["rdp", "prv", "pld"])
def test_what_was_planned_is_what_is_spent(mode):
    """private-transformers 8, 13 and fastDP 46: more than the target, half of it, or nothing was reported."""
    model = mlp()
    engine = gsm.private_transformers.PrivacyEngine(
        model, batch_size=8, sample_size=RECORDS, epochs=2, max_grad_norm=1.0, target_epsilon=3.0,
        target_delta=1e-4, accounting_mode=mode,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    for _ in range(2):
        for x, y in DataLoader(data(), batch_size=8):
            optimizer.zero_grad()
            optimizer.step(loss=CE(model(x), y, reduction="none"))
    spent = engine.get_privacy_spent()
    assert 2.95 < spent["eps_rdp" if mode == "rdp" else "eps_upper"] <= 3.0
