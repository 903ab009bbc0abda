"""Residual networks with group normalisation: a small one for 32x32 images, and ResNet-50."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv(a: int, b: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, padding=size // 2, bias=False)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)


class Residual(nn.Module):
    """`relu(body(x) + shortcut(x))`; ``bottleneck`` chooses the three-layer body of ResNet-50 and deeper."""

    def __init__(self, a: int, b: int, stride: int, *, bottleneck: bool):
        super().__init__()
        if bottleneck:
            c = b // 4
            parts = [conv(a, c, 1), norm(c), nn.ReLU(), conv(c, c, 3, stride), norm(c), nn.ReLU()]
            parts += [conv(c, b, 1), norm(b)]
        else:
            parts = [conv(a, b, 3, stride), norm(b), nn.ReLU(), conv(b, b, 3), norm(b)]
        self.body = nn.Sequential(*parts)
        same = a == b and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(a, b, 1, stride), norm(b))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _stages(inner: int, widths: list[int], depths: list[int], *, bottleneck: bool) -> nn.Sequential:
    blocks = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            blocks.append(Residual(inner, width, 2 if i and not j else 1, bottleneck=bottleneck))
            inner = width
    return nn.Sequential(*blocks)


def small_resnet(width: int = 32, classes: int = 10) -> nn.Sequential:
    """`[B, 3, 32, 32]` to `[B, classes]`: three stages of one basic block."""
    widths = [width, 2 * width, 4 * width]
    return nn.Sequential(
        conv(3, width, 3), norm(width), nn.ReLU(), _stages(width, widths, [1, 1, 1], bottleneck=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes),
    )  # fmt: skip


def resnet50(width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> nn.Sequential:
    """`[B, 3, H, W]` to `[B, classes]`: He et al. 2015, batch normalisation replaced by group normalisation."""
    widths = [4 * width * 2**i for i in range(len(depths))]
    stages = _stages(width, widths, list(depths), bottleneck=True)
    return nn.Sequential(
        conv(3, width, 7, 2), norm(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1), stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes),
    )  # fmt: skip
