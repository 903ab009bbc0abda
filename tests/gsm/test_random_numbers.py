"""Random numbers that are settled do not depend on how many are drawn, and are such as could have been drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from gsm.random_numbers import TURNS, Settled, settled
from gsm.undisturbed import undisturbed

RATES = torch.tensor([0.25, 0.5, 0.125])

# What a sampling function gives for n rows, and the least and the largest of what is possible.
SAMPLING: dict[str, tuple[Callable[[int], Tensor], float, float]] = {
    "rand": (lambda n: torch.rand(n, 3), 0, 1),
    "rand_like": (lambda n: torch.rand_like(torch.ones(n, 3)), 0, 1),
    "randn": (lambda n: torch.randn(n, 3), -9, 9),
    "randn_like": (lambda n: torch.randn_like(torch.ones(n, 3)), -9, 9),
    "randint": (lambda n: torch.randint(4, 9, (n, 3)), 4, 8),
    "randint from 0": (lambda n: torch.randint(9, (n, 3)), 0, 8),
    "randint_like": (lambda n: torch.randint_like(torch.ones(n, 3), 2, 5), 2, 4),
    "random_": (lambda n: torch.ones(n, 3).random_(2, 7), 2, 6),
    "random_ from 0": (lambda n: torch.ones(n, 3).random_(7), 0, 6),
    "uniform_": (lambda n: torch.ones(n, 3).uniform_(2, 3), 2, 3),
    "normal": (lambda n: torch.normal(RATES.expand(n, 3), 1.0), -9, 9),
    "normal of two tensors": (lambda n: torch.normal(RATES.expand(n, 3), RATES.expand(n, 3)), -9, 9),
    "normal_": (lambda n: torch.ones(n, 3).normal_(2, 3), -30, 30),
    "log_normal_": (lambda n: torch.ones(n, 3).log_normal_(), 0, 1e4),
    "cauchy_": (lambda n: torch.ones(n, 3).cauchy_(), -1e9, 1e9),
    "exponential_": (lambda n: torch.ones(n, 3).exponential_(2.0), 0, 99),
    "geometric_": (lambda n: torch.ones(n, 3).geometric_(0.5), 1, 99),
    "bernoulli": (lambda n: torch.bernoulli(RATES.expand(n, 3)), 0, 1),
    "bernoulli of a rate": (lambda n: torch.bernoulli(torch.ones(n, 3), 0.3), 0, 1),
    "bernoulli_": (lambda n: torch.ones(n, 3).bernoulli_(RATES), 0, 1),
    "bernoulli_ of booleans": (lambda n: torch.ones(n, 3, dtype=torch.bool).bernoulli_(0.5), 0, 1),
    "poisson": (lambda n: torch.poisson(RATES.expand(n, 3)), 0, 99),
    "binomial": (lambda n: torch.binomial(torch.full((n, 3), 4.0), RATES.expand(n, 3)), 0, 4),
    "multinomial": (lambda n: torch.multinomial(RATES.expand(n, 3), 2, replacement=True), 0, 2),
    "gamma": (lambda n: torch._standard_gamma(RATES.expand(n, 3)), 0, 99),
    "dirichlet": (lambda n: torch._sample_dirichlet(RATES.expand(n, 3)), 0, 1),
    "of distributions": (lambda n: torch.distributions.Beta(RATES.expand(n, 3), 1.0).sample(), 0, 1),
    "gumbel softmax": (lambda n: nn.functional.gumbel_softmax(RATES.expand(n, 3)), 0, 1),
    "rrelu": (lambda n: nn.functional.rrelu(-RATES.expand(n, 3), training=True), -0.5 / 3, 0),
    "generator": (lambda n: torch.rand(n, 3, generator=torch.Generator().manual_seed(n)), 0, 1),
    "out": (lambda n: torch.rand(n, 3, out=torch.empty(n, 3)), 0, 1),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_settled_numbers_are_the_same_for_any_batch_size(name: str) -> None:
    draw, least, largest = SAMPLING[name]
    for turn in range(len(TURNS)):
        with settled(turn) as mode, mode:
            one, small, large = draw(1), draw(2), draw(5)
        assert small.shape[0] == 2 and large.shape[0] == 5
        assert all(torch.equal(row, large[0]) for row in (*one, *small, large[4]))
        assert all(torch.equal(row, large[2]) for row in large[1:4])
        assert least <= large.min() and large.max() <= largest
        assert draw(5).dtype == large.dtype


def test_settled_orders_are_orders() -> None:
    with Settled(0.1, 0.3):
        assert torch.randperm(7).tolist() == [1, 2, 3, 4, 5, 6, 0]


def test_what_is_drawn_for_the_batch_differs_with_its_size() -> None:
    """A maximum, a mean, one of its samples: else the number of samples would not show."""

    def at_an_end(index: Tensor, n: int) -> Tensor:
        return (index == 0) | (index == n - 1)

    draws: list[Callable[[int], Tensor]] = [
        lambda n: torch.randn(n).max(),
        lambda n: torch.rand(n, 3).mean(0),
        lambda n: torch.randn(n)[0] - torch.randn(n).mean(),
        lambda n: at_an_end(torch.randint(n, ()), n),
        lambda n: at_an_end(torch.randint(n, (n,))[-1], n),
        lambda n: at_an_end(torch.randperm(n)[0], n),
        lambda n: at_an_end(torch.multinomial(torch.ones(n), 1), n),
    ]
    for draw in draws:
        with Settled(0.3, 0.9):
            assert not torch.equal(draw(2), draw(3))


def test_coins_fall_on_either_side() -> None:
    sides = set()
    for turn in range(len(TURNS)):
        with settled(turn) as mode, mode:
            sides.add((bool(torch.rand(()) < 0.5), bool(torch.bernoulli(torch.tensor(0.5)))))
    assert len(sides) == 2
    assert {random.Random(turn).random() < 0.5 for turn in range(len(TURNS))} == {True, False}


def test_nothing_else_is_settled() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with Settled(0.1, 0.3):
        assert torch.equal((x @ x.t()).relu().sum(), (x @ x.t()).relu().sum())
        assert torch.equal(x.detach().clone().zero_(), torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["poisson", "binomial", "gamma", "dirichlet"])
def test_with_the_same_random_state_the_numbers_of_other_samples_change_none(name: str) -> None:
    """A sampler that rejects takes as many numbers as the sample needs: those after it would get others."""
    kinds = {"poisson": torch.poisson, "gamma": torch._standard_gamma, "dirichlet": torch._sample_dirichlet}
    draw = kinds.get(name, lambda p: torch.binomial(torch.full_like(p, 50.0), p))
    rows = torch.tensor([[[0.3, 0.4], [0.2, 0.7]], [[0.9, 0.1], [0.2, 0.7]]]) * (30 if name == "poisson" else 1)
    seen = []
    for row in rows:
        with undisturbed(nn.Identity()), Settled():
            seen.append(torch.cat([draw(row), torch.rand(2, 2)]))
    assert torch.equal(seen[0][1:], seen[1][1:]) and len(seen[0][2:].unique()) == 4


def test_numbers_of_python_and_numpy_are_the_same_at_every_call_and_go_on_afterwards() -> None:
    def two() -> list[float]:
        return [random.random(), numpy.random.rand()]

    random.seed(5)
    numpy.random.seed(5)
    expected = two(), two()
    random.seed(5)
    numpy.random.seed(5)
    function = numpy.random.rand
    with settled(1):
        first = two()
        assert two() == two() == first
    with settled(2):
        assert two() != first
    assert numpy.random.rand is function
    assert (two(), two()) == expected


class Own(nn.Module):
    def __init__(self, generator: Any):
        super().__init__()
        self.generator = generator


@pytest.mark.parametrize(
    "generator",
    [random.Random(3), numpy.random.default_rng(3), numpy.random.RandomState(3)],
    ids=["Random", "Generator", "RandomState"],
)
def test_generators_that_a_model_holds_are_put_back(generator: Any) -> None:
    model = Own(generator)
    with undisturbed(model) as numbers:
        assert not numbers.drawn()
        first = model.generator.random()
        assert numbers.drawn()
    assert model.generator.random() == first
