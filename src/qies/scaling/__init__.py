"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.comparison.compare import compare
from qies.scaling.comparison.result import Comparison
from qies.scaling.laws.curves import CurveFit, fit_annealing, fit_downstream
from qies.scaling.laws.divergence import sound
from qies.scaling.laws.envelopes import EnvelopeFit, fit_approach1, fit_approach2
from qies.scaling.laws.power_law import PowerLaw, fit_power
from qies.scaling.laws.selection import compare_forms, leave_largest_out
from qies.scaling.laws.surface import SurfaceFit, fit_surface
from qies.scaling.tables.runs import Dropped, Runs, read_runs

__all__ = [
    "Comparison",
    "CurveFit",
    "Dropped",
    "EnvelopeFit",
    "PowerLaw",
    "Runs",
    "SurfaceFit",
    "compare",
    "compare_forms",
    "fit_annealing",
    "fit_approach1",
    "fit_approach2",
    "fit_downstream",
    "fit_power",
    "fit_surface",
    "leave_largest_out",
    "read_runs",
    "sound",
]
