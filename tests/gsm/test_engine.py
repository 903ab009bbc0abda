"""PrivacyEngine: Opacus's interface, the account, and clear errors for arguments that do not fit."""

import inspect
import warnings

import opacus
import opacus.accountants
import pytest
import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import accountants
from gsm.criterion import GhostCriterion
from gsm.engine import PrivacyEngine
from gsm.loader import DPDataLoader, SecureShuffle
from gsm.physical_batches import PhysicalBatchLoader
from gsm.sampling import PoissonSampler
from gsm.secure_noise import SecureNoise
from tests.gsm.training import RECORDS, dataset, flat, parts, train

MODES = ("hooks", "ghost", "auto", "functorch", "loop")


def private(engine=None, made=None, **options):
    model, optimizer, loader = made or parts()
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    engine = engine or PrivacyEngine()
    return engine, *engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **options)


def without_warnings(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@pytest.mark.parametrize("method", [n for n in dir(opacus.PrivacyEngine) if not n.startswith("_")])
def test_every_method_and_keyword_of_opacus(method):
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, method)).parameters
    ours = inspect.signature(getattr(PrivacyEngine, method)).parameters
    forwards = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for name, parameter in theirs.items():
        assert name in ours or forwards, f"{method} lacks {name}"
        if name in ours and parameter.default is not parameter.empty and name != "criterion":
            assert ours[name].default == parameter.default


def test_parts_returned():
    engine, model, optimizer, loader = private()
    assert isinstance(model, AbstractGradSampleModule) and isinstance(optimizer, opacus.optimizers.DPOptimizer)
    assert isinstance(loader, DPDataLoader) and isinstance(loader.batch_sampler, PoissonSampler)
    assert optimizer.accountant is engine.accountant
    assert (optimizer.sample_rate, optimizer.expected_batch_size, len(loader)) == (1 / 6, 20, 6)


@pytest.mark.parametrize("mode", [*MODES, "ew"])
@pytest.mark.parametrize("pieces", [None, 7])
def test_every_mode_trains_and_charges_once_per_logical_batch(mode, pieces):
    engine, model, optimizer, loader = private(grad_sample_mode=mode, max_physical_batch_size=pieces)
    before = flat(model)
    bodies = train(model, optimizer, loader)
    assert engine.accountant.history == [(1.0, 1 / 6, 6)]
    assert not torch.equal(flat(model), before)
    assert bodies == 6 if pieces is None else bodies > 6
    assert 0 < engine.get_epsilon(1e-5) < 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [None, 7])
def test_without_noise_the_update_is_the_clipped_sum_over_the_batch(mode, pieces):
    """One step against a hand-written loop over the records of the same Poisson batch."""
    _, model, optimizer, loader = private(
        grad_sample_mode=mode, max_physical_batch_size=pieces, noise_multiplier=0.0, max_grad_norm=0.3
    )
    seen = []
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seen += zip(x, y, strict=True)
        if not optimizer._is_last_step_skipped:
            break
    plain = parts()[0]  # the same initial weights
    total = torch.zeros_like(flat(plain))
    for x, y in seen:
        loss = nn.functional.cross_entropy(plain(x[None]), y[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
        total += gradient * min(1.0, 0.3 / gradient.norm().item())
    assert len(seen) > 10
    assert torch.allclose(flat(model), flat(plain) - 0.1 * total / 20, atol=1e-6)


def test_no_op_leaves_the_gradients_to_the_user():
    engine, model, optimizer, loader = private(grad_sample_mode="no_op")
    for x, _ in loader:
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad_sample = torch.ones(len(x), *p.shape)
        optimizer.step()
    assert engine.accountant.history == [(1.0, 1 / 6, 6)]


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_every_clipping(clipping, mode):
    engine, model, optimizer, loader = private(grad_sample_mode=mode, clipping=clipping)
    train(model, optimizer, loader)
    assert engine.accountant.history == [(1.0, 1 / 6, 6)] and torch.isfinite(flat(model)).all()


def test_clipping_options_and_a_list_of_bounds():
    options = {"target_unclipped_quantile": 0.7, "unclipped_num_std": 5.0}
    optimizer = private(clipping="adaptive", **options)[2]
    assert optimizer.clipping.target_unclipped_quantile == 0.7 and optimizer.clipping.unclipped_num_std == 5.0
    bounds = [0.1, 0.2, 0.3, 0.4]
    optimizer = private(clipping="per_layer", max_grad_norm=bounds)[2]
    assert optimizer.max_grad_norm == pytest.approx(sum(b * b for b in bounds) ** 0.5)


def test_ghost_with_and_without_a_criterion():
    assert len(private(grad_sample_mode="ghost")) == 4
    engine, model, optimizer, criterion, loader = private(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    assert isinstance(criterion, GhostCriterion)
    train(model, optimizer, loader, criterion=criterion)
    assert engine.accountant.history == [(1.0, 1 / 6, 6)]
    assert len(private(grad_sample_mode="hooks", criterion=nn.CrossEntropyLoss())) == 4


def test_hooks_without_wrapping_train_the_model_itself():
    model, optimizer, loader = parts()
    engine, hooks, private_optimizer, private_loader = private(made=(model, optimizer, loader), wrap_model=False)
    train(model, private_optimizer, private_loader)
    assert engine.accountant.history == [(1.0, 1 / 6, 6)]
    hooks.cleanup()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    model(torch.randn(2, 6)).sum().backward()


def test_fixed_batches_are_kept_and_the_assumption_is_said():
    model, optimizer, loader = parts(shuffle=True)
    with pytest.warns(UserWarning, match="poisson_sampling=False.*Poisson sampling.*approximation"):
        engine, model, optimizer, same = private(made=(model, optimizer, loader), poisson_sampling=False)
    assert same is loader
    train(model, optimizer, same)
    assert engine.accountant.history == [(1.0, 1 / 6, 6)]


def test_naming_the_sampling_to_the_accountant_certifies_fixed_batches():
    named = accountants.RDPAccountant(sampling="shuffled", relation="zero_out")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="poisson_sampling=False")
        engine, model, optimizer, loader = private(PrivacyEngine(accountant=named), poisson_sampling=False)
    train(model, optimizer, loader)
    assumed = accountants.RDPAccountant()
    assumed.history = engine.accountant.history
    assert engine.get_epsilon(1e-5) > assumed.get_epsilon(1e-5)
    with pytest.raises(ValueError, match="assumes 'shuffled' batches and poisson_sampling=True"):
        private(PrivacyEngine(accountant=accountants.RDPAccountant(sampling="shuffled", relation="zero_out")))


def test_weighted_sampling_is_kept_only_on_request():
    def weighted():
        model, optimizer, _ = parts()
        sampler = WeightedRandomSampler([1.0] * RECORDS, RECORDS)
        return model, optimizer, DataLoader(dataset(), batch_size=20, sampler=sampler)

    with pytest.raises(ValueError, match="WeightedRandomSampler, which Poisson sampling would replace"):
        private(made=weighted())
    made = weighted()
    loader = without_warnings(lambda: private(made=made, poisson_sampling=False))[3]
    assert loader is made[2]


def test_secure_mode():
    engine, model, optimizer, loader = private(PrivacyEngine(secure_mode=True))
    assert optimizer.secure_mode and loader.batch_sampler.secure_mode
    assert isinstance(optimizer.noise, SecureNoise)
    train(model, optimizer, loader)
    with pytest.raises(ValueError, match="Passing seed is prohibited in secure mode"):
        private(PrivacyEngine(secure_mode=True), noise_generator=torch.Generator())


def test_seeds_reproduce_a_run():
    def run(seed):
        torch.manual_seed(1)
        made = parts(generator=torch.Generator().manual_seed(seed))
        _, model, optimizer, loader = private(made=made, noise_generator=torch.Generator().manual_seed(seed + 10))
        train(model, optimizer, loader)
        return flat(model)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("length", [{"epochs": 3}, {"total_steps": 18}])
@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp", "pld"])
def test_target_epsilon_is_met_and_not_exceeded(accountant, length):
    engine = PrivacyEngine(accountant=accountant)
    model, optimizer, loader = parts()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=3.0,
        target_delta=1e-5,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
        **length,
    )
    train(model, optimizer, loader, steps=18)
    assert 2.97 <= engine.get_epsilon(1e-5) <= 3.0


ASSUMED = [{"relation": "replace_one"}, {"sampling": "unsampled"}, {"sampling": "shuffled", "relation": "zero_out"}]


@pytest.mark.parametrize("assumed", ASSUMED)
@pytest.mark.parametrize("accountant", [accountants.PLDAccountant, accountants.RDPAccountant])
def test_target_epsilon_is_met_under_what_the_accountant_assumes(accountant, assumed):
    engine = PrivacyEngine(accountant=accountant(**assumed))
    model, optimizer, loader = parts()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, target_epsilon=3.0, target_delta=1e-5, epochs=3,
        max_grad_norm=1.0, poisson_sampling=assumed.get("sampling") != "shuffled",
    )  # fmt: skip
    train(model, optimizer, loader, steps=18)
    assert 2.97 <= engine.get_epsilon(1e-5) <= 3.0


def test_opacus_accountants_are_calibrated_for_by_name():
    engine = PrivacyEngine(accountant=opacus.accountants.RDPAccountant())
    model, optimizer, loader = parts()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, target_epsilon=3.0, target_delta=1e-5, epochs=3,
        max_grad_norm=1.0,
    )  # fmt: skip
    assert optimizer.noise_multiplier == accountants.get_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=optimizer.sample_rate, epochs=3, accountant="rdp"
    )


@pytest.mark.parametrize("poisson", [False, True])  # 3 / (1 / 75) is 224.99999999999997
def test_every_step_of_the_epochs_is_within_the_budget(poisson):
    model, optimizer, _ = parts()
    data = TensorDataset(*dataset()[:75])
    # A loader of Poisson batches may draw more of them than make up one pass over the data.
    loader = DPDataLoader(data, sample_rate=0.02, steps=75) if poisson else DataLoader(data, batch_size=1)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, target_epsilon=3.0, target_delta=1e-5,
        max_grad_norm=1.0, epochs=3,
    )  # fmt: skip
    for _ in range(3):
        train(model, optimizer, loader)
    assert engine.accountant.num_steps == 225
    assert 2.97 <= engine.get_epsilon(1e-5) <= 3.0


@pytest.mark.parametrize("other", [None, accountants.RDPAccountant()])
def test_the_optimizer_of_an_engine_keeps_its_accountant(other):
    engine, model, optimizer, loader = private(PrivacyEngine(accountant="rdp"))
    with pytest.raises(ValueError, match=r"get_epsilon\(\) would fall behind.*PrivacyEngine\(accountant="):
        optimizer.accountant = other
    optimizer.accountant = engine.accountant  # the same one: nothing changes
    second = accountants.create_accountant("gdp")
    optimizer.attach_step_hook(second.get_optimizer_hook_fn(1 / 6))
    train(model, optimizer, loader)
    assert engine.accountant.history == second.history == [(1.0, 1 / 6, 6)]


def test_accountants_by_name_and_by_object():
    mine = accountants.RDPAccountant()
    assert PrivacyEngine(accountant=mine).accountant is mine
    theirs = opacus.accountants.RDPAccountant()
    engine, model, optimizer, loader = private(PrivacyEngine(accountant=theirs))
    train(model, optimizer, loader)
    assert theirs.history == [(1.0, 1 / 6, 6)]
    for name in ("rdp", "gdp", "prv", "pld"):
        assert isinstance(PrivacyEngine(accountant=name).accountant, opacus.accountants.IAccountant)


def test_an_accountant_registered_with_opacus():
    class Own(opacus.accountants.RDPAccountant):
        @classmethod
        def mechanism(cls):
            return "own-rdp"

    opacus.accountants.register_accountant("own-rdp", Own)
    assert type(PrivacyEngine(accountant="own-rdp").accountant) is Own


def test_a_second_dataset_on_the_same_account_is_said():
    engine = private()[0]
    with pytest.warns(UserWarning, match="new dataset object"):
        private(engine)
    with pytest.warns(UserWarning, match="steps are already on this engine's account"):
        engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
        model, optimizer, loader = parts()
        engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=3.0,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
        )


def test_private_parts_can_be_made_private_again():
    engine, model, optimizer, loader = private()
    _, again, wrapped, second = private(engine, made=(model, optimizer, loader))
    assert again is model and wrapped.original_optimizer is optimizer.original_optimizer
    assert second.sample_rate == loader.sample_rate and len(second) == len(loader)


def test_a_second_accountant_does_not_know_what_the_first_was_charged():
    """Both trainings are of the same records: neither epsilon is that of the two."""
    _, model, optimizer, loader = private()
    train(model, optimizer, loader, steps=3)
    with pytest.warns(UserWarning, match="another account with 3 steps"):
        private(made=(model, optimizer, loader))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This model was trained")
        resumed = PrivacyEngine()
        resumed.accountant.load_state_dict(optimizer.accountant.state_dict())
        private(resumed, made=(model, optimizer, loader))
        engine = PrivacyEngine(accountant=optimizer.accountant)
        _, model, optimizer, loader = private(engine, made=(model, optimizer, loader))
        train(model, optimizer, loader, steps=2)
        assert sum(steps for *_, steps in engine.accountant.history) == 5


def test_frozen_parameters_stay_as_they_are():
    model, _, loader = parts()
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    _, model, optimizer, loader = private(made=(model, optimizer, loader), grad_sample_mode="ghost")
    train(model, optimizer, loader)
    assert torch.equal(model._module[0].weight, before)


def test_compatible_module_and_is_compatible():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    engine = PrivacyEngine()
    assert not engine.is_compatible(module=model, optimizer=None, data_loader=None)
    with pytest.raises(UnsupportedModuleError, match=r"1 \(BatchNorm1d\)"):
        engine.validate(module=model, optimizer=None, data_loader=None)
    assert engine.is_compatible(module=PrivacyEngine.get_compatible_module(model))


def with_model(model):
    return lambda: (model, torch.optim.SGD(model.parameters(), lr=0.1), parts()[2])


def other_models_optimizer():
    model, _, loader = parts()
    return model, parts()[1], loader


def everything_frozen():
    model, optimizer, loader = parts()
    for p in model.parameters():
        p.requires_grad_(False)
    return model, optimizer, loader


def stream():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dataset())

    model, optimizer, _ = parts()
    return model, optimizer, DataLoader(Stream(), batch_size=5)


def with_loader(loader):
    return lambda: (*parts()[:2], loader)


ERRORS = {
    "foreign optimizer": (other_models_optimizer, {}, ValueError, "Module parameters are different than optimizer"),
    "nothing to train": (everything_frozen, {}, ValueError, "none of the optimizer's 4 parameters requires a gradient"),
    "eval mode": (with_model(nn.Linear(6, 3).eval()), {}, UnsupportedModuleError, "model.train()"),
    "batch norm": (with_model(nn.BatchNorm1d(6)), {}, UnsupportedModuleError, "get_compatible_module"),
    "mode": (parts, {"grad_sample_mode": "hook"}, ValueError, "unknown grad_sample_mode 'hook': choose one of"),
    "clipping": (parts, {"clipping": "flatt"}, ValueError, "flatt"),
    "clipping option": (parts, {"target": 1}, ValueError, r"unknown keyword argument\(s\) target: clipping='flat'"),
    "negative noise": (parts, {"noise_multiplier": -1.0}, ValueError, "noise_multiplier"),
    "zero bound": (parts, {"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
    "list of bounds": (parts, {"max_grad_norm": [1.0, 2.0]}, ValueError, "per_layer"),
    "reduction": (parts, {"loss_reduction": "median"}, ValueError, "loss_reduction"),
    "criterion": (
        parts,
        {"criterion": nn.CrossEntropyLoss(reduction="sum"), "grad_sample_mode": "ghost"},
        ValueError,
        "'sum' and loss_reduction is 'mean'",
    ),
    "made-up records": (parts, {"rand_on_empty": True}, ValueError, "made-up record"),
    "no records": (parts, {"max_physical_batch_size": 0}, ValueError, "at least 1"),
    "stream": (stream, {}, ValueError, "IterableDataset"),
    "stream kept": (stream, {"poisson_sampling": False}, ValueError, "has no length"),
    "list as loader": (with_loader([1]), {}, TypeError, "needs a torch.utils.data.DataLoader"),
    "list kept": (with_loader([1]), {"poisson_sampling": False}, TypeError, "must be a torch.utils.data.DataLoader"),
    "no batches": (
        with_loader(DataLoader(TensorDataset(torch.zeros(3)), batch_size=9, drop_last=True)),
        {},
        ValueError,
        "no batches",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_thing_and_leave_the_model_as_it_was(case):
    make, options, error, message = ERRORS[case]
    made = make()
    attributes = [set(vars(m)) for m in made[0].modules()]
    with pytest.raises(error, match=message):
        private(made=made, **options)
    assert [set(vars(m)) for m in made[0].modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made[0].modules())


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "total_steps": 6}])
def test_length_of_training_must_be_said_once(length):
    model, optimizer, loader = parts()
    with pytest.raises(ValueError, match="exactly one of epochs and total_steps"):
        PrivacyEngine().make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=1.0,
            target_delta=1e-5,
            max_grad_norm=1.0,
            **length,
        )


def test_a_wrapped_model_with_other_settings():
    engine, model, optimizer, loader = private()
    with pytest.raises(ValueError, match="mode is 'hooks' and 'ghost' is requested.*to_standard_module"):
        private(engine, made=(model, optimizer, loader), grad_sample_mode="ghost")


@pytest.mark.parametrize("accountant", ["pvr", 3, accountants.RDPAccountant])
def test_unknown_accountants(accountant):
    with pytest.raises((ValueError, TypeError), match="ccount"):
        PrivacyEngine(accountant=accountant)


def test_secure_rng_is_mentioned_once_per_engine():
    with pytest.warns(UserWarning, match="Secure RNG turned off"):
        PrivacyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrivacyEngine(secure_mode=True)


def test_expected_batch_size_of_tiny_rates_is_not_zero():
    model, optimizer, _ = parts()
    loader = DPDataLoader(dataset(), sample_rate=1 / 240, steps=3)
    _, model, optimizer, loader = private(made=(model, optimizer, loader))
    assert optimizer.expected_batch_size == pytest.approx(0.5)
    train(model, optimizer, loader)
    assert torch.isfinite(flat(model)).all()


def test_pieces_are_returned_as_such():
    loader = private(max_physical_batch_size=5)[3]
    assert isinstance(loader, PhysicalBatchLoader) and loader.sample_rate == 1 / 6


def test_secure_mode_shuffles_fixed_batches_from_the_operating_system():
    accountant = accountants.PRVAccountant(sampling="shuffled", relation="zero_out")
    engine = PrivacyEngine(secure_mode=True, accountant=accountant)
    _, _, _, loader = private(engine, parts(shuffle=True), poisson_sampling=False)
    assert isinstance(loader.batch_sampler.sampler, SecureShuffle)
    assert sorted(i for batch in loader.batch_sampler for i in batch) == list(range(RECORDS))


def test_seeds_of_a_resumed_engine_are_not_used_again():
    """A model that is loaded without its optimizer: nothing but the engine can tell the new optimizer."""
    engine, seeds = PrivacyEngine(), [torch.Generator().manual_seed(6) for _ in range(2)]
    _, _, before, _ = private(engine, noise_generator=seeds[0])
    engine._account.resumed = True
    _, _, after, _ = private(engine, noise_generator=seeds[1])
    noise = [torch.zeros(4), torch.zeros(4)]
    for optimizer, total in zip((before, after), noise, strict=True):
        optimizer.noise.add_([total], 1.0, 1.0)
    assert not torch.equal(*noise)


def test_the_same_dataset_twice_is_nothing_to_speak_of():
    engine, (_, _, loader) = PrivacyEngine(secure_mode=True), parts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            private(engine, (*parts()[:2], loader))
