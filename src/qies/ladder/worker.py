"""The process of one run: `python -m qies.ladder.worker [--track=NAMES] FOLDER DATA THREADS`.

The configuration is in run.json. Exit codes: 0 done or diverged; 2 bad input; 128 + n saved after signal n; others
failed, with a traceback on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from qies.errors import Stopped, UserError, exit_process, reports_errors

PATIENCE = 7 * 86_400.0  # seconds to wait for an orphaned process that still holds the run directory


def main(folder: Path, data: Path, threads: int, track: Sequence[str] = ()) -> int:
    """Train the run in `folder` on the shards in `data` and return the exit code."""
    from qies import records
    from qies.train.run import run

    try:
        record = records.read(folder)
        if record is None:
            raise UserError(f"{folder} holds no run.json; plan the run first.")
        run(
            record.run_config, folder, data=data, threads=threads, track=track, patience=PATIENCE, parent=os.getppid()
        )  # fmt: skip
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.code
    except UserError as error:
        if reports_errors():
            print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # Slurm sends its warning to every process of a job; the controller handles it and stops its runs by SIGTERM.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    *options, run, shards, number = sys.argv[1:]
    names = [name for option in options for name in option.removeprefix("--track=").split(",")]
    exit_process(main(Path(run), Path(shards), int(number), names))
