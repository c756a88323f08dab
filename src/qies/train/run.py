"""Train one run: the entry point of the command line, of ladder workers, and of Python code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from qies import records, storage
from qies.config import RunConfig
from qies.data.builder.pipeline import build_shards
from qies.data.manifest import MANIFEST, Manifest
from qies.data.shards import open_shards
from qies.errors import UserError
from qies.records import RunRecord
from qies.train.distributed import check_batch, rank_and_size, start
from qies.train.loop import Progress, check_data, train
from qies.train.run_directory import branch, claim
from qies.train.tracking import tracking


def run(
    config: RunConfig,
    out: Path,
    *,
    data: Path | None = None,
    branch_from: Path | None = None,
    resume: bool = True,
    threads: int = 1,
    track: Sequence[str] = (),
    progress: Callable[[], AbstractContextManager[Progress]] | None = None,
    built: Callable[[Manifest], None] | None = None,
    patience: float = 30.0,
    parent: int | None = None,
) -> RunRecord:
    """Train the run of `config` in the directory `out`, or resume it, and return its record.

    Every process started by torchrun calls this function; only rank 0 writes.

    Args:
        config: The run; `data.source` is as `qies.data.locate` returns it.
        out: The run directory. An unfinished run in it resumes; a finished one is returned unchanged.
        data: The directory of shards. By default `config.data.source` if it is one, else `out/data`, which is built.
        branch_from: The directory of a longer run; this run starts from its checkpoint (`run_directory.branch`).
        resume: Whether `out` may already hold the run.
        threads: CPU threads.
        track: Names of trackers to which metrics are also logged (`train.tracking`).
        progress: Called by rank 0 once the data are ready; the context yields a function of each row of metrics.
        built: Called with the manifest if this call builds the shards.
        patience: Seconds to wait for another process that trains in `out`.
        parent: The id of a process. When it ends, the run stops as after SIGTERM.

    Raises:
        UserError: The configuration is invalid, or `out` holds something else. Nothing has been written.
        Stopped: The disk is full, or a process of the group has died. The same call resumes the run.
        Interrupted: SIGTERM or SIGINT arrived, and the state is saved. The same call resumes the run.
    """
    if not resume and records.read(out) is not None:
        raise UserError(f"{out} already holds a run; omit --no-resume or give another --out.")
    records.plan(config, config.data.vocab_size)
    check_batch(config.train, rank_and_size()[1])
    torch.set_num_threads(threads)

    def prepare() -> Path:
        storage.make_writable_folder(out)
        place = data or Path(config.data.source)
        if data is None and not (place / MANIFEST).is_file():
            place = out / "data"
            there = (place / MANIFEST).is_file()
            manifest = build_shards(config.data, place)
            if built is not None and not there:
                built(manifest)
        check_data(open_shards(place), config.train)
        if branch_from is not None:
            branch(config, branch_from, out)
        return place

    claim(config, out)
    with ExitStack() as after, start(out) as group:  # other ranks do not wait for trackers to close
        shards = open_shards(group.on_first(prepare), checked=True)
        first = group.rank == 0
        shown = after.enter_context(progress() if first and progress is not None else nullcontext(_ignore))
        tracked = after.enter_context(tracking(track if first else (), out))

        def tell(row: dict[str, Any]) -> None:
            shown(row)
            tracked(row)

        return train(config, shards, out, progress=tell, patience=patience, group=group, parent=parent)


def _ignore(row: dict[str, Any]) -> None:
    """The progress callback that does nothing."""
