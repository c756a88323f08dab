"""Encoding documents in this process or in parallel processes, with results in the order of the input."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np

from qies.data.builder.contamination import Pack
from qies.data.builder.tokenizer import LosslessEncoder
from qies.data.tokenizer import end_token, read_tokenizer
from qies.errors import Stopped
from qies.workers import end_with_parent

B = TypeVar("B")


@dataclass(frozen=True)
class Texts:
    """Texts to encode, their names in error messages, and which of them are training text."""

    texts: list[str]
    names: list[str]
    training: list[bool]


@dataclass(frozen=True)
class Encoded:
    """For each text: its token ids, its size in bytes, and the n-grams it shares with the evaluation pack."""

    ids: list[np.ndarray]
    bytes: list[int]
    hits: list[list[int]]


Encode = Callable[[Texts], Callable[[], Encoded]]
"""Starts to encode and returns a function that waits for the result."""


class _Encoder:
    """The tokenizer and the pack of one process."""

    def __init__(self, folder: Path, pack: Pack | None) -> None:
        self.encode = LosslessEncoder(read_tokenizer(folder), end_token(folder))
        self.pack = pack

    def __call__(self, batch: Texts) -> Encoded:
        ids, sizes = self.encode(batch.texts, batch.names)
        pack = self.pack
        hits = [pack.hits(t) if pack and own else [] for t, own in zip(batch.texts, batch.training, strict=True)]
        return Encoded(ids, sizes, hits)


@contextmanager
def encoder(tokenizer: Path, pack: Pack | None, workers: int) -> Iterator[Encode]:
    """An encoder with the tokenizer in the folder `tokenizer` that looks for the n-grams of `pack` in training text.

    One worker means this process; its tokenizer uses threads. Raises Stopped if a worker process is killed.
    """
    if workers == 1:
        own = _Encoder(tokenizer, pack)
        yield lambda batch: lambda: own(batch)
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core, so no threads
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, pack.folder if pack else None)
    )
    try:

        def submit(batch: Texts) -> Callable[[], Encoded]:
            future: Future[Encoded] = pool.submit(_work, batch)
            return future.result

        yield submit
    except BrokenProcessPool:
        raise Stopped("a worker process was killed (out of memory?); run the same command again") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def in_order(
    start: Callable[[B], Callable[[], Encoded]], batches: Iterable[B], ahead: int
) -> Iterator[tuple[B, Encoded]]:
    """Each batch with its encoding, in order, while at most `ahead` further batches are being encoded."""
    waiting: deque[tuple[B, Callable[[], Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, start(batch)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result()
    for first, result in waiting:
        yield first, result()


# --- in a worker process

_worker: _Encoder | None = None


def _start_worker(folder: Path, pack: Path | None) -> None:
    global _worker
    _worker = _Encoder(folder, Pack(pack) if pack else None)
    end_with_parent()


def _work(batch: Texts) -> Encoded:
    if _worker is None:
        raise RuntimeError("a worker has not been started")
    return _worker(batch)
