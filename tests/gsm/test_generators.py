"""Where a generator stands, and that it never goes back."""

from __future__ import annotations

import pytest
import torch

from gsm.generators import BLOCKS, Used


def use(used: Used, generator: torch.Generator, n: int) -> bool:
    """Takes n numbers, unless they were used; whether they were."""
    if used.holds(generator):
        return True
    torch.rand(n, generator=generator)
    used.add(generator)
    return False


@pytest.mark.parametrize("n", [1, 600, 5000, 624 * BLOCKS + 10])
@pytest.mark.parametrize("between", [0, 1, 623, 624, 3000])
def test_a_seed_brings_back_what_was_used(n: int, between: int) -> None:
    used, generator = Used(), torch.Generator().manual_seed(3)
    assert not use(used, generator, n)
    assert not use(used, generator, n)
    generator.manual_seed(3)
    torch.rand(between, generator=generator)
    assert use(used, generator, n) == (between < 2 * n)


def test_what_is_used_is_free_also_where_numbers_are_doubles_by_default() -> None:
    torch.set_default_dtype(torch.float64)  # a double is made of two numbers
    try:
        used, generator = Used(), torch.Generator().manual_seed(3)
        assert not any(use(used, generator, 100) for _ in range(60))
        generator.manual_seed(3)
        assert use(used, generator, 100)
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_seeds_give_other_numbers() -> None:
    used, generator = Used(), torch.Generator()
    for seed in (0, 1, 2):
        generator.manual_seed(seed)
        assert not use(used, generator, 10)
    generator.manual_seed(1)
    assert use(used, generator, 10)


def test_far_behind_a_seed_exactly_the_same_state_is_recognised() -> None:
    used, generator = Used(), torch.Generator()
    for again in (False, True):
        generator.manual_seed(0)
        torch.rand(624 * (BLOCKS + 5), generator=generator)
        assert use(used, generator, 10) == again


def test_a_state_put_back_is_recognised() -> None:
    used, generator = Used(), torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert not use(used, generator, 10)
    generator.set_state(state)
    assert use(used, generator, 10)


def test_what_was_drawn_for_something_else_is_free() -> None:
    used, generator = Used(), torch.Generator().manual_seed(0)
    for _ in range(300):
        torch.rand(100, generator=generator)
        assert not use(used, generator, 100)


def test_generators_that_take_turns_are_each_recognised() -> None:
    used = Used()
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    for _ in range(2):
        for generator in generators:
            assert not use(used, generator, 10)
    for seed in range(6):
        assert use(used, torch.Generator().manual_seed(seed), 10)
