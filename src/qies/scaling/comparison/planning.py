"""How often a planned study would find a gain: simulated comparisons with the noise of the runs at hand.

A planned study has one token budget a size, sizes evenly spaced (in logs) over the range of the runs, and a power law
without a floor in each arm, with the baseline's slope: one budget a size does not identify a floor, and `compare` then
fits this form as well. Without seeds its intervals have the sizes less 2 degrees of freedom. Its noise is that of the
runs: seeds, and what the arms' differences scatter by around the laws that the comparison fitted (surfaces with their
floors, where those were fitted), beyond the noise of seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from qies.errors import UserError
from qies.scaling.comparison.joint_inference import JointFit, join, make_law
from qies.scaling.comparison.matching import Cells, match
from qies.scaling.comparison.noise import pseudo_inverse

Array = NDArray[np.float64]

GAINS = (1.1, 1.2, 1.3)
SIZES, SEEDS = (3, 4, 6, 8), (1, 2, 3, 5, 8)
STUDIES = 400


@dataclass(frozen=True)
class PlanRow:
    """`found` [gain]: share of studies with `sizes` and `seeds` per arm whose interval lies above 1."""

    sizes: int
    seeds: int
    found: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """`seed_sd`, `size_sd`: standard deviations of the arms' difference in log loss between seeds (one run an arm), and
    between sizes beyond that. `size_sd` is measured around the fitted laws, so it holds deviations of single sizes and
    the laws' misfit, which sizes alone do not tell from each other: a misfit would not shrink with more sizes as the
    simulation lets it. `slope` of the baseline's log loss in log FLOPs, over a range of `span` times the FLOPs."""

    gains: tuple[float, ...]
    rows: tuple[PlanRow, ...]
    seed_sd: float
    size_sd: float
    slope: float
    span: float
    studies: int

    def table(self) -> Table:
        title = (
            f"Share of {self.studies} simulated studies that detect a gain (SD of the arms' difference: "
            f"{100 * self.seed_sd:.2g} % between seeds, {100 * self.size_sd:.2g} % between sizes, including misfit of "
            f"the laws; power laws without a floor; FLOPs {self.span:.3g}-fold; slope {self.slope:.3g})"
        )
        shown = Table("sizes", "seeds", *(f"gain {gain:g}" for gain in self.gains), title=title)
        for row in self.rows:
            shown.add_row(str(row.sizes), str(row.seeds), *(f"{100 * share:.0f} %" for share in row.found))
        return shown


def make_plan(
    a: Cells, b: Cells, noise: tuple[Array, int] | None, joint: JointFit | None, level: float, seed: int = 0
) -> Plan:
    """The plan by the noise of candidate `a` and baseline `b`; `noise` as for `join`, `joint` the fitted laws.

    Raises UserError where the runs do not measure the noise: without seeds that both arms have, with fewer than three
    matched sizes, or with laws that pass through every point.
    """
    rows = match(a, b)
    if noise is None or joint is None or not joint.measured or len(set(a.sizes[rows[:, 0]].tolist())) < 3:
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
    residual = joint.a.residual[rows[:, 0]] - joint.b.residual[rows[:, 1]]
    # Of the arms' mean: the share of its scatter that a law leaves at each matched cell.
    left = [1 - np.einsum("ip,pi->i", law.jacobian, pseudo_inverse(law.jacobian)) for law in (joint.a, joint.b)]
    expected = float(left[0][rows[:, 0]].sum() + left[1][rows[:, 1]].sum()) / 2
    size_sd = math.sqrt(max(float(residual @ residual) / expected - mean, 0.0))
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
