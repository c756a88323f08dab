"""Text files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from qies.errors import UserError


def require_writable(path: Path) -> None:
    """Raise UserError unless `path` can be written: it is asked before work is spent on what goes there.

    Permissions alone do not tell on a file system that is read-only, so a file is made beside `path` and deleted.
    """
    try:
        if _in_place(path):
            path.open("ab").close()
        else:
            partial = _partial(path)
            partial.open("wb").close()
            partial.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another place.") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all: to a temporary name beside `path`, renamed into place.

    What is no regular file (a device, a pipe, a link such as /dev/stdout) is written to and never replaced. Raises
    OSError, with `path` as its file name.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes as `write_text` writes text."""
    partial = _partial(path)
    try:
        if _in_place(path):
            path.write_bytes(data)
        else:
            partial.write_bytes(data)
            os.replace(partial, path)
    except OSError as error:  # of a full disk it names no file
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _in_place(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir())


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
