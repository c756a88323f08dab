"""Power laws of held-out loss in N and in FLOPs for each arm."""

from __future__ import annotations

import math
from typing import Any

from qies.analyses.finished import Finished
from qies.analyses.formatting import NONE, count, digits, law, number, percent, sentence, si
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Run, Study, listed, mapping
from qies.scaling.figures import bootstrap_figure, residuals_figure


def compute(study: Finished) -> dict[str, Any]:
    """Fit power laws of the held-out loss in N and in FLOPs to each arm; None with fewer than three distinct values."""
    from qies.accounting.flops import CONVENTION
    from qies.scaling.laws.power_law import fit_power

    arms: dict[str, Any] = {}
    for arm in study.config.arms:
        own = [r for r in study.done if r.arm == arm]
        most = {size: max(r.tokens for r in own if r.size == size) for size in {r.size for r in own}}
        own = [r for r in own if r.tokens == most[r.size]]  # the largest budget of each size
        axes: dict[str, list[float]] = {"params": [r.non_embedding for r in own], "flops": [r.flops for r in own]}
        losses = [r.val_loss for r in own]
        arms[arm] = {k: fit_power(x, losses).to_dict() if len(set(x)) >= 3 else None for k, x in axes.items()}
    return {"schema": 1, "flops_convention": CONVENTION, "arms": arms}


def section(result: dict[str, Any], study: Study) -> Section:
    """Parameters, residuals and bootstrap draws of the laws."""
    rows: list[list[str]] = []
    warnings: dict[str, list[str]] = {}
    for variable, what in (("params", "parameters"), ("flops", "FLOPs")):
        for arm in study.arms:
            fit = study.fit(arm, variable)
            if fit:
                pair = mapping(fit.get("ci")).get("alpha")
                between = f"{pair[0]:.4f} to {pair[1]:.4f}" if pair else NONE
                rows.append([arm, what, law(fit), between, percent(fit["scatter"]), count(fit["sizes"])])
                for warning in map(sentence, listed(fit.get("warnings"))):
                    warnings.setdefault(warning, []).append(f"{arm} in {what}")
    convention = result.get("flops_convention")
    text = [
        "Power laws L(x) in nats per token, straight lines on log axes. The CI counts each size once, whatever the "
        "number of seeds, and assumes that the law is right. Scatter: standard deviation of the residuals of log L.",
        *([f"FLOPs: {convention}."] if convention else []),
        *(f"{warning} ({', '.join(where)})" for warning, where in warnings.items()),
    ]
    columns = ["arm", "x", "L(x)", "95% CI of the exponent", "scatter", "sizes"]
    if not rows:
        return Section("Fitted laws")
    return Section("Fitted laws", text, [Table("Power laws", columns, rows), *_residuals(study), *_bootstraps(study)])


def _residuals(study: Study) -> list[Chart]:
    """Residuals of the runs from their arm's law in FLOPs; those of outliers exceed the fit's delta."""
    tables = {
        arm: [row for run in study.done if run.arm == arm and (row := _residual(run, fit)) is not None]
        for arm in study.arms
        if (fit := study.fit(arm, "flops"))
    }
    tables = {arm: table for arm, table in tables.items() if table}
    if not tables:
        return []
    rows = [
        [r["name"], si(r["flops"]), digits(r["loss"]), digits(r["predicted"]),
         f"{100 * math.expm1(r['residual']):+.2f}%", "outlier" if r["outlier"] else ""]
        for table in tables.values() for r in table
    ]  # fmt: skip
    columns = ["run", "FLOPs", "nats per token", "law", "residual", ""]
    table = Table("Residuals from each arm's law in FLOPs", columns, rows, folded=True)
    return [Chart(residuals_figure(tables), table)]


def _residual(run: Run, fit: dict[str, Any]) -> dict[str, Any] | None:
    params = mapping(fit.get("params"))
    amplitude, alpha, floor = (number(params.get(k, 0.0)) for k in ("A", "alpha", "E"))
    delta = number(fit.get("delta"))
    if not (run.flops and run.loss and amplitude and delta) or alpha is None or floor is None:
        return None
    predicted = floor + amplitude * run.flops**-alpha
    residual = math.log(run.loss / predicted)
    return {
        "name": run.name, "flops": run.flops, "loss": run.loss, "predicted": predicted, "residual": residual,
        "outlier": abs(residual) > delta,
    }  # fmt: skip


def _bootstraps(study: Study) -> list[Chart]:
    """Bootstrap draws of the laws that have them (20 or more sizes)."""
    out = []
    for arm in study.arms:
        fit = study.fit(arm, "flops")
        if listed(fit.get("draws")):
            ci = mapping(fit.get("ci"))
            rows = [[k, f"{v:.4g}", *(f"{end:.4g}" for end in ci[k])] for k, v in fit["params"].items()]
            columns = ["parameter", "fit", "95% CI from", "to"]
            figure = bootstrap_figure(fit, f"Bootstrap of the law in FLOPs, {arm}")
            out.append(Chart(figure, Table(f"Parameters of the law in FLOPs, {arm}", columns, rows)))
    return out
