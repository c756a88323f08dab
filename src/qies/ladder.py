"""Many runs: planned, executed side by side in processes of their own, watched, and resumed after a kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qies import runs
from qies.config import RunConfig, content_hash
from qies.errors import UserError

POLL_SECONDS = 0.25
PATIENCE = 7 * 86_400.0  # seconds a run's process waits for another controller's that trains the same run


def run_folder(root: Path, config: RunConfig) -> Path:
    """Where a run lives: below `root`, named by the hash of its configuration."""
    return root / content_hash(config)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Slot:
    """One run in progress: its process, and how far it has read its metrics."""

    config: RunConfig
    folder: Path
    process: Any
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
        return runs.parse_rows(whole.decode())


Event = Callable[[RunConfig, list[dict[str, Any]], str], None]


def execute(
    configs: Sequence[RunConfig], root: Path, data: Path, *, workers: int, threads: int = 1, event: Event | None = None
) -> list[dict[str, Any]]:
    """Run every configuration that is not done, `workers` at a time, and return all records in order.

    Each run is a process of its own with `threads` threads; it holds a lock on its folder, so two controllers never
    train the same run at once. `event(config, new metric rows, status)` reports progress. A run whose process dies
    is recorded as failed and does not stop the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qies.train.loop"])
    waiting = [c for c in configs if not finished(run_folder(root, c))]
    active: list[Slot] = []
    tell = event or (lambda *_: None)
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                config = waiting.pop(0)
                folder = run_folder(root, config)
                process = context.Process(target=_work, args=(config, data, folder, threads))
                process.start()
                active.append(Slot(config, folder, process))
            time.sleep(POLL_SECONDS)
            for slot in list(active):
                ended = not slot.process.is_alive()
                tell(slot.config, slot.new_rows(), "running")
                if ended:
                    slot.process.join()
                    active.remove(slot)
                    tell(slot.config, [], _settle(slot))
    finally:
        for slot in active:  # an interrupt: let each run save and go
            slot.process.terminate()
        for slot in active:
            slot.process.join(timeout=60)
    return [record for c in configs if (record := runs.read(run_folder(root, c))) is not None]


def finished(folder: Path) -> bool:
    """Whether the run in `folder` needs nothing more."""
    record = runs.read(folder)
    return record is not None and record["status"] in ("done", "diverged")


def _settle(slot: Slot) -> str:
    """The status a run's process left behind, written down if it could not do so itself."""
    record = runs.read(slot.folder)
    if record is None or record["status"] not in ("done", "diverged"):
        log = slot.folder / "error.log"
        words = log.read_text().strip().splitlines()[-1] if log.is_file() else "it wrote no error.log"
        error = f"its process ended with code {slot.process.exitcode}: {words}"
        record = record or runs.plan(slot.config, slot.config.data.vocab_size)
        runs.write(slot.folder, record | {"status": "failed", "error": error})
        return "failed"
    return record["status"]


def _work(config: RunConfig, data: Path, folder: Path, threads: int) -> None:
    """The body of a run's process. What goes wrong is kept in error.log in the run's folder."""
    import torch

    from qies.data.shards import open_shards
    from qies.train.loop import Interrupted, train

    torch.set_num_threads(threads)
    try:
        train(config, open_shards(data), folder, patience=PATIENCE)
    except Interrupted as e:
        sys.exit(e.code)
    except Exception as e:
        with contextlib.suppress(OSError):
            (folder / "error.log").write_text(traceback.format_exc())
        sys.exit(2 if isinstance(e, UserError) else 1)
