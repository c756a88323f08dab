"""The processes of one run: one, or one per GPU, with the environment variables of torchrun.

torchrun itself is not used, because its agent hides what a controller needs. The agent exits with 1 for every exit code
of a worker, so bad input (2, never retried) and a run that saved after a signal (143, not a failure) would look like
failures. Also, a worker stops when its parent ends; the agent outlives a killed controller, so its workers would
continue while another controller takes the run over.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class ProcessGroup:
    """`count` processes of one command, with the subset of the interface of `Popen` that a controller uses.

    If one process dies, the others exit within seconds (`qies.train.distributed`).
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path, count: int) -> None:
        # RANK and WORLD_SIZE are set for a single process too, so that those of the controller are not inherited.
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
        """None while a process is running, then `returncode`."""
        return self.returncode if all([p.poll() is not None for p in self.processes]) else None

    @property
    def returncode(self) -> int:
        """0 if all processes succeeded, else the code of one ended by a signal, else the first non-zero code."""
        return next((code for code in self.codes if code < 0), self.codes[0] if self.codes else 0)

    @property
    def codes(self) -> list[int]:
        """The non-zero exit codes, by rank."""
        return [p.returncode for p in self.processes if p.returncode]

    def terminate(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def wait(self, timeout: float) -> int:
        """Wait until all processes have ended and return `returncode`. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(0.0, end - time.monotonic()))
        return self.returncode


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
