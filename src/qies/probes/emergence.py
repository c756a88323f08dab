"""Does a score set in at a point, or grow smoothly? A line against a line with a break, with intervals.

Sharp onsets can come from the measure alone (Schaeffer et al., arXiv:2304.15004): exact match jumps where the
log-probability of the answer grows smoothly. So the same comparison is made for each measure, and the resolution of the
measure is stated beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

from qies.errors import UserError

LEAST = 6  # points: a break has four parameters
GRID = 200  # candidate breaks


@dataclass(frozen=True)
class Emergence:
    """A line y = a + b x and a broken line y = a + b x + d max(0, x - c), by weighted least squares.

    break_at, low, high: c and its 95 % profile-likelihood interval; before, after: slopes on both sides; chi2_line and
    chi2_break: weighted sums of squares; delta_aicc: AICc of the line minus that of the break (positive favours the
    break); p_value: share of data sets simulated from the line whose chi-squares differ by at least as much.
    """

    break_at: float
    low: float
    high: float
    before: float
    after: float
    chi2_line: float
    chi2_break: float
    delta_aicc: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_emergence(x: ArrayLike, y: ArrayLike, stderr: ArrayLike, *, draws: int = 999, seed: int = 0) -> Emergence:
    """Compare both models on points x (say, the log of the tokens), scores y and their standard errors.

    The test of a break has no chi-square distribution, because under the line its position means nothing; the p-value
    is simulated. Raises UserError for fewer than 6 points, repeated x, or standard errors that are not positive.
    """
    xs, ys, se = (np.asarray(a, dtype=np.float64) for a in (x, y, stderr))
    if not (xs.ndim == 1 and xs.shape == ys.shape == se.shape and len(xs) >= LEAST):
        raise UserError(f"A break needs at least {LEAST} points with a score and a standard error each.")
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (se > 0).all() and np.isfinite(se).all()):
        raise UserError("Points must be finite and standard errors positive.")
    order = np.argsort(xs)
    xs, ys, se = xs[order], ys[order], se[order]
    if (np.diff(xs) <= 0).any():
        raise UserError("Points must differ in x; average the scores at equal x first.")
    breaks = np.linspace(xs[1], xs[-2], GRID)  # a point at least on either side of it
    bases = np.stack([_base(xs, se, c) for c in breaks])
    line = _base(xs, se, None)
    line_fit, profile = _chi2(line, ys[:, None] / se[:, None])[0], _chi2(bases, ys[:, None] / se[:, None])[:, 0]
    best = int(profile.argmin())
    near = breaks[profile <= profile[best] + chi2.ppf(0.95, 1)]
    coefficients = np.linalg.lstsq(bases[best], ys / se, rcond=None)[0]
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((draws, len(xs)))  # the line's own values cancel in the difference
    simulated = _chi2(line, noise.T) - _chi2(bases, noise.T).min(0)
    gain = line_fit - profile[best]
    return Emergence(
        break_at=float(breaks[best]),
        low=float(near.min()),
        high=float(near.max()),
        before=float(coefficients[1]),
        after=float(coefficients[1] + coefficients[2]),
        chi2_line=float(line_fit),
        chi2_break=float(profile[best]),
        delta_aicc=_aicc(line_fit, 2, len(xs)) - _aicc(profile[best], 4, len(xs)),
        p_value=float((1 + (simulated >= gain).sum()) / (1 + draws)),
    )


def _base(x: NDArray, se: NDArray, c: float | None) -> NDArray:
    """Weighted columns 1, x and, with a break, max(0, x - c)."""
    columns = [np.ones_like(x), x] if c is None else [np.ones_like(x), x, np.maximum(0, x - c)]
    return np.stack(columns, 1) / se[:, None]


def _chi2(base: NDArray, target: NDArray) -> NDArray:
    """Residual sums of squares of target [N,S] on the columns of `base` [...,N,P]: [...,S]."""
    q, _ = np.linalg.qr(base)
    return (target**2).sum(0) - ((np.swapaxes(q, -1, -2) @ target) ** 2).sum(-2)


def _aicc(chi2_value: float, parameters: int, points: int) -> float:
    return float(chi2_value + 2 * parameters + 2 * parameters * (parameters + 1) / (points - parameters - 1))
