"""How to share the cores of a machine among runs: few runs with many threads each, or many with few."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from qies.bench.baselines import own_step
from qies.bench.timing import Comparison, compare
from qies.errors import UserError
from qies.ladder import cores
from qies.ladder.controller import thread_environment
from qies.train.loop import keep_memory


def bench_threads(
    cases: Sequence[str] = (),
    *,
    rounds: int = 3,
    size: str = "400k",
    seq_len: int = 512,
    batch: int = 8,
    steps: int = 12,
) -> list[Comparison]:
    """The time that so many runs of so many threads take, side by side, for the same number of training steps in all.

    cases: RUNSxTHREADS; by default, with n cores, n x 1 (what `qies ladder run` does), 1 x n and n x n. The first is
    the subject. Each run is a process as the ladder starts it, a `qies` arm of `size` on batches [batch, seq_len];
    `steps` are each run's in the case of most runs. Raises UserError for a case that is not so written.
    """
    n = cores()
    pairs = [_parse(case) for case in cases] or list(dict.fromkeys([(n, 1), (1, n), (n, n)]))
    total = steps * max(runs for runs, _ in pairs)
    with contextlib.ExitStack() as held:
        baselines = {
            f"{runs} runs x {threads} threads": held.enter_context(_team(runs, threads, total, (size, seq_len, batch)))
            for runs, threads in pairs
        }
        case = f"{size}, T={seq_len}, {total * batch * seq_len} tokens in all, {n} cores"
        return [compare(case, baselines, rounds=rounds)]


def _parse(case: str) -> tuple[int, int]:
    runs, _, threads = case.partition("x")
    if not (runs.isdigit() and threads.isdigit() and int(runs) and int(threads)):
        raise UserError(f"Case '{case}' is not RUNSxTHREADS, such as 2x1.")
    return int(runs), int(threads)


@contextlib.contextmanager
def _team(runs: int, threads: int, total: int, shape: tuple[str, int, int]) -> Iterator[Callable[[], None]]:
    """Start processes that wait for work; yields a call that makes them take `total` steps concurrently."""
    spawn = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[Any] = []
    try:
        with _environment(thread_environment(threads)):
            for _ in range(runs):
                ours, theirs = spawn.Pipe()
                processes.append(spawn.Process(target=_serve, args=(theirs, threads, *shape), daemon=True))
                processes[-1].start()
                theirs.close()  # so that a process that ends is seen here
                ends.append(ours)
        for end in ends:
            end.recv()

        def work() -> None:
            for i, end in enumerate(ends):
                end.send(total // runs + (i < total % runs))
            for end in ends:
                end.recv()

        yield work
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started in this context: libraries read them at load time."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, threads: int, size: str, seq_len: int, batch: int) -> None:
    """Take the requested number of steps, repeatedly."""
    torch.set_num_threads(threads)
    keep_memory()
    vocab = 4096
    step = own_step("qies", size, torch.randint(0, vocab, (batch, seq_len + 1)), vocab)
    for _ in range(2):  # kernels are compiled
        step()
    connection.send("ready")
    while True:
        for _ in range(connection.recv()):
            step()
        connection.send("done")
