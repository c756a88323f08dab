"""Numbers of table cells: suffixes such as 410M, PF-days and percent, and what marks decimals in each column."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qies.errors import UserError

Array = NDArray[np.float64]

MISSING = {"", "nan", "na", "n/a", "none", "null", "-"}
SCALES = {"": 1.0, "%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
SCALES |= {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# FLOPs alone go by these letters, as 3E is half a number elsewhere; a petaFLOP/s-day is 1e15 times 86,400 s.
FLOPS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21, "y": 1e24}
DAY = 86400.0
NUMBER = re.compile(
    r"([+-]?(?:[1-9]\d{0,2}(?:[,_]\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?)\s*"
    r"(?:(%|k|m|b|g|t|thousand|million|billion|trillion|)\s*(?:tokens?|params?|parameters?|s|sec|seconds?)?"
    r"|([kmgtpezy]?)flops?|([kmgtpezy])(?:f|flops?(?:/s)?)[- ]?days?)",
    re.IGNORECASE,
)
# The digits of a cell, which decide whether its comma or its point marks decimals (`_mark`), and its exponent.
DIGITS = re.compile(r"[+-]?([\d.,]+)(e[+-]?\d+)?", re.IGNORECASE)
# Marks of decimals; GROUPED: decimal commas, shown by points that can only separate thousands.
POINT, COMMA, GROUPED = ".", ",", ".,"
REWRITE = "write decimals with points, and no separators of thousands"


def read_numbers(
    rows: list[dict[str, Any]], sources: Mapping[str, tuple[str, float]], path: Path
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The columns [n] of our names in `sources` (the table's name, a factor), and what is decided about commas."""
    decimal, notes = _decimal_marks(rows, [column for column, _ in sources.values()], path)
    found = {}
    for ours, (column, factor) in sources.items():
        values = np.empty(len(rows))
        for i, row in enumerate(rows):
            try:
                values[i] = parse_number(row.get(column), decimal[column])
            except ValueError:
                raise UserError(
                    f"{path}: row {i + 1}, column '{column}': '{row.get(column)}' is not a number."
                ) from None
        found[ours] = values * factor
    return found, notes


def _decimal_marks(
    rows: list[dict[str, Any]], columns: list[str], path: Path
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What marks decimals in each column, POINT or COMMA, and notes that name the columns of commas.

    A column is decided by its own cells (0,05 and 1.234,5 and 1.000.000 have decimal commas, 1,200,000 and 1,234.5 have
    not), or else by those of the other columns: 6,851 by any; 1.234 is a decimal in a table of points, and
    a count where points separate thousands and commas mark decimals elsewhere. Raises UserError for a column of both
    kinds, and where nothing decides.
    """
    # By column and mark, the first cell that has it.
    cells: dict[str, dict[str, str]] = {column: {} for column in columns}
    for row in rows:
        for column in columns:
            cells[column].setdefault(_mark(row.get(column)), str(row.get(column)).strip())
    shown = {mark for found in cells.values() for mark in found}
    points, commas = POINT in shown, bool({COMMA, GROUPED} & shown)
    # Points elsewhere that separate thousands do not rule out a loss of 3.451; decimal commas besides them do.
    written = [cell for found in cells.values() for cell in found.values()]
    grouping = GROUPED in shown and not points and any("," in cell for cell in written)
    marks, decimals, thousands = dict.fromkeys(columns, POINT), [], []
    for column, found in cells.items():
        if POINT in found and (comma := found.get(COMMA) or found.get(GROUPED)):
            raise UserError(
                f"{path}: column '{column}' has a decimal comma in '{comma}' and a decimal point in '{found[POINT]}'; "
                f"{REWRITE}"
            )
    for column, found in cells.items():
        comma = found.get(COMMA) or found.get(GROUPED)
        if "?," in found and not comma and POINT not in found:
            if points == commas:
                raise _ambiguous(path, column, found["?,"], "comma")
            comma = found["?,"] if commas else None
        if "?." in found and POINT not in found and (comma or commas):
            if GROUPED not in found and not grouping:
                raise _ambiguous(path, column, found["?."], "point")
            comma = comma or found["?."]
        if comma:
            marks[column] = COMMA
            grouped = found.get(GROUPED) or found.get("?.")
            thousands += [f"'{column}' ({grouped})"] if grouped else []
            decimals += [f"'{column}' ({comma})"] if "," in comma else []
    said = [("commas are read as decimal commas", decimals), ("points are read as separators of thousands", thousands)]
    return marks, tuple(f"{how} in {', '.join(named)}" for how, named in said if named)


def _ambiguous(path: Path, column: str, cell: str, mark: str) -> UserError:
    return UserError(f"{path}: column '{column}': the {mark} of '{cell}' may mark decimals or thousands; {REWRITE}")


def _mark(cell: Any) -> str:
    """What a cell shows of the decimal mark: POINT, COMMA, GROUPED, "?," or "?." (decimals or thousands) or ""."""
    if isinstance(cell, float):
        return POINT if math.isfinite(cell) else ""
    match = DIGITS.match(cell.strip()) if isinstance(cell, str) else None
    if match is None:
        return ""
    digits, exponent = match.groups()
    if not exponent and (thousand := re.fullmatch(r"[1-9]\d{0,2}([.,])\d{3}", digits)):
        return f"?{thousand[1]}"
    if re.fullmatch(r"[1-9]\d{0,2}((\.\d{3}){2,}|(\.\d{3})+,\d*)", digits):
        return GROUPED
    if re.fullmatch(r"[1-9]\d{0,2}((,\d{3}){2,}|(,\d{3})+\.\d*)|\d*\.\d*", digits):
        return POINT
    return COMMA if re.fullmatch(r"\d*,\d*", digits) else ""


def parse_number(cell: Any, decimal: str = POINT) -> float:
    """A number from a table's cell; NaN where missing. `decimal` marks decimals, and the other of point and comma
    thousands. Raises ValueError.

    1,200,000 or 1e9; with k, M, B (or G), T or the words thousand to trillion: 1.2M, 300 billion tokens; 3.5 %;
    FLOPs from kFLOPs to YFLOPs, and PF-days.
    """
    if cell is None:
        return math.nan
    if isinstance(cell, int | float | np.number):
        return float(cell)
    word = str(cell).strip()
    if word.lower() in MISSING:
        return math.nan
    if decimal == COMMA:
        word = word.translate(str.maketrans(".,", ",."))
    match = NUMBER.fullmatch(word)
    if match is None or not any(c.isdigit() for c in match[1]):
        return float(word)  # "inf" and what else Python reads
    scale, flops, days = (None if part is None else part.lower() for part in match.groups()[1:])
    factor = FLOPS[days] * DAY if days is not None else FLOPS[flops] if flops is not None else SCALES[scale or ""]
    return float(match[1].replace(",", "").replace("_", "")) * factor
