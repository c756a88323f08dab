"""Execute runs concurrently, each in its own process. Any number of controllers can share a folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qies import records
from qies.config import RunConfig, content_hash
from qies.errors import RANK_ENDED, UserError
from qies.ladder import lease as leases
from qies.ladder.lease import STALE_SECONDS, Lease
from qies.ladder.process_group import ProcessGroup
from qies.records import RunRecord

if TYPE_CHECKING:
    from qies.data.shards import Shards

POLL_SECONDS = 0.25
SCAN_SECONDS = 1.0  # between scans for runs that have become free
WORKER = (sys.executable, "-m", "qies.ladder.worker")


def run_folder(root: Path, config: RunConfig) -> Path:
    """The run directory below `root`, named by the hash of the configuration."""
    return root / content_hash(config)


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that limit a process to `threads` threads. Libraries read them when they are loaded."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


@dataclass
class Slot:
    """One run in progress: its processes, lease and GPUs, and the offset up to which its metrics have been read."""

    config: RunConfig
    folder: Path
    process: ProcessGroup
    lease: Lease | None = None
    gpus: str | None = None
    offset: int = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """The complete rows written since the last call."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        if path.stat().st_size < self.offset:  # truncated by a resume
            self.offset = 0
        with open(path, "rb") as f:
            f.seek(self.offset)
            text = f.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return records.parse_rows(whole.decode())


Event = Callable[[RunConfig, list[dict[str, Any]], str], None]


def execute(
    configs: Sequence[RunConfig],
    root: Path,
    data: Path,
    *,
    workers: int,
    threads: int = 1,
    gpus: int = 0,
    retries: int = 2,
    retry_failed: bool = False,
    stale: float = STALE_SECONDS,
    track: Sequence[str] = (),
    command: Sequence[str] = WORKER,
    event: Event | None = None,
) -> list[RunRecord]:
    """Train every run that is not done, `workers` at a time, and return all records in order.

    Each run has its own process. Controllers on the same folder share the runs by leases (lease.py) and wait until all
    runs are over. On an interrupt each run saves its state.

    Args:
        configs: The runs.
        root: The folder of the run directories.
        data: The folder of shards.
        workers: Maximum number of concurrent runs.
        threads: CPU threads per run.
        gpus: GPUs per run, with one process each.
        retries: Maximum number of retries of a failed run. Bad input and divergence are final.
        retry_failed: Retry runs that have no retries left.
        stale: Seconds without a heartbeat after which a lease is abandoned.
        track: Trackers to which metrics are also logged (train/tracking.py).
        command: The command of a worker.
        event: Called with (config, new rows of metrics, status).
    """
    from qies.data.shards import open_shards

    check_batches(configs, gpus)
    shards = open_shards(data)
    check_runs(configs, root, shards)
    owner, tell = uuid.uuid4().hex[:12], event or (lambda *_: None)
    free = devices(workers, gpus)
    command = (*command, *(f"--track={','.join(track)}" for _ in track[:1]), str(data))
    for config in configs:
        if records.read(run_folder(root, config)) is None:  # another controller may create it at the same time
            records.create(run_folder(root, config), records.plan(config, shards.manifest.vocab_size))
        if retry_failed:
            leases.reset(run_folder(root, config), owner, retries)
    waiting = [c for c in configs if not _over(run_folder(root, c), retries)]
    active: list[Slot] = []
    beat = min(5.0, stale / 6)
    beaten, scanned = time.monotonic(), -SCAN_SECONDS
    try:
        while waiting or active:
            if free and time.monotonic() - scanned >= SCAN_SECONDS:
                scanned = time.monotonic()
                for config in list(waiting):
                    folder = run_folder(root, config)
                    if free and (held := leases.acquire(folder, owner, stale=stale, retries=retries)):
                        waiting.remove(config)
                        active.append(_start(config, folder, held, free.pop(0), command, threads))
                    elif _over(folder, retries):  # another controller's work
                        waiting.remove(config)
                        tell(config, [], found.status if (found := records.read(folder)) else "failed")
            time.sleep(POLL_SECONDS)
            renew = time.monotonic() - beaten >= beat
            beaten = time.monotonic() if renew else beaten
            for slot in list(active):
                assert slot.lease is not None
                if renew and not slot.lease.beat():  # the lease expired and another controller has taken over
                    slot.process.terminate()
                ended = slot.process.poll() is not None
                tell(slot.config, slot.new_rows(), "running")
                if ended:
                    active.remove(slot)
                    free.append(slot.gpus)
                    scanned = -SCAN_SECONDS
                    outcome = _settle(slot, retries)
                    if outcome in ("retrying", "lost"):
                        waiting.append(slot.config)
                    tell(slot.config, [], outcome)
    finally:
        for slot in active:
            slot.process.terminate()
        for slot in active:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it saves when it detects that its parent has ended
                slot.process.wait(timeout=60)
                _settle(slot, retries, stopping=True)
    return [record for c in configs if (record := records.read(run_folder(root, c))) is not None]


def finished(folder: Path) -> bool:
    """Whether the run in `folder` is done or has diverged."""
    record = records.read(folder)
    return record is not None and record.finished


def check_runs(configs: Sequence[RunConfig], root: Path, shards: Shards) -> None:
    """Raise UserError if a record below `root` has another model, other learning rates or other data than its
    configuration defines today."""
    for config in configs:
        folder = run_folder(root, config)
        if (record := records.read(folder)) is not None:
            records.require_same_definitions(config, record, folder)
            records.require_same_data(shards, record, folder)


def _over(folder: Path, retries: int) -> bool:
    return leases.exhausted(leases.attempts(folder), retries) or finished(folder)


def check_batches(configs: Sequence[RunConfig], gpus: int) -> None:
    """Raise UserError unless the batch of every run divides among its GPUs."""
    gpus = max(1, gpus)
    for batch, accumulate in {(c.train.batch_size, c.train.accumulate) for c in configs}:
        if batch % (gpus * accumulate):
            raise UserError(
                f"train.batch_size is {batch}; it must be a multiple of --gpus times train.accumulate "
                f"({gpus} x {accumulate})."
            )


def devices(workers: int, gpus: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None leaves it unchanged. Raises UserError if there are too few devices."""
    if not gpus:
        return [None] * workers
    import torch

    there = torch.cuda.device_count()  # the variable may list devices that do not exist
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (given.split(",") if given else [str(i) for i in range(there)])[:there]
    if len(names) < workers * gpus:
        raise UserError(f"{workers} runs of {gpus} GPUs need {workers * gpus}; {len(names)} are visible.")
    return [",".join(names[i * gpus : (i + 1) * gpus]) for i in range(workers)]


def _start(
    config: RunConfig, folder: Path, held: Lease, gpus: str | None, command: Sequence[str], threads: int
) -> Slot:
    """Start the processes of a run, one or one per GPU, with their output in the log of the attempt."""
    env = os.environ | thread_environment(threads)
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    *program, data = command
    words = [*program, str(folder), data, str(threads)]
    return Slot(config, folder, ProcessGroup(words, env, held.log, len((gpus or "0").split(","))), held, gpus)


def _settle(slot: Slot, retries: int, stopping: bool = False) -> str:
    """Close the attempt of a process that has ended. Returns the run's final status, "retrying", or "lost".

    "lost" means that another controller has taken over. A process ended by a signal has failed (out of memory, for
    example), unless this controller is `stopping` and sent the signal.
    """
    held, code = slot.lease, slot.process.returncode
    assert held is not None
    if not held.beat():
        held.end("interrupted", "another controller took the run over")
        return "lost"
    record = records.read(slot.folder)
    if record is not None and record.finished:
        held.end(record.status, "")
        return record.status
    lines = held.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    # The first cause, not the messages of ranks that stopped because of it.
    last = next((line for line in reversed(lines) if RANK_ENDED not in line), lines[-1])
    reason = f"its process ended with code {code}: {last}"
    stopped = stopping and not {130, 143, -2, -15}.isdisjoint(slot.process.codes)
    outcome = "interrupted" if stopped else "refused" if code == 2 else "failed"
    held.end(outcome, reason)
    if not leases.exhausted(leases.attempts(slot.folder), retries):
        return "retrying"
    with records.lock(slot.folder):
        if record is not None:
            records.write(slot.folder, replace(record, status="failed", error=reason))
    return "failed"
