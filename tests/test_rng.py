"""The generator: reference values, distribution, independence of streams; the permutation: a bijection that mixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd import rng


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from its mean, for equally likely cells."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_the_mixer_is_splitmix64():
    """The first outputs of the published generator for seed 0."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(rng._GAMMA)
    assert [hex(word) for word in rng._mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_words_never_change():
    """Pinned: another value would change the data of every run."""
    assert rng.bits(1234, 3, np.array([0, 7]), np.array([5, 1 << 40])).tolist() == [15646668439011206235, 11038844232624910605]
    assert rng.permute(np.arange(10), 10, np.uint64(99)).tolist() == [1, 3, 4, 5, 0, 8, 9, 6, 7, 2]
    assert rng.permute(np.arange(5), 1000, np.uint64(99)).tolist() == [283, 454, 598, 599, 611]


def test_words_follow_the_documented_formula():
    """In Python's integers, modulo 2^64."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    for seed, stream, index, counter in [(0, 1, 0, 0), (7, 3, 123456789012, 17), (2**63 - 1, 8, 5, 1 << 40)]:
        key = mix((mix((seed + 1) * gamma % 2**64) + (stream + 1) * gamma) % 2**64)
        offset = mix((key + gamma * (index + 1)) % 2**64)
        assert rng.bits(seed, stream, index, counter) == mix((offset + gamma * (counter + 1)) % 2**64)


def test_broadcasting_is_elementwise():
    index, counter = np.arange(5), np.arange(3)
    table = rng.bits(1, 2, index[:, None], counter)
    assert table.shape == (5, 3)
    for i in index:
        for c in counter:
            assert table[i, c] == rng.bits(1, 2, i, c)
    assert rng.bits(1, 2, 0).shape == ()


def test_every_part_of_the_key_counts():
    words = [
        rng.bits(*key).item() for key in [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 0, 0, 0)]
    ]
    assert len(set(words)) == len(words)
    assert rng.bits(-1, 1, 0) == rng.bits(2**64 - 1, 1, 0)


@pytest.mark.parametrize("axis", ["index", "counter", "seed", "stream"])
def test_bits_are_fair_and_uncorrelated(axis):
    """Along each part of the key: every bit half ones, and neighbours differ in half of their bits."""
    n = 20_000
    if axis in ("seed", "stream"):
        n = 4_000
        pairs = ((i, 1) if axis == "seed" else (1, i) for i in range(n))
        words = np.array([rng.bits(seed, stream, 0).item() for seed, stream in pairs], dtype=np.uint64)
    else:
        words = rng.bits(5, 1, np.arange(n), 0) if axis == "index" else rng.bits(5, 1, 0, np.arange(n))
    table = np.unpackbits(words.view(np.uint8)).reshape(n, 64)
    assert abs(table.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / np.sqrt(n)
    changed = (table[1:] ^ table[:-1]).mean(axis=0)
    assert abs(changed - 0.5).max() < 4.5 * 0.5 / np.sqrt(n)
    correlation = np.corrcoef(table.T.astype(float)) - np.eye(64)
    assert abs(correlation).max() < 5 / np.sqrt(n)


def test_uniform_and_integers():
    values = rng.uniform(3, 1, np.arange(100)[:, None], np.arange(1000))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert chi_square(np.histogram(values, bins=100, range=(0, 1))[0]) < 4
    draws = rng.integers(3, 1, np.arange(100_000), 37)
    assert set(draws.tolist()) == set(range(37))
    assert chi_square(np.bincount(draws)) < 4
    assert (rng.integers(3, 1, np.arange(10), 1) == 0).all()


def test_halves_of_a_word_are_independent():
    words = rng.bits(9, 1, np.arange(100_000))
    cells = rng.scale(words, 8) * 8 + rng.scale(words << np.uint64(32), 8)
    assert chi_square(np.bincount(cells, minlength=64)) < 4


@pytest.mark.parametrize("probability", [0.0, 0.15, 0.5, 0.9999, 1.0])
def test_below(probability):
    hits = rng.below(rng.bits(2, 1, np.arange(100_000)), probability).mean()
    assert abs(hits - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / 100_000)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    image = rng.permute(np.arange(n), n, np.uint64(key))
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [1 << 62, (1 << 62) - 1, (1 << 40) + 1, (1 << 31) + 7])
def test_permute_reaches_large_ranges(n):
    index = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    image = rng.permute(index, n, np.uint64(5))
    assert len(np.unique(image)) == 2000
    assert image.min() >= 0
    assert image.max() < n
    assert abs(image.mean() / n - 0.5) < 0.05


def test_permute_with_a_key_for_each_index():
    keys = rng.bits(0, 4, np.arange(6))
    index = np.array([0, 1, 2, 3, 4, 0])
    together = rng.permute(index, 100, keys)
    assert together.tolist() == [rng.permute(i, 100, k).item() for i, k in zip(index, keys, strict=True)]


@pytest.mark.parametrize("n", [2, 3, 5, 24, 64, 65, 100, 129])
def test_permute_sends_each_index_anywhere(n):
    """Over keys, images of two fixed indices are uniform, alone and relative to each other."""
    keys = rng.bits(1, 4, np.arange(50_000))
    first, last = rng.permute(np.zeros(50_000, np.int64), n, keys), rng.permute(np.full(50_000, n - 1), n, keys)
    assert chi_square(np.bincount(first, minlength=n)) < 4
    assert chi_square(np.bincount(last, minlength=n)) < 4
    if n > 2:
        assert chi_square(np.bincount((first - last) % n, minlength=n)[1:]) < 4


def test_permute_leaves_no_order():
    n = 10_000
    image = rng.permute(np.arange(n), n, np.uint64(3)).astype(float)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 4.5 / np.sqrt(n)
    other = rng.permute(np.arange(n), n, np.uint64(4))
    assert (image == other).sum() < 10  # Poisson of mean 1
