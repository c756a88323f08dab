"""Files as they lie on disk, compressed or not: opened as bytes, with every fault as one line."""

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
MAX_WINDOW = 1 << 31  # bytes of memory a zstd frame may ask for; `zstd --ultra --long=31` writes up to this
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
_BLOCK = 1 << 12  # compressed bytes at a time: a hostile block of zstd unpacks to 128 kB for every 4 bytes


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def open_file(path: Path) -> IO[bytes]:
    """The unpacked content of a file. Use it inside `reading`, which names the file in errors."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 20)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)
    return opener(path, "rb")


def read_whole(path: Path) -> bytes:
    """All of a file, unpacked. Raises UserError for one that cannot be read or is damaged."""
    with reading(path), open_file(path) as file:
        return file.read()


@contextmanager
def reading(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Errors of a file, and those of the types `damage`, as one line."""
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
                f"'{path}' is a {what} file of a kind that cannot be read ({reason}); convert it or leave it out"
            ) from None
        raise UserError(f"'{path}' is a damaged {what} file ({reason}); fetch it again or leave it out") from None


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, one after another. Raises EOFError for one that is cut off."""

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
        """Unpack one more block; False at the end of the file."""
        packed = self.packed or self.file.read(_BLOCK)
        self.packed = b""
        if not packed:
            if self.frame is not None:
                raise EOFError("it was cut off")
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
        """Refuse a frame that asks for too large a window, by the header that RFC 8878 (3.1.1.1) defines."""
        if packed[:4] != b"\x28\xb5\x2f\xfd" or len(packed) < 6 or packed[4] & 0x20:  # no frame, or without the field
            return
        window = (8 + (packed[5] & 7) << 10 + (packed[5] >> 3)) // 8
        if window > MAX_WINDOW:
            raise UserError(
                f"'{self.path}' needs a window of {window:,} bytes to unpack, above the limit of {MAX_WINDOW:,} "
                "(zstd --long=31); compress it again with a smaller --long"
            )
