"""Contamination of training text with the items of an evaluation pack: common word 13-grams.

Brown et al., "Language Models are Few-Shot Learners" (2020), arXiv:2005.14165, appendix C: texts are compared as
lower-cased words without punctuation, split at white space; an item that shares 13 consecutive words with a training
document counts as overlapping. Here no 13-gram spans two strings of an item, and an item without a string of at least
13 words is counted as short.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qies.data.builder.progress import Progress, Step
from qies.data.hashing import N, hash_ngrams
from qies.data.manifest import PackOverlap
from qies.data.shards import Shards
from qies.data.sources.compressed import read_whole
from qies.data.sources.files import require_utf8
from qies.errors import UserError

_PUNCTUATION = re.compile(r"[^\w\s]|_")


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation."""
    return _PUNCTUATION.sub("", text.lower()).split()


def ngrams(text: str) -> list[str]:
    """Every 13 consecutive words, joined by spaces."""
    found = words(text)
    return [" ".join(found[i : i + N]) for i in range(len(found) - N + 1)]


@dataclass(frozen=True)
class Task:
    """A file of the pack: the set of n-gram numbers of each item (empty for a short item)."""

    name: str
    items: tuple[frozenset[int], ...]


class Pack:
    """The n-grams of an evaluation pack: a folder of `.jsonl` and `.txt` files, each a task, one item per line.

    Raises UserError: no such folder, no files in it, a line that is not JSON, a name that is not UTF-8.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        paths = sorted(p for p in folder.iterdir() if p.suffix in (".jsonl", ".txt")) if folder.is_dir() else []
        if not paths:
            raise UserError(f"'{folder}' is not an evaluation pack; give a folder of .jsonl or .txt files")
        self.numbers: dict[str, int] = {}
        digest = hashlib.sha256()
        tasks, hashes = [], [np.zeros(0, dtype=np.uint64)]
        for path in paths:
            require_utf8(path)
            content = read_whole(path)
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
            tasks.append(Task(path.stem, tuple(self._item(item, hashes) for item in _items(path, content))))
        self.tasks, self.fingerprint = tuple(tasks), digest.hexdigest()
        self._hashes = np.unique(np.concatenate(hashes))
        self.tasks_of: dict[int, set[int]] = {}
        for index, task in enumerate(self.tasks):
            for number in frozenset().union(*task.items):
                self.tasks_of.setdefault(number, set()).add(index)

    def hits(self, text: str) -> list[int]:
        """The sorted numbers of the pack's n-grams that occur in `text`."""
        found = words(text)
        hashes = _rolling(found)
        if not len(hashes) or not len(self._hashes):
            return []
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        candidates = np.flatnonzero(
            self._hashes[place] == hashes
        ).tolist()  # hashes may collide, so the words are compared
        grams = (" ".join(found[i : i + N]) for i in candidates)
        return sorted({self.numbers[gram] for gram in grams if gram in self.numbers})

    def _item(self, strings: list[str], hashes: list[np.ndarray]) -> frozenset[int]:
        hashes += [_rolling(words(text)) for text in strings]
        grams = (gram for text in strings for gram in ngrams(text))
        return frozenset(self.numbers.setdefault(gram, len(self.numbers)) for gram in grams)


@dataclass
class OverlapCount:
    """The overlap of a pack with the documents added so far: n-grams found, and documents that overlap by task."""

    found: set[int] = field(default_factory=set)
    documents: dict[str, int] = field(default_factory=dict)

    def add(self, pack: Pack, hits: Iterable[int]) -> None:
        """Add the n-grams of one training document."""
        hits = set(hits)
        self.found |= hits
        for index in sorted(set().union(*(pack.tasks_of[number] for number in hits))):
            name = pack.tasks[index].name
            self.documents[name] = self.documents.get(name, 0) + 1

    def result(self, pack: Pack) -> tuple[PackOverlap, ...]:
        """One row per task."""
        rows = []
        for task in pack.tasks:
            grams = frozenset().union(*task.items)
            rows.append(
                PackOverlap(
                    task=task.name,
                    items=len(task.items),
                    short_items=sum(not item for item in task.items),
                    ngrams=len(grams),
                    overlapping_items=sum(not item.isdisjoint(self.found) for item in task.items),
                    overlapping_ngrams=len(grams & self.found),
                    documents=self.documents.get(task.name, 0),
                )
            )
        return tuple(rows)


def shards_overlap(shards: Shards, folder: Path, progress: Progress) -> tuple[PackOverlap, ...]:
    """The overlap of the training documents in shards, which are decoded, with the pack in `folder`."""
    pack, count = Pack(folder), OverlapCount()
    tokens, tokenizer = shards.tokens("train"), shards.tokenizer()
    parts = zip(tokens.parts, tokens.starts.tolist(), strict=False)
    starts = np.concatenate([np.flatnonzero(part == tokenizer.eos_token_id) + first for part, first in parts])
    for number, (start, stop) in enumerate(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens)], strict=True), 1):
        text = tokenizer.decode(tokens[start + 1 : stop].tolist(), clean_up_tokenization_spaces=False)
        count.add(pack, pack.hits(text))
        if number % 100 == 0 or number == len(starts):
            progress(Step("comparing", stop, len(tokens), number, stop))
    return count.result(pack)


def _rolling(found: list[str]) -> np.ndarray:
    """A 64-bit hash of every 13 consecutive words, uint64; equal only within a process."""
    return hash_ngrams(np.fromiter(map(hash, found), dtype=np.int64, count=len(found)).view(np.uint64))


def _items(path: Path, content: bytes) -> Iterator[list[str]]:
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text; repair or remove it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield [line]
            continue
        try:
            yield list(_strings(json.loads(line)))
        except (ValueError, RecursionError):
            raise UserError(f"'{path}' line {number} is not JSON; give one item per line") from None


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
