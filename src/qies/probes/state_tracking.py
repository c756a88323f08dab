"""State-tracking tasks: the answer depends on the whole prefix in its order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qies.probes.groups import Group
from qies.probes.task import IGNORED, Ids


@dataclass(frozen=True)
class WordProblem:
    """Multiply the letters read so far: target t is x_t x_{t-1} ... x_0 in the group (Liu et al., arXiv:2210.10749;
    Merrill et al., arXiv:2404.08819).

    Letters are all elements of the group, or with `all_letters=False` its generators, their inverses and the identity.
    """

    group: Group
    all_letters: bool = True

    @property
    def vocab_size(self) -> int:
        return self.group.order

    @property
    def chance(self) -> float:
        return 1 / self.group.order

    @property
    def letters(self) -> Ids:
        if self.all_letters:
            return np.arange(self.group.order)
        inverses = [int(np.flatnonzero(self.group.table[g] == 0)[0]) for g in self.group.generators]
        return np.unique([0, *self.group.generators, *inverses])

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        ids = rng.choice(self.letters, (rows, length))
        targets = np.empty_like(ids)
        state = np.zeros(rows, np.int64)
        for t in range(length):
            state = self.group.table[ids[:, t], state]
            targets[:, t] = state
        return ids, targets


@dataclass(frozen=True)
class Dyck:
    """Well-formed prefixes of `kinds` bracket types nested at most `depth` deep: target t is the type of the innermost
    open bracket, or `kinds` where none is open (Hewitt et al., arXiv:2010.07515).

    Token i < kinds opens type i, token kinds + i closes it.
    """

    kinds: int = 2
    depth: int = 8

    @property
    def vocab_size(self) -> int:
        return 2 * self.kinds

    @property
    def chance(self) -> float:
        return 1 / (self.kinds + 1)

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        ids, targets = np.empty((2, rows, length), np.int64)
        stack = np.zeros((rows, self.depth + 1), np.int64)
        stack[:, 0] = self.kinds  # below the first bracket
        height, row = np.zeros(rows, np.int64), np.arange(rows)
        for t in range(length):
            opens = ((rng.random(rows) < 0.5) | (height == 0)) & (height < self.depth)
            kind = rng.integers(0, self.kinds, rows)
            ids[:, t] = np.where(opens, kind, self.kinds + stack[row, height])
            height += np.where(opens, 1, -1)
            stack[row[opens], height[opens]] = kind[opens]
            targets[:, t] = stack[row, height]
        return ids, targets


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic modulo `modulus`, from left to right: a number, then pairs of an operator (+, -, *) and a number.

    Target t, at each number, is the value so far (after Deletang et al., arXiv:2207.02098, without brackets).

    Tokens below `modulus` are numbers; modulus, modulus + 1 and modulus + 2 are +, - and *.
    """

    modulus: int = 5

    @property
    def vocab_size(self) -> int:
        return self.modulus + 3

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        ids = rng.integers(0, self.modulus, (rows, length))
        ids[:, 1::2] = rng.integers(self.modulus, self.vocab_size, ids[:, 1::2].shape)
        targets = np.full_like(ids, IGNORED)
        targets[:, 0] = value = ids[:, 0]
        for t in range(2, length, 2):
            operator, number = ids[:, t - 1] - self.modulus, ids[:, t]
            value = np.choose(operator, [value + number, value - number, value * number]) % self.modulus
            targets[:, t] = value
        return ids, targets
