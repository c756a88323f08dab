"""The compute-optimal model without a law of the loss: approaches 1 and 2 of Hoffmann et al. (arXiv:2203.15556).

    approach1  the runs that no run of the same compute (to 2 %) or less beats are the envelope; log N and log D of the
               envelope are regressed on log C
    approach2  at every FLOP budget the loss is a parabola in log N (or an Akima spline through the sizes); its
               minima are regressed on log C

Both give exponents a and b of N ~ C^a, D ~ C^b. A parabola is the wrong shape away from its minimum: the sum of two
powers is steeper on one side, so approach 2 is biased on wide grids, which is measured here on the runs' own grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import minimize_scalar

from qies.errors import UserError, unknown
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.intervals import relative, t_quantile
from qies.scaling.laws.surface import fit_surface
from qies.scaling.result import Result, paragraph
from qies.scaling.tables.runs import Runs

Array = NDArray[np.float64]

METHODS = ("parabola", "akima")
# Runs meant for one budget differ by rounding of sizes and steps: budgets are separated by a gap of 20 %.
BUDGET_GAP = math.log(1.2)
SAME_COMPUTE = 1.02  # a run is beaten by a better one of up to 2 % more compute: steps and sizes are rounded
WIDE = math.log(8.0)  # a grid that reaches further than this from its minimum, to either side
FEWEST_SIZES = {"parabola": 3, "akima": 5}
CELLS_FOR_BIAS = 8


@dataclass(frozen=True)
class Optimum:
    """The best size at one compute: N, D and the loss there."""

    compute: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class EnvelopeFit(Result):
    """N = k_N C^a and D = k_D C^b through `points`, with the FLOPs and tokens of the table.

    `params` {"k_N", "a", "k_D", "b"}; `exponents` {"a", "b"}; `ci` by Student's t over the points, or None;
    `objective` half the sum of squared residuals of log N; `bias` (approach 2, where runs allow it) the factor by which
    the method's N is off on a noise-free law through the same grid, at each budget.
    """

    form: str
    n: int
    params: dict[str, float]
    exponents: dict[str, float]
    ci: dict[str, tuple[float, float] | None]
    objective: float
    points: tuple[Optimum, ...]
    bias: tuple[float, ...]
    level: float
    warnings: tuple[str, ...]
    # Mean log C of the optima, and of log N and log D the half widths of the interval there and a unit of log C away.
    _middle: float = field(repr=False)
    _half: dict[str, tuple[float, float]] = field(repr=False)

    def optimum(self, compute: ArrayLike) -> tuple[Array, Array]:
        """(N, D) at each C, by the regressions."""
        c = np.asarray(compute, np.float64)
        return self.params["k_N"] * c ** self.params["a"], self.params["k_D"] * c ** self.params["b"]

    def optimum_band(self, compute: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Intervals (lo, hi) of N and of D on the regressions at C; None with two optima."""
        if not self._half:
            return None
        away = math.log(compute) - self._middle
        half = {name: math.hypot(at, slope * away) for name, (at, slope) in self._half.items()}
        n, d = (float(v) for v in self.optimum(compute))
        return (n * math.exp(-half["N"]), n * math.exp(half["N"])), (d * math.exp(-half["D"]), d * math.exp(half["D"]))

    def summary(self) -> str:
        """Exponents, what they rest on, and every warning, as one paragraph."""
        pair = self.ci["a"]
        interval = "" if pair is None else f" ({pair[0]:.3f} to {pair[1]:.3f}, {100 * self.level:g} %)"
        parts = [
            f"{self.form}: N ~ C^a with a {self.exponents['a']:.3f}{interval}, "
            f"D ~ C^b with b {self.exponents['b']:.3f}, through {len(self.points)} optima of {self.n} runs "
            f"from {self.points[0].compute:.3g} to {self.points[-1].compute:.3g} FLOPs"
        ]
        return paragraph(parts, self.warnings)

    def figures(self) -> dict[str, Figure]:
        """Best N and D against compute."""
        return {self.form: figures.envelope_figure(self)}


def fit_approach1(runs: Runs, *, level: float = 0.95) -> EnvelopeFit:
    """The envelope of loss against compute; `runs` are final losses or points of training curves.

    The cheapest and the last runs of the envelope have no competitors, which a warning reports. Raises UserError for
    fewer than three runs on it.
    """
    order = np.argsort(runs.flops, kind="stable")
    lowest = np.minimum.accumulate(runs.loss[order])
    reach = np.searchsorted(runs.flops[order], runs.flops[order] * SAME_COMPUTE, side="right")
    front = order[runs.loss[order] <= lowest[reach - 1]]
    points = tuple(
        Optimum(float(runs.flops[i]), float(runs.params[i]), float(runs.tokens[i]), float(runs.loss[i])) for i in front
    )
    if len(points) < 3:
        raise UserError(
            f"the envelope holds {len(points)} runs and needs 3; give runs at more budgets, or whole curves"
        )
    warnings = ["the envelope's ends have no rivals beyond the grid, so sizes there are the grid's and not the best"]
    sizes = len({p.params for p in points})
    if sizes < 4:
        warnings.append(f"only {sizes} sizes are on the envelope: the exponent follows the grid's steps")
    if np.ptp(runs.weight):
        warnings.append("weights count in the regression; which runs are on the envelope is decided by loss alone")
    return _regress("approach1", len(runs), points, runs.weight[front], (), level, warnings)


def fit_approach2(runs: Runs, *, method: str = "parabola", level: float = 0.95) -> EnvelopeFit:
    """IsoFLOP minima: at every budget a parabola in log N, or an Akima spline (`method`), and its minimum.

    A budget with too few sizes, without a minimum inside its sizes, or bent downwards is left out with a warning.
    Raises UserError for an unknown method and fewer than two budgets left.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    points, used, weight, widest = [], [], list[float](), 0.0
    left_out: dict[str, list[float]] = {}
    for group in isoflop_groups(runs.flops):
        compute = float(np.exp(np.log(runs.flops[group]).mean()))
        found = _minimum(np.log(runs.params[group]), runs.loss[group], runs.weight[group], method)
        if isinstance(found, str):
            left_out.setdefault(found, []).append(compute)
            continue
        log_n, loss = found
        points.append(Optimum(compute, math.exp(log_n), float(_tokens(runs.select(group), compute, log_n)), loss))
        used.append(group)
        weight.append(float(runs.weight[group].mean()))
        widest = max(widest, float(np.abs(np.log(runs.params[group]) - log_n).max()))
    warnings = [_budgets(computes, reason) for reason, computes in left_out.items()]
    if len(points) < 2:
        why = f"; {warnings[0]}" if warnings else ""
        raise UserError(f"approach 2 needs 2 budgets with a minimum inside, found {len(points)}{why}")
    bias = _bias(runs, used, method)
    warnings += _bias_warnings(bias, widest, method)
    if method == "akima" and np.ptp(runs.weight):
        warnings.append("weights count among seeds of one size and among budgets; the spline passes through every size")
    return _regress("approach2", len(runs), tuple(points), np.array(weight), bias, level, warnings)


def isoflop_groups(flops: Array) -> list[NDArray[np.int64]]:
    """Indices of the runs of each budget, cheapest first; a gap of 20 % between neighbours starts a new one."""
    order = np.argsort(flops, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.log(flops[order])) > BUDGET_GAP) + 1)


def _minimum(log_n: Array, loss: Array, weight: Array, method: str) -> tuple[float, float] | str:
    """(log N, loss) of the minimum of one budget, or why there is none."""
    sizes, member = np.unique(log_n, return_inverse=True)
    if len(sizes) < FEWEST_SIZES[method]:
        return f"fewer than {FEWEST_SIZES[method]} sizes"
    if method == "parabola":
        middle = log_n.mean()
        c2, c1, c0 = np.polyfit(log_n - middle, loss, 2, w=np.sqrt(weight))
        if c2 <= 0:
            return "its parabola bends downwards"
        at = middle - c1 / (2 * c2)
        value = c0 - c1**2 / (4 * c2)
    else:
        spline = Akima1DInterpolator(sizes, np.bincount(member, weight * loss) / np.bincount(member, weight))
        roots = spline.derivative().roots(extrapolate=False)
        candidates = np.concatenate([roots[np.isfinite(roots)], sizes])
        at = candidates[np.argmin(spline(candidates))]
        value = spline(at)
    if not sizes[0] < at < sizes[-1]:
        return "its minimum lies outside the sizes tried"
    return float(at), float(value)


def _tokens(budget: Runs, compute: float, log_n: ArrayLike) -> Array:
    """Tokens that `compute` pays for at log N [...]: C / (k N), with FLOPs a parameter and token k from the runs of the
    budget, which grows or falls with N where the table's FLOPs are not 6ND."""
    sizes, member = np.unique(np.log(budget.params), return_inverse=True)
    log_k = np.log(budget.flops / (budget.params * budget.tokens))
    at = np.asarray(log_n, np.float64)
    log_tokens = math.log(compute) - at - np.interp(at, sizes, np.bincount(member, log_k) / np.bincount(member))
    return np.asarray(np.exp(log_tokens))


def _budgets(compute: list[float], reason: str) -> str:
    if len(compute) == 1:
        return f"the budget of {compute[0]:.3g} FLOPs is left out: {reason}"
    return f"{len(compute)} budgets from {compute[0]:.3g} to {compute[-1]:.3g} FLOPs are left out: {reason}"


def _bias(runs: Runs, used: list[NDArray[np.int64]], method: str) -> tuple[float, ...]:
    """The method's N over the true one at each budget, on the approach-3 law of the runs without their noise."""
    if len(set(zip(runs.params, runs.tokens, strict=True))) < CELLS_FOR_BIAS:
        return ()
    law = fit_surface(runs, "approach3")
    if min(law.params["alpha"], law.params["beta"]) <= 0:
        return ()
    found = []
    for group in used:
        budget = runs.select(group)
        compute = float(np.exp(np.log(budget.flops).mean()))
        log_n = np.log(budget.params)

        def loss(at: ArrayLike, budget: Runs = budget, compute: float = compute) -> Array:
            return law.predict(np.exp(at), _tokens(budget, compute, at))

        minimum = _minimum(log_n, loss(log_n), budget.weight, method)
        if isinstance(minimum, str):
            return ()
        bounds = (log_n.min() - WIDE, log_n.max() + WIDE)
        true = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
        found.append(math.exp(minimum[0] - float(true.x)))
    return tuple(found)


def _bias_warnings(bias: tuple[float, ...], widest: float, method: str) -> list[str]:
    said = []
    if method == "parabola" and widest > WIDE:
        said.append(
            f"the grid reaches a factor of {math.exp(widest):.3g} from its minima, where a parabola in log N is the "
            "wrong shape: approach 2 is known to misplace the optimum on such grids; narrow it, or use approach 3"
        )
    if bias and max(abs(math.log(b)) for b in bias) > math.log(1.02):
        low, high = (100 * (f(bias) - 1) for f in (min, max))
        said.append(f"on a noise-free law through the same grid the method's N is off by {low:+.0f} to {high:+.0f} %")
    return said


def _regress(
    form: str,
    n: int,
    points: tuple[Optimum, ...],
    weight: Array,
    bias: tuple[float, ...],
    level: float,
    warnings: list[str],
) -> EnvelopeFit:
    """Straight lines through log N and log D against log C, by weighted least squares."""
    root, c = relative(weight), np.log([p.compute for p in points])
    middle = float(np.average(c, weights=weight))
    centered = (c - middle) * root
    lines = {}
    for name, y in (("N", np.log([p.params for p in points])), ("D", np.log([p.tokens for p in points]))):
        mean = float(np.average(y, weights=weight))
        slope = float(centered @ ((y - mean) * root) / (centered @ centered))
        lines[name] = (slope, mean - slope * middle, (y - mean) * root - slope * centered)
    dof = len(points) - 2
    ci: dict[str, tuple[float, float] | None] = {"a": None, "b": None}
    half: dict[str, tuple[float, float]] = {}
    if dof:
        for key, name in (("a", "N"), ("b", "D")):
            slope, _, residual = lines[name]
            spread = t_quantile(level, dof) * math.sqrt(float(residual @ residual) / dof)
            half[name] = spread / math.sqrt(len(c)), spread / math.sqrt(float(centered @ centered))
            ci[key] = (slope - half[name][1], slope + half[name][1])
    else:
        warnings.append("two optima give a line and no interval")
    a, b = lines["N"][0], lines["D"][0]
    return EnvelopeFit(
        form=form,
        n=n,
        params={"k_N": math.exp(lines["N"][1]), "a": a, "k_D": math.exp(lines["D"][1]), "b": b},
        exponents={"a": a, "b": b},
        ci=ci,
        objective=float(lines["N"][2] @ lines["N"][2]) / 2,
        points=points,
        bias=bias,
        level=level,
        warnings=tuple(warnings),
        _middle=middle,
        _half=half,
    )
