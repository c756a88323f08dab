"""A study's folder as the page and its analyses see it. Fields are validated here, once.

Missing or unreadable records become notes (`Study.notes`) instead of errors, so that an unfinished study has a page.
Only a folder without a readable run record is an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from qies import records, strict_yaml
from qies.analyses.formatting import count, number, si
from qies.errors import UserError
from qies.records import RunRecord

PROPOSAL, BASELINE = "qies", "transformer"


@dataclass(frozen=True)
class Cell:
    """The size and the number of tokens, which two runs must share to be compared."""

    size: str
    tokens: float | None


@dataclass(frozen=True)
class Run:
    """One run as the page shows it; numbers that are absent or not finite are None. `rows` are the lines of
    metrics.jsonl.

    `induction` is the final gain on a repeated random segment in nats per token, `onset` the tokens from
    which on it stayed at or above INDUCTION_ONSET. `clean_loss` is the loss on the clean part of the held-out text (see
    `qies.data.builder.overlap`).
    """

    arm: str
    size: str
    seed: str
    status: str
    config_hash: str
    params: float | None
    total_params: float | None
    tokens: float | None
    flops: float | None
    loss: float | None
    clean_loss: float | None
    bits_per_byte: float | None
    induction: float | None
    onset: float | None
    seconds: float | None
    tokens_per_second: float | None
    memory: float | None
    record: RunRecord
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.size}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return self.status == "done" and self.loss is not None and self.loss > 0

    @property
    def cell(self) -> Cell:
        return Cell(self.size, self.tokens)


@dataclass(frozen=True)
class Study:
    """All records of a study folder; `notes` names what is missing, unreadable or inconsistent."""

    name: str
    folder: Path
    config: dict[str, Any]
    runs: list[Run]
    notes: list[str]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Any]:
        """The stored result of an analysis, NAME.json; {} with a note where it is missing, unreadable or failed."""
        if name not in self.parts:
            self.parts[name] = _read(self.folder, f"{name}.json", self.notes)
        return self.parts[name]

    @cached_property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.done]

    @cached_property
    def arms(self) -> list[str]:
        """Baseline first, then in the order of the study file, then as found."""
        present = dict.fromkeys(run.arm for run in self.runs)
        planned = [arm for arm in map(str, listed(self.config.get("arms"))) if arm in present]
        return sorted(dict.fromkeys([*planned, *present]), key=lambda arm: arm != BASELINE)

    @cached_property
    def cells(self) -> list[Cell]:
        """Smallest first."""
        smallest: dict[Cell, float] = {}
        for run in self.runs:
            smallest[run.cell] = min(smallest.get(run.cell, math.inf), run.params or math.inf)
        return sorted(smallest, key=lambda cell: (smallest[cell], cell.tokens or 0))

    @cached_property
    def seeds(self) -> list[str]:
        """In the order of the study file, then as found from the smallest."""
        present = sorted({run.seed for run in self.runs}, key=lambda seed: (len(seed), seed))
        planned = [seed for seed in map(str, listed(self.config.get("seeds"))) if seed in present]
        return list(dict.fromkeys([*planned, *present]))

    @property
    def base(self) -> str:
        """The arm that differences refer to."""
        return BASELINE if BASELINE in self.arms else self.arms[0]

    def label(self, cell: Cell) -> str:
        """The size, with the tokens where one size was trained on several amounts."""
        alone = [c.size for c in self.cells].count(cell.size) == 1
        return cell.size if alone else f"{cell.size}, {si(cell.tokens)} tokens"

    def of(self, arm: str, cell: Cell) -> list[Run]:
        return [run for run in self.done if run.arm == arm and run.cell == cell]

    def shared_cells(self, arms: Iterable[str]) -> list[Cell]:
        """Those that have a finished run of every one of these arms, smallest first."""
        arms = list(arms)
        return [cell for cell in self.cells if all(self.of(arm, cell) for arm in arms)]

    def mean(self, arm: str, cell: Cell, field: str = "loss") -> float | None:
        """Mean of a field over the seeds of an arm in a cell, or None."""
        values = [value for run in self.of(arm, cell) if (value := getattr(run, field)) is not None]
        return fmean(values) if values else None

    def differences(self, arm: str, other: str, cell: Cell) -> list[float]:
        """Loss of `arm` minus loss of `other`, nats per token, one value per seed that both have."""
        ours, theirs = ({run.seed: run.loss or 0.0 for run in self.of(a, cell)} for a in (arm, other))
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def fit(self, arm: str, variable: str) -> dict[str, Any]:
        """The stored fit of an arm in "params" or "flops"; {} when there is none."""
        return mapping(mapping(mapping(self.part("fits").get("arms")).get(arm)).get(variable))

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """The stored comparisons (Comparison.to_dict()) that carry a verdict."""
        said = ("candidate", "baseline", "verdict", "reason", "summary")
        pairs = listed(self.part("comparison").get("pairs"))
        return [pair for pair in map(mapping, pairs) if all(isinstance(pair.get(key), str) for key in said)]

    @cached_property
    def main_pair(self) -> dict[str, Any] | None:
        """The comparison of the proposal with the baseline, else the first one; None when there is none."""
        named = [p for p in self.pairs if (p["candidate"], p["baseline"]) == (PROPOSAL, self.base)]
        return next(iter([*named, *self.pairs]), None)

    def curve(self, arm: str, variable: str) -> dict[str, list[float]]:
        """The fitted law as lists x, loss and, where it has an interval, lo and hi; {} when there is none."""
        stored = mapping(self.fit(arm, variable).get("curve"))
        lists = {k: listed(stored.get(k)) for k in ("x", "loss", "lo", "hi")}
        lists = {k: v for k, v in lists.items() if v and len(v) == len(lists["x"]) and all(map(_positive, v))}
        return lists if "x" in lists and "loss" in lists else {}


def read_study(folder: Path) -> Study:
    """Read every record of a study folder. Raises UserError when it holds no readable run record."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a study, such as results/quick")
    notes: list[str] = []
    runs = [run for path in sorted(folder.glob("runs/*/run.json")) if (run := _read_run(path.parent, notes))]
    if not runs:
        raise UserError(f"{folder} holds no readable run record (runs/*/run.json); run the study first")
    config = _read(folder, "study.yaml", notes)
    study = Study(str(config.get("name") or folder.resolve().name), folder, config, runs, notes)
    notes += _mismatches(study)
    return study


def _read_run(folder: Path, notes: list[str]) -> Run | None:
    try:
        record = records.read(folder)
        rows = records.steps(folder)
    except (UserError, OSError, UnicodeDecodeError):
        notes.append(f"runs/{folder.name} could not be read and is ignored.")
        return None
    if record is None:
        return None
    metrics = record.metrics
    return Run(
        arm=record.arm,
        size=record.size,
        seed=str(record.seed),
        status=record.status,
        config_hash=record.config_hash,
        params=number(record.non_embedding),
        total_params=number(record.params["total"]),
        tokens=number(record.tokens),
        flops=number(record.flops),
        loss=number(metrics.get("val_loss")),
        clean_loss=number(metrics.get("val_loss_clean")),
        bits_per_byte=number(metrics.get("val_bpb")),
        induction=number(metrics.get("induction")),
        onset=number(metrics.get("induction_onset")),
        seconds=number(record.wall_seconds),
        tokens_per_second=number(record.tokens_per_second),
        memory=number(record.peak_memory_bytes),
        record=record,
        rows=rows,
    )


def _read(folder: Path, file: str, notes: list[str]) -> dict[str, Any]:
    """A JSON or YAML mapping; {} with a note when it is absent or cannot be read."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
        value = strict_yaml.loads(text) if file.endswith(".yaml") else json.loads(text)
    except FileNotFoundError:
        notes.append(f"{file} is missing, so its part of the page is omitted.")
        return {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{file} could not be read, so its part of the page is omitted.")
        return {}
    if "error" in value:
        notes.append(f"The analysis of {file} failed, so its part of the page is omitted: {value['error']}")
        return {}
    return value


def stored(path: Path) -> dict[str, Any]:
    """The result of an analysis in the file `path`; {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return mapping(value)


def _mismatches(study: Study) -> list[str]:
    """Notes on what prevents or confounds comparisons of the runs."""
    notes = []
    missing = Counter(
        "done without a loss" if run.status == "done" else run.status for run in study.runs if not run.done
    )
    if missing:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(missing.items()))
        notes.append(
            f"{missing.total()} of {len(study.runs)} runs have no result ({counts}); only the table of runs lists them."
        )
    for cell in study.cells:
        params = [run.params for run in study.done if run.cell == cell and run.params]
        if params and max(params) > 1.01 * min(params):
            notes.append(
                f"At {study.label(cell)} the arms differ by more than 1% in parameters "
                f"({count(min(params))} to {count(max(params))})."
            )
    for what, key in {
        "data": lambda r: (r.data or {}).get("hash"),
        "code versions": lambda r: r.code_version,
        "environments": lambda r: r.environment,
        "FLOP conventions": lambda r: r.flops_convention,
    }.items():
        kinds = {json.dumps(key(run.record), sort_keys=True) for run in study.done}
        if len(kinds) > 1:
            notes.append(f"The runs come from {len(kinds)} different {what}.")
    for arm in study.arms:
        settings = {_settings(run.record) for run in study.done if run.arm == arm}
        if len(settings) > 1:
            notes.append(
                f"{arm} was trained with {len(settings)} different settings (variants); its means and laws mix them."
            )
    return notes


def _settings(record: RunRecord) -> str:
    """The settings of a run other than arm, size, tokens and seed."""
    return json.dumps([record.config.get("train"), record.config.get("model")], sort_keys=True)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _positive(value: Any) -> bool:
    return (number(value) or 0) > 0
