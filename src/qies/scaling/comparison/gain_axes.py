"""What two arms are compared in: compute, parameters, data, time; and the laws behind each axis.

Where both arms vary size and tokens apart from each other, one surface L(N, D) an arm serves every axis: compute
and time along each arm's own compute-optimal frontier, parameters at the largest token budget both arms have,
data at the largest size both have. Where tokens follow size (one budget a size), a surface is not identified and
each axis has its own power law along the path that the runs took.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qies.errors import UserError
from qies.scaling.comparison.joint_inference import JointFit, Law, Path, join, make_law
from qies.scaling.comparison.matching import Cells, match
from qies.scaling.laws.forms import surface_form
from qies.scaling.laws.frontier import Cost, fit_cost, optimum
from qies.scaling.laws.power_law import fit_power
from qies.scaling.laws.surface import COLLINEAR, fit_surface
from qies.scaling.tables.runs import Runs

Array = NDArray[np.float64]
Noise = tuple[Array, int] | None

SURFACE = ("log E", "log A", "log B", "alpha", "beta")
APPROACH3 = surface_form("approach3")
POWER = ("log A", "alpha")
SHARED = {"surface": ("E", "alpha", "beta"), "power": ("alpha",)}
# Five parameters, and three cells more to measure the scatter with.
SURFACE_CELLS = 8
# Least squares inside 5 %: seeds move the loss far less, and broken runs have been left out before.
DELTA = 0.05
# Residuals of log cost beyond which a power of N and D does not describe what a run costs.
COST_SCATTER = 0.05
# log of a floor, or an amplitude, that the fit put at zero.
LOG_ZERO = -60.0


@dataclass(frozen=True)
class GainAxis:
    """One variable: the laws, each arm's path from its log to a law's inputs, and the shared range of its log."""

    joint: JointFit
    path_a: Path
    path_b: Path
    low: float
    high: float


@dataclass(frozen=True)
class GainAxes:
    """`form` "surface" or "power"; `of` the axes by variable, compute first; `costs` of FLOPs (surfaces only)."""

    form: str
    of: dict[str, GainAxis]
    costs: tuple[Cost, Cost] | None
    warnings: tuple[str, ...]


def power(theta: Array, x: Array) -> tuple[Array, Array]:
    """log L = log A - alpha x at log x [n, 1]: [n], Jacobian [n, 2]."""
    return theta[0] - theta[1] * x[:, 0], np.stack([np.ones(len(x)), -x[:, 0]], axis=1)


def surface(theta: Array, x: Array) -> tuple[Array, Array]:
    """log L of approach 3 at (log N, log D) [n, 2]: [n], Jacobian [n, 5]; theta in `SURFACE`'s order."""
    value, jacobian = APPROACH3.evaluate(theta[None], x)
    return value[0], jacobian[0]


def tokens_follow_size(cells: Cells) -> bool:
    """Whether an arm's cells cannot tell the effect of size from that of tokens."""
    sizes, budgets = ({key[i] for key in cells.key} for i in (0, 1))
    if len(cells) < SURFACE_CELLS or len(sizes) < 3 or len(budgets) < 3:
        return True
    return abs(float(np.corrcoef(np.log(cells.params), np.log(cells.tokens))[0, 1])) > COLLINEAR


def fit_gain_axes(a: Cells, b: Cells, runs: tuple[Runs, Runs], form: str, level: float, noise: Noise) -> GainAxes:
    """Fit both arms. `form` "auto" takes surfaces where both arms identify them; `noise` as for `join`.

    Raises UserError for a requested form that the cells do not identify.
    """
    follows = [tokens_follow_size(cells) for cells in (a, b)]
    if form == "surface" and any(follows):
        raise UserError(
            f"form 'surface' needs {SURFACE_CELLS} or more (size, tokens) points in each arm, three sizes and three "
            "budgets that do not move together; use --form power or train more budgets"
        )
    if form == "power" or any(follows):
        said = (
            ()
            if form == "power"
            else (
                "tokens follow size in these runs, so no surface L(N, D) is identified: each gain has a power law "
                "along the path the runs took, and the gains in parameters and data move both together",
            )
        )
        return _power_axes(a, b, level, noise, said)
    return _surface_axes(a, b, runs, level, noise)


def _power_axes(a: Cells, b: Cells, level: float, noise: Noise, said: tuple[str, ...]) -> GainAxes:
    columns = {"compute": "flops", "params": "params", "data": "tokens", "time": "seconds"}
    of: dict[str, GainAxis] = {}
    warnings = list(said)
    for variable, column in columns.items():
        xs = [np.log(getattr(cells, column)) for cells in (a, b)]
        if not all(np.isfinite(x).all() for x in xs):
            warnings += _unknown(variable, xs)
            continue
        if any(np.ptp(x) == 0 for x in xs):
            warnings.append(f"no gain in {variable}: an arm has one value of it")
            continue
        laws = [_power_law(x, cells.log_loss) for x, cells in zip(xs, (a, b), strict=True)]
        joint = join(laws[0], laws[1], match(a, b), level, noise, (a.sizes, b.sizes))
        _add(of, warnings, variable, joint, (_column, _column), xs)
    return GainAxes("power", of, None, tuple(warnings))


def _power_law(x: Array, log_loss: Array) -> Law:
    fit = fit_power(np.exp(x), np.exp(log_loss), delta=DELTA, interval="t")
    theta = np.array([math.log(fit.params["A"]), fit.params["alpha"]])
    return make_law(power, POWER, theta, x[:, None], log_loss)


def _surface_axes(a: Cells, b: Cells, runs: tuple[Runs, Runs], level: float, noise: Noise) -> GainAxes:
    laws = [_surface_law(cells, arm) for cells, arm in zip((a, b), runs, strict=True)]
    joint = join(laws[0], laws[1], match(a, b), level, noise, (a.sizes, b.sizes))
    of: dict[str, GainAxis] = {}
    warnings: list[str] = []
    flops: tuple[Cost, Cost] | None = None
    for variable, column in {"compute": "flops", "time": "seconds"}.items():
        logs = [np.log(getattr(cells, column)) for cells in (a, b)]
        if not all(np.isfinite(x).all() for x in logs):
            warnings += _unknown(variable, logs)
            continue
        costs = [fit_cost(law.x[:, 0], law.x[:, 1], x) for law, x in zip(laws, logs, strict=True)]
        if (scatter := max(cost.scatter for cost in costs)) > COST_SCATTER:
            warnings.append(
                f"{column} scatter by {100 * scatter:.0f} % around a power of size and tokens, which the band of the "
                f"gain in {variable} does not hold"
            )
        try:
            paths = [frontier(law, cost) for law, cost in zip(laws, costs, strict=True)]
            paths[0](logs[0]), paths[1](logs[1])
        except ValueError as e:
            warnings.append(f"no gain in {variable}: {e}")
            continue
        _add(of, warnings, variable, joint, (paths[0], paths[1]), logs)
        if variable == "compute":
            flops = (costs[0], costs[1])
    top_n, top_d = np.minimum(joint.a.x.max(axis=0), joint.b.x.max(axis=0))

    def sizes(log_n: Array) -> Array:
        return np.stack([log_n, np.full_like(log_n, top_d)], axis=1)

    def budgets(log_d: Array) -> Array:
        return np.stack([np.full_like(log_d, top_n), log_d], axis=1)

    _add(of, warnings, "params", joint, (sizes, sizes), [joint.a.x[:, 0], joint.b.x[:, 0]])
    _add(of, warnings, "data", joint, (budgets, budgets), [joint.a.x[:, 1], joint.b.x[:, 1]])
    return GainAxes("surface", of, flops, tuple(warnings))


def _surface_law(cells: Cells, runs: Runs) -> Law:
    """approach3 by least squares on the cells' mean log losses."""
    one = np.array([rows[0] for rows in cells.runs])
    means = replace(
        runs.select(one),
        params=cells.params,
        tokens=cells.tokens,
        flops=cells.flops,
        loss=np.exp(cells.log_loss),
        weight=np.ones(len(cells)),
    )
    fit = fit_surface(means, "approach3", delta=DELTA).params
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log([fit["E"], fit["A"], fit["B"]]), LOG_ZERO)
    x = np.log(np.stack([cells.params, cells.tokens], axis=1))
    return make_law(surface, SURFACE, np.array([*logs, fit["alpha"], fit["beta"]]), x, cells.log_loss)


def frontier(law: Law, cost: Cost) -> Path:
    """log cost [n] -> (log N, log D) [n, 2] of least loss."""
    terms = APPROACH3.reducible(law.natural(law.theta))
    return lambda log_cost: optimum(terms, cost, log_cost)


def _column(x: Array) -> Array:
    return x[:, None]


def _unknown(variable: str, logs: list[Array]) -> list[str]:
    """Nothing where no run has a value, as then it was not asked for."""
    lacking, every = sum(int((~np.isfinite(x)).sum()) for x in logs), sum(len(x) for x in logs)
    if lacking == every:
        return []
    return [f"no gain in {variable}: {lacking} of {every} (size, tokens) points lack a positive value of it"]


def _add(
    of: dict[str, GainAxis],
    warnings: list[str],
    variable: str,
    joint: JointFit,
    paths: tuple[Path, Path],
    logs: list[Array],
) -> None:
    """The axis over the range both arms have, or a warning that they have none in common."""
    low, high = max(x.min() for x in logs), min(x.max() for x in logs)
    if high <= low:
        warnings.append(f"no gain in {variable}: the arms' ranges do not overlap")
    else:
        of[variable] = GainAxis(joint, paths[0], paths[1], float(low), float(high))
