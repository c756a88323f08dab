"""Fit a law of any form to a file of runs: read, filter, fit. The implementation of `qies fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from qies.errors import UserError, nearest
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.laws.curves import CURVE_COLUMNS, CurveFit, fit_annealing, fit_downstream
from qies.scaling.laws.divergence import sound
from qies.scaling.laws.envelopes import EnvelopeFit, fit_approach1, fit_approach2
from qies.scaling.laws.forms import FORMS
from qies.scaling.laws.intervals import reach
from qies.scaling.laws.power_law import PowerLaw, fit_power
from qies.scaling.laws.selection import FormComparison, HeldOut, HeldOutRun, compare_forms, leave_largest_out
from qies.scaling.laws.surface import Residual, SurfaceFit, fit_surface
from qies.scaling.result import Result, plain
from qies.scaling.tables.filtering import best_per_cell, oddities
from qies.scaling.tables.runs import Dropped, Runs, read_columns, read_runs

POWERS = ("power", "power+floor")
ENVELOPES = ("approach1", "approach2")
ALL_FORMS = (*FORMS, *POWERS, *ENVELOPES, *CURVE_COLUMNS)
AXES = ("params", "tokens", "flops")


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
    form: str = "approach3",
    *,
    columns: Mapping[str, str] | None = None,
    flops: str | None = None,
    arm: str | None = None,
    axis: str = "params",
    delta: float | None = None,
    criterion: str | None = None,
    method: str | None = None,
    floor: float | Literal["free"] | None = None,
    ceiling: float | Literal["free"] | None = None,
    drop_worst: int | None = None,
    bootstrap: int | None = None,
    resample: str = "runs",
    level: float = 0.95,
    seed: int = 0,
    leave_largest: int = 0,
    beside: tuple[str, ...] = (),
    predict: tuple[tuple[float, float], ...] = (),
    at_compute: tuple[float, ...] = (),
    best: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Fit `form` to the runs of a file or folder (`tables.runs.read_runs`).

    `delta`, `criterion`, `bootstrap`, `resample`, `level`, `seed` as for `fit_surface` and `fit_power`; `method` of
    `fit_approach2`; `floor` and `ceiling` of `fit_downstream`, "free" where they are fitted (by default the floor is,
    and the ceiling 1). `at_compute`: FLOPs, counted as the table's, at which to give the best N and D.

    `drop_worst`: the number of outliers to drop, 0 for none; it replaces the search for diverged runs against a fit,
    but runs that did not finish or have no finite loss are always dropped. `leave_largest`: also fit without this many
    of the largest sizes and predict them. `beside`: other forms to compare with. `predict`: pairs of N and D. `best`:
    keep only the lowest loss of each arm, N and D. `axis`: the variable of `power` and `power+floor`. Raises UserError
    for an unknown form or axis, an option that does not apply to the form, and what the parts raise.
    """
    if form not in ALL_FORMS:
        raise UserError(f"form '{form}' is unknown; choose from {', '.join(ALL_FORMS)}.{nearest(form, ALL_FORMS)}")
    if axis not in AXES:
        raise UserError(f"axis '{axis}' is unknown; choose from {', '.join(AXES)}.{nearest(axis, AXES)}")
    _allow(form, tuple(FORMS), leave_largest=leave_largest, beside=beside, predict=predict, drop_worst=drop_worst)
    _allow(form, (*FORMS, *POWERS), delta=delta, criterion=criterion, bootstrap=bootstrap)
    _allow(form, (*FORMS, *ENVELOPES), at_compute=at_compute)
    _allow(form, ("approach2",), method=method)
    _allow(form, ("downstream",), floor=floor, ceiling=ceiling)
    if form in CURVE_COLUMNS:
        table = read_columns(path, CURVE_COLUMNS[form], columns)
        x, weight = [table[name] for name in CURVE_COLUMNS[form]], table.get("weight", 1.0)
        if form == "annealing":
            return Outcome(fit_annealing(*x, weight=weight, level=level), None, ())
        low, high = (None if v == "free" else v for v in (floor, 1.0 if ceiling is None else ceiling))
        return Outcome(fit_downstream(*x, weight=weight, floor=low, ceiling=high, level=level), None, ())
    everything = read_runs(path, columns, flops)
    chosen = np.array([arm is None or a == arm for a in everything.arm])
    if arm is not None:
        everything.of_arm(arm)  # which says what arms there are
    index = np.flatnonzero(chosen)
    runs, unsound = sound(everything.select(index), against_fit=drop_worst is None)
    dropped = [dataclasses.replace(d, index=int(index[d.index])) for d in unsound]
    if not len(runs):
        raise UserError(f"{path}: no sound run is left; the first was left out because: {dropped[0].reason}")
    if np.ptp(runs.loss) == 0:
        raise UserError(
            f"{path}: every loss is {runs.loss[0]:g}, so no law can be fitted; check the column of the loss."
        )
    kept = np.delete(index, [d.index for d in unsound])
    if best:
        rows = best_per_cell(runs)
        runs, kept = runs.select(rows), kept[rows]
    mixed = [] if len(runs.arms) < 2 else [f"runs of {len(runs.arms)} arms are fitted as one; choose with --arm"]
    repeated = 0 if runs.unique is None else int((runs.unique < runs.tokens).sum())
    if repeated and form != "data-constrained":
        mixed.append(
            f"{repeated} of {len(runs)} runs repeat data (unique below tokens), which {form} ignores; fit them with "
            "--form data-constrained"
        )
    warnings = (*mixed, *oddities(runs))
    if form in POWERS:
        law = fit_power(
            getattr(runs, axis),
            runs.loss,
            weight=runs.weight,
            floor=form == "power+floor",
            delta=delta,
            criterion=criterion or "log",
            level=level,
            interval="bootstrap" if bootstrap else "auto" if bootstrap is None else "t",
            draws=bootstrap or 400,
            seed=seed,
        )
        return Outcome(law, runs, tuple(dropped), warnings, axis=axis)
    if form in ENVELOPES:
        envelope = (
            fit_approach1(runs, level=level)
            if form == "approach1"
            else fit_approach2(runs, method=method or "parabola", level=level)
        )
        optima = tuple(_optimum(envelope, runs, c) for c in at_compute)
        return Outcome(envelope, runs, tuple(dropped), warnings, optima=optima)
    fit = fit_surface(
        runs, form, delta=delta, criterion=criterion, bootstrap=bootstrap, resample=resample, level=level,
        drop_worst=drop_worst or 0, seed=seed, progress=progress,
    )  # fmt: skip
    dropped += [dataclasses.replace(d, index=int(kept[d.index])) for d in fit.dropped]
    fit = dataclasses.replace(fit, dropped=tuple(dropped))
    used = runs.select(~np.isin(kept, [d.index for d in dropped]))
    predictions = []
    for n, d in predict:
        loss, lo, hi = (float(v) for v in fit.predict_band(n, d))
        band = {"lo": lo, "hi": hi} if np.isfinite(lo) else {}
        predictions.append({"params": n, "tokens": d, "loss": loss, **band, "reach": _reach(used, n, d)})
    return Outcome(
        fit,
        used,
        tuple(dropped),
        warnings,
        held_out=leave_largest_out(used, form, leave_largest, delta=delta, criterion=criterion)
        if leave_largest
        else None,
        comparison=compare_forms(used, (form, *beside), delta=delta, criterion=criterion) if beside else None,
        predictions=tuple(predictions),
        optima=tuple(_optimum(fit, used, c) for c in at_compute),
    )


def dropped_table(dropped: tuple[Dropped, ...]) -> Table:
    """Every run left out, with its row in the table from 1 and the reason."""
    shown = Table("row", "run", "reason", title=f"left out: {len(dropped)} run{'s' if len(dropped) > 1 else ''}")
    for run in dropped:
        shown.add_row(str(run.index + 1), run.name, run.reason)
    return shown


def _allow(form: str, forms: tuple[str, ...], **given: Any) -> None:
    """Raise UserError for an option that was given and does nothing for this form."""
    for name, value in given.items():
        absent = value is None or value == () or (isinstance(value, int) and value == 0)
        if form not in forms and not absent:
            raise UserError(f"--{name.replace('_', '-')} is for {', '.join(forms)}, not for {form}")


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
