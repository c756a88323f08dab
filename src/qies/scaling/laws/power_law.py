"""Power laws of the loss in one variable (parameters, tokens or FLOPs), fitted robustly, with intervals.

    power         L(x) = A x^-alpha
    power+floor   L(x) = E + A x^-alpha,  E >= 0, alpha >= 0 where E > 0

The fit minimises the sum (not the mean, which stops optimisers early) of Huber losses of the residuals of log
L (Hoffmann et al. 2022, arXiv:2203.15556), from several starts, with analytic Jacobians.

Which interval, and why. Runs that share x (the seeds of one size) share that size's deviation from the law,
so they are averaged (in log L) and every distinct x counts once: four sizes are four observations, whatever
the seeds. A weight multiplies the Huber loss of its point, which has the mean weight of its runs; only ratios of
weights matter to the intervals.

- `t`: covariance of the Huber estimate (Huber 1973) and Student's t with `sizes - parameters` degrees of
  freedom. Inside `delta` this is least squares, and the interval of a power law without floor is exact at any
  size.
- `bootstrap`: resamples the distinct x. The percentiles are moved outwards for small samples ("expanded
  percentile", Hesterberg 2015, arXiv:1411.5279): the plain ones cover only about 88 % at 12 sizes.

`auto` takes t below 20 distinct x and the bootstrap from there on. With as many parameters as sizes the law
passes through every point and nothing is left to measure the scatter with: the fit then has no interval
and a warning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, unknown
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.intervals import (
    ILL_CONDITIONED,
    bootstrap_tails,
    condition_number,
    huber_covariance,
    relative,
    t_quantile,
)
from qies.scaling.laws.solver import check_criterion, huber, minimise_residuals
from qies.scaling.result import Result, paragraph, plain

Array = NDArray[np.float64]

DELTA = 0.05
INTERVALS = ("auto", "t", "bootstrap")
BOOTSTRAP_FROM = 20


@dataclass(frozen=True)
class PowerLaw(Result):
    """A fitted power law; `predict(x)` evaluates it with its band.

    `n` runs at `sizes` distinct x; `params` {"A", "alpha"} and with a floor "E"; `ci` the interval of each or
    None; `objective` the Huber sum of residuals of log L (of L where `criterion` is "loss"); `scatter` the residual
    standard deviation of log loss (0.01 is about 1 %), None without degrees of freedom; `condition` of the Jacobian
    with unit columns; `dropped` indices of inputs left out.
    """

    form: str
    n: int
    sizes: int
    params: dict[str, float]
    ci: dict[str, tuple[float, float] | None]
    objective: float
    delta: float
    criterion: str
    level: float
    interval: str
    dof: int
    scatter: float | None
    condition: float
    x_range: tuple[float, float]
    dropped: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    _theta: Array = field(default_factory=lambda: np.empty(0), repr=False)
    _covariance: Array | None = field(default=None, repr=False)
    _draws: Array | None = field(default=None, repr=False)
    _center: float = field(default=0.0, repr=False)

    def predict(self, x: ArrayLike) -> tuple[Array, Array, Array]:
        """Loss at x (any shape, x > 0) and the band of the curve at the fit's level: (mean, lo, hi), float64.

        The band holds the law's own uncertainty; a single new run scatters around it by `scatter` as well,
        and outside `x_range` it is right only if the law goes on. NaN where the fit has no interval.
        """
        u = np.log(np.asarray(x, np.float64)) - self._center
        flat = u.reshape(-1)
        log_mean, jacobian = _power(self._theta, flat)
        if self._draws is not None:
            logs = np.stack([_power(theta, flat)[0] for theta in self._draws])
            lo, hi = np.quantile(logs, bootstrap_tails(self.level, self.sizes, self.dof), axis=0)
        elif self._covariance is not None:
            variance = np.einsum("ni,ij,nj->n", jacobian, self._covariance, jacobian)
            half = t_quantile(self.level, self.dof) * np.sqrt(np.maximum(variance, 0.0))
            lo, hi = log_mean - half, log_mean + half
        else:
            lo = hi = np.full_like(log_mean, np.nan)
        mean, low, high = (np.exp(part).reshape(u.shape) for part in (log_mean, lo, hi))
        return mean, low, high

    def curve(self, points: int = 41, reach: float = 3.0) -> dict[str, list[float | None]]:
        """The law and its band for charts, log-spaced from min(x) / 1.5 to `reach` times max(x)."""
        x = np.geomspace(self.x_range[0] / 1.5, self.x_range[1] * reach, points)
        parts = dict(zip(("loss", "lo", "hi"), self.predict(x), strict=True))
        return {"x": x.tolist(), **plain(parts)}

    def to_dict(self) -> dict[str, Any]:
        """As of every result, with `curve` and `draws`, from which a page draws the law."""
        return super().to_dict() | {"curve": self.curve(), "draws": self.draws.tolist()}

    @property
    def draws(self) -> Array:
        """Bootstrap parameters [draws, p] in the order of `params`; [0, p] without a bootstrap."""
        if self._draws is None:
            return np.empty((0, len(self.params)))
        amplitude = np.exp(self._draws[:, :1] + self._draws[:, 1:2] * self._center)
        return np.concatenate([amplitude, self._draws[:, 1:]], axis=1)

    def figures(self, x: ArrayLike = (), loss: ArrayLike = (), variable: str = "x") -> dict[str, Figure]:
        """The law with its band and, where there are any, the runs (x, loss) and the bootstrap; `variable` names x."""
        shown = {"law": figures.power_figure(self, x, loss, variable)}
        return shown | ({"bootstrap": figures.bootstrap_figure(self)} if len(self.draws) else {})

    def summary(self) -> str:
        """The law, its interval, what the interval rests on, and every warning, as one paragraph."""
        p = self.params
        floor = f"{p['E']:.4g} + " if "E" in p else ""
        parts = [
            f"L(x) = {floor}{p['A']:.4g} x^-{p['alpha']:.4g}"
            if p["alpha"] >= 0
            else f"L(x) = {floor}{p['A']:.4g} x^{-p['alpha']:.4g}"
        ]
        for name in ("alpha", "E"):
            pair = self.ci.get(name)
            if pair is not None:
                parts.append(f"{name} between {pair[0]:.4g} and {pair[1]:.4g}")
        basis = f"{self.n} runs at {self.sizes} distinct x"
        if self.scatter is not None:
            freedom = f"{self.dof} degree{'s' if self.dof > 1 else ''} of freedom"
            how = f"t with {freedom}" if self.interval == "t" else self.interval
            basis += f"; {100 * self.level:g}% CI by {how}; scatter {100 * self.scatter:.2g} %"
        return paragraph([f"{', '.join(parts)} ({basis})"], self.warnings)


def fit_power(
    x: ArrayLike,
    loss: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    floor: bool = False,
    delta: float | None = None,
    criterion: str = "log",
    level: float = 0.95,
    interval: str = "auto",
    draws: int = 400,
    seed: int = 0,
) -> PowerLaw:
    """Fit L = A x^-alpha, or L = E + A x^-alpha with `floor`, to runs.

    x, loss: [n] positive; runs whose x or loss is not finite are left out, as `dropped` and `warnings` say.
    weight: [n] positive, of each run; 1 by default. criterion: residuals of "log" L or of the "loss" L.
    delta: residual beyond which a point counts linearly. The default on log L, 5 %, is far above what seeds do and
    below what a broken run does: clean data give least squares and a broken run cannot move the law far. On L
    the default is least squares. level: coverage of the intervals. interval: "auto", "t" or "bootstrap" (`draws`
    resamples from `seed`). Raises UserError for unequal lengths, values <= 0, an unknown option, or fewer distinct x
    than parameters.
    """
    xs, losses = np.asarray(x, np.float64).reshape(-1), np.asarray(loss, np.float64).reshape(-1)
    weights = np.ones_like(losses) if weight is None else np.asarray(weight, np.float64).reshape(-1)
    if delta is None:
        delta = DELTA if criterion == "log" else math.inf
    _check(xs, losses, weights, delta, criterion, level, interval, draws)
    keep = np.isfinite(xs) & np.isfinite(losses)
    dropped = tuple(int(i) for i in np.flatnonzero(~keep))
    warnings = [f"{len(dropped)} of {len(xs)} runs left out: not finite"] if dropped else []
    sizes, member = np.unique(xs[keep], return_inverse=True)
    names = ("A", "alpha", "E") if floor else ("A", "alpha")
    dof = len(sizes) - len(names)
    if dof < 0:
        form, advice = (" with a floor", " or leave the floor out") if floor else ("", "")
        raise UserError(
            f"a power law{form} needs {len(names)} or more distinct x, found {len(sizes)}; train more sizes{advice}"
        )
    total = np.bincount(member, weights[keep])
    points = _Points(
        u=np.log(sizes) - (center := float(np.log(sizes).mean())),
        y=np.bincount(member, weights[keep] * np.log(losses[keep])) / total,
        weight=total / np.bincount(member),
        delta=delta,
        criterion=criterion,
    )

    theta, objective = _fit(points, floor)
    residual, jacobian = points.evaluate(theta)
    off = _power(theta, points.u)[0] - points.y
    scatter, covariance, resampled = None, None, None
    if dof:
        root = relative(points.weight)
        scatter, covariance = huber_covariance(jacobian * root[:, None], residual * root, delta)
        if criterion == "loss":
            scatter = math.sqrt(float((root * off) @ (root * off)) / dof)
        if interval == "auto":
            interval = "bootstrap" if len(sizes) >= BOOTSTRAP_FROM else "t"
        if interval == "bootstrap":
            resampled = _bootstrap(points, theta, draws, seed)
    else:
        interval = "none"
        warnings.append(
            f"{len(sizes)} distinct x for {len(names)} parameters: the law passes through every "
            "point and no interval can be given"
        )
    ends = _ends(theta, covariance, resampled, level, len(sizes), dof, center)
    condition = condition_number(jacobian)
    warnings += _doubts(ends, level, off, np.abs(residual) > delta, condition, sizes, dof, theta, floor)
    values = {"A": math.exp(theta[0] + theta[1] * center), "alpha": float(theta[1])} | (
        {"E": float(theta[2])} if floor else {}
    )
    return PowerLaw(
        form="power+floor" if floor else "power",
        n=int(keep.sum()),
        sizes=len(sizes),
        params=values,
        ci=ends,
        objective=objective,
        delta=delta,
        criterion=criterion,
        level=level,
        interval=interval,
        dof=dof,
        scatter=scatter,
        condition=condition,
        x_range=(float(sizes[0]), float(sizes[-1])),
        dropped=dropped,
        warnings=tuple(warnings),
        _theta=theta,
        _covariance=covariance,
        _draws=resampled,
        _center=center,
    )


@dataclass(frozen=True)
class _Points:
    """What is fitted: log loss y [n] at centred log x u [n], a weight [n] each, and what residuals are taken of."""

    u: Array
    y: Array
    weight: Array
    delta: float
    criterion: str

    def evaluate(self, theta: Array) -> tuple[Array, Array]:
        """Residuals [n] (law minus loss) by the criterion, and their Jacobian [n, p]."""
        log_loss, jacobian = _power(theta, self.u)
        if self.criterion == "log":
            return log_loss - self.y, jacobian
        loss = np.exp(np.minimum(log_loss, 300.0))  # far from any loss a start may overflow
        return loss - np.exp(self.y), jacobian * loss[:, None]

    def pick(self, which: NDArray[np.int64]) -> _Points:
        return replace(self, u=self.u[which], y=self.y[which], weight=self.weight[which])


def _power(theta: Array, u: Array) -> tuple[Array, Array]:
    """log L [n], Jacobian [n, p] at centred log x `u` [n]; theta = (log A x^-alpha at u = 0, alpha[, E])."""
    term = theta[0] - theta[1] * u
    if len(theta) == 2:
        return term, np.stack([np.ones_like(u), -u], axis=1)
    with np.errstate(divide="ignore"):
        log_loss = np.logaddexp(np.log(theta[2]), term)
    share = np.exp(term - log_loss)  # of the loss that is not the floor; at most 1, so nothing overflows
    return log_loss, np.stack([share, -u * share, np.exp(-log_loss)], axis=1)


def _fit(points: _Points, floor: bool, warm: Array | None = None) -> tuple[Array, float]:
    """Best (theta, Huber sum) over the starts, or from `warm` alone."""
    u, y = points.u, points.y
    slope = float((u - u.mean()) @ y / ((u - u.mean()) @ u))
    best = minimise_residuals(
        points.evaluate, np.array([y.mean() - slope * u.mean(), -slope]), points.weight, points.delta
    )
    if not floor:
        return best
    # No floor is the edge of the parameter space, which an interior method only creeps up to, so it is offered.
    best = (np.append(best[0], 0.0), best[1])
    for start in _floor_starts(points) if warm is None else [warm]:
        # alpha >= 0: a law with a floor falls towards it; "E + a spike at the largest x" does not.
        found = minimise_residuals(points.evaluate, start, points.weight, points.delta, [-np.inf, 0.0, 0.0])
        if found[1] < best[1] * (1 - 1e-9):
            best = found
    return best


def _floor_starts(points: _Points) -> list[Array]:
    """A start in every valley: at a given alpha the law is linear in E and A, so alpha is scanned, from a term that
    hardly changes over the data to one that only the smallest x feel, and every minimum of the scan is kept."""
    u, y, delta = points.u, points.y, points.delta if points.criterion == "log" else math.inf
    scan: list[tuple[float, Array]] = []
    for alpha in np.geomspace(0.05, 60, 40) / np.ptp(u):
        term = np.exp(-alpha * (u - u.min()))
        design = np.stack([np.ones_like(u), term], axis=1) * np.exp(-y)[:, None]  # relative residuals
        weight = np.sqrt(points.weight)
        for _ in range(3):  # least squares, then twice with the weights that make it a Huber fit
            e, amplitude = np.linalg.lstsq(design * weight[:, None], weight, rcond=None)[0]
            theta = np.array([math.log(max(amplitude, 1e-300)) + alpha * u.min(), alpha, max(e, 0.0)])
            residual = np.abs(_power(theta, u)[0] - y)
            weight = np.sqrt(points.weight * np.minimum(1, delta / np.maximum(residual, 1e-300)))
        scan.append((float(points.weight @ huber(residual, delta)), theta))
    costs = [math.inf, *(cost for cost, _ in scan), math.inf]
    return [theta for i, (cost, theta) in enumerate(scan) if cost <= min(costs[i], costs[i + 2])]


def _bootstrap(points: _Points, theta: Array, draws: int, seed: int) -> Array:
    """[draws, p] fits to resampled points; those with fewer points than parameters are drawn again."""
    rng = np.random.default_rng(seed)
    fits: list[Array] = []
    while len(fits) < draws:
        pick = rng.integers(0, len(points.u), len(points.u))
        if len(np.unique(pick)) >= len(theta):
            fits.append(_fit(points.pick(pick), len(theta) == 3, warm=theta)[0])
    return np.stack(fits)


def _ends(
    theta: Array, covariance: Array | None, draws: Array | None, level: float, n: int, dof: int, center: float
) -> dict[str, tuple[float, float] | None]:
    """Interval of A, alpha (and E >= 0) in the units of the law."""
    # log A = theta0 + alpha * centre, so all but the exp of log A is linear in theta.
    rows = np.eye(len(theta))
    rows[0, 1] = center
    if draws is not None:
        pairs = np.quantile(draws @ rows.T, bootstrap_tails(level, n, dof), axis=0).T
    elif covariance is not None:
        half = t_quantile(level, dof) * np.sqrt(np.maximum(np.diag(rows @ covariance @ rows.T), 0.0))
        pairs = np.stack([rows @ theta - half, rows @ theta + half], axis=1)
    else:
        return {name: None for name in ("A", "alpha", "E")[: len(theta)]}
    with np.errstate(over="ignore"):
        pairs[0] = np.minimum(np.exp(pairs[0]), np.finfo(np.float64).max)  # JSON has no infinity
    pairs[2:] = np.maximum(pairs[2:], 0.0)
    return {name: (float(lo), float(hi)) for name, (lo, hi) in zip(("A", "alpha", "E"), pairs, strict=False)}


def _doubts(
    ci: dict[str, tuple[float, float] | None],
    level: float,
    residual: Array,
    beyond: NDArray[np.bool_],
    condition: float,
    sizes: Array,
    dof: int,
    theta: Array,
    floor: bool,
) -> list[str]:
    """Plain sentences on what the data do not determine; `residual` of log L, `beyond` those further than delta."""
    said: list[str] = []
    alpha, e = ci["alpha"], ci.get("E")
    if not floor and alpha is not None and alpha[0] <= 0:
        said.append(
            "the loss rises with x: alpha is negative"
            if alpha[1] < 0
            else f"the {100 * level:g}% CI of alpha includes 0: the data do not show that the loss falls with x"
        )
    if floor and (dof < 3 or condition > ILL_CONDITIONED or theta[2] == 0.0 or e is None or e[0] == 0.0):
        why = (
            "the best floor is 0"
            if theta[2] == 0.0
            else f"{len(sizes)} distinct x for 3 parameters"
            if dof < 3
            else "E, A and alpha trade off against each other"
            if condition > ILL_CONDITIONED
            else "its interval reaches 0"
        )
        said.append(
            f"the floor E is not identified ({why}): do not quote E, and show the form without a floor beside it"
        )
    far = np.flatnonzero(beyond)
    if len(far):
        where = ", ".join(f"x = {sizes[i]:.3g} ({100 * math.expm1(-residual[i]):+.1f} %)" for i in far[:5])
        said.append(f"{len(far)} of {len(sizes)} points lie further than delta from the law and count less: " + where)
    if 2 * len(far) > len(residual):
        said.append("most points do, so the intervals are rough: raise delta or question the form")
    return said


def _check(
    x: Array, loss: Array, weight: Array, delta: float, criterion: str, level: float, interval: str, draws: int
) -> None:
    if not len(x) == len(loss) == len(weight):
        raise UserError(f"x has {len(x)} values, loss {len(loss)}, weight {len(weight)}; give one loss for every x")
    if (x <= 0).any() or (loss <= 0).any() or not (np.isfinite(weight) & (weight > 0)).all():
        raise UserError("a power law needs x > 0, loss > 0 and weight > 0; leave the other runs out")
    check_criterion(criterion)
    if interval not in INTERVALS:
        raise unknown("interval", interval, INTERVALS)
    if not (delta > 0 and 0 < level < 1 and draws >= 2):
        raise UserError(f"delta > 0, 0 < level < 1 and draws >= 2 are needed; got {delta}, {level}, {draws}")
