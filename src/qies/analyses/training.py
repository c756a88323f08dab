"""Training curves: the smoothed training loss against tokens."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from qies.analyses.charts import line_chart
from qies.analyses.formatting import digits, number, percent
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Cell, Study


def section(result: dict[str, Any], study: Study) -> Section:
    """One chart per size, of one seed."""
    text = (
        "Running mean of the training loss over a fiftieth of the steps, on log axes. All curves of a chart have the "
        "same seed: the first of the study's seeds that the most arms have at that size."
    )
    part, shares = Section("Training curves", [text]), (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
    for cell in study.cells:
        curves = {seed: _smoothed(study, cell, seed) for seed in study.seeds}
        seed = max(study.seeds, key=lambda seed: len(curves[seed]))
        if series := curves[seed]:
            title = f"Training loss at {study.label(cell)}, seed {seed}"
            rows = [
                [arm, *(digits(y[max(0, round(share * len(y)) - 1)], 3) for share in shares)]
                for arm, (_, y) in series.items()
            ]
            table = Table(f"{title}, by share of the steps", ["arm", *map(percent, shares)], rows, folded=True)
            figure = line_chart(title, series, "tokens seen", "training loss (nats per token)", log="xy")
            part.blocks.append(Chart(figure, table))
    return part


def _smoothed(study: Study, cell: Cell, seed: str) -> dict[str, tuple[list[float], list[float]]]:
    """Running mean of the training loss at up to 200 steps, as (tokens, loss), of each arm with a run of this seed."""
    out = {}
    for run in (run for arm in study.arms for run in study.runs if (run.arm, run.cell, run.seed) == (arm, cell, seed)):
        steps = [(x, y) for row in run.rows if (x := number(row.get("tokens"))) and (y := number(row.get("loss")))]
        if len(steps) > 1:
            window = max(1, len(steps) // 50)
            ends = sorted({max(1, round((i + 1) * len(steps) / 200)) for i in range(200)})
            parts = [steps[max(0, end - window) : end] for end in ends]
            out[run.arm] = [part[-1][0] for part in parts], [fmean(y for _, y in part) for part in parts]
    return out
