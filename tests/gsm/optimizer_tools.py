"""Parameters with hand-made per-sample gradients: the optimizer's tests need no model."""

import torch
from torch import nn

from gsm.optimizer import DPOptimizer

SHAPES = [(3, 2), (4,), ()]


def parameters(shapes=SHAPES, dtype=torch.float64):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad_sample = None  # what a wrapper leaves on every parameter it captures
    return params


def gradients(params, batch, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(batch, *p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def deliver(params, grads):
    """What one backward pass of a wrapped model does."""
    for p, g in zip(params, grads, strict=True):
        if p.grad_sample is None:
            p.grad_sample = g
        else:
            held = p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]
            p.grad_sample = [*held, g]


def private(params, *, lr=1.0, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1, **options):
    """SGD with learning rate 1 and a batch size of 1: an update is minus the released sum."""
    inner = torch.optim.SGD(params, lr=lr)
    return DPOptimizer(
        inner,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        **options,
    )


def norms(grads):
    """``[batch]`` norms over all parameters."""
    return torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in grads]).sum(0).sqrt()


def clipped_sum(grads, bound=1.0):
    """The reference: a loop of one sample at a time."""
    out = [torch.zeros_like(g[0]) for g in grads]
    for i in range(len(grads[0])):
        norm = sum(g[i].square().sum() for g in grads).sqrt()
        for total, g in zip(out, grads, strict=True):
            total += g[i] * min(1.0, bound / norm.item())
    return out


class Spy:
    """An accountant, and a noise part, that only remember what they were told."""

    def __init__(self):
        self.charges = []
        self.stds = []
        self.sensitivities = []

    def step(self, *, noise_multiplier, sample_rate):
        self.charges.append((noise_multiplier, sample_rate))

    def add_(self, tensors, std, sensitivity):
        self.stds.append(std)
        self.sensitivities.append(sensitivity)

    def refresh(self):
        self.refreshed = True
