"""Which of a generator's numbers were used: seeding it again brings back those that it has given before."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Generator

#: So many blocks after a seed are told apart by their place; beyond them only whole states are.
BLOCKS = 64
_SEEDS = 4  # of which the blocks are remembered at a time
_IN_A_BLOCK = 624  # numbers that a Mersenne twister (a CPU's generator) makes at a time
_STATE = len(Generator().get_state())

Place = tuple[float, int]


class Used:
    """The numbers that were used of a generator, however often it is seeded in between.

    A CPU's generator gives one fixed sequence for each seed: as long as it is within its first 64 blocks of 624
    numbers, its place in that sequence is known, and must lie behind all that was used of it. Further on, and for
    other generators, a state is recognised if the use of numbers began at exactly the same before. Generators that
    were given the same seed give the same numbers, so for all who share a ``Used`` they count as one.

    Example:
        >>> used, generator = Used(), torch.Generator().manual_seed(0)
        >>> used.holds(generator), used.add(generator)
        (False, None)
    """

    def __init__(self) -> None:
        self._reached: dict[int, Place] = {}  # by seed
        self._begun: set[bytes] = set()
        self._blocks: dict[int, dict[bytes, int]] = {}  # by seed

    def holds(self, generator: Generator) -> bool:
        """Whether numbers that the generator gives next were used before."""
        state = _bytes(generator)
        place = self._place(generator.initial_seed(), state)
        if place[0] == math.inf:
            digest = _digest(state)
            if digest in self._begun:
                return True
            self._begun.add(digest)
        return place < self._reached.get(generator.initial_seed(), (0, 0))

    def add(self, generator: Generator) -> None:
        """Marks as used whatever the generator gave up to here."""
        seed = generator.initial_seed()
        place = self._place(seed, _bytes(generator))
        self._reached[seed] = max(place, self._reached.get(seed, (0, 0))) if place[0] < math.inf else (math.inf, 0)

    def _place(self, seed: int, state: bytes) -> Place:
        """The block, counted from the seed (infinity beyond those that are known), and what is used of it."""
        if len(state) != _STATE:
            return math.inf, 0
        if seed not in self._blocks:
            if len(self._blocks) == _SEEDS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[seed] = _blocks(seed)
        used = int.from_bytes(state[16:24], "little")
        return self._blocks[seed].get(_numbers(state), math.inf), used


def _blocks(seed: int) -> dict[bytes, int]:
    """The numbers that a CPU's generator has in store before the first one, and in the blocks after the seed."""
    generator = Generator().manual_seed(seed)
    found = {_numbers(_bytes(generator)): 0}
    for block in range(1, BLOCKS + 1):
        torch.rand(1, generator=generator, dtype=torch.float32)  # one number; a double is made of two
        found[_numbers(_bytes(generator))] = block
        torch.rand(_IN_A_BLOCK - 1, generator=generator, dtype=torch.float32)
    return found


def _bytes(generator: Generator) -> bytes:
    return bytes(generator.get_state().numpy().tobytes())


def _numbers(state: bytes) -> bytes:
    return _digest(state[24 : 24 + 8 * _IN_A_BLOCK])


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
