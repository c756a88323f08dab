"""Scaling laws from tables of runs: fits, intervals and comparisons (numpy and scipy, no torch)."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Comparison": "comparison.result",
    "CurveFit": "laws.curves",
    "Dropped": "tables.runs",
    "EnvelopeFit": "laws.envelopes",
    "FitOptions": "options",
    "PowerLaw": "laws.power_law",
    "Runs": "tables.runs",
    "SurfaceFit": "laws.surface",
    "compare": "comparison.compare",
    "compare_forms": "laws.selection",
    "fit_annealing": "laws.curves",
    "fit_approach1": "laws.envelopes",
    "fit_approach2": "laws.envelopes",
    "fit_downstream": "laws.curves",
    "fit_file": "pipeline",
    "fit_power": "laws.power_law",
    "fit_surface": "laws.surface",
    "leave_largest_out": "laws.selection",
    "read_runs": "tables.runs",
    "sound": "laws.divergence",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Import public names on first use: the command line reads `options` without importing scipy."""
    if name not in _WHERE:
        raise AttributeError(f"module 'qies.scaling' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qies.scaling.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
