"""Column names: the names of a table matched with the names used here, and units given as factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qies.errors import UserError, nearest, unknown
from qies.scaling.tables.number_parsing import parse_number

# Our names, and where a run record (DESIGN, section 3) keeps the same thing.
RECORD = {
    "params": "params.non_embedding",
    "loss": "metrics.val_loss",
    "induction": "metrics.induction",
    "induction_onset": "metrics.induction_onset",
    "context": "config.train.seq_len",
    "corpus": "config.data.source",
}
NUMBERS = (
    "params", "tokens", "unique", "flops", "loss", "weight", "wall_seconds", "seed", "induction", "induction_onset",
)  # fmt: skip
TEXTS = ("arm", "status", "name", "run", "flops_convention", "context", "corpus")
COLUMNS = NUMBERS + TEXTS
# Where a run record keeps what was set; of other tables every column that we do not read may be a setting.
SETTINGS = ("config.train.", "config.model.", "config.objective.")


def column_names(words: tuple[str, ...]) -> dict[str, str]:
    """Parse words of OURS=THEIRS, separated by commas; a comma not followed by OURS= is part of THEIRS."""
    found = {}
    for part in (p for word in words for p in re.split(r",(?=\s*\w+\s*=)", word)):
        ours, equals, theirs = part.partition("=")
        if not (ours.strip() and equals and theirs.strip()):
            raise UserError(f"--columns needs OURS=THEIRS, such as params=N,tokens=D; got '{part}'.")
        found[ours.strip()] = theirs.strip()
    return found


def resolve(
    columns: Mapping[str, str], known: list[str], path: Path, allowed: tuple[str, ...] = COLUMNS
) -> dict[str, tuple[str, float]]:
    """Our name -> the table's and a factor, as given or, without a word, the same name or the run record's."""
    found = {}
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise unknown("column", ours, allowed, where="in --columns")
        name, factor = _same(theirs, known), 1.0
        if name is None and "*" in theirs and ours not in TEXTS:
            theirs, _, times = (part.strip() for part in theirs.rpartition("*"))
            name, factor = _same(theirs, known), _factor(times, ours)
        if name is None:
            raise unknown("column", theirs, known, where=f"for {ours} in {path}", otherwise=_listed(known))
        found[ours] = name, factor
    for ours in allowed:
        for theirs in (ours, RECORD.get(ours, ours)):
            if (name := _same(theirs, known)) is not None:
                found.setdefault(ours, (name, 1.0))
    return found


def settings_of(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, tuple[str, ...]]:
    """Of `columns` those that may be settings: of a run record its configuration, else columns of several values that
    recur. What was measured differs in nearly every row."""
    recorded = [column for column in columns if column.startswith(SETTINGS)]
    found = {}
    for column in recorded or columns:
        values = tuple(text(row.get(column)) for row in rows)
        if 1 < len(set(values)) <= (len(rows) if recorded else len(rows) // 2):
            found[column] = values
    return found


def _same(name: str, known: list[str]) -> str | None:
    """The column of that name, or else the only one that differs from it by case alone."""
    alike = [k for k in known if k.casefold() == name.casefold()]
    return name if name in known else alike[0] if len(alike) == 1 else None


def _factor(word: str, ours: str) -> float:
    try:
        factor = parse_number(word)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise UserError(f"{ours} is multiplied by '{word}', which is not a positive number; give one, such as 1e9.")
    return factor


def missing(need: str, known: list[str], path: Path) -> UserError:
    wide = [k for k in known if " - " in k]
    if wide and len(known) - len(wide) <= 1:
        return UserError(
            f"{path} is a wide export of W&B, one column a run such as '{wide[0]}', without {need}; export the table "
            "of runs instead (one row a run), or name the columns of one run for --form annealing"
        )
    hint = nearest(need, known) or _listed(known)
    return UserError(f"{path} has no column '{need}'; name it with --columns {need}=THEIR_NAME. {hint}")


def _listed(known: Iterable[str]) -> str:
    return f"It has: {', '.join(list(known)[:12])}."


def text(cell: Any) -> str:
    """A cell as text; "" where it is missing."""
    return "" if cell is None else str(cell).strip()
