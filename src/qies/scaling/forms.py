"""The laws of the loss in N and D as objects: log L, its analytic Jacobian and curvature, bounds and starts.

    approach3        L = E + A N^-alpha + B D^-beta                          Hoffmann et al. 2022, arXiv:2203.15556
    approach3-gamma  L = E + (A N^-alpha + B D^-beta)^gamma                  after Kaplan et al. 2020, arXiv:2001.08361
    gadre            L = E + a N^eta + b 6^(eta/2) (M N)^eta, M = D/N        Gadre et al. 2024, arXiv:2403.08540

In `gadre` M N is D: it is approach 3 with both exponents equal to -eta, one parameter less, meant for few runs.

Internally every law is written in theta, where log L is smooth and amplitudes are logarithms of the terms at
the geometric centre of the data (u = log N and v = log D minus their means). All but the exponents are then of
order one and hardly correlated, which is what makes Newton's method safe here.

Legend: S parameter vectors at once, n runs, p parameters, K terms of a law. Runs are the last axis of what is computed
here, for numpy is quick along a long last axis and slow along one of three terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qies.errors import UserError, nearest

Array = NDArray[np.float64]
Curvature = Callable[[Array], Array]

LOG6 = float(np.log(6.0))
# A floor a million times below the losses is none; an exponent beyond 8 is a step, no power law.
LEAST_FLOOR, STEEPEST = float(np.log(1e-6)), 8.0
EXPONENTS = np.geomspace(0.03, 6, 9)


@dataclass(frozen=True)
class Form(ABC):
    """A law of the loss, a sum of terms exp(x_k . theta) unless a subclass says otherwise.

    `names` of the public parameters in order; `logged` those whose logarithm is linear in theta (E and amplitudes);
    `criterion`: what the published fits of this law take residuals of, "log" L or the "loss" itself.
    """

    name: str
    names: tuple[str, ...]
    logged: tuple[str, ...]
    criterion: str = "log"

    @abstractmethod
    def features(self, x: Array) -> Array:
        """Terms as linear functions of theta, [K, p, n], at centred logs x [n, 2]."""

    @abstractmethod
    def starts(self, x: Array, loss: Array) -> Array:
        """Starts [S, p]: a grid of exponents, with the amplitudes of linear least squares (relative residuals)."""

    @abstractmethod
    def rows(self, center: Array) -> Array:
        """Matrix R [p, p] with public = R theta, the `logged` ones as logarithms; center [2] means of log N, log D."""

    @abstractmethod
    def reducible(self, params: Mapping[str, float]) -> tuple[float, float, float, float]:
        """A, alpha, B, beta of the part that falls with N and D, whose minimum is the law's optimum."""

    def log_loss(self, theta: Array, x: Array) -> Array:
        """log L [S, n] at theta [S, p]."""
        return _log_sum_exp(theta, self.features(x))[0]

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """log L [S, n] and its Jacobian [S, n, p] at theta [S, p]."""
        return self.expand(theta, x)[:2]

    def expand(self, theta: Array, x: Array) -> tuple[Array, Array, Curvature]:
        """As `evaluate`, and what takes c [S, n] to the sum over runs of c times the Hessian of log L, [S, p, p]."""
        features = self.features(x)
        log_loss, share = _log_sum_exp(theta, features)
        slope = _mean(share, features)
        return log_loss, np.swapaxes(slope, 1, 2), lambda c: _log_sum_exp_curvature(features, share, slope, c)

    def bounds(self, loss: Array) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, [p] each."""
        low, high = np.log(loss.min()), np.log(loss.max())
        of = {"E": (low + LEAST_FLOOR, high), "eta": (-STEEPEST, 0.0), "gamma": (0.02, 50.0)}
        of |= {k: (low - 30, high + 30) for k in "ABab"} | {k: (0.0, STEEPEST) for k in ("alpha", "beta")}
        return np.array([of[k][0] for k in self.names]), np.array([of[k][1] for k in self.names])

    def public(self, theta: Array, center: Array) -> Array:
        """Public parameters [..., p] in the order of `names`."""
        return self.exponentiate(theta @ self.rows(center).T)

    def exponentiate(self, values: Array) -> Array:
        """R theta [..., p] with the `logged` entries made amplitudes again (the largest float stands for infinity)."""
        logged = np.array([name in self.logged for name in self.names])
        with np.errstate(over="ignore"):
            return np.where(logged, np.minimum(np.exp(np.where(logged, values, 0.0)), np.finfo(float).max), values)


class Approach3(Form):
    """L = E + A N^-alpha + B D^-beta; theta = (E, A, B, alpha, beta), the first three as logarithms."""

    def features(self, x: Array) -> Array:
        terms = np.zeros((3, 5, len(x)))
        terms[0, 0] = terms[1, 1] = terms[2, 2] = 1
        terms[1, 3], terms[2, 4] = -x.T
        return terms

    def starts(self, x: Array, loss: Array) -> Array:
        alpha, beta = (g.reshape(-1) for g in np.meshgrid(EXPONENTS, EXPONENTS))
        log_terms = np.stack([-alpha[:, None] * x[:, 0], -beta[:, None] * x[:, 1]], axis=2)
        return np.concatenate([np.column_stack([t, alpha, beta]) for t in _amplitudes(log_terms, loss)])

    def rows(self, center: Array) -> Array:
        rows = np.eye(len(self.names))
        rows[1, 3], rows[2, 4] = center
        return rows

    def reducible(self, params: Mapping[str, float]) -> tuple[float, float, float, float]:
        return params["A"], params["alpha"], params["B"], params["beta"]


class Gadre(Form):
    """L = E + a N^eta + b 6^(eta/2) D^eta; theta = (E, a, b, eta), the first three as logarithms."""

    def features(self, x: Array) -> Array:
        terms = np.zeros((3, 4, len(x)))
        terms[0, 0] = terms[1, 1] = terms[2, 2] = 1
        terms[1, 3], terms[2, 3] = x.T
        return terms

    def starts(self, x: Array, loss: Array) -> Array:
        eta = -np.geomspace(0.02, 3, 40)
        log_terms = np.stack([eta[:, None] * x[:, 0], eta[:, None] * x[:, 1]], axis=2)
        return np.concatenate([np.column_stack([t, eta]) for t in _amplitudes(log_terms, loss)])

    def rows(self, center: Array) -> Array:
        rows = np.eye(4)
        rows[1, 3], rows[2, 3] = -center[0], -center[1] - LOG6 / 2
        return rows

    def reducible(self, params: Mapping[str, float]) -> tuple[float, float, float, float]:
        return params["a"], -params["eta"], params["b"] * 6 ** (params["eta"] / 2), -params["eta"]


class Gamma(Approach3):
    """L = E + (A N^-alpha + B D^-beta)^gamma; theta = (E, A, B, alpha, beta, gamma), E, A and B as logarithms."""

    def log_loss(self, theta: Array, x: Array) -> Array:
        return np.logaddexp(theta[:, 0, None], theta[:, 5, None] * _log_sum_exp(theta[:, :5], self.features(x)[1:])[0])

    def expand(self, theta: Array, x: Array) -> tuple[Array, Array, Curvature]:
        features, gamma = self.features(x)[1:], theta[:, 5, None]
        bracket, inner = _log_sum_exp(theta[:, :5], features)
        log_loss = np.logaddexp(theta[:, 0, None], gamma * bracket)
        share = np.exp(gamma * bracket - log_loss)  # of the bracket's term in L
        slope = _mean(inner, features)
        # log L is the log-sum-exp of log E and of gamma times the bracket's logarithm: gradients of the two, apart.
        apart = np.concatenate([gamma[..., None] * slope, bracket[:, None]], axis=1)
        apart[:, 0] -= 1
        jacobian = share[:, None] * apart
        jacobian[:, 0] += 1

        def curvature(c: Array) -> Array:
            total = (apart * (c * share * (1 - share))[:, None]) @ np.swapaxes(apart, 1, 2)
            cross = (slope @ (c * share)[..., None])[..., 0]
            total[:, :5, :5] += gamma[..., None] * _log_sum_exp_curvature(features, inner, slope, c * share)
            total[:, 5, :5] += cross
            total[:, :5, 5] += cross
            return total

        return log_loss, np.swapaxes(jacobian, 1, 2), curvature

    def starts(self, x: Array, loss: Array) -> Array:
        """Grid of exponents, gamma and floor: given those, the bracket is linear in A and B."""
        alpha, beta = (g.reshape(-1) for g in np.meshgrid(EXPONENTS[1::2], EXPONENTS[1::2]))
        found = []
        for gamma in (0.25, 0.5, 1.0, 2.0, 4.0):
            for floor in (0.05, 0.4, 0.75, 0.95):
                bracket = (loss - floor * loss.min()) ** (1 / gamma)
                terms = np.exp(np.stack([-alpha[:, None] * x[:, 0], -beta[:, None] * x[:, 1]], axis=2))
                amplitude = _least_squares(terms / bracket[:, None])
                e, g = np.full(len(alpha), np.log(floor * loss.min())), np.full(len(alpha), gamma)
                found.append(np.column_stack([e, np.log(amplitude), alpha, beta, g]))
        return np.concatenate(found)


FORMS: dict[str, Form] = {
    "approach3": Approach3("approach3", ("E", "A", "B", "alpha", "beta"), ("E", "A", "B")),
    "approach3-gamma": Gamma("approach3-gamma", ("E", "A", "B", "alpha", "beta", "gamma"), ("E", "A", "B")),
    "gadre": Gadre("gadre", ("E", "a", "b", "eta"), ("E", "a", "b"), criterion="loss"),
}


def surface_form(name: str) -> Form:
    """The law of that name. Raises UserError for another."""
    if name not in FORMS:
        raise UserError(f"form '{name}' is no law of N and D; choose from {', '.join(FORMS)}.{nearest(name, FORMS)}")
    return FORMS[name]


def _log_sum_exp(theta: Array, features: Array) -> tuple[Array, Array]:
    """log of the sum of exp(terms) [S, n], share of each term [S, K, n]."""
    k, p, n = features.shape
    terms = (theta @ np.swapaxes(features, 0, 1).reshape(p, k * n)).reshape(len(theta), k, n)
    top = terms.max(axis=1)
    share = np.exp(terms - top[:, None])
    total = share.sum(axis=1)
    return top + np.log(total), share / total[:, None]


def _mean(share: Array, features: Array) -> Array:
    """Features [K, p, n] averaged by share [S, K, n]: the gradient of a log-sum-exp, [S, p, n]."""
    mean = share[:, 0, None] * features[0]
    for k in range(1, len(features)):
        mean += share[:, k, None] * features[k]
    return mean


def _log_sum_exp_curvature(features: Array, share: Array, mean: Array, c: Array) -> Array:
    """Sum over n of c times the Hessian of a log-sum-exp: sum_k share_k x_k x_k' less the outer product of the mean."""
    k, p, n = features.shape
    squares = np.moveaxis(features[:, :, None] * features[:, None], 3, 1).reshape(k * n, p * p)
    first = ((c[:, None] * share).reshape(len(c), k * n) @ squares).reshape(len(c), p, p)
    return first - (c[:, None] * mean) @ np.swapaxes(mean, 1, 2)


def _least_squares(design: Array) -> Array:
    """Amplitudes [S, K] that bring design [S, n, K] closest to one.

    None so small that its term stays below a thousandth everywhere: a term that starts at nothing would stay there.
    """
    largest = design.max(axis=1)
    design = design / largest[:, None]  # steep terms span many orders of magnitude
    gram = np.swapaxes(design, 1, 2) @ design
    ridge = 1e-10 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[1])
    amplitude = np.linalg.solve(gram + ridge, design.sum(axis=1)[..., None])[..., 0]
    return np.maximum(amplitude, 1e-3) / largest


def _amplitudes(log_terms: Array, loss: Array) -> list[Array]:
    """log (E, amplitudes) [S, 1 + K] for terms exp(log_terms) [S, n, K]: with the best floor, and with fixed ones."""
    terms = np.exp(log_terms) / loss[:, None]
    floor = np.broadcast_to((1 / loss)[None, :, None], (*terms.shape[:2], 1))
    found = [np.log(_least_squares(np.concatenate([floor, terms], axis=2)))]
    for part in (0.05, 0.5, 0.9):
        e = part * loss.min()
        amplitude = _least_squares(terms / (1 - e / loss)[:, None])
        found.append(np.column_stack([np.full(len(terms), np.log(e)), np.log(amplitude)]))
    return found
