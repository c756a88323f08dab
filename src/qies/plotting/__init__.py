"""Figures as plain data, drawn by two renderers: matplotlib for papers and print, plotly for pages."""

from qies.plotting.figure import Figure
from qies.plotting.marks import Axis, Band, Line, Note, Panel, Points
from qies.plotting.style import GREY, Style, style, styles

__all__ = ["GREY", "Axis", "Band", "Figure", "Line", "Note", "Panel", "Points", "Style", "style", "styles"]
