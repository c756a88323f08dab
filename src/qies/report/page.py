"""The page of a study: one HTML file made from its records, with a table under every chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qies.analyses import Analysis, load
from qies.analyses.comparison import gain_chart
from qies.analyses.parts import Section
from qies.analyses.records import Study, listed, read_study
from qies.errors import UserError
from qies.report import provenance
from qies.report.answer import answer
from qies.report.verdict import verdict
from qies.storage import write_text

T = TypeVar("T")


def build_report(folder: Path) -> Path:
    """Write `report.html` in a study folder from its records and return its path.

    Reads study.yaml, runs/*/{run.json,metrics.jsonl}, data/manifest.json and the result of each analysis. The page
    names parts that are missing or malformed. Raises UserError when no run record can be read.
    """
    study = read_study(Path(folder))
    answered = _build("answer", lambda: answer(study), study)
    chart = _build("gain chart", lambda: gain_chart(study), study)
    sections = [section for section in _sections(study) if section.blocks]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        study=study,
        answer=answered,
        chart=chart,
        verdict=verdict(study, answered is not None),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
    )
    path = study.folder / "report.html"
    write_text(path, page)
    return path


def _sections(study: Study) -> Iterator[Section]:
    """The parts of the page below the verdict: those of the study's analyses, then the provenance."""
    for analysis in _analyses(study):
        result = study.part(analysis.name) if analysis.compute else {}
        if (section := _build(analysis.name, partial(analysis.section, result, study), study)) is not None:
            yield section
    for part in (provenance.settings, provenance.data, provenance.runs):
        if (section := _build(part.__name__, partial(part, study), study)) is not None:
            yield section


def _analyses(study: Study) -> list[Analysis]:
    """The analyses that study.yaml names, by default those of the package; one that cannot be loaded becomes a note."""
    found = []
    for name in map(str, listed(study.config.get("analyses")) or ["builtin"]):
        try:
            found += load([name])
        except UserError as error:
            study.notes.append(str(error))
    return found


def _build(name: str, build: Callable[[], T | None], study: Study) -> T | None:
    """Build a part of the page; None, with a note, if a record is malformed."""
    try:
        return build()
    except Exception as error:  # any record, and analyses of other packages
        study.notes.append(f"The part on {name} is left out: its record is malformed ({type(error).__name__}).")
        return None
