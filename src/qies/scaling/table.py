"""Runs as numbers: read from a table or a folder of run records, every name and unit stated once.

Legend: N parameters, D training tokens, C training FLOPs, L loss in nats a token.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, nearest

Array = NDArray[np.float64]

# Our names, and where a run record (DESIGN, section 3) keeps the same thing.
RECORD = {"params": "params.non_embedding", "loss": "metrics.val_loss"}
NUMBERS = ("params", "tokens", "flops", "loss", "weight", "wall_seconds", "seed")
TEXTS = ("arm", "status", "name", "flops_convention")
COLUMNS = NUMBERS + TEXTS
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
MISSING = {"", "nan", "na", "n/a", "none", "null", "-"}
SCALES = {"": 1.0, "%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:[,_]\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?)\s*([%kmbgt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Runs:
    """n training runs, one array entry each.

    `params` N, `tokens` D, `flops` C, `loss` L (nats a token), `weight` (of the run in a fit, 1 by default) and
    `wall_seconds` (NaN where unknown) are float64 [n]; `seed` int64 [n]; `arm`, `status` ("" where unknown) and
    `name` n words each. `convention` says how the FLOPs were counted: "6ND", a named convention, or "given".
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
    convention: str

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
            return tuple(column[i] for i in pick)

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
            convention=self.convention,
        )

    def of_arm(self, arm: str) -> Runs:
        """The runs of one arm. Raises UserError when there is none."""
        if arm not in self.arms:
            raise UserError(f"no run of arm '{arm}'; the table has {', '.join(self.arms)}.{nearest(arm, self.arms)}")
        return self.select(np.array([a == arm for a in self.arm]))


def read_runs(path: str | Path, columns: Mapping[str, str] | None = None, flops: str | None = None) -> Runs:
    """Runs of a CSV, TSV, JSONL, JSON or Parquet table, or of every run.json below a folder.

    columns: our name -> the table's name, such as {"params": "N"}; nested JSON is reached by dots
    ("metrics.val_loss"). Needed are loss and two of params, tokens and flops: the third follows from C = 6ND.
    flops: None takes the table's FLOPs and 6ND where there are none; "6ND" or another multiple, such as "8ND" for
    recomputed activations, counts all runs so; "given" insists on the table's. Numbers may read 1,200,000 or 1.2M or
    3.5 %. Values that are missing or not finite are kept as NaN, for `sound` to report. Raises UserError for an
    unreadable file, an unknown or missing column, and a cell that is no number.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows; give a table with one run a row.")
    known = list(dict.fromkeys(key for row in rows for key in row))
    names = _resolve(columns or {}, known, path)
    if "loss" not in names:
        raise _missing("loss", known, path)
    if len(names.keys() & {"params", "tokens", "flops"}) < 2:
        raise _missing("params" if "params" not in names else "tokens", known, path)
    number = {k: _numbers(rows, names[k], path) for k in NUMBERS if k in names}
    text = {k: tuple(_text(row.get(names[k])) for row in rows) for k in TEXTS if k in names}
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
        convention=convention,
    )


def read_columns(path: str | Path, needed: Iterable[str], columns: Mapping[str, str] | None = None) -> dict[str, Array]:
    """The needed columns of any table of numbers, float64 [n] each (NaN where missing), for fits that are not of runs.

    Files, `columns` and errors as in `read_runs`.
    """
    path, needed = Path(path), tuple(needed)
    rows = _rows(path)
    known = list(dict.fromkeys(key for row in rows for key in row))
    names = _resolve(columns or {}, known, path, needed)
    for need in needed:
        if need not in names:
            raise _missing(need, known, path)
    return {need: _numbers(rows, names[need], path) for need in needed}


@dataclass(frozen=True)
class Dropped:
    """A run left out: its index in the table it came from, its name, and why."""

    index: int
    name: str
    reason: str


FINISHED = {"", "done", "finished", "completed", "complete", "ok", "success", "succeeded"}
# A diverged run lies above the law by more than any noise: by 10 robust standard deviations of its arm's
# residuals of log loss, and by more than a quarter (a table of good runs at an odd place of the grid does less).
DIVERGED_SIGMAS, DIVERGED_LEAST = 10.0, math.log(1.25)
FEWEST_FOR_A_SURFACE, FEWEST_FOR_A_LINE = 10, 5


def sound(runs: Runs, *, against_fit: bool = True) -> tuple[Runs, list[Dropped]]:
    """The runs to trust, and the others with the reason.

    Left out are runs that did not finish (by `status`), whose N, D, C or L is not finite or not positive, and, with
    `against_fit`, diverged ones: log loss far above a robust fit of their arm (approach 3 from 10 runs on, a
    Theil-Sen line in log C from 5 on). "Far" is 10 scaled MADs of the residuals and at least 25 %.
    """
    reasons: dict[int, str] = {}
    for i in range(len(runs)):
        if runs.status[i].lower() not in FINISHED:
            reasons[i] = f"status {runs.status[i]}"
            continue
        for what in ("loss", "params", "tokens", "flops", "weight"):
            value = float(getattr(runs, what)[i])
            if not (math.isfinite(value) and value > 0):
                reasons[i] = f"{what} is {value:g}"
                break
    if against_fit:
        for arm in runs.arms:
            index = np.array([i for i in range(len(runs)) if i not in reasons and runs.arm[i] == arm], dtype=int)
            excess = _excess(runs.select(index))
            scale = 1.4826 * float(np.median(np.abs(excess - np.median(excess)))) if len(excess) else 0.0
            for i, above in zip(index, excess, strict=True):
                if above > max(DIVERGED_SIGMAS * scale, DIVERGED_LEAST):
                    reasons[int(i)] = f"diverged: loss {100 * math.expm1(above):.0f} % above the law of its arm"
    keep = np.array([i not in reasons for i in range(len(runs))], dtype=bool)
    return runs.select(keep), [Dropped(i, runs.name[i], reasons[i]) for i in sorted(reasons)]


def _excess(runs: Runs) -> Array:
    """log loss above a robust law of the runs, [n]; zero where they are too few for one."""
    from qies.scaling.fits import fit_surface  # the fits read tables, so this direction waits until it is called

    cells = len(set(zip(runs.params, runs.tokens, strict=True)))
    if cells >= FEWEST_FOR_A_SURFACE:
        fit = fit_surface(runs, "approach3")
        return np.log(runs.loss) - np.log(fit.predict(runs.params, runs.tokens))
    if len(runs) < FEWEST_FOR_A_LINE:
        return np.zeros(len(runs))
    x, y = np.log(runs.flops), np.log(runs.loss)
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    slope = float(np.median((y[i] - y[j])[apart] / (x[i] - x[j])[apart])) if apart.any() else 0.0
    return y - slope * x - np.median(y - slope * x)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        from qies import runs  # the run record's own reader, which checks the schema

        records = [(p.parent, runs.read(p.parent)) for p in sorted(path.glob("**/run.json"))]
        if not records:
            raise UserError(f"{path} holds no run record (run.json); give a table or a folder of runs.")
        return [{**_flat(record or {}), "name": str(folder.relative_to(path))} for folder, record in records]
    if not path.is_file():
        raise UserError(f"no table at {path}; give a file or a folder of run records.")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{path} is of no known kind; give one of {', '.join(SUFFIXES)} or a folder of run records.")
    if kind == ".parquet":
        return _parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    if kind in (".csv", ".tsv"):
        return _separated(text, path)
    try:
        if kind != ".json":
            return [_flat(_object(json.loads(line), path)) for line in text.splitlines() if line.strip()]
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is not valid {kind[1:].upper()} ({e}).") from None
    if isinstance(value, dict) and isinstance(value.get("runs"), list):
        value = value["runs"]
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) != 1:
            raise UserError(f"{path}: the columns differ in length; give one value a run in each.")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{path}: give a list of runs, or one list a column.")
    return [_flat(_object(row, path)) for row in value]


def _separated(text: str, path: Path) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        return []
    separator = max(",\t;", key=lines[0].count)
    head, *body = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    head = [h.strip() for h in head]
    if twice := [h for h in head if head.count(h) > 1 and h]:
        raise UserError(f"{path}: two columns are called '{twice[0]}'; rename one.")
    for i, row in enumerate(body):
        if len(row) != len(head):
            counts = f"row {i + 1} has {len(row)} cells and the head {len(head)}"
            raise UserError(f"{path}: {counts}; quote numbers with commas.")
    return [dict(zip(head, row, strict=True)) for row in body if any(cell.strip() for cell in row)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow, or save the table as CSV.") from None
    try:
        return [_flat(row) for row in parquet.read_table(path).to_pylist()]
    except Exception as e:
        raise UserError(f"{path} is not a readable Parquet file ({type(e).__name__}).") from None


def _object(row: Any, path: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}: every run must be an object of names and values.")
    return row


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _resolve(
    columns: Mapping[str, str], known: list[str], path: Path, allowed: tuple[str, ...] = COLUMNS
) -> dict[str, str]:
    """Our name -> the table's, as given or, without a word, the same name or the run record's."""
    for ours, theirs in columns.items():
        if ours not in allowed:
            raise UserError(f"'{ours}' is no column of ours; choose from {', '.join(allowed)}.{nearest(ours, allowed)}")
        if theirs not in known:
            raise UserError(f"{path} has no column '{theirs}' for {ours}.{nearest(theirs, known) or _listed(known)}")
    found = dict(columns)
    for ours in allowed:
        for theirs in (ours, RECORD.get(ours, ours)):
            if theirs in known:
                found.setdefault(ours, theirs)
    return found


def _missing(need: str, known: list[str], path: Path) -> UserError:
    hint = nearest(need, known) or _listed(known)
    return UserError(f"{path} has no column '{need}'; name it with --columns {need}=THEIR_NAME.{hint}")


def _listed(known: Iterable[str]) -> str:
    return f" It has: {', '.join(list(known)[:12])}."


def _numbers(rows: list[dict[str, Any]], column: str, path: Path) -> Array:
    values = np.empty(len(rows))
    for i, row in enumerate(rows):
        try:
            values[i] = parse_number(row.get(column))
        except ValueError:
            raise UserError(f"{path}: row {i + 1}, column '{column}': '{row.get(column)}' is no number.") from None
    return values


def parse_number(cell: Any) -> float:
    """A number from a table's cell: 1,200,000 or 1.2M or 3.5 % or 1e9; NaN where missing. Raises ValueError."""
    if cell is None:
        return math.nan
    if isinstance(cell, int | float | np.number):
        return float(cell)
    word = str(cell).strip()
    if word.lower() in MISSING:
        return math.nan
    match = NUMBER.fullmatch(word)
    if match is None or not any(c.isdigit() for c in match[1]):
        return float(word)  # "inf" and what else Python reads
    return float(match[1].replace(",", "").replace("_", "")) * SCALES[match[2].lower()]


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _compute(
    number: Mapping[str, Array], conventions: tuple[str, ...], flops: str | None, n: int, path: Path
) -> tuple[Array, Array, Array, str]:
    """N, D, C and the convention of C; what is missing follows from C = k N D."""
    factor = 6.0
    if flops not in (None, "given"):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*\*?\s*ND", flops or "", re.IGNORECASE)
        if match is None:
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
        raise UserError(f"{path} counts FLOPs by {len(named)} conventions; give --flops 6ND to count all runs alike.")
    convention = named.pop() if named else "given"
    convention += f", D = C/{factor:g}N" if no_tokens.any() else f", N = C/{factor:g}D" if no_params.any() else ""
    if not use_given.all():
        convention += f", {label} where missing"
    return params, tokens, compute, convention
