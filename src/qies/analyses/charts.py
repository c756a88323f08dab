"""The line chart that several analyses draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qies.plotting import Axis, Figure, Line, Panel, styles


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_title: str,
    y_title: str,
    *,
    markers: bool = False,
    log: str = "",
) -> Figure:
    """One line per arm, (x, y) each; `log` names the logarithmic axes ("x", "y", "xy")."""
    looks = styles(series)
    marks = [Line(x, y, arm, looks[arm], markers=markers) for arm, (x, y) in series.items()]
    return Figure(title, [Panel(Axis(x_title, "x" in log), Axis(y_title, "y" in log), marks)])
