"""What the attacks share: tiny models, trainings that can be watched, and the loop that says what is right."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gsm import DPOptimizer, GradSampleModule, make_private
from tests.loop import per_sample_loop

FEATURES, CLASSES, RECORDS = 5, 3, 40
CE = nn.functional.cross_entropy


def mlp():
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def data(count=RECORDS, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    x = scale * torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


class Watch:
    """In the place of the noise: adds nothing, and remembers the sum, its noise and its sensitivity."""

    def __init__(self):
        self.sums, self.stds, self.sensitivities = [], [], []

    def add_(self, tensors, std, sensitivity):
        self.sums.append(torch.cat([t.detach().flatten().double().clone() for t in tensors]))
        self.stds.append(std)
        self.sensitivities.append(sensitivity)

    def refresh(self):
        pass


def watched(model=None, *, mode="ghost", bound=1.0, sigma=1.0, lr=0.0, **options):
    """A wrapped model and its private optimizer whose noise is a :class:`Watch`."""
    model = GradSampleModule(mlp() if model is None else model, mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr), noise_multiplier=sigma, max_grad_norm=bound,
        expected_batch_size=8, noise=Watch(), **options,
    )  # fmt: skip
    return model, optimizer, optimizer.noise


def training(model=None, *, batch_size=8, watch=True, dataset=None, optimizer=None, **options):
    """What make_private returns, with a :class:`Watch` for the noise."""
    model = mlp() if model is None else model
    inner = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(data() if dataset is None else dataset, batch_size=batch_size)
    made = make_private(model, inner, loader, **{"noise_multiplier": 1.0, "mode": "ghost", **options})
    if watch:
        made[1].noise = Watch()
    return made


def step(model, optimizer, x, y, loss=CE):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def clipped_sum(model, x, y, bound=1.0):
    """The reference, flat ``[entries]``: one sample at a time, float64."""
    rows = per_sample_loop(model, x, select=lambda v, i: v[i : i + 1], loss=_Targets(y), size=len(x))
    flat = torch.cat([g.flatten(1) for g in rows.values()], 1)
    return (flat * (bound / flat.norm(dim=1)).clamp(max=1)[:, None]).sum(0)


class _Targets:
    """The loss of samples that come one after another."""

    def __init__(self, y):
        self.y, self.i = y, -1

    def __call__(self, out):
        self.i += 1
        return CE(out, self.y[self.i : self.i + 1])
