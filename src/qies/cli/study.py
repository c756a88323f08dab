"""The verb study: train a grid of models and analyse it."""

from __future__ import annotations

from pathlib import Path

from qies.cli.options import StudyFile
from qies.errors import UserError
from qies.terminal import show


def study(
    overrides: StudyFile = (),
    /,
    preset: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Run a study: train a grid of models, fit scaling laws, compare the arms and write report.html.

    Finished runs are kept, and an interrupted study resumes.

    For example:

        qies study --preset quick
        qies study --preset quick --dry-run
        qies study my.yaml --out results/mine seeds=[0,1,2] train.seq_len=256

    Args:
        overrides: A study file, and dotted overrides of its keys.
        preset: A study of the package: quick.
        out: The output folder; by default results/NAME.
        dry_run: Print every run with its parameters, FLOPs, tokens and estimated time, without running it.
        json: Print the run records (or with --dry-run the planned ones) as JSON.
    """
    from rich.console import Console

    from qies import config
    from qies import records as run_records
    from qies import study as studies
    from qies.data.locate import locate
    from qies.ladder.grid import claim
    from qies.ladder.plan import plan_table, total_time
    from qies.ladder.run import result_table

    files, changes = config.split(overrides)
    if len(files) + (preset is not None) != 1:
        raise UserError("Give one study: a STUDY.yaml or --preset quick.")
    if preset is not None:
        chosen = studies.preset(preset, tuple(changes))
    else:
        chosen = config.load(config.StudyConfig, files[0], changes)
    chosen = locate(chosen)
    folder = out or Path("results") / chosen.name
    console = Console(stderr=json)
    if dry_run:
        records = [run_records.plan(c, chosen.data.vocab_size) for c in chosen.runs()]
        show(json, [r.to_dict() for r in records], lambda: console.print(plan_table(chosen)))
        console.print(f"{total_time(chosen)}; nothing was run.")
        return
    claimed = claim(chosen, folder)
    records = studies.run_study(claimed, console)
    show(json, [r.to_dict() for r in records], lambda: console.print(result_table(claimed.study, records)))
    console.print(f"report: {folder / 'report.html'}")
    studies.require_success(claimed, records)
