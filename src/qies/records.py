"""Run records: `run.json` in a run directory, one per run, and `metrics.jsonl` beside it, one line per step.

Facts about a run are read from these files and from nothing else. `read` is the border: what it returns is complete
and of the stated types, so no reader checks a field again. Nothing here needs torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from filelock import Timeout

from qies import __version__, storage
from qies.config import RunConfig, content_hash, differences, from_dict, recorded
from qies.errors import UserError

if TYPE_CHECKING:
    from qies.data.shards import Shards

RECORD, STEPS = "run.json", "metrics.jsonl"
SCHEMA = 1
Status = Literal["planned", "running", "done", "failed", "diverged"]
FINISHED = ("done", "diverged")  # a run that ended like this is not run again


@dataclass(frozen=True)
class RunRecord:
    """What is known about one run.

    `config` is the run's configuration (`run_config` gives the dataclass), `model` the complete fields of its
    `QiesConfig`, `params` counts parameters by group, with `non_embedding` and `total`. `learning_rates` are the peak
    rates by optimizer group before `train.lr_scale`. `metrics` is empty until the run is done, and then has at least
    `val_loss` (nats per token) and `val_bpb` (bits per byte). `flops` is the whole run's, counted as
    `flops_convention` says. `data` identifies the text and tokenizer (`Shards.identity`). `config_changes` lists the
    changes of configuration with which the run was resumed, `branch` names the run and step that it started from.

    A field that is None is not in the file.
    """

    arm: str
    size: str
    seed: int
    status: Status
    config: dict[str, Any]
    config_hash: str
    model: dict[str, Any]
    learning_rates: dict[str, float] | None
    params: dict[str, int]
    tokens: int
    steps: int
    flops_per_token: float
    flops: float
    flops_convention: str
    code_version: str
    environment: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    data: dict[str, Any] | None = None
    skipped_steps: int | None = None
    spikes: int | None = None
    processes: int | None = None
    threads: int | None = None
    precision: str | None = None
    config_changes: list[dict[str, Any]] | None = None
    branch: dict[str, Any] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run is done or has diverged."""
        return self.status in FINISHED

    @property
    def non_embedding(self) -> int:
        """Parameters without embedding and head."""
        return self.params["non_embedding"]

    @property
    def val_loss(self) -> float:
        """Held-out loss of a run that is done, in nats per token."""
        return self.metrics["val_loss"]

    @property
    def run_config(self) -> RunConfig:
        """The configuration. Raises UserError if this version does not know one of its fields."""
        return from_dict(RunConfig, self.config)

    def to_dict(self) -> dict[str, Any]:
        """The record as `run.json` has it."""
        values = {"schema": SCHEMA, **asdict(self)}
        return {key: value for key, value in values.items() if value is not None or key in NULLS}


TOTALS = ("non_embedding", "total")  # the keys of `params` that every record has
# Fields that are null in the file while they are unknown; others are omitted.
NULLS = ("wall_seconds", "tokens_per_second", "peak_memory_bytes")


# --- planning and checks


def plan(config: RunConfig, vocab_size: int) -> RunRecord:
    """The record of a run that has not started, from its configuration."""
    from qies import presets
    from qies.accounting.flops import CONVENTION, training_flops_per_token
    from qies.accounting.parameters import longest_context

    values = config.settings(vocab_size)
    if config.train.seq_len > longest_context(values):
        raise UserError(
            f"train.seq_len is {config.train.seq_len}, beyond the {values['max_position_embeddings']} positions that "
            f"arm {config.arm} learns; shorten it or raise model.max_position_embeddings."
        )
    per_token = training_flops_per_token(values, config.train.seq_len)
    tokens = config.steps * config.train.seq_len * config.train.batch_size
    return RunRecord(
        arm=config.arm,
        size=config.size,
        seed=config.seed,
        status="planned",
        config=recorded(config),
        config_hash=content_hash(config),
        model=values,
        learning_rates=learning_rates(config),
        params=presets.count_parameters(values),
        tokens=tokens,
        steps=config.steps,
        flops_per_token=per_token,
        flops=per_token * tokens,
        flops_convention=CONVENTION,
        code_version=code_version(),
        environment=environment(),
    )


def learning_rates(config: RunConfig) -> dict[str, float]:
    """The peak learning rates of the optimizer groups before `train.lr_scale`, by the rule for the run's size."""
    from qies import presets

    rule = presets.hyperparameters(presets.parse_size(config.size), config.tokens)
    return {group: getattr(rule, f"{group}_lr") for group in ("matrix", "embedding", "head", "vector")}


def require_same_definitions(config: RunConfig, record: RunRecord, folder: Path) -> None:
    """Raise UserError, with the differences, if the record in `folder` has another model, other parameter counts or
    other learning rates than `config` defines today: the arm, a mixer or the rule for the size has changed.

    Fields that were added or removed since are compared by their meaning. Learning rates are compared if recorded.
    """
    from qies import presets

    then = record.model
    if not isinstance(then.get("vocab_size"), int):
        raise UserError(f"{folder / 'run.json'} describes no model; delete that run's folder and run it again.")
    now = {"model": config.settings(then["vocab_size"])}
    counted = presets.count_parameters(now["model"])  # a plugin can change a mixer's weights without changing a field
    now["params"] = {total: counted[total] for total in TOTALS}
    then = presets.MODEL_FIELDS | presets.BEFORE | then
    old: dict[str, Any] = {"model": {k: v for k, v in then.items() if k not in presets.GONE or v != presets.GONE[k]}}
    old["params"] = {total: record.params[total] for total in TOTALS}
    if record.learning_rates is not None:
        old["learning_rates"], now["learning_rates"] = record.learning_rates, learning_rates(config)
    if changed := differences(old, now):
        raise UserError(
            f"{folder} holds a run from before the definition of its arm changed ({'; '.join(changed)}); "
            "give another --out."
        )


def require_same_data(shards: Shards, record: RunRecord, folder: Path) -> None:
    """Raise UserError if the record in `folder` has other tokens or another tokenizer than `shards`."""
    given, trained_on = shards.identity(), record.data or {}
    if trained_on.get("tokenizer_sha256", given["tokenizer_sha256"]) != given["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was trained with another tokenizer than that of {shards.folder}; give another --out."
        )
    if trained_on.get("hash", given["hash"]) != given["hash"]:
        raise UserError(f"{folder} was trained on other data (hash {trained_on['hash']}); give another --out.")


# --- run.json


def read(folder: Path) -> RunRecord | None:
    """The record in `folder`, or None if there is none. Raises UserError if it is not a complete record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON; {_DELETE}") from None
    try:
        return from_json(values)
    except ValueError as error:
        raise UserError(f"{path} is not a run record of schema {SCHEMA} ({error}); {_DELETE}") from None


_DELETE = "delete that run's folder and run it again."


def from_json(values: Any) -> RunRecord:
    """The record from the JSON value of a `run.json`, of this schema or an earlier one.

    Raises ValueError with the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ValueError(f"schema is {values.get('schema') if isinstance(values, dict) else 'missing'}")
    values = _migrate(values)
    kinds = _kinds()
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(f"unknown field {unknown[0]}")
    for f in fields(RunRecord):
        if f.name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{f.name} is missing")
        elif not _is(values[f.name], kinds[f.name]):
            raise ValueError(f"{f.name} is {json.dumps(values[f.name])[:40]}")
    for total in TOTALS:
        if not _is(values["params"].get(total), (int,)):
            raise ValueError(f"params.{total} is missing")
    return RunRecord(**values)


def _migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of an earlier record to the current ones. All knowledge of earlier records is here.

    Schema 1 has gained fields since its first records; missing ones get the value for "not recorded".
    """
    return {"model": {}, "learning_rates": None} | {key: value for key, value in values.items() if key != "schema"}


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """By field what its value may be: types, or the literals of a status."""
    kinds = {}
    for name, hint in get_type_hints(RunRecord).items():
        parts = get_args(hint) if get_origin(hint) not in (dict, list) and get_args(hint) else (hint,)
        kinds[name] = tuple(get_origin(part) or part for part in parts)
    return kinds


def _is(value: Any, kinds: tuple[Any, ...]) -> bool:
    if isinstance(kinds[0], str):
        return isinstance(value, str) and value in kinds
    if type(value) is int and float in kinds:
        return True
    return type(value) in kinds  # true is an int elsewhere


def write(folder: Path, record: RunRecord) -> None:
    """Replace `folder/run.json` atomically; the directory is created if need be."""
    storage.make_writable_folder(folder)
    storage.write_json(folder / RECORD, record.to_dict())


def create(folder: Path, record: RunRecord) -> bool:
    """Write `folder/run.json` unless it exists; returns whether this call did."""
    storage.make_writable_folder(folder)
    return storage.create(folder / RECORD, storage.dumps(record.to_dict()))


def query(folder: Path, **equal: Any) -> list[RunRecord]:
    """The records below `folder` (a study or its `runs`) whose fields equal the given values, by directory name."""
    found = [read(path.parent) for path in sorted(folder.glob(f"**/{RECORD}"))]
    return [r for r in found if r is not None and all(getattr(r, k) == v for k, v in equal.items())]


@contextmanager
def lock(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """Hold the run directory `folder`, created if need be, for this process.

    Raises UserError if it holds a symbolic link, or if another process still holds it after `patience` seconds.
    """
    storage.make_writable_folder(folder)
    refuse_links(folder)
    held = storage.file_lock(folder / ".lock")
    try:
        held.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait for it or stop it.") from None
    try:
        yield
    finally:
        held.release()


def refuse_links(folder: Path) -> None:
    """Raise UserError if anything in a run directory is a symbolic link: writing there would write elsewhere.

    Subdirectories are searched too, except that of checkpoints, where nothing is written through a link.
    """
    for parent, folders, names in os.walk(folder):
        if links := sorted(name for name in (*folders, *names) if Path(parent, name).is_symlink()):
            raise UserError(f"{Path(parent, links[0])} is a symbolic link, which no run makes; delete it.")
        folders[:] = [name for name in folders if name != "checkpoints"]


# --- metrics.jsonl


def append(folder: Path, row: dict[str, Any]) -> None:
    """Append the row of one step to metrics.jsonl."""
    with open(folder / STEPS, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, allow_nan=False) + "\n")


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to the first incomplete line."""
    path = folder / STEPS
    return parse_rows(path.read_text(encoding="utf-8")) if path.is_file() else []


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The rows in JSON lines, up to the first line that is incomplete or not the row of a step."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int or "loss" not in row:
            break
        rows.append(row)
    return rows


def truncate_steps(folder: Path, step: int) -> None:
    """Keep the rows before `step`, so that a resumed run does not count its steps twice."""
    rows = [row for row in steps(folder) if row["step"] < step]
    storage.write_text(folder / STEPS, "".join(json.dumps(row) + "\n" for row in rows))


# --- code and machine


@cache
def code_version() -> str:
    """The package's version, with the commit when it runs from a git checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__]
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


@cache
def environment() -> dict[str, Any]:
    """Versions and the machine, as far as they can change a result."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **{p: importlib.metadata.version(p) for p in packages},
    }
