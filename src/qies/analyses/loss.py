"""Held-out loss of every finished run against parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qies.analyses.formatting import digits, si
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Cell, Study
from qies.plotting import Axis, Figure
from qies.scaling.figures import loss_figure

VARIABLES = {"params": "non-embedding parameters", "flops": "training FLOPs"}


def section(result: dict[str, Any], study: Study) -> Section | None:
    """Held-out loss and bits per byte, with the laws."""
    if not study.done:
        return None
    text = [
        "Runs are compared at the same size and number of tokens. Lines: power laws fitted to each arm, faint where "
        "extrapolated; bands: 95% CI of the law."
    ]
    part = Section("Loss", text)
    for variable, what in VARIABLES.items():
        figure = loss_against(study, variable)
        if figure is not None:
            own = [(r, x) for arm in study.arms for r in study.done if r.arm == arm and (x := getattr(r, variable))]
            rows = [[r.name, si(x), digits(r.loss)] for r, x in own]
            part.blocks.append(Chart(figure, Table(figure.title, ["run", what, "nats per token"], rows, folded=True)))
    for title, unit, name in (
        ("Bits per byte", "bits per byte", "bits_per_byte"),
        ("Validation loss", "nats per token", "loss"),
        ("Validation loss on the clean part", "nats per token", "clean_loss"),
    ):
        if not any(getattr(run, name) for run in study.done):  # runs older than the measure
            continue
        rows = [[arm, *(_against(study, arm, cell, name) for cell in study.cells)] for arm in study.arms]
        caption = f"{title} on held-out text ({unit}) and difference to {study.base}; means over seeds"
        part.blocks.append(Table(caption, ["arm", *map(study.label, study.cells)], rows))
    return part


def _against(study: Study, arm: str, cell: Cell, name: str) -> str:
    mean, base = study.mean(arm, cell, name), study.mean(study.base, cell, name)
    apart = "" if mean is None or base is None or arm == study.base else f" ({mean - base:+.4f})"
    return digits(mean) + apart


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
    """The law and its CI at x in words, or "" without a law."""
    if not curve:
        return ""
    at = {k: math.exp(np.interp(math.log(x), np.log(curve["x"]), np.log(v))) for k, v in curve.items() if k != "x"}
    ci = f" (95% CI {at['lo']:.4g} to {at['hi']:.4g})" if {"lo", "hi"} <= at.keys() else ""
    return f"; law {at['loss']:.4g}{ci}"
