"""What is trained: a table of models, each with data and a loss, at two sizes.

``full`` is what is reported for a CPU, ``quick`` what continuous integration runs; the workloads of the accelerator
suite have their own sizes. Adding a workload is adding a row to `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import huggingface, models, resnet

SIZES = ("full", "quick")


@dataclass
class Problem:
    """A model, one batch of it, and the cross-entropy between the two."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over samples (and positions): the scalar of the ordinary loop."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def per_sample_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`[B]`, whose mean is :meth:`loss`."""
        each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        return each.view(targets.shape[0], -1).mean(1)

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        self.model.to(device=device, dtype=dtype)
        inputs = self.inputs.to(device)
        self.inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self.targets = self.targets.to(device)
        return self


@dataclass(frozen=True)
class Workload:
    """One row of the table. ``make(**size)`` builds the problem, or raises ImportError."""

    name: str
    title: str
    make: Callable[..., Problem]
    full: dict[str, Any]
    quick: dict[str, Any]
    suite: str = "cpu"

    def problem(self, size: str = "full", *, device: str = "cpu", dtype: str = "float32", **changes: Any) -> Problem:
        """The problem, the same for the same arguments: model, batch and initial values are seeded."""
        torch.manual_seed(0)
        return self.make(**{**getattr(self, size), **changes}).to(torch.device(device), getattr(torch, dtype))


def _images(model: nn.Module, batch: int, *shape: int, classes: int = 10) -> Problem:
    return Problem(model.train(), torch.randn(batch, *shape), torch.randint(classes, (batch,)))


def _mlp(widths: tuple[int, ...], batch: int) -> Problem:
    return _images(models.mlp(*widths), batch, widths[0], classes=widths[-1])


def _mnist(channels: int, batch: int) -> Problem:
    return _images(models.mnist_net(channels), batch, 1, 28, 28)


def _resnet(width: int, batch: int) -> Problem:
    return _images(resnet.small_resnet(width), batch, 3, 32, 32)


def _resnet50(image: int, batch: int, **size: Any) -> Problem:
    return _images(resnet.resnet50(**size), batch, 3, image, image)


def _ids(model: nn.Module, vocab: int, batch: int, length: int, classes: int | None) -> Problem:
    ids = torch.randint(vocab, (batch, length + 1))
    targets = ids[:, 1:] if classes is None else torch.randint(classes, (batch,))
    return Problem(model.train(), ids[:, :-1].contiguous(), targets.contiguous())


def _classifier(layers: int, width: int, length: int, batch: int, vocab: int = 4000, lora: int = 0) -> Problem:
    model = models.Transformer(
        vocab=vocab, width=width, layers=layers, positions=length, heads=max(1, width // 64), classes=10
    )
    return _ids(models.with_lora(model, lora) if lora else model, vocab, batch, length, 10)


def _lm(layers: int, width: int, length: int, batch: int, vocab: int = 8000) -> Problem:
    model = models.Transformer(vocab=vocab, width=width, layers=layers, positions=length, heads=max(1, width // 64))
    return _ids(model, vocab, batch, length, None)


def _gpt2(layers: int, width: int, length: int, batch: int, vocab: int) -> Problem:
    model = huggingface.gpt2(vocab=vocab, width=width, layers=layers, heads=max(1, width // 64), positions=length)
    return _ids(model, vocab, batch, length, None)


def _vit(layers: int, width: int, batch: int, image: int = 32, patch: int = 4, classes: int = 10) -> Problem:
    model = huggingface.vit(
        image=image, patch=patch, width=width, layers=layers, heads=max(1, width // 64), classes=classes
    )
    return _images(model, batch, 3, image, image, classes=classes)


def _lstm(features: int, hidden: int, length: int, batch: int) -> Problem:
    return _images(models.LSTMClassifier(features, hidden), batch, length, features)


def _textcnn(width: int, channels: int, length: int, batch: int, vocab: int) -> Problem:
    return _ids(models.TextCNN(vocab, width, channels), vocab, batch, length, 2)


CPU = [
    Workload("mlp", "MLP 784-1024-1024-10, B=256", _mlp,
             {"widths": (784, 1024, 1024, 10), "batch": 256}, {"widths": (20, 32, 32, 10), "batch": 8}),
    Workload("mlp16", "MLP 784-1024-1024-10, B=16", _mlp,
             {"widths": (784, 1024, 1024, 10), "batch": 16}, {"widths": (20, 32, 10), "batch": 4}),
    Workload("narrow", "50 layers of width 64, B=64", _mlp,
             {"widths": (64,) * 50 + (10,), "batch": 64}, {"widths": (8,) * 12 + (10,), "batch": 4}),
    Workload("mnist", "Opacus's MNIST net, B=256", _mnist, {"channels": 16, "batch": 256}, {"channels": 4, "batch": 4}),
    Workload("resnet", "ResNet with GroupNorm, 32x32, B=32", _resnet,
             {"width": 32, "batch": 32}, {"width": 8, "batch": 3}),
    Workload("classifier", "Transformer classifier, 4 layers d=256, T=128, B=16", _classifier,
             {"layers": 4, "width": 256, "length": 128, "batch": 16},
             {"layers": 1, "width": 16, "length": 6, "batch": 4, "vocab": 30}),
    Workload("lm", "Transformer LM, 4 layers d=384, vocabulary 8000, T=128, B=8", _lm,
             {"layers": 4, "width": 384, "length": 128, "batch": 8},
             {"layers": 1, "width": 16, "length": 6, "batch": 4, "vocab": 30}),
    Workload("lm512", "Transformer LM, 2 layers d=256, vocabulary 8000, T=512, B=4", _lm,
             {"layers": 2, "width": 256, "length": 512, "batch": 4},
             {"layers": 1, "width": 8, "length": 20, "batch": 2, "vocab": 30}),
    Workload("gpt2", "GPT-2 (transformers), 4 layers d=256, vocabulary 8000, T=128, B=8", _gpt2,
             {"layers": 4, "width": 256, "length": 128, "batch": 8, "vocab": 8000},
             {"layers": 1, "width": 16, "length": 6, "batch": 4, "vocab": 30}),
    Workload("vit", "ViT (transformers), 4 layers d=192, 32x32, patch 4, B=32", _vit,
             {"layers": 4, "width": 192, "batch": 32}, {"layers": 1, "width": 16, "batch": 3, "image": 8}),
    Workload("lora", "LoRA, rank 8, on the frozen classifier", _classifier,
             {"layers": 4, "width": 256, "length": 128, "batch": 16, "lora": 8},
             {"layers": 1, "width": 16, "length": 6, "batch": 4, "vocab": 30, "lora": 2}),
    Workload("lstm", "LSTM d=64, h=128, T=64, B=32 (Opacus: DPLSTM)", _lstm,
             {"features": 64, "hidden": 128, "length": 64, "batch": 32},
             {"features": 4, "hidden": 6, "length": 5, "batch": 3}),
    Workload("textcnn", "Text CNN, vocabulary 5000, d=128, 3x100 channels, T=128, B=64", _textcnn,
             {"width": 128, "channels": 100, "length": 128, "batch": 64, "vocab": 5000},
             {"width": 8, "channels": 6, "length": 12, "batch": 4, "vocab": 30}),
]  # fmt: skip

ACCELERATOR = [
    Workload("gpt2-small", "GPT-2 small (transformers), T=1024", _gpt2,
             {"layers": 12, "width": 768, "length": 1024, "batch": 8, "vocab": 50257},
             {"layers": 1, "width": 64, "length": 16, "batch": 2, "vocab": 50}, suite="accelerator"),
    Workload("vit-base", "ViT-B/16 (transformers), 224x224", _vit,
             {"layers": 12, "width": 768, "batch": 64, "image": 224, "patch": 16, "classes": 1000},
             {"layers": 1, "width": 64, "batch": 2, "image": 32, "patch": 16}, suite="accelerator"),
    Workload("resnet50", "ResNet-50 with GroupNorm, 224x224", _resnet50,
             {"image": 224, "batch": 64},
             {"image": 32, "batch": 2, "width": 8, "depths": (1, 1), "classes": 10}, suite="accelerator"),
    Workload("lm-1b-layer", "Transformer LM, 4 layers d=2048, vocabulary 32000, T=1024", _lm,
             {"layers": 4, "width": 2048, "length": 1024, "batch": 8, "vocab": 32000},
             {"layers": 1, "width": 16, "length": 6, "batch": 2, "vocab": 30}, suite="accelerator"),
]  # fmt: skip

WORKLOADS: dict[str, Workload] = {w.name: w for w in (*CPU, *ACCELERATOR)}
