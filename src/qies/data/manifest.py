"""The manifest of a folder of token shards: JSON that is parsed strictly and verified before use."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from qies.config import DataConfig, from_dict, to_dict
from qies.errors import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")  # depending on the vocabulary size
LIMIT = 64_000_000  # largest manifest in bytes; `val_order` takes up to 60 bytes per held-out document
SHARD_NAME = re.compile(r"(train|val)-\d{5}\.bin")

_PROVENANCE = ("hash", "config", "fingerprint", "corpus", "sources", "build", "val_order", "contamination",
               "reading", "overlap")  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One file of tokens; `file` is a name without folders."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Counts:
    """Documents, their UTF-8 bytes, and their tokens including the end token that begins each document."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.documents + other.documents, self.bytes + other.bytes, self.tokens + other.tokens)


@dataclass(frozen=True)
class Split:
    """Train or val as a whole."""

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class SourceRow:
    """One source of the corpus: its licence, the version of what it was read from, its counts in each split."""

    name: str
    licence: str
    version: str
    sha256: str
    train: Counts
    val: Counts


@dataclass(frozen=True)
class Build:
    """Options of `qies data build` other than the `config` of the text.

    `tokenizer` is the name given, "" for one trained on the text; `limit_tokens` 0 means no limit; `pack` is the
    fingerprint of the evaluation pack, "" without one; `include` and `exclude` are patterns for the files of a source.
    """

    text_field: str = "text"
    tokenizer: str = ""
    limit_tokens: int = 0
    pack: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Files of a source that were skipped for one reason, with the first of their names."""

    reason: str
    files: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """What was read and dropped: repeated documents, documents of white space only (and records whose text is null),
    repeated long paragraphs, files without records."""

    repeated: int = 0
    empty: int = 0
    paragraphs: int = 0
    empty_files: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Reading:
    """What was read from a source: the number of files (0 if it has none), those skipped, and what was dropped."""

    files: int = 0
    skipped: tuple[Skipped, ...] = ()
    dropped: Dropped = Dropped()


@dataclass(frozen=True)
class SourceSpan:
    """A number of consecutive documents of one source."""

    source: str
    documents: int


@dataclass(frozen=True)
class PackOverlap:
    """Overlap of the training text with one task of an evaluation pack (see `builder.contamination`)."""

    task: str
    items: int
    short_items: int
    ngrams: int
    overlapping_items: int
    overlapping_ngrams: int
    documents: int


CLEAN = 0.1
"""A held-out document is clean if at most this fraction of its n-grams occurs in train."""


@dataclass(frozen=True)
class ValOverlap:
    """Overlap of val with train (see `builder.overlap`): the number of 13-grams of tokens of each document of val, in
    order, and how many of them occur in train. Later documents of val were not measured."""

    ngrams: tuple[int, ...] = ()
    found: tuple[int, ...] = ()

    @property
    def share(self) -> float | None:
        """Fraction of all measured n-grams that occur in train; None if there are none."""
        return sum(self.found) / sum(self.ngrams) if any(self.ngrams) else None

    @property
    def clean(self) -> tuple[bool, ...]:
        """Whether each measured document is clean; a document without n-grams is."""
        return tuple(found <= CLEAN * ngrams for ngrams, found in zip(self.ngrams, self.found, strict=True))


@dataclass(frozen=True)
class Manifest:
    """The content of a folder of shards.

    `hash` identifies text, split, tokenizer and tokens: two folders with the same hash have the same data. `config`,
    `fingerprint` (see `builder.corpus.fingerprint`), `corpus` (its name) and `sources` describe the origin of the text.
    `val_order` has the source of each document of val, in order, `reading` what was skipped and dropped, `overlap` the
    overlap of val with train (all three are empty in manifests older than the field).
    """

    schema: int
    hash: str
    config: DataConfig
    fingerprint: str
    corpus: str
    corpus_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    train: Split
    val: Split
    sources: tuple[SourceRow, ...]
    build: Build = Build()
    val_order: tuple[SourceSpan, ...] = ()
    contamination: tuple[PackOverlap, ...] = ()
    reading: Reading = Reading()
    overlap: ValOverlap = ValOverlap()

    def split(self, name: str) -> Split:
        """The split "train" or "val". Raises UserError for another name."""
        if name not in SPLITS:
            raise UserError(f"there is no split '{name}'; take one of: {', '.join(SPLITS)}")
        return self.train if name == "train" else self.val

    def sealed(self) -> Manifest:
        """A copy with the `hash` of its content."""
        content = {key: value for key, value in to_dict(self).items() if key not in _PROVENANCE}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return replace(self, hash=hashlib.sha256(text.encode()).hexdigest())


def dtype_for(vocab_size: int) -> str:
    """The smallest of `DTYPES` that can represent every id below `vocab_size`."""
    return DTYPES[0] if vocab_size <= 1 << 16 else DTYPES[1]


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON text; equal manifests give equal text."""
    return json.dumps(to_dict(manifest), indent=1, ensure_ascii=False) + "\n"


def overlap_summary(manifest: Manifest) -> str:
    """The overlap of val with train in one sentence; "" if it was not measured."""
    overlap = manifest.overlap
    if overlap.share is None:
        return ""
    measured, rest = len(overlap.ngrams), manifest.val.documents - len(overlap.ngrams)
    return (
        f"{overlap.share:.1%} of the held-out 13-grams of tokens occur in training; {sum(overlap.clean):,} of "
        f"{measured:,} held-out documents are clean (at most {CLEAN:.0%})"
        + (f"; {rest:,} more were not measured" if rest else "")
    )


def summary(manifest: Manifest) -> str:
    """What was read, skipped, kept and dropped, in one sentence."""
    reading, total = manifest.reading, manifest.train.documents + manifest.val.documents
    parts = [f"read {reading.files:,} files"] if reading.files else []
    parts += [
        f"skipped {row.files:,} {row.reason} ({', '.join(row.first[:3])}{', ...' if row.files > 3 else ''})"
        for row in reading.skipped
    ]
    parts.append(f"kept {total:,} documents")
    names = {
        "repeated": "repeated documents", "empty": "empty or null documents", "paragraphs": "repeated paragraphs",
        "empty_files": "files without a record",
    }  # fmt: skip
    dropped = [f"{count:,} {names[key]}" for key, count in asdict(reading.dropped).items() if count]
    return "; ".join([*parts, f"dropped {', '.join(dropped)}" if dropped else "dropped none"])


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in `folder` and check its consistency (`shards.open_shards` checks the files).

    Raises UserError: no manifest, too large, not JSON, unknown or missing keys, another schema, a file name that is not
    a shard's, counts that do not add up, or a hash that does not match the content.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"'{folder}' holds no data set (no {MANIFEST}); make one with: qies data build SOURCE --out DIR"
        )
    if path.is_symlink() or path.stat().st_size > LIMIT:
        raise UserError(
            f"'{path}' is a link or larger than {LIMIT} bytes, so it is not a manifest; build the data again"
        )
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        manifest = from_dict(Manifest, values)
        _check(manifest)
    except (ValueError, TypeError, OSError, RecursionError, UserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is damaged: {reason.rstrip('.')}; build the data again in another folder") from None
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r} is not one of {', '.join(DTYPES)}")
    for name in SPLITS:
        split = manifest.split(name)
        files = [shard.file for shard in split.shards]
        for file in files:
            if not SHARD_NAME.fullmatch(file) or not file.startswith(name):
                raise ValueError(f"{file!r} is not the name of a {name} shard")
        if len(set(files)) != len(files):
            raise ValueError(f"a {name} shard is listed twice")
        if min((shard.tokens for shard in split.shards), default=0) < 1:
            raise ValueError(f"{name} has no shard, or an empty one")
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            raise ValueError(f"the shards of {name} do not add up to {split.tokens} tokens")
    if manifest.val_order:
        if sum(run.documents for run in manifest.val_order) != manifest.val.documents:
            raise ValueError(f"val_order does not add up to {manifest.val.documents} documents")
        if unknown := {run.source for run in manifest.val_order} - {source.name for source in manifest.sources}:
            raise ValueError(f"val_order names {min(unknown)!r}, which is not among its sources")
    overlap = manifest.overlap
    if len(overlap.ngrams) != len(overlap.found) or len(overlap.ngrams) > manifest.val.documents:
        raise ValueError(f"overlap does not match {manifest.val.documents} documents")
    if any(not 0 <= found <= ngrams for ngrams, found in zip(overlap.ngrams, overlap.found, strict=True)):
        raise ValueError("overlap finds more n-grams than there are")
    if manifest.sealed().hash != manifest.hash:
        raise ValueError("its hash does not match its content")
