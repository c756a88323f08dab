"""The verb ladder: many runs, shared by any number of controllers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from tyro.conf import Positional

from qies.errors import UserError
from qies.terminal import show


def ladder(
    action: Positional[Literal["plan", "run", "status", "sweep"]],
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[LADDER.yaml] [KEY=VALUE ...]")] = (),
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
    watch: bool = False,
    json: bool = False,
) -> None:
    """Train many runs: sizes x budgets x arms x seeds. Several controllers (`run`) may share one ladder.

    For example:

        qies ladder plan ladder.yaml tokens_per_parameter=[5,20]
        qies ladder run ladder.yaml --out ladders/first
        qies ladder run ladder.yaml --out ladders/first --submit slurm --jobs 4 --gpus 1 --sbatch "partition=gpu"
        qies ladder status --out ladders/first --watch
        qies ladder sweep --out ladders/learning-rates

    Args:
        action: plan, run, status, or sweep: a table of the ladder's `variants`, means over seeds, best first.
        overrides: A ladder file (the keys of a study), and dotted overrides of its keys; status and sweep need only
            --out.
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
        watch: Refresh the status until every run has ended.
        json: Print JSON.
    """
    from qies import config
    from qies import ladder as ladders
    from qies import records as run_records
    from qies import study as studies
    from qies.data.locate import locate
    from qies.ladder.jobs import check
    from qies.train.tracking import parse

    for name, number, least in (("workers", workers, 1), ("threads", threads, 1), ("gpus", gpus, 0),
                                ("retries", retries, 0), ("jobs", jobs, 1), ("minutes", minutes, 1)):  # fmt: skip
        if number is not None and number < least:
            raise UserError(f"--{name} must be at least {least}.")
    if action == "sweep":
        from qies.ladder.sweep import sweep

        if out is None:
            raise UserError("Give --out DIR, the folder of a ladder that was started with qies ladder run.")
        cells = sweep(out)
        show(json, cells, lambda: Console().print(*map(_sweep_table, cells["cells"])))
        return
    files, changes = config.split(overrides)
    if action == "status":
        if out is None or not (out / "study.yaml").is_file():
            raise UserError("Give --out DIR, the folder of a ladder that was started with qies ladder run.")
        files = [*files, str(out / "study.yaml")]
    if len(files) != 1:
        raise UserError("Give one ladder file: a LADDER.yaml.")
    if action == "status":  # its text need not be there
        chosen = config.from_dict(config.StudyConfig, config.merge(config.read(Path(files[0])), changes))
    else:
        chosen = locate(config.load(config.StudyConfig, files[0], changes))
    folder = out or Path("results") / chosen.name
    console = Console(stderr=json)
    if action == "plan":
        records = [run_records.plan(c, chosen.data.vocab_size) for c in chosen.runs()]
        show(json, [r.to_dict() for r in records], lambda: console.print(studies.plan_table(chosen)))
    elif action == "run":
        chosen = studies.claim(chosen, folder)
        here = max(1, ladders.cores() // threads) if submit is None else 1
        how: dict[str, Any] = {
            "workers": workers or chosen.workers or here, "threads": threads, "gpus": gpus,
            "retries": retries, "retry_failed": retry_failed, "track": parse(track),
        }  # fmt: skip
        ladders.check_batches(chosen.runs(), gpus)
        if submit != "slurm":
            ladders.devices(how["workers"], gpus)
        if submit is not None:
            check(submit, sbatch, jobs, gpus)
            data = studies.prepare(chosen, folder, console)
            ids = ladders.submit(
                studies.longest_first(chosen), folder / "runs", data, folder / "jobs",
                cluster=submit, jobs=jobs, minutes=minutes, sbatch=sbatch, **how,
            )  # fmt: skip
            told = f"submitted {', '.join(ids)}; qies ladder status --out {folder} --watch"
            show(json, {"jobs": ids, "folder": str(folder)}, lambda: console.print(told))
            return
        if sbatch:
            raise UserError("--sbatch belongs to --submit slurm; give both.")
        records = studies.run_all(chosen, folder, console, **how)
        show(json, [r.to_dict() for r in records], lambda: console.print(studies.result_table(chosen, records)))
        studies.require_done(records, folder)
    else:
        planned, estimates = chosen.runs(), studies.estimate(chosen)
        found = ladders.status(planned, folder / "runs", estimates)
        if not watch:
            show(json, found, lambda: console.print(_table(found)))
            return
        with Live(_table(found), console=console) as live:
            while any(r["state"] not in ladders.OVER for r in found["runs"]):
                time.sleep(1)
                found = ladders.status(planned, folder / "runs", estimates)
                live.update(_table(found))
        show(json, found, lambda: None)


def _short(number: float) -> str:
    """Three digits from ten thousand on: 2000000 -> '2.00M', 43012 -> '43.0k', 9876 -> '9876'."""
    if number < 10_000:
        return f"{number:.0f}"
    unit, letter = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= pair[0])
    value = number / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{letter}"


def _table(found: dict[str, Any]) -> Table:
    from qies.study import clock

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
    title = f"{cell['arm']} {cell['size']}, {_short(cell['tokens'])} tokens: held-out loss in nats a token, mean (SE)"
    table = Table(title=title, box=None, pad_edge=False)
    for column in ("variant", "loss", "behind the best", "seeds", "induction", "onset at"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in cell["variants"]:
        given = {key.partition(".")[2]: value for key, value in row["variant"].items() if value is not None}
        words = ", ".join(f"{key}={value[:8] if key == 'hash' else value}" for key, value in given.items())
        onsets = [_short(tokens) if tokens else "never" for tokens in row["onsets"].values()]
        behind = row["behind"]
        table.add_row(
            words or "as it is",
            _with_error(row["loss"], row["se"], ".4f"),
            "best" if row["best"] else _with_error(behind["difference"], behind["se"], "+.4f") if behind else "-",
            str(row["n"]),
            f"{row['induction']:.2f}" if row["induction"] is not None else "-",
            " ".join(onsets) or "not measured",
        )
    return table


def _with_error(value: float, error: float | None, places: str) -> str:
    return f"{value:{places}}" + ("" if error is None else f" ({error:.4f})")
