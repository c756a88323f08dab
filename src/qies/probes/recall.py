"""Recall tasks: the answer occurs in the context and is retrieved by its key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qies.errors import UserError
from qies.probes.task import IGNORED, Ids


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (MQAR; Arora et al., arXiv:2312.04927): key-value pairs, then every key again, at
    gaps drawn from a power law; the target at a repeated key is its value.

    `pairs` None: an eighth of the length. Keys are the first half of the vocabulary without token 0, which fills the
    gaps; values are the second half.
    """

    vocab_size: int = 512
    pairs: int | None = None
    exponent: float = 0.01

    @property
    def chance(self) -> float:
        return 2 / self.vocab_size

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        half = self.vocab_size // 2
        pairs = self.pairs or max(1, length // 8)
        if pairs > half - 1:
            raise UserError(f"{pairs} pairs need as many keys and the vocabulary has {half - 1}: take fewer pairs.")
        if 3 * pairs > length:
            raise UserError(f"{pairs} pairs and their queries need {3 * pairs} tokens, more than {length}.")
        keys = rng.permuted(np.tile(np.arange(1, half), (rows, 1)), axis=1)[:, :pairs]
        values = rng.integers(half, self.vocab_size, (rows, pairs))
        ids = np.zeros((rows, length), np.int64)
        targets = np.full_like(ids, IGNORED)
        ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        room = length - 2 * pairs
        weights = np.arange(1, room + 1, dtype=np.float64) ** (self.exponent - 1)
        drawn = np.log(rng.random((rows, room))) / weights  # without replacement (Efraimidis and Spirakis, 2006)
        at = 2 * pairs + np.argsort(-drawn, axis=1)[:, :pairs]
        np.put_along_axis(ids, at, keys, axis=1)
        np.put_along_axis(targets, at, values, axis=1)
        return ids, targets


@dataclass(frozen=True)
class SelectiveCopy:
    """Repeat in order the `items` tokens that stand scattered among fillers (Gu and Dao, arXiv:2312.00752).

    Token 0 fills, token 1 asks for the next item; the last `items` positions ask and are scored.
    """

    vocab_size: int = 18
    items: int = 8

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        room = length - self.items
        if room < self.items:
            raise UserError(f"{self.items} items need a length of at least {2 * self.items}, not {length}.")
        content = rng.integers(2, self.vocab_size, (rows, self.items))
        at = np.sort(rng.random((rows, room)).argsort(1)[:, : self.items], axis=1)
        ids = np.zeros((rows, length), np.int64)
        np.put_along_axis(ids, at, content, axis=1)
        ids[:, room:] = 1
        targets = np.full_like(ids, IGNORED)
        targets[:, room:] = content
        return ids, targets


@dataclass(frozen=True)
class ContextRecall:
    """Recall by context and key: each of `contexts` contexts gives every one of its `pairs` keys a value of its own, so
    that neither the key nor its neighbours alone tell the value; then every (context, key) is asked once, in any order.

    A context is its token and then its pairs; a question is the context's token and the key, at which the target is the
    value. Token 0 fills the rest; then come context tokens, keys and values.
    """

    contexts: int = 4
    pairs: int = 4
    keys: int = 16
    values: int = 16

    @property
    def vocab_size(self) -> int:
        return 1 + self.contexts + self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        asked = self.contexts * self.pairs
        told = self.contexts + 2 * asked
        if self.pairs > self.keys:
            raise UserError(f"{self.pairs} pairs need as many keys and there are {self.keys}: take fewer pairs.")
        if told + 2 * asked > length:
            raise UserError(f"{asked} pairs and their questions need {told + 2 * asked} tokens, more than {length}.")
        names = rng.permuted(np.tile(np.arange(1, self.contexts + 1), (rows, 1)), axis=1)
        first = 1 + self.contexts
        keys = rng.permuted(np.tile(np.arange(first, first + self.keys), (rows, 1)), axis=1)[:, : self.pairs]
        keys = np.repeat(keys[:, None], self.contexts, 1)  # the same keys in every context, in an order of its own
        keys = rng.permuted(keys, axis=2)
        values = rng.integers(first + self.keys, self.vocab_size, keys.shape)
        ids = np.zeros((rows, length), np.int64)
        targets = np.full_like(ids, IGNORED)
        block = np.concatenate([names[..., None], np.stack([keys, values], -1).reshape(rows, self.contexts, -1)], -1)
        ids[:, :told] = block.reshape(rows, -1)
        order = rng.permuted(np.tile(np.arange(asked), (rows, 1)), axis=1)
        at = length - 2 * asked
        ids[:, at::2] = np.take_along_axis(np.repeat(names, self.pairs, 1), order, 1)
        ids[:, at + 1 :: 2] = np.take_along_axis(keys.reshape(rows, -1), order, 1)
        targets[:, at + 1 :: 2] = np.take_along_axis(values.reshape(rows, -1), order, 1)
        return ids, targets


@dataclass(frozen=True)
class Needle:
    """What followed the marker: one token after the marker, somewhere in random tokens, is asked for at the end by the
    marker again (the induction task of Gu and Dao, arXiv:2312.00752).

    depth: where the marker stands, from 0 (start) to 1 (end); None for anywhere. Token 0 is the marker.
    """

    vocab_size: int = 16
    depth: float | None = None

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        if length < 4:
            raise UserError(f"A needle needs a length of at least 4, not {length}.")
        ids = rng.integers(1, self.vocab_size, (rows, length))
        at = (
            rng.integers(0, length - 2, rows) if self.depth is None else np.full(rows, round(self.depth * (length - 3)))
        )
        every = np.arange(rows)
        ids[every, at] = ids[:, -1] = 0
        targets = np.full_like(ids, IGNORED)
        targets[:, -1] = ids[every, at + 1]
        return ids, targets


@dataclass(frozen=True)
class NoisyRecall:
    """Recall with noise between the pairs (MAD; Poli et al., arXiv:2403.17844): keys and values alternate, with a share
    `noise` of tokens that mean nothing; a key keeps its value in a row, and every key seen before is scored.

    Tokens: keys, values, then as many noise tokens as keys.
    """

    keys: int = 16
    values: int = 16
    noise: float = 0.2

    @property
    def vocab_size(self) -> int:
        return 2 * self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        if length < 4:
            raise UserError(f"Recall among noise needs a length of at least 4, not {length}.")
        dictionary = rng.integers(self.keys, self.keys + self.values, (rows, self.keys))
        ids = np.zeros((rows, length), np.int64)
        targets = np.full_like(ids, IGNORED)
        every = np.arange(rows)
        seen = np.zeros((rows, self.keys), bool)
        pending = np.full(rows, -1)  # the key whose value comes next, or -1
        for t in range(length):
            key = rng.integers(0, self.keys, rows)
            noisy = (rng.random(rows) < self.noise) & (pending < 0)
            value = dictionary[every, np.where(pending < 0, 0, pending)]
            ids[:, t] = np.where(pending >= 0, value, np.where(noisy, self.keys + self.values + key, key))
            asks = (pending < 0) & ~noisy
            known = asks & seen[every, key]
            targets[known, t] = dictionary[every, key][known]
            seen[every[asks], key[asks]] = True
            pending = np.where(asks, key, -1)
        return ids, targets
