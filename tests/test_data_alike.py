"""Which images look the same, against a naive comparison of all pairs."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from detector.data.alike import ALIKE_BITS, ALIKE_LEVELS, DecodedImage, alike


def image(rng: np.random.Generator, like: DecodedImage | None = None, changed: int = 0) -> DecodedImage:
    """An image at random, or one that differs from another in so many bits of its hash."""
    if like is None:
        bits, thumbnail = rng.random(64) < 0.5, rng.integers(0, 256, (16, 16, 3), np.uint8)
    else:
        assert like.bits is not None
        assert like.thumbnail is not None
        bits, thumbnail = like.bits.copy(), like.thumbnail.copy()
        bits[rng.choice(64, changed, replace=False)] ^= True
    return DecodedImage(None, digest=rng.bytes(16), bits=bits, thumbnail=thumbnail)


def joined(count: int, pairs: list[tuple[int, int]]) -> set[frozenset[int]]:
    """Groups, by naive union of pairs."""
    groups = [{i} for i in range(count)]
    for i, j in pairs:
        both = groups[i] | groups[j]
        for k in both:
            groups[k] = both
    return {frozenset(group) for group in groups}


def naive(decoded: list[DecodedImage]) -> list[tuple[int, int]]:
    found = []
    for (i, a), (j, b) in combinations(enumerate(decoded), 2):
        assert a.bits is not None
        assert b.bits is not None
        assert a.thumbnail is not None
        assert b.thumbnail is not None
        levels = np.abs(a.thumbnail.astype(float) - b.thumbnail).mean()
        if (a.bits != b.bits).sum() <= ALIKE_BITS and levels <= ALIKE_LEVELS:
            found.append((i, j))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_groups_are_those_of_all_pairs(seed: int) -> None:
    """Chains, too: what is alike only by way of others."""
    rng = np.random.default_rng(seed)
    decoded = [image(rng) for _ in range(10)]
    for _ in range(40):
        decoded.append(image(rng, decoded[rng.integers(len(decoded))], int(rng.integers(0, 12))))
    decoded += decoded[:5]  # the same pixels
    pairs, all_pairs = list(alike(decoded)), naive(decoded)
    assert set(pairs) <= set(all_pairs)
    assert all(i < j for i, j in pairs)
    assert joined(len(decoded), pairs) == joined(len(decoded), all_pairs)
    assert pairs[:5] == [(k, 50 + k) for k in range(5)]


def test_frames_of_one_camera_take_no_time_by_the_pair() -> None:
    rng = np.random.default_rng(0)
    first = image(rng)
    decoded = [image(rng, first, 2) for _ in range(3000)]  # four and a half million pairs
    begin = time.perf_counter()
    pairs = list(alike(decoded))
    assert len({j for _, j in pairs}) == 2999
    assert len(pairs) < 2 * len(decoded)
    assert time.perf_counter() - begin < 20  # about one; compared pair by pair more than a minute
