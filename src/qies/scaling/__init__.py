"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.compare import compare
from qies.scaling.comparison import Comparison
from qies.scaling.fits import SurfaceFit, fit_surface
from qies.scaling.laws import PowerLaw, fit_power
from qies.scaling.table import Dropped, Runs, read_runs, sound

__all__ = [
    "Comparison",
    "Dropped",
    "PowerLaw",
    "Runs",
    "SurfaceFit",
    "compare",
    "fit_power",
    "fit_surface",
    "read_runs",
    "sound",
]
