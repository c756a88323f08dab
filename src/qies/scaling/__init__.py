"""Scaling laws from numbers alone: fits with honest intervals (numpy and scipy, no torch)."""

from qies.scaling.laws import PowerLaw, fit_power

__all__ = ["PowerLaw", "fit_power"]
