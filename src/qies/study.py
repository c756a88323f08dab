"""Run a study: train a grid of models, analyse the results and write the report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qies import analyses, storage
from qies import config as configs
from qies.analyses.records import stored
from qies.config import StudyConfig
from qies.errors import UserError, unknown
from qies.ladder.grid import StudyFolder
from qies.ladder.plan import plan_table
from qies.ladder.run import require_done, run_all
from qies.records import RunRecord
from qies.report.page import build_report

PRESETS = Path(__file__).parent / "studies"


def preset(name: str, overrides: tuple[str, ...] = ()) -> StudyConfig:
    """A study included in the package. Raises UserError for an unknown name."""
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name not in known:
        raise unknown("preset", name, known)
    return configs.load(StudyConfig, PRESETS / f"{name}.yaml", overrides)


def run_study(claimed: StudyFolder, console: Console) -> list[RunRecord]:
    """Train the runs that are not done, compute the analyses, write the report, and return the records of all runs.

    Raises UserError for a sweep (`variants`): the analyses group runs by arm, size, budget and seed only.
    """
    study, folder = claimed.study, claimed.path
    table = plan_table(study)
    if study.variants:
        raise UserError("A study with variants is a sweep: use qies ladder run and then qies ladder sweep.")
    chosen = analyses.load(study.analyses)
    storage.make_writable_folder(folder)
    console.print(table)
    found = run_all(claimed, console, retry_failed=True)
    done = [record for record in found if record.status == "done"]
    analyses.compute(chosen, analyses.Finished(study, folder, done), console)
    for pair in stored(folder / "comparison.json").get("pairs", []):
        console.print(f"{pair['candidate']} against {pair['baseline']}: {pair['verdict']}; {pair['reason']}.")
    build_report(folder)
    return found


def require_success(claimed: StudyFolder, found: list[RunRecord]) -> None:
    """Raise Stopped if runs or analyses of the study have failed."""
    require_done(found, claimed.path)
    analyses.require_computed(analyses.load(claimed.study.analyses), claimed.path)
