"""Throughput and peak memory of training."""

from __future__ import annotations

from typing import Any

from qies.analyses.charts import line_chart
from qies.analyses.formatting import count
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Study


def section(result: dict[str, Any], study: Study) -> Section:
    """One chart per measure, over the sizes."""
    part = Section("Speed and memory", ["Measured during training; means over seeds."])
    for title, unit, name, scale in (
        ("Training throughput", "tokens per second", "tokens_per_second", 1),
        ("Peak memory", "MiB", "memory", 2**20),
    ):
        series, rows = {}, []
        for arm in study.arms:
            values = {cell: v / scale for cell in study.cells if (v := study.mean(arm, cell, name))}
            places = {cell: n for cell in values if (n := study.mean(arm, cell, "params"))}
            if places:
                series[arm] = (list(places.values()), [values[cell] for cell in places])
                rows.append([arm, *(count(values.get(cell)) for cell in study.cells)])
        if series:
            y_title = f"{title.lower()} ({unit})"
            figure = line_chart(title, series, "non-embedding parameters", y_title, markers=True, log="xy")
            table = Table(f"{title} ({unit})", ["arm", *map(study.label, study.cells)], rows)
            part.blocks.append(Chart(figure, table))
    return part
