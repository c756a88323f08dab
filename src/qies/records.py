"""Run records: one readable JSON a run, and a line a step beside it. Facts are read from here and nowhere else."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qies import __version__, storage
from qies.config import RunConfig, content_hash, differences, recorded
from qies.data import files
from qies.errors import UserError

if TYPE_CHECKING:
    from qies.data.shards import Shards

SCHEMA = 1
STATUSES = ("planned", "running", "done", "failed", "diverged")


def plan(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """The record of a run that has not started: everything that is known before anything is spent."""
    from qies import presets
    from qies.accounting.flops import CONVENTION, training_flops_per_token

    values = presets.settings(config.arm, config.size, vocab_size, **config.model)
    if values["position"] == "learned" and config.train.seq_len > values["max_position_embeddings"]:
        raise UserError(
            f"train.seq_len is {config.train.seq_len}, beyond the {values['max_position_embeddings']} positions that "
            f"arm {config.arm} learns; shorten it or raise model.max_position_embeddings."
        )
    per_token = training_flops_per_token(values, config.train.seq_len)
    tokens = config.steps * config.train.seq_len * config.train.batch_size
    return {
        "schema": SCHEMA,
        "arm": config.arm,
        "size": config.size,
        "seed": config.seed,
        "status": "planned",
        "config": recorded(config),
        "config_hash": content_hash(config),
        "model": values,
        "learning_rates": learning_rates(config),
        "params": presets.count_parameters(values),
        "tokens": tokens,
        "steps": config.steps,
        "flops_per_token": per_token,
        "flops": per_token * tokens,
        "flops_convention": CONVENTION,
        "code_version": code_version(),
        "environment": environment(),
        "metrics": {},
        "wall_seconds": None,
        "tokens_per_second": None,
        "peak_memory_bytes": None,
    }


def learning_rates(config: RunConfig) -> dict[str, float]:
    """The peak rates of the optimizers' groups before `train.lr_scale`, as the rule gives them for the run's size."""
    from qies import presets

    rule = presets.hyperparameters(presets.parse_size(config.size), config.tokens)
    return {group: getattr(rule, f"{group}_lr") for group in ("matrix", "embedding", "head", "vector")}


def require_same_definitions(config: RunConfig, record: dict[str, Any], folder: Path) -> None:
    """Raise UserError, naming the fields, where the record in `folder` has another model or other learning rates than
    `config` stands for today: the definition of its arm, or the rule for a size, has changed since.

    Fields that models had not yet, or have no more, are compared by what they meant. Learning rates are compared where
    the record holds them.
    """
    from qies import presets

    then = record.get("model")
    if not isinstance(then, dict) or not isinstance(then.get("vocab_size"), int):
        raise UserError(f"{folder / 'run.json'} describes no model; delete that run's folder and run it again.")
    now = {"model": presets.settings(config.arm, config.size, then["vocab_size"], **config.model)}
    then = presets.MODEL_FIELDS | presets.BEFORE | then
    old: dict[str, Any] = {"model": {k: v for k, v in then.items() if k not in presets.GONE or v != presets.GONE[k]}}
    if "learning_rates" in record:
        old["learning_rates"], now["learning_rates"] = record["learning_rates"], learning_rates(config)
    if changed := differences(old, now):
        raise UserError(
            f"{folder} holds a run from before the definition of its arm changed ({'; '.join(changed)}); "
            "give another --out."
        )


def require_same_data(shards: Shards, record: dict[str, Any], folder: Path) -> None:
    """Raise UserError where the record in `folder` names other tokens, or another tokenizer, than `shards` have."""
    given, trained_on = shards.identity(), record.get("data", {})
    if trained_on.get("tokenizer_sha256", given["tokenizer_sha256"]) != given["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was trained with another tokenizer than that of {shards.folder}; give another --out."
        )
    if trained_on.get("hash", given["hash"]) != given["hash"]:
        raise UserError(f"{folder} was trained on other data (hash {trained_on['hash']}); give another --out.")


def refuse_file(folder: Path) -> None:
    """Raise UserError where `folder` is a file or below one, before anything is spent on what is to go there."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give another --out.")


def make_folder(folder: Path) -> None:
    """Make `folder` unless it is there. Raises UserError where the system does not let us, or not write there."""
    try:
        files.make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give another folder.") from None
    if not os.access(folder, os.W_OK | os.X_OK):  # on a file system that is read-only too
        raise UserError(f"{folder} cannot be written; change its permissions or give another folder.")


def write(folder: Path, record: dict[str, Any]) -> None:
    """Replace `folder/run.json` in one step, so that a reader never sees half of it."""
    make_folder(folder)
    write_json(folder / "run.json", record)


def write_json(path: Path, value: Any) -> None:
    """JSON by `storage.write_text`; NaN and infinity, which JSON has not, raise ValueError."""
    storage.write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The record in `folder`, or None when there is none. Raises UserError when it cannot be read."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON; delete that run's folder and run it again.") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("status") not in STATUSES:
        raise UserError(f"{path} is not a run record of schema {SCHEMA}; delete that run's folder and run it again.")
    return record


@contextmanager
def lock(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel lets go when it dies.

    Raises UserError when another process still holds it after `patience` seconds.
    """
    make_folder(folder)
    refuse_links(folder)
    with open(folder / ".lock", "w") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder} is in use by another process; wait for it or stop it.") from None
                time.sleep(0.2)
        yield


def refuse_links(folder: Path) -> None:
    """Raise UserError when something in the run's folder is a symbolic link: writing there would write elsewhere.

    Folders in it are searched too, but not that of checkpoints, where nothing is written through a link.
    """
    for parent, folders, names in os.walk(folder):
        if links := sorted(name for name in (*folders, *names) if Path(parent, name).is_symlink()):
            raise UserError(f"{Path(parent, links[0])} is a symbolic link, which no run makes; delete it.")
        folders[:] = [name for name in folders if name != "checkpoints"]


def query(folder: Path, **equal: Any) -> list[dict[str, Any]]:
    """Every record below `folder` (a study or its `runs`) whose fields equal the given values, in name order."""
    records = [read(path.parent) for path in sorted(folder.glob("**/run.json"))]
    return [r for r in records if r is not None and all(r.get(k) == v for k, v in equal.items())]


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add one line to the run's metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(row, allow_nan=False) + "\n")


def steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    return parse_rows(path.read_text(encoding="utf-8")) if path.is_file() else []


def parse_rows(text: str) -> list[dict[str, Any]]:
    """JSON lines up to the first that is not whole, or no step's."""
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
    """Keep the rows before `step`: what a resumed run will do again is not counted twice."""
    rows = [row for row in steps(folder) if row["step"] < step]
    partial = folder / ".metrics.jsonl"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, folder / "metrics.jsonl")


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
