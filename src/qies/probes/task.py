"""What a probe trains on: inputs and exact targets, drawn from a numpy generator: a seed fixes them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
IGNORED = -100  # the target of a position that is not scored


class Task(Protocol):
    """A distribution of sequences with targets. `chance`: the accuracy of a uniform guess among the answers."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Ids, Ids]:
        """Inputs and targets, int64 [rows, length] each; the model's output at t is scored against target t.

        Raises UserError for a length that the task cannot fill.
        """
        ...
