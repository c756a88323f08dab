"""Verbs that read what was measured, or measure: report, bench, fit, compare."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from qies.errors import UserError
from qies.plotting import Figure
from qies.storage import require_writable, write_json
from qies.terminal import show


def report(folder: Positional[Path], /, svg: Path | None = None) -> None:
    """Write the report.html of a study folder from its records.

    For example:

        qies report results/quick
        qies report results/quick --svg docs/quick.svg

    Args:
        folder: The study's folder.
        svg: Also write the figure of loss against parameters to this file.
    """
    _check_outputs(None, svg=svg)
    from qies.report import build_report, write_summary_svg

    if folder.is_dir():
        require_writable(folder / "report.html")
    print(build_report(folder))
    if svg is not None:
        write_summary_svg(folder, svg)
        print(svg)


def bench(
    what: Positional[Literal["op", "train", "threads"]],
    /,
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Benchmark speed against reference implementations: medians, and ratios round by round.

    `op`: the entanglement op, forward and backward, against transformers' gated delta rule and causal SDPA.
    `train`: whole training steps of the arms against GPT-2 and Qwen3-Next of transformers.
    `threads`: the same training steps with many runs of one thread, one run of many threads, and many of many.

    For example:

        qies bench op
        qies bench op --cases 8x2048x4x64x64 --rounds 9
        qies bench train --cases 400k:512 6m:512 --out bench.json
        qies bench threads --rounds 3 --out threads.json

    Args:
        what: op, train or threads.
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads of op and train.
        cases: BxTxHxKxV for op, SIZE:T for train, RUNSxTHREADS for threads; by default a few of each.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    import torch

    if rounds < 1 or threads < 1:
        raise UserError("--rounds and --threads must be at least 1.")
    _check_outputs(None, out=out)
    from qies.bench import rivals
    from qies.bench.threads import bench_threads
    from qies.records import code_version, environment

    torch.set_num_threads(threads)
    results = bench_threads(cases, rounds=rounds) if what == "threads" else rivals.run(what, cases, rounds)
    value = {
        "what": what,
        "environment": environment(),
        "code_version": code_version(),
        "threads": None if what == "threads" else threads,
        "cases": [r.to_dict() for r in results],
    }
    if out is not None:
        write_json(out, value)
    show(json, value, lambda: Console().print(rivals.comparison_table(f"bench {what}", results)))


def fit(
    runs: Positional[Path],
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
        axis: What a power law runs along: params, tokens or flops.
        columns: The table's names for ours, as OURS=THEIRS, or OURS=THEIRS*FACTOR to change the unit. Ours: params,
            tokens, unique (tokens), loss, flops, arm, seed, weight, status, name, run (rows of one training curve
            share it).
        arm: Fit the runs of this arm only.
        flops: Convention of C: 6ND or another multiple, or given; by default the table's, and 6ND where it has none.
        delta: Threshold of the Huber loss; by default the form's (1e-3 for approach3).
        criterion: Residuals of log loss, or of the loss itself (least squares, unless --delta is given); by default the
            form's.
        method: For approach2: a parabola, or an Akima spline, through the sizes of each budget.
        floor: For downstream: the accuracy of chance, or free (default) to fit it.
        ceiling: For downstream: the accuracy of a perfect model (default 1), or free to fit it.
        drop_worst: Drop this number of runs, each time the one furthest from the fit, instead of those that look
            diverged; 0 drops none.
        bootstrap: Number of bootstrap draws for the intervals; 0 uses Student's t. By default Student's t, unless a
            bootstrap shows that it is too narrow.
        resample: What each draw resamples: runs, or seeds within runs.
        level: Confidence level of the intervals.
        seed: Seed of the bootstrap.
        leave_largest: Also fit without this number of largest sizes, and predict them.
        beside: Other forms of N and D to compare with.
        predict: Points N,D at which to predict the loss.
        at_compute: FLOPs, counted as in the table, at which to give the best N and D.
        best_per_cell: Fit only the lowest loss at every arm, N and D: for sweeps of hyperparameters.
        json: Write the result to this JSON file.
        figures: Write SVG figures to this folder: loss against N, D and C, residuals, bootstrap.
    """
    from qies.scaling.fits import AUTO_DRAWS
    from qies.scaling.pipeline import fit_file

    _check_outputs(figures, json=json)
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("bootstrap", total=AUTO_DRAWS if bootstrap is None else bootstrap)

    def tell(done: int) -> None:
        bar.start()
        bar.update(task, completed=done)

    try:
        outcome = fit_file(
            runs, form, columns=_pairs("columns", columns), flops=flops, arm=arm, axis=axis, delta=delta,
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
        _save(outcome.figures(), figures)
    console = Console()
    for table in outcome.tables():
        console.print(table)
    console.print(outcome.summary(), highlight=False)


def compare(
    runs: Positional[Path],
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
        json: Write the whole result to this JSON file.
        figures: Write SVG figures to this folder: gains, frontier, paired differences.
        columns: The table's names for ours, as OURS=THEIRS or OURS=THEIRS*FACTOR; besides those of fit, wall_seconds.
        flops: How FLOPs are counted: 6ND, another multiple of ND, or given. By default the table's, else 6ND.
        form: surface (L(N, D) an arm), power (power laws along the runs) or auto.
        level: Confidence level of every interval.
        best_per_cell: Compare only the lowest loss at every arm, N and D: for sweeps of hyperparameters.
        power: Also print the power of studies of 3 to 8 sizes and 1 to 8 seeds, with the noise of these runs, to detect
            a gain of 1.1, 1.2 or 1.3; `plan` in the JSON.
    """
    from qies.scaling import compare as compare_arms
    from qies.scaling import read_runs
    from qies.scaling.figures import comparison_figures
    from qies.scaling.pipeline import dropped_table

    _check_outputs(figures, json=json)
    result = compare_arms(
        read_runs(runs, _pairs("columns", columns), flops),
        *arms,
        form=form,
        level=level,
        best=best_per_cell,
        plan=power,
    )
    if json is not None:
        write_json(json, result.to_dict())
    if figures is not None:
        _save(comparison_figures(result), figures)
    if result.dropped:
        Console().print(dropped_table(result.dropped))
    print(result.summary())
    if result.plan is not None:
        Console().print(result.plan.table())


def _check_outputs(figures: Path | None, **files: Path | None) -> None:
    """Raise UserError, before work is spent, when the files cannot be written or figures cannot be a folder."""
    for option, path in files.items():
        if path is not None and path.is_dir():
            raise UserError(f"--{option} {path} is a folder; give a file.")
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: there is no folder {path.parent}; make it first.")
        if path is not None:
            require_writable(path)
    if figures is not None:
        for folder in (figures, *figures.absolute().parents):
            if folder.is_dir():
                require_writable(folder / "figure.svg")
                return
            if folder.exists():
                raise UserError(f"--figures {figures}: {folder} is a file; give a folder.")


def _save(drawn: dict[str, Figure], folder: Path) -> None:
    """NAME.svg of every figure, into a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.save(folder / f"{name}.svg")


def _pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """OURS=THEIRS, separated by commas or as several words; a comma without OURS= behind it belongs to THEIRS."""
    found = {}
    for part in (p for word in words for p in re.split(r",(?=\s*\w+\s*=)", word)):
        ours, equals, theirs = part.partition("=")
        if not (ours.strip() and equals and theirs.strip()):
            raise UserError(f"--{option} wants OURS=THEIRS, such as params=N,tokens=D; got '{part}'.")
        found[ours.strip()] = theirs.strip()
    return found


def _points(words: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    """N,D pairs."""
    from qies.scaling.table import parse_number

    points = []
    for word in words:
        try:
            n, d = (parse_number(part) for part in word.split(","))
            if not (0 < n < float("inf") and 0 < d < float("inf")):
                raise ValueError
        except ValueError:
            raise UserError(f"--predict wants N,D such as 6.9e9,1.38e11; got '{word}'.") from None
        points.append((n, d))
    return tuple(points)


def _flops(words: tuple[str, ...]) -> tuple[float, ...]:
    """FLOPs as in a table's cells."""
    from qies.scaling.table import parse_number

    found = []
    for word in words:
        try:
            found.append(parse_number(word))
            if not 0 < found[-1] < float("inf"):
                raise ValueError
        except ValueError:
            raise UserError(f"--at-compute wants FLOPs such as 1e21 or 3EFLOPs; got '{word}'.") from None
    return tuple(found)
