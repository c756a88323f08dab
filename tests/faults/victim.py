"""The process that a fault is injected into: `python -m qies ...`, forked from a parent that has imported torch.

Importing takes longer than a small run, so victims come from a fork server that has done it once. What is killed is a
process of its own that runs the whole verb; with `fresh` it becomes a new interpreter first.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def main(command: list[str], env: dict[str, str], log: Path, fresh: bool, before: Callable[[], None] | None) -> None:
    """Run `python COMMAND` with its output in `log`.out and `log`.err; `before` is called first, unless `fresh`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the fork server blocks it
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    os.environ.update(env)
    if fresh:
        os.execv(sys.executable, [sys.executable, *command])
    if before is not None:
        before()
    flag, module, *words = command
    assert flag == "-m"
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
