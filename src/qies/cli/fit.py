"""The verb fit: a scaling law from a table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from qies.cli.options import check_outputs, save_figures
from qies.scaling.options import DEFAULTS, FitOptions


def fit(
    runs: Path,
    /,
    options: Annotated[FitOptions, tyro.conf.arg(name="")] = DEFAULTS,
    json: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Fit a scaling law to a table of runs or a folder of run records.

    Forms of N and D: approach3, approach3-gamma, gadre; with repeated data: data-constrained (column unique). Of one
    variable (--axis): power, power+floor. Of the best size: approach1 (envelope), approach2 (isoFLOP parabolas). Of a
    curve: annealing (columns step, lr, loss), downstream (columns bpb, accuracy).

    For example:

        qies fit results/quick --arm qies --form power
        qies fit runs.csv --form approach3 --delta 1e-3 --bootstrap 400 --json fit.json --figures figures/
        qies fit runs.csv --columns params=N,tokens=D "loss=Val Loss" --drop-worst 5 --leave-largest 1
        qies fit runs.csv --columns "params=N (M)*1e6" "tokens=D (B)*1e9" flops=PF-days*8.64e19
        qies fit runs.csv --form gadre --beside approach3 --predict 6.9e9,1.38e11
        qies fit runs.csv --form approach2 --method akima --at-compute 1e21 1e22

    Args:
        runs: CSV, TSV, JSONL, JSON or Parquet with columns params, tokens and loss, or a folder of run records.
        options: Options of the fit.
        json: Write the result to this JSON file.
        figures: Write SVG figures to this folder: loss against N, D and C, residuals, bootstrap.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qies.scaling.laws.surface import AUTO_DRAWS
    from qies.scaling.pipeline import fit_file
    from qies.storage import write_json

    check_outputs(figures, json=json)
    draws = AUTO_DRAWS if options.bootstrap is None else options.bootstrap
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("bootstrap", total=draws)

    def tell(done: int) -> None:
        bar.start()
        bar.update(task, completed=done)

    try:
        outcome = fit_file(runs, options, progress=tell)
    finally:
        if bar.live.is_started:  # stopping one that was not prints an empty line
            bar.stop()
    if json is not None:
        write_json(json, outcome.to_dict())
    if figures is not None:
        save_figures(outcome.figures(), figures)
    console = Console()
    for table in outcome.tables():
        console.print(table)
    console.print(outcome.summary(), highlight=False)
