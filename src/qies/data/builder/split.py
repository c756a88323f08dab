"""The split into train and val, by document, reproducible from a seed."""

from __future__ import annotations

import hashlib
from collections import Counter

from qies.data.builder.corpus import Corpus
from qies.data.hashing import sha256_of_parts
from qies.data.sources.documents import Document
from qies.errors import UserError


def split_hash(text: str, seed: int) -> int:
    """A hash below 2^64 of `seed` and `text`. A stream holds a document out if it is below a threshold."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big")


def split_documents(corpus: Corpus, val_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(train, val): whole documents and whole groups; every source with at least two groups is in both.

    Groups are visited in the order of the smallest hash of (seed, id, text) among their documents. A group goes to val
    if it fits into what is left of `val_fraction` of the bytes of each of its sources. If no group of a source fits,
    val gets the shortest of its groups that does not contain all documents of some source. Train keeps the order of the
    corpus, as its windows are shuffled. Val, which is read in order and perhaps only in part, interleaves the sources
    in proportion to their sizes.

    Raises UserError if train or val would be empty.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction} is not between 0 and 1; give the fraction of text to hold out")
    documents = corpus.documents
    sizes = [len(document.text.encode()) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: _order_key(seed, documents[i]))
    groups: dict[int, list[int]] = {}
    for i in order:
        groups.setdefault(corpus.groups[i] if corpus.groups else i, []).append(i)
    left = Counter(document.source for document in documents)  # documents of each source that are not in val
    room = {source.name: val_fraction * source.bytes if left[source.name] > 1 else 0.0 for source in corpus.sources}
    held_out: set[int] = set()

    def hold_out(group: list[int]) -> None:
        held_out.update(group)
        left.subtract(documents[i].source for i in group)

    for group in groups.values():
        need: Counter[str] = Counter()
        for i in group:
            need[documents[i].source] += sizes[i]
        if all(size <= room[name] for name, size in need.items()):
            hold_out(group)
            for name, size in need.items():
                room[name] -= size
    for source in corpus.sources:
        if left[source.name] == source.documents:
            possible = [
                group
                for group in groups.values()
                if any(documents[i].source == source.name for i in group)
                and all(n < left[name] for name, n in Counter(documents[i].source for i in group).items())
            ]
            if possible:
                hold_out(min(possible, key=lambda group: sum(sizes[i] for i in group)))
    place: dict[int, float] = {}  # rank in val: the held-out fraction of its source before its middle
    for source in corpus.sources:
        own = [i for i in order if i in held_out and documents[i].source == source.name]
        total, before = sum(sizes[i] for i in own), 0
        for i in own:
            place[i] = (before + sizes[i] / 2) / total
            before += sizes[i]
    train = [document for i, document in enumerate(documents) if i not in held_out]
    val = [documents[i] for i in sorted(sorted(held_out), key=place.__getitem__)]
    if not train or not val:
        raise UserError(f"corpus '{corpus.name}' is too short to hold a document out for validation; give more text")
    return train, val


def _order_key(seed: int, document: Document) -> str:
    return sha256_of_parts([str(seed).encode(), document.id.encode(), document.text.encode()])
