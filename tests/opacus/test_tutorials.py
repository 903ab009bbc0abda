"""What Opacus's three tutorials do, on small real data: with only the import changed, and with `install()` unchanged.

The image classifier (a residual network with BatchNorm, made compatible by ModuleValidator.fix, trained to a target
epsilon through a BatchMemoryManager), the custom layer with a grad sampler of its own, and the character LSTM that
tells the language of a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import opacus
import opacus.grad_sample
import opacus.optimizers
import opacus.utils.batch_memory_manager
import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from opacus.utils.per_sample_gradients_utils import check_per_sample_gradients_are_correct
from opacus.validators import ModuleValidator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gsm
import gsm.opacus
from gsm.physical_batches import BatchMemoryManager


@pytest.fixture(params=["import changed", "installed"])
def library(request) -> Iterator[SimpleNamespace]:
    """The names that a tutorial imports."""
    if request.param == "import changed":
        yield SimpleNamespace(PrivacyEngine=gsm.PrivacyEngine, BatchMemoryManager=BatchMemoryManager)
        return
    with gsm.opacus.installed():
        yield SimpleNamespace(
            PrivacyEngine=opacus.PrivacyEngine, BatchMemoryManager=opacus.utils.batch_memory_manager.BatchMemoryManager
        )


# -- 1. An image classifier -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))), inplace=True)


def residual_network() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, Block(16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10))


def test_image_classifier(library):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])

    model = residual_network()
    errors = ModuleValidator.validate(model, strict=False)
    assert len(errors) == 3
    model = ModuleValidator.fix(model)
    assert ModuleValidator.validate(model, strict=False) == []
    optimizer = torch.optim.NAdam(model.parameters(), lr=3e-3)
    loader = DataLoader(train, batch_size=150, shuffle=True)
    privacy_engine = library.PrivacyEngine()
    model, optimizer, loader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        epochs=4,
        target_epsilon=20.0,
        target_delta=1e-4,
        max_grad_norm=1.2,
        poisson_sampling=True,
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(4):
        model.train()
        with library.BatchMemoryManager(data_loader=loader, max_physical_batch_size=100, optimizer=optimizer) as pieces:
            for x, y in pieces:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    assert accuracy > 0.5, accuracy  # a guess is right once in ten
    assert 19.0 < privacy_engine.get_epsilon(1e-4) <= 20.0


# -- 2. A layer with a grad sampler of its own ------------------------------------------------------------------------


class LinearWithoutBias(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_custom_grad_sampler(library):
    calls = []

    @opacus.grad_sample.register_grad_sampler(LinearWithoutBias)
    def compute_grad_sample(layer, activations, backprops):
        calls.append(layer)
        return {layer.weight: torch.einsum("n...i,n...j->nij", backprops, activations[0])}

    try:
        model = nn.Sequential(LinearWithoutBias(64, 32), nn.ReLU(), LinearWithoutBias(32, 10))
        if library.PrivacyEngine is opacus.PrivacyEngine:
            assert check_per_sample_gradients_are_correct(torch.randn(5, 64), model)
            assert calls
        digits = load_digits()
        train = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
        engine = library.PrivacyEngine()
        private, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(train, batch_size=128),
            noise_multiplier=0.7,
            max_grad_norm=1.0,
        )
        calls.clear()
        before = F.cross_entropy(model(train.tensors[0]), train.tensors[1]).item()
        steps = 0
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            assert model[0].weight.grad_sample.shape == (len(x), 32, 64)
            optimizer.step()
            steps += 1
        assert sum(layer is model[0] for layer in calls) >= steps > 10
        with torch.no_grad():
            assert F.cross_entropy(private(train.tensors[0]), train.tensors[1]).item() < 0.85 * before
    finally:
        opacus.grad_sample.GradSampleHooks.GRAD_SAMPLERS.pop(LinearWithoutBias, None)


# -- 3. A character LSTM ----------------------------------------------------------------------------------------------

NAMES = {
    "Italian": "Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco Bruno Gallo Conti Mancini Costa "
    "Giordano Rizzo Lombardi Moretti Barbieri Fontana Santoro Mariani Rinaldi Caruso Ferrara Galli Martini Leone",
    "Japanese": "Sato Suzuki Takahashi Tanaka Watanabe Ito Yamamoto Nakamura Kobayashi Kato Yoshida Yamada Sasaki "
    "Yamaguchi Matsumoto Inoue Kimura Hayashi Shimizu Saito Mori Abe Ikeda Hashimoto Ishikawa Maeda Fujita Ogawa Okada",
    "Russian": "Ivanov Smirnov Kuznetsov Popov Vasiliev Petrov Sokolov Mikhailov Novikov Fedorov Morozov Volkov "
    "Lebedev Semenov Egorov Pavlov Kozlov Stepanov Nikolaev Orlov Andreev Makarov Nikitin Zakharov Zaitsev Solovyov",
}


class NamesDataset(Dataset):
    """Each record is a name (bytes as ids) and the number of its language."""

    def __init__(self):
        self.labels = list(NAMES)
        self.records = [(torch.tensor(list(name.encode())), k) for k, names in enumerate(NAMES.values())
                        for name in names.split()]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.records[i]

    def __len__(self) -> int:
        return len(self.records)


def padded_collate(batch: list[tuple[Tensor, int]], padding_idx: int = 0) -> tuple[Tensor, Tensor]:
    x = nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True, padding_value=padding_idx)
    return x, torch.tensor([label for _, label in batch])


class CharNNClassifier(nn.Module):
    def __init__(self, output_size: int, embedding_size: int = 16, hidden_size: int = 32, vocabulary: int = 256):
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.lstm = DPLSTM(embedding_size, hidden_size, num_layers=1, batch_first=True)
        self.out_layer = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.embedding(x)
        x, _ = self.lstm(x, hidden)
        return self.out_layer(x[:, -1, :])


def test_character_lstm(library):
    names = NamesDataset()
    model = CharNNClassifier(len(names.labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(names, batch_size=17, collate_fn=padded_collate, shuffle=True)
    privacy_engine = library.PrivacyEngine(secure_mode=False)
    model, optimizer, loader = privacy_engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.6, max_grad_norm=1.5
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(12):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    x, y = padded_collate([names[i] for i in range(len(names))])
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.55, accuracy  # a guess is right once in three
    assert privacy_engine.accountant.history[0][2] == 12 * len(loader)
    assert 1 < privacy_engine.get_epsilon(delta=8e-3) < 100
