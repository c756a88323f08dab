"""Fit a law of any form to a file of runs: read, filter, fit. The implementation of `qies fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from qies.errors import UserError, unknown
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.curves import CURVE_COLUMNS, CurveFit, fit_annealing, fit_downstream
from qies.scaling.laws.divergence import sound
from qies.scaling.laws.envelopes import EnvelopeFit, fit_approach1, fit_approach2
from qies.scaling.laws.forms import FORMS, Array
from qies.scaling.laws.intervals import reach
from qies.scaling.laws.power_law import PowerLaw, fit_power
from qies.scaling.laws.selection import FormComparison, HeldOut, HeldOutRun, compare_forms, leave_largest_out
from qies.scaling.laws.surface import Residual, SurfaceFit, fit_surface
from qies.scaling.options import DEFAULTS, FitOptions
from qies.scaling.result import Result, plain
from qies.scaling.tables.columns import column_names
from qies.scaling.tables.filtering import best_per_cell, oddities
from qies.scaling.tables.number_parsing import parse_number
from qies.scaling.tables.runs import Dropped, Runs, read_columns, read_runs

POWERS = ("power", "power+floor")
ENVELOPES = ("approach1", "approach2")
ALL_FORMS = (*FORMS, *POWERS, *ENVELOPES, *CURVE_COLUMNS)
AXES = ("params", "tokens", "flops")
# The forms on which an option has an effect. Options that are not listed apply to every form.
APPLIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("leave_largest", "beside", "predict", "drop_worst"), tuple(FORMS)),
    **dict.fromkeys(("delta", "criterion", "bootstrap"), (*FORMS, *POWERS)),
    "at_compute": (*FORMS, *ENVELOPES),
    "method": ("approach2",),
    "floor": ("downstream",),
    "ceiling": ("downstream",),
}


@dataclass(frozen=True)
class Outcome(Result):
    """A fit with the runs used and dropped, held-out predictions, other forms, predictions and optima.

    `predictions` at given N and D and `optima` at given C hold their intervals (`lo`, ...) where there are any, and
    `reach`, how many times beyond the runs they lie; 1 is inside.
    """

    fit: SurfaceFit | PowerLaw | EnvelopeFit | CurveFit
    runs: Runs | None
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    comparison: FormComparison | None = None
    predictions: tuple[dict[str, float], ...] = ()
    optima: tuple[dict[str, float], ...] = ()
    axis: str = "params"

    def figures(self) -> dict[str, Figure]:
        """Every figure of this fit by a name for its file; `axis` is what a power law runs along."""
        if isinstance(self.fit, SurfaceFit):
            return self.fit.figures(self.runs)
        if isinstance(self.fit, PowerLaw) and self.runs is not None:
            shown = self.fit.figures(getattr(self.runs, self.axis), self.runs.loss, figures.AXES[self.axis])
            return {f"loss-{self.axis}": shown.pop("law"), **shown}
        return self.fit.figures()

    def to_dict(self) -> dict[str, Any]:
        """The fit's own dictionary with `dropped`, `warnings` and the rest; `exponents` is {} where there are none."""
        own = self.fit.to_dict()
        beside = {"held_out": self.held_out, "comparison": self.comparison}
        return {
            "exponents": {},
            **own,
            "convention": None if self.runs is None else self.runs.convention,
            "dropped": plain(self.dropped),
            "warnings": [*self.warnings, *own["warnings"]],
            "predictions": list(self.predictions),
            "optima": list(self.optima),
            **{name: part.to_dict() for name, part in beside.items() if part is not None},
        }

    def tables(self) -> list[Table]:
        """What a terminal shows: parameters with intervals, then predictions and held-out runs where asked for."""
        found = self.to_dict()
        shown = Table("", "value", f"{100 * found['level']:g}% CI", title=f"{found['form']}, {found['n']} runs")
        own = {**found["params"], **{k: v for k, v in found["exponents"].items() if k not in found["params"]}}
        for name, value in {**own, "objective": found["objective"]}.items():
            pair = found["ci"].get(name)
            shown.add_row(name, f"{value:.6g}", "" if pair is None else f"{pair[0]:.4g} to {pair[1]:.4g}")
        tables = [shown]
        if self.predictions:
            tables.append(Table("N", "D", "loss", "interval", "reach", title="predictions"))
            for p in self.predictions:
                band = f"{p['lo']:.4f} to {p['hi']:.4f}" if "lo" in p else ""
                tables[-1].add_row(*(f"{p[k]:.4g}" for k in ("params", "tokens")), f"{p['loss']:.4f}", band, _far(p))
        if self.optima:
            columns = "C", "best N", "interval", "best D", "interval", "loss", "reach"
            tables.append(Table(*columns, title="compute-optimal"))
            for p in self.optima:
                cells = [f"{p['compute']:.4g}"]
                for key in ("params", "tokens"):
                    band = f"{p[f'{key}_lo']:.3g} to {p[f'{key}_hi']:.3g}" if f"{key}_lo" in p else ""
                    cells += [f"{p[key]:.4g}", band]
                tables[-1].add_row(*cells, f"{p['loss']:.4f}" if "loss" in p else "", _far(p))
        if self.held_out is not None:
            tables.append(Table("run", "N", "D", "loss", "predicted", "error", title="held out: the largest sizes"))
            for held in self.held_out.runs:
                tables[-1].add_row(*_cells(held), f"{100 * held.error:+.2f} %")
        far = [r for r in self.fit.residuals if r.outlier] if isinstance(self.fit, SurfaceFit) else []
        if far:
            tables.append(Table("outlier", "N", "D", "loss", "predicted", "residual", title="far from the law"))
            for r in sorted(far, key=lambda r: -abs(r.residual)):
                tables[-1].add_row(*_cells(r), f"{100 * np.expm1(r.residual):+.2f} %")
        if self.dropped:
            tables.append(dropped_table(self.dropped))
        return tables

    def summary(self) -> str:
        """The fit, what was dropped, the held-out predictions and the other forms, as one paragraph."""
        parts = [self.fit.summary()]
        if self.runs is not None and not isinstance(self.fit, SurfaceFit):
            parts.append(f"FLOPs {self.runs.convention}.")
        if self.dropped:
            parts.append(f"{len(self.dropped)} run{'s' if len(self.dropped) > 1 else ''} left out, see dropped.")
        parts += [f"{w[0].upper()}{w[1:]}." for w in self.warnings]
        parts += [part.summary() for part in (self.held_out, self.comparison) if part is not None]
        return " ".join(parts)


def fit_file(
    path: str | Path,
    options: FitOptions = DEFAULTS,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Fit a law to the runs of a file or folder (`tables.runs.read_runs`).

    Args:
        path: The table, or the folder of run records.
        options: The form of the law, and what to fit, hold out, predict and compare.
        progress: Called with the number of bootstrap draws that are done.

    Raises UserError for an unknown form or axis, an option that does not apply to the form, and bad input of the parts.
    """
    form, level = options.form, options.level
    _check(options)
    columns, points, budgets = column_names(options.columns), _points(options.predict), _flops(options.at_compute)
    if form in CURVE_COLUMNS:
        return Outcome(_fit_curve(read_columns(path, CURVE_COLUMNS[form], columns), options), None, ())
    everything = read_runs(path, columns, options.flops)
    chosen = np.array([options.arm is None or a == options.arm for a in everything.arm])
    if options.arm is not None:
        everything.of_arm(options.arm)  # raises for an unknown arm
    index = np.flatnonzero(chosen)
    runs, unsound = sound(everything.select(index), against_fit=options.drop_worst is None)
    dropped = [dataclasses.replace(d, index=int(index[d.index])) for d in unsound]
    if not len(runs):
        raise UserError(f"{path}: no sound run is left; the first was left out because: {dropped[0].reason}")
    if np.ptp(runs.loss) == 0:
        raise UserError(
            f"{path}: every loss is {runs.loss[0]:g}, so no law can be fitted; check the column of the loss."
        )
    kept = np.delete(index, [d.index for d in unsound])
    if options.best_per_cell:
        rows = best_per_cell(runs)
        runs, kept = runs.select(rows), kept[rows]
    warnings = (*_mixtures(runs, form), *oddities(runs))
    if form in POWERS:
        law = fit_power(
            getattr(runs, options.axis),
            runs.loss,
            weight=runs.weight,
            floor=form == "power+floor",
            delta=options.delta,
            criterion=options.criterion or "log",
            level=level,
            interval="bootstrap" if options.bootstrap else "auto" if options.bootstrap is None else "t",
            draws=options.bootstrap or 400,
            seed=options.seed,
        )
        return Outcome(law, runs, tuple(dropped), warnings, axis=options.axis)
    if form in ENVELOPES:
        envelope = (
            fit_approach1(runs, level=level)
            if form == "approach1"
            else fit_approach2(runs, method=options.method or "parabola", level=level)
        )
        optima = tuple(_optimum(envelope, runs, c) for c in budgets)
        return Outcome(envelope, runs, tuple(dropped), warnings, optima=optima)
    residuals: dict[str, Any] = {"delta": options.delta, "criterion": options.criterion}
    fit = fit_surface(
        runs, form, **residuals, bootstrap=options.bootstrap, resample=options.resample, level=level,
        drop_worst=options.drop_worst or 0, seed=options.seed, progress=progress,
    )  # fmt: skip
    dropped += [dataclasses.replace(d, index=int(kept[d.index])) for d in fit.dropped]
    fit = dataclasses.replace(fit, dropped=tuple(dropped))
    used = runs.select(~np.isin(kept, [d.index for d in dropped]))
    largest, beside = options.leave_largest, options.beside
    return Outcome(
        fit,
        used,
        tuple(dropped),
        warnings,
        held_out=leave_largest_out(used, form, largest, **residuals) if largest else None,
        comparison=compare_forms(used, (form, *beside), **residuals) if beside else None,
        predictions=tuple(_prediction(fit, used, n, d) for n, d in points),
        optima=tuple(_optimum(fit, used, c) for c in budgets),
    )


def dropped_table(dropped: tuple[Dropped, ...]) -> Table:
    """Every run left out, with its row in the table from 1 and the reason."""
    shown = Table("row", "run", "reason", title=f"left out: {len(dropped)} run{'s' if len(dropped) > 1 else ''}")
    for run in dropped:
        shown.add_row(str(run.index + 1), run.name, run.reason)
    return shown


def _check(options: FitOptions) -> None:
    """Raise UserError for an unknown form or axis, and for an option that has no effect on the form."""
    if options.form not in ALL_FORMS:
        raise unknown("form", options.form, ALL_FORMS)
    if options.axis not in AXES:
        raise unknown("axis", options.axis, AXES)
    for name, forms in APPLIES.items():
        value = getattr(options, name)
        absent = value is None or value == () or (isinstance(value, int) and value == 0)
        if options.form not in forms and not absent:
            raise UserError(f"--{name.replace('_', '-')} is for {', '.join(forms)}, not for {options.form}")


def _points(words: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    """Parse pairs of N and D."""
    points = []
    for word in words:
        try:
            n, d = (parse_number(part) for part in word.split(","))
            if not (0 < n < float("inf") and 0 < d < float("inf")):
                raise ValueError
        except ValueError:
            raise UserError(f"--predict needs N,D such as 6.9e9,1.38e11; got '{word}'.") from None
        points.append((n, d))
    return tuple(points)


def _flops(words: tuple[str, ...]) -> tuple[float, ...]:
    """Parse FLOPs, as in the cells of a table."""
    found = []
    for word in words:
        try:
            found.append(parse_number(word))
            if not 0 < found[-1] < float("inf"):
                raise ValueError
        except ValueError:
            raise UserError(f"--at-compute needs FLOPs such as 1e21 or 3EFLOPs; got '{word}'.") from None
    return tuple(found)


def _fit_curve(table: dict[str, Array], options: FitOptions) -> CurveFit:
    """Fit the law of a training curve or of an accuracy."""
    x, weight = [table[name] for name in CURVE_COLUMNS[options.form]], table.get("weight", 1.0)
    if options.form == "annealing":
        return fit_annealing(*x, weight=weight, level=options.level)
    low, high = (
        None if v == "free" else v for v in (options.floor, 1.0 if options.ceiling is None else options.ceiling)
    )
    return fit_downstream(*x, weight=weight, floor=low, ceiling=high, level=options.level)


def _mixtures(runs: Runs, form: str) -> list[str]:
    """Warnings for runs of several arms, and for repeated data that the form ignores."""
    found = [] if len(runs.arms) < 2 else [f"runs of {len(runs.arms)} arms are fitted as one; choose with --arm"]
    repeated = 0 if runs.unique is None else int((runs.unique < runs.tokens).sum())
    if repeated and form != "data-constrained":
        found.append(
            f"{repeated} of {len(runs)} runs repeat data (unique below tokens), which {form} ignores; fit them with "
            "--form data-constrained"
        )
    return found


def _prediction(fit: SurfaceFit, runs: Runs, n: float, d: float) -> dict[str, float]:
    """The loss at N and D, with its interval if there is one."""
    loss, lo, hi = (float(v) for v in fit.predict_band(n, d))
    band = {"lo": lo, "hi": hi} if np.isfinite(lo) else {}
    return {"params": n, "tokens": d, "loss": loss, **band, "reach": _reach(runs, n, d)}


def _optimum(fit: SurfaceFit | EnvelopeFit, runs: Runs, compute: float) -> dict[str, float]:
    """Best N and D at C, with intervals and, of a law, the loss. A law's C = 6ND becomes the runs' C = k ND by their
    median k."""
    if isinstance(fit, EnvelopeFit):
        spent = compute
        n, d = (float(v) for v in fit.optimum(spent))
        found = {"compute": compute, "params": n, "tokens": d}
    else:
        spent = 6 * compute / float(np.median(runs.flops / (runs.params * runs.tokens)))
        n, d, loss = fit.optimum(spent)
        found = {"compute": compute, "params": n, "tokens": d, "loss": loss}
    if (band := fit.optimum_band(spent)) is not None:
        found |= dict(zip(("params_lo", "params_hi", "tokens_lo", "tokens_hi"), (*band[0], *band[1]), strict=True))
    return {**found, "reach": _reach(runs, n, d)}


def _reach(runs: Runs, n: float, d: float) -> float:
    known = np.log(np.stack([runs.params, runs.tokens], axis=1))
    return float(reach(np.log([[n, d]]), known)[0])


def _far(point: dict[str, float]) -> str:
    return "inside" if point["reach"] <= figures.INSIDE else f"{point['reach']:.3g}"


def _cells(run: Residual | HeldOutRun) -> tuple[str, ...]:
    return run.name, f"{run.params:.4g}", f"{run.tokens:.4g}", f"{run.loss:.4f}", f"{run.predicted:.4f}"
