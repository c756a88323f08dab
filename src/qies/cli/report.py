"""The verb report: the page of a study."""

from __future__ import annotations

from pathlib import Path

from qies.cli.options import check_outputs
from qies.storage import require_writable


def report(folder: Path, /, svg: Path | None = None) -> None:
    """Write the report.html of a study folder from its records.

    For example:

        qies report results/quick
        qies report results/quick --svg docs/quick.svg

    Args:
        folder: The study's folder.
        svg: Also write the figure of loss against parameters to this file.
    """
    check_outputs(svg=svg)
    from qies.report import build_report, write_summary_svg

    if folder.is_dir():
        require_writable(folder / "report.html")
    print(build_report(folder))
    if svg is not None:
        write_summary_svg(folder, svg)
        print(svg)
