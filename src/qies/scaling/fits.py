"""Fit a law of the loss in parameters N and tokens D, and say how sure it is.

The fit minimises a sum (not a mean) of Huber losses of the residuals of log L (Hoffmann et al. 2022,
arXiv:2203.15556; why the sum: Besiroglu et al. 2024, arXiv:2404.10102), from a grid of starts, by `solver`.

Runs that share N and D (the seeds of one configuration) are one cell. Cells are what intervals rest on: four
configurations are four observations, whatever the seeds. Without a bootstrap the interval is Student's t with the
covariance of the Huber estimate; with one, cells are resampled with all their seeds ("runs") or seeds within their
cell ("seeds", how far another choice of seeds would move the law), and the draws' one-sigma percentiles are stretched
to the level (`intervals.stretched_percentiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, nearest
from qies.scaling.forms import LEAST_FLOOR, STEEPEST, Form, surface_form
from qies.scaling.intervals import (
    ILL_CONDITIONED,
    condition_number,
    huber_covariance,
    resampled_counts,
    stretched_percentiles,
    t_quantile,
)
from qies.scaling.solver import best, minimise, residuals
from qies.scaling.table import Dropped, Runs

Array = NDArray[np.float64]

DELTA = 1e-3
RESAMPLE = ("runs", "seeds")
CRITERIA = ("log", "loss")
OUTLIER_SIGMAS = 4.0  # robust standard deviations of log loss from which a run is named
DRAWS_A_BATCH = 50  # between two calls of `progress`


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

    def predict(self, params: ArrayLike, tokens: ArrayLike) -> Array:
        """Loss at N and D, which broadcast; float64."""
        x, shape = self._logs(params, tokens)
        return np.exp(self._law.evaluate(self._theta[None], x)[0][0]).reshape(shape)

    def predict_band(self, params: ArrayLike, tokens: ArrayLike) -> tuple[Array, Array, Array]:
        """(loss, lo, hi) at N and D: the law's own uncertainty at `level`; NaN where there is no interval."""
        x, shape = self._logs(params, tokens)
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
            f"{basis}; {100 * self.level:g} % intervals by {how}"
            + ("" if self.scatter is None else f"; scatter {100 * self.scatter:.2g} %"),
            f"FLOPs {self.convention}",
        ]
        if self.dropped:
            parts.append(
                f"{len(self.dropped)} runs left out: " + "; ".join(f"{d.name} ({d.reason})" for d in self.dropped)
            )
        return ". ".join([*parts, *(w[0].upper() + w[1:] for w in self.warnings)]) + "."

    def plot(self, runs: Runs | None = None, axis: str = "flops") -> Any:
        """The runs and the law against `axis` ("params", "tokens" or "flops"); residuals where no runs are given."""
        from qies.scaling import figures

        return figures.residual_figure(self) if runs is None else figures.surface_figure(self, runs, axis)

    def _logs(self, params: ArrayLike, tokens: ArrayLike) -> tuple[Array, tuple[int, ...]]:
        n, d = np.broadcast_arrays(np.asarray(params, np.float64), np.asarray(tokens, np.float64))
        return np.log(np.stack([n.reshape(-1), d.reshape(-1)], axis=1)) - self._center, n.shape


def fit_surface(
    runs: Runs,
    form: str = "approach3",
    *,
    delta: float | None = None,
    bootstrap: int = 0,
    resample: str = "runs",
    level: float = 0.95,
    drop_worst: int = 0,
    seed: int = 0,
    criterion: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SurfaceFit:
    """Fit a law of N and D (see `forms`) to runs.

    delta: residual beyond which a run counts linearly; by default 1e-3 on log L, and least squares on L for
    `gadre`, as each was published. criterion: residuals of "log" L or the "loss" L; giving delta means log L.
    bootstrap: draws, of whole cells (`resample` "runs") or of seeds within cells ("seeds"), from `seed`. level:
    coverage of the intervals. drop_worst: leave out so many runs, each time the one with the largest residual of log
    loss, and fit again; `dropped` lists them. progress: called with the number of draws done. Raises UserError for
    runs that are not finite (pass them through `sound` first), an unknown option, or fewer cells than parameters.
    """
    law = surface_form(form)
    if criterion is None:
        criterion = "log" if delta is not None else law.criterion
    if delta is None:
        delta = DELTA if criterion == "log" else math.inf
    _check(runs, law, delta, bootstrap, resample, level, drop_worst, criterion)
    dropped: tuple[Dropped, ...] = ()
    if drop_worst:
        runs, dropped = _without_worst(runs, law, delta, criterion, drop_worst)
    logs = np.log(np.stack([runs.params, runs.tokens], axis=1))
    center = logs.mean(axis=0)
    x = logs - center
    theta, objective = best(law, x, runs.loss, runs.weight, delta, criterion)
    cells, member = np.unique(logs, axis=0, return_inverse=True)
    member = member.reshape(-1)
    dof = len(cells) - len(law.names)
    draws = np.empty((0, len(law.names)))
    if dof and bootstrap:
        weight = resampled_counts(member, resample, bootstrap, seed) * runs.weight
        parts = []
        for i in range(0, bootstrap, DRAWS_A_BATCH):
            part = weight[i : i + DRAWS_A_BATCH]
            parts.append(minimise(law, np.tile(theta, (len(part), 1)), x, runs.loss, part, delta, criterion)[0])
            progress(i + len(part))
        draws = np.concatenate(parts)
    log_loss, jacobian = (part[0] for part in law.evaluate(theta[None], x))
    residual = np.log(runs.loss) - log_loss
    scatter, covariance = _covariance(law, theta, x, runs, member, delta, criterion) if dof else (None, None)
    params = dict(zip(law.names, law.public(theta, center).tolist(), strict=True))
    ci = _intervals(law, theta, center, covariance, draws, level, len(cells), dof)
    condition = condition_number(jacobian)
    table = _table(runs, np.exp(log_loss), residual)
    return SurfaceFit(
        form=form,
        n=len(runs),
        cells=len(cells),
        params=params,
        objective=objective,
        exponents=_exponents(law, params),
        ci=ci,
        dropped=dropped,
        warnings=tuple(_doubts(law, theta, runs, condition, dof, table)),
        condition=condition,
        residuals=table,
        scatter=scatter,
        delta=delta,
        criterion=criterion,
        level=level,
        interval="none" if not dof else f"bootstrap of {resample}" if bootstrap else "t",
        convention=runs.convention,
        _law=law,
        _theta=theta,
        _center=center,
        _covariance=covariance,
        _draws=draws,
    )


def _without_worst(runs: Runs, law: Form, delta: float, criterion: str, count: int) -> tuple[Runs, tuple[Dropped, ...]]:
    """The runs without the `count` worst: the one furthest from the law goes and the law is fitted again, each time.

    One at a time, because outliers that stand together pull a fit to them and push good runs away from it.
    """
    logs = np.log(np.stack([runs.params, runs.tokens], axis=1))
    x = logs - logs.mean(axis=0)
    kept, named = np.arange(len(runs)), []
    for rank in range(count):
        theta, _ = best(law, x[kept], runs.loss[kept], runs.weight[kept], delta, criterion)
        residual = -residuals(law, theta[None], x[kept], runs.loss[kept], "log")[0]
        worst = int(np.argmax(np.abs(residual)))
        reason = f"worst run {rank + 1} of {count}: loss {100 * math.expm1(residual[worst]):+.1f} % off the law"
        named.append(Dropped(int(kept[worst]), runs.name[kept[worst]], reason))
        kept = np.delete(kept, worst)
    return runs.select(kept), tuple(sorted(named, key=lambda d: d.index))


def _covariance(
    law: Form, theta: Array, x: Array, runs: Runs, member: NDArray[np.int64], delta: float, criterion: str
) -> tuple[float, Array]:
    """Scatter of log loss over cells, covariance of theta: seeds of a cell are averaged first."""
    size = np.bincount(member)
    log_loss, jacobian = (part[0] for part in law.evaluate(theta[None], x))
    residual = residuals(law, theta[None], x, runs.loss, criterion)[0]
    level = np.exp(log_loss) if criterion == "loss" else np.ones_like(log_loss)
    first = np.unique(member, return_index=True)[1]
    weight = np.sqrt(np.bincount(member, runs.weight) / size)
    scaled = (jacobian * level[:, None])[first] * weight[:, None]
    _, covariance = huber_covariance(scaled, np.bincount(member, residual) / size, delta)
    off = np.bincount(member, log_loss - np.log(runs.loss)) / size
    return math.sqrt(float(off @ off) / (len(size) - len(theta))), covariance


def _exponents(law: Form, params: dict[str, float]) -> dict[str, float]:
    """a and b of the optimum N ~ C^a, D ~ C^b; NaN-free: even shares where neither exponent is positive."""
    _, alpha, _, beta = law.reducible(params)
    a = beta / (alpha + beta) if alpha + beta > 0 else 0.5
    return {"a": a, "b": 1 - a}


def _intervals(
    law: Form, theta: Array, center: Array, covariance: Array | None, draws: Array, level: float, cells: int, dof: int
) -> dict[str, tuple[float, float] | None]:
    """Interval of every parameter and of the exponents a and b."""
    # Under one exponent for both (gadre, whose amplitudes are called a and b) the optimum is C^1/2 by assumption.
    free = () if "eta" in law.names else ("a", "b")
    names = (*law.names, *free)
    if covariance is None:
        return dict.fromkeys(names)
    rows = law.rows(center)
    values = rows @ theta
    share = _exponents(law, dict(zip(law.names, law.public(theta, center).tolist(), strict=True)))["a"]
    if len(draws):
        low, high = stretched_percentiles(values, draws @ rows.T, level)
        publics = law.public(draws, center)
        shares = [_exponents(law, dict(zip(law.names, row, strict=True)))["a"] for row in publics]
        a_low, a_high = (float(v) for v in stretched_percentiles(np.array(share), np.array(shares), level))
    else:
        t = t_quantile(level, dof)
        half = t * np.sqrt(np.maximum(np.diag(rows @ covariance @ rows.T), 0.0))
        low, high = values - half, values + half
        spread = t * _exponent_error(law, theta, covariance) if free else 0.0
        a_low, a_high = share - spread, share + spread
    low, high = law.exponentiate(low), law.exponentiate(high)
    if free:
        low, high = np.append(low, [a_low, 1 - a_high]), np.append(high, [a_high, 1 - a_low])
    return {name: (float(lo), float(hi)) for name, lo, hi in zip(names, low, high, strict=True)}


def _exponent_error(law: Form, theta: Array, covariance: Array) -> float:
    """Standard error of a = beta / (alpha + beta), by its gradient."""
    i, j = law.names.index("alpha"), law.names.index("beta")
    alpha, beta = theta[i], theta[j]
    if alpha + beta == 0:
        return 0.5
    gradient = np.zeros(len(theta))
    gradient[i], gradient[j] = -beta / (alpha + beta) ** 2, alpha / (alpha + beta) ** 2
    return math.sqrt(max(float(gradient @ covariance @ gradient), 0.0))


def _table(runs: Runs, predicted: Array, residual: Array) -> tuple[Residual, ...]:
    scale = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    outlier = np.abs(residual - np.median(residual)) > max(OUTLIER_SIGMAS * scale, 1e-9)
    columns = (runs.params, runs.tokens, runs.loss, predicted, residual)
    rows = zip(runs.name, *(c.tolist() for c in columns), outlier.tolist(), strict=True)
    return tuple(Residual(*row) for row in rows)


def _doubts(law: Form, theta: Array, runs: Runs, condition: float, dof: int, table: tuple[Residual, ...]) -> list[str]:
    """Plain sentences on what the data do not determine."""
    said = []
    if not dof:
        said.append("as many parameters as distinct (N, D): the law passes through nearly every point, no interval")
    if condition > ILL_CONDITIONED:
        said.append(
            f"parameters are not identified (condition number {condition:.2g}): they trade off against each other, so "
            "quote predictions inside the data, not single parameters"
        )
    at = dict(zip(law.names, theta.tolist(), strict=True))
    low, high = law.bounds(runs.loss)
    if at["E"] <= float(np.log(runs.loss.min())) + LEAST_FLOOR / 2:
        said.append("the floor E is not identified (the best floor is 0): do not quote E")
    for i, name in enumerate(law.names):
        if name != "E" and (theta[i] <= low[i] or theta[i] >= high[i] or abs(theta[i]) == STEEPEST):
            said.append(f"{name} ran to its bound: its term does not follow a power law in these data")
    far = sorted((r for r in table if r.outlier), key=lambda r: -abs(r.residual))
    if far:
        named = ", ".join(f"{r.name} ({100 * math.expm1(r.residual):+.1f} %)" for r in far[:5])
        said.append(f"{len(far)} of {len(table)} runs lie more than {OUTLIER_SIGMAS:g} robust sigma off: {named}")
    return said


def _check(
    runs: Runs, law: Form, delta: float, bootstrap: int, resample: str, level: float, drop_worst: int, criterion: str
) -> None:
    if resample not in RESAMPLE:
        raise UserError(
            f"resample '{resample}' is unknown; choose from {', '.join(RESAMPLE)}.{nearest(resample, RESAMPLE)}"
        )
    if criterion not in CRITERIA:
        raise UserError(
            f"criterion '{criterion}' is unknown; choose from {', '.join(CRITERIA)}.{nearest(criterion, CRITERIA)}"
        )
    if not (delta > 0 and 0 < level < 1 and bootstrap >= 0 and bootstrap != 1 and drop_worst >= 0):
        raise UserError("delta > 0, 0 < level < 1, drop_worst >= 0 and bootstrap 0 or at least 2 are needed")
    values = np.stack([runs.params, runs.tokens, runs.loss, runs.weight])
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError("params, tokens, loss and weight must be finite and positive; leave the other runs out (sound)")
    cells = len(set(zip(runs.params, runs.tokens, strict=True)))
    if cells - drop_worst < len(law.names):
        raise UserError(
            f"{law.name} has {len(law.names)} parameters and needs as many distinct (N, D); found {cells}"
            + (f" less {drop_worst} dropped" if drop_worst else "")
            + "; train more sizes or token counts, or choose a smaller form"
        )
    if bootstrap and resample == "seeds" and cells == len(runs):
        raise UserError("no (N, D) has more than one seed to resample; use --resample runs")


def _range(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f" ({pair[0]:.4g} to {pair[1]:.4g})"
