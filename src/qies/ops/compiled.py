"""How the kernels are compiled, and where the compiled code is kept."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from numba import njit
from numba.core.caching import FunctionCache

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}


def digest(folder: Path) -> str:
    """sha256 of all Python files under `folder`."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.py")))).hexdigest()


class _Cache(FunctionCache):
    """Compiled code on disk that is made anew when any file of the ops changes.

    numba looks at the file of the compiled function alone, though the code of all that it calls is in it. And it
    numbers the files of code without a lock, so that two processes could give two codes one number: here each process
    has names of its own.
    """

    sources = digest(Path(__file__).parent)

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._data_name_pattern = f"{self._impl.filename_base}.{uuid4().hex}.{{number:d}}.nbc"

    def _index_key(self, *args):
        return (*super()._index_key(*args), self.sources)


def kernel(function: Callable[..., Any]) -> Any:
    """`function` compiled by numba on first use, and kept on disk for the next process."""
    compiled = njit(**OPTIONS)(function)
    with contextlib.suppress(RuntimeError):  # nowhere to write: compiled in every process
        compiled._cache = _Cache(function)
    return compiled
