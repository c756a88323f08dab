"""Analyses of a study: what is computed from its finished runs, and how the page shows it. One file each.

An analysis is a module, or another object, with up to three functions:

    section(result, study) -> Section | None   its part of the page; `study`: `Study`, the records as the page sees them
    compute(study) -> dict                     what is stored as NAME.json; `study`: `Finished`, the runs to analyse
    inputs(study) -> dict                      what `compute` depends on

Without `compute`, `section` draws from the run records and `result` is {}. With `inputs`, a stored result that
was computed from the same inputs is kept; without, the result is computed each time. docs/analyses.md has an example.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qies import plugins
from qies.analyses.charts import line_chart
from qies.analyses.finished import Finished
from qies.analyses.parts import Chart, Passage, Section, Table
from qies.analyses.records import Study, stored
from qies.errors import Stopped, UserError, unknown
from qies.storage import write_json

__all__ = [
    "BUILTIN", "Analysis", "Chart", "Finished", "Passage", "Section", "Study", "Table", "compute", "line_chart", "load",
    "require_computed",
]  # fmt: skip

# The modules of this package that are analyses, in the order of the page. A new one is a file and a name here.
BUILTIN = ("loss", "comparison", "fits", "induction", "training", "speed", "efficiency", "entanglement", "samples")


@dataclass(frozen=True)
class Analysis:
    """The functions of an analysis by the name of its result."""

    name: str
    section: Callable[[dict[str, Any], Study], Section | None]
    compute: Callable[[Finished], dict[str, Any]] | None = None
    inputs: Callable[[Finished], dict[str, Any]] | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.json"


def load(names: Iterable[str]) -> list[Analysis]:
    """The analyses that a study names (`StudyConfig.analyses`).

    A name is one of `BUILTIN`, `builtin` for all of these, or that of an importable module or an object in one
    (`package.module`, `package.module:name`), which may be in the working directory.

    Raises UserError for a name that is unknown, a module that cannot be imported, and two results of the same name.
    """
    found: dict[str, Analysis] = {}
    for name in (n for given in names for n in (BUILTIN if given == "builtin" else (given,))):
        if name in BUILTIN:
            key, own = name, importlib.import_module(f"qies.analyses.{name}")
        else:
            key, own = _from_outside(name)
        if key in found or (key in BUILTIN and name != key):
            raise UserError(f"There are two analyses '{key}'; rename one or name it once in analyses.")
        found[key] = Analysis(key, own.section, getattr(own, "compute", None), getattr(own, "inputs", None))
    return list(found.values())


def _from_outside(name: str) -> tuple[str, Any]:
    """The result's name, and the module or object, of an analysis of another package."""
    module, _, attribute = name.partition(":")
    own: Any
    try:
        own = plugins.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise unknown("analysis or module", name, ["builtin", *BUILTIN]) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"The analysis {name} cannot be imported ({reason}); correct its module.") from error
    own = getattr(own, attribute, None) if attribute else own
    if not callable(getattr(own, "section", None)):
        raise UserError(f"{name} is not an analysis: it has no function section(result, study).")
    return attribute or module.rpartition(".")[2], own


def compute(analyses: Iterable[Analysis], study: Finished, console: Console) -> None:
    """Compute each analysis and store it as NAME.json in the study's folder.

    A failure does not stop the others: NAME.json then holds the reason under `error`, in one line (see
    `require_computed`), and the next call tries again.
    """
    for analysis in analyses:
        if analysis.compute is None:
            continue
        path = study.folder / analysis.file
        with console.status(analysis.name):
            try:
                inputs = analysis.inputs(study) if analysis.inputs else {}
                if inputs and inputs.items() <= stored(path).items():
                    continue
                write_json(path, analysis.compute(study) | inputs)
            except (UserError, Stopped) as e:
                write_json(path, {"schema": 1, "error": " ".join(str(e).split())})
            except Exception as e:  # the runs are done, so the page is written whatever fails
                traceback.print_exc()
                write_json(path, {"schema": 1, "error": " ".join(f"{type(e).__name__}: {e}".split())})


def require_computed(analyses: Iterable[Analysis], folder: Path) -> None:
    """Raise Stopped, with each reason, when analyses of the study in `folder` have failed."""
    results = {analysis.name: stored(folder / analysis.file) for analysis in analyses if analysis.compute}
    if failed := [f"{name}: {result['error']}" for name, result in results.items() if "error" in result]:
        raise Stopped(f"the runs are done, but {len(failed)} analyses failed ({'; '.join(failed)})")
