"""`gsm.opacus.install()`: Opacus's names stand for this library's classes, and everything can be put back exactly."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator

import opacus
import opacus.accountants.utils
import opacus.data_loader
import opacus.grad_sample.utils
import opacus.utils.batch_memory_manager
import opacus.utils.fast_gradient_clipping_utils
import opacus.utils.uniform_sampler
import pytest
import torch
from opacus.accountants import registry
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import accountants
import gsm
import gsm.opacus
from gsm.clipping_adaptive import AdaptiveClipping
from gsm.optimizer import DPOptimizer


@pytest.fixture
def install() -> Iterator[None]:
    with gsm.opacus.installed():
        yield


def everything() -> dict[tuple[str, str], object]:
    """Every name in every loaded Opacus module, and the accountants' registry."""
    modules = [(n, m) for n, m in list(sys.modules.items()) if n.partition(".")[0] == "opacus" and m is not None]
    names = {(n, key): value for n, m in modules for key, value in vars(m).items() if not key.startswith("__")}
    return names | {("registry", key): value for key, value in registry._ACCOUNTANTS.items()}


NAMES = {
    "opacus.PrivacyEngine": gsm.PrivacyEngine,
    "opacus.privacy_engine.PrivacyEngine": gsm.PrivacyEngine,
    "opacus.GradSampleModule": gsm.GradSampleModule,
    "opacus.grad_sample.GradSampleModule": gsm.GradSampleModule,
    "opacus.grad_sample.grad_sample_module.GradSampleModule": gsm.GradSampleModule,
    "opacus.optimizers.DPOptimizer": gsm.DPOptimizer,
    "opacus.optimizers.optimizer.DPOptimizer": gsm.DPOptimizer,
    "opacus.optimizers.DPOptimizerFastGradientClipping": gsm.DPOptimizer,
    "opacus.privacy_engine.DPDataLoader": gsm.loader.DPDataLoader,
    "opacus.utils.uniform_sampler.UniformWithReplacementSampler": gsm.sampling.PoissonSampler,
    "opacus.utils.batch_memory_manager.BatchMemoryManager": gsm.physical_batches.BatchMemoryManager,
    "opacus.accountants.RDPAccountant": accountants.RDPAccountant,
    "opacus.accountants.PRVAccountant": accountants.PRVAccountant,
    "opacus.accountants.GaussianAccountant": accountants.GaussianAccountant,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_stands_for_ours(install, name: str):
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is NAMES[name]


def test_no_module_holds_a_replaced_class_any_more():
    theirs = {id(original): original for (_, original), _ in gsm.opacus._pairs()}
    with gsm.opacus.installed():
        left = [place for place, value in everything().items() if id(value) in theirs]
    assert [p for p in left if not p[0].startswith("opacus.accountants.analysis")] == []


def test_everything_is_put_back():
    with gsm.opacus.installed():
        pass  # imports what of opacus was not imported yet
    before = everything()
    gsm.opacus.install()
    gsm.opacus.install()  # once is enough
    during = everything()
    assert sum(during[k] is not before[k] for k in before) > 50
    gsm.opacus.uninstall()
    after = everything()
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    gsm.opacus.uninstall()  # and nothing to undo is fine
    assert all(v is before[k] for k, v in everything().items())


def test_blocks_nest():
    theirs = opacus.PrivacyEngine
    with gsm.opacus.installed():
        with gsm.opacus.installed():
            assert opacus.PrivacyEngine is gsm.PrivacyEngine
        assert opacus.PrivacyEngine is gsm.PrivacyEngine
    assert opacus.PrivacyEngine is theirs
    gsm.opacus.install()
    with pytest.raises(KeyError), gsm.opacus.installed():
        raise KeyError
    assert opacus.PrivacyEngine is gsm.PrivacyEngine
    gsm.opacus.uninstall()
    assert opacus.PrivacyEngine is theirs


def test_modules_imported_meanwhile_are_put_back_too():
    name = "opacus.schedulers.noise_scheduler"
    kept = sys.modules.pop(name)
    try:
        with gsm.opacus.installed():
            sys.modules.pop(name, None)
            fresh = importlib.import_module(name)
            assert fresh.DPOptimizer is gsm.DPOptimizer
        assert fresh.DPOptimizer is opacus.optimizers.DPOptimizer is not gsm.DPOptimizer
    finally:
        sys.modules[name] = kept


def test_an_opacus_without_the_names_changes_nothing(monkeypatch):
    before = everything()
    monkeypatch.setitem(gsm.opacus.REPLACEMENTS, "opacus.data_loader", {"NoSuchLoader": object})
    with pytest.raises(ImportError, match=r"no opacus.data_loader.NoSuchLoader: install\(\) is written for Opacus 1.6"):
        gsm.opacus.install()
    assert all(v is before[k] for k, v in everything().items())


def test_accountants_by_name(install):
    assert type(opacus.accountants.create_accountant("rdp")) is accountants.RDPAccountant
    assert type(opacus.accountants.create_accountant("pld")) is accountants.PLDAccountant


def test_calibration_keeps_the_default_accountant(install):
    budget = {"target_epsilon": 2.0, "target_delta": 1e-5, "sample_rate": 0.01, "steps": 500}
    sigma = opacus.privacy_engine.get_noise_multiplier(**budget)
    accountant = opacus.accountants.create_accountant("rdp")
    accountant.history = [(sigma, 0.01, 500)]
    assert 1.98 < accountant.get_epsilon(delta=1e-5) <= 2.0
    assert opacus.accountants.utils.get_noise_multiplier(**budget, accountant="prv") < sigma


def test_opacus_helper_functions_see_our_classes(install):
    assert opacus.grad_sample.utils.get_gsm_class("hooks") is gsm.GradSampleModule
    assert issubclass(opacus.grad_sample.get_gsm_class("ghost"), gsm.GradSampleModule)
    assert opacus.grad_sample.get_gsm_class("ew").__module__ == "opacus.grad_sample.gsm_exp_weights"
    assert opacus.optimizers.get_optimizer_class("flat", distributed=False) is gsm.DPOptimizer
    several = opacus.optimizers.get_optimizer_class("flat", distributed=True)
    assert several.__module__ == "opacus.optimizers.ddpoptimizer"


def data(size: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(size, 6), torch.randint(0, 3, (size,))), batch_size=8)


def private(mode: str = "hooks", **options):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    engine = opacus.PrivacyEngine(accountant="rdp")
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data(),
        noise_multiplier=1.0,
        max_grad_norm=options.pop("max_grad_norm", 1.0),
        grad_sample_mode=mode,
        **options,
    )
    return engine, *parts


def test_the_ghost_loop_as_opacus_documents_it(install):
    engine, model, optimizer, criterion, loader = private("ghost", criterion=nn.CrossEntropyLoss())
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        assert isinstance(loss.item(), float)
        loss.backward()
        optimizer.step()
    assert len(engine.accountant) == 1 and engine.accountant.history[0][2] == 4


def test_ghost_clipping_put_together_by_hand(install):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    plain = nn.Linear(6, 3)
    model = GradSampleModuleFastGradientClipping(plain, max_grad_norm=0.5, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=8
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="run a forward and a backward first"):
        model.get_norm_sample()
    criterion(model(x), y).backward()
    own = []
    for i in range(8):
        g = torch.autograd.grad(nn.functional.cross_entropy(nn.functional.linear(x[i], plain.weight, plain.bias), y[i]),
                                list(plain.parameters()))
        own.append(torch.cat([v.flatten() for v in g]))
    norms = torch.stack(own).norm(dim=1)
    torch.testing.assert_close(model.get_norm_sample(), norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.per_sample_gradient_norms, norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.get_clipping_coef(), (0.5 / norms).clamp(max=1), rtol=1e-4, atol=1e-6)
    per_parameter = torch.stack([p._norm_sample for p in plain.parameters()]).norm(dim=0)
    torch.testing.assert_close(per_parameter, norms, rtol=1e-4, atol=1e-6)
    optimizer.step()
    want = (torch.stack(own) * (0.5 / norms).clamp(max=1)[:, None]).sum(0) / 8
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in plain.parameters()]), want, rtol=1e-4, atol=1e-6)
    optimizer.zero_grad()
    assert model.get_norm_sample() is not None  # outlives zero_grad, as in Opacus
    assert pickle.loads(pickle.dumps(model))._last_norms is None  # but not a file


def test_the_two_backward_passes_written_out_by_hand_are_refused_at_the_second(install):
    model = opacus.grad_sample.GradSampleModuleFastGradientClipping(nn.Linear(6, 3), max_grad_norm=0.5)
    optimizer = opacus.optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=8
    )
    losses = nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,)), reduction="none")
    losses.mean().backward(retain_graph=True)
    optimizer.zero_grad()
    weighted = (model.get_clipping_coef() * losses).sum()
    model.disable_hooks()
    with pytest.raises(RuntimeError, match="here one is enough"):
        weighted.backward()


def test_the_reductions_must_agree(install):
    model = opacus.grad_sample.GradSampleModuleFastGradientClipping(nn.Linear(2, 2), loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=8
    )
    criterion = opacus.utils.fast_gradient_clipping_utils.DPLossFastGradientClipping
    with pytest.raises(ValueError, match="the module's is 'sum'"):
        criterion(model, optimizer, nn.CrossEntropyLoss())


def test_optimizers_are_told_apart_by_their_clipping(install):
    from opacus.optimizers import AdaClipDPOptimizer, DPPerLayerOptimizer

    _, _, flat, _ = private()
    _, _, layered, _ = private(clipping="per_layer", max_grad_norm=[1.0] * 4)
    _, _, adaptive, _ = private(clipping="adaptive", unclipped_num_std=2.0)
    for one, cls in ((layered, DPPerLayerOptimizer), (adaptive, AdaClipDPOptimizer)):
        assert isinstance(one, cls) and isinstance(one, opacus.optimizers.DPOptimizer) and not isinstance(flat, cls)
    assert not isinstance(layered, AdaClipDPOptimizer)


def test_the_adaptive_optimizer_by_hand_and_by_its_engine(install):
    from opacus.optimizers import AdaClipDPOptimizer, DPPerLayerOptimizer
    from opacus.utils.adaptive_clipping import PrivacyEngineAdaptiveClipping

    model = nn.Linear(4, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    common = {"noise_multiplier": 1.0, "expected_batch_size": 8}
    optimizer = AdaClipDPOptimizer(
        inner,
        max_grad_norm=0.7,
        target_unclipped_quantile=0.3,
        clipbound_learning_rate=0.1,
        max_clipbound=5.0,
        min_clipbound=0.1,
        unclipped_num_std=2.0,
        **common,
    )
    assert isinstance(optimizer.clipping, AdaptiveClipping)
    assert (optimizer.max_grad_norm, optimizer.clipping.target_unclipped_quantile) == (0.7, 0.3)
    layered = DPPerLayerOptimizer(inner, max_grad_norm=[0.5, 0.25], **common)
    assert layered.clipping.max_grad_norms(2) == pytest.approx([0.5, 0.25])
    engine = PrivacyEngineAdaptiveClipping(accountant="rdp")
    _, optimizer, _ = engine.make_private(
        module=model,
        optimizer=inner,
        data_loader=DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=100),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        target_unclipped_quantile=0.4,
    )
    assert (optimizer.clipping.target_unclipped_quantile, optimizer.clipping.min_clipbound) == (0.4, 1.0)


def test_wrap_data_loader_under_its_old_name(install):
    from opacus.utils.batch_memory_manager import wrap_data_loader

    _, _, optimizer, loader = private(poisson_sampling=False)
    pieces = wrap_data_loader(data_loader=loader, max_batch_size=4, optimizer=optimizer)
    assert len(pieces) == 8


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.weight * x


class Quiet(Custom):
    pass


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_samplers_registered_with_opacus_are_honoured(active: bool, mode: str):
    calls = []

    def run() -> None:
        @opacus.grad_sample.register_grad_sampler(Custom)
        def custom(layer, activations, backprops):
            calls.append("grad")
            return {layer.weight: activations[0] * backprops}

        @opacus.grad_sample.register_norm_sampler(Custom)
        def norm(layer, activations, backprops):
            calls.append("norm")
            return {layer.weight: (activations[0] * backprops).norm(dim=1)}

        net = nn.Sequential(Custom(), Quiet())
        model = gsm.GradSampleModule(net, mode=mode)
        x = torch.randn(3, 6)
        model(x).square().sum(1).mean().backward()
        assert model.plan["0.weight"].rung == "sampler" and model.plan["1.weight"].rung == "tracked"
        own = []
        for row in x:
            loss = (net[1].weight.detach() * (net[0].weight * row)).square().sum()
            own.append(torch.autograd.grad(loss, net[0].weight)[0])
        found = gsm.ledger.collect([net[0].weight])[0]
        torch.testing.assert_close(found.weighted_sum(torch.ones(3))[0], torch.stack(own).sum(0))
        torch.testing.assert_close(found.squared_norms()[0].sqrt(), torch.stack(own).norm(dim=1))

    try:
        if active:
            with gsm.opacus.installed():
                run()
        else:
            run()
        assert "grad" in calls
        assert Custom in GradSampleHooks.GRAD_SAMPLERS  # where scripts look for it
        assert gsm.GradSampleModule.GRAD_SAMPLERS is GradSampleHooks.GRAD_SAMPLERS
    finally:
        GradSampleHooks.GRAD_SAMPLERS.pop(Custom, None)
        opacus.grad_sample.GradSampleHooksFastGradientClipping.NORM_SAMPLERS.pop(Custom, None)


def test_a_users_sampler_for_a_known_layer_wins():
    before = GradSampleHooks.GRAD_SAMPLERS[nn.Linear]
    calls = []

    def mine(layer, activations, backprops):
        calls.append(layer)
        return before(layer, activations, backprops)

    opacus.grad_sample.register_grad_sampler(nn.Linear)(mine)
    try:
        model = gsm.GradSampleModule(nn.Linear(3, 2))
        out = model(torch.randn(4, 3))
        calls.clear()  # it is compared with autograd before the first batch
        out.sum().backward()
        assert len(calls) == 1 and model.weight.grad_sample.shape == (4, 2, 3)
    finally:
        opacus.grad_sample.register_grad_sampler(nn.Linear)(before)


SCRIPT = """
import gsm.opacus
gsm.opacus.install()
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
print(*(c.__module__.partition(".")[0] for c in (
    GradSampleModule, PrivacyEngine, RDPAccountant, DPOptimizer, BatchMemoryManager)))
"""


def test_a_script_that_imports_opacus_afterwards():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["gsm", "gsm", "accountants", "gsm", "gsm"]


def test_what_a_script_holds_already_is_still_a_private_optimizer(install):
    assert issubclass(DPOptimizer, gsm.optimizer_interface.OpacusDPOptimizer)
    assert isinstance(accountants.RDPAccountant(), opacus.accountants.IAccountant)
