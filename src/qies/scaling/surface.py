"""A fitted law of N and D: a frozen result that says it in words, predicts from it, stores it and draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError
from qies.scaling.forms import Form
from qies.scaling.intervals import stretched_percentiles, t_quantile
from qies.scaling.table import Dropped, Runs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Residual:
    """A run beside the law: `residual` is log(loss / predicted)."""

    name: str
    params: float
    tokens: float
    loss: float
    predicted: float
    residual: float
    outlier: bool


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted law of N and D; `summary()` says it in words, `predict` draws it, `to_dict()` stores it.

    `n` runs at `cells` distinct (N, D); `params` by the law's names; `objective` the Huber sum of residuals of log L
    (of L where `criterion` is "loss"); `exponents` {"a", "b"} of the optimum N ~ C^a, D ~ C^b under C = 6ND;
    `ci` of every parameter and exponent, or None; `scatter` the residual standard deviation of log loss;
    `condition` of the Jacobian with unit columns; `convention` of the runs' FLOPs.
    """

    form: str
    n: int
    cells: int
    params: dict[str, float]
    objective: float
    exponents: dict[str, float]
    ci: dict[str, tuple[float, float] | None]
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...]
    condition: float
    residuals: tuple[Residual, ...]
    scatter: float | None
    delta: float
    criterion: str
    level: float
    interval: str
    convention: str
    _law: Form = field(repr=False)
    _theta: Array = field(repr=False)
    _center: Array = field(repr=False)
    _covariance: Array | None = field(repr=False)
    _draws: Array = field(repr=False)

    @property
    def draws(self) -> Array:
        """Bootstrap parameters [bootstrap, p] in the order of `params`; [0, p] without a bootstrap."""
        return self._law.public(self._draws, self._center)

    def predict(self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike | None = None) -> Array:
        """Loss at N and D, which broadcast; float64. unique: distinct tokens among D, by default all, which
        `data-constrained` alone heeds."""
        x, shape = self._logs(params, tokens, unique)
        return np.exp(self._law.evaluate(self._theta[None], x)[0][0]).reshape(shape)

    def predict_band(
        self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike | None = None
    ) -> tuple[Array, Array, Array]:
        """(loss, lo, hi) as in `predict`: the law's own uncertainty at `level`; NaN where there is no interval."""
        x, shape = self._logs(params, tokens, unique)
        log_loss, jacobian = (part[0] for part in self._law.evaluate(self._theta[None], x))
        if len(self._draws):
            drawn = self._law.evaluate(self._draws, x)[0]
            lo, hi = stretched_percentiles(log_loss, drawn, self.level)
        elif self._covariance is not None:
            variance = np.einsum("ni,ij,nj->n", jacobian, self._covariance, jacobian)
            half = t_quantile(self.level, self.cells - len(self.params)) * np.sqrt(np.maximum(variance, 0.0))
            lo, hi = log_loss - half, log_loss + half
        else:
            lo = hi = np.full_like(log_loss, np.nan)
        return np.exp(log_loss).reshape(shape), np.exp(lo).reshape(shape), np.exp(hi).reshape(shape)

    def optimum(self, compute: float) -> tuple[float, float, float]:
        """(N, D, loss) of the lowest loss at C = 6ND FLOPs; closed form, as the sum of two powers."""
        a_amp, alpha, b_amp, beta = self._law.reducible(self.params)
        if not (alpha > 0 and beta > 0 and compute > 0):
            raise UserError("no optimum: the law does not fall with both N and D, or compute is not positive")
        log_ratio = math.log(alpha) + math.log(a_amp) - math.log(beta) - math.log(b_amp)
        n = math.exp((log_ratio + beta * math.log(compute / 6)) / (alpha + beta))
        d = compute / 6 / n
        return n, d, float(self.predict(n, d))

    def optimum_band(self, compute: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Intervals (lo, hi) of N and of D of the optimum at C = 6ND FLOPs; None where there are none."""

        def log_n(theta: Array) -> float:
            public = dict(zip(self._law.names, self._law.public(theta, self._center).tolist(), strict=True))
            a_amp, alpha, b_amp, beta = self._law.reducible(public)
            if not min(a_amp, alpha, b_amp, beta) > 0:
                return math.nan
            return (math.log(alpha * a_amp / (beta * b_amp)) + beta * math.log(compute / 6)) / (alpha + beta)

        best = log_n(self._theta)
        if len(self._draws):
            drawn = np.array([log_n(theta) for theta in self._draws])
            lo, hi = (float(v) for v in stretched_percentiles(np.array(best), drawn, self.level))
        elif self._covariance is not None:
            steps = 1e-5 * np.eye(len(self._theta))
            gradient = np.array([(log_n(self._theta + e) - log_n(self._theta - e)) / 2e-5 for e in steps])
            error = math.sqrt(max(float(gradient @ self._covariance @ gradient), 0.0))
            half = t_quantile(self.level, self.cells - len(self.params)) * error
            lo, hi = best - half, best + half
        else:
            return None
        if not (math.isfinite(lo) and math.isfinite(hi) and max(-lo, hi) < 300):
            return None
        return (math.exp(lo), math.exp(hi)), (compute / 6 / math.exp(hi), compute / 6 / math.exp(lo))

    def frontier(self, compute: ArrayLike) -> Array:
        """Lowest loss at each C = 6ND FLOPs."""
        values = np.asarray(compute, np.float64)
        return np.array([self.optimum(float(c))[2] for c in values.reshape(-1)]).reshape(values.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; no interval is null, and so is the infinite delta of least squares."""
        public = {k: getattr(self, k) for k in self.__dataclass_fields__ if not k.startswith("_")}
        plain = {
            "ci": {name: None if pair is None else list(pair) for name, pair in self.ci.items()},
            "dropped": [vars(d) for d in self.dropped],
            "warnings": list(self.warnings),
            "residuals": [vars(r) for r in self.residuals],
            "condition": self.condition if math.isfinite(self.condition) else None,
            "delta": self.delta if math.isfinite(self.delta) else None,
        }
        return {**public, **plain, "bootstrap": len(self._draws)}

    def summary(self) -> str:
        """The law, its exponents and intervals, what they rest on, and every warning, as one paragraph."""
        values = ", ".join(f"{k} {v:.5g}{_range(self.ci[k])}" for k, v in self.params.items())
        exponents = ", ".join(
            f"{k} {v:.3f}{'' if k in self.params else _range(self.ci[k])}" for k, v in self.exponents.items()
        )
        how = f"{len(self._draws)} bootstrap draws" if len(self._draws) else self.interval
        kind = "least squares" if math.isinf(self.delta) else f"Huber sum, delta {self.delta:g},"
        basis = f"{kind} on {'log L' if self.criterion == 'log' else 'L'}: objective {self.objective:.6g}"
        parts = [
            f"{self.form} through {self.n} runs at {self.cells} distinct (N, D): {values}",
            f"Optimum N ~ C^a, D ~ C^b: {exponents}",
            f"{basis}; {100 * self.level:g}% CIs by {how}"
            + ("" if self.scatter is None else f"; scatter {100 * self.scatter:.2g} %"),
            f"FLOPs {self.convention}",
        ]
        return ". ".join([*parts, *(w[0].upper() + w[1:] for w in self.warnings)]) + "."

    def plot(self, runs: Runs | None = None, axis: str = "flops") -> Any:
        """The runs and the law against `axis` ("params", "tokens" or "flops"); residuals where no runs are given."""
        from qies.scaling import figures

        return figures.residual_figure(self) if runs is None else figures.surface_figure(self, runs, axis)

    def _logs(self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike | None) -> tuple[Array, tuple[int, ...]]:
        given = (params, tokens, tokens if unique is None else unique)
        n, d, u = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in given))
        columns = [np.log(n.reshape(-1)), np.log(d.reshape(-1))]
        if self._law.repeats:
            columns.append(log_repeats(d.reshape(-1), u.reshape(-1)))
        return np.stack(columns, axis=1) - self._center, n.shape


def log_repeats(tokens: Array, unique: Array | None) -> Array:
    """log(D/U) [n], 0 where no token repeats."""
    return np.zeros_like(tokens) if unique is None else np.maximum(np.log(tokens / unique), 0.0)


def _range(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f" ({pair[0]:.4g} to {pair[1]:.4g})"
