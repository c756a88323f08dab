"""Runs as numbers: read from a table or a folder of run records, every name and unit stated once.

Legend: N parameters, D training tokens, C training FLOPs, L loss in nats per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qies.errors import UserError, unknown
from qies.scaling.tables.columns import NUMBERS, TEXTS, missing, resolve, settings_of, text
from qies.scaling.tables.files import read_rows
from qies.scaling.tables.number_parsing import read_numbers

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """n training runs, one array entry each.

    `params` N, `tokens` D, `flops` C, `loss` L (nats per token), `weight` (of the run in a fit, 1 by default) and
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
            raise unknown("arm", arm, self.arms, where="in this table")
        return self.select(np.array([a == arm for a in self.arm]))


def read_runs(path: str | Path, columns: Mapping[str, str] | None = None, flops: str | None = None) -> Runs:
    """Runs of a CSV, TSV, JSONL, JSON or Parquet table, or of every run.json below a folder.

    columns: our name -> the table's name, such as {"params": "N"}, with a factor where the unit is another, such as
    {"tokens": "D (billions)*1e9"}; nested JSON is reached by dots ("metrics.val_loss"). Names differ by more than
    case. Needed are loss and two of params, tokens and flops: the third follows from C = 6ND.
    flops: None takes the table's FLOPs and 6ND where there are none; "6ND" or another multiple, such as "8ND" for
    recomputed activations, applies to all runs; "given" requires the table's. Numbers may read 1,200,000 or 1.2M or
    3.5 % (`parse_number`), and 0,05 in a column with decimal commas, which `notes` say. Values that are missing or not
    finite are kept as NaN, for `sound` to report. Raises UserError for an unreadable file, an unknown or missing
    column, a cell that is not a number, and commas whose meaning the table does not determine.
    """
    path = Path(path)
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows; give a table with one run a row.")
    known = list(dict.fromkeys(key for row in rows for key in row))
    names = resolve(columns or {}, known, path)
    if "loss" not in names:
        raise missing("loss", known, path)
    if len(names.keys() & {"params", "tokens", "flops"}) < 2:
        raise missing("params" if "params" not in names else "tokens", known, path)
    number, notes = read_numbers(rows, {k: names[k] for k in NUMBERS if k in names}, path)
    words = {k: tuple(text(row.get(names[k][0])) for row in rows) for k in TEXTS if k in names}
    n = len(rows)
    params, tokens, compute, convention = _compute(number, words.get("flops_convention", ()), flops, n, path)
    seed = number.get("seed", np.zeros(n))
    return Runs(
        params=params,
        tokens=tokens,
        flops=compute,
        loss=number["loss"],
        arm=words.get("arm", ("",) * n),
        seed=np.where(np.isfinite(seed), seed, 0).astype(np.int64),
        weight=np.where(np.isnan(w := number.get("weight", np.ones(n))), 1.0, w),
        wall_seconds=number.get("wall_seconds", np.full(n, np.nan)),
        status=words.get("status", ("",) * n),
        name=words.get("name", tuple(f"row {i + 1}" for i in range(n))),
        run=words.get("run", ("",) * n),
        convention=convention,
        unique=number.get("unique"),
        induction=number.get("induction"),
        induction_onset=number.get("induction_onset"),
        context=words.get("context", ()),
        corpus=words.get("corpus", ()),
        settings=settings_of(rows, [k for k in known if k not in {name for name, _ in names.values()}]),
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
    names = resolve(columns or {}, known, path, (*needed, "weight"))
    for need in needed:
        if need not in names:
            raise missing(need, known, path)
    number = read_numbers(rows, {**{need: names[need] for need in needed}, **names}, path)[0]
    if "weight" in number:
        number["weight"] = np.where(np.isnan(number["weight"]), 1.0, number["weight"])
    return number


@dataclass(frozen=True)
class Dropped:
    """A run left out: its index in the table it came from, its name, and why."""

    index: int
    name: str
    reason: str


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
