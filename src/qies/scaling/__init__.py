"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.compare import compare
from qies.scaling.comparison import Comparison
from qies.scaling.curves import CurveFit, fit_annealing, fit_downstream
from qies.scaling.envelopes import EnvelopeFit, fit_approach1, fit_approach2
from qies.scaling.fits import fit_surface
from qies.scaling.laws import PowerLaw, fit_power
from qies.scaling.selection import compare_forms, leave_largest_out
from qies.scaling.soundness import sound
from qies.scaling.surface import SurfaceFit
from qies.scaling.table import Dropped, Runs, read_runs

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
