"""Records from files: jsonl, JSON arrays, CSV, parquet and plain text, compressed or not.

A file is read in batches, each with the position after it, from which an interrupted build resumes. Every fault of a
file is an error of one line that names the file and the record.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from qies.data.sources.compressed import COMPRESSED, is_compressed, open_file, reading
from qies.errors import UserError

LONGEST = 1_000_000  # characters above which a text file is split
SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}  # and their delimiters
LONGEST_LINE = 256_000_000  # maximum bytes of a line; a longer one is damage or a decompression bomb

_OTHER_FIELD = "name the field with: qies data build SOURCE --text-field NAME"
_OBJECTS = "give one object per line, or one array of objects"

BATCH = 512, 1_000_000  # maximum records and characters of a batch: some tenths of a second of tokenising

R = TypeVar("R")
Record = tuple[str, str]
"""(id, text); ids name no machine."""


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records, and the position (JSON) after them."""

    records: list[Record]
    position: Any


def kind(path: Path) -> str | None:
    """The type of a file: "json", "csv", "parquet" or "text"; None if it is unknown."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    suffix = _suffix(path)
    if suffix in JSON_SUFFIXES:
        return "json"
    return "csv" if suffix in CSV_SUFFIXES else "text" if suffix in SUFFIXES else None


def known_kinds() -> str:
    """A description of the file suffixes that can be read."""
    return f"{', '.join((*SUFFIXES, *JSON_SUFFIXES, *CSV_SUFFIXES))} (also {', '.join(COMPRESSED)}), .parquet"


def read_texts(path: Path, text_field: str, skip: int) -> Iterator[str]:
    """The texts of the records of a file after the first `skip`; "" for a record whose text is null or empty."""
    readers = {"json": _json, "csv": _csv, "parquet": _parquet, "text": _text}
    return readers[kind(path) or "text"](path, text_field, skip)


def grouped(records: Iterable[R], length: Callable[[R], int], characters: int = BATCH[1]) -> Iterator[list[R]]:
    """The records in groups that end at 512 records or at `characters`, whichever comes first."""
    group: list[R] = []
    size = 0
    for record in records:
        group.append(record)
        size += length(record)
        if len(group) == BATCH[0] or size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def text_of(row: Any, text_field: str, where: str) -> str:
    """The text of a record, "" if it is null. Raises UserError naming `where` if the field is missing, not a string, or
    not valid Unicode."""
    if not isinstance(row, dict) or text_field not in row:
        known = f"; it has: {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise UserError(f"{where} has no field '{text_field}'{known}; {_OTHER_FIELD}")
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__}, not text, in '{text_field}'; {_OTHER_FIELD}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} contains an unpaired surrogate, so it is not Unicode text; repair it") from None
    return without_nul(text, where)


def without_nul(text: str, where: str) -> str:
    """`text`. Raises UserError if it contains NUL, which is not text in any format."""
    if "\0" in text:
        raise UserError(f"{where} contains zero bytes (NUL), so it is not text; repair or exclude it")
    return text


# --- one file


def _suffix(path: Path) -> str:
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def _json(path: Path, text_field: str, skip: int) -> Iterator[str]:
    rows = _json_array(path) if _holds_array(path) else _json_lines(path, skip)
    for number, (row, where) in enumerate(rows):
        if number >= skip:
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object; {_OBJECTS}")
            yield text_of(row, text_field, where)


def _holds_array(path: Path) -> bool:
    """Whether the first non-space character of the file opens a JSON array."""
    with reading(path), open_file(path) as file:
        while block := file.read(1 << 10):
            if block := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return block[:1] == b"["
    return False


def _json_lines(path: Path, skip: int) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(_lines(path)):
        where = f"'{path}' line {number + 1}"
        try:
            yield (json.loads(_decoded(line, where, first=True)) if number >= skip else None), where
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not a JSON object; {_OBJECTS}") from None


def _json_array(path: Path) -> Iterator[tuple[Any, str]]:
    """The elements of one array, with only the current one in memory."""
    decoder, number = json.JSONDecoder(), 0
    with reading(path), open_file(path) as file:
        text = _Characters(file, path)
        text.take()
        mark = text.take() if text.peek() == "]" else ","
        while mark != "]":
            number += 1
            where = f"'{path}' record {number}"
            text.peek()
            while True:
                try:
                    row, text.at = decoder.raw_decode(text.buffer, text.at)
                    break
                except (ValueError, RecursionError):
                    if text.peek() != "{" or not text.more():
                        raise UserError(f"{where} is not a JSON object; {_OBJECTS}") from None
            yield row, where
            mark = text.take()
            if mark not in (",", "]"):
                raise UserError(f"'{path}' is truncated or damaged after record {number}; repair the file")
        if text.peek():
            raise UserError(f"'{path}' contains more than one JSON array; {_OBJECTS}")


class _Characters:
    """A buffered reader of characters: `buffer[at:]` comes next, and `more()` reads on."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at = "", 0

    def more(self) -> bool:
        """Double the characters that are buffered; False at the end of the file."""
        left = self.buffer[self.at :]
        if len(left) > LONGEST_LINE:
            raise UserError(f"'{self.path}' has a record of more than {LONGEST_LINE} bytes, the limit; repair it")
        block = self.file.read(max(1 << 16, len(left)))
        try:
            self.buffer, self.at = left + self.decoder.decode(block, final=not block), 0
        except UnicodeDecodeError:
            raise UserError(f"'{self.path}' is not UTF-8; repair the file") from None
        return bool(block)

    def peek(self) -> str:
        """The next non-space character, "" at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self) -> str:
        mark = self.peek()
        self.at += len(mark)
        return mark


def _csv(path: Path, text_field: str, skip: int) -> Iterator[str]:
    """The text column of a table whose first row names the columns."""

    def lines() -> Iterator[str]:
        for number, line in enumerate(_lines(path), 1):
            where = f"'{path}' line {number}"
            yield without_nul(_decoded(line, where, first=number == 1), where)

    csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(lines(), delimiter=CSV_SUFFIXES[_suffix(path)], strict=True)
    try:
        names = next(rows, [])
        _require_one(names, text_field, path)
        for number, row in enumerate(filter(None, rows)):
            where = f"'{path}' line {rows.line_num}"
            if len(row) != len(names):
                raise UserError(f"{where} has {len(row)} fields, but the first line has {len(names)}; repair it")
            if number >= skip:
                yield text_of(dict(zip(names, row, strict=True)), text_field, where)
    except csv.Error as error:
        raise UserError(f"'{path}' line {rows.line_num} is not CSV ({error}); repair the file") from None


def _text(path: Path, text_field: str, skip: int) -> Iterator[str]:
    """Pieces of about a million characters, cut at blank lines (at a line end if two million are reached)."""
    yield from itertools.islice(_pieces(path), skip, None)


def _pieces(path: Path) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for number, line in enumerate(_lines(path)):
        where = f"'{path}' line {number + 1}"
        text = without_nul(_decoded(line, where, first=number == 0), where)
        piece.append(text)
        size += len(text)
        if size >= 2 * LONGEST or (size >= LONGEST and not text.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _require_one(names: list[str], text_field: str, path: Path) -> None:
    """Raise UserError if several columns have that name: the text of all but one would be lost."""
    if (count := names.count(text_field)) > 1:
        raise UserError(f"'{path}' has {count} columns '{text_field}'; rename all but one")


def _decoded(line: bytes, where: str, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (at its byte {error.start}); repair the file") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their line ends. In JSON, where they have no meaning, blank lines are dropped."""
    blank = kind(path) != "json"
    with reading(path), open_file(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"'{path}' line {number} is longer than {LONGEST_LINE} bytes, the limit; repair it")
            if blank or line.strip():
                yield line


def _parquet(path: Path, text_field: str, skip: int) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, BaseExtensionType, parquet, types
    except ModuleNotFoundError:
        raise UserError("parquet files need the package 'pyarrow'; pip install 'qies[hub]'") from None

    with reading(path, ArrowException), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            text_of(dict.fromkeys(names), text_field, f"'{path}'")
        _require_one(names, text_field, path)
        column = file.schema_arrow.field(text_field).type
        column = column.storage_type if isinstance(column, BaseExtensionType) else column
        column = column.value_type if types.is_dictionary(column) else column
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(test(column) for test in tests):  # before conversion: not every Arrow value has a Python equivalent
            raise UserError(f"'{path}' has {column}, not text, in '{text_field}'; {_OTHER_FIELD}")
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start + rows > skip:
                row = start
                for batch in file.iter_batches(BATCH[0], row_groups=[group], columns=[text_field]):
                    for text in batch.column(0).to_pylist():
                        if row >= skip:
                            yield text_of({text_field: text}, text_field, f"'{path}' row {row + 1}")
                        row += 1
            start += rows
