"""The stream is Box-Muller on AES in Galois/counter mode, its deviates normal, independent of blocks and threads."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gsm.keystream import CHUNK, NormalStream, block, in_blocks

KEY = bytes(range(16))
BITS = {torch.float32: 32, torch.float64: 64}
DTYPES = pytest.mark.parametrize("dtype", list(BITS))


def words_of(key, count, bits, nonce=0):
    """AES-GCM's keystream spelled out: the cipher of 12 bytes of nonce and the counters 2, 3, ..."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = -(-count * bits // 128)
    start = (nonce << 32) + 2
    counters = ((start + i).to_bytes(16, "big") for i in range(blocks))
    return np.frombuffer(b"".join(map(cipher.update, counters)), f"i{bits // 8}")


def many(dtype, entries, std=1.0):
    stream, size = NormalStream(KEY, dtype, std), block(dtype)
    return torch.cat([stream.draw(min(size, entries - i)).clone() for i in range(0, entries, size)]).double().numpy()


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 7, 64, CHUNK, CHUNK + 5])
def test_the_stream_is_box_muller_on_aes_in_galois_counter_mode(n, dtype):
    bits, expected, at = BITS[dtype], [], 0
    words = words_of(KEY, n + 1, bits)
    while at < n:
        half = (min(n - at, CHUNK) + 1) // 2
        radii, angles = words[at : at + half], words[at + half : at + 2 * half]
        uniform = (radii.astype(np.int64) & ((1 << (bits - 1)) - 1)) * 2.0 ** (1 - bits) + 2.0**-bits
        radius, angle = 2.5 * np.sqrt(-2 * np.log(uniform)), angles * (2 * math.pi * 2.0**-bits)
        expected += [radius * np.cos(angle), radius * np.sin(angle)]
        at += 2 * half
    drawn = NormalStream(KEY, dtype, 2.5).draw(n).double().numpy()
    np.testing.assert_allclose(drawn, np.concatenate(expected)[:n], atol=2e-3 if bits == 32 else 1e-10)


def test_after_so_many_bytes_comes_the_next_nonce(monkeypatch):
    """The mode allows 2^36 - 32 bytes under one nonce (and the library raises an error after them)."""
    monkeypatch.setattr("gsm.keystream._UNDER_ONE_NONCE", 16)
    stream = NormalStream(KEY, torch.float64)
    for nonce in (0, 1, 2):
        radius, angle = words_of(KEY, 2, 64, nonce)
        u = (int(radius) & (2**63 - 1)) * 2.0**-63 + 2.0**-64
        expected = math.sqrt(-2 * math.log(u)) * math.cos(int(angle) * math.pi * 2.0**-63)
        assert stream.draw(2)[0].item() == pytest.approx(expected, rel=1e-12)


@DTYPES
def test_deviates_are_normal_and_uncorrelated(dtype):
    z = many(dtype, 30 * CHUNK + 17)
    entries = len(z)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4.5 / math.sqrt(entries)
    assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / entries)
    assert abs(stats.kurtosis(z)) < 4.5 * math.sqrt(24 / entries)
    for lag in (1, 2, CHUNK // 2, CHUNK):
        assert abs(np.mean(z[:-lag] * z[lag:])) < 4.5 / math.sqrt(entries)
        assert abs(np.corrcoef(z[:-lag] ** 2, z[lag:] ** 2)[0, 1]) < 4.5 / math.sqrt(entries)


@DTYPES
def test_tails_are_those_of_a_normal_distribution(dtype):
    z = many(dtype, 60 * CHUNK)
    for at in (2.0, 3.0, 4.0):
        expected = len(z) * 2 * stats.norm.sf(at)
        assert abs((abs(z) > at).sum() - expected) < 4.5 * math.sqrt(expected)


@DTYPES
@pytest.mark.parametrize("byte", [0, 255])
def test_no_word_gives_an_infinite_deviate(monkeypatch, dtype, byte):
    stream = NormalStream(KEY, dtype)

    def constant(data, out):
        out[: len(data)] = bytes([byte]) * len(data)

    stream.draw(4)
    monkeypatch.setattr(stream, "_cipher", type("Constant", (), {"update_into": staticmethod(constant)}))
    largest = stream.draw(4).abs().max()
    assert largest == pytest.approx(math.sqrt(2 * BITS[dtype] * math.log(2)) if byte == 0 else 0, abs=1e-6)


@DTYPES
def test_deviates_do_not_depend_on_how_many_are_drawn_at_a_time_or_on_threads(dtype):
    expected = many(dtype, 5 * CHUNK + 3)
    stream = NormalStream(KEY, dtype)
    parts = [stream.draw(n).clone() for n in (CHUNK, 2 * CHUNK, CHUNK, CHUNK + 3)]
    assert (torch.cat(parts).double().numpy() == expected).all()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert (many(dtype, 5 * CHUNK + 3) == expected).all()
        finally:
            torch.set_num_threads(1)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6), size=st.integers(1, 40), flip=st.booleans()
)
def test_blocks_cover_every_entry_once_in_order(shapes, size, flip):
    tensors = [torch.zeros(s).t() if flip and len(s) == 2 else torch.zeros(s) for s in shapes]
    entries, seen = sum(t.numel() for t in tensors), 0
    for parts, n in in_blocks(tensors, size):
        assert n == sum(p.numel() for p in parts) <= size
        for p in parts:
            p.copy_(torch.arange(seen + 1, seen + 1 + p.numel()).view(p.shape))
            seen += p.numel()
    assert seen == entries
    found = torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.zeros(0)
    assert torch.equal(found, torch.arange(1.0, entries + 1))
