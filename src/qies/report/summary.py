"""One figure for a README: loss against parameters per arm, from the same records as the page."""

from __future__ import annotations

from pathlib import Path

from qies.errors import UserError
from qies.plotting import Axis, Figure
from qies.report.records import Study, read_study
from qies.scaling.figures import loss_figure

VARIABLES = {"params": "non-embedding parameters", "flops": "training FLOPs"}


def loss_against(study: Study, variable: str) -> Figure | None:
    """Validation loss of the finished runs against "params" or "flops", with each arm's law; None without a run."""
    points = {}
    for arm in study.arms:
        runs = [(run, x) for run in study.done if run.arm == arm and (x := getattr(run, variable))]
        if runs:
            points[arm] = [(x, run.loss or 0.0, f"{arm}, {run.size}, seed {run.seed}") for run, x in runs]
    curves = {arm: study.curve(arm, variable) for arm in points}
    what = VARIABLES[variable]
    return loss_figure(f"Validation loss against {what}", Axis(what, log=True), points, curves) if points else None


def write_summary_svg(folder: Path, path: Path) -> Path:
    """Draw validation loss against non-embedding parameters of a study folder's finished runs to `path` (.svg).

    Raises UserError when no run has finished, or `path` is no place for a figure.
    """
    figure = loss_against(read_study(Path(folder)), "params")
    if figure is None:
        raise UserError(f"{folder} has no finished run to draw; run the study first")
    return figure.save(path)
