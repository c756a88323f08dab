"""The stream of documents that a build reads.

Text that fits into memory (`builtin`, `registry`, plain text files) is loaded, cleaned and split by document. Records
(jsonl, csv, parquet, a data set of the hub) and larger plain text are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from qies.config import DataConfig, is_path
from qies.data.builder.cleaning import tidy
from qies.data.builder.corpus import Corpus, fingerprint, load_corpus
from qies.data.builder.split import split_documents
from qies.data.manifest import Build, Dropped, Reading
from qies.data.sources import readers
from qies.data.sources.documents import Document, DocumentBatch, DocumentStream
from qies.data.sources.files import Files, find_files
from qies.data.sources.hub import HubStream
from qies.errors import UserError

IN_MEMORY = 1_000_000_000  # bytes of plain text files up to which they are loaded


def open_stream(cfg: DataConfig, build: Build = Build()) -> DocumentStream:  # noqa: B008 (it is frozen)
    """The stream of the source `cfg.source`. Raises UserError if there is none."""
    kind, _, rest = cfg.source.partition(":")
    named = not is_path(cfg.source)
    if named and (build.include or build.exclude):
        raise UserError(f"--include and --exclude apply to files, and '{cfg.source}' has none; omit them")
    if kind == "hub":
        return HubStream(rest, build.text_field, val_characters=round(5 * cfg.val_fraction * build.limit_tokens))
    if named:
        return Loaded(cfg)
    files = find_files(cfg.source, build.text_field, build.include, build.exclude)
    return Loaded(cfg, files) if files.is_text and files.fit(IN_MEMORY) else FileStream(files)


class Loaded:
    """A corpus in memory (of `files` if given) with its own split: first val, then train."""

    distinct = True

    def __init__(self, cfg: DataConfig, files: Files | None = None) -> None:
        self.cfg, self.files, self.name = cfg, files, files.name if files else cfg.source

    @cached_property
    def corpus(self) -> Corpus:
        corpus = load_corpus(self.files or self.cfg.source)
        self.name = corpus.name
        return corpus

    @cached_property
    def split(self) -> dict[str, list[Document]]:
        train, val = split_documents(self.corpus, self.cfg.val_fraction, self.cfg.seed)
        return {"val": val, "train": train}

    @property
    def size(self) -> int:
        return sum(source.bytes for source in self.corpus.sources)

    def fingerprint(self) -> str:
        return fingerprint(self.files or self.cfg.source)

    def about(self, source: str) -> tuple[str, str]:
        found = next(own for own in self.corpus.sources if own.name == source)
        return found.licence, found.version

    def reading(self, dropped: Dropped) -> Reading:
        return self.corpus.reading

    def digests(self) -> dict[str, str]:
        return {"": self.corpus.sha256} | {source.name: source.sha256 for source in self.corpus.sources}

    def batches(self, position: Any, characters: int) -> Iterator[DocumentBatch]:
        first, skip = position or ("val", 0)
        for split, documents in self.split.items():
            if split == "val" and first == "train":
                continue
            start = skip if split == first else 0
            for group in readers.grouped(documents[start:], lambda document: len(document.text), characters):
                start += len(group)
                yield DocumentBatch(group, split, [split, start])

    def sample(self, characters: int) -> Iterator[Document]:
        yield from self.split["train"]


class FileStream:
    """Files that are too large for memory or consist of records."""

    distinct = False

    def __init__(self, files: Files) -> None:
        self.files, self.name = files, files.name

    @property
    def size(self) -> int:
        return self.files.bytes

    def fingerprint(self) -> str:
        return self.files.fingerprint()

    def about(self, source: str) -> tuple[str, str]:
        return self.files.licence, self.files.version

    def reading(self, dropped: Dropped) -> Reading:
        return Reading(len(self.files.files), self.files.skipped, dropped)

    def digests(self) -> None:
        return None

    def batches(self, position: Any, characters: int) -> Iterator[DocumentBatch]:
        for batch in self.files.batches(position, characters):
            yield DocumentBatch(self._documents(batch), "", batch.position, empty_file=not batch.records)

    def sample(self, characters: int) -> Iterator[Document]:
        """The beginnings of all files, the same number of characters of each."""
        share = -(-characters // len(self.files.files))
        for number in range(len(self.files.files)):
            room = share
            for batch in self.files.batches([number, 0], min(share, readers.BATCH[1])):
                if batch.position[0] != number or room <= 0:
                    break
                for document in self._documents(batch):
                    yield document
                    room -= len(document.text)

    def _documents(self, batch: readers.RecordBatch) -> list[Document]:
        is_text = readers.kind(self.files.files[batch.position[0]][0]) == "text"
        return [Document(tidy(text) if is_text else text, self.files.source(id), id) for id, text in batch.records]
