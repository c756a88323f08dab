"""Exceptions, exit codes, and the error for an unknown name."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import NoReturn

INTERRUPTED = "interrupted; run the same command again."
# In the message of a rank that stops because another rank has ended; the ladder looks for the first cause elsewhere.
RANK_ENDED = "has ended (killed, or failed)"


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do. The command line exits with code 2."""


class Stopped(Exception):
    """A run has stopped early, with a consistent run directory, so it can resume.

    Args:
        message: The reason, in one line.
        code: The exit code of the process.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def exit_process(code: int) -> NoReturn:
    """Exit with `code`. In a multi-process run, skip the interpreter's shutdown: a gloo thread that releases a tensor
    during shutdown aborts the process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def reports_errors() -> bool:
    """Whether this process prints errors: a single process, or rank 0 of a run."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def nearest(word: str, options: Iterable[str]) -> str:
    """Suggest the option most similar to `word`: "Did you mean 'x'?", or "" if none is similar."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else ""


def unknown(
    kind: str, name: object, known: Iterable[str], *, where: str = "", otherwise: str | None = None, note: str = ""
) -> UserError:
    """The error for a `name` that is not one of the `known` names. It suggests the most similar one.

    Args:
        kind: What the name denotes: "arm", "key", "value".
        name: The name that was given.
        known: The valid names.
        where: Follows the name: "for --track", "in model".
        otherwise: The sentence to use if no known name is similar; by default it lists the known names.
        note: A sentence to append.
    """
    known = list(known)
    listed = f"Known: {', '.join(known)}." if known else ""
    hint = nearest(str(name), known) or (listed if otherwise is None else otherwise)
    place = f" {where}" if where else ""
    return UserError(" ".join(filter(None, (f"Unknown {kind} '{name}'{place}.", hint, note))))


def require(package: str, wanted_by: str, extra: str) -> None:
    """Raise UserError unless `package` is installed. `wanted_by` is the option that needs it; `extra` installs it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{wanted_by} needs the package {package}: pip install 'qies[{extra}]'.")
