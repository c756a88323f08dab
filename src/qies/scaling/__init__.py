"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.fits import SurfaceFit, fit_surface
from qies.scaling.laws import PowerLaw, fit_power
from qies.scaling.table import Dropped, Runs, read_runs, sound

__all__ = ["Dropped", "PowerLaw", "Runs", "SurfaceFit", "fit_power", "fit_surface", "read_runs", "sound"]
