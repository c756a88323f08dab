"""The files that a path, a folder or a pattern names, and which of them are skipped and why."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qies.data.manifest import Skipped
from qies.data.sources import readers
from qies.data.sources.compressed import is_compressed, open_file, reading
from qies.data.sources.readers import BATCH, RecordBatch, grouped, kind, known_kinds
from qies.errors import UserError

# Plain text files with these names describe the records beside them.
_ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "contributing", "authors",
          "datacard", "dataset_card")  # fmt: skip
_EDGE = 1 << 20  # bytes at each end of a file that its fingerprint covers
_EXAMPLES = 10  # names of skipped files recorded per reason

Named = tuple[tuple[Path, str], ...]
"""Pairs (path, id); an id is the path relative to the source, with `/`, and names no machine."""


@dataclass(frozen=True)
class Files:
    """The files of a source as one stream in the order of their ids, and the `skipped` files.

    Their version is their fingerprint: names, sizes, and the first and last MiB of each.
    """

    name: str
    files: Named
    text_field: str = "text"
    skipped: tuple[Skipped, ...] = ()
    licence: str = "unknown (files given by the user)"

    @property
    def version(self) -> str:
        return f"files {self.fingerprint()[:16]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, id in self.files:
            with reading(path), path.open("rb") as file:
                size = path.stat().st_size
                edges = file.read(_EDGE)
                file.seek(max(size - _EDGE, 0))
                digest.update(json.dumps([id, size, hashlib.sha256(edges + file.read(_EDGE)).hexdigest()]).encode())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Approximate size of the content; compressed text is taken to expand by a factor of four."""
        return sum(path.stat().st_size * (4 if is_compressed(path) else 1) for path, _ in self.files)

    def fit(self, limit: int) -> bool:
        """Whether the content has at most `limit` bytes. Compressed files are decompressed to find out."""
        packed = []
        for path, _ in self.files:
            if is_compressed(path):
                packed.append(path)
            else:
                limit -= path.stat().st_size
        for path in packed:
            with reading(path), open_file(path) as file:
                while limit >= 0 and (block := file.read(1 << 20)):
                    limit -= len(block)
        return limit >= 0

    @property
    def is_text(self) -> bool:
        """Whether all files are plain text, compressed or not."""
        return all(kind(path) == "text" for path, _ in self.files)

    def source(self, id: str) -> str:
        """The source of a file or record: the name of its top subfolder, or of the whole if it is in none."""
        folder, slash, _ = id.partition("/")
        return folder if slash else self.name

    def batches(self, position: Any = None, characters: int = BATCH[1]) -> Iterator[RecordBatch]:
        """The stream from `position` (of an earlier batch; None: the start). Raises UserError for a bad file.

        A batch ends with the record that makes it at least `characters` long. A file without records gives one empty
        batch; a source without any record is an error.
        """
        first, skip = position or (0, 0)
        empty = position is None
        for number, (path, id) in enumerate(self.files[first:], first):
            texts = readers.read_texts(path, self.text_field, skip)
            records = ((f"{id}#{n}", text) for n, text in enumerate(texts, skip))
            done = skip
            for batch in grouped(records, lambda record: len(record[1]), characters):
                done += len(batch)
                yield RecordBatch(batch, [number, done])
            if done:
                empty = False
            elif empty and number == len(self.files) - 1:
                raise UserError(f"'{path}' contains no record; it may be truncated: download it again or exclude it")
            else:
                yield RecordBatch([], [number, 0])
            skip = 0


def find_files(
    source: str, text_field: str = "text", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Files:
    """The files that `source` names: a file, all files below a folder (following links), or the matches of a pattern.

    `include` and `exclude` are patterns for ids or file names: files that match one of `include` and none of `exclude`
    are read. Files of an unknown type, hidden names, non-regular files, and README and the like beside files of records
    (unless `include` matches them) are skipped, with the reason in `skipped`.

    Raises UserError: no readable file, a folder that cannot be searched, a name that is not UTF-8.
    """
    if not source:
        raise unknown(source)
    path = Path(os.path.expanduser(source))
    found = _Found(include, exclude)
    if path.is_file():
        require_utf8(path)
        if kind(path) is None:
            raise UserError(f"'{path}' is of an unknown type; give {known_kinds()}")
        return Files(path.name, ((path, path.name),), text_field)
    if path.is_dir():
        found.walk(path)
    elif glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        for match in glob.iglob(str(path), recursive=True):
            below = Path(match)
            id = below.relative_to(root).as_posix()
            if not below.is_dir():
                found.add(below, id)
            elif "**" not in path.parts:
                found.skip("a folder, which a pattern searches only with **", id)
    else:
        raise unknown(source)
    found.drop_descriptions()
    if not found.files:
        reasons = f" ({describe(found.skipped())})" if found.reasons else ""
        raise UserError(f"'{source}' contains no file of a known type{reasons}; give {known_kinds()}")
    files = tuple((found.files[id], id) for id in sorted(found.files))
    for file, _ in files:
        require_utf8(file)
    name = path.name or path.resolve().name
    require_utf8(Path(name))
    return Files(name, files, text_field, found.skipped())


def is_below(out: Path, source: str) -> bool:
    """Whether files written into `out` would be among the files that `source` names."""
    kind, _, rest = source.partition(":")
    path, out = Path(os.path.expanduser(rest.partition(":")[0] if kind == "hub" else source)), out.absolute()
    if path.is_dir():
        return out.resolve().is_relative_to(path.resolve())
    if not glob.has_magic(source):
        return False
    parts = path.absolute().parts
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    if not out.resolve().is_relative_to(root.resolve()):
        return False
    if "**" in parts:
        return True
    pattern = str(Path(root.resolve(), *parts[len(root.parts) :]))
    written = ("manifest.json", "progress.json", "tokenizer/tokenizer.json", "run.json", "data/manifest.json")
    return any(PurePosixPath(out.resolve(), name).match(pattern) for name in written)


def require_utf8(path: Path) -> None:
    """Raise UserError for a path that is not UTF-8: it can neither be stored in a manifest nor printed."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UserError(f"the name '{name}' is not UTF-8; rename it") from None


def describe(skipped: Sequence[Skipped]) -> str:
    """A description of skipped files: the number for each reason, and their first names."""
    return "; ".join(
        f"{row.files:,} {row.reason}: {', '.join(row.first[:3])}{', ...' if row.files > 3 else ''}" for row in skipped
    )


def unknown(source: str) -> UserError:
    """The error for a name that is not a corpus, with the most similar name."""
    path = Path(os.path.expanduser(source))
    known = {name: name for name in ("builtin", "builtin-stories", "registry", "registry-dedup")}
    with contextlib.suppress(OSError):
        known |= {other.name: str(other) for other in path.parent.iterdir() if other.is_dir() or kind(other)}
    close = difflib.get_close_matches(path.name, known, n=1, cutoff=0.5)
    return UserError(
        f"no corpus '{source}': it is neither 'builtin', 'registry', 'hub:OWNER/NAME' nor an existing file, folder or "
        "pattern." + (f" Did you mean '{known[close[0]]}'?" if close else "")
    )


class _Found:
    """Files found so far, by id, and skipped files, by reason."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.include, self.exclude = include, exclude
        self.files: dict[str, Path] = {}
        self.reasons: dict[str, list[str]] = {}

    def skip(self, reason: str, id: str) -> None:
        self.reasons.setdefault(reason, []).append(os.fsencode(id).decode("utf-8", "backslashreplace"))

    def add(self, path: Path, id: str) -> None:
        if self.include and not _matches(id, self.include):
            self.skip("not among --include", id)
        elif _matches(id, self.exclude):
            self.skip("excluded by --exclude", id)
        elif not path.is_file():
            self.skip("not a regular file, or a broken link", id)
        elif kind(path) is None:
            self.skip("of unknown type", id)
        else:
            self.files[id] = path

    def walk(self, root: Path) -> None:
        """Add every file below `root`, following links to folders, each folder once."""

        def fail(error: OSError) -> None:
            raise UserError(
                f"the folder '{error.filename}' cannot be searched ({error.strerror}); check its permissions or "
                "exclude it"
            )

        seen = {os.path.realpath(root)}
        for parent, folders, names in os.walk(root, onerror=fail, followlinks=True):
            at = Path(parent).relative_to(root)
            kept = []
            for name in sorted(folders):
                real = os.path.realpath(os.path.join(parent, name))
                if name.startswith("."):
                    self.skip("hidden", f"{(at / name).as_posix()}/")
                elif real in seen:
                    self.skip("a link to a folder that is already read", (at / name).as_posix())
                else:
                    seen.add(real)
                    kept.append(name)
            folders[:] = kept
            for name in names:
                id = (at / name).as_posix()
                if name.startswith("."):
                    self.skip("hidden", id)
                else:
                    self.add(Path(parent, name), id)

    def drop_descriptions(self) -> None:
        """Skip README and the like if there are records."""
        if self.include or all(kind(path) == "text" for path in self.files.values()):
            return
        for id, path in list(self.files.items()):
            if kind(path) == "text" and path.name.lower().partition(".")[0] in _ABOUT:
                del self.files[id]
                self.skip("descriptions of the records beside them", id)

    def skipped(self) -> tuple[Skipped, ...]:
        return tuple(
            Skipped(reason, len(ids), tuple(sorted(ids)[:_EXAMPLES])) for reason, ids in sorted(self.reasons.items())
        )


def _matches(id: str, patterns: Sequence[str]) -> bool:
    name = id.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(id, pattern) or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
