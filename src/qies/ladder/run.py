"""Train every run of a study on this host or in submitted jobs, and tabulate the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qies import records
from qies.config import StudyConfig
from qies.errors import Stopped
from qies.ladder.controller import check_batches, cores, devices, execute, finished, run_folder
from qies.ladder.grid import StudyFolder, prepare
from qies.ladder.jobs import check, submit
from qies.ladder.plan import longest_first
from qies.ladder.progress import LadderProgress
from qies.records import RunRecord


def run_all(
    claimed: StudyFolder,
    console: Console,
    *,
    workers: int | None = None,
    threads: int = 1,
    gpus: int = 0,
    **how: Any,
) -> list[RunRecord]:
    """Train every run of the study, with a progress bar, and return the records.

    Args:
        claimed: The study and its folder.
        console: Where progress is printed.
        workers: Concurrent runs; by default those of the study, else one per `threads` cores.
        threads: CPU threads per run.
        gpus: GPUs per run.
        how: Further keyword arguments of `execute`.
    """
    study, root = claimed.study, claimed.runs
    workers = workers or study.workers or max(1, cores() // threads)
    check_batches(study.runs(), gpus)
    devices(workers, gpus)
    prepare(claimed, console)
    planned = longest_first(study)
    todo = [c for c in planned if not finished(run_folder(root, c))]
    if len(todo) < len(planned):
        console.print(f"{len(planned) - len(todo)} of {len(planned)} runs are done already.")
    if todo:
        with LadderProgress(study, todo, workers, console) as watch:
            execute(planned, root, claimed.data, event=watch.event, workers=workers, threads=threads, gpus=gpus, **how)
    return [r for c in study.runs() if (r := records.read(run_folder(root, c))) is not None]


def submit_all(
    claimed: StudyFolder,
    console: Console,
    *,
    cluster: str,
    jobs: int,
    minutes: int,
    sbatch: str = "",
    workers: int | None = None,
    gpus: int = 0,
    **how: Any,
) -> list[str]:
    """Submit `jobs` jobs that together train every run of the study, and return their ids.

    Args:
        claimed: The study and its folder.
        console: Where progress is printed.
        workers: Concurrent runs of each job; by default those of the study, else one.
        cluster, jobs, minutes, sbatch, gpus, how: Arguments of `jobs.submit`.
    """
    study = claimed.study
    workers = workers or study.workers or 1
    check_batches(study.runs(), gpus)
    if cluster == "local":
        devices(workers, gpus)
    check(cluster, sbatch, jobs, gpus)
    prepare(claimed, console)
    return submit(
        longest_first(study), claimed.runs, claimed.data, claimed.path / "jobs",
        cluster=cluster, jobs=jobs, minutes=minutes, sbatch=sbatch, workers=workers, gpus=gpus, **how,
    )  # fmt: skip


def require_done(found: list[RunRecord], folder: Path) -> None:
    """Raise Stopped if runs have failed. The message lists the logs of their attempts."""
    failed = [str(folder / "runs" / r.config_hash / "attempts") for r in found if r.status == "failed"]
    if failed:
        raise Stopped(f"{len(failed)} runs failed; see {', '.join(failed)}")


def result_table(study: StudyConfig, found: list[RunRecord]) -> Table:
    """Held-out bits per byte by arm, size and budget (mean over seeds), throughput and peak memory."""
    title = f"study {study.name}: held-out bits per byte (loss in nats per token; on the clean part), tokens/s, memory"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    points = list(dict.fromkeys((c.size, c.tokens) for c in study.runs()))
    names = [f"{s}, {t / 1e6:.2f}M tokens" if len(study.budgets) > 1 else s for s, t in points]
    for column in (*names, "tokens/s", "MiB"):
        table.add_column(column, justify="right")
    for arm in study.arms:
        own = [r for r in found if r.arm == arm]
        cells = []
        for point in points:
            here = [r for r in own if (r.size, r.config["tokens"]) == point]
            done = [r.metrics for r in here if r.status == "done"]
            if done:
                mean = {k: sum(m[k] for m in done) / len(done) for k in ("val_bpb", "val_loss")}
                clean = [m["val_loss_clean"] for m in done if "val_loss_clean" in m]
                beside = f"; {sum(clean) / len(clean):.3f}" if clean else ""
                cells.append(f"{mean['val_bpb']:.4f} ({mean['val_loss']:.3f}{beside})")
            else:
                cells.append(", ".join(sorted({r.status for r in here})) or "-")
        rates = [r.tokens_per_second for r in own if r.tokens_per_second]
        memory = [r.peak_memory_bytes for r in own if r.peak_memory_bytes]
        rate = f"{sum(rates) / len(rates):,.0f}" if rates else "-"
        table.add_row(arm, *cells, rate, f"{max(memory) / 2**20:,.0f}" if memory else "-")
    return table
