"""The processes of one run: one, or one per GPU, with the environment that torchrun would set.

torchrun itself is not used, because a controller decides by what its agent hides. The agent exits with 1 whatever the
exit code of a worker, so that bad input (2, never retried) and a run that saved after a signal (143, not a failure)
could not be told from a failure. And a worker stops when its parent is gone; below an agent, which outlives a killed
controller, it would go on while another controller takes the run over.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class ProcessGroup:
    """`count` processes of one command, with the part of the interface of `Popen` that a controller uses.

    When one dies the others end by themselves within seconds (`qies.train.distributed`).
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path, count: int) -> None:
        # RANK and WORLD_SIZE are set for a lone process too: whatever started the controller, the run is its own
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        env = {name: value for name, value in env.items() if not name.startswith("TORCHELASTIC_")}
        self.processes = []
        with open(log, "wb") as out:
            for rank in range(count):
                own = {**env, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(
                    subprocess.Popen(words, env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
                )

    def poll(self) -> int | None:
        """None while any of them runs, then `returncode`."""
        return self.returncode if all([p.poll() is not None for p in self.processes]) else None

    @property
    def returncode(self) -> int:
        """The exit code of the ended processes: 0 if all succeeded, else that of one that a signal ended, else the
        first non-zero one; the codes of the others are consequences."""
        return next((code for code in self.codes if code < 0), self.codes[0] if self.codes else 0)

    @property
    def codes(self) -> list[int]:
        """The non-zero exit codes, in the order of ranks."""
        return [p.returncode for p in self.processes if p.returncode]

    def terminate(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def wait(self, timeout: float) -> int:
        """`returncode` once all have ended. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(0.0, end - time.monotonic()))
        return self.returncode


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
