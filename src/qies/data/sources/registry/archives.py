"""Files from package archives, read in memory: nothing is written to disk, linked, run or imported.

Wheels and other zip files, tar archives (sdists, npm packages; gzip, bzip2, xz) and Debian packages. An archive is
rejected if a member name escapes it (path traversal) or it decompresses to more than a limit; links and devices are
ignored.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qies.errors import UserError

LIMIT = 2 << 30  # maximum decompressed bytes of an archive
FILE_LIMIT = 1 << 26  # maximum bytes of a file that is read

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
           NotImplementedError)  # fmt: skip


class _Refused(Exception):
    """The reason why an archive is rejected."""


def read_files(path: Path, wanted: Callable[[str], bool], limit: int = LIMIT) -> list[tuple[str, bytes]]:
    """Pairs (name, content) of the regular files whose name is `wanted`, sorted by name.

    Names are those in the archive without a leading "./". Of files with the same name the last is taken, as extraction
    to disk would do.

    Raises UserError: a damaged archive or an unknown format, a name that escapes the archive, more than `limit` bytes
    decompressed, a wanted file of more than 64 MB.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            read = _zip if magic[:2] == b"PK" else _deb if magic == b"!<arch>\n" else _compressed_tar
            return sorted(dict(read(file, wanted, limit)).items())
    except _Refused as error:
        reason = str(error)
    except _DAMAGE as error:
        reason = f"it is damaged ({' '.join(str(error).split()) or type(error).__name__})"
    raise UserError(f"'{path}' is rejected: {reason}; delete it and check where it came from") from None


def _zip(file: IO[bytes], wanted: Callable[[str], bool], limit: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > limit:
            raise _Refused(f"it decompresses to more than {limit} bytes")
        for member in members:
            name = _inside(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind in (0, stat.S_IFREG) and not member.is_dir() and wanted(name):
                # zipfile reads at most the declared size and verifies the checksum
                yield name, archive.read(member) if _small(name, member.file_size) else b""


def _deb(file: IO[bytes], wanted: Callable[[str], bool], limit: int) -> Iterator[tuple[str, bytes]]:
    """The data of a Debian package: an `ar` archive with 60-byte headers and contents padded to an even size."""
    file.read(8)
    while len(header := file.read(60)) == 60:
        if header[58:] != b"`\n":
            raise _Refused("it is damaged (bad header)")
        size = int(header[48:58])
        if header[:16].rstrip(b" /").startswith(b"data.tar"):
            yield from _compressed_tar(io.BytesIO(file.read(min(size, limit))), wanted, limit)
            return
        file.seek(size + size % 2, io.SEEK_CUR)
    raise _Refused("it is damaged (it has no data.tar)")


def _compressed_tar(file: IO[bytes], wanted: Callable[[str], bool], limit: int) -> Iterator[tuple[str, bytes]]:
    magic = file.read(2)
    file.seek(0)
    if magic not in _OPENERS:
        raise _Refused("it is not a zip, a Debian package, or a tar archive in gzip, bzip2 or xz")
    with _OPENERS[magic](file) as plain, tarfile.open(fileobj=_Limited(plain, limit), mode="r|") as archive:
        for member in archive:
            name = _inside(member.name)
            if member.isreg():
                # the standard library's rules for untrusted members, in addition to the check of the name
                tarfile.data_filter(member, ".")
                if wanted(name) and _small(name, member.size):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, content.read()


def _inside(name: str) -> str:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or ":" in name[:2]:
        raise _Refused(f"its member {name[:80]!r} escapes the archive")
    return "/".join(parts)


def _small(name: str, size: int) -> bool:
    if size > FILE_LIMIT:
        raise _Refused(f"its member {name[:80]!r} has more than {FILE_LIMIT} bytes")
    return True


class _Limited(io.RawIOBase):
    """A stream that fails after `limit` bytes, including headers and skipped members."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.stream, self.limit, self.left = stream, limit, limit

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size if 0 <= size <= self.left else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise _Refused(f"it decompresses to more than {self.limit} bytes")
        return data
