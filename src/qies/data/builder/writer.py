"""Writes the documents of a stream as token shards.

The main process reads, drops repeats and splits; workers encode; the main process writes in the order in which it read,
so the number of workers does not change the shards. Whenever a shard is full, the state is committed (`state`); a build
that was interrupted resumes there and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qies.data.builder.cleaning import text_key
from qies.data.builder.contamination import Pack
from qies.data.builder.encoding import Encoded, Texts, encoder, in_order
from qies.data.builder.progress import Progress, Step
from qies.data.builder.split import split_hash
from qies.data.builder.state import PROGRESS, SEEN, BuildState, read_digests
from qies.data.manifest import SPLITS, Counts, Dropped, Shard, SourceSpan
from qies.data.sources.documents import Document, DocumentStream
from qies.data.tokenizer import end_token, read_tokenizer
from qies.storage import replacing

BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What a build does with its stream. `identity` must be the same for an interrupted build to be resumed."""

    folder: Path
    tokenizer: Path
    dtype: np.dtype
    shard_tokens: int
    threshold: int
    """A document whose `split_hash` is below it is held out, unless the stream has its own split."""
    seed: int
    limit_tokens: int
    workers: int
    pack: Pack | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class _Prepared:
    """A batch of the stream without repeats, and the split of each document."""

    documents: list[Document]
    splits: list[str]
    digests: bytes
    position: Any
    done: int
    dropped: list[Dropped]
    """Before each document, and after the last."""

    def texts(self) -> Texts:
        texts, names = [d.text for d in self.documents], [d.label for d in self.documents]
        return Texts(texts, names, [split == "train" for split in self.splits])


class Writer:
    """Writes a stream according to a plan, starting from a state."""

    def __init__(self, stream: DocumentStream, plan: Plan, state: BuildState, progress: Progress) -> None:
        self.stream, self.plan, self.state, self.progress = stream, plan, state, progress
        self.end = read_tokenizer(plan.tokenizer).token_to_id(end_token(plan.tokenizer))
        self.pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.room = dict.fromkeys(SPLITS, plan.shard_tokens)
        self.digests: list[bytes] = []  # of the documents read since the last commit
        self.sha256 = hashlib.sha256()  # over all digests

    def write(self) -> BuildState:
        """Write the rest of the stream. Raises UserError if the stream does."""
        if self._full():  # killed between its last shard and the manifest
            return self.state
        with encoder(self.plan.tokenizer, self.plan.pack, self.plan.workers) as encode:
            batches = in_order(lambda prepared: encode(prepared.texts()), self._prepared(), 2 * self.plan.workers)
            for prepared, encoded in batches:
                self._take(prepared, encoded)
                self._report(prepared.done)
                if self._full():
                    break
                if min(self.room.values()) <= 0:
                    self._commit()
        self._commit()
        return self.state

    def _full(self) -> bool:
        return 0 < self.plan.limit_tokens <= self.state.total("train").tokens

    def _report(self, characters: int) -> None:
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
                held_out = split_hash(document.text, self.plan.seed) < self.plan.threshold
                splits.append(batch.split or ("val" if held_out else "train"))
            yield _Prepared(documents, splits, b"".join(digests), batch.position, done, dropped)

    def _seen(self) -> set[int]:
        """The digests of the last commit; truncates what was written after it."""
        digests = read_digests(self.plan.folder, self.state.seen)
        self.sha256 = hashlib.sha256(digests)
        path = self.plan.folder / SEEN
        path.touch()
        os.truncate(path, len(digests))
        return set(np.frombuffer(digests, "<u8").tolist())

    def _take(self, prepared: _Prepared, encoded: Encoded) -> None:
        """Add a batch to what is pending, up to the document that reaches the limit of tokens."""
        state = self.state
        state.position = prepared.position
        self.digests.append(prepared.digests)
        *before, after = prepared.dropped
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
                    state.val_order[-1] = SourceSpan(document.source, last[0].documents + 1)
                else:
                    state.val_order.append(SourceSpan(document.source, 1))
            elif self.plan.pack:
                state.overlap.add(self.plan.pack, hits)
            if self._full():
                return
        state.dropped += after

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
    """Eight bytes for a text. The probability that any two of 10^8 different texts share theirs is 0.0003."""
    return int.from_bytes(text_key(text, 8), "little")


def _chain(before: str, document: Document) -> str:
    """The running digest of a source after one more document."""
    parts = (before.encode(), document.id.encode(), hashlib.sha256(document.text.encode()).hexdigest().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
