"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.compare import compare
from qies.scaling.comparison import Comparison
from qies.scaling.laws import PowerLaw, fit_power
from qies.scaling.table import read_runs

__all__ = ["Comparison", "PowerLaw", "compare", "fit_power", "read_runs"]
