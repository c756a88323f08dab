"""The error a user can cause, the ends a run can meet, and help with names."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import NoReturn

INTERRUPTED = "interrupted; run the same command again."
GONE = "is gone (killed, or failed by itself)"  # said of a rank by those that end because of it


class UserError(Exception):
    """Bad input. Its message is one line that says what is wrong and what to do; the command line exits with 2."""


class Stopped(Exception):
    """A run cannot go on for now and has left its folder in order. The message is one line; `code` the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def leave(code: int) -> NoReturn:
    """End this process with `code`. One of several that trained together ends at once: gloo's threads may still hold
    Python's tensors, and one that lets go of them while the interpreter ends aborts the process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def speaks() -> bool:
    """Whether this process reports what is wrong: one that runs alone, or the first of those of one run."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def nearest(word: str, options: Iterable[str]) -> str:
    """The sentence that points at the option most like `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def require(package: str, wanted_by: str, extra: str) -> None:
    """Raise UserError unless `package` is installed; `wanted_by` is the option that needs it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{wanted_by} needs the package {package}: pip install 'qies[{extra}]'.")
