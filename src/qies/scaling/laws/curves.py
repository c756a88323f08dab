"""Laws of one curve: a whole training run under a learning-rate schedule, and accuracy against bits per byte.

annealing   L(s) = E + A S1^-alpha - C S2       Tissue et al. 2024, arXiv:2408.11029
            S1(s) = sum_i eta_i is the learning rate spent, S2(s) = sum_i m_i with m_i = lambda m_(i-1) +
            (eta_(i-1) - eta_i) what annealing gained, with the memory lambda of 0.999 of the paper
downstream  accuracy = floor + (ceiling - floor) / (1 + exp(slope (bpb - midpoint)))
            the sigmoid link of Llama 3 (arXiv:2407.21783, section 3.2.1), with chance as its floor
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter

from qies.errors import UserError
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.intervals import (
    ILL_CONDITIONED,
    condition_number,
    huber_covariance,
    relative,
    t_quantile,
)
from qies.scaling.laws.solver import minimise_residuals
from qies.scaling.result import Result, paragraph

Array = NDArray[np.float64]
Evaluate = Callable[[Array], tuple[Array, Array]]

CURVE_COLUMNS = {"annealing": ("step", "lr", "loss"), "downstream": ("bpb", "accuracy")}
MEMORY = 0.999
ANNEALING_DELTA = 1e-3


@dataclass(frozen=True)
class CurveFit(Result):
    """A fitted curve: `params`, `ci` (Student's t), `objective` (the Huber sum of residuals of log L for annealing,
    half the sum of squares for downstream), `scatter` of the residuals, `condition` of the Jacobian, and the `curve`
    {x, observed, fitted}."""

    form: str
    n: int
    params: dict[str, float]
    ci: dict[str, tuple[float, float] | None]
    objective: float
    scatter: float | None
    condition: float
    level: float
    warnings: tuple[str, ...]
    curve: dict[str, list[float]]
    _predict: Callable[..., Array] = field(repr=False)

    def predict(self, *x: ArrayLike) -> Array:
        """Annealing: loss at every step of a schedule, from (step, lr). Downstream: accuracy from bits per byte."""
        return self._predict(*(np.asarray(v, np.float64) for v in x))

    def summary(self) -> str:
        """The curve, its intervals and every warning, as one paragraph."""
        values = []
        for name, value in self.params.items():
            pair = self.ci.get(name)
            values.append(f"{name} {value:.5g}" + ("" if pair is None else f" ({pair[0]:.4g} to {pair[1]:.4g})"))
        scatter = "" if self.scatter is None else f"; scatter {self.scatter:.3g}"
        parts = [f"{self.form} through {self.n} points: {', '.join(values)}{scatter}"]
        return paragraph(parts, self.warnings)

    def figures(self) -> dict[str, Figure]:
        """The points and the curve."""
        return {self.form: figures.curve_figure(self)}


def schedule_sums(step: Array, lr: Array, memory: float = MEMORY) -> tuple[Array, Array]:
    """S1 and S2 at the given steps [n]; the rate is linear between them and, before the first, as there."""
    every = np.arange(1, int(step[-1]) + 1)
    rate = np.interp(every, step, lr)
    drop = -np.diff(rate, prepend=rate[0])
    momentum = lfilter([1.0], [1.0, -memory], drop)
    at = step.astype(int) - 1
    return np.cumsum(rate)[at], np.cumsum(momentum)[at]


def fit_annealing(
    step: ArrayLike,
    lr: ArrayLike,
    loss: ArrayLike,
    *,
    weight: ArrayLike = 1.0,
    memory: float = MEMORY,
    level: float = 0.95,
) -> CurveFit:
    """Fit a whole curve of loss under a schedule; step, lr, loss [n], steps from 1, rising; weight positive.

    Rows that are not finite are left out. The rate between two rows is interpolated, so rows must be close where it
    changes. Raises UserError for steps that do not rise, values <= 0 and fewer than five rows.
    """
    s, rate, y, w = _finite(step, lr, loss, weight)
    if len(s) < 5:
        raise UserError(f"an annealing curve needs 5 or more rows, found {len(s)}")
    if (np.diff(s) <= 0).any() or s[0] < 1 or (rate < 0).any() or rate[0] <= 0 or (y <= 0).any():
        raise UserError("an annealing curve needs rising steps from 1, lr >= 0 and loss > 0; start after step 0")
    s1, s2 = schedule_sums(s, rate, memory)
    u = np.log(s1) - np.log(s1).mean()
    constant = not (s2 > 0).any()
    gain = s2 / (s2.max() if not constant else 1.0)

    def evaluate(theta: Array) -> tuple[Array, Array]:  # theta = (E, log A at the centre, alpha, C S2max)
        term = np.exp(np.minimum(theta[1] - theta[2] * u, 300.0))
        value = theta[0] + term - theta[3] * gain
        value = np.maximum(value, 1e-6 * y.min())
        columns = [np.ones_like(u), term, -u * term, -gain]
        return np.log(value) - np.log(y), np.stack(columns[: 3 if constant else 4], axis=1) / value[:, None]

    def padded(theta: Array) -> tuple[Array, Array]:
        return evaluate(np.append(theta, 0.0) if constant else theta)

    starts = []
    for alpha in np.geomspace(0.05, 2.0, 6):
        design = np.stack([np.ones_like(u), np.exp(-alpha * u), -gain][: 2 if constant else 3], axis=1) / y[:, None]
        amplitude = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
        starts.append(np.array([max(amplitude[0], 1e-3), math.log(max(amplitude[1], 1e-6)), alpha,
                                *(max(v, 1e-6) for v in amplitude[2:])]))  # fmt: skip
    low = np.array([0.0, -np.inf, 0.0, 0.0][: len(starts[0])])
    theta, objective = _best(padded, starts, low, ANNEALING_DELTA, w)
    coefficient = math.exp(theta[1] + theta[2] * np.log(s1).mean())
    per_gain = 0.0 if constant else float(theta[3] / s2.max())
    warnings = ["the rate never falls, so C is not identified"] if constant else []
    shifted = np.eye(len(theta))
    shifted[1, 2] = np.log(s1).mean()
    names, logged = ("E", "A", "alpha", "C")[: len(theta)], (False, True, False, False)
    scale = np.array([1.0, 1.0, 1.0, 1.0 if constant else 1 / s2.max()])[: len(theta)]
    residual, jacobian = padded(theta)
    ci, scatter, condition, doubts = _certainty(
        residual, jacobian, w, theta, shifted, names, logged, scale, ANNEALING_DELTA, level
    )
    params: dict[str, float] = {"E": float(theta[0]), "A": coefficient, "alpha": float(theta[2]), "C": per_gain}

    def predict(step: Array, lr: Array) -> Array:
        first, second = schedule_sums(step, lr, memory)
        return params["E"] + params["A"] * first ** -params["alpha"] - params["C"] * second

    curve = {"x": s.tolist(), "observed": y.tolist(), "fitted": (np.exp(residual) * y).tolist()}
    return CurveFit(
        "annealing", len(y), params, ci, objective, scatter, condition, level, (*warnings, *doubts), curve, predict
    )


def fit_downstream(
    bpb: ArrayLike,
    accuracy: ArrayLike,
    *,
    weight: ArrayLike = 1.0,
    floor: float | None = None,
    ceiling: float | None = 1.0,
    level: float = 0.95,
) -> CurveFit:
    """Fit accuracy against bits per byte by a falling sigmoid; bpb, accuracy [n], accuracy in [0, 1]; weight positive.

    floor, ceiling: the accuracies of a guess and of a perfect model where known; None fits them within [0, 1]. Rows
    that are not finite are left out. Raises UserError for accuracies outside [0, 1] and too few rows.
    """
    x, y, w = _finite(bpb, accuracy, weight)
    if (y < 0).any() or (y > 1).any():
        raise UserError("accuracy must lie between 0 and 1; divide percentages by 100")
    free = [i for i, known in enumerate((floor, ceiling)) if known is None]
    if len(np.unique(x)) < 2 + len(free):
        raise UserError(
            f"a sigmoid with {2 + len(free)} parameters needs as many distinct bpb, found {len(np.unique(x))}"
        )
    spread = max(float(x.std()), 1e-12)
    fixed = np.array([0.0, 0.0, 0.0 if floor is None else floor, 1.0 if ceiling is None else ceiling])
    where = [0, 1, *(2 + i for i in free)]

    def full(theta: Array) -> Array:
        values = fixed.copy()
        values[where] = theta
        return values

    def evaluate(theta: Array) -> tuple[Array, Array]:  # (log slope in units of the spread, midpoint, floor, ceiling)
        k, mid, low, high = full(theta)
        steep = math.exp(k) / spread
        share = 1 / (1 + np.exp(np.clip(steep * (x - mid), -700, 700)))
        slope = (high - low) * share * (1 - share)
        columns = np.stack([-slope * steep * (x - mid), slope * steep, 1 - share, share], axis=1)
        return low + (high - low) * share - y, columns[:, where]

    starts = [
        np.array([k, mid, 0.8 * y.min(), min(1.2 * y.max(), 1.0)])[where]
        for k in (-1.5, -0.5, 0.5, 1.5)
        for mid in np.linspace(x.min() - spread, x.max() + spread, 7)
    ]
    low, high = np.array([-12.0, -np.inf, 0.0, 0.0])[where], np.array([12.0, np.inf, 1.0, 1.0])[where]
    theta, objective = _best(evaluate, starts, low, math.inf, w, high)
    residual, jacobian = evaluate(theta)
    values = full(theta)
    names = ("slope", "midpoint", "floor", "ceiling")
    params = dict(zip(names, (math.exp(values[0]) / spread, *values[1:].tolist()), strict=True))
    chosen = tuple(names[i] for i in where)
    scale = np.array([1 / spread, 1.0, 1.0, 1.0])[where]
    logged = tuple(name == "slope" for name in chosen)
    ci, scatter, condition, doubts = _certainty(
        residual, jacobian, w, theta, np.eye(len(theta)), chosen, logged, scale, math.inf, level
    )

    def predict(bpb: Array) -> Array:
        share = 1 / (1 + np.exp(params["slope"] * (bpb - params["midpoint"])))
        return params["floor"] + (params["ceiling"] - params["floor"]) * share

    order = np.argsort(x)
    curve = {"x": x[order].tolist(), "observed": y[order].tolist(), "fitted": (residual + y)[order].tolist()}
    return CurveFit("downstream", len(y), params, ci, objective, scatter, condition, level, doubts, curve, predict)


def _finite(*columns: ArrayLike) -> list[Array]:
    """The columns, the last of them weights, without the rows that are not finite."""
    values = np.stack(np.broadcast_arrays(*(np.asarray(c, np.float64) for c in columns)))
    values = values[:, np.isfinite(values).all(axis=0)]
    if (values[-1] <= 0).any():
        raise UserError("weight must be positive; leave the rows without weight out")
    return list(values)


def _best(
    evaluate: Evaluate, starts: list[Array], low: Array, delta: float, weight: Array, high: Array | float = np.inf
) -> tuple[Array, float]:
    """The lowest minimum of the weighted Huber sum (least squares where delta is infinite) over the starts."""
    inside = [np.clip(start, low + 1e-9, high - 1e-9) for start in starts]
    found = [minimise_residuals(evaluate, start, weight, delta, low, high) for start in inside]
    return min(found, key=lambda minimum: minimum[1])


def _certainty(
    residual: Array, jacobian: Array, weight: Array, theta: Array, rows: Array, names: tuple[str, ...],
    logged: tuple[bool, ...], scale: Array, delta: float, level: float,
) -> tuple[dict[str, tuple[float, float] | None], float | None, float, tuple[str, ...]]:  # fmt: skip
    """Interval of each public parameter (rows @ theta, exponentiated where logged, times scale), scatter, condition
    number, and what the data do not determine."""
    dof = len(residual) - len(theta)
    condition = condition_number(jacobian)
    doubts = []
    if condition > ILL_CONDITIONED:
        doubts.append(f"parameters are not identified (condition number {condition:.2g}): they trade off")
    if dof < 1:
        return dict.fromkeys(names), None, condition, (*doubts, "as many parameters as points: no interval")
    root = relative(weight)
    residual = residual * root
    _, covariance = huber_covariance(jacobian * root[:, None], residual, delta)
    half = t_quantile(level, dof) * np.sqrt(np.maximum(np.diag(rows @ covariance @ rows.T), 0.0))
    ci: dict[str, tuple[float, float] | None] = {}
    for i, name in enumerate(names):
        ends = (float((rows @ theta)[i] - half[i]), float((rows @ theta)[i] + half[i]))
        lo, hi = (math.exp(min(e, 709.0)) for e in ends) if logged[i] else ends
        ci[name] = (lo * float(scale[i]), hi * float(scale[i]))
    return ci, math.sqrt(float(residual @ residual) / dof), condition, tuple(doubts)
