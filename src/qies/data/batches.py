"""Batches as pure functions of (seed, step): identical for every arm, and resuming needs only the step.

A batch is `[B, T+1]`: B sequences of T = seq_len tokens, each with the token that follows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from qies.data.hashing import mix
from qies.data.shards import Shards
from qies.errors import UserError

_ROUNDS = 8


class Batches:
    """Shuffled training windows of one split.

    The token stream is cut into `windows` non-overlapping windows of T tokens (each is read with one more token, the
    first of the next window). An epoch visits every window once, in a pseudo-random order that depends only on (seed,
    epoch). Epochs follow one another without a gap, so a batch may contain the end of one and the start of the next.
    Memory does not grow with the number of windows.

    Raises UserError if the split is too short for one window, or a size is not positive.
    """

    def __init__(self, shards: Shards, split: str, *, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise UserError(f"seq_len {seq_len} and batch_size {batch_size} must be at least 1; give positive numbers")
        self.tokens = shards.tokens(split)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.windows = (len(self.tokens) - 1) // seq_len
        if self.windows < 1:
            raise UserError(
                f"the {split} text has {len(self.tokens)} tokens, too few for one window of {seq_len} + 1; "
                "give more text or a smaller seq_len"
            )

    def order(self, step: int) -> np.ndarray:
        """Indices of the windows in the batch of `step` (0, 1, ...), int64 `[B]`."""
        position = np.arange(self.batch_size, dtype=np.uint64) + np.uint64(step * self.batch_size)
        epoch, index = np.divmod(position, np.uint64(self.windows))
        return permute(index, self.windows, self.seed, epoch).astype(np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Token ids of `step` (0, 1, ...), int64 `[B, T+1]`: inputs are `[:, :-1]`, targets `[:, 1:]`."""
        starts = self.order(step) * self.seq_len
        return np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts.tolist()]).astype(np.int64)


def val_batches(shards: Shards, seq_len: int, batch_size: int, max_tokens: int | None = None) -> Iterator[np.ndarray]:
    """The validation stream in order, int64 `[<=B, T+1]`, in windows that overlap by one token.

    Every token except the first is a target exactly once. The last batch may have fewer windows; a remainder shorter
    than a window is a batch of its own, `[1, remainder+1]`. `max_tokens` limits the number of targets.

    Raises UserError if there are fewer than two tokens, or a number is not positive.
    """
    tokens = shards.tokens("val")
    if seq_len < 1 or batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"seq_len {seq_len}, batch_size {batch_size} and max_tokens {max_tokens} must be at least 1")
    targets = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    if targets < 1:
        raise UserError(f"the validation text has {len(tokens)} tokens, none of which can be predicted; give more text")

    def windows() -> Iterator[np.ndarray]:
        full = targets - targets % seq_len
        for start in range(0, full, seq_len * batch_size):
            stop = min(start + seq_len * batch_size, full)
            block = tokens[start : stop + 1].astype(np.int64)
            yield np.lib.stride_tricks.sliding_window_view(block, seq_len + 1)[::seq_len].copy()
        if full < targets:
            yield tokens[full : targets + 1].astype(np.int64)[None]

    return windows()


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """The image of each `index` under a pseudo-random permutation of 0 ... size-1 that is selected by (seed, epoch).

    `index` and `epoch` are uint64 of the same shape, `size` is below 2^62. A generalised Feistel network on the
    smallest a x b grid that covers `size`, with cycle walking for values outside (Black & Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    secret = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    key = mix(np.uint64(secret) ^ epoch)
    keys = [mix(key + np.uint64(round)) for round in range(_ROUNDS)]
    out = _feistel(index, a, b, keys)
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], a, b, [key[outside] for key in keys])
    return out


def _feistel(x: np.ndarray, a: int, b: int, keys: list[np.ndarray]) -> np.ndarray:
    """One pass over the grid: rows (mod a) and columns (mod b) shift one another in invertible steps."""
    row, column = np.divmod(x, np.uint64(b))
    for round, key in enumerate(keys):
        if round % 2:
            column = np.mod(column + np.mod(mix(key ^ row), np.uint64(b)), np.uint64(b))
        else:
            row = np.mod(row + np.mod(mix(key ^ column), np.uint64(a)), np.uint64(a))
    return row * np.uint64(b) + column
