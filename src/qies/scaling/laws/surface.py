"""Fit a law of the loss in parameters N and tokens D, with confidence intervals.

The fit minimises a sum (not a mean) of Huber losses of the residuals of log L (Hoffmann et al. 2022,
arXiv:2203.15556; why the sum: Besiroglu et al. 2024, arXiv:2404.10102), from a grid of starts, by `solver`.

Runs that share N and D (the seeds of one configuration) are one cell. Cells are what intervals rest on: four
configurations are four observations, whatever the seeds. Without a bootstrap the interval is Student's t with the
covariance of the Huber estimate, which takes the scatter to be the same everywhere and is too narrow where the runs
that decide an exponent scatter more than the rest. With a bootstrap, cells are resampled with all their seeds, and with
all other points of their training curves where `run` names these ("runs"), or seeds within their cell ("seeds", how
far another choice of seeds would move the law), and the draws' one-sigma percentiles are stretched to the level
(`intervals.stretched_percentiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, unknown
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.forms import LEAST_FLOOR, STEEPEST, Form, surface_form
from qies.scaling.laws.frontier import SIX_ND, optimum
from qies.scaling.laws.intervals import (
    ILL_CONDITIONED,
    condition_number,
    huber_covariance,
    independent_groups,
    relative,
    resampled_counts,
    stretched_percentiles,
    t_quantile,
)
from qies.scaling.laws.solver import best, check_criterion, minimise, residuals
from qies.scaling.result import Result, paragraph
from qies.scaling.tables.runs import Dropped, Runs

Array = NDArray[np.float64]

DELTA = 1e-3
RESAMPLE = ("runs", "seeds")
OUTLIER_SIGMAS = 4.0  # robust standard deviations of log loss from which a run is named
FEWEST_GROUPS = 5  # independent ones, below which a bootstrap says nothing
# Default bootstrap: its draws, the groups it needs, and the ratio of widths from which Student's t is too narrow.
AUTO_DRAWS, AUTO_GROUPS, TOO_NARROW = 200, 20, 1.5
# |correlation| of log N and log D beyond which tokens follow size.
COLLINEAR = 0.98
DRAWS_A_BATCH = 50  # between two calls of `progress`


@dataclass(frozen=True)
class Residual:
    """A run and what the law predicts for it: `residual` is log(loss / predicted)."""

    name: str
    params: float
    tokens: float
    loss: float
    predicted: float
    residual: float
    outlier: bool


@dataclass(frozen=True)
class SurfaceFit(Result):
    """A fitted law of N and D; `predict` evaluates it, `predict_band` with its band.

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
        only `data-constrained` uses."""
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
        """(N, D, loss) of the lowest loss at C = 6ND FLOPs."""
        log_n = self._log_optimum(self.params, compute) if compute > 0 else math.nan
        if math.isnan(log_n):
            raise UserError("no optimum: the law does not fall with both N and D, or compute is not positive")
        n = math.exp(log_n)
        d = compute / 6 / n
        return n, d, float(self.predict(n, d))

    def optimum_band(self, compute: float) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Intervals (lo, hi) of N and of D of the optimum at C = 6ND FLOPs; None where there are none."""

        def log_n(theta: Array) -> float:
            public = dict(zip(self._law.names, self._law.public(theta, self._center).tolist(), strict=True))
            return self._log_optimum(public, compute)

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

    def _log_optimum(self, params: dict[str, float], compute: float) -> float:
        """log N of the lowest loss at C = 6ND; NaN where the law does not fall with both N and D."""
        try:
            return float(optimum(self._law.reducible(params), SIX_ND, np.log([compute]))[0, 0])
        except ValueError:
            return math.nan

    def frontier(self, compute: ArrayLike) -> Array:
        """Lowest loss at each C = 6ND FLOPs."""
        values = np.asarray(compute, np.float64)
        return np.array([self.optimum(float(c))[2] for c in values.reshape(-1)]).reshape(values.shape)

    def to_dict(self) -> dict[str, Any]:
        """As of every result, with the number of `bootstrap` draws."""
        return super().to_dict() | {"bootstrap": len(self._draws)}

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
        return paragraph(parts, self.warnings)

    def figures(self, runs: Runs | None = None) -> dict[str, Figure]:
        """Loss against N, D and C with the runs (by default those of `residuals`), residuals, and the bootstrap."""
        shown = {f"loss-{axis}": figures.surface_figure(self, runs, axis) for axis in figures.AXES}
        shown["residuals"] = figures.residual_figure(self)
        return shown | ({"bootstrap": figures.bootstrap_figure(self)} if len(self._draws) else {})

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


def fit_surface(
    runs: Runs,
    form: str = "approach3",
    *,
    delta: float | None = None,
    bootstrap: int | None = 0,
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
    bootstrap: draws, of whole cells (`resample` "runs") or of seeds within cells ("seeds"), from `seed`; 0 takes
    Student's t, and None takes it unless 200 draws (from 20 independent cells or curves on) show it to be too narrow:
    then the intervals are the bootstrap's, with a warning. level: coverage of the intervals. drop_worst: number of runs
    to leave out, each time the one with the largest residual of log loss, and fit again; `dropped` lists them.
    progress: called with the number of draws done. Raises UserError for runs that are not finite (filter them by
    `sound`), an unknown option, or fewer cells than parameters.
    """
    law = surface_form(form)
    if criterion is None:
        criterion = "log" if delta is not None else law.criterion
    if delta is None:
        delta = DELTA if criterion == "log" else math.inf
    _check(runs, law, delta, bootstrap or 0, resample, level, drop_worst, criterion)
    dropped: tuple[Dropped, ...] = ()
    if drop_worst:
        runs, dropped = _without_worst(runs, law, delta, criterion, drop_worst)
    x, center = _inputs(runs, law)
    theta, objective = best(law, x, runs.loss, runs.weight, delta, criterion)
    cells, member = np.unique(x, axis=0, return_inverse=True)
    member = member.reshape(-1)
    dof = len(cells) - len(law.names)
    draws = np.empty((0, len(law.names)))
    drawn = independent_groups(member, runs.run) if resample == "runs" else member
    curves = int(drawn.max()) + 1
    count = (AUTO_DRAWS if curves >= AUTO_GROUPS else 0) if bootstrap is None else bootstrap
    if dof and count:
        if curves < FEWEST_GROUPS:
            raise UserError(
                f"the rows belong to {curves} runs, too few to resample; train more, or fit without bootstrap"
            )
        weight = resampled_counts(drawn, resample, count, seed) * runs.weight
        parts = []
        for i in range(0, count, DRAWS_A_BATCH):
            part = weight[i : i + DRAWS_A_BATCH]
            parts.append(minimise(law, np.tile(theta, (len(part), 1)), x, runs.loss, part, delta, criterion)[0])
            progress(i + len(part))
        draws = np.concatenate(parts)
    log_loss, jacobian = (part[0] for part in law.evaluate(theta[None], x))
    residual = np.log(runs.loss) - log_loss
    scatter, covariance = _covariance(law, theta, x, runs, member, delta, criterion) if dof else (None, None)
    params = dict(zip(law.names, law.public(theta, center).tolist(), strict=True))
    ci = _intervals(law, theta, center, covariance, draws, level, dof)
    narrow: list[str] = []
    if bootstrap is None and len(draws):
        student = _intervals(law, theta, center, covariance, draws[:0], level, dof)
        narrow = _too_narrow(law, student, ci)
        if not narrow:
            ci, draws = student, draws[:0]
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
        warnings=(*narrow, *_doubts(law, theta, runs, condition, dof, table)),
        condition=condition,
        residuals=table,
        scatter=scatter,
        delta=delta,
        criterion=criterion,
        level=level,
        interval="none" if not dof else f"bootstrap of {resample}" if len(draws) else "t",
        convention=runs.convention,
        _law=law,
        _theta=theta,
        _center=center,
        _covariance=covariance,
        _draws=draws,
    )


def _inputs(runs: Runs, law: Form) -> tuple[Array, Array]:
    """Inputs x [n, 2 or 3] of the law, and what log N, log D and, where the law counts repeats, log(D/U) were centred
    by."""
    logs = np.log(np.stack([runs.params, runs.tokens], axis=1))
    center = logs.mean(axis=0)
    if not law.repeats:
        return logs - center, center
    return np.column_stack([logs - center, log_repeats(runs.tokens, runs.unique)]), np.append(center, 0.0)


def _without_worst(runs: Runs, law: Form, delta: float, criterion: str, count: int) -> tuple[Runs, tuple[Dropped, ...]]:
    """The runs without the `count` worst: the one furthest from the law goes and the law is fitted again, each time.

    One at a time, because outliers that stand together pull a fit to them and push good runs away from it.
    """
    x, _ = _inputs(runs, law)
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
    """Scatter of log loss over cells, covariance of theta: seeds of a cell are averaged first, by their weights."""
    size = np.bincount(member)
    log_loss, jacobian = (part[0] for part in law.evaluate(theta[None], x))
    residual = residuals(law, theta[None], x, runs.loss, criterion)[0]
    level = np.exp(log_loss) if criterion == "loss" else np.ones_like(log_loss)
    first = np.unique(member, return_index=True)[1]
    total = np.bincount(member, runs.weight)
    root = relative(total / size)
    scaled = (jacobian * level[:, None])[first] * root[:, None]
    _, covariance = huber_covariance(scaled, np.bincount(member, runs.weight * residual) / total * root, delta)
    off = np.bincount(member, runs.weight * (log_loss - np.log(runs.loss))) / total * root
    return math.sqrt(float(off @ off) / (len(size) - len(theta))), covariance


def _exponents(law: Form, params: dict[str, float]) -> dict[str, float]:
    """a and b of the optimum N ~ C^a, D ~ C^b; NaN-free: even shares where neither exponent is positive."""
    _, alpha, _, beta = law.reducible(params)
    a = beta / (alpha + beta) if alpha + beta > 0 else 0.5
    return {"a": a, "b": 1 - a}


def _intervals(
    law: Form, theta: Array, center: Array, covariance: Array | None, draws: Array, level: float, dof: int
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


def _too_narrow(
    law: Form, student: dict[str, tuple[float, float] | None], drawn: dict[str, tuple[float, float] | None]
) -> list[str]:
    """A sentence where the bootstrap's interval of an exponent is much wider than Student's t."""
    wider = []
    for name, pair in student.items():
        other = drawn[name]
        # b = 1 - a; the amplitudes follow from the exponents.
        if pair is None or other is None or name == "b" or name in law.logged:
            continue
        if other[1] - other[0] > TOO_NARROW * (pair[1] - pair[0]):
            wider.append(f"{name}: t {pair[0]:.3g} to {pair[1]:.3g}, bootstrap {other[0]:.3g} to {other[1]:.3g}")
    if not wider:
        return []
    return [
        f"Student's t is too narrow here ({'; '.join(wider)}), for example where high-leverage runs are outliers or "
        "rows are not independent: the intervals are the bootstrap's"
    ]


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
    together = abs(float(np.corrcoef(np.log(runs.params), np.log(runs.tokens))[0, 1]))
    if together > COLLINEAR:
        said.append(
            f"tokens follow size (correlation {together:.3f} of their logs), so which term belongs to N and which to D "
            "is not identified: train sizes at several tokens per parameter"
        )
    at = dict(zip(law.names, theta.tolist(), strict=True))
    low, high = law.bounds(runs.loss)
    if at["E"] <= float(np.log(runs.loss.min())) + LEAST_FLOOR / 2:
        said.append("the floor E is not identified (the best floor is 0): do not quote E")
    for i, name in enumerate(law.names):
        if name != "E" and (theta[i] <= low[i] or theta[i] >= high[i] or abs(theta[i]) == STEEPEST):
            why = "no run shows its worth" if name in ("R_N", "R_D") else "its term does not follow a power law"
            said.append(f"{name} ran to its bound: {why} in these data")
    far = sorted((r for r in table if r.outlier), key=lambda r: -abs(r.residual))
    if far:
        named = ", ".join(f"{r.name} ({100 * math.expm1(r.residual):+.1f} %)" for r in far[:5])
        lie = f"{len(far)} of {len(table)} runs {'lies' if len(far) == 1 else 'lie'}"
        said.append(f"{lie} more than {OUTLIER_SIGMAS:g} robust sigma off: {named}")
    return said


def _check(
    runs: Runs, law: Form, delta: float, bootstrap: int, resample: str, level: float, drop_worst: int, criterion: str
) -> None:
    if resample not in RESAMPLE:
        raise unknown("value", resample, RESAMPLE, where="for resample")
    check_criterion(criterion)
    if not (delta > 0 and 0 < level < 1 and bootstrap >= 0 and bootstrap != 1 and drop_worst >= 0):
        raise UserError("delta > 0, 0 < level < 1, drop_worst >= 0 and bootstrap 0 or at least 2 are needed")
    values = np.stack([runs.params, runs.tokens, runs.loss, runs.weight])
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError("params, tokens, loss and weight must be finite and positive; leave the other runs out (sound)")
    if law.repeats and (runs.unique is None or not (np.isfinite(runs.unique) & (runs.unique > 0)).all()):
        raise UserError(
            f"{law.name} needs the unique tokens of every run (all tokens where none repeat); name their column with "
            "--columns unique=THEIR_NAME"
        )
    for what, axis, values in (("size", "tokens", runs.params), ("token count", "params", runs.tokens)):
        if len(set(values)) == 1:
            raise UserError(
                f"{law.name} needs runs of more than one {what}; train others, or use --form power+floor --axis {axis}"
            )
    cells = len(np.unique(_inputs(runs, law)[0], axis=0))
    if cells - drop_worst < len(law.names):
        raise UserError(
            f"{law.name} has {len(law.names)} parameters and needs as many distinct (N, D); found {cells}"
            + (f" less {drop_worst} dropped" if drop_worst else "")
            + "; train more sizes or token counts, or choose a smaller form"
        )
    if bootstrap and resample == "seeds" and cells == len(runs):
        raise UserError("no (N, D) has more than one seed to resample; use --resample runs")
