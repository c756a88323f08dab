"""Hashes that are the same on every machine: of numbers, of n-grams, of sequences of byte strings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

N = 13
"""Length of the n-grams by which texts are compared, after Brown et al. (2020), arXiv:2005.14165, appendix C."""

_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it vanishes modulo 2^64


def sha256_of_parts(parts: Iterable[bytes]) -> str:
    """sha256 of a sequence of byte strings, each preceded by its length, so that no two sequences collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of uint64 in which every input bit affects every
    output bit."""
    x = x + np.uint64(_BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_ngrams(values: np.ndarray) -> np.ndarray:
    """A hash of every 13 consecutive values: uint64 `[max(n - 12, 0)]` of uint64 `[n]`.

    The hash of x_0 ... x_12 is the polynomial sum x_i b^(12-i) modulo 2^64 (Karp & Rabin, 1987), built from those of 2,
    4 and 8 values. The values must be hashes themselves (`mix`), as polynomials of small numbers collide.
    """
    count = len(values) - N + 1
    if count < 1:
        return values[:0]
    two = _concatenated(values[:-1], values[1:], 1)
    four = _concatenated(two[:-2], two[2:], 2)
    eight = _concatenated(four[:-4], four[4:], 4)
    return _concatenated(_concatenated(eight[:count], four[8 : 8 + count], 4), values[12:], 1)


def _concatenated(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the values hashed in `first` followed by the `length` values hashed in `second`."""
    return first * np.uint64(pow(_BASE, length, 1 << 64)) + second
