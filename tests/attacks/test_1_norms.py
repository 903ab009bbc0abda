"""Class 1: the norm is not the gradient's norm. What clips must see all of a sample's gradient, and only its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compare import check

MODES = ["hooks", "ghost"]


class Parts(nn.Module):
    """One module per situation; ``run(self, *inputs)`` is its forward."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs):
        return self.run(self, *inputs)


IDS = torch.tensor([[1, 1, 1, 2], [0, 3, 3, 0], [2, 2, 1, 1], [0, 0, 0, 0], [3, 1, 2, 0], [1, 0, 1, 0]])
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
SEQ = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(2))


def tied():
    model = Parts(lambda m, ids: m.head(m.embed(ids)), embed=nn.Embedding(4, 4), head=nn.Linear(4, 4, bias=False))
    model.head.weight = model.embed.weight
    return model


SITUATIONS = {
    "padding mode of a convolution": (lambda: nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"), (SEQ,)),
    "groups, stride and dilation": (lambda: nn.Conv1d(3, 6, 2, groups=3, stride=2, dilation=1), (SEQ,)),
    "padding_idx": (lambda: nn.Embedding(4, 3, padding_idx=0), (IDS,)),
    "repeated indices": (lambda: nn.Embedding(4, 3), (IDS,)),
    "repeated indices in a bag": (lambda: nn.EmbeddingBag(4, 3, mode="mean"), (IDS,)),
    "a second input": (lambda: nn.Bilinear(4, 4, 2), (X, X.flip(1))),
    "keys and values": (lambda: Parts(lambda m, q: m.a(q, q * 2, q - 1)[0],
                                      a=nn.MultiheadAttention(4, 2, batch_first=True)), (SEQ,)),
    "a layer called twice": (lambda: Parts(lambda m, x: m.l(torch.tanh(m.l(x))), l=nn.Linear(4, 4)), (X,)),
    "embedding tied to the output": (tied, (IDS,)),
    "a weight used by a function too": (lambda: Parts(lambda m, x: m.l(x) + F.linear(x.tanh(), m.l.weight),
                                                      l=nn.Linear(4, 4)), (X,)),
    "a bare parameter added": (lambda: Parts(lambda m, x: m.l(x) + m.p, l=nn.Linear(4, 2),
                                             p=nn.Parameter(torch.randn(2))), (X,)),
    "positions without a batch dimension": (lambda: Parts(
        lambda m, x: x + m.e(torch.arange(3)[None]), e=nn.Embedding(3, 4)), (SEQ,)),
    "as many positions as samples": (lambda: Parts(lambda m, x: m.l(x), l=nn.Linear(4, 2)), (SEQ[:3],)),
    "a token for every sample": (lambda: Parts(lambda m, x: m.l(torch.cat([m.t.expand(len(x), 1, 4), x], 1)),
                                               l=nn.Linear(4, 2), t=nn.Parameter(torch.randn(1, 1, 4))), (SEQ,)),
    "a sum over samples' own positions only": (lambda: Parts(lambda m, x: m.l(x).sum(1), l=nn.Linear(4, 2)), (SEQ,)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_norm_is_that_of_the_loop(name, mode):
    """Guards: ``supports`` of the samplers, the tracked parameters, exact norms of shared ones, the probe's layouts."""
    torch.manual_seed(0)
    make, inputs = SITUATIONS[name]
    check(make(), inputs, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_with_a_forward_of_its_own_is_not_its_parent(mode):
    """Guard: ``grad_samplers.lookup`` compares forwards; without it the factor 3 is missing from every norm."""

    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * F.linear(x, self.weight, self.bias)

    check(Tripled(4, 2), (X,), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_summed_over_the_batch_before_it_arrives(mode):
    """Guard: a bias made from one parameter for all samples is expanded per sample (or its subtree is)."""
    model = Parts(lambda m, x: F.linear(x, m.l.weight, (m.p * 2).tanh()), l=nn.Linear(4, 2, bias=False),
                  p=nn.Parameter(torch.randn(2)))  # fmt: skip
    check(model, (X,), mode=mode)
