"""The laws of the loss in N and D as objects: log L, its analytic Jacobian and curvature, bounds and starts.

    approach3        L = E + A N^-alpha + B D^-beta                          Hoffmann et al. 2022, arXiv:2203.15556
    approach3-gamma  L = E + (A N^-alpha + B D^-beta)^gamma                  after Kaplan et al. 2020, arXiv:2001.08361
    gadre            L = E + a N^eta + b 6^(eta/2) (M N)^eta, M = D/N        Gadre et al. 2024, arXiv:2403.08540
    data-constrained L = E + A N'^-alpha + B D'^-beta                        Muennighoff et al. 2023, arXiv:2305.16264
                     D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D))) with U unique tokens, and N' likewise of
                     U_N = min(N, the compute-optimal size for U tokens) and R_N

`data-constrained` is approach 3 where no token is repeated and no model larger than optimal for its unique tokens. In
`gadre` M N is D: it is approach 3 with both exponents equal to -eta, one parameter less, meant for few runs.

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

from qies.errors import unknown

Array = NDArray[np.float64]
Curvature = Callable[[Array], Array]

LOG6 = float(np.log(6.0))
# A floor a million times below the losses is none; an exponent beyond 8 is a step, no power law.
LEAST_FLOOR, STEEPEST = float(np.log(1e-6)), 8.0
EXPONENTS = np.geomspace(0.03, 6, 9)
# log R_N and log R_D: repeats that are worth nothing, and as much as fresh data.
REPEATS = float(np.log(1e-2)), float(np.log(1e4))
LEAST_EXPONENT = 1e-3  # of `data-constrained`, whose optimal size has no meaning at an exponent of zero


@dataclass(frozen=True)
class Form(ABC):
    """A law of the loss, a sum of terms exp(x_k . theta) unless a subclass says otherwise.

    `names` of the public parameters in order; `logged` those whose logarithm is linear in theta (E and amplitudes);
    `criterion`: what the published fits of this law take residuals of, "log" L or the "loss" itself. `repeats`: x has
    a third column, log(D/U) with U the unique tokens, not centred.
    """

    name: str
    names: tuple[str, ...]
    logged: tuple[str, ...]
    criterion: str = "log"
    repeats: bool = False

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
        of |= {"R_N": REPEATS, "R_D": REPEATS}
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
        rows[1, 3], rows[2, 4] = center[:2]
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


class DataConstrained(Approach3):
    """L = E + A N'^-alpha + B D'^-beta; theta = (E, A, B, alpha, beta, R_N, R_D), logarithms but for the exponents."""

    def log_loss(self, theta: Array, x: Array) -> Array:
        return self.expand(theta, x)[0]

    def expand(self, theta: Array, x: Array) -> tuple[Array, Array, Curvature]:
        u, v, repeat = x.T
        s, n = len(theta), len(x)
        a, b, alpha, beta, r_n, r_d = (theta[:, i, None] for i in range(1, 7))
        # log N - log U_N, where the compute-optimal size for U tokens has alpha A N^-alpha = beta B U^-beta.
        excess = u - (a - b + np.log(alpha / beta) + beta * (v - repeat)) / alpha
        over = excess > 0
        z = np.zeros((s, 5, n))  # gradient of `excess` by (A, B, alpha, beta): its second derivatives are below
        z[:, 1], z[:, 2] = -1 / alpha, 1 / alpha
        z[:, 3] = (u - excess - 1 / alpha) / alpha
        z[:, 4] = (1 / beta - v + repeat) / alpha
        size, dsize, d2size = _worth(np.where(over, excess, 0.0), r_n)
        data, ddata, d2data = _worth(np.broadcast_to(repeat, (s, n)), r_d)
        size_term, data_term = a - alpha * (u + size), b - beta * (v + data)
        terms = np.stack([np.broadcast_to(theta[:, 0, None], (s, n)), size_term, data_term], axis=1)
        top = terms.max(axis=1)
        share = np.exp(terms - top[:, None])
        total = share.sum(axis=1)
        share /= total[:, None]
        first = np.zeros((s, 3, 7, n))  # gradients of the three terms
        first[:, 0, 0] = first[:, 1, 1] = first[:, 2, 2] = 1
        by_excess = np.where(over, dsize[0], 0.0)
        first[:, 1, :5] -= (alpha * by_excess)[:, None] * z
        first[:, 1, 3] -= u + size
        first[:, 1, 5] = -alpha * dsize[1]
        first[:, 2, 4] = -(v + data)
        first[:, 2, 6] = -beta * ddata[1]
        slope = (share[:, :, None] * first).sum(axis=1)

        def curvature(c: Array) -> Array:
            weighted = (c[:, None] * share)[:, :, None] * first
            found = np.einsum("skpn,skqn->spq", weighted, first) - np.einsum("spn,sqn->spq", c[:, None] * slope, slope)
            # Second derivatives of the size's term, -alpha N' by alpha and through the excess, and of the data's term.
            w = c * share[:, 1]
            full = np.zeros((s, 7, n))
            full[:, :5] = z
            bend = np.where(over, d2size[0], 0.0)
            found -= np.einsum("spn,sqn->spq", (w * alpha * bend)[:, None] * full, full)
            mixed = np.zeros((s, 7, 7))
            pull = w * by_excess
            mixed[:, 3, :5] -= (pull[:, None] * z).sum(axis=2)
            mixed[:, 5, :5] -= ((w * alpha * np.where(over, d2size[1], 0.0))[:, None] * z).sum(axis=2)
            mixed[:, 3, 5] -= (w * dsize[1]).sum(axis=1)
            # Of the excess itself: by (alpha, each of A, B, alpha, beta), and by beta twice.
            for i, sign in ((1, 1.0), (2, -1.0)):
                mixed[:, 3, i] -= (pull * sign / alpha).sum(axis=1)
            mixed[:, 3, 4] -= (pull * -z[:, 4]).sum(axis=1)
            found += mixed + np.swapaxes(mixed, 1, 2)
            found[:, 3, 3] -= (pull * (1 / alpha**2 - 2 * z[:, 3])).sum(axis=1)
            found[:, 4, 4] -= (pull * -1 / beta**2).sum(axis=1)
            found[:, 5, 5] -= (w * alpha * d2size[2]).sum(axis=1)
            w = c * share[:, 2]
            found[:, 6, 6] -= (w * beta * d2data[2]).sum(axis=1)
            cross = (w * ddata[1]).sum(axis=1)
            found[:, 4, 6] -= cross
            found[:, 6, 4] -= cross
            return found

        return top + np.log(total), np.swapaxes(slope, 1, 2), curvature

    def bounds(self, loss: Array) -> tuple[Array, Array]:
        low, high = super().bounds(loss)
        low[3:5] = LEAST_EXPONENT
        return low, high

    def starts(self, x: Array, loss: Array) -> Array:
        """Those of approach 3 on D' for a grid of R_D, with N' = N, times a grid of R_N."""
        alpha, beta = (g.reshape(-1) for g in np.meshgrid(EXPONENTS[1::2], EXPONENTS[1::2]))
        found = []
        for r_d in (1.0, 2.5, 4.5):
            data = x[:, 1] + _worth(x[None, :, 2], np.array([[r_d]]))[0][0]
            log_terms = np.stack([-alpha[:, None] * x[:, 0], -beta[:, None] * data], axis=2)
            for amplitudes in _amplitudes(log_terms, loss):
                for r_n in (1.0, 4.5):
                    fixed = np.tile([r_n, r_d], (len(alpha), 1))
                    found.append(np.column_stack([amplitudes, alpha, beta, fixed]))
        return np.concatenate(found)


def _worth(repeat: Array, log_r: Array) -> tuple[Array, tuple[Array, Array], tuple[Array, Array, Array]]:
    """log(1 + R (1 - exp(-(e^repeat - 1) / R))) - repeat: what repeating lets D' lag behind D, at most 0; [S, n].

    With its derivatives by `repeat` and log R, and the second ones (twice repeat, both, twice log R).
    """
    r = np.exp(log_r)
    times = np.expm1(np.minimum(repeat, 300.0))
    q = times / r
    e = np.exp(-q)
    # f = 1 + R (1 - e); a, b its derivatives by repeat and log R.
    f = 1 - r * np.expm1(-q)
    a = e * (times + 1)
    b = r * (-np.expm1(-q) - q * e)
    aa = a * (1 - (times + 1) / r)
    ab = a * q
    bb = b - r * q**2 * e
    fa, fb = a / f, b / f
    return np.log(f) - repeat, (fa - 1, fb), (aa / f - fa**2, ab / f - fa * fb, bb / f - fb**2)


FORMS: dict[str, Form] = {
    "approach3": Approach3("approach3", ("E", "A", "B", "alpha", "beta"), ("E", "A", "B")),
    "approach3-gamma": Gamma("approach3-gamma", ("E", "A", "B", "alpha", "beta", "gamma"), ("E", "A", "B")),
    "data-constrained": DataConstrained(
        "data-constrained",
        ("E", "A", "B", "alpha", "beta", "R_N", "R_D"),
        ("E", "A", "B", "R_N", "R_D"),
        repeats=True,
    ),
    "gadre": Gadre("gadre", ("E", "a", "b", "eta"), ("E", "a", "b"), criterion="loss"),
}


def surface_form(name: str) -> Form:
    """The law of that name. Raises UserError for another."""
    if name not in FORMS:
        raise unknown("law of N and D", name, FORMS)
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
