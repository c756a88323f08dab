"""Files and directories: atomic writes, create-once, bounded reads and locks.

A file written here is complete or as it was before, also after a kill or a loss of power: the content goes to a
temporary file in the same directory, is flushed to disk, and is renamed into place.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from qies.errors import UserError

TEMPORARY = ".tmp"  # suffix of what is not complete yet


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a killed write left behind."""
    return name.endswith(TEMPORARY)


# --- writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that atomically takes the place of `path`, flushed to disk, when the body ends without an error.

    After an error `path` is as it was before and the temporary file is deleted. Raises OSError.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically.

    A device, a pipe or a symbolic link such as /dev/stdout is written to and not replaced. Raises OSError with `path`
    as its file name.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically, as `write_text` writes text."""
    try:
        if _in_place(path):
            path.write_bytes(data)
        else:
            with replacing(path) as file:
                file.write(data)
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, as `write_text` does. NaN and infinity raise ValueError: JSON has neither."""
    write_text(path, dumps(value))


def dumps(value: Any) -> str:
    """JSON as every file of this package has it: indented by one space, without NaN and infinity."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def create(path: Path, text: str) -> bool:
    """Write UTF-8 text to `path` unless it exists; returns whether this call created it.

    Of any number of processes that try, on any number of hosts, one succeeds, and no reader sees a part of the text:
    the complete file is linked to its name by link(2), which fails where the name exists.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def publish(complete: Path, path: Path) -> None:
    """Rename a complete file or directory to `path`, after flushing it and everything in it to disk.

    A directory replaces an empty one at most. Raises OSError.
    """
    for part in (*(complete.iterdir() if complete.is_dir() else ()), complete):
        sync(part)
    os.replace(complete, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(path: Path) -> None:
    """Give a file that a library created for its owner alone the mode of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


# --- reading


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """A regular file to read; a final symbolic link is not followed. Raises ValueError with the reason."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{path.name} is {'a symbolic link' if path.is_symlink() else 'missing'}") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        yield file


def read_json(path: Path, limit: int) -> Any:
    """The JSON in a regular file of at most `limit` bytes. Raises ValueError with the reason."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError:
        raise ValueError(f"{path.name} is not valid JSON") from None


# --- directories


def make_folder(path: Path) -> None:
    """Create a directory and its parents unless they exist, not writable by others whatever the umask.

    A run refuses a directory that anyone may write. Raises OSError.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            folder.mkdir(mode=0o775, exist_ok=True)


def make_writable_folder(folder: Path) -> None:
    """Create a directory unless it exists. Raises UserError if it cannot be created or written."""
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give another folder.") from None
    if not os.access(folder, os.W_OK | os.X_OK):  # also false on a read-only file system
        raise UserError(f"{folder} cannot be written; change its permissions or give another folder.")


def require_writable(path: Path) -> None:
    """Raise UserError unless `path` can be written; to be called before work is spent on its content.

    Permissions do not tell on a read-only file system, so a temporary file is created beside `path` and deleted.
    """
    try:
        if _in_place(path):
            path.open("ab").close()
        else:
            temporary = _temporary(path)
            temporary.open("wb").close()
            temporary.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another place.") from None


def refuse_file(folder: Path) -> None:
    """Raise UserError where `folder` is a file or below one."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give another --out.")


# --- locks


def file_lock(path: Path) -> FileLock:
    """A lock on the file `path`, which the kernel releases however the process that holds it ends (flock).

    A file system without flock is an error: the lock files that `filelock` would fall back to outlive their process.
    """
    return FileLock(path, fallback_to_soft=False)


@contextmanager
def exclusive(out: Path, marker: str) -> Iterator[None]:
    """Hold the directory `out`, created if need be, for this process; another one waits.

    The file `marker` exists meanwhile, and remains if the body fails. Raises UserError if the disk is full or `out`
    cannot be written.
    """
    try:
        make_folder(out)
        with file_lock(out / marker):
            yield
            (out / marker).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}); free space or give another folder") from None


def _in_place(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir())


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
