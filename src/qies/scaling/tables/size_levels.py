"""Levels of sizes and token budgets: sizes of the arms differ by up to 1 % at the same nominal size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SAME = 0.02


def levels(x: Array) -> NDArray[np.int64]:
    """[n] number of each value's group; a group holds what is within 2 % of its smallest member."""
    group = np.empty(len(x), np.int64)
    start, number = -math.inf, -1
    for i in np.argsort(x, kind="stable"):
        if x[i] > start * (1 + SAME) or number < 0:
            start, number = x[i], number + 1
        group[i] = number
    return group
