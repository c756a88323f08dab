"""Token shards: flat integer files that can be memory-mapped, with a manifest that proves that they are whole.

A folder holds `train-00000.bin` ..., `val-00000.bin` ... (little-endian uint16, or uint32 for a vocabulary above
65,536; `<|endoftext|>` begins each document), `tokenizer/` and `manifest.json`. Files are written under temporary
names, flushed to disk and renamed, the manifest last: a folder without one is no data set, and a build that was cut
off is done anew by calling it again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from qies.config import DataConfig, differences, to_dict
from qies.data import tokenizer as bpe
from qies.data.corpora import Document, fingerprint, load_corpus, split_documents
from qies.data.files import exclusive, replacing, sync
from qies.data.manifest import (
    MANIFEST,
    SCHEMA,
    SPLITS,
    Counts,
    Manifest,
    Shard,
    SourceRow,
    Split,
    dtype_for,
    dumps,
    read_manifest,
)
from qies.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer"
SHARD_TOKENS = 1 << 27  # tokens in a full shard: 256 MB in uint16

_MARKER = ".building"  # there while a build is on or was cut off; its lock makes a second build wait
_OWN = re.compile(r"(train|val)-\d{5}\.bin(\.tmp)?|tokenizer(\.tmp)?|manifest\.json\.tmp")

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, of how much)."""


class Tokens:
    """The tokens of a split as one sequence, whatever the number of shards; `tokens[start:stop]` reads some."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, range_: slice) -> np.ndarray:
        """uint16 or uint32 `[stop - start]`: a view of the file, or a copy where shards meet."""
        start, stop, step = range_.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read without a step")
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self.parts, self.starts.tolist(), strict=False)
            if first < stop and first + len(part) > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.parts[0][:0], *pieces])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)


@dataclass(frozen=True)
class Shards:
    """An opened and checked data set."""

    folder: Path
    manifest: Manifest

    @property
    def hash(self) -> str:
        """The identity of text, split, tokenizer and tokens, 64 hex digits."""
        return self.manifest.hash

    def tokens(self, split: str) -> Tokens:
        """The memory-mapped tokens of "train" or "val"."""
        return Tokens([_map(self.folder / s.file, self.manifest.dtype) for s in self.manifest.split(split).shards])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the shards were made with."""
        return bpe.load_tokenizer(self.folder / TOKENIZER)

    def identity(self) -> dict[str, Any]:
        """What a run record says of its data."""
        m = self.manifest
        return {
            "hash": m.hash,
            "source": m.corpus,
            "corpus_sha256": m.corpus_sha256,
            "tokenizer_sha256": m.tokenizer_sha256,
            "vocab_size": m.vocab_size,
            "train_tokens": m.train.tokens,
            "val_tokens": m.val.tokens,
            "val_bytes": m.val.bytes,
        }


def open_shards(folder: Path | str) -> Shards:
    """The data set in `folder`, after a look at all of it: manifest, tokenizer, and each shard's size, sha256 and ids.

    Raises UserError, naming the file, if anything is missing, linked to elsewhere, or not what the manifest says.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_tokenizer(folder / TOKENIZER, manifest)
    for split in SPLITS:
        for shard in manifest.split(split).shards:
            problem = _problem(folder / shard.file, shard, manifest)
            if problem:
                raise UserError(f"'{folder / shard.file}' {problem}; build the data again in another folder")
    return Shards(folder, manifest)


def build_shards(
    cfg: DataConfig, out: Path | str, *, progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS
) -> Manifest:
    """Read the corpus that `cfg` names, split it by document, train the tokenizer on the train split, write shards.

    A folder that holds this data set already is checked and left as it is. The same text and `cfg` give the same files,
    bit for bit. A second build of the same folder waits for the first.

    Raises UserError: whatever `load_corpus`, `split_documents` and `train_tokenizer` object to, a folder that holds
    other data or other files, one that cannot be written.
    """
    out = Path(out)
    tell = progress or (lambda what, done, of: None)
    if (done := _existing(cfg, out)) is not None:
        return done
    tell("reading text", 0, 1)
    identity = fingerprint(cfg.source)
    corpus = load_corpus(cfg.source)
    documents = dict(zip(SPLITS, split_documents(corpus, cfg.val_fraction, cfg.seed), strict=True))
    tell("training tokenizer", 0, 1)
    tokenizer = bpe.train_tokenizer([document.text for document in documents["train"]], cfg.vocab_size)
    with exclusive(out, _MARKER):
        if (done := _existing(cfg, out)) is not None:  # built by another process meanwhile
            return done
        _clear(out)
        _save_tokenizer(tokenizer, out)
        dtype = dtype_for(tokenizer.get_vocab_size())
        splits, counts = {}, {}
        for name in SPLITS:
            writer = _Writer(out, name, dtype, shard_tokens)
            counts[name] = _write_documents(writer, documents[name], tokenizer, tell)
            total = sum(counts[name].values(), Counts())
            splits[name] = Split(total.documents, total.bytes, total.tokens, tuple(writer.close()))
        manifest = Manifest(
            schema=SCHEMA,
            hash="",
            config=cfg,
            fingerprint=identity,
            corpus=corpus.name,
            corpus_sha256=corpus.sha256,
            tokenizer_sha256=bpe.tokenizer_sha256(out / TOKENIZER),
            vocab_size=tokenizer.get_vocab_size(),
            dtype=dtype,
            train=splits["train"],
            val=splits["val"],
            sources=tuple(
                SourceRow(
                    s.name,
                    s.licence,
                    s.version,
                    s.sha256,
                    train=counts["train"].get(s.name, Counts()),
                    val=counts["val"].get(s.name, Counts()),
                )
                for s in corpus.sources
            ),
        ).sealed()
        with replacing(out / MANIFEST) as file:
            file.write(dumps(manifest).encode())
    return manifest


def _write_documents(
    writer: _Writer, documents: Sequence[Document], tokenizer: Tokenizer, tell: Progress
) -> dict[str, Counts]:
    """Encode and write `documents`; what each source among them came to."""
    lengths = bpe.token_byte_lengths(tokenizer)
    counts: dict[str, Counts] = {}
    done, total = 0, sum(len(document.text) for document in documents)
    tell(f"encoding {writer.split}", done, total)
    encoded = bpe.encode_texts(tokenizer, [document.text for document in documents])
    for document, ids in zip(documents, encoded, strict=True):
        size = len(document.text.encode())
        if lengths[ids].sum() != size:
            raise RuntimeError(f"the tokens of document {document.id!r} do not add up to its bytes")
        counts[document.source] = counts.get(document.source, Counts()) + Counts(1, size, len(ids) + 1)
        writer.append(np.concatenate([[bpe.END_ID], ids]))
        done += len(document.text)
        tell(f"encoding {writer.split}", done, total)
    return counts


class _Writer:
    """Cuts a stream of tokens into shards of `capacity` tokens, the last one shorter."""

    def __init__(self, folder: Path, split: str, dtype: str, capacity: int) -> None:
        self.folder, self.split, self.dtype, self.capacity = folder, split, _little_endian(dtype), capacity
        self.shards: list[Shard] = []
        self.pending: list[np.ndarray] = []
        self.room = capacity

    def append(self, ids: np.ndarray) -> None:
        ids = ids.astype(self.dtype)
        while len(ids) >= self.room:
            self.pending.append(ids[: self.room])
            ids = ids[self.room :]
            self._flush()
        self.pending.append(ids)
        self.room -= len(ids)

    def close(self) -> list[Shard]:
        """Every shard written."""
        if self.room < self.capacity:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        data = np.concatenate(self.pending)
        name = f"{self.split}-{len(self.shards):05d}.bin"
        with replacing(self.folder / name) as file:
            file.write(data.data)
        self.shards.append(Shard(name, len(data), hashlib.sha256(data.data).hexdigest()))
        self.pending, self.room = [], self.capacity


# --- checking


def _existing(cfg: DataConfig, out: Path) -> Manifest | None:
    """The manifest of the data set of `cfg` in `out`; None if nothing is in the way of making it there."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"'{out}' is a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    if MANIFEST in names:
        manifest = open_shards(out).manifest
        other = differences(to_dict(manifest.config), to_dict(cfg))
        if not other and fingerprint(cfg.source) != manifest.fingerprint:
            other = ["its text, or the packages it is read from, have changed"]
        if other:
            raise UserError(f"'{out}' holds other data ({'; '.join(other)}); give another folder")
        return manifest
    foreign = [name for name in names if name != _MARKER and not (_MARKER in names and _OWN.fullmatch(name))]
    if foreign:
        raise UserError(f"'{out}' holds other files ('{foreign[0]}'); give a new or an empty folder")
    return None


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    linked = any(path.is_symlink() for path in (folder, *(folder / name for name in bpe.FILES)))
    try:
        good = not linked and bpe.tokenizer_sha256(folder) == manifest.tokenizer_sha256
    except OSError:
        good = False
    if not good or bpe.read_tokenizer(folder).get_vocab_size() != manifest.vocab_size:
        raise UserError(f"'{folder}' is not the tokenizer of its shards; build the data again in another folder")


def _problem(path: Path, shard: Shard, manifest: Manifest) -> str | None:
    """What is wrong with the shard at `path`, or None."""
    if path.is_symlink() or not path.is_file():
        return "is missing or a link"
    expected = shard.tokens * _little_endian(manifest.dtype).itemsize
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size} bytes, not the {expected} of its manifest"
    tokens = _map(path, manifest.dtype)
    if hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
        return "does not match its sha256"
    highest = int(tokens.max())
    if highest >= manifest.vocab_size:
        return f"holds token {highest}, beyond the vocabulary of {manifest.vocab_size}"
    return None


# --- files


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=_little_endian(dtype), mode="r")


def _clear(out: Path) -> None:
    """Remove what a build that was cut off left behind."""
    for path in out.iterdir():
        if _OWN.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    temporary = out / f"{TOKENIZER}.tmp"
    bpe.save_tokenizer(tokenizer, temporary)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    os.replace(temporary, out / TOKENIZER)
    sync(out)
