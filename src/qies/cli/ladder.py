"""The verbs of ladder: plan, run, status, sweep."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table

from qies.cli.options import require_at_least
from qies.errors import UserError
from qies.terminal import Group, show

if TYPE_CHECKING:
    from qies.config import StudyConfig

Ladder = Annotated[tuple[str, ...], tyro.conf.arg(metavar="LADDER.yaml [KEY=VALUE ...]")]


def plan(overrides: Ladder = (), /, json: bool = False) -> None:
    """List the runs of a ladder with their parameters, tokens, FLOPs and estimated time.

    For example:

        qies ladder plan ladder.yaml tokens_per_parameter=[5,20]

    Args:
        overrides: A ladder file (the keys of a study), and dotted overrides of its keys.
        json: Print JSON.
    """
    from qies import records as run_records
    from qies.ladder.plan import plan_table

    chosen = _load(overrides)
    records = [run_records.plan(c, chosen.data.vocab_size) for c in chosen.runs()]
    show(json, [r.to_dict() for r in records], lambda: Console().print(plan_table(chosen)))


def run(
    overrides: Ladder = (),
    /,
    out: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    gpus: int = 0,
    retries: int = 2,
    retry_failed: bool = False,
    track: str = "",
    submit: Literal["slurm", "local"] | None = None,
    jobs: int = 1,
    minutes: int = 60,
    sbatch: str = "",
    json: bool = False,
) -> None:
    """Train the runs of a ladder that are not done, here or in submitted jobs.

    Several controllers (`qies ladder run`) may share one ladder.

    For example:

        qies ladder run ladder.yaml --out ladders/first
        qies ladder run ladder.yaml --out ladders/first --submit slurm --jobs 4 --gpus 1 --sbatch "partition=gpu"

    Args:
        overrides: A ladder file (the keys of a study), and dotted overrides of its keys.
        out: The ladder's folder; by default results/NAME.
        workers: Concurrent runs; by default one per `threads` cores, and one in a submitted job.
        threads: CPU threads of each run.
        gpus: GPUs of each run, with one process per GPU; the batch must be divisible among them.
        retries: Maximum number of retries of a failed run.
        retry_failed: Retry runs that have no retries left.
        track: Also log metrics to tensorboard, trackio, or both (comma-separated).
        submit: Submit jobs and return: "slurm", or "local" for background processes of this host.
        jobs: Number of jobs to submit; each takes runs until none is left.
        minutes: Time limit of a job; at the limit it saves its runs and is requeued.
        sbatch: Further sbatch options as KEY=VALUE words in one string, such as "partition=gpu account=mine".
        json: Print JSON.
    """
    from qies.ladder.grid import claim
    from qies.ladder.run import require_done, result_table, run_all, submit_all
    from qies.train.tracking import parse

    require_at_least(1, workers=workers, threads=threads, jobs=jobs, minutes=minutes)
    require_at_least(0, gpus=gpus, retries=retries)
    chosen = _load(overrides)
    folder = out or Path("results") / chosen.name
    console = Console(stderr=json)
    how: dict[str, Any] = {
        "workers": workers, "threads": threads, "gpus": gpus,
        "retries": retries, "retry_failed": retry_failed, "track": parse(track),
    }  # fmt: skip
    if sbatch and submit is None:
        raise UserError("--sbatch belongs to --submit slurm; give both.")
    claimed = claim(chosen, folder)
    if submit is not None:
        ids = submit_all(claimed, console, cluster=submit, jobs=jobs, minutes=minutes, sbatch=sbatch, **how)
        message = f"submitted {', '.join(ids)}; qies ladder status --out {folder} --watch"
        show(json, {"jobs": ids, "folder": str(folder)}, lambda: console.print(message))
        return
    records = run_all(claimed, console, **how)
    show(json, [r.to_dict() for r in records], lambda: console.print(result_table(claimed.study, records)))
    require_done(records, folder)


def status(out: Path, watch: bool = False, json: bool = False) -> None:
    """Show the state, progress and loss of every run of a ladder.

    For example:

        qies ladder status --out ladders/first --watch

    Args:
        out: The ladder's folder.
        watch: Refresh the status until every run has ended.
        json: Print JSON.
    """
    from qies import config
    from qies import ladder as ladders
    from qies.ladder.plan import estimate

    if not (out / "study.yaml").is_file():
        raise UserError("Give --out DIR, the folder of a ladder that was started with qies ladder run.")
    chosen = config.from_dict(config.StudyConfig, config.read(out / "study.yaml"))  # its text need not be there
    planned, estimates = chosen.runs(), estimate(chosen)
    console = Console(stderr=json)
    found = ladders.status(planned, out / "runs", estimates)
    if not watch:
        show(json, found, lambda: console.print(status_table(found)))
        return
    with Live(status_table(found), console=console) as live:
        while any(r["state"] not in ladders.OVER for r in found["runs"]):
            time.sleep(1)
            found = ladders.status(planned, out / "runs", estimates)
            live.update(status_table(found))
    show(json, found, lambda: None)


def sweep(out: Path, json: bool = False) -> None:
    """Show the table of a ladder's `variants`: means over seeds, best first.

    For example:

        qies ladder sweep --out ladders/learning-rates

    Args:
        out: The ladder's folder, or a folder that holds several ladders.
        json: Print JSON.
    """
    from qies.ladder.sweep import sweep

    cells = sweep(out)
    show(json, cells, lambda: Console().print(*map(_sweep_table, cells["cells"])))


def _load(overrides: tuple[str, ...]) -> StudyConfig:
    """The ladder of the one file among the words of the command line, with its overrides."""
    from qies import config
    from qies.data.locate import locate

    files, changes = config.split(overrides)
    if len(files) != 1:
        raise UserError("Give one ladder file: a LADDER.yaml.")
    return locate(config.load(config.StudyConfig, files[0], changes))


def _short(number: float) -> str:
    """Three digits from ten thousand on: 2000000 -> '2.00M', 43012 -> '43.0k', 9876 -> '9876'."""
    if number < 10_000:
        return f"{number:.0f}"
    unit, letter = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= pair[0])
    value = number / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{letter}"


def status_table(found: dict[str, Any]) -> Table:
    from qies.ladder.plan import clock

    left = f"{clock(found['seconds_left'])} left with the active runs"
    table = Table(box=None, caption=left, collapse_padding=True, pad_edge=False)  # fits 80 columns
    for column in ("run", "arm", "size", "tokens", "seed", "state", "step", "tok/s", "loss", "left"):
        table.add_column(column, justify="left" if column in ("run", "arm", "state") else "right", no_wrap=True)
    for r in found["runs"]:
        rate = _short(r["tokens_per_second"]) if r["tokens_per_second"] else "-"
        loss = f"{r['loss']:.3f}" if r["loss"] is not None else "-"
        table.add_row(r["run"][:8], r["arm"], r["size"], _short(r["tokens"]), str(r["seed"]), r["state"],
                      f"{_short(r['step'])}/{_short(r['steps'])}", rate, loss, clock(r["seconds_left"]))  # fmt: skip
    return table


def _sweep_table(cell: dict[str, Any]) -> Table:
    title = f"{cell['arm']} {cell['size']}, {_short(cell['tokens'])} tokens: held-out loss in nats per token, mean (SE)"
    table = Table(title=title, box=None, pad_edge=False)
    for column in ("variant", "loss", "behind the best", "seeds", "induction", "onset at"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in cell["variants"]:
        given = {key.partition(".")[2]: value for key, value in row["variant"].items() if value is not None}
        words = ", ".join(f"{key}={value[:8] if key == 'hash' else value}" for key, value in given.items())
        onsets = [_short(tokens) if tokens else "never" for tokens in row["onsets"].values()]
        behind = row["behind"]
        table.add_row(
            words or "unchanged",
            _with_error(row["loss"], row["se"], ".4f"),
            "best" if row["best"] else _with_error(behind["difference"], behind["se"], "+.4f") if behind else "-",
            str(row["n"]),
            f"{row['induction']:.2f}" if row["induction"] is not None else "-",
            " ".join(onsets) or "not measured",
        )
    return table


def _with_error(value: float, error: float | None, places: str) -> str:
    return f"{value:{places}}" + ("" if error is None else f" ({error:.4f})")


ladder = Group(
    "Train many runs: sizes x budgets x arms x seeds, resumable, on this host or as jobs.",
    {"plan": plan, "run": run, "status": status, "sweep": sweep},
)
