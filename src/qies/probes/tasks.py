"""The tasks of `qies probe` by name.

A name may carry options, fields of the task: `mqar:pairs=64:vocab_size=8192`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

from qies.errors import UserError, unknown
from qies.probes.groups import alternating, cyclic, product, symmetric
from qies.probes.recall import ContextRecall, Needle, NoisyRecall, Recall, SelectiveCopy
from qies.probes.state_tracking import Arithmetic, Dyck, WordProblem
from qies.probes.task import IGNORED, Ids, Task

__all__ = ["IGNORED", "TASKS", "Ids", "Task", "task"]

TASKS: dict[str, Callable[[], Task]] = {
    "parity": lambda: WordProblem(cyclic(2)),
    "z60": lambda: WordProblem(cyclic(60)),
    "s3": lambda: WordProblem(symmetric(3)),
    "a5": lambda: WordProblem(alternating(5), all_letters=False),
    "a5-all": lambda: WordProblem(alternating(5)),
    "s5": lambda: WordProblem(symmetric(5), all_letters=False),
    "s5-all": lambda: WordProblem(symmetric(5)),
    "a4xz5": lambda: WordProblem(product(alternating(4), cyclic(5))),
    "arithmetic": Arithmetic,
    "dyck": Dyck,
    "mqar": Recall,
    "context-recall": ContextRecall,
    "noisy-recall": NoisyRecall,
    "needle": Needle,
    "selective-copy": SelectiveCopy,
}


@cache
def task(name: str) -> Task:
    """The task of that name. Raises UserError for an unknown one, and for an option that it does not have."""
    name, *options = name.split(":")
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    make = TASKS[name]
    chosen: Any = make()
    fields = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(chosen)}
    known = {field: kind for field, kind in fields.items() if kind in ("int", "float")}
    changes: dict[str, float] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if key not in known or not equals:
            raise UserError(f"Task '{name}' has no option '{option}'. Options: {', '.join(known) or 'none'}.")
        changes[key] = _number(name, key, text, whole=known[key] == "int")
    return dataclasses.replace(chosen, **changes)


def _number(name: str, key: str, text: str, *, whole: bool) -> float:
    """The value of an option: a whole number of at least 1, or a number from 0 to 1."""
    try:
        value = int(text) if whole else float(text)
        good = value >= 1 if whole else 0 <= value <= 1
    except ValueError:
        good = False
    if not good:
        kind = "a whole number of at least 1" if whole else "a number from 0 to 1"
        raise UserError(f"Option '{key}' of task '{name}' is '{text}'; it must be {kind}.")
    return value
