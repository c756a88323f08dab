"""The page of a study, from its records."""

from qies.report.page import build_report
from qies.report.summary import write_summary_svg

__all__ = ["build_report", "write_summary_svg"]
