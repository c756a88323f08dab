"""Options that several verbs share, and checks of the files and folders that they write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qies.errors import UserError
from qies.storage import require_writable

if TYPE_CHECKING:
    from qies.plotting import Figure

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")]
StudyFile = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[STUDY.yaml] [KEY=VALUE ...]")]


def provenance(what: str) -> dict[str, Any]:
    """What a measurement is of, and where it was made."""
    from qies.records import code_version, environment

    return {"what": what, "environment": environment(), "code_version": code_version()}


def require_at_least(least: int, **numbers: int | None) -> None:
    """Raise UserError for an option below `least`; None is an option that is not given."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}.")


def check_outputs(figures: Path | None = None, **files: Path | None) -> None:
    """Raise UserError if one of the files cannot be written or `figures` cannot be a folder."""
    for option, path in files.items():
        if path is not None and path.is_dir():
            raise UserError(f"--{option} {path} is a folder; give a file.")
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: the folder {path.parent} does not exist; create it first.")
        if path is not None:
            require_writable(path)
    if figures is not None:
        for folder in (figures, *figures.absolute().parents):
            if folder.is_dir():
                require_writable(folder / "figure.svg")
                return
            if folder.exists():
                raise UserError(f"--figures {figures}: {folder} is a file; give a folder.")


def save_figures(drawn: dict[str, Figure], folder: Path) -> None:
    """Write NAME.svg of every figure to `folder`, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.save(folder / f"{name}.svg")
