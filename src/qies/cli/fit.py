"""The verb fit: a scaling law from a table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qies.cli.options import check_outputs, column_names, save_figures
from qies.errors import UserError


def fit(
    runs: Path,
    /,
    form: str = "approach3",
    axis: str = "params",
    columns: tuple[str, ...] = (),
    arm: str | None = None,
    flops: str | None = None,
    delta: float | None = None,
    criterion: Literal["log", "loss"] | None = None,
    method: Literal["parabola", "akima"] | None = None,
    floor: float | Literal["free"] | None = None,
    ceiling: float | Literal["free"] | None = None,
    drop_worst: int | None = None,
    bootstrap: int | None = None,
    resample: str = "runs",
    level: float = 0.95,
    seed: int = 0,
    leave_largest: int = 0,
    beside: tuple[str, ...] = (),
    predict: tuple[str, ...] = (),
    at_compute: tuple[str, ...] = (),
    best_per_cell: bool = False,
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
        form: The law.
        axis: Independent variable of a power law: params, tokens or flops.
        columns: Column names, as OURS=THEIRS, or OURS=THEIRS*FACTOR to convert the unit. Ours: params, tokens, unique
            (tokens), loss, flops, arm, seed, weight, status, name, run (shared by the rows of a training curve).
        arm: Fit the runs of this arm only.
        flops: Convention of C: 6ND or another multiple, or given; by default that of the table, else 6ND.
        delta: Threshold of the Huber loss; by default the form's (1e-3 for approach3).
        criterion: Residuals of log loss, or of the loss itself (least squares, unless --delta is given); by default the
            form's.
        method: For approach2: a parabola, or an Akima spline, through the sizes of each budget.
        floor: For downstream: the chance accuracy, or free (default) to fit it.
        ceiling: For downstream: the maximum accuracy (default 1), or free to fit it.
        drop_worst: Drop this number of runs, one at a time, each the furthest from the fit, instead of runs detected as
            diverged; 0 drops none.
        bootstrap: Number of bootstrap draws for the intervals; 0 for Student's t. By default Student's t, unless a
            bootstrap shows that it is too narrow.
        resample: Unit of the bootstrap: runs, or seeds within runs.
        level: Confidence level of the intervals.
        seed: Seed of the bootstrap.
        leave_largest: Also fit with this number of largest sizes held out, and predict them.
        beside: Other forms of N and D to compare with.
        predict: Points N,D at which to predict the loss.
        at_compute: FLOPs, counted as in the table, at which to give the best N and D.
        best_per_cell: Fit only the lowest loss of each arm, N and D, for hyperparameter sweeps.
        json: Write the result to this JSON file.
        figures: Write SVG figures to this folder: loss against N, D and C, residuals, bootstrap.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qies.scaling.laws.surface import AUTO_DRAWS
    from qies.scaling.pipeline import fit_file
    from qies.storage import write_json

    check_outputs(figures, json=json)
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("bootstrap", total=AUTO_DRAWS if bootstrap is None else bootstrap)

    def tell(done: int) -> None:
        bar.start()
        bar.update(task, completed=done)

    try:
        outcome = fit_file(
            runs, form, columns=column_names(columns), flops=flops, arm=arm, axis=axis, delta=delta,
            criterion=criterion, method=method, floor=floor, ceiling=ceiling, drop_worst=drop_worst,
            bootstrap=bootstrap, resample=resample, level=level, seed=seed, leave_largest=leave_largest, beside=beside,
            predict=_points(predict), at_compute=_flops(at_compute), best=best_per_cell, progress=tell,
        )  # fmt: skip
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


def _points(words: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    """N,D pairs."""
    from qies.scaling.tables.number_parsing import parse_number

    points = []
    for word in words:
        try:
            n, d = (parse_number(part) for part in word.split(","))
            if not (0 < n < float("inf") and 0 < d < float("inf")):
                raise ValueError
        except ValueError:
            raise UserError(f"--predict needs N,D such as 6.9e9,1.38e11; got '{word}'.") from None
        points.append((n, d))
    return tuple(points)


def _flops(words: tuple[str, ...]) -> tuple[float, ...]:
    """FLOPs as in a table's cells."""
    from qies.scaling.tables.number_parsing import parse_number

    found = []
    for word in words:
        try:
            found.append(parse_number(word))
            if not 0 < found[-1] < float("inf"):
                raise ValueError
        except ValueError:
            raise UserError(f"--at-compute needs FLOPs such as 1e21 or 3EFLOPs; got '{word}'.") from None
    return tuple(found)
