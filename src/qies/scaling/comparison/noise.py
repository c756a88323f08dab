"""How cell means scatter around a law: at the level of cells, and at that of sizes, whose cells deviate together.

A size's budgets share what its shape, its initialisation and the law's misfit do, so they are no independent
observations. The residuals are split into what varies between sizes and within them, the two mean squares give both
variances by the method of moments (analysis of variance), and the variance of an estimate gets the degrees of freedom
of the mean squares that it rests on (Satterthwaite 1946, Biometrics 2, 110). With one budget a size the levels are one.

Legend: m cells, p parameters of the law; M = I - J J^+ takes cell means to residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qies.scaling.laws.intervals import ROUNDING

Array = NDArray[np.float64]

# Fewer degrees of freedom between sizes, or within them, do not tell the two levels apart.
FEWEST_BETWEEN = 0.5


@dataclass(frozen=True)
class Strata:
    """Both levels' variances and what they are known to.

    `ratio`: the variance of size deviations over that of cells; `dof` of the residuals, `between` of those between
    sizes; `clustered`: some size has several cells. `design` [2, 2] takes the (cell, size) variances to the expected
    sums of squares (between, within); `forms` [3, 2, 2] is tr(A V B V) of the two sums' matrices in powers of `ratio`.
    """

    ratio: float
    dof: int
    between: float
    clustered: bool
    design: Array
    forms: Array

    def freedom(self, cell: Array, size: Array) -> Array:
        """Degrees of freedom of estimates whose variance is cell [n] from cells and size [n] from sizes."""
        if self.ratio == 0:
            return np.full(len(cell), float(self.dof))
        share = np.linalg.solve(self.design.T, np.stack([cell, size / self.ratio]))
        spread = np.polynomial.polynomial.polyval(self.ratio, self.forms)
        variance = np.einsum("in,ij,jn->n", share, spread, share)
        total = (cell + size) ** 2
        return np.clip(np.divide(total, variance, out=np.ones_like(total), where=variance > 0), 1.0, float(self.dof))


def strata(residual: Array, jacobian: Array, size: NDArray[np.int64]) -> Strata:
    """Both levels' variances from residuals [m] of a law with Jacobian [m, p] at cells of sizes numbered [m]."""
    m, dof = len(residual), len(residual) - jacobian.shape[1]
    member = (size[:, None] == np.unique(size)).astype(np.float64)
    together = member @ member.T
    maker = np.eye(m) - jacobian @ pseudo_inverse(jacobian)
    average = member / member.sum(axis=0) @ member.T
    parts = [maker @ part @ maker for part in (average, np.eye(m) - average)]
    design = np.array([[np.trace(part), np.trace(part @ together)] for part in parts])
    between, within = design[:, 0]
    clustered = member.shape[1] < m
    nothing = Strata(0.0, dof, float(between), clustered, design, np.zeros((3, 2, 2)))
    if not clustered or min(between, within) < FEWEST_BETWEEN or np.abs(residual).max() < ROUNDING:
        return nothing
    cell, sizes = np.linalg.solve(design, [residual @ part @ residual for part in parts])
    if sizes <= 0:
        return nothing
    forms = np.array(
        [
            [[np.trace(a @ b), 2 * np.trace(a @ together @ b), np.trace(a @ together @ b @ together)] for b in parts]
            for a in parts
        ]
    )
    ratio = float(sizes / max(cell, ROUNDING**2))
    return Strata(ratio, dof, float(between), clustered, design, np.moveaxis(forms, 2, 0))


def pseudo_inverse(jacobian: Array) -> Array:
    """[p, cells]; columns are scaled first, so that a parameter's unit does not decide what is singular."""
    scale = np.linalg.norm(jacobian, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    return np.linalg.pinv(jacobian / scale, rcond=1e-12) / scale[:, None]
