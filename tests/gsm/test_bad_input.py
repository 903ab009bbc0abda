"""Misuse of the public functions, as a table: what a user typed, and the message that comes back.

Every row is one call: none may pass in silence, none may end in an error that does not name the cause. A row fails if
its guard is removed.
"""

import io
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import accountants
import grad_samplers
from accountants import (
    GaussianAccountant,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
    get_noise_multiplier,
)
from gsm import DPOptimizer, GradSampleModule, PrivacyEngine, make_private, verify
from gsm.checkpoint_file import CheckpointError
from gsm.clipping import AutomaticClipping, FlatClipping, PerLayerClipping
from gsm.clipping_adaptive import AdaptiveClipping
from gsm.clipping_user import UserClipping
from gsm.criterion import GhostCriterion
from gsm.loader import DPDataLoader
from gsm.physical_batches import BatchMemoryManager, PhysicalBatchLoader
from gsm.sampling import PoissonSampler
from tests.gsm.training import FEATURES, dataset, parts

CE = nn.functional.cross_entropy
X, Y = torch.randn(8, FEATURES), torch.zeros(8, dtype=torch.long)
BIG, ANY = float("inf"), Exception


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class NoLength(Dataset):
    def __getitem__(self, index):
        return torch.zeros(FEATURES), 0


def plain(model=None, opt=None):
    model = model if model is not None else parts()[0]
    return model, opt if opt is not None else torch.optim.SGD(model.parameters(), lr=0.1)


def private(model=None, optimizer=None, loader=None, **options):
    made = parts()
    model = made[0] if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    defaults = {} if "target_epsilon" in options or options.pop("bare", False) else {"noise_multiplier": 1.0}
    return make_private(model, optimizer, made[2] if loader is None else loader, **{**defaults, **options})


def engine(method="make_private", options=None, **made):
    model, optimizer, loader = parts()
    given = {"module": model, "optimizer": optimizer, "data_loader": loader, "max_grad_norm": 1.0, **made}
    if method == "make_private":
        given = {"noise_multiplier": 1.0, **given}
    return getattr(PrivacyEngine(**(options or {})), method)(**given)


def dp(inner=None, **options):
    inner = torch.optim.SGD(GradSampleModule(parts()[0]).parameters(), lr=0.1) if inner is None else inner
    return DPOptimizer(inner, **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8, **options})


def trained(mode="ghost", backward=True, **options):
    model, optimizer, loader = private(mode=mode, **options)
    if backward:
        CE(model(X), Y).backward()
    return model, optimizer, loader


def then(*calls, **options):
    """Calls on (model, optimizer, loader) after one backward, in this order."""
    made = trained(**options)
    for call in calls:
        call(*made)


def sampler(choose, **options):
    data = dataset()
    return private(loader=DataLoader(data, **choose(data)), **options)


def custom_loss(loss, shape="mean"):
    return GhostCriterion(loss, shape)(torch.randn(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.long))


def file(content):
    out = io.BytesIO()
    content(out) if callable(content) else out.write(content)
    out.seek(0)
    return out


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def saved(change=None, accountant="prv", **options):
    """A checkpoint with ``change(state)`` applied, as a file object."""
    state = {
        "module_state_dict": parts()[0].state_dict(),
        "privacy_accountant_state_dict": {"history": [(1.0, 0.1, 3)], "mechanism": accountant},
    }
    if change is not None:
        state = change(state) or state
    return file(lambda out: torch.save(state, out, **options))


def load(source, accountant="prv", **options):
    given = {"module": parts()[0], "path": source() if callable(source) else source, **options}
    return PrivacyEngine(accountant=accountant).load_checkpoint(**given)


def cut(share):
    data = saved().getvalue()
    return file(data[: int(share * len(data))])


def flipped():
    data = bytearray(saved().getvalue())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        info = max(archive.infolist(), key=lambda i: i.file_size)
    data[info.header_offset + 30 + len(info.filename) + 40] ^= 1
    return file(bytes(data))


def account(history, accountant=RDPAccountant, delta=1e-5):
    made = accountant()
    made.history = history
    return made.get_epsilon(delta)


def noise_for(**options):
    given = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "steps": 10, **options}
    return get_noise_multiplier(**{k: v for k, v in given.items() if v != "left out"})


class Shared(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(FEATURES, 3), kind

    def forward(self, x):
        if self.kind == "centred":
            return self.layer(x - x.mean(0))
        if self.kind == "running":
            self.layer.seen = None
            return self.layer(x)
        if self.kind == "weight out":
            return self.layer(x), self.layer.weight
        return self.layer(x) / self.layer(x).std()


def buffered():
    class Running(nn.Linear):
        def __init__(self):
            super().__init__(FEATURES, 3)
            self.register_buffer("mean", torch.zeros(FEATURES))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return super().forward(x)

    return Running()


def one_forward(model, *args, **options):
    return GradSampleModule(model, **options)(*(args or (X,)))


def scaled(model, optimizer, loader):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def not_stepped(model, optimizer, loader):
    for _ in loader:
        pass


UserBatch = SimpleNamespace(squared_norms=lambda: torch.ones(1, 2), batch_size=2, params=[])

MAKE_PRIVATE = [
    ("no noise and no budget", lambda: private(bare=True), ValueError, "target_epsilon and target_delta is missing"),
    ("half a budget", lambda: private(target_epsilon=1.0, epochs=1), ValueError, "target_delta is missing"),
    ("noise and budget", lambda: private(noise_multiplier=1.0, target_epsilon=1.0), ValueError, "cannot be given as"),
    ("noise and epochs", lambda: private(epochs=3), ValueError, "epochs cannot be given as well"),
    ("budget without length", lambda: private(target_epsilon=1.0, target_delta=1e-5), ValueError, "exactly one of epo"),
    ("two lengths", lambda: private(target_epsilon=1.0, target_delta=1e-5, epochs=1, total_steps=9), ValueError, "exa"),
    ("negative budget", lambda: private(target_epsilon=-1.0, target_delta=1e-5, epochs=1), ValueError,
     "target_epsilon"),
    ("delta of one", lambda: private(target_epsilon=1.0, target_delta=1.0, epochs=1), ValueError, "target_delta must"),
    ("no epochs", lambda: private(target_epsilon=1.0, target_delta=1e-5, epochs=0), ValueError, "epochs must"),
    ("negative noise", lambda: private(noise_multiplier=-1.0), ValueError, "noise_multiplier must be 0"),
    ("NaN noise", lambda: private(noise_multiplier=float("nan")), ValueError, "noise_multiplier must be 0"),
    ("infinite noise", lambda: private(noise_multiplier=BIG), ValueError, "noise_multiplier must be 0"),
    ("noise in words", lambda: private(noise_multiplier="much"), ValueError, "noise_multiplier must be 0.*'much'"),
    ("bound zero", lambda: private(max_grad_norm=0.0), ValueError, "max_grad_norm must be positive"),
    ("bound negative", lambda: private(max_grad_norm=-1.0), ValueError, "max_grad_norm must be positive"),
    ("bound infinite", lambda: private(max_grad_norm=BIG), ValueError, "max_grad_norm must be positive and finite"),
    ("bound None", lambda: private(max_grad_norm=None), ValueError, "max_grad_norm must be a positive number"),
    ("bounds for flat", lambda: private(max_grad_norm=[1.0, 2.0]), ValueError, 'goes with clipping="per_layer"'),
    ("too few bounds", lambda: private(max_grad_norm=[1.0], clipping="per_layer"), ValueError, "1 bounds.*4 trainable"),
    ("unknown mode", lambda: private(mode="fast"), ValueError, "unknown grad_sample_mode 'fast'.*hooks"),
    ("mode None", lambda: private(mode=None), ValueError, "unknown grad_sample_mode None"),
    ("unknown clipping", lambda: private(clipping="soft"), ValueError, "Unknown clipping 'soft'.*flat"),
    ("clipping class", lambda: private(clipping=FlatClipping), TypeError, "a name or a gsm.clipping.Clipping"),
    ("unknown option", lambda: private(clipping="flat", quantile=0.5), ValueError, "unknown keyword.*quantile"),
    ("misspelled keyword", lambda: private(max_grad_nrom=1.0), ValueError, "unknown keyword.*max_grad_nrom"),
    ("option of adaptive", lambda: private(clipping="adaptive", target_unclipped_quantile=2), ValueError, "quantile m"),
    ("loss reduction", lambda: private(loss_reduction="none"), ValueError, "loss_reduction: 'none'"),
    ("unknown accountant", lambda: private(accountant="magic"), ValueError, "magic"),
    ("accountant class", lambda: private(accountant=RDPAccountant), TypeError, "accountant must be a registered name"),
    ("accountant number", lambda: private(accountant=3), TypeError, "accountant must be a registered name"),
    ("seed in secure mode", lambda: private(secure_mode=True, noise_generator=torch.Generator()), ValueError,
     "prohibi"),
    ("generator number", lambda: private(noise_generator=42), TypeError, "generator must be a torch.Generator"),
    ("physical size 0", lambda: private(max_physical_batch_size=0), ValueError,
     "max_physical_batch_size must be at le"),
    ("physical size in words", lambda: private(max_physical_batch_size="4"), ValueError, "at least 1, got '4'"),
    ("half a physical size", lambda: private(max_physical_batch_size=2.5), ValueError, "at least 1, got 2.5"),
    ("accountant replaced", lambda: (lambda e: (e.make_private(module=(p := parts())[0], optimizer=p[1],
     data_loader=p[2], noise_multiplier=1.0, max_grad_norm=1.0), setattr(e, "accountant", RDPAccountant())))(
        PrivacyEngine()), ValueError, "use a new engine"),
    ("physical size -1", lambda: private(max_physical_batch_size=-5), ValueError, "at least 1, got -5"),
    ("made-up records", lambda: engine(rand_on_empty=True), ValueError, "made-up record"),
    ("accountant of shuffles", lambda: private(accountant=PRVAccountant(sampling="shuffled", relation="zero_out")),
     ValueError, "assumes 'shuffled' batches"),
    ("positional engine", lambda: PrivacyEngine("prv"), TypeError, "positional"),
]  # fmt: skip

MODELS = [
    ("model in eval mode", lambda: private(parts()[0].eval()), ANY, "call model.train"),
    ("no module", lambda: private(object(), plain()[1]), TypeError, "must be a torch.nn.Module, got object"),
    ("batch norm", lambda: private(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))), ANY, "1 .BatchNorm1d.*get_comp"),
    ("sync batch norm", lambda: private(nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4))), ANY, "SyncBatchNorm"),
    ("tracking instance norm", lambda: private(nn.Sequential(nn.Conv1d(1, 4, 1),
     nn.InstanceNorm1d(4, affine=True, track_running_stats=True))), ANY, "InstanceNorm1d"),
    ("lazy layer", lambda: GradSampleModule(nn.LazyLinear(3)), ValueError, "have no shape yet"),
    ("scripted layer", lambda: GradSampleModule(nn.Sequential(torch.jit.script(nn.Linear(2, 2)))), ValueError,
     "0 is a TorchScript module"),
    ("embedding with max_norm", lambda: GradSampleModule(nn.Sequential(nn.Embedding(5, 2, max_norm=1.0))), ValueError,
     "0 has max_norm=1.0.*without noise"),
    ("complex parameter", lambda: GradSampleModule(nn.Linear(2, 2, dtype=torch.complex64)), ValueError,
     "weight, bias are complex.*view_as_complex"),
    ("frozen before the backward", lambda: (lambda m: (out := m(X), m.requires_grad_(False), out.sum().backward()))(
        GradSampleModule(nn.Sequential(nn.Linear(6, 3), nn.ReLU()))), RuntimeError, "0.weight was frozen between"),
    ("wrapped child", lambda: GradSampleModule(nn.Sequential(GradSampleModule(nn.Linear(2, 2)))), ValueError,
     "0._module is wrapped already|0 is wrapped already"),
    ("layer of another model", lambda: (lambda layer: (a := GradSampleModule(nn.Sequential(layer)),
     GradSampleModule(nn.Sequential(nn.ReLU(), layer)), a))(nn.Linear(2, 2)), ValueError, "1 is wrapped already"),
    ("wrapped twice", lambda: GradSampleModule(GradSampleModule(nn.Linear(2, 2))), ValueError, "wrapped already"),
    ("inner part wrapped", lambda: (lambda m: (GradSampleModule(m), GradSampleModule(m)))(nn.Linear(2, 2)), ValueError,
     "wrapped already"),
    ("class not object", lambda: GradSampleModule(nn.Linear), TypeError, "must be a torch.nn.Module"),
    ("wrapper mode", lambda: GradSampleModule(nn.Linear(2, 2), mode="fast"), ValueError, "mode must be one of"),
    ("wrapper reduction", lambda: GradSampleModule(nn.Linear(2, 2), loss_reduction="max"), ValueError,
     "'mean' or 'sum'"),
    ("other wrapper settings", lambda: private(GradSampleModule(parts()[0], loss_reduction="sum")), ValueError,
     "loss_reduction is 'sum' and 'mean' is requested"),
    ("no trainable parameter", lambda: private(parts()[0].requires_grad_(False)), ValueError, "nothing to train"),
    ("no input tensors", lambda: one_forward(nn.Linear(2, 2), "text"), ValueError, "without any tensor among its arg"),
    ("centred by the batch", lambda: one_forward(Shared("centred")), ValueError, "[Ss]amples influence each other"),
    ("divided by the batch", lambda: one_forward(Shared("divided")), ValueError, "[Ss]amples influence each other"),
    ("running buffer", lambda: one_forward(buffered()), ValueError, "buffer mean of Running changes with the data"),
    ("weight in the loss", lambda: (lambda m: (m(X).sum() + m.weight.sum()).backward())(
        GradSampleModule(nn.Linear(6, 3))), RuntimeError, "used outside the wrapped model"),
    ("weight as output", lambda: (lambda o: (o[0].sum() + o[1].sum()).backward())(one_forward(Shared("weight out"))),
     RuntimeError, "per-sample gradient is not defined"),
    ("plan without hooks", lambda: (lambda m: (m.remove_hooks(), m.plan))(GradSampleModule(nn.Linear(2, 2))),
     RuntimeError, "add_hooks"),
    ("hooks twice", lambda: GradSampleModule(nn.Linear(2, 2)).add_hooks(), ValueError, "add hooks twice"),
    ("no norms yet", lambda: GradSampleModule(nn.Linear(2, 2), mode="ghost").per_sample_gradient_norms, ANY,
     "run a forward and a backward"),
    ("unknown attribute", lambda: GradSampleModule(nn.Linear(2, 2)).wieght, AttributeError,
     "Linear.* has an attribute 'wieght'"),
    ("create_graph", lambda: one_forward(nn.Linear(6, 1)).sum().backward(create_graph=True), RuntimeError,
     "create_graph"),
    ("saved between backward and step", lambda: then(lambda m, o, d: pickle.dumps(m), mode="hooks"), ValueError,
     "wait for optimizer.step"),
]  # fmt: skip

OPTIMIZERS = [
    ("not an optimizer", lambda: dp(nn.Linear(2, 2)), TypeError, "wraps a torch.optim.Optimizer"),
    ("parameters not optimizer", lambda: dp(list(nn.Linear(2, 2).parameters())), TypeError, "wraps a torch.optim"),
    ("private twice", lambda: dp(dp()), ValueError, "private already"),
    ("batch size 0", lambda: dp(expected_batch_size=0), ValueError, "expected_batch_size must be positive"),
    ("batch size in words", lambda: dp(expected_batch_size="8"), ValueError, "expected_batch_size must be positive"),
    ("batch size NaN later", lambda: setattr(dp(), "expected_batch_size", float("nan")), ValueError,
     "expected_batch_size must be positive"),
    ("secure mode later", lambda: setattr(dp(), "secure_mode", True), ValueError, "chosen when the optimizer is made"),
    ("loss without its name", lambda: trained(backward=False)[1].step(X[0]), TypeError, r"step\(loss=...\)"),
    ("batch size -2", lambda: dp(expected_batch_size=-2), ValueError, "expected_batch_size must be positive"),
    ("batch size missing", lambda: dp(expected_batch_size=None), ValueError, "must provide expected_batch_size"),
    ("reduction", lambda: dp(loss_reduction="batchmean"), ValueError, "loss_reduction: 'batchmean'"),
    ("generator", lambda: dp(generator=np.random.default_rng()), TypeError, "must be a torch.Generator"),
    ("secure and seeded", lambda: dp(secure_mode=True, generator=torch.Generator()), ValueError, "Pass only one"),
    ("noise and seed", lambda: dp(noise=object(), generator=torch.Generator()), ValueError,
     "brings its own randomness"),
    ("noise and secure", lambda: dp(noise=object(), secure_mode=True), ValueError, "brings its own randomness"),
    ("bound as text", lambda: dp(max_grad_norm="one"), ValueError, "max_grad_norm must be a positive number"),
    ("bound list with zero", lambda: dp(max_grad_norm=[1.0, 0, 1, 1], clipping="per_layer"), ValueError, "positive"),
    ("LBFGS", lambda: dp(torch.optim.LBFGS(nn.Linear(2, 2).parameters())), ValueError, "LBFGS cannot be private"),
    ("SparseAdam", lambda: dp(torch.optim.SparseAdam(nn.Linear(2, 2).parameters())), ValueError, "SparseAdam cannot"),
    ("adaptive without size", lambda: dp(expected_batch_size=None, loss_reduction="sum", clipping="adaptive"),
     ValueError, "expected_batch_size"),
    ("strange parameters", lambda: private(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1)), ValueError,
     "are not in the model"),
    ("parameter nobody captures", lambda: dp(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1)).step(), ValueError,
     "Per sample gradient not found.*Wrap the model"),
    ("reductions differ", lambda: then(lambda m, o, d: dp(o.original_optimizer, loss_reduction="sum").step()),
     ValueError,
     "Give both the same"),
    ("no backward", lambda: trained(backward=False)[1].step(), ValueError, "No per-sample gradients"),
    ("virtual without backward", lambda: trained(backward=False)[1].virtual_step(), ValueError, "No per-sample grad"),
    ("zero_grad before step", lambda: then(lambda m, o, d: o.zero_grad(), lambda m, o, d: o.step()), ValueError,
     "no zero_grad.. between"),
    ("two steps", lambda: then(lambda m, o, d: o.step(), lambda m, o, d: o.step()), ValueError,
     "No per-sample|still th"),
    ("forgotten zero_grad", lambda: then(lambda m, o, d: o.step(), lambda m, o, d: CE(m(X), Y).backward(),
     lambda m, o, d: o.step()), ValueError, "call optimizer.zero_grad.. once per step"),
    ("two backwards", lambda: then(lambda m, o, d: CE(m(X), Y).backward()), ValueError, "not compatible with grad acc"),
    ("GradScaler", lambda: then(scaled), ValueError, "GradScaler cannot drive"),
    ("loss a number", lambda: then(lambda m, o, d: o.step(loss=CE(m(X), Y))), ValueError, "one entry per sample"),
    ("loss a float", lambda: trained(backward=False)[1].step(loss=0.5), ValueError, "one entry per sample"),
    ("loss of other length", lambda: (lambda m, o, d: o.step(loss=CE(m(X), Y, reduction="none")[:5]))(
        *trained(backward=False)), ValueError, "5 entries but the model saw 8"),
    ("closure and loss", lambda: trained(backward=False)[1].step(lambda: None, loss=X[0]), ValueError, "not both"),
    ("hook no function", lambda: trained()[1].attach_step_hook(3), TypeError, "step hook is a function"),
    ("hook replaces arguments", lambda: then(lambda m, o, d: o.register_step_pre_hook(lambda *a: ((), {})),
     lambda m, o, d: o.step()), RuntimeError, "cannot replace the arguments"),
    ("account without rate", lambda: then(lambda m, o, d: setattr(o, "sample_rate", None), lambda m, o, d: o.step()),
     ValueError, "sample_rate is not"),
    ("optimizer None", lambda: private(optimizer=nn.Linear(6, 3)), TypeError, "must be a torch.optim.Optimizer"),
    ("accountant's name", lambda: then(lambda m, o, d: vars(o).update(of_engine=False, _accountant="rdp"),
                                       lambda m, o, d: o.step()), TypeError, "accountant must be an accountant"),
    ("another accountant", lambda: setattr(trained()[1], "accountant", create_accountant("rdp")), ValueError,
     "is the one of the PrivacyEngine"),
    ("rate of text", lambda: then(lambda m, o, d: setattr(o, "sample_rate", "0.1"), lambda m, o, d: o.step()),
     ValueError, "sample_rate must"),
    ("rate of NaN", lambda: then(lambda m, o, d: setattr(o, "sample_rate", float("nan")), lambda m, o, d: o.step()),
     ValueError, "sample_rate must"),
    ("noise set to text", lambda: setattr(trained()[1], "noise_multiplier", "x"), ValueError, "noise_multiplier must"),
    ("bound set to NaN", lambda: setattr(trained()[1], "max_grad_norm", float("nan")), ValueError,
     "max_grad_norm must"),
    ("group in a logical batch", lambda: then(lambda m, o, d: o.virtual_step(),
     lambda m, o, d: o.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})), ValueError, "middle of a logical"),
    ("new group not wrapped", lambda: then(lambda m, o,
     d: o.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
     lambda m, o, d: o.step()), ValueError, "Per sample gradient not found"),
    ("iterations before backward", lambda: trained(backward=False)[1].accumulated_iterations, ValueError, "No per-sam"),
    ("sizes of two models differ", lambda: (lambda a, b: (a(X).sum().backward(), b(X[:3]).sum().backward(),
     dp(torch.optim.SGD([*a.parameters(), *b.parameters()], lr=1)).step()))(
        GradSampleModule(nn.Linear(6, 1), mode="ghost"), GradSampleModule(nn.Linear(6, 1), mode="ghost")), ValueError,
     "batches of different sizes"),
]  # fmt: skip

CLIPPINGS = [
    ("gamma 0", lambda: AutomaticClipping(gamma=0.0), ValueError, "gamma must be a positive number"),
    ("quantile -1", lambda: AdaptiveClipping(target_unclipped_quantile=-1), ValueError, "must lie in .0, 1."),
    ("learning rate 0", lambda: AdaptiveClipping(clipbound_learning_rate=0), ValueError, "must be positive"),
    ("limits crossed", lambda: AdaptiveClipping(min_clipbound=2, max_clipbound=1), ValueError, "larger than min"),
    ("count noise 0", lambda: AdaptiveClipping(unclipped_num_std=0), ValueError, "unclipped_num_std must be positive"),
    ("count noise too small", lambda: dp(clipping=AdaptiveClipping(unclipped_num_std=0.4)), ValueError, "theorem 1"),
    ("empty bounds", lambda: PerLayerClipping([]), ValueError, "max_grad_norm"),
    ("bound with text", lambda: PerLayerClipping([1.0, "a"]), ValueError, "must be a positive number, got 'a'"),
    ("users with a number", lambda: UserClipping(1.0), TypeError, "such as FlatClipping.1.0., got 1.0"),
    ("users of users", lambda: UserClipping(UserClipping()), ValueError, "cannot be used for users"),
    ("users adaptive", lambda: UserClipping(AdaptiveClipping()), ValueError, "cannot be used for users"),
    ("user reduction", lambda: UserClipping(reduction="max"), ValueError, "'sum' or 'mean'"),
    ("no users given", lambda: UserClipping().clip(UserBatch), ValueError, "set_users"),
    ("too few users", lambda: (lambda c: (c.set_users([1]), c.clip(UserBatch)))(UserClipping()), ValueError, "1 ids"),
    ("criterion reduction", lambda: GhostCriterion(nn.CrossEntropyLoss(reduction="sum")), ValueError, "same"),
    ("criterion none", lambda: GhostCriterion(nn.CrossEntropyLoss(reduction="none")), ValueError, "make them the same"),
    ("criterion a scalar", lambda: custom_loss(lambda out, y: out.sum()), ValueError, "one loss per sample"),
]  # fmt: skip

LOADERS = [
    ("weighted sampling", lambda: sampler(lambda d: {"sampler": WeightedRandomSampler([1.0] * len(d), len(d))}),
     ValueError, "WeightedRandomSampler, which Poisson sampling would replace"),
    ("with replacement", lambda: sampler(lambda d: {"sampler": RandomSampler(d, replacement=True)}), ValueError,
     "RandomSampler, which Poisson"),
    ("part of the data", lambda: sampler(lambda d: {"sampler": RandomSampler(d, num_samples=10)}), ValueError,
     "which Poisson"),
    ("own batch sampler", lambda: sampler(lambda d: {"batch_sampler": [[0, 1], [2]]}), ValueError,
     "list, which Poisson"),
    ("own batch sampler class", lambda: sampler(lambda d: {"batch_sampler": type("Mine", (BatchSampler,), {})(
        RandomSampler(d), 4, False)}), ValueError, "Mine, which Poisson"),
    ("no batches", lambda: sampler(lambda d: {"batch_size": None}), ValueError, "batch_size=None"),
    ("a stream", lambda: private(loader=DataLoader(Stream(), batch_size=2)), ValueError, "IterableDataset"),
    ("a list", lambda: private(loader=[(X, Y)]), TypeError, "torch.utils.data.DataLoader, got list"),
    ("a list, fixed batches", lambda: private(loader=[(X, Y)], poisson_sampling=False), TypeError, "DataLoader"),
    ("a dataset", lambda: private(loader=dataset()), TypeError, "needs a torch.utils.data.DataLoader"),
    ("None", lambda: private(loader=SimpleNamespace()), ANY, "DataLoader"),
    ("no length", lambda: private(loader=DataLoader(NoLength(), sampler=[0, 1])), ANY, "sampl|length"),
    ("all dropped", lambda: sampler(lambda d: {"batch_size": 500, "drop_last": True}), ValueError, "no batches"),
    ("rate 0", lambda: DPDataLoader(dataset(), sample_rate=0.0), ValueError, "sample_rate must be in"),
    ("rate 2", lambda: DPDataLoader(dataset(), sample_rate=2.0), ValueError, "sample_rate must be in"),
    ("rate NaN", lambda: DPDataLoader(dataset(), sample_rate=float("nan")), ValueError, "sample_rate must be in"),
    ("rate tiny", lambda: PoissonSampler(num_samples=5, sample_rate=1e-300), ValueError, "no record would ever"),
    ("no records", lambda: PoissonSampler(num_samples=0, sample_rate=0.1), ValueError, "positive number of records"),
    ("empty dataset", lambda: DPDataLoader(TensorDataset(X[:0]), sample_rate=0.1), ValueError, "positive number"),
    ("secure and seeded", lambda: next(iter(PoissonSampler(num_samples=5, sample_rate=0.5, secure_mode=True,
     generator=torch.Generator()))), ValueError, "takes no generator"),
    ("pieces of 0", lambda: PhysicalBatchLoader(parts()[2], 0, trained()[1]), ValueError, "at least 1"),
    ("pieces of a list", lambda: PhysicalBatchLoader([X], 2, trained()[1]), ValueError, "got list"),
    ("manager of 0", lambda: BatchMemoryManager(data_loader=parts()[2], max_physical_batch_size=0,
     optimizer=trained()[1]).__enter__(), ValueError, "at least 1"),
    ("piece without step", lambda: not_stepped(*private(max_physical_batch_size=4)), RuntimeError, "no optimizer.step"),
    ("two passes at once", lambda: (lambda it, other: (next(it), next(other), next(it)))(
        *(lambda d: (iter(d), iter(d)))(private(max_physical_batch_size=4)[2])), RuntimeError, "another iteration"),
]  # fmt: skip

ACCOUNTANTS = [
    ("unknown name", lambda: create_accountant("moments"), ValueError, "moments"),
    ("delta 0", lambda: account([(1.0, 0.1, 5)], delta=0.0), ValueError, "delta must lie in"),
    ("delta 1", lambda: account([(1.0, 0.1, 5)], delta=1.0), ValueError, "delta must lie in"),
    ("delta None", lambda: account([(1.0, 0.1, 5)], delta=None), ValueError, "delta must be a number"),
    ("delta NaN", lambda: account([(1.0, 0.1, 5)], PLDAccountant, float("nan")), ValueError, "got NaN"),
    ("delta missing", lambda: RDPAccountant().get_epsilon(), TypeError, "delta"),
    ("pairs", lambda: account([(1.0, 0.1)]), ValueError, "must be .noise_multiplier, sample_rate, num_steps."),
    ("text", lambda: account(["abc"]), ValueError, "history.0."),
    ("negative noise", lambda: account([(-1.0, 0.1, 5)]), ValueError, "history.0.: noise_multiplier"),
    ("rate above 1", lambda: account([(1.0, 1.5, 5)], PRVAccountant), ValueError, "history.0.: sample_rate"),
    ("half a step", lambda: account([(1.0, 0.5, 2.5)], GaussianAccountant), ValueError, "num_steps must be an integer"),
    ("negative steps", lambda: account([(1.0, 0.5, -2)], PLDAccountant), ValueError, "num_steps"),
    ("step NaN", lambda: RDPAccountant().step(noise_multiplier=float("nan"), sample_rate=0.1), ValueError, "noise_mul"),
    ("step rate -1", lambda: PRVAccountant().step(noise_multiplier=1.0, sample_rate=-1), ValueError,
     "sample_rate must"),
    ("step rate text", lambda: PRVAccountant().step(noise_multiplier=1.0, sample_rate="q"), ValueError, "sample_rate"),
    ("unknown sampling", lambda: PRVAccountant(sampling="lucky"), ValueError, "sampling must be one of"),
    ("unknown relation", lambda: PRVAccountant(relation="near"), ValueError, "relation must be one of"),
    ("no certificate", lambda: PRVAccountant(sampling="shuffled"), ValueError, "no epsilon can be certified"),
    ("state None", lambda: RDPAccountant().load_state_dict(None), ValueError, "None or empty"),
    ("state empty", lambda: RDPAccountant().load_state_dict({}), ValueError, "None or empty"),
    ("state without history", lambda: RDPAccountant().load_state_dict({"mechanism": "rdp"}), ValueError, "'history'"),
    ("state without name", lambda: RDPAccountant().load_state_dict({"history": []}), ValueError, "'mechanism'"),
    ("state of another", lambda: RDPAccountant().load_state_dict({"history": [], "mechanism": "prv"}), ValueError,
     "does not load into 'rdp'"),
    ("state damaged", lambda: RDPAccountant().load_state_dict({"history": [(1, 2, 3)], "mechanism": "rdp"}), ValueError,
     "sample_rate"),
    ("target 0", lambda: noise_for(target_epsilon=0), ValueError, "target_epsilon must lie"),
    ("target infinite", lambda: noise_for(target_epsilon=BIG), ValueError, "target_epsilon must lie"),
    ("target delta 0", lambda: noise_for(target_delta=0), ValueError, "target_delta must lie"),
    ("rate 0 for noise", lambda: noise_for(sample_rate=0), ValueError, "sample_rate must"),
    ("steps and epochs", lambda: noise_for(epochs=2), ValueError, "EITHER"),
    ("neither", lambda: noise_for(steps="left out"), ValueError, "EITHER"),
    ("steps 0", lambda: noise_for(steps=0), ValueError, "steps must"),
    ("steps 1.5", lambda: noise_for(steps=1.5), ValueError, "steps must be an integer"),
    ("accountant unknown", lambda: noise_for(accountant="none"), ValueError, "none"),
    ("steps for noise 0", lambda: accountants.get_num_steps(target_epsilon=1.0, target_delta=1e-5, noise_multiplier=-1,
     sample_rate=0.1), ValueError, "noise_multiplier must"),
    ("rate for steps 0", lambda: accountants.get_sample_rate(target_epsilon=1.0, target_delta=1e-5,
     noise_multiplier=1.0,
     steps=0), ValueError, "steps"),
    ("orders below one", lambda: account_alphas([0.5]), ValueError, "alpha|order"),
]  # fmt: skip


def account_alphas(alphas):
    made = RDPAccountant()
    made.history = [(1.0, 0.1, 1)]
    return made.get_epsilon(1e-5, alphas=alphas)


SAMPLERS = [
    ("for an object", lambda: grad_samplers.register_grad_sampler(nn.Linear(2, 2)), TypeError,
     "registered for a class"),
    ("for a number", lambda: grad_samplers.register_grad_sampler([nn.Linear, 3]), TypeError, "registered for a class"),
    ("norm before grad", lambda: grad_samplers.register_norm_sampler(Shared)(print), ValueError, "comes first"),
    ("weighted before grad", lambda: grad_samplers.register_weighted_sampler(Shared)(print), ValueError, "comes first"),
    ("unregister unknown", lambda: grad_samplers.unregister(Shared), KeyError, "no sampler is registered for .*Shared"),
]  # fmt: skip

CHECKPOINTS = [
    ("no file", lambda: load("/nowhere/at/all.pt"), FileNotFoundError, "nowhere"),
    ("empty file", lambda: load(file(b"")), CheckpointError, "is not a readable checkpoint"),
    ("text", lambda: load(file(b"epsilon = 3, trust me")), CheckpointError, "not a readable|other than tensors"),
    ("a tenth of it", lambda: load(cut(0.1)), CheckpointError, "not a readable|corrupted"),
    ("half of it", lambda: load(cut(0.5)), CheckpointError, "not a readable|corrupted"),
    ("nearly all of it", lambda: load(cut(0.99)), CheckpointError, "not a readable|corrupted"),
    ("one bit flipped", lambda: load(flipped()), CheckpointError, "checksum of .* does not match"),
    ("hostile", lambda: load(saved(lambda s: {**s, "extra": Evil()})), CheckpointError, "could run code"),
    ("hostile instead of it", lambda: load(file(lambda out: torch.save(Evil(), out))), CheckpointError,
     "could run code"),
    ("hostile pickle", lambda: load(file(pickle.dumps(Evil()))), CheckpointError, "could run code|not a readable"),
    ("a module", lambda: load(file(lambda out: torch.save(nn.Linear(2, 2), out))), CheckpointError, "could run code"),
    ("a tensor", lambda: load(file(lambda out: torch.save(torch.ones(2), out))), CheckpointError, "holds a Tensor"),
    ("no account", lambda: load(saved(lambda s: {"module_state_dict": {}})), CheckpointError,
     "has no privacy_accountant"),
    ("no model", lambda: load(saved(lambda s: s.pop("module_state_dict") and s)), CheckpointError, "no module_state"),
    ("other accountant", lambda: load(saved(accountant="rdp")), CheckpointError, "is 'rdp' and this engine's is 'prv'"),
    ("negative history", lambda: load(saved(lambda s: s["privacy_accountant_state_dict"].update(
        history=[(1.0, 0.1, -3)]))), CheckpointError, "state is not valid.*num_steps"),
    ("history of text", lambda: load(saved(lambda s: s["privacy_accountant_state_dict"].update(history="none"))),
     CheckpointError, "state is not valid"),
    ("account a list", lambda: load(saved(lambda s: s.update(privacy_accountant_state_dict=[1, 2]))), CheckpointError,
     "accountant"),
    ("other model", lambda: load(saved(), module=nn.Linear(2, 2)), RuntimeError, "state_dict"),
    ("saved in a logical batch", lambda: then(lambda m, o, d: o.virtual_step(), lambda m, o, d:
     PrivacyEngine().save_checkpoint(path=io.BytesIO(), module=m, optimizer=o)), CheckpointError,
     "middle of a logical"),
    ("saved with an object", lambda: PrivacyEngine().save_checkpoint(path="/tmp/never-written.pt",
     module=nn.Linear(2, 2),
     checkpoint_dict={"x": Evil()}), CheckpointError, "nothing was written"),
    ("to no folder", lambda: PrivacyEngine().save_checkpoint(path="/nowhere/x.pt", module=nn.Linear(2, 2)),
     FileNotFoundError, "nowhere"),
    ("module missing", lambda: PrivacyEngine().save_checkpoint(path=io.BytesIO(), module=None), TypeError,
     "module must be the torch.nn.Module"),
]  # fmt: skip

VERIFY = [
    ("one sample", lambda: verify(nn.Linear(6, 2), X[:1]), ValueError, "two samples|2 samples|at least two"),
    ("no parameter", lambda: verify(nn.ReLU(), X), ValueError, "no trainable parameter"),
    ("no tensors", lambda: verify(nn.Linear(6, 2), "text"), ANY, "tensor"),
    ("loss not scalar", lambda: verify(nn.Linear(6, 2), X, loss=lambda out: out), ValueError, "scalar"),
    ("epsilon before a delta", lambda: PrivacyEngine().get_epsilon(delta=2), ValueError, "delta must lie"),
    ("fix without fixer", lambda: PrivacyEngine.get_compatible_module(parts()[0].eval()), ANY, "train"),
]  # fmt: skip

TABLE = {
    "make_private": MAKE_PRIVATE, "models": MODELS, "optimizer": OPTIMIZERS, "clipping": CLIPPINGS, "loaders": LOADERS,
    "accountants": ACCOUNTANTS, "samplers": SAMPLERS, "checkpoints": CHECKPOINTS, "others": VERIFY,
}  # fmt: skip
ROWS = [pytest.param(*row[1:], id=f"{room}: {row[0]}") for room, rows in TABLE.items() for row in rows]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("call", "error", "message"), ROWS)
def test_misuse_is_named(call, error, message, capsys):
    with pytest.raises(error, match=message) as caught:
        call()
    internal = (AssertionError, AttributeError, IndexError, KeyError, UnboundLocalError)
    assert error in internal or not isinstance(caught.value, internal), "an internal error"
    assert "code ran" not in capsys.readouterr().out


def test_the_table_is_long_and_has_no_row_twice():
    assert len(ROWS) >= 190
    assert len({row.id for row in ROWS}) == len(ROWS)
