"""Compilation of the kernels, and the cache of the compiled code."""

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
    """A cache of compiled code on disk that is invalidated when any file of the ops changes.

    numba checks only the file of the compiled function, although the code of its callees is inlined. It also numbers
    its cache files without a lock, so two processes could use the same number; here each process has unique names.
    """

    sources = digest(Path(__file__).parent)

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._data_name_pattern = f"{self._impl.filename_base}.{uuid4().hex}.{{number:d}}.nbc"

    def _index_key(self, *args):
        return (*super()._index_key(*args), self.sources)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba on first use, and cache the code on disk."""
    compiled = njit(**OPTIONS)(function)
    with contextlib.suppress(RuntimeError):  # the cache cannot be written: every process compiles
        compiled._cache = _Cache(function)
    return compiled
