"""A small private training on fixed data, for tests that need one."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

RECORDS, FEATURES, CLASSES = 120, 6, 3


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(RECORDS, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def parts(batch_size: int = 20, lr: float = 0.1, seed: int = 3, **loader_options):
    """An ordinary model, optimizer and loader."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, optimizer, DataLoader(dataset(), batch_size=batch_size, **loader_options)


def train(model, optimizer, loader, steps: int | None = None, criterion=None) -> int:
    """The ordinary loop; returns the number of loop bodies run."""
    criterion = criterion or nn.CrossEntropyLoss()
    done = 0
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            done += 1
            if steps is not None and done >= steps:
                return done
        if steps is None:
            return done


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Profiler(TorchDispatchMode):
    """A mode of the user's: nothing is recorded while it is on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
