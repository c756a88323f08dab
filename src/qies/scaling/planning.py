"""How often a planned study would find a gain: simulated comparisons with the noise of the runs at hand.

A planned study has one token budget a size, sizes evenly spaced (in logs) over the range of the runs, and a power law
an arm whose slope is the baseline's. Its noise is that of the runs: seeds, and deviations of sizes from the laws.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from qies.errors import UserError
from qies.scaling.joint import join, make_law
from qies.scaling.matching import Cells, match

Array = NDArray[np.float64]

GAINS = (1.1, 1.2, 1.3)
SIZES, SEEDS = (3, 4, 6, 8), (1, 2, 3, 5, 8)
STUDIES = 400


@dataclass(frozen=True)
class PlanRow:
    """`found` [gain]: shares of studies of so many sizes and seeds an arm whose interval lies above 1."""

    sizes: int
    seeds: int
    found: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """`seed_sd`, `size_sd`: standard deviations of the arms' difference in log loss between seeds (one run an arm) and
    between sizes; `slope` of the baseline's log loss in log FLOPs, over a range of `span` times the FLOPs."""

    gains: tuple[float, ...]
    rows: tuple[PlanRow, ...]
    seed_sd: float
    size_sd: float
    slope: float
    span: float
    studies: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        title = (
            f"Share of {self.studies} simulated studies that find a gain (noise of the arms' difference: seeds "
            f"{100 * self.seed_sd:.2g} %, sizes {100 * self.size_sd:.2g} %; FLOPs {self.span:.3g}-fold; "
            f"slope {self.slope:.3g})"
        )
        shown = Table("sizes", "seeds", *(f"gain {gain:g}" for gain in self.gains), title=title)
        for row in self.rows:
            shown.add_row(str(row.sizes), str(row.seeds), *(f"{100 * share:.0f} %" for share in row.found))
        return shown


def make_plan(a: Cells, b: Cells, noise: tuple[Array, int] | None, level: float, seed: int = 0) -> Plan:
    """The plan by the noise of candidate `a` and baseline `b`; `noise` as for `join`.

    Raises UserError where the runs do not measure the noise: without seeds that both arms have, or with fewer than
    three matched sizes.
    """
    rows = match(a, b)
    if noise is None or len(set(a.sizes[rows[:, 0]].tolist())) < 3:
        raise UserError(
            "--power takes the noise from the runs: it needs two seeds in both arms and three matched sizes"
        )
    x, y = np.log(b.flops[rows[:, 1]]), b.log_loss[rows[:, 1]]
    slope = -float(np.polyfit(x, y, 1)[0])
    if slope <= 0:
        raise UserError("--power needs a baseline whose loss falls with FLOPs")
    opposite = np.array([1.0, -1.0])
    mean = float(opposite @ noise[0] @ opposite)  # of a cell's mean over seeds
    seeds = np.array([min(len(a.runs[i]), len(b.runs[j])) for i, j in rows])
    design = np.stack([np.ones(len(x)), x], axis=1)
    residual = a.log_loss[rows[:, 0]] - y
    residual = residual - design @ np.linalg.lstsq(design, residual, rcond=None)[0]
    size_sd = math.sqrt(max(float(residual @ residual) / (len(x) - 2) - mean, 0.0))
    seed_sd = math.sqrt(mean / float(np.mean(1 / seeds)))
    span = float(np.exp(np.ptp(x)))
    found = tuple(
        PlanRow(m, s, tuple(power(m, s, gain, seed_sd, size_sd, slope, span, level, seed) for gain in GAINS))
        for m in SIZES
        for s in SEEDS
    )
    return Plan(GAINS, found, seed_sd, size_sd, slope, span, STUDIES)


def power(
    sizes: int, seeds: int, gain: float, seed_sd: float, size_sd: float, slope: float, span: float, level: float,
    seed: int = 0, studies: int = STUDIES,
) -> float:  # fmt: skip
    """Share of simulated studies whose interval of the compute gain, at the largest FLOPs, lies above 1."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0.0, math.log(span), sizes)
    design = np.stack([np.ones(sizes), -x], axis=1)
    inverse, end = np.linalg.pinv(design), x[-1:, None]
    matched = np.stack([np.arange(sizes)] * 2, axis=1)
    shown = 0
    for _ in range(studies):
        # Half of the difference's variance in either arm; what arms share cancels.
        deviation = size_sd / math.sqrt(2) * rng.standard_normal((2, sizes, 1))
        loss = deviation + seed_sd / math.sqrt(2) * rng.standard_normal((2, sizes, seeds)) - slope * x[:, None]
        loss[0] -= slope * math.log(gain)
        laws = [make_law(_line, ("log A", "alpha"), inverse @ y, x[:, None], y) for y in loss.mean(axis=2)]
        spread = loss - loss.mean(axis=2, keepdims=True)
        dof = sizes * (seeds - 1)
        within = np.einsum("ims,jms->ij", spread, spread) / max(dof, 1) / seeds
        joint = join(laws[0], laws[1], matched, level, (within, dof) if dof else None)
        difference, half, _ = joint.difference(end, end)
        shown += bool(difference[0] + half[0] < 0)
    return shown / studies


def _line(theta: Array, x: Array) -> tuple[Array, Array]:
    design = np.stack([np.ones(len(x)), -x[:, 0]], axis=1)
    return design @ theta, design
