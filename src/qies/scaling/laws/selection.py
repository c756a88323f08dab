"""Which form, and how far it reaches: information criteria, likelihood ratios, error on the largest models.

The Huber sum is the log likelihood of a density, exp(-rho(r) / tau) / Z(tau), normal within delta and Laplace beyond,
of the residuals of log L or, by the criterion "loss", of L.
Its scale tau has a best value for every fit, so forms of different size compare on the same footing.

Errors need not have that density: with a delta of 1e-3 it is Laplace's, and twice the gain in its log likelihood is
pi/2 times too large where errors are normal. The test of nested forms therefore scales the drop of the Huber sum by
what the residuals show, F = 2 (Q_narrow - Q_wide) / q * mean rho'' / mean rho'^2 (Schrader and Hettmansperger 1980,
Biometrika 67, 93), which is the F test of least squares where delta is large.

Seeds of one (N, D) share its deviation from any law, so they are averaged first and count once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import f as fisher

from qies.errors import UserError
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.forms import surface_form
from qies.scaling.laws.intervals import ROUNDING, huber_moments
from qies.scaling.laws.surface import DELTA, SurfaceFit, fit_surface
from qies.scaling.result import Result
from qies.scaling.tables.runs import Runs
from qies.scaling.tables.size_levels import levels

# Which form is a special case of which: by gamma = 1, and by alpha = beta.
NESTED = {("approach3", "approach3-gamma"), ("gadre", "approach3"), ("gadre", "approach3-gamma")}


@dataclass(frozen=True)
class FormScore:
    """`log_likelihood` at the best scale; AIC (corrected for small n), BIC; lower is better."""

    form: str
    parameters: int
    objective: float
    log_likelihood: float
    aic: float
    bic: float


@dataclass(frozen=True)
class RatioTest:
    """Robust likelihood-ratio test of `wider` over `narrower`: F(`restrictions`, `dof`) = `statistic`, and its p."""

    narrower: str
    wider: str
    statistic: float
    restrictions: int
    dof: int
    p: float


@dataclass(frozen=True)
class FormComparison(Result):
    """Forms on the same runs and `criterion` (Huber sum on "log" L or the "loss" L), best AIC first, and tests of the
    nested ones."""

    n: int
    criterion: str
    scores: tuple[FormScore, ...]
    tests: tuple[RatioTest, ...]

    def summary(self) -> str:
        """Which form the data prefer, in one sentence a fact."""
        best = self.scores[0]
        others = ", ".join(f"{s.form} +{s.aic - best.aic:.1f}" for s in self.scores[1:])
        tests = "".join(
            f" {t.wider} over {t.narrower}: robust likelihood ratio F({t.restrictions}, {t.dof}) = {t.statistic:.3g}, "
            f"p = {t.p:.2g}."
            for t in self.tests
        )
        what = "log loss" if self.criterion == "log" else "loss"
        return f"Lowest AIC: {best.form} ({others}; residuals of {what}).{tests}"

    def figures(self) -> dict[str, Figure]:
        """How far the AIC of each form is above the lowest, against its number of parameters."""
        return {"forms": figures.forms_figure(self)}


@dataclass(frozen=True)
class HeldOutRun:
    """A run that the fit did not see; `error` is predicted / loss - 1."""

    name: str
    params: float
    tokens: float
    loss: float
    predicted: float
    error: float


@dataclass(frozen=True)
class HeldOut(Result):
    """Prediction of the runs of the `k` largest models by a fit to the `n` others."""

    form: str
    k: int
    n: int
    runs: tuple[HeldOutRun, ...]
    mean_error: float
    worst_error: float

    def summary(self) -> str:
        """The mean and the largest error of the predictions."""
        worst = max(self.runs, key=lambda r: abs(r.error))
        return (
            f"Without the {self.k} largest sizes, {self.form} through {self.n} runs predicts their "
            f"{len(self.runs)} runs to {100 * self.mean_error:.2f} % on average; worst {worst.name} "
            f"(N {worst.params:.3g}, D {worst.tokens:.3g}) at {100 * worst.error:+.2f} %."
        )

    def figures(self) -> dict[str, Figure]:
        """How far each run lies from its prediction, in percent of the loss."""
        rows = [vars(r) | {"residual": math.log(r.loss / r.predicted), "outlier": False} for r in self.runs]
        return {"held-out": figures.residuals_figure({self.form: rows})}


def huber_log_likelihood(objective: float, n: float, delta: float) -> float:
    """Highest log likelihood over tau of n residuals whose Huber sum is `objective`; -inf-free for a perfect fit."""
    objective = max(objective, 1e-300)

    def negative(log_tau: float) -> float:
        root = math.sqrt(math.exp(log_tau))
        inside = math.sqrt(2 * math.pi) * root * math.erf(delta / (math.sqrt(2) * root))
        outside = 0.0 if math.isinf(delta) else 2 * root * root / delta * math.exp(-(delta**2) / (2 * root * root))
        return objective / root**2 + n * math.log(inside + outside)

    start = math.log(2 * objective / n)
    found = minimize_scalar(negative, bounds=(start - 5, start + 15), method="bounded", options={"xatol": 1e-10})
    return -float(found.fun)


def compare_forms(
    runs: Runs, forms: tuple[str, ...], *, delta: float | None = None, criterion: str | None = None
) -> FormComparison:
    """Fit every form to the same runs by one criterion and rank them: the Huber sum on log L (by default, with delta
    1e-3), or on L by criterion "loss" (least squares without a delta).

    n counts distinct (N, D). Raises UserError for an unknown form, and where n leaves no degree of freedom.
    """
    criterion = criterion or "log"
    used = delta if delta is not None else DELTA if criterion == "log" else math.inf
    cells = _average_seeds(runs)
    n = len(cells)
    for form in forms:
        k = len(surface_form(form).names) + 1  # and the scale
        if n <= k + 1:
            raise UserError(f"{n} runs are too few to compare {form} with others; {k + 2} or more are needed")
    fits = {form: fit_surface(cells, form, delta=used, criterion=criterion) for form in dict.fromkeys(forms)}
    scores = []
    for form, fit in fits.items():
        k = len(fit.params) + 1
        height = huber_log_likelihood(fit.objective, float(cells.weight.sum()), used)
        aic = 2 * k - 2 * height + 2 * k * (k + 1) / (n - k - 1)
        scores.append(FormScore(form, k - 1, fit.objective, height, aic, k * math.log(n) - 2 * height))
    tests = [_ratio_test(fits[a], fits[b]) for a in fits for b in fits if (a, b) in NESTED]
    return FormComparison(n, criterion, tuple(sorted(scores, key=lambda s: s.aic)), tuple(tests))


def _average_seeds(runs: Runs) -> Runs:
    """One entry for each distinct (N, D): the weighted mean of log loss over its seeds, with their mean weight."""
    unique = runs.tokens if runs.unique is None else runs.unique
    points = np.stack([runs.params, runs.tokens, unique], axis=1)
    _, first, member = np.unique(points, axis=0, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    total = np.bincount(member, runs.weight)
    log_loss = np.bincount(member, runs.weight * np.log(runs.loss)) / total
    return replace(runs.select(first), loss=np.exp(log_loss), weight=total / np.bincount(member))


def _ratio_test(narrow: SurfaceFit, wide: SurfaceFit) -> RatioTest:
    residual = np.array([r.residual if wide.criterion == "log" else r.loss - r.predicted for r in wide.residuals])
    restrictions, dof = len(wide.params) - len(narrow.params), len(residual) - len(wide.params)
    inside, variance = huber_moments(residual, wide.delta, len(wide.params))
    drop = max(narrow.objective - wide.objective, 0.0)
    statistic = 2 * drop / restrictions * inside / max(variance, ROUNDING**2)
    return RatioTest(
        narrow.form, wide.form, statistic, restrictions, dof, float(fisher.sf(statistic, restrictions, dof))
    )


def leave_largest_out(
    runs: Runs, form: str, k: int, *, delta: float | None = None, criterion: str | None = None
) -> HeldOut:
    """Fit without the runs of the k largest N, and predict them: what an extrapolation is worth.

    Sizes within 2 % of each other are one (`tables.levels`), as embeddings and rounding make them differ. Raises
    UserError unless at least one size remains.
    """
    size = levels(runs.params)
    sizes = int(size.max()) + 1
    if not 1 <= k < sizes:
        raise UserError(f"leave out between 1 and {sizes - 1} of the {sizes} sizes (those within 2 % are one), not {k}")
    largest = size >= sizes - k
    fit = fit_surface(runs.select(~largest), form, delta=delta, criterion=criterion)
    held = runs.select(largest)
    predicted = fit.predict(held.params, held.tokens, held.unique)
    error = predicted / held.loss - 1
    columns = (held.params, held.tokens, held.loss, predicted, error)
    rows = tuple(HeldOutRun(*row) for row in zip(held.name, *(c.tolist() for c in columns), strict=True))
    off = np.abs(error)
    return HeldOut(form, k, fit.n, rows, float(off.mean()), float(off.max()))
