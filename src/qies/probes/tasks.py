"""Synthetic tasks with exact targets: state tracking and recall.

Every task draws its data from a numpy generator, so that a seed fixes it on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qies.errors import UserError, nearest
from qies.probes.groups import Group, alternating, cyclic, product, symmetric

Ids = NDArray[np.int64]
IGNORED = -100  # the target of a position that is not scored


class Task(Protocol):
    """What a probe trains on. `chance` is the accuracy of a guess that is uniform over the answers."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        """Inputs and targets, int64 [rows, length] each; the model's output at t is scored against target t.

        Raises UserError for a length that the task cannot fill.
        """
        ...


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


TASKS: dict[str, Callable[[], Task]] = {
    "parity": lambda: WordProblem(cyclic(2)),
    "z60": lambda: WordProblem(cyclic(60)),
    "s3": lambda: WordProblem(symmetric(3)),
    "a5": lambda: WordProblem(alternating(5), all_letters=False),
    "a5-all": lambda: WordProblem(alternating(5)),
    "s5": lambda: WordProblem(symmetric(5), all_letters=False),
    "s5-all": lambda: WordProblem(symmetric(5)),
    "a4xz5": lambda: WordProblem(product(alternating(4), cyclic(5))),
    "dyck2": Dyck,
    "mqar": Recall,
    "selective-copy": SelectiveCopy,
}


@cache
def task(name: str) -> Task:
    """The task of that name. Raises UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"Unknown task '{name}'.{nearest(name, TASKS) or f' Known: {chr(44).join(TASKS)}.'}")
    return TASKS[name]()
