
"""Noise is Gaussian, reproducible from its generator, and the same on any number of threads."""

import copy
import pickle

import numpy as np
import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise
from scipy import stats

from gsm.keystream import CHUNK as RUN
from gsm.noise import FEW as BLOCK
from gsm.noise import GaussianNoise
from gsm.optimizer import DPOptimizer
from gsm.secure_noise import SecureNoise
from gsm.wrapper import GradSampleModule


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def draw(shapes, seed=1, std=1.0, dtype=torch.float32, part=None):
    tensors = [torch.zeros(s, dtype=dtype) for s in shapes]
    (part or GaussianNoise(torch.Generator().manual_seed(seed))).add_(tensors, std, 1.0)
    return torch.cat([t.flatten() for t in tensors])


CHUNK = 4 * RUN  # what one thread draws at a time
SMALL = [(100, 7), (), (0,), (3,), (1000,)]
LARGE = [(CHUNK // 2, 3), (5,), (), (0,), (CHUNK + 1,), (17, 19)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
def test_the_result_depends_on_the_seed_alone(shapes, dtype, threads):
    one = draw(shapes, dtype=dtype)
    for n in (2, 3, 4):
        threads(n)
        assert torch.equal(one, draw(shapes, dtype=dtype))
    assert not torch.equal(one, draw(shapes, seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [BLOCK, 8 * CHUNK + 3], ids=["small", "large"])
def test_the_distribution_is_normal(entries, dtype):
    x = draw([(entries,)], std=2.5, dtype=dtype).double().numpy() / 2.5
    assert stats.kstest(x, "norm").pvalue > 1e-4
    assert abs(x.mean()) < 4.5 / np.sqrt(entries)
    assert abs(x.var() - 1) < 4.5 * np.sqrt(2 / entries)
    assert abs(stats.kurtosis(x)) < 4.5 * np.sqrt(24 / entries)
    for lag in (1, 2, 16, 1024):
        assert abs(np.mean(x[:-lag] * x[lag:])) < 4.5 / np.sqrt(entries)


def test_every_entry_gets_its_own_noise():
    x = draw(LARGE, dtype=torch.float64)
    assert len(torch.unique(x)) == len(x)
    chunks = [x[i : i + 1000] for i in range(0, len(x) - 1000, CHUNK)]
    correlation = np.corrcoef(torch.stack(chunks).numpy()) - np.eye(len(chunks))
    assert abs(correlation).max() < 0.15


def test_calls_do_not_repeat_each_other():
    part = GaussianNoise(torch.Generator().manual_seed(0))
    for shapes in (SMALL, LARGE):
        assert not (draw(shapes, part=part) == draw(shapes, part=part)).any()


def test_noise_is_added_to_what_is_there_also_in_strided_tensors():
    base = torch.arange(12.0).reshape(3, 4)
    strided = base.t()
    big = torch.zeros(BLOCK, 2)
    GaussianNoise(torch.Generator().manual_seed(0)).add_([strided, big], 1e-6, 1.0)
    torch.testing.assert_close(base, torch.arange(12.0).reshape(3, 4), atol=1e-5, rtol=0)
    assert (base != torch.arange(12.0).reshape(3, 4)).any()


def test_manual_seed_reaches_the_default_generator():
    for shapes in (SMALL, LARGE):
        torch.manual_seed(7)
        one = draw(shapes, part=GaussianNoise())
        torch.manual_seed(7)
        assert torch.equal(one, draw(shapes, part=GaussianNoise()))


def test_few_entries_get_the_noise_that_opacus_would_give_them():
    tensors = [torch.zeros(s) for s in SMALL]
    GaussianNoise(torch.Generator().manual_seed(9)).add_(tensors, 2.5, 1.0)
    generator = torch.Generator().manual_seed(9)
    for t in tensors:
        assert torch.equal(t, _generate_noise(2.5, t, generator=generator))


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
def test_after_refresh_seeding_does_not_bring_old_noise_back(shapes):
    generator = torch.Generator().manual_seed(3)
    part = GaussianNoise(generator)
    before = draw(shapes, part=part)
    part.refresh()
    generator.manual_seed(3)
    torch.manual_seed(3)
    assert not (draw(shapes, part=part) == before).any()


def test_refresh_is_different_every_time():
    parts = [GaussianNoise(), GaussianNoise()]
    for part in parts:
        part.refresh()
    assert not torch.equal(draw(SMALL, part=parts[0]), draw(SMALL, part=parts[1]))


def test_zero_deviation_and_no_tensors_change_nothing():
    assert (draw(SMALL, std=0.0) == 0).all()
    GaussianNoise().add_([], 1.0, 1.0)


@pytest.mark.parametrize("part", [GaussianNoise, SecureNoise])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("entries", [3, BLOCK + 1])
def test_a_sum_in_low_precision_is_refused_not_left_without_noise(part, dtype, entries):
    with pytest.raises(TypeError, match="float32 or float64, got a sum in torch"):
        part().add_([torch.zeros(2), torch.zeros(entries, dtype=dtype)], 1.0, 1.0)


def test_pickle_and_deepcopy_continue_the_same_stream():
    part = GaussianNoise(torch.Generator().manual_seed(5))
    copies = [copy.deepcopy(part), pickle.loads(pickle.dumps(part))]
    expected = draw(SMALL, part=part)
    for other in copies:
        assert torch.equal(draw(SMALL, part=other), expected)
    part.refresh()
    assert not torch.equal(draw(SMALL, part=copy.deepcopy(part)), draw(SMALL, part=copy.deepcopy(part)))


def test_no_tensor_is_left_without_noise_because_it_is_on_another_device(monkeypatch):
    """Few entries on the host are drawn at once, but only if there are no others (``meta`` stands for a GPU)."""
    drawn_on = []

    def generator(device):
        drawn_on.append(torch.device(device).type)
        return torch.default_generator

    monkeypatch.setattr(torch, "Generator", generator)
    host, other = torch.zeros(3), torch.zeros(3, device="meta")
    GaussianNoise().add_([host, other], 1.0, 1.0)
    assert drawn_on == ["meta"] and bool((host != 0).all())


def test_a_forked_process_does_not_repeat_its_parents_noise(monkeypatch):
    """Equal noise on two sums cancels in their difference."""

    def drawn(noise):
        total = torch.zeros(4)
        noise.add_([total], 1.0, 1.0)
        return total

    parent, child = (GaussianNoise(torch.Generator().manual_seed(0)) for _ in range(2))
    expected = drawn(parent)
    monkeypatch.setattr("gsm.noise.os.getpid", lambda: -1)  # as in a fork, without what forks do to torch's threads
    assert bool((drawn(child) != expected).all())
    assert torch.equal(drawn(GaussianNoise(torch.Generator().manual_seed(0))), expected)  # one that it made itself


@pytest.mark.parametrize("entries", [3, 900, 2**15 + 1], ids=["few", "some", "many"])
@pytest.mark.parametrize("of_its_own", [True, False])
def test_the_same_noise_is_never_added_twice(entries: int, of_its_own: bool) -> None:
    """The difference of two releases with the same noise has none. 900 end in another block of the generator."""
    generator = torch.Generator() if of_its_own else None
    noise, seed = GaussianNoise(generator), (generator.manual_seed if generator else torch.manual_seed)
    seed(0)
    for _ in range(3):
        noise.add_([torch.zeros(entries)], 1.0, 1.0)
    seed(1)
    noise.add_([torch.zeros(entries)], 1.0, 1.0)
    seed(0)
    torch.rand(1, generator=generator)  # shifted, but of the same numbers
    with pytest.raises(RuntimeError, match="seeds it anew"):
        noise.add_([torch.zeros(entries)], 1.0, 1.0)
    noise.refresh()
    noise.add_([torch.zeros(entries)], 1.0, 1.0)


class Reseeding(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return super().forward(x * (torch.rand(x.shape[1]) < 0.5))


def test_a_model_that_seeds_the_generator_is_stopped_before_its_second_release() -> None:
    model = GradSampleModule(Reseeding(3, 2))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="torch.manual_seed in the model's forward"):
        optimizer.step()
