"""Files that are either whole and on disk or not there, and a folder that one process at a time may fill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qies.errors import UserError


def make_folder(path: Path) -> None:
    """Make a folder and those above it unless they are there, not writable by everyone whatever the umask.

    A run refuses a folder that anyone may write. Raises OSError.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            folder.mkdir(mode=0o775, exist_ok=True)


def follow_umask(path: Path) -> None:
    """Give a file that a library made for its owner alone the mode that new files have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def exclusive(out: Path, marker: str) -> Iterator[None]:
    """Hold the folder `out` alone, made if need be. A file `marker` is there meanwhile, and stays if the body fails.

    Raises UserError if the body meets a full disk or a folder it may not write.
    """
    try:
        make_folder(out)
        with (out / marker).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
            (out / marker).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}); free space or give another folder") from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, complete and on disk, when the body ends well."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
