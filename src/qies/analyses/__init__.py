"""What a study computes from its finished runs and how its page shows it: one file per analysis.

An analysis is a module, or another object, with up to three functions:

    section(result, study) -> Section | None   its part of the page; `study`: `Study`, the records as the page sees them
    compute(study) -> dict                     what is stored as NAME.json; `study`: `Finished`, the runs to analyse
    inputs(study) -> dict                      what `compute` depends on

Without `compute`, `section` draws from the run records alone and `result` is {}. With `inputs`, a stored result that
was computed from the same inputs is kept; without, the result is computed each time. docs/analyses.md has an example.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qies import runs
from qies.analyses.charts import line_chart
from qies.analyses.finished import Finished
from qies.analyses.parts import Chart, Passage, Section, Table
from qies.analyses.records import Study, stored
from qies.errors import Stopped, UserError, nearest

__all__ = [
    "BUILTIN", "Analysis", "Chart", "Finished", "Passage", "Section", "Study", "Table", "compute", "line_chart", "load",
    "require_computed",
]  # fmt: skip

# The modules of this package that are analyses, in the order of the page. A new one is a file and a name here.
BUILTIN = ("loss", "comparison", "fits", "induction", "training", "speed", "entanglement", "samples")


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
    """The analyses that a study names (`StudyConfig.analyses`): one of `BUILTIN`, `builtin` for all of these, or
    `module:name` for an object of another module, which may be in the working directory.

    Raises UserError for a name that is unknown, a module that cannot be imported, and two results of the same name.
    """
    found: dict[str, Analysis] = {}
    for name in (n for given in names for n in (BUILTIN if given == "builtin" else (given,))):
        module, colon, attribute = name.partition(":")
        if not colon and name not in BUILTIN:
            hint = nearest(name, [*BUILTIN, "builtin"]) or f" Known: builtin, {', '.join(BUILTIN)}."
            raise UserError(f"Unknown analysis '{name}'.{hint} Name one of another package as module:name.")
        own = _from_outside(module, attribute) if colon else importlib.import_module(f"qies.analyses.{name}")
        key = attribute if colon else name
        if key in found or (colon and key in BUILTIN):
            raise UserError(f"analyses names two analyses '{key}'; each needs a name of its own.")
        found[key] = Analysis(key, own.section, getattr(own, "compute", None), getattr(own, "inputs", None))
    return list(found.values())


def _from_outside(module: str, attribute: str) -> Any:
    """The object `attribute` of `module`, or the module `module.attribute`."""
    if not {"", os.getcwd()} & set(sys.path):  # of a console script, whose own folder stands there instead
        sys.path.append(os.getcwd())
    try:
        own = importlib.import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"The analysis {module}:{attribute} cannot be imported ({reason}).") from error
    found = getattr(own, attribute, None)
    if not callable(getattr(found, "section", None)):
        raise UserError(f"{module} has no analysis '{attribute}': an object with a function section(result, study).")
    return found


def compute(analyses: Iterable[Analysis], study: Finished, console: Console) -> None:
    """Compute each analysis and store it as NAME.json in the study's folder.

    One that fails costs neither the others nor the page: its file then holds the reason under `error`, in one line
    (see `require_computed`), and the next call tries it again.
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
                runs.write_json(path, analysis.compute(study) | inputs)
            except (UserError, Stopped) as e:
                runs.write_json(path, {"schema": 1, "error": " ".join(str(e).split())})
            except Exception as e:  # whatever it is, the runs are done and the page is to be written
                traceback.print_exc()
                runs.write_json(path, {"schema": 1, "error": " ".join(f"{type(e).__name__}: {e}".split())})


def require_computed(analyses: Iterable[Analysis], folder: Path) -> None:
    """Raise Stopped, with each reason, when analyses of the study in `folder` have failed."""
    results = {analysis.name: stored(folder / analysis.file) for analysis in analyses if analysis.compute}
    if failed := [f"{name}: {result['error']}" for name, result in results.items() if "error" in result]:
        raise Stopped(f"the runs are done, but {len(failed)} analyses failed ({'; '.join(failed)})")
