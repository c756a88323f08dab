"""What a build reads: any source as batches of documents, each with the position from which reading can go on.

Text that fits into memory (`builtin`, `registry`, plain text files) is loaded, cleaned and split by `corpora`. Records
(jsonl, parquet, a data set of the hub) and more plain text than that are read as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from qies.config import DataConfig, is_path
from qies.data.builder import corpus as corpora
from qies.data.builder.corpus import Corpus, Document
from qies.data.manifest import Build, Dropped, Reading
from qies.data.sources import readers
from qies.data.sources.files import Files, find_files
from qies.data.sources.hub import HubStream
from qies.errors import UserError

IN_MEMORY = 1_000_000_000  # bytes of plain text files up to which they are loaded


@dataclass(frozen=True)
class Batch:
    """Some documents, all of `split` ("" where their hashes are to decide), and the position (JSON) behind them."""

    documents: list[Document]
    split: str
    position: Any
    empty_file: bool = False
    """Whether it stands for a file without a record."""


class Stream(Protocol):
    """Documents of one or more sources; `size` is about their bytes, 0 if unknown."""

    name: str

    @property
    def size(self) -> int: ...
    @property
    def distinct(self) -> bool: ...  # whether repeated documents are dropped already
    def fingerprint(self) -> str: ...
    def about(self, source: str) -> tuple[str, str]: ...  # its licence and version
    def reading(self, dropped: Dropped) -> Reading: ...  # with what was dropped of its batches
    def digests(self) -> dict[str, str] | None: ...  # sha256 of "" (the whole) and of each source, where known ahead
    def batches(self, position: Any, characters: int) -> Iterator[Batch]: ...
    def sample(self, characters: int) -> Iterator[Document]: ...  # about so much of training's text


def open_stream(cfg: DataConfig, build: Build = Build()) -> Stream:  # noqa: B008 (it is frozen)
    """The stream that `cfg.source` names. Raises UserError if there is none."""
    kind, _, rest = cfg.source.partition(":")
    named = not is_path(cfg.source)
    if named and (build.include or build.exclude):
        raise UserError(f"--include and --exclude choose among files, and '{cfg.source}' is none; leave them out")
    if kind == "hub":
        return HubStream(rest, build.text_field, val_characters=round(5 * cfg.val_fraction * build.limit_tokens))
    if named:
        return Loaded(cfg)
    files = find_files(cfg.source, build.text_field, build.include, build.exclude)
    return Loaded(cfg, files) if files.is_text and files.fit(IN_MEMORY) else FileStream(files)


class Loaded:
    """A corpus in memory (of `files` where they are given), with its own split: first validation, then training."""

    distinct = True

    def __init__(self, cfg: DataConfig, files: Files | None = None) -> None:
        self.cfg, self.files, self.name = cfg, files, files.name if files else cfg.source

    @cached_property
    def corpus(self) -> Corpus:
        corpus = corpora.load_corpus(self.files or self.cfg.source)
        self.name = corpus.name
        return corpus

    @cached_property
    def split(self) -> dict[str, list[Document]]:
        train, val = corpora.split_documents(self.corpus, self.cfg.val_fraction, self.cfg.seed)
        return {"val": val, "train": train}

    @property
    def size(self) -> int:
        return sum(source.bytes for source in self.corpus.sources)

    def fingerprint(self) -> str:
        return corpora.fingerprint(self.files or self.cfg.source)

    def about(self, source: str) -> tuple[str, str]:
        found = next(own for own in self.corpus.sources if own.name == source)
        return found.licence, found.version

    def reading(self, dropped: Dropped) -> Reading:
        return self.corpus.reading

    def digests(self) -> dict[str, str]:
        return {"": self.corpus.sha256} | {source.name: source.sha256 for source in self.corpus.sources}

    def batches(self, position: Any, characters: int) -> Iterator[Batch]:
        first, skip = position or ("val", 0)
        for split, documents in self.split.items():
            if split == "val" and first == "train":
                continue
            start = skip if split == first else 0
            for group in readers.grouped(documents[start:], lambda document: len(document.text), characters):
                start += len(group)
                yield Batch(group, split, [split, start])

    def sample(self, characters: int) -> Iterator[Document]:
        yield from self.split["train"]


class FileStream:
    """Files too large for memory, or of records."""

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

    def batches(self, position: Any, characters: int) -> Iterator[Batch]:
        for batch in self.files.batches(position, characters):
            yield Batch(self._documents(batch), "", batch.position, empty_file=not batch.records)

    def sample(self, characters: int) -> Iterator[Document]:
        """The beginnings of all files, as much of each."""
        share = -(-characters // len(self.files.files))
        for number in range(len(self.files.files)):
            room = share
            for batch in self.files.batches([number, 0], min(share, readers.BATCH[1])):
                if batch.position[0] != number or room <= 0:
                    break
                for document in self._documents(batch):
                    yield document
                    room -= len(document.text)

    def _documents(self, batch: readers.Batch) -> list[Document]:
        tidy = corpora.tidy if readers.kind(self.files.files[batch.position[0]][0]) == "text" else str
        return [Document(tidy(text), self.files.source(id), id) for id, text in batch.records]
