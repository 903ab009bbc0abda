"""The models of the suite: ordinary PyTorch, nothing in them knows that it will be trained privately.

Position ids are given one row per sample, because some of the peers need it; attention is written with `nn.Linear` and
`scaled_dot_product_attention` for the same reason.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mnist_net(channels: int = 16) -> nn.Sequential:
    """The convolutional network of Opacus's MNIST example: `[B, 1, 28, 28]` to `[B, 10]`."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(channels, 2 * channels, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * channels, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Block(nn.Module):
    """A pre-norm transformer block, `[B, T, width]` to the same."""

    def __init__(self, width: int, heads: int, *, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Token ids `[B, T]` to logits: `[B, classes]` of the mean over positions, or `[B, T, vocab]` if none."""

    def __init__(self, *, vocab: int, width: int, layers: int, positions: int, heads: int, classes: int | None = None):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=classes is None) for _ in range(layers)))
        self.norm, self.classes = nn.LayerNorm(width), classes
        self.head = nn.Linear(width, vocab if classes is None else classes)

    def forward(self, ids: Tensor) -> Tensor:
        # One dense row of places per sample: Opacus's ghost norm of an embedding takes nothing else.
        places = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        x = self.norm(self.blocks(self.token(ids) + self.position(places)))
        return self.head(x if self.classes is None else x.mean(1))


class LowRank(nn.Module):
    """A frozen linear layer plus a trainable one of rank r (LoRA, Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: Transformer, rank: int) -> Transformer:
    """Freezes a classifier except its head, and puts adapters beside all linear layers of its blocks."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        for name in ("qkv", "proj", "up", "down"):
            setattr(block, name, LowRank(getattr(block, name), rank))
    return model


class LSTMClassifier(nn.Module):
    """`[B, T, features]` to `[B, classes]` from the last output of one `nn.LSTM` layer."""

    def __init__(self, features: int, hidden: int, classes: int = 10):
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, hidden, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TextCNN(nn.Module):
    """Token ids `[B, T]` to `[B, classes]`: convolutions of three widths, maximum over time (Kim 2014)."""

    def __init__(self, vocab: int, width: int, channels: int, classes: int = 2):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, k) for k in (3, 4, 5))
        self.head = nn.Linear(3 * channels, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1))
