"""The private_transformers interface: its README and FAQ, and its updates against the one-sample loop."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accountants
from gsm import private_transformers
from gsm.ledger import collect
from gsm.private_transformers import PrivacyEngine
from gsm.secure_noise import SecureNoise

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
pytestmark = pytest.mark.filterwarnings("ignore:epsilon is computed for Poisson sampling")

VOCABULARY, TOKENS = 29, 6


def gpt2(**options):
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=8, n_layer=2, n_head=2, **options)
    return transformers.GPT2LMHeadModel(config).eval()


def albert():
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=6,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=10,
        num_labels=3,
        max_position_embeddings=12,
    )
    return transformers.AlbertForSequenceClassification(config).eval()


def ids(batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, TOKENS), generator=generator)


def next_token_losses(model, input_ids):
    """As in the README: a 1-D tensor, one entry per sample."""
    logits = model(input_ids=input_ids, return_dict=True).logits[:, :-1, :].permute(0, 2, 1)
    return F.cross_entropy(logits, input_ids[:, 1:], reduction="none").mean(dim=1)


def class_losses(model, input_ids):
    return F.cross_entropy(model(input_ids).logits, input_ids[:, 0] % 3, reduction="none")


def engine_for(model, **options):
    settings = {"batch_size": 4, "sample_size": 100, "epochs": 1, "max_grad_norm": 0.3, "noise_multiplier": 0.0}
    return PrivacyEngine(model, **{**settings, **options})


def clipped_mean(model, losses, input_ids, bound, divisor):
    """sum_i min(1, C / |g_i|) g_i / batch_size, one sample at a time in float64."""
    model = copy.deepcopy(model).double()
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    for row in input_ids.split(1):
        grads = torch.autograd.grad(losses(model, row).sum(), params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, bound / norm.item())
    return [t / divisor for t in total]


def before_and_after(model, optimizer_step):
    old = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer_step()
    return [a - p.detach() for a, p in zip(old, (p for p in model.parameters() if p.requires_grad), strict=True)]


@pytest.mark.parametrize("mode", ["default", "ghost"])
@pytest.mark.parametrize(
    ("make", "losses"), [(gpt2, next_token_losses), (albert, class_losses)], ids=["tied-gpt2", "albert"]
)
def test_the_update_is_the_clipped_mean_of_the_one_sample_loop(make, losses, mode):
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine_for(model, clipping_mode=mode).attach(optimizer)
    expected = clipped_mean(make_like(model, make), losses, ids(), 0.3, 4)
    moved = before_and_after(model, lambda: optimizer.step(loss=losses(model, ids())))
    assert max(e.norm() for e in expected) > 1e-3
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def make_like(model, make):
    """The same weights in a model that nothing captures."""
    fresh = make().double()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_readme_example():
    model = gpt2()
    optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
    privacy_engine = PrivacyEngine(
        model,
        batch_size=10,
        sample_size=50000,
        epochs=3,
        max_grad_norm=0.1,
        target_epsilon=3,
    )
    privacy_engine.attach(optimizer)
    input_ids = ids(10)
    model.train()
    outputs = model(input_ids=input_ids, return_dict=True)
    labels = input_ids[:, 1:]
    logits = outputs.logits[:, :-1, :].permute(0, 2, 1)
    loss = F.cross_entropy(logits, labels, reduction="none").mean(dim=1)
    old = model.lm_head.weight.detach().clone()
    optimizer.step(loss=loss)
    assert not torch.equal(old, model.lm_head.weight)
    assert privacy_engine.steps == 1
    spent = privacy_engine.get_privacy_spent()
    assert 0 < spent["eps_rdp"] < 3
    assert privacy_engine.get_privacy_spent(steps=15000)["eps_rdp"] == pytest.approx(3, abs=0.02)


class VectorLoss(nn.Module):
    """A model that returns its samples' losses, as the FAQ's `loss = model(batch)` has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return next_token_losses(self.model, batch)


@pytest.mark.parametrize("mode", ["default", "ghost"])
def test_faq_gradient_accumulation(mode):
    gradient_accumulation_steps = 3  # Take an update once this many iterations.
    batches = [ids(4, seed=i) for i in range(6)]
    model = VectorLoss(gpt2().double())
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    privacy_engine = private_transformers.PrivacyEngine(
        model, batch_size=12, sample_size=120, epochs=1, max_grad_norm=0.2, noise_multiplier=0.0, clipping_mode=mode
    )
    privacy_engine.attach(optimizer)
    for i, batch in enumerate(batches, 1):
        loss = model(batch)
        if i % gradient_accumulation_steps == 0:
            optimizer.step(loss=loss)
            optimizer.zero_grad()
        else:
            optimizer.virtual_step(loss=loss)
    assert privacy_engine.accountant.history == [(0.0, 0.1, 2)]
    for start in (0, 3):
        logical = torch.cat(batches[start : start + 3])
        update = clipped_mean(reference, lambda m, b: m(b), logical, 0.2, 12)
        with torch.no_grad():
            for p, u in zip(reference.parameters(), update, strict=True):
                p -= 0.5 * u
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def test_faq_freezing_the_input_embeddings():
    model = gpt2(tie_word_embeddings=False)
    # Input embeddings aren't optimized; this line needs to precede privacy engine creation.
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine_for(model, noise_multiplier=1.0, clipping_mode="ghost").attach(optimizer)
    frozen, head = model.transformer.wte.weight.clone(), model.lm_head.weight.detach().clone()
    optimizer.step(loss=next_token_losses(model, ids()))
    assert torch.equal(model.transformer.wte.weight, frozen)
    assert model.transformer.wte.weight.grad is None
    assert not torch.equal(model.lm_head.weight, head)


def test_noise_has_the_standard_deviation_that_epsilon_was_computed_for():
    model = nn.Linear(200, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(
        model, noise_multiplier=2.0, max_grad_norm=0.5, batch_size=4, noise_generator=torch.Generator().manual_seed(1)
    )
    engine.attach(optimizer)
    moved = before_and_after(model, lambda: optimizer.step(loss=0 * model(torch.ones(3, 200)).sum(1)))
    std = torch.cat([m.flatten() for m in moved]).std().item()
    assert std == pytest.approx(2.0 * 0.5 / 4, rel=0.02)
    stats = engine.get_training_stats()
    assert stats["signal"] == 0 and stats["snr"] == 0
    assert stats["noise"] == pytest.approx(stats["noise_limit"], rel=0.02)


def test_training_stats_are_those_of_the_batch():
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(model, max_grad_norm=1.0, noise_multiplier=0.0)
    engine.attach(optimizer)
    assert optimizer.get_training_stats()["med_clip"] is None
    rows = torch.tensor([[0.5, 0, 0], [4.0, 0, 0], [2.0, 0, 0]])  # gradient norms sqrt(2) * 0.5, 4, 2
    optimizer.step(loss=model(rows).sum(1))
    stats = optimizer.get_training_stats()
    root = math.sqrt(2)
    assert stats["max_clip"] == pytest.approx(1.0)
    assert stats["min_clip"] == pytest.approx(1 / (4 * root), rel=1e-5)
    assert stats["med_clip"] == pytest.approx(1 / (2 * root), rel=1e-5)


@pytest.mark.parametrize("mode", ["rdp", "glw", "pld", "all"])
def test_accounting_modes_meet_the_target(mode):
    engine = engine_for(
        nn.Linear(2, 2), batch_size=50, sample_size=1000, epochs=2, noise_multiplier=None, target_epsilon=2.0,
        accounting_mode=mode,
    )  # fmt: skip
    assert engine.target_delta == 1 / 2000
    spent = engine.get_privacy_spent(steps=40)
    assert set(spent) == {
        "rdp": {"eps_rdp", "alpha_rdp"},
        "all": {"eps_rdp", "alpha_rdp", "eps_low", "eps_estimate", "eps_upper"},
    }.get(mode, {"eps_low", "eps_estimate", "eps_upper"})
    assert spent.get("eps_rdp", spent.get("eps_upper")) <= 2.0 + 1e-9
    assert spent.get("eps_low", 0) <= spent.get("eps_upper", math.inf)
    accountant = accountants.create_accountant("pld")
    accountant.history = [(engine.noise_multiplier, 0.05, 40)]
    assert accountant.get_epsilon(delta=1 / 2000) <= 2.0


def test_the_assumption_about_batches_is_said():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="cannot see how your batches are drawn"):
        engine_for(model).attach(torch.optim.SGD(model.parameters(), lr=1.0))


def test_glw_is_another_name_for_prv():
    assert private_transformers.ACCOUNTING_MODES["glw"] == private_transformers.ACCOUNTING_MODES["prv"] == ("prv",)


def test_no_steps_cost_nothing():
    engine = engine_for(nn.Linear(2, 2), noise_multiplier=1.0)
    assert engine.get_privacy_spent()["eps_rdp"] == 0


def test_detach_leaves_everything_as_it_was():
    model = gpt2().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(model)
    engine.attach(optimizer)
    optimizer.virtual_step(loss=next_token_losses(model, ids()))
    engine.detach()
    assert not hasattr(optimizer, "virtual_step") and not hasattr(optimizer, "privacy_engine")
    assert "step" not in optimizer.__dict__ and "forward" not in model.__dict__
    reference = copy.deepcopy(model)
    moved = before_and_after(model, lambda: (next_token_losses(model, ids()).mean().backward(), optimizer.step()))
    grads = torch.autograd.grad(next_token_losses(reference, ids()).mean(), list(reference.parameters()))
    for got, want in zip(moved, grads, strict=True):
        torch.testing.assert_close(got, want)
    engine.attach(optimizer)  # and it can be attached again
    optimizer.step(loss=next_token_losses(model, ids()))


def test_schedulers_and_hooks_see_one_step_per_update():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine_for(model).attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for _ in range(2):
        optimizer.virtual_step(loss=model(torch.ones(2, 3)).sum(1))
        optimizer.step(loss=model(torch.ones(2, 3)).sum(1))
        optimizer.zero_grad()
        scheduler.step()
    assert calls == [1, 1]
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_what_is_refused():
    model = nn.Linear(3, 2)
    for options, words in (
        ({"noise_multiplier": None}, "target_epsilon and epochs"),
        ({"clipping_mode": "spooky"}, "unknown clipping_mode 'spooky'"),
        ({"accounting_mode": "guess"}, "unknown accounting_mode 'guess'"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"batch_size": 200}, "batch_size must be in"),
        ({"named_params": [("w", nn.Parameter(torch.ones(1)))]}, "not trainable parameters of the model"),
    ):
        with pytest.raises(ValueError, match=words):
            engine_for(model, **options)
    engine = engine_for(model)
    with pytest.raises(ValueError, match="does not hold"):
        engine.attach(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.attach(optimizer)
    with pytest.raises(ValueError, match="attached"):
        engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="has an engine already"):
        engine_for(model).attach(optimizer)
    with pytest.raises(ValueError, match="one entry per sample"):
        optimizer.step(loss=model(torch.ones(4, 3)).sum())


def test_what_is_asked_later_is_checked_too():
    model = nn.Linear(3, 2)
    engine = engine_for(model)
    with pytest.raises(ValueError, match="unknown accounting_mode 'guess'.*rdp"):
        engine.get_privacy_spent(accounting_mode="guess")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        engine.attach(optimizer)


def attached(**options):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(model, **options)
    engine.attach(optimizer)
    return model, optimizer, engine


@pytest.mark.parametrize("after", [True, False], ids=["loaded after attach", "loaded before"])
def test_a_resumed_run_does_not_repeat_its_noise(after):
    layer, saved, noises = nn.Linear(3, 2), None, []
    for _ in range(2):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
        engine = engine_for(layer, noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(0))
        if after:
            engine.attach(optimizer)
        if saved is not None:
            optimizer.load_state_dict(saved)
        if not after:
            engine.attach(optimizer)
        optimizer.step(loss=layer(torch.zeros(4, 3)).sum(1) * 0)
        noises.append(layer.weight.grad.clone())
        saved = optimizer.state_dict()
        optimizer.zero_grad()
        engine.detach()
        assert not optimizer._optimizer_load_state_dict_post_hooks
    assert not torch.equal(*noises)


def test_secure_mode_and_resumed_runs_reach_the_noise():
    _, _, engine = attached(secure_mode=True, noise_multiplier=1.0)
    assert isinstance(engine._private.noise.noise, SecureNoise)
    draws = []
    for refreshed in (False, False, True):
        _, _, engine = attached(noise_generator=torch.Generator().manual_seed(1), noise_multiplier=1.0)
        if refreshed:
            engine._private.noise.refresh()
        draws.append(torch.zeros(4))
        engine._private.noise.add_([draws[-1]], 1.0, 1.0)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("measured", [False, True])
def test_noise_is_added_whether_it_is_measured_or_not(measured):
    model, optimizer, _ = attached(noise_multiplier=100.0, max_grad_norm=1.0, record_snr=measured)
    optimizer.step(loss=model(torch.zeros(4, 3)).sum(1))
    assert model.weight.grad.abs().min() > 1e-3


def test_zero_grad_forgets_captures():
    model, optimizer, engine = attached()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.zero_grad()
    model(torch.randn(2, 3)).sum().backward()
    assert [batch.batch_size for batch in collect(engine._private.params)] == [2]


def test_a_batch_far_above_the_size_promised_is_said():
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine_for(model).attach(optimizer)
    with pytest.warns(UserWarning, match="1 release.s. held 30 records, where expected_batch_size=4 was promised"):
        optimizer.step(loss=next_token_losses(model, ids(30)))


def test_what_an_epoch_leaves_over_is_said_and_can_be_forgotten():
    """Two parts a step, three in an epoch: the third and the next epoch's first may hold the same record."""
    for forget in (True, False):
        model = gpt2()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine_for(model).attach(optimizer)

        def epoch(model=model, optimizer=optimizer):
            for i in range(3):
                losses = next_token_losses(model, ids(2, seed=i))
                if i % 2:
                    optimizer.step(loss=losses)
                    optimizer.zero_grad()
                else:
                    optimizer.virtual_step(loss=losses)

        epoch()
        if forget:
            optimizer.discard_pending()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                epoch()
        else:
            with pytest.warns(UserWarning, match="3 parts of 6 records .* 4 records are expected.*discard_pending"):
                epoch()


def test_detaching_in_the_middle_of_a_logical_batch_leaves_no_sum_behind():
    model, optimizer, engine = attached()
    optimizer.virtual_step(loss=model(torch.randn(4, 3)).sum(1))
    engine.detach()
    assert all(p.summed_grad is None for p in model.parameters())


def test_what_is_certified_bounds_what_is_said():
    _, _, engine = attached(accounting_mode="prv", noise_multiplier=1.0)
    spent = engine.get_privacy_spent(steps=500)
    assert spent["eps_low"] < spent["eps_estimate"] < spent["eps_upper"]
