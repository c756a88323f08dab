"""Cleaning of documents that are loaded into memory: white space, and what is repeated from earlier documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from qies.data.manifest import Dropped
from qies.data.sources.documents import Document

_PARAGRAPH = 100  # a repeated paragraph of at least so many characters is dropped; shorter ones are stock phrases


def tidy(text: str) -> str:
    """`text` with newlines as line ends, no trailing spaces, at most one blank line in a row and none at the ends."""
    text = "\n".join(map(str.rstrip, text.replace("\r\n", "\n").replace("\r", "\n").split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def text_key(text: str, size: int) -> bytes:
    """A digest of `size` bytes, equal for texts that differ in case and white space only."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=size).digest()


def drop_repeats(documents: Iterable[Document]) -> tuple[list[Document], Dropped]:
    """The documents, tidied, without texts and long paragraphs that occurred earlier, and how many were dropped."""
    texts: set[bytes] = set()
    paragraphs: set[bytes] = set()
    kept_documents, repeated, empty, repeated_paragraphs = [], 0, 0, 0
    for document in documents:
        text = tidy(document.text)
        if not text:
            empty += 1
        elif not _first_time(text, texts):
            repeated += 1
        else:
            parts = text.split("\n\n")
            kept = [part for part in parts if len(part) < _PARAGRAPH or _first_time(part, paragraphs)]
            if kept:
                kept_documents.append(Document("\n\n".join(kept), document.source, document.id))
                repeated_paragraphs += len(parts) - len(kept)
            else:  # all of its paragraphs are repeated
                repeated += 1
    return kept_documents, Dropped(repeated, empty, repeated_paragraphs)


def _first_time(text: str, seen: set[bytes]) -> bool:
    key = text_key(text, 16)
    new = key not in seen
    seen.add(key)
    return new
