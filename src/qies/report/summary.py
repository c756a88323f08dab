"""A figure of loss against parameters per arm, for a README, from the records of the page."""

from __future__ import annotations

from pathlib import Path

from qies.analyses.loss import loss_against
from qies.analyses.records import read_study
from qies.errors import UserError


def write_summary_svg(folder: Path, path: Path) -> Path:
    """Draw validation loss against non-embedding parameters of a study folder's finished runs to `path` (.svg).

    Raises UserError when no run has finished, or `path` cannot be written.
    """
    figure = loss_against(read_study(Path(folder)), "params")
    if figure is None:
        raise UserError(f"{folder} has no finished run to draw; run the study first")
    return figure.save(path)
