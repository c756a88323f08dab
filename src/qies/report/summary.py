"""One figure for a README: loss against parameters per arm, from the same records as the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qies.errors import UserError
from qies.plotting import Axis, Figure
from qies.report.records import Study, read_study
from qies.scaling.figures import loss_figure

VARIABLES = {"params": "non-embedding parameters", "flops": "training FLOPs"}


def loss_against(study: Study, variable: str) -> Figure | None:
    """Validation loss of the finished runs against "params" or "flops", with each arm's law; None without a run."""
    points = {}
    curves = {arm: study.curve(arm, variable) for arm in study.arms}
    for arm in study.arms:
        runs = [(run, x) for run in study.done if run.arm == arm and (x := getattr(run, variable))]
        if runs:
            points[arm] = [(x, run.loss or 0.0, run.name + _law_at(curves[arm], x)) for run, x in runs]
    what = VARIABLES[variable]
    return loss_figure(f"Validation loss against {what}", Axis(what, log=True), points, curves) if points else None


def _law_at(curve: Mapping[str, Sequence[float]], x: float) -> str:
    """The law and its CI at x in words, or nothing where there is no law."""
    if not curve:
        return ""
    at = {k: math.exp(np.interp(math.log(x), np.log(curve["x"]), np.log(v))) for k, v in curve.items() if k != "x"}
    ci = f" (95% CI {at['lo']:.4g} to {at['hi']:.4g})" if {"lo", "hi"} <= at.keys() else ""
    return f"; law {at['loss']:.4g}{ci}"


def write_summary_svg(folder: Path, path: Path) -> Path:
    """Draw validation loss against non-embedding parameters of a study folder's finished runs to `path` (.svg).

    Raises UserError when no run has finished, or `path` cannot be written.
    """
    figure = loss_against(read_study(Path(folder)), "params")
    if figure is None:
        raise UserError(f"{folder} has no finished run to draw; run the study first")
    return figure.save(path)
