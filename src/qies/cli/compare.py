"""The verb compare: the gain of one arm over another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qies.cli.options import check_outputs, save_figures


def compare(
    runs: Path,
    /,
    arms: tuple[str, str],
    json: Path | None = None,
    figures: Path | None = None,
    columns: tuple[str, ...] = (),
    flops: str | None = None,
    form: Literal["auto", "surface", "power"] = "auto",
    level: float = 0.95,
    best_per_cell: bool = False,
    power: bool = False,
) -> None:
    """Compare two arms: gains in compute, parameters, data and time, paired tests, and a verdict.

    A compute gain of 2 means that the baseline needs twice the FLOPs for the same loss. docs/comparing.md states the
    rule of the verdict.

    For example:

        qies compare results/quick --arms qies transformer
        qies compare RUNS.csv --arms qies transformer --json gains.json --figures figures/
        qies compare RUNS.csv --arms mine theirs --columns params=N,tokens=D --form power

    Args:
        runs: A table (CSV, TSV, JSONL, JSON, Parquet) or a folder of run records.
        arms: The candidate and its baseline.
        json: Write the result to this JSON file.
        figures: Write SVG figures to this folder: gains, frontier, paired differences.
        columns: Column names, as OURS=THEIRS or OURS=THEIRS*FACTOR: those of fit, and wall_seconds.
        flops: Convention of C: 6ND or another multiple, or given; by default that of the table, else 6ND.
        form: surface (L(N, D) per arm), power (power laws along the runs) or auto.
        level: Confidence level of every interval.
        best_per_cell: Compare only the lowest loss of each arm, N and D, for hyperparameter sweeps.
        power: Also print the power of studies of 3 to 8 sizes and 1 to 8 seeds, with the noise of these runs, to detect
            a gain of 1.1, 1.2 or 1.3; `plan` in the JSON.
    """
    from rich.console import Console

    from qies.scaling import compare as compare_arms
    from qies.scaling import read_runs
    from qies.scaling.figures import comparison_figures
    from qies.scaling.pipeline import dropped_table
    from qies.scaling.tables.columns import column_names
    from qies.storage import write_json

    check_outputs(figures, json=json)
    result = compare_arms(
        read_runs(runs, column_names(columns), flops),
        *arms,
        form=form,
        level=level,
        best=best_per_cell,
        plan=power,
    )
    if json is not None:
        write_json(json, result.to_dict())
    if figures is not None:
        save_figures(comparison_figures(result), figures)
    if result.dropped:
        Console().print(dropped_table(result.dropped))
    print(result.summary())
    if result.plan is not None:
        Console().print(result.plan.table())
