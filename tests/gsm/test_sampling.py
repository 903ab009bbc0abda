"""Poisson sampling: exact rates, independence, steps per epoch, ranks, errors."""

import json
import math
import os
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from gsm.sampling import (
    BITS,
    LEADING,
    DistributedPoissonSampler,
    PoissonSampler,
    Words,
    inclusion_threshold,
    poisson_batch,
    steps_per_epoch,
)


@given(st.floats(min_value=1e-12, max_value=1.0))
def test_inclusion_probability_is_within_2_to_minus_53_below_the_rate(rate):
    probability = Fraction(inclusion_threshold(rate), 1 << BITS)
    assert Fraction(rate) - Fraction(1, 2**53) < probability <= Fraction(rate)


class FixedWords(Words):
    """Words at chosen places, to see on which side of the threshold each falls."""

    def __init__(self, words):
        super().__init__()
        self.words = np.asarray(words, dtype=np.int64)

    def below(self, count, threshold):
        head, self.words = self.words[:count], self.words[count:]
        return head < threshold


@pytest.mark.parametrize("rate", [1e-9, 1e-3, 0.5, 1.0])
def test_a_record_is_drawn_exactly_below_the_threshold(rate):
    threshold = inclusion_threshold(rate)
    words = [0, threshold - 1, min(threshold, (1 << BITS) - 1), (1 << BITS) - 1]
    drawn = poisson_batch(FixedWords(words), 4, threshold).tolist()
    assert drawn == ([0, 1, 2, 3] if rate == 1.0 else [0, 1])


@pytest.mark.parametrize("rate", [1e-9, 1e-7, 0.3, 1 - 2**-30, 1.0])
def test_leading_bits_and_ties_make_one_exact_comparison(monkeypatch, rate):
    """Words given as leading and remaining bits, around the threshold, against integers compared as a whole."""
    threshold, rest_bits = inclusion_threshold(rate), BITS - LEADING
    top, rest = (1 << LEADING) - 1, (1 << rest_bits) - 1
    leads = sorted({0, 1, top, *(min(max((threshold >> rest_bits) + d, 0), top) for d in (-1, 0, 1))})
    lows = sorted({0, rest, *(min(max((threshold & rest) + d, 0), rest) for d in (-1, 0, 1))})
    for low in lows:
        monkeypatch.setattr(torch, "rand", lambda n, **_: torch.tensor(leads, dtype=torch.float32) / 2**LEADING)
        monkeypatch.setattr(torch, "randint", lambda high, shape, low=low, **_: torch.full(shape, low))
        found = Words().below(len(leads), threshold).tolist()
        monkeypatch.undo()
        assert found == [(lead << rest_bits) + low < threshold for lead in leads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_draws_the_batches_that_opacus_draws(dtype):
    def batches(cls):
        return list(cls(num_samples=500, sample_rate=0.02, generator=torch.Generator().manual_seed(4)))

    theirs = batches(UniformWithReplacementSampler)
    torch.set_default_dtype(dtype)  # must not make the comparison coarser
    try:
        ours = batches(PoissonSampler)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours == theirs and sum(map(len, ours)) > 300


def test_chunks_are_joined_without_a_gap(monkeypatch):
    monkeypatch.setattr("gsm.sampling.CHUNK", 7)
    words = [0 if i % 3 == 0 else (1 << BITS) - 1 for i in range(40)]
    assert poisson_batch(FixedWords(words), 40, inclusion_threshold(0.5)).tolist() == list(range(0, 40, 3))


@pytest.mark.parametrize("secure_mode", [False, True])
def test_words_are_uniform_over_all_bits(secure_mode):
    words = Words(secure_mode=secure_mode).draw(200_000)
    assert words.min() >= 0 and words.max() < 1 << BITS
    for bit in range(BITS):
        share = float(((words >> bit) & 1).mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(words)), f"bit {bit}: {share}"


@pytest.mark.parametrize("secure_mode", [False, True])
def test_batch_sizes_are_binomial_and_records_independent(secure_mode):
    n, q, steps = 50, 0.2, 4000
    sampler = PoissonSampler(num_samples=n, sample_rate=q, steps=steps, secure_mode=secure_mode)
    drawn = np.zeros((steps, n))
    for row, batch in zip(drawn, sampler, strict=True):
        row[batch] = 1
    sizes = drawn.sum(axis=1)
    assert abs(sizes.mean() - n * q) < 5 * math.sqrt(n * q * (1 - q) / steps)
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 5 * math.sqrt(2 / steps)
    correlation = np.corrcoef(drawn.T) - np.eye(n)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(steps)
    across_steps = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(across_steps) < 5 / math.sqrt(drawn.size)


def test_tiny_rates_are_not_rounded_up():
    # torch.rand(n) < 1e-8 is true with probability 2**-24 = 6e-8: six times the rate, 120 records expected here.
    sampler = PoissonSampler(num_samples=1_000_000, sample_rate=1e-8, steps=20)
    assert sum(len(batch) for batch in sampler) <= 4  # 0.2 expected; P(> 4) < 3e-6


def test_rate_one_draws_everybody():
    assert next(iter(PoissonSampler(num_samples=9, sample_rate=1.0))) == list(range(9))


def test_generator_reproduces_and_advances():
    def batches(seed):
        sampler = PoissonSampler(num_samples=30, sample_rate=0.1, generator=torch.Generator().manual_seed(seed))
        return list(sampler), list(sampler)

    assert batches(3) == batches(3)
    assert batches(3) != batches(4)
    first, second = batches(3)
    assert first != second


def test_secure_mode_ignores_the_seed():
    def draw():
        torch.manual_seed(0)
        return list(PoissonSampler(num_samples=500, sample_rate=0.3, secure_mode=True))

    assert draw() != draw()


def test_steps_per_epoch():
    for batches in range(1, 3000):
        assert steps_per_epoch(1 / batches) == batches
    assert steps_per_epoch(0.3) == 3  # as Opacus: int(1 / q)
    assert len(PoissonSampler(num_samples=5, sample_rate=0.3)) == 3
    assert isinstance(PoissonSampler(num_samples=5, sample_rate=0.3), UniformWithReplacementSampler)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_the_unit_interval_is_named(rate):
    with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\]"):
        PoissonSampler(num_samples=5, sample_rate=rate)


def test_other_errors():
    with pytest.raises(ValueError, match="no record would ever be sampled"):
        PoissonSampler(num_samples=5, sample_rate=1e-30)
    with pytest.raises(ValueError, match="positive number of records"):
        PoissonSampler(num_samples=0, sample_rate=0.1)
    with pytest.raises(ValueError, match="takes no generator"):
        Words(torch.Generator(), secure_mode=True)


def ranks(monkeypatch, world, seeds, **options):
    """One sampler per rank, as separate processes would build them."""
    samplers = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        samplers.append(DistributedPoissonSampler(generator=torch.Generator().manual_seed(seeds[rank]), **options))
    return samplers


def test_shards_are_disjoint_and_cover_everybody(monkeypatch):
    samplers = ranks(monkeypatch, 3, [1, 2, 3], total_size=20, sample_rate=0.1)
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        assert sorted(np.concatenate([s.shard() for s in samplers]).tolist()) == list(range(20))
    assert [s.num_samples for s in samplers] == [7, 7, 6]


@pytest.mark.parametrize("seeds", [[5, 5], [5, 6]])
def test_ranks_together_are_one_poisson_sample_even_with_equal_seeds(monkeypatch, seeds):
    n, q, steps = 40, 0.25, 4000
    samplers = ranks(monkeypatch, 2, seeds, total_size=n, sample_rate=q, steps=steps)
    drawn = np.zeros((steps, n))
    counts: Counter = Counter()
    for sampler in samplers:
        for row, batch in zip(drawn, sampler, strict=True):
            row[batch.numpy()] += 1
            counts[len(batch)] += 1
    assert drawn.max() == 1
    assert abs(drawn.mean() - q) < 5 * math.sqrt(q * (1 - q) / drawn.size)
    correlation = np.corrcoef(drawn.T) - np.eye(n)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(steps)  # equal words on two ranks would give 1.0
    assert counts[0] > 0  # a rank that draws nobody still yields, so that all ranks step together


def test_more_ranks_than_records(monkeypatch):
    samplers = ranks(monkeypatch, 3, [0, 0, 0], total_size=2, sample_rate=0.5)
    assert [len(list(s)) for s in samplers] == [2, 2, 2]


def test_a_rank_draws_other_batches_in_every_epoch(monkeypatch):
    """Equal draws in two epochs would not be independent samples."""
    (sampler,) = ranks(monkeypatch, 1, [3], total_size=50, sample_rate=0.3, shuffle=False)
    first, second = ([batch.tolist() for batch in sampler] for _ in range(2))
    assert first != second and sampler.drawn == 2 * len(sampler)


def test_a_rank_that_resumes_draws_from_the_operating_system(monkeypatch):
    ((one,), (two,)) = (ranks(monkeypatch, 1, [3], total_size=50, sample_rate=0.3) for _ in range(2))
    assert [b.tolist() for b in one] == [b.tolist() for b in two]
    two.generator.manual_seed(3)
    one.generator.manual_seed(3)
    two.refresh()
    assert two.secure_mode and [b.tolist() for b in one] != [b.tolist() for b in two]


def test_a_run_that_resumes_in_the_middle_of_an_epoch_draws_anew_at_once():
    def batches(refreshed):
        sampler = PoissonSampler(num_samples=50, sample_rate=0.2, generator=torch.Generator().manual_seed(1))
        found = []
        for batch in sampler:
            found.append(batch)
            if refreshed:
                sampler.refresh()
        return found

    seeded, resumed = batches(False), batches(True)
    assert seeded == batches(False) and resumed[0] == seeded[0] and resumed[1:] != seeded[1:]


def test_a_copy_in_another_process_draws_batches_of_its_own(monkeypatch):
    """After a fork, or sent there: with the same numbers, two trainings would be on the same batches."""
    if hasattr(os, "fork"):
        sampler = PoissonSampler(num_samples=50, sample_rate=0.2, generator=torch.Generator().manual_seed(1))
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.write(writer, json.dumps(list(sampler)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as file:
            there = json.loads(file.read())
        assert len(there) == 5 and there != list(sampler) and not sampler.secure_mode
    one, two = (ranks(monkeypatch, 1, [3], total_size=50, sample_rate=0.3)[0] for _ in range(2))
    two._process -= 1
    assert [b.tolist() for b in one] != [b.tolist() for b in two] and two.secure_mode and not one.secure_mode


def test_no_records_at_all_on_all_ranks(monkeypatch):
    with pytest.raises(ValueError, match="total_size must be a positive number of records"):
        ranks(monkeypatch, 2, [0, 0], total_size=0, sample_rate=0.5)
