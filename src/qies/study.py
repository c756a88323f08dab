"""The main job: train a grid of runs, analyse it and write the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from qies import analyses, storage
from qies import config as configs
from qies.analyses.records import stored
from qies.config import StudyConfig
from qies.errors import UserError, nearest
from qies.ladder.grid import claim
from qies.ladder.plan import plan_table
from qies.ladder.run import require_done, run_all
from qies.records import RunRecord
from qies.report.page import build_report

PRESETS = Path(__file__).parent / "studies"


def preset(name: str, overrides: tuple[str, ...] = ()) -> StudyConfig:
    """A study of the package. Raises UserError for an unknown name."""
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"Unknown value '{name}' for preset.{nearest(name, known) or f' Known: {chr(44).join(known)}.'}"
        )
    return configs.load(StudyConfig, PRESETS / f"{name}.yaml", overrides)


def run_study(study: StudyConfig, folder: Path, console: Console) -> list[RunRecord]:
    """Train the runs that are not done, compute the analyses and write the page. Returns the records of all runs.

    Raises UserError for a sweep (`variants`): its runs differ in more than arm, size, budget and seed, and the analyses
    know no other axes.
    """
    study = claim(study, folder)
    table = plan_table(study)
    if study.variants:
        raise UserError("A study with variants is a sweep: use qies ladder run and then qies ladder sweep.")
    chosen = analyses.load(study.analyses)
    storage.make_writable_folder(folder)
    console.print(table)
    found = run_all(study, folder, console, retry_failed=True)
    done = [record for record in found if record.status == "done"]
    analyses.compute(chosen, analyses.Finished(study, folder, done), console)
    for pair in stored(folder / "comparison.json").get("pairs", []):
        console.print(f"{pair['candidate']} against {pair['baseline']}: {pair['verdict']}; {pair['reason']}.")
    build_report(folder)
    return found


def require_success(study: StudyConfig, found: list[RunRecord], folder: Path) -> None:
    """Raise Stopped when runs or analyses of the study in `folder` have failed."""
    require_done(found, folder)
    analyses.require_computed(analyses.load(study.analyses), folder)
