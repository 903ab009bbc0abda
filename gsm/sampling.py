"""Poisson sampling: which records are in a batch.

Formal guarantee. Every record is in every batch independently of all other records and batches, with probability
``floor(q * 2**62) / 2**62``: at most the sample rate ``q`` and less than ``2**-62`` below it. The privacy of the
subsampled Gaussian mechanism improves as the sampling probability falls, so an accountant that charges ``q`` is on
the safe side. Assumption: the random source delivers independent uniform 64-bit words (a pseudo-random generator by
default, the operating system's cryptographic one with ``secure_mode=True``).

A comparison with 24-bit uniform floats alone, ``torch.rand(n) < q``, includes records with a probability that is a
multiple of ``2**-24``, rounded up: at ``q = 1e-7`` that is 19% more than what the accountant is told. Here those 24
bits are the leading ones, and the record whose bits equal the rate's draws 38 more. So a seeded generator gives the
batches that Opacus draws from it, but for such ties (one record in 17 million), and at tiny rates, where they decide.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler

from gsm.generators import Used

AGAIN = (
    "The generator of the sampling is where it was at an earlier batch or pass (it was seeded anew?), so the same "
    "batches are drawn again. The accountant takes every batch for a fresh Poisson sample: if both train, its epsilon "
    "is too small. Seed once, before the first pass; what only looks at the batches does no harm."
)
BITS = 62
LEADING = 24  # bits of a float32 uniform number
CHUNK = 1 << 20  # records decided at a time, so that a huge dataset needs 8 MiB and not 8 bytes per record


def inclusion_threshold(sample_rate: float) -> int:
    """The integer ``t`` such that a uniform ``BITS``-bit word is below ``t`` with the largest probability <= the rate.

    Args:
        sample_rate: probability in (0, 1].

    Raises:
        ValueError: the rate is not in (0, 1], or so small that no record would ever be drawn.
    """
    if not 0.0 < sample_rate <= 1.0:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
    threshold = int(math.ldexp(sample_rate, BITS))  # the scaling is exact, int() rounds down
    if threshold == 0:
        raise ValueError(f"sample_rate {sample_rate} is below 2**-{BITS}: no record would ever be sampled")
    return threshold


def steps_per_epoch(sample_rate: float) -> int:
    """``int(1 / sample_rate)`` batches, as in Opacus, without its loss of one batch at rates such as 1/49."""
    steps = 1.0 / sample_rate
    nearest = round(steps)
    return nearest if math.isclose(steps, nearest, rel_tol=1e-12) else int(steps)


class Words:
    """A source of independent uniform ``BITS``-bit integers, one per record.

    Args:
        generator: source of the words; None is torch's global one.
        secure_mode: take them from ``os.urandom`` instead.

    Raises:
        ValueError: a generator and ``secure_mode`` together.
    """

    def __init__(self, generator: torch.Generator | None = None, secure_mode: bool = False) -> None:
        if secure_mode and generator is not None:
            raise ValueError("secure_mode draws from the operating system: it takes no generator")
        self.generator, self.secure_mode = generator, secure_mode

    def draw(self, count: int) -> np.ndarray:
        """``[count]`` int64 words."""
        if self.secure_mode:
            raw = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
            return (raw >> np.uint64(64 - BITS)).astype(np.int64)
        device = self.generator.device if self.generator is not None else "cpu"
        words = torch.randint(1 << BITS, (count,), generator=self.generator, device=device, dtype=torch.int64)
        return words.cpu().numpy()

    def below(self, count: int, threshold: int) -> np.ndarray:
        """``[count]`` booleans: whether each of ``count`` new words is below ``threshold`` (at most ``2**BITS``)."""
        if self.secure_mode or (self.generator is not None and self.generator.device.type != "cpu"):
            return self.draw(count) < threshold
        high, low = divmod(threshold, 1 << (BITS - LEADING))
        uniform = torch.rand(count, generator=self.generator, dtype=torch.float32).numpy()
        leading = np.ldexp(uniform, LEADING)  # whole numbers, exact in float32
        mask = leading < high
        ties = np.flatnonzero(leading == high)
        if len(ties):
            rest = torch.randint(1 << (BITS - LEADING), (len(ties),), generator=self.generator, dtype=torch.int64)
            mask[ties] = rest.numpy() < low
        return mask

    def again(self, begun: set[int]) -> bool:
        """Whether the generator is where it was at one of the places ``begun``, to which this one is added."""
        if self.secure_mode:
            return False
        place = hash((self.generator or torch.default_generator).get_state().numpy().tobytes())
        found = place in begun
        begun.add(place)
        return found

    def fork(self, key: int) -> Words:
        """An independent source for ``key``: other keys, and other forks of the same key, give other words.

        Equal seeds on every rank (``torch.manual_seed(0)`` in each) are common in distributed scripts. Records drawn
        with equal words would enter together, and the accountant assumes that they enter independently.
        """
        if self.secure_mode:
            return self
        seed = int(self.draw(1)[0])
        return _PhiloxWords(np.random.Philox(np.random.SeedSequence([seed, key])))


class _PhiloxWords(Words):
    def __init__(self, bits: np.random.Philox) -> None:
        super().__init__()
        self.bits = bits

    def below(self, count: int, threshold: int) -> np.ndarray:
        return self.draw(count) < threshold

    def draw(self, count: int) -> np.ndarray:
        return (self.bits.random_raw(count) >> np.uint64(64 - BITS)).astype(np.int64)


@contextmanager
def drawn_once(used: Used | None, words: Words) -> Iterator[None]:
    """Warns if the numbers drawn inside were drawn before, as far as ``used`` knows, and lets it know of them."""
    if used is None or words.secure_mode:
        yield
        return
    generator = words.generator or torch.default_generator
    if used.holds(generator):
        warnings.warn(AGAIN, stacklevel=2)
    yield
    used.add(generator)


def words_of(sampler: PoissonSampler | DistributedPoissonSampler) -> Words:
    """Where its batches come from. A copy in another process (after a fork, or sent there) would draw the same ones."""
    if sampler._process != os.getpid():
        sampler.refresh()
        sampler._process = os.getpid()
    return Words(sampler.generator, sampler.secure_mode)


def poisson_batch(words: Words, population: int, threshold: int) -> np.ndarray:
    """Indices of one Poisson batch out of ``population`` records, ascending; empty if nobody was drawn."""
    drawn = []
    for start in range(0, population, CHUNK):
        mask = words.below(min(CHUNK, population - start), threshold)
        drawn.append(np.flatnonzero(mask) + start)
    return np.concatenate(drawn)


class PoissonSampler(UniformWithReplacementSampler):
    """Batches of record indices, each record drawn independently with probability ``sample_rate``.

    Args:
        num_samples: number of records, > 0.
        sample_rate: inclusion probability, in (0, 1]; see the module's guarantee.
        generator: source of randomness; None is torch's global generator.
        steps: batches per iteration; by default ``int(1 / sample_rate)``.
        secure_mode: draw from the operating system's cryptographic generator.

    Example:
        >>> sampler = PoissonSampler(num_samples=60_000, sample_rate=0.01)
        >>> len(sampler)
        100
    """

    #: How many batches were drawn so far, those fetched ahead of time included.
    drawn = 0
    #: Where the size of every batch is noted, if a loader wants to know.
    sizes: deque[int] | None = None
    #: The random numbers that may not come again, if somebody keeps the account of them.
    used: Used | None = None

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        secure_mode: bool = False,
    ) -> None:
        if num_samples <= 0:
            raise ValueError(f"num_samples must be a positive number of records (empty dataset?), got {num_samples}")
        self.num_samples, self.sample_rate = num_samples, sample_rate
        self.threshold = inclusion_threshold(sample_rate)
        self.generator, self.secure_mode, self._process = generator, secure_mode, os.getpid()
        self.steps = steps_per_epoch(sample_rate) if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def refresh(self) -> None:
        """Draw from the operating system from here on: a resumed run must not draw an earlier run's batches again."""
        self.generator, self.secure_mode = None, True

    def __iter__(self) -> Iterator[list[int]]:
        sizes, begun = self.sizes, set[int]()
        for step in range(self.steps):
            words = words_of(self)  # for every batch: the generator may have been switched
            if self.used is not None and words.again(begun):
                warnings.warn(AGAIN, stacklevel=2)
            with drawn_once(self.used if step == 0 else None, words):  # once per pass: it takes its time
                chosen = poisson_batch(words, self.num_samples, self.threshold)
            self.drawn += 1
            if sizes is not None:
                sizes.append(len(chosen))
            yield chosen.tolist()


class DistributedPoissonSampler(DistributedUniformWithReplacementSampler):
    """This rank's share of a Poisson batch: each rank draws from its own shard, independently of the others.

    The union over the ranks is one Poisson sample of the whole dataset at ``sample_rate``. Shards are disjoint and
    cover the dataset; the ranks' random words are independent even where all ranks were given the same seed
    (``Words.fork``). A rank that draws nobody yields an empty batch, so that all ranks take the same number of steps.

    Args:
        total_size: number of records over all ranks, > 0.
        sample_rate: inclusion probability, in (0, 1].
        shuffle, shuffle_seed: cut the shards from a permutation that depends on the seed and the epoch only; they
            must be the same on every rank.
        steps: batches per iteration; by default ``int(1 / sample_rate)``.
        generator, secure_mode: as for :class:`PoissonSampler`.
    """

    #: How many batches were drawn so far, those fetched ahead of time included.
    drawn = 0
    #: Where the size of every batch is noted, if a loader wants to know.
    sizes: deque[int] | None = None
    #: The random numbers that may not come again, if somebody keeps the account of them.
    used: Used | None = None

    def __init__(
        self,
        *,
        total_size: int,
        sample_rate: float,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        if total_size <= 0:
            raise ValueError(f"total_size must be a positive number of records (empty dataset?), got {total_size}")
        self.total_size, self.sample_rate = total_size, sample_rate
        self.threshold = inclusion_threshold(sample_rate)
        self.generator, self.secure_mode, self._process = generator, secure_mode, os.getpid()
        self.num_replicas, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.shuffle, self.shuffle_seed, self.epoch = shuffle, shuffle_seed, 0
        self.num_samples = len(range(self.rank, total_size, self.num_replicas))
        self.num_batches = steps_per_epoch(sample_rate) if steps is None else steps

    def __len__(self) -> int:
        return self.num_batches

    def refresh(self) -> None:
        """Draw from the operating system from here on: a resumed run must not draw an earlier run's batches again."""
        self.generator, self.secure_mode = None, True

    def shard(self) -> np.ndarray:
        """Indices of the records this rank draws from in the current epoch."""
        order = np.arange(self.total_size)
        if self.shuffle:
            order = np.random.default_rng([self.shuffle_seed, self.epoch]).permutation(self.total_size)
        return order[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[torch.Tensor]:
        shard = self.shard()
        source = words_of(self)
        with drawn_once(self.used, source):
            words = source.fork(self.rank)
        sizes = self.sizes
        for _ in range(self.num_batches):
            chosen = shard[poisson_batch(words, self.num_samples, self.threshold)] if len(shard) else shard
            self.drawn += 1
            if sizes is not None:
                sizes.append(len(chosen))
            yield torch.from_numpy(chosen)
