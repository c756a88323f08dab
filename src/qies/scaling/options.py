"""The options of `qies fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FitOptions:
    """Options of `qies fit` and of `pipeline.fit_file`.

    Args:
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
            diverged; 0 drops none. Runs that did not finish or have no finite loss are always dropped.
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
    """

    form: str = "approach3"
    axis: str = "params"
    columns: tuple[str, ...] = ()
    arm: str | None = None
    flops: str | None = None
    delta: float | None = None
    criterion: Literal["log", "loss"] | None = None
    method: Literal["parabola", "akima"] | None = None
    floor: float | Literal["free"] | None = None
    ceiling: float | Literal["free"] | None = None
    drop_worst: int | None = None
    bootstrap: int | None = None
    resample: str = "runs"
    level: float = 0.95
    seed: int = 0
    leave_largest: int = 0
    beside: tuple[str, ...] = ()
    predict: tuple[str, ...] = ()
    at_compute: tuple[str, ...] = ()
    best_per_cell: bool = False


DEFAULTS = FitOptions()
