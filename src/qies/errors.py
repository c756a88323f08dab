"""The one error a user can cause, and help with names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its message is one line that says what is wrong and what to do; the command line exits with 2."""


def nearest(word: str, options: Iterable[str]) -> str:
    """The sentence that points at the option most like `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
