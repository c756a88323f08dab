"""Minimise a sum of Huber losses over many parameter vectors at once: projected Newton with exact Hessians.

The objective is sum_i w_i rho(r_i), rho the Huber loss, r_i the residual of log L or of L. With a delta far below
the scatter (1e-3 is the field's habit) it is nearly a sum of absolute values: quasi-Newton methods and optimisers
that look at a mean stop early on it. Its Hessian is cheap and exact here, so every step is a damped Newton step whose
eigenvalues are taken positive, and a batch of starts or of bootstrap draws goes through the same matrix products.

Legend: S vectors theta at once, n runs, p parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from qies.errors import unknown
from qies.scaling.laws.forms import Form

Array = NDArray[np.float64]

CONVERGED = 1e-13  # a Newton step that promises less, relative to the objective, is the end
PATIENCE = 300
SCREENING, FINALISTS = 12, 24
ROUNDS, IDLE = 20, 2  # of restarts around the best minimum: at most, and in a row without a lower one
APART = 0.5  # in theta, whose entries are logarithms and exponents
FARTHEST = 10.0  # in theta, along a direction that the runs hardly determine
EXACT = 1e-20  # objective a run below which the law passes through the runs
BATCH = 2_000_000  # numbers of one Jacobian [S, n, p] held at once
CRITERIA = ("log", "loss")  # what residuals are taken of: log L, or L


def check_criterion(criterion: str) -> None:
    """Raise UserError for one that is none of `CRITERIA`."""
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)


def huber(residual: Array, delta: float) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond; delta may be infinite."""
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    return inside * (size - inside / 2)


def residuals(form: Form, theta: Array, x: Array, loss: Array, criterion: str) -> Array:
    """Prediction minus run, [S, n], of log L or of L by `criterion`."""
    log_loss = form.log_loss(theta, x)
    return log_loss - np.log(loss) if criterion == "log" else np.exp(log_loss) - loss


def minimise(
    form: Form, theta: Array, x: Array, loss: Array, weight: Array, delta: float, criterion: str, steps: int = PATIENCE
) -> tuple[Array, Array]:
    """Local minima (theta [S, p], objective [S]) from starts theta [S, p].

    x [n, 2] centred logs, loss [n], weight [S, n] or [1, n].
    """
    weight = np.broadcast_to(weight, (len(theta), len(loss)))
    size = max(1, BATCH // theta.shape[1] // len(loss))
    parts = [
        _minimise(form, theta[i : i + size], x, loss, weight[i : i + size], delta, criterion, steps)
        for i in range(0, len(theta), size)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def best(form: Form, x: Array, loss: Array, weight: Array, delta: float, criterion: str) -> tuple[Array, float]:
    """The lowest minimum (theta [p], objective) over the law's own starts; weight [n].

    All starts take a few steps, and the most promising that lie apart go on to the end. The kinks of the Huber sum and
    long curved valleys leave many minima beside each other, so the search restarts from shifted copies of the best
    until IDLE rounds find nothing lower. Half are shifted equally in all directions, half by up to three standard
    errors: far along a valley (of `approach3-gamma` from a sum to nearly the larger of two powers), little across it.
    """
    theta, cost = minimise(form, form.starts(x, loss), x, loss, weight[None], delta, criterion, SCREENING)
    order = np.argsort(cost, kind="stable")
    _, apart = np.unique(np.round(theta[order] / APART), axis=0, return_index=True)
    theta, cost = minimise(form, theta[order[np.sort(apart)[:FINALISTS]]], x, loss, weight[None], delta, criterion)
    rng = np.random.default_rng(0)
    found, lowest, idle = theta[cost.argmin()], float(cost.min()), 0
    for _ in range(ROUNDS if lowest > EXACT * len(loss) else 0):
        alike, along = rng.standard_normal((2, FINALISTS // 2, len(found)))
        alike *= np.geomspace(0.01, 1, len(alike))[:, None]
        along = along * np.geomspace(0.3, 3, len(along))[:, None] @ _standard_errors(form, found, x, loss)
        theta, cost = minimise(form, found + np.concatenate([alike, along]), x, loss, weight[None], delta, criterion)
        idle = idle + 1 if cost.min() >= lowest * (1 - 1e-8) else 0
        if idle == IDLE:
            break
        if not idle:
            found, lowest = theta[cost.argmin()], float(cost.min())
    return found, lowest


def minimise_residuals(
    evaluate: Callable[[Array], tuple[Array, Array]],
    start: Array,
    weight: Array,
    delta: float,
    low: ArrayLike = -np.inf,
    high: ArrayLike = np.inf,
) -> tuple[Array, float]:
    """The local minimum (theta [p], weighted Huber sum) of any residuals from one start, by a trust region.

    evaluate: theta -> residuals [n], Jacobian [n, p]; weight [n]; low, high: bounds of theta. Least squares where delta
    is infinite.
    """
    root = np.sqrt(weight)
    found = least_squares(
        lambda theta: evaluate(theta)[0] * root,
        start,
        lambda theta: evaluate(theta)[1] * root[:, None],
        bounds=(low, high),
        loss=_scipy_loss(delta, weight),
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=500,
    )
    return found.x, float(found.cost)


def _standard_errors(form: Form, theta: Array, x: Array, loss: Array) -> Array:
    """Principal axes [p, p] of theta's uncertainty, as rows, each one standard error (at most FARTHEST) long."""
    log_loss, jacobian = (part[0] for part in form.evaluate(theta[None], x))
    _, stiffness, axes = np.linalg.svd(jacobian, full_matrices=False)
    scatter = float(np.abs(log_loss - np.log(loss)).mean())
    return (scatter / np.maximum(stiffness, scatter / FARTHEST))[:, None] * axes


def _minimise(
    form: Form, theta: Array, x: Array, loss: Array, weight: Array, delta: float, criterion: str, steps: int
) -> tuple[Array, Array]:
    low, high = form.bounds(loss)
    theta = np.clip(theta, low, high)
    cost = (weight * huber(residuals(form, theta, x, loss, criterion), delta)).sum(axis=1)
    damping = np.full(len(theta), 1e-3)
    active = np.flatnonzero(np.isfinite(cost))
    for _ in range(steps):
        if not len(active):
            break
        step, promise = _newton(form, theta[active], x, loss, weight[active], delta, criterion, damping[active])
        trial = np.clip(theta[active] + step, low, high)
        with np.errstate(over="ignore", invalid="ignore"):
            found = (weight[active] * huber(residuals(form, trial, x, loss, criterion), delta)).sum(axis=1)
        better = found < cost[active]
        theta[active[better]], cost[active[better]] = trial[better], found[better]
        damping[active] = np.where(better, damping[active] / 6, np.maximum(damping[active], 1e-9) * 5)
        done = (promise <= CONVERGED * cost[active] + 1e-300) | (damping[active] > 1e15)
        active = active[~done]
    return theta, cost


def _newton(
    form: Form, theta: Array, x: Array, loss: Array, weight: Array, delta: float, criterion: str, damping: Array
) -> tuple[Array, Array]:
    """Damped Newton step [S, p] and the decrease [S] that its quadratic model promises without damping."""
    log_loss, jacobian, curvature = form.expand(theta, x)
    level = np.exp(log_loss) if criterion == "loss" else np.ones_like(log_loss)
    residual = np.exp(log_loss) - loss if criterion == "loss" else log_loss - np.log(loss)
    pull = weight * np.clip(residual, -delta, delta)
    inside = weight * (np.abs(residual) <= delta)
    gradient = ((pull * level)[:, None, :] @ jacobian)[:, 0]
    # Of L rather than log L the Jacobian is L J and the Hessian L (H + J J').
    spread = inside * level**2 + (pull * level if criterion == "loss" else 0.0)
    transposed = np.swapaxes(jacobian, 1, 2)
    hessian = transposed @ (spread[..., None] * jacobian) + curvature(pull * level)
    low, high = form.bounds(loss)
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    scale = np.sqrt(np.maximum(((weight * level**2)[:, None, :] @ jacobian**2)[:, 0], 1e-30))
    hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian / (scale[:, :, None] * scale[:, None, :]))
    values, vectors = np.linalg.eigh(hessian)
    along = ((gradient / scale)[:, None, :] @ vectors)[:, 0]
    size = np.abs(values) + 1e-14
    step = -(vectors @ (along / (size + damping[:, None]))[..., None])[..., 0] / scale
    return step, 0.5 * (along**2 / (size + 1e-9)).sum(axis=1)


def _scipy_loss(delta: float, weight: Array) -> str | Callable[[Array], Array]:
    """`loss` of scipy's least_squares by which residuals [n] scaled by sqrt(weight) sum up to weight times Huber's
    loss of the residuals, and to least squares where delta is infinite."""
    if math.isinf(delta):
        return "linear"
    edge = weight * delta**2

    def rho(z: Array) -> Array:  # and its two derivatives, [3, n], at the squares of the scaled residuals
        far = z > edge
        beyond = np.where(far, z, 1.0)
        return np.stack(
            [
                np.where(far, 2 * np.sqrt(edge * beyond) - edge, z),
                np.where(far, np.sqrt(edge / beyond), 1.0),
                np.where(far, -0.5 * np.sqrt(edge) * beyond**-1.5, 0.0),
            ]
        )

    return rho
