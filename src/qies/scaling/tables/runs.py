"""Runs as numbers: read from a table or a folder of run records, every name and unit stated once.

Legend: N parameters, D training tokens, C training FLOPs, L loss in nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, nearest
from qies.scaling.tables.files import read_rows

Array = NDArray[np.float64]

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
# Where a run record keeps what was set; of other tables every column that we do not read may be a setting.
SETTINGS = ("config.train.", "config.model.")


@dataclass(frozen=True)
class Runs:
    """n training runs, one array entry each.

    `params` N, `tokens` D, `flops` C, `loss` L (nats a token), `weight` (of the run in a fit, 1 by default) and
    `wall_seconds` (NaN where unknown) are float64 [n]; `seed` int64 [n]; `arm`, `status` ("" where unknown) and
    `name` n words each. `run` ("" where unknown): entries of one run are points of one training curve and not
    independent. `convention` says how the FLOPs were counted: "6ND", a named convention, or "given".
    `unique` (float64 [n], NaN where missing) counts the distinct tokens among `tokens`; None without such a column.
    `induction` (likewise) is what a model gains on the repeat of a random segment, nats per token, and
    `induction_onset` the tokens from which on that stayed at the threshold. `context` (length in tokens) and `corpus`
    are n words each, () without such a column. `settings`: further columns whose values recur, as n words each, such as
    hyperparameters. `notes`: sentences on how the table was read.
    """

    params: Array
    tokens: Array
    flops: Array
    loss: Array
    arm: tuple[str, ...]
    seed: NDArray[np.int64]
    weight: Array
    wall_seconds: Array
    status: tuple[str, ...]
    name: tuple[str, ...]
    run: tuple[str, ...]
    convention: str
    unique: Array | None = None
    induction: Array | None = None
    induction_onset: Array | None = None
    context: tuple[str, ...] = ()
    corpus: tuple[str, ...] = ()
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms in order of appearance."""
        return tuple(dict.fromkeys(self.arm))

    def select(self, which: ArrayLike) -> Runs:
        """The runs that a boolean mask [n] or an index array (in its order, repeats allowed) picks."""
        pick = np.arange(len(self))[np.asarray(which)]

        def words(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in pick) if column else ()

        def numbers(column: Array | None) -> Array | None:
            return None if column is None else column[pick]

        return Runs(
            params=self.params[pick],
            tokens=self.tokens[pick],
            flops=self.flops[pick],
            loss=self.loss[pick],
            arm=words(self.arm),
            seed=self.seed[pick],
            weight=self.weight[pick],
            wall_seconds=self.wall_seconds[pick],
            status=words(self.status),
            name=words(self.name),
            run=words(self.run),
            convention=self.convention,
            unique=numbers(self.unique),
            induction=numbers(self.induction),
            induction_onset=numbers(self.induction_onset),
            context=words(self.context),
            corpus=words(self.corpus),
            settings={name: words(column) for name, column in self.settings.items()},
            notes=self.notes,
        )

    def of_arm(self, arm: str) -> Runs:
        """The runs of one arm. Raises UserError when there is none."""
        if arm not in self.arms:
            raise UserError(f"no run of arm '{arm}'; the table has {', '.join(self.arms)}.{nearest(arm, self.arms)}")
        return self.select(np.array([a == arm for a in self.arm]))


def read_runs(path: str | Path, columns: Mapping[str, str] | None = None, flops: str | None = None) -> Runs:
    """Runs of a CSV, TSV, JSONL, JSON or Parquet table, or of every run.json below a folder.

    columns: our name -> the table's name, such as {"params": "N"}, with a factor where the unit is another, such as
    {"tokens": "D (billions)*1e9"}; nested JSON is reached by dots ("metrics.val_loss"). Names differ by more than
    case. Needed are loss and two of params, tokens and flops: the third follows from C = 6ND.
    flops: None takes the table's FLOPs and 6ND where there are none; "6ND" or another multiple, such as "8ND" for
    recomputed activations, counts all runs so; "given" insists on the table's. Numbers may read 1,200,000 or 1.2M or
    3.5 % (`parse_number`), and 0,05 in a column with decimal commas, which `notes` say. Values that are missing or not
    finite are kept as NaN, for `sound` to report. Raises UserError for an unreadable file, an unknown or missing
    column, a cell that is no number, and commas of which the table does not show what they mark.
    """
    path = Path(path)
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows; give a table with one run a row.")
    known = list(dict.fromkeys(key for row in rows for key in row))
    names = _resolve(columns or {}, known, path)
    if "loss" not in names:
        raise _missing("loss", known, path)
    if len(names.keys() & {"params", "tokens", "flops"}) < 2:
        raise _missing("params" if "params" not in names else "tokens", known, path)
    number, notes = _numbers(rows, {k: names[k] for k in NUMBERS if k in names}, path)
    text = {k: tuple(_text(row.get(names[k][0])) for row in rows) for k in TEXTS if k in names}
    n = len(rows)
    params, tokens, compute, convention = _compute(number, text.get("flops_convention", ()), flops, n, path)
    seed = number.get("seed", np.zeros(n))
    return Runs(
        params=params,
        tokens=tokens,
        flops=compute,
        loss=number["loss"],
        arm=text.get("arm", ("",) * n),
        seed=np.where(np.isfinite(seed), seed, 0).astype(np.int64),
        weight=np.where(np.isnan(w := number.get("weight", np.ones(n))), 1.0, w),
        wall_seconds=number.get("wall_seconds", np.full(n, np.nan)),
        status=text.get("status", ("",) * n),
        name=text.get("name", tuple(f"row {i + 1}" for i in range(n))),
        run=text.get("run", ("",) * n),
        convention=convention,
        unique=number.get("unique"),
        induction=number.get("induction"),
        induction_onset=number.get("induction_onset"),
        context=text.get("context", ()),
        corpus=text.get("corpus", ()),
        settings=_settings(rows, [k for k in known if k not in {name for name, _ in names.values()}]),
        notes=notes,
    )


def read_columns(path: str | Path, needed: Iterable[str], columns: Mapping[str, str] | None = None) -> dict[str, Array]:
    """The needed columns of any table of numbers, float64 [n] each (NaN where missing), for fits that are not of runs;
    and the column `weight` where there is one.

    Files, `columns` and errors as in `read_runs`.
    """
    path, needed = Path(path), tuple(needed)
    rows = read_rows(path)
    known = list(dict.fromkeys(key for row in rows for key in row))
    names = _resolve(columns or {}, known, path, (*needed, "weight"))
    for need in needed:
        if need not in names:
            raise _missing(need, known, path)
    number = _numbers(rows, {**{need: names[need] for need in needed}, **names}, path)[0]
    if "weight" in number:
        number["weight"] = np.where(np.isnan(number["weight"]), 1.0, number["weight"])
    return number


@dataclass(frozen=True)
class Dropped:
    """A run left out: its index in the table it came from, its name, and why."""

    index: int
    name: str
    reason: str


def _resolve(
    columns: Mapping[str, str], known: list[str], path: Path, allowed: tuple[str, ...] = COLUMNS
) -> dict[str, tuple[str, float]]:
    """Our name -> the table's and a factor, as given or, without a word, the same name or the run record's."""
    found = {}
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise UserError(f"'{ours}' is no column of ours; choose from {', '.join(allowed)}.{nearest(ours, allowed)}")
        name, factor = _same(theirs, known), 1.0
        if name is None and "*" in theirs and ours not in TEXTS:
            theirs, _, times = (part.strip() for part in theirs.rpartition("*"))
            name, factor = _same(theirs, known), _factor(times, ours)
        if name is None:
            raise UserError(f"{path} has no column '{theirs}' for {ours}.{nearest(theirs, known) or _listed(known)}")
        found[ours] = name, factor
    for ours in allowed:
        for theirs in (ours, RECORD.get(ours, ours)):
            if (name := _same(theirs, known)) is not None:
                found.setdefault(ours, (name, 1.0))
    return found


def _settings(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, tuple[str, ...]]:
    """Of `columns` those that may be settings: of a run record its configuration, else columns of several values that
    recur. What was measured differs in nearly every row."""
    recorded = [column for column in columns if column.startswith(SETTINGS)]
    found = {}
    for column in recorded or columns:
        values = tuple(_text(row.get(column)) for row in rows)
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
        raise UserError(f"{ours} is to be multiplied by '{word}', which is no positive number; give one, such as 1e9.")
    return factor


def _missing(need: str, known: list[str], path: Path) -> UserError:
    wide = [k for k in known if " - " in k]
    if wide and len(known) - len(wide) <= 1:
        return UserError(
            f"{path} is a wide export of W&B, one column a run such as '{wide[0]}', without {need}; export the table "
            "of runs instead (one row a run), or name the columns of one run for --form annealing"
        )
    hint = nearest(need, known) or _listed(known)
    return UserError(f"{path} has no column '{need}'; name it with --columns {need}=THEIR_NAME.{hint}")


def _listed(known: Iterable[str]) -> str:
    return f" It has: {', '.join(list(known)[:12])}."


def _numbers(
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
                raise UserError(f"{path}: row {i + 1}, column '{column}': '{row.get(column)}' is no number.") from None
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


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _compute(
    number: Mapping[str, Array], conventions: tuple[str, ...], flops: str | None, n: int, path: Path
) -> tuple[Array, Array, Array, str]:
    """N, D, C and the convention of C; what is missing follows from C = k N D."""
    factor = 6.0
    if flops not in (None, "given"):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*\*?\s*ND", flops or "", re.IGNORECASE)
        if match is None or not float(match[1]):
            raise UserError(f"FLOPs convention '{flops}' is unknown; give 6ND, another multiple of ND, or 'given'.")
        factor = float(match[1])
    label = f"{factor:g}ND"
    unknown = np.full(n, np.nan)
    params, tokens = number.get("params", unknown), number.get("tokens", unknown)
    given = number.get("flops", unknown)
    if flops == "given" and not np.isfinite(given).any():
        raise UserError(f"{path} has no FLOPs to take as given; name their column with --columns flops=THEIR_NAME.")
    # Only where a column is not there at all; a cell missing from one that is stays missing, for `sound` to report.
    no_tokens = np.full(n, "tokens" not in number) & np.isfinite(given)
    no_params = np.full(n, "params" not in number) & np.isfinite(given)
    tokens = np.where(no_tokens, given / (factor * params), tokens)
    params = np.where(no_params, given / (factor * tokens), params)
    use_given = np.isfinite(given) & (flops in (None, "given") or no_tokens | no_params)
    compute = np.where(use_given, given, factor * params * tokens)
    if not use_given.any():
        return params, tokens, compute, label
    named = {c for c, used in zip(conventions, use_given, strict=False) if used and c}
    if len(named) > 1:
        raise UserError(f"{path} counts FLOPs by {len(named)} conventions; give --flops 6ND to use one for all runs.")
    convention = named.pop() if named else "given"
    convention += f", D = C/{factor:g}N" if no_tokens.any() else f", N = C/{factor:g}D" if no_params.any() else ""
    if not use_given.all():
        convention += f", {label} where missing"
    return params, tokens, compute, convention
