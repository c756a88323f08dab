"""Token shards: flat integer files that are memory-mapped, and a manifest with their sha256.

A folder holds `train-00000.bin` ..., `val-00000.bin` ... (little-endian uint16, or uint32 for a vocabulary above
65,536; the end token begins each document), `tokenizer/` and `manifest.json`. The manifest is written last: a folder
without one is no data set. `builder.pipeline` writes these folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qies.data import tokenizer as tokenizers
from qies.data.manifest import SPLITS, Manifest, Shard, read_manifest
from qies.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer"
"""The folder of the tokenizer in a folder of shards."""


class Tokens:
    """The tokens of a split as one sequence over all its shards; `tokens[start:stop]` reads a range."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, range_: slice) -> np.ndarray:
        """uint16 or uint32 `[stop - start]`: a view of the file, or a copy if the range crosses shards."""
        start, stop, step = range_.indices(len(self))
        if step != 1:
            raise ValueError("a slice of tokens must have step 1")
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
        """Identifies text, split, tokenizer and tokens; 64 hex digits."""
        return self.manifest.hash

    def tokens(self, split: str) -> Tokens:
        """The memory-mapped tokens of "train" or "val"."""
        return Tokens([_map(self.folder / s.file, self.manifest.dtype) for s in self.manifest.split(split).shards])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the shards were made with."""
        return tokenizers.load_tokenizer(self.folder / TOKENIZER)

    def val_sources(self, tokens: int) -> tuple[np.ndarray, list[str]]:
        """The positions among the first `tokens` tokens of val at which the source changes, and the source from there.

        Both are empty for shards whose manifest predates `val_order`.
        """
        ids = self.tokens("val")[:tokens]
        documents = np.flatnonzero(ids == self.tokenizer().eos_token_id)
        spans = self.manifest.val_order
        first = np.cumsum([0, *(span.documents for span in spans)])[:-1]  # the first document of each span
        begun = int((first < len(documents)).sum())
        return documents[first[:begun]], [span.source for span in spans[:begun]]

    def val_clean(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The start of each document within the first `tokens` tokens of val, int64 `[documents]`, and whether it is
        clean, bool `[documents]`; False if its overlap with train was not measured.
        """
        starts = np.flatnonzero(self.tokens("val")[:tokens] == self.tokenizer().eos_token_id)
        clean = np.zeros(max(len(starts), len(self.manifest.overlap.clean)), dtype=bool)
        clean[: len(self.manifest.overlap.clean)] = self.manifest.overlap.clean
        return starts, clean[: len(starts)]

    def identity(self) -> dict[str, Any]:
        """The description of the data in a run record."""
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
            "val_overlap": m.overlap.share,
        }


def open_shards(folder: Path | str, *, checked: bool = False) -> Shards:
    """Open and verify the data set in `folder`: manifest, tokenizer, and the size, sha256 and token ids of each shard.

    With `checked`, for a folder that another process has just verified, the shards are not read.

    Raises UserError, naming the file, if anything is missing, a link, or differs from the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_tokenizer(folder / TOKENIZER, manifest)
    for split in () if checked else SPLITS:
        for shard in manifest.split(split).shards:
            problem = _problem(folder / shard.file, shard, manifest)
            if problem:
                raise UserError(f"'{folder / shard.file}' {problem}; build the data again in another folder")
    return Shards(folder, manifest)


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    linked = any(path.is_symlink() for path in (folder, *(folder / name for name in tokenizers.FILES)))
    try:
        good = not linked and tokenizers.tokenizer_sha256(folder) == manifest.tokenizer_sha256
    except OSError:
        good = False
    if not good or tokenizers.vocabulary_size(tokenizers.read_tokenizer(folder)) != manifest.vocab_size:
        raise UserError(f"'{folder}' is not the tokenizer of its shards; build the data again in another folder")


def _problem(path: Path, shard: Shard, manifest: Manifest) -> str | None:
    """The fault of the shard at `path`, or None."""
    if path.is_symlink() or not path.is_file():
        return "is missing or a link"
    expected = shard.tokens * little_endian(manifest.dtype).itemsize
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size} bytes, not the {expected} of its manifest"
    tokens = _map(path, manifest.dtype)
    if hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
        return "does not match its sha256"
    highest = int(tokens.max())
    if highest >= manifest.vocab_size:
        return f"holds token {highest}, beyond the vocabulary of {manifest.vocab_size}"
    return None


def little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=little_endian(dtype), mode="r")
