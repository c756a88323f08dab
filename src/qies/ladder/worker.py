"""The process of one run: `python -m qies.ladder.worker FOLDER DATA THREADS`. Its configuration is in run.json.

Exit code 0: done or diverged; 2: bad input; 128 + n: saved after signal n; anything else: failed, traceback on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

PATIENCE = 7 * 86_400.0  # seconds to wait for an orphan of a dead controller that still holds the run's folder


def main(folder: Path, data: Path, threads: int) -> int:
    """Train the run in `folder` on the shards in `data`; the exit code."""
    import torch

    from qies import runs
    from qies.config import RunConfig, from_dict
    from qies.data.shards import open_shards
    from qies.errors import UserError
    from qies.train.loop import Interrupted, train

    torch.set_num_threads(threads)
    try:
        record = runs.read(folder)
        if record is None:
            raise UserError(f"{folder} holds no run.json; plan the run first.")
        train(from_dict(RunConfig, record["config"]), open_shards(data), folder, patience=PATIENCE)
    except Interrupted as error:
        return error.code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
