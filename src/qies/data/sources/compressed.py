"""Files that may be compressed, opened as bytes; every fault is an error of one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qies.errors import UserError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
MAX_WINDOW = 1 << 31  # largest window of a zstd frame in bytes: the maximum of `zstd --ultra --long=31`
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
_BLOCK = 1 << 12  # compressed bytes per read: 4 bytes of a malicious zstd file expand to up to 128 kB


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def open_file(path: Path) -> IO[bytes]:
    """The decompressed content of a file. Use it inside `reading`, which names the file in errors."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 20)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)
    return opener(path, "rb")


def read_whole(path: Path) -> bytes:
    """The whole content of a file, decompressed. Raises UserError if it cannot be read or is damaged."""
    with reading(path), open_file(path) as file:
        return file.read()


@contextmanager
def reading(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn errors of reading `path`, and errors of the types `damage`, into a UserError of one line."""
    expected: tuple[type[Exception], ...] = (*_DAMAGE, *damage)
    try:
        yield
    except expected as error:
        if isinstance(error, OSError) and error.errno and error.strerror and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"'{path}' cannot be read ({error.strerror}); check its permissions") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = path.suffix.lstrip(".")
        if isinstance(error, NotImplementedError):
            raise UserError(
                f"'{path}' is a {what} file of an unsupported variant ({reason}); convert or exclude it"
            ) from None
        raise UserError(f"'{path}' is a damaged {what} file ({reason}); download it again or exclude it") from None


class _Zstd(io.RawIOBase):
    """The concatenated frames of a zstd file. Raises EOFError if the last is truncated."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError:
            raise UserError("zstd files need the package 'zstandard'; pip install 'qies[hub]'") from None
        self.library, self.path, self.file = zstandard, path, path.open("rb")
        self.packed = self.unpacked = b""
        self.frame: Any = None  # None between frames

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked and self._advance():
            pass
        size = min(len(buffer), len(self.unpacked))
        buffer[:size], self.unpacked = self.unpacked[:size], self.unpacked[size:]
        return size

    def _advance(self) -> bool:
        """Decompress one more block; False at the end of the file."""
        packed = self.packed or self.file.read(_BLOCK)
        self.packed = b""
        if not packed:
            if self.frame is not None:
                raise EOFError("it is truncated")
            return False
        try:
            if self.frame is None:
                packed += self.file.read(max(0, 18 - len(packed)))  # the longest header of a frame
                self._check_window(packed)
                self.frame = self.library.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            self.unpacked = self.frame.decompress(packed)
        except self.library.ZstdError as error:
            raise ValueError(str(error)) from None
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None
        return True

    def _check_window(self, packed: bytes) -> None:
        """Raise UserError if the frame header (RFC 8878, 3.1.1.1) requests too large a window."""
        if packed[:4] != b"\x28\xb5\x2f\xfd" or len(packed) < 6 or packed[4] & 0x20:  # no frame, or no window field
            return
        window = (8 + (packed[5] & 7) << 10 + (packed[5] >> 3)) // 8
        if window > MAX_WINDOW:
            raise UserError(
                f"'{self.path}' needs a window of {window:,} bytes to decompress, above the limit of {MAX_WINDOW:,} "
                "(zstd --long=31); compress it again with a smaller --long"
            )
