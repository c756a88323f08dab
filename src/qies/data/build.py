"""A stream of documents into token shards: encoded in parallel processes, committed shard by shard, resumable.

The main process reads, drops repeats and splits; workers encode batches; the main process writes them in the order in
which it read them, so their number changes nothing. When a shard is full, what is pending of both splits is written,
then `progress.json`: where the stream stands, the shards with their sha256, all counts, sealed with a sha256 of its
own. A build that was killed goes on from there, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from qies.config import differences
from qies.data import tokenizer as bpe
from qies.data.contamination import Count, Pack
from qies.data.corpora import Document, text_key
from qies.data.manifest import SPLITS, Counts, Dropped, Run, Shard
from qies.data.progress import Progress, Step
from qies.data.streams import Stream
from qies.errors import Stopped, UserError
from qies.storage import replacing

PROGRESS = "progress.json"
TOKENIZER = "tokenizer"
SEEN = "seen.bin"  # digests of the documents taken, 8 bytes each: what came before is dropped
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What a build does with its stream; `identity` is what must be the same to go on with one that was cut off."""

    folder: Path
    tokenizer: Path
    dtype: np.dtype
    shard_tokens: int
    threshold: int
    """A document whose hash is below it is held out, where the stream leaves that open."""
    seed: int
    limit_tokens: int
    workers: int
    pack: Path | None
    table: Pack | None
    """Of `pack`, for the main process."""
    identity: dict[str, Any]


@dataclass
class State:
    """All that a build knows behind a committed shard."""

    position: Any = None
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    counts: dict[str, dict[str, Counts]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    digests: dict[str, str] = field(default_factory=dict)
    val_order: list[Run] = field(default_factory=list)
    overlap: Count = field(default_factory=Count)
    dropped: Dropped = field(default_factory=Dropped)
    seen: int = 0
    """Documents whose digests are in `SEEN`, and the sha256 of those."""
    seen_sha256: str = hashlib.sha256().hexdigest()
    tokenizer_sha256: str = ""

    def total(self, split: str) -> Counts:
        return sum(self.counts[split].values(), Counts())

    def to_json(self, identity: dict[str, Any], threshold: int) -> str:
        values = asdict(self) | {"identity": identity, "threshold": threshold}
        values["overlap"]["found"] = sorted(self.overlap.found)
        text = json.dumps(values, sort_keys=True)
        return json.dumps({"seal": hashlib.sha256(text.encode()).hexdigest(), "state": values}, sort_keys=True)


def load_state(folder: Path, identity: dict[str, Any]) -> tuple[State, int] | None:
    """The state (and threshold) of a build of `identity` that was cut off in `folder`, None if nothing is committed.

    Raises UserError: it was of something else, its file is damaged, or a shard, the tokenizer or the digests are not as
    they were written.
    """
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        values = sealed["state"]
        if sealed["seal"] != hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest():
            raise ValueError("its seal is broken")
        was, threshold = values.pop("identity"), values.pop("threshold")
        state = State(**values)
        state.shards = {split: [Shard(**shard) for shard in values["shards"][split]] for split in SPLITS}
        state.counts = {
            split: {name: Counts(**counts) for name, counts in values["counts"][split].items()} for split in SPLITS
        }
        state.val_order = [Run(**run) for run in values["val_order"]]
        state.dropped = Dropped(**values["dropped"])
        state.overlap = Count(set(values["overlap"]["found"]), values["overlap"]["documents"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}); delete '{folder}' and build the data again") from None
    if other := differences(was, identity):
        raise UserError(
            f"'{folder}' holds the beginning of other data ({'; '.join(other)}); give another folder or delete it"
        )
    checked = {shard.file: shard.sha256 for split in SPLITS for shard in state.shards[split]}
    for name, sha256 in checked.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            raise _damaged(folder / name)
    try:
        if bpe.tokenizer_sha256(folder / TOKENIZER) != state.tokenizer_sha256:
            raise OSError
    except OSError:
        raise _damaged(folder / TOKENIZER) from None
    if hashlib.sha256(_digests(folder, state.seen)).hexdigest() != state.seen_sha256:
        raise _damaged(folder / SEEN)
    return state, threshold


def _damaged(path: Path) -> UserError:
    return UserError(f"'{path}' is missing or damaged; delete '{path.parent}' and build the data again")


def _digests(folder: Path, count: int) -> bytes:
    """The first `count` digests, or what is there of them. What follows was written after the last commit."""
    path = folder / SEEN
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(8 * count)


def hash_of(text: str, seed: int) -> int:
    """A number below 2^64 that depends on text and seed only; the split of a stream is by it."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class _Prepared:
    """A batch of the stream without repeats, and with every document's split."""

    documents: list[Document]
    splits: list[str]
    digests: bytes
    position: Any
    done: int
    dropped: list[Dropped]
    """Before each document, and behind the last."""


@dataclass(frozen=True)
class _Encoded:
    """Of each document: its token ids, its bytes, and the n-grams it shares with the pack."""

    ids: list[np.ndarray]
    bytes: list[int]
    hits: list[list[int]]


class Writer:
    """Writes a stream by a plan, from a state on."""

    def __init__(self, stream: Stream, plan: Plan, state: State, progress: Progress) -> None:
        self.stream, self.plan, self.state, self.progress = stream, plan, state, progress
        self.end = bpe.read_tokenizer(plan.tokenizer).token_to_id(bpe.end_token(plan.tokenizer))
        self.pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.room = dict.fromkeys(SPLITS, plan.shard_tokens)
        self.digests: list[bytes] = []  # of the documents taken since the last commit
        self.sha256 = hashlib.sha256()  # over all digests

    def write(self) -> State:
        """Write what is left of the stream. Raises UserError for what the stream objects to."""
        if self._full():  # killed between its last shard and the manifest
            return self.state
        with _encoder(self.plan) as encode:
            for prepared, encoded in _ordered(encode, self._prepared(), 2 * self.plan.workers):
                self._take(prepared, encoded)
                self._tell(prepared.done)
                if self._full():
                    break
                if min(self.room.values()) <= 0:
                    self._commit()
        self._commit()
        return self.state

    def _full(self) -> bool:
        return 0 < self.plan.limit_tokens <= self.state.total("train").tokens

    def _tell(self, characters: int) -> None:
        train = self.state.total("train")
        total = train + self.state.total("val")
        limit = self.plan.limit_tokens
        done, of = (train.tokens, limit) if limit else (characters, self.stream.size)
        self.progress(Step("encoding", min(done, of), of, total.documents, total.tokens))

    def _prepared(self) -> Iterator[_Prepared]:
        seen = self._seen()
        done = self.state.total("train").bytes + self.state.total("val").bytes
        characters = min(BATCH_CHARACTERS, self.plan.shard_tokens)
        for batch in self.stream.batches(self.state.position, characters):
            documents, splits, digests = [], [], []
            dropped = [Dropped(empty_files=int(batch.empty_file))]
            for document in batch.documents:
                done += len(document.text)
                if not self.stream.distinct:
                    digest = _digest(document.text)
                    if not document.text.strip():
                        dropped[-1] += Dropped(empty=1)
                        continue
                    if digest in seen:
                        dropped[-1] += Dropped(repeated=1)
                        continue
                    seen.add(digest)
                    digests.append(digest.to_bytes(8, "little"))
                dropped.append(Dropped())
                documents.append(document)
                held_out = hash_of(document.text, self.plan.seed) < self.plan.threshold
                splits.append(batch.split or ("val" if held_out else "train"))
            yield _Prepared(documents, splits, b"".join(digests), batch.position, done, dropped)

    def _seen(self) -> set[int]:
        """The digests behind the last commit; what was written after it is cut off."""
        digests = _digests(self.plan.folder, self.state.seen)
        self.sha256 = hashlib.sha256(digests)
        path = self.plan.folder / SEEN
        path.touch()
        os.truncate(path, len(digests))
        return set(np.frombuffer(digests, "<u8").tolist())

    def _take(self, prepared: _Prepared, encoded: _Encoded) -> None:
        """Add a batch to what is pending, up to the document that reaches the limit of tokens."""
        state = self.state
        state.position = prepared.position
        self.digests.append(prepared.digests)
        *before, behind = prepared.dropped
        for document, split, ids, size, hits, dropped in zip(
            prepared.documents, prepared.splits, encoded.ids, encoded.bytes, encoded.hits, before, strict=True
        ):
            state.dropped += dropped
            counts = state.counts[split]
            counts[document.source] = counts.get(document.source, Counts()) + Counts(1, size, len(ids) + 1)
            self.room[split] -= len(ids) + 1
            self.pending[split].append(np.concatenate([[self.end], ids]).astype(self.plan.dtype))
            state.digests[document.source] = _chain(state.digests.get(document.source, ""), document)
            if split == "val":
                last = state.val_order[-1:]
                if last and last[0].source == document.source:
                    state.val_order[-1] = Run(document.source, last[0].documents + 1)
                else:
                    state.val_order.append(Run(document.source, 1))
            elif self.plan.table:
                state.overlap.see(self.plan.table, hits)
            if self._full():
                return
        state.dropped += behind

    def _commit(self) -> None:
        folder, state = self.plan.folder, self.state
        for split, parts in self.pending.items():
            if parts:
                data = np.concatenate(parts)
                name = f"{split}-{len(state.shards[split]):05d}.bin"
                with replacing(folder / name) as file:
                    file.write(data.data)
                state.shards[split].append(Shard(name, len(data), hashlib.sha256(data.data).hexdigest()))
                parts.clear()
                self.room[split] = self.plan.shard_tokens
        digests = b"".join(self.digests)
        with (folder / SEEN).open("ab") as file:
            file.write(digests)
            file.flush()
            os.fsync(file.fileno())
        self.sha256.update(digests)
        state.seen, state.seen_sha256 = state.seen + len(digests) // 8, self.sha256.hexdigest()
        self.digests.clear()
        with replacing(folder / PROGRESS) as file:
            file.write(state.to_json(self.plan.identity, self.plan.threshold).encode())


def _digest(text: str) -> int:
    """Eight bytes for the text. Of 10^8 different documents two share theirs with a probability of 0.0003."""
    return int.from_bytes(text_key(text, 8), "little")


def _chain(before: str, document: Document) -> str:
    """The digest of a source with one document more."""
    parts = (before.encode(), document.id.encode(), hashlib.sha256(document.text.encode()).hexdigest().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


# --- encoding


class _Encoder:
    """Encodes the texts of a batch; each process has its own."""

    def __init__(self, folder: Path, pack: Pack | None) -> None:
        self.encode = bpe.Exact(bpe.read_tokenizer(folder), bpe.end_token(folder))
        self.pack = pack

    def __call__(self, texts: list[str], names: list[str], training: list[bool]) -> _Encoded:
        ids, sizes = self.encode(texts, names)
        pack = self.pack
        hits = [pack.hits(text) if pack and own else [] for text, own in zip(texts, training, strict=True)]
        return _Encoded(ids, sizes, hits)


_worker: _Encoder | None = None


def _start_worker(folder: Path, pack: Path | None) -> None:
    global _worker
    _worker = _Encoder(folder, Pack(pack) if pack else None)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves nobody to send this process work or to end it."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(texts: list[str], names: list[str], training: list[bool]) -> _Encoded:
    if _worker is None:
        raise RuntimeError("a worker has not been started")
    return _worker(texts, names, training)


@contextmanager
def _encoder(plan: Plan) -> Iterator[Callable[[_Prepared], Callable[[], _Encoded]]]:
    """What starts to encode a batch and returns what waits for the result."""

    def arguments(prepared: _Prepared) -> tuple[list[str], list[str], list[bool]]:
        texts, names = [d.text for d in prepared.documents], [d.label for d in prepared.documents]
        return texts, names, [split == "train" for split in prepared.splits]

    if plan.workers == 1:  # in this process, with the threads of the tokenizer
        own = _Encoder(plan.tokenizer, plan.table)
        yield lambda prepared: lambda: own(*arguments(prepared))
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    pool = ProcessPoolExecutor(
        plan.workers, get_context("spawn"), initializer=_start_worker, initargs=(plan.tokenizer, plan.pack)
    )
    try:

        def submit(prepared: _Prepared) -> Callable[[], _Encoded]:
            future: Future[_Encoded] = pool.submit(_work, *arguments(prepared))
            return future.result

        yield submit
    except BrokenProcessPool:
        raise Stopped("a process that encodes was killed (too little memory?); run the same command again") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _ordered(
    start: Callable[[_Prepared], Callable[[], _Encoded]], batches: Iterator[_Prepared], ahead: int
) -> Iterator[tuple[_Prepared, _Encoded]]:
    """Every batch with its encoding, in order, with at most `ahead` more of them under way."""
    waiting: deque[tuple[_Prepared, Callable[[], _Encoded]]] = deque()
    for prepared in batches:
        waiting.append((prepared, start(prepared)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result()
    for first, result in waiting:
        yield first, result()
