"""A process of one run: `python -m qies.ladder.worker [--track=NAMES] FOLDER DATA THREADS`. Its configuration is in
run.json.

Exit code 0: done or diverged; 2: bad input; 128 + n: saved after signal n; anything else: failed, traceback on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from qies.errors import Stopped, UserError, leave, speaks

PATIENCE = 7 * 86_400.0  # seconds to wait for an orphan of a dead controller that still holds the run's folder


def main(folder: Path, data: Path, threads: int, track: Sequence[str] = ()) -> int:
    """Train the run in `folder` on the shards in `data`; the exit code."""
    import torch

    from qies import runs
    from qies.config import RunConfig, from_dict
    from qies.data.shards import open_shards
    from qies.train.distributed import start
    from qies.train.loop import Interrupted, train
    from qies.train.tracking import tracking

    torch.set_num_threads(threads)
    try:
        record = runs.read(folder)
        if record is None:
            raise UserError(f"{folder} holds no run.json; plan the run first.")
        config = from_dict(RunConfig, record["config"])
        parent = os.getppid()
        with ExitStack() as after, start(folder) as group:  # other ranks do not wait for a slow tracker
            tracked = after.enter_context(tracking(track if group.rank == 0 else (), folder))
            group.on_first(lambda: open_shards(data) and None)
            shards = open_shards(data, checked=True)
            train(config, shards, folder, patience=PATIENCE, progress=tracked, group=group, parent=parent)
    except Interrupted as error:
        return error.code
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.code
    except UserError as error:
        if speaks():
            print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Slurm's warning goes to every process of a job; the controller acts on it and stops its runs by SIGTERM.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    *options, run, shards, number = sys.argv[1:]
    names = [name for option in options for name in option.removeprefix("--track=").split(",")]
    leave(main(Path(run), Path(shards), int(number), names))
