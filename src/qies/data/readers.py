"""Files too large for memory as streams: jsonl (.gz, .zst), parquet and plain text, one record after another.

A stream comes in batches, each with the position behind it, from which reading can go on after a kill. Every fault of
a file is one line that names the file and the record.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from qies.errors import UserError, nearest

LONGEST = 1_000_000  # characters above which a text file is cut
SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
LONGEST_LINE = 256_000_000  # bytes above which a line is taken for damage, or for a bomb

BATCH = 512, 1_000_000  # records, characters after which a batch ends: some tenths of a second of tokenising
_EDGE = 1 << 20  # bytes at either end of a file that its fingerprint covers

R = TypeVar("R")
Record = tuple[str, str]
"""(id, text); ids name no machine."""


@dataclass(frozen=True)
class Batch:
    """Some records, and the position (JSON) at which the stream goes on behind them."""

    records: list[Record]
    position: Any


@dataclass(frozen=True)
class Files:
    """The files that a path, a folder (hidden names left out) or a glob names, as one stream in the order of names.

    `licence` and `version` say that nothing is known of them but their fingerprint: names, sizes and the first and
    last MiB of each.
    """

    name: str
    files: tuple[tuple[Path, str], ...]
    text_field: str = "text"
    licence: str = "unknown (files given by the user)"

    @property
    def version(self) -> str:
        return f"files {self.fingerprint()[:16]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, id in self.files:
            with _reading(path, "file"), path.open("rb") as file:
                size = path.stat().st_size
                edges = file.read(_EDGE)
                file.seek(max(size - _EDGE, 0))
                digest.update(json.dumps([id, size, hashlib.sha256(edges + file.read(_EDGE)).hexdigest()]).encode())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """About what they hold: compressed text is four times as long unpacked."""
        return sum(path.stat().st_size * (4 if path.suffix.lower() in COMPRESSED else 1) for path, _ in self.files)

    def fit(self, limit: int) -> bool:
        """Whether they hold at most `limit` bytes unpacked. Compressed files are unpacked to know."""
        packed = []
        for path, _ in self.files:
            if path.suffix.lower() in COMPRESSED:
                packed.append(path)
            else:
                limit -= path.stat().st_size
        for path in packed:
            with _reading(path, path.suffix.lstrip(".")), _open(path) as file:
                while limit >= 0 and (block := file.read(1 << 20)):
                    limit -= len(block)
        return limit >= 0

    @property
    def is_text(self) -> bool:
        """Whether all of them are plain text, compressed or not."""
        return all(kind(path) == "text" for path, _ in self.files)

    def source(self, id: str) -> str:
        """The folder, of the folder named, that a file or record is in; the whole's name where it is in none."""
        folder, slash, _ = id.partition("/")
        return folder if slash else self.name

    def batches(self, position: Any = None, characters: int = BATCH[1]) -> Iterator[Batch]:
        """The stream from `position` (of an earlier batch; None: the beginning). Raises UserError for a bad file.

        A batch ends with the record that makes it at least `characters` long."""
        first, skip = position or (0, 0)
        for number, (path, id) in enumerate(self.files[first:], first):
            texts = _reader(path)(path, self.text_field, skip)
            records = ((f"{id}#{n}", text) for n, text in enumerate(texts, skip))
            done = skip
            for batch in grouped(records, lambda record: len(record[1]), characters):
                done += len(batch)
                yield Batch(batch, [number, done])
            if not done:
                raise UserError(f"'{path}' holds no record; it was perhaps cut off: fetch it again or leave it out")
            skip = 0


def find_files(source: str, text_field: str = "text") -> Files:
    """The files that `source` names. Raises UserError if there is none that can be read."""
    path = Path(source).expanduser()
    if path.is_file():
        if kind(path) is None:
            raise UserError(f"'{path}' is of no known kind; give {', '.join(_known())}")
        return Files(path.name, ((path, path.name),), text_field)
    if path.is_dir():
        root, found = path, _walk(path)
    elif glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = (Path(match) for match in glob.iglob(str(path), recursive=True))
    else:
        raise unknown(source)
    files = {p.relative_to(root).as_posix(): p for p in found if kind(p) and p.is_file()}
    if not files:
        raise UserError(f"'{source}' holds no file of a known kind; give some of {', '.join(_known())}")
    return Files(path.name or path.resolve().name, tuple((files[id], id) for id in sorted(files)), text_field)


def unknown(source: str) -> UserError:
    """The error for a name that stands for no corpus, with what is most like it."""
    try:
        beside = [str(other) for other in Path(source).expanduser().parent.iterdir()]
    except OSError:
        beside = []
    return UserError(
        f"no corpus '{source}': it is neither 'builtin', 'registry', 'hub:OWNER/NAME' nor an existing file, folder or "
        "pattern." + nearest(source, ["builtin", "registry", *beside])
    )


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def kind(path: Path) -> str | None:
    """One of "json", "parquet", "text", or None for a file that is none of these."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    return "json" if suffix in JSON_SUFFIXES else "text" if suffix in SUFFIXES else None


def grouped(records: Iterable[R], length: Callable[[R], int], characters: int = BATCH[1]) -> Iterator[list[R]]:
    """The records in groups of at most 512, or fewer of them if they reach so many characters."""
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
    """The text of a record. Raises UserError naming `where` if it has none, or one that is no Unicode text."""
    if not isinstance(row, dict) or text_field not in row:
        known = f"; it has: {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise UserError(f"{where} has no field '{text_field}'{known}; name the right one with --text-field")
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{where} has a {type(text).__name__}, no text, in '{text_field}'; name another with --text-field"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair, so it is no Unicode text; repair it") from None
    return text


# --- one file


def _known() -> list[str]:
    return [*JSON_SUFFIXES, ".parquet", *SUFFIXES, *(f"with {end}" for end in COMPRESSED)]


def _reader(path: Path) -> Callable[[Path, str, int], Iterator[str]]:
    return {"json": _json_lines, "parquet": _parquet, "text": _text}[kind(path) or "text"]


def _json_lines(path: Path, text_field: str, skip: int) -> Iterator[str]:
    for number, line in enumerate(_lines(path)):
        if number < skip:
            continue
        where = f"'{path}' line {number + 1}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (at its byte {error.start}); repair the file") from None
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not a JSON object; give one object a line") from None
        yield text_of(row, text_field, where)


def _text(path: Path, text_field: str, skip: int) -> Iterator[str]:
    """Pieces of a million characters or a little more, cut at blank lines (at line ends beyond two million)."""
    yield from itertools.islice(_pieces(path), skip, None)


def _pieces(path: Path) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for number, line in enumerate(_lines(path)):
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' line {number + 1} is not UTF-8 (at its byte {error.start}); repair it") from None
        piece.append(text)
        size += len(text)
        if size >= 2 * LONGEST or (size >= LONGEST and not text.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends; those of nothing but white space only in plain text, where they mean something."""
    blank = kind(path) == "text"
    with _reading(path, path.suffix.lstrip(".")), _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"'{path}' line {number} is longer than {LONGEST_LINE} bytes; no document is: repair it"
                )
            if blank or line.strip():
                yield line


def read_whole(path: Path) -> bytes:
    """All of a file, unpacked. Raises UserError for one that cannot be read or is damaged."""
    with _reading(path, path.suffix.lstrip(".")), _open(path) as file:
        return file.read()


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_pyarrow().CompressedInputStream(str(path), "zstd"), 1 << 20)
    return path.open("rb")


def _parquet(path: Path, text_field: str, skip: int) -> Iterator[str]:
    _pyarrow()
    from pyarrow import parquet

    with _reading(path, "parquet"), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            text_of(dict.fromkeys(names), text_field, f"'{path}'")
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


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UserError("parquet and zstd files need the package 'pyarrow'; pip install 'qies[hub]'") from None
    return pyarrow


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Errors of a file as one line."""
    try:
        yield
    except (EOFError, OSError, zlib.error, ValueError) as error:  # pyarrow's errors are OSError or ValueError
        if isinstance(error, OSError) and error.errno and error.strerror and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"'{path}' cannot be read ({error.strerror}); check its permissions") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' is a damaged {what} file ({reason}); fetch it again or leave it out") from None
