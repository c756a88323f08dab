"""Validate and claim a run directory before training starts in it."""

from __future__ import annotations

import logging
import shutil
import stat
from dataclasses import replace
from pathlib import Path

from qies import presets, records, storage
from qies.config import RunConfig, changes, content_hash, to_dict
from qies.data.shards import Shards
from qies.errors import UserError
from qies.records import RunRecord
from qies.train import checkpoint
from qies.train.distributed import RANKS

CHECKPOINTS = "checkpoints"
# Keys that determine the shape of the model, the text or its order; a resumed run cannot change them.
FIXED = ("arm", "size", "seed", "model.", "objective.", "data.", "train.seq_len", "train.batch_size")
CHANGEABLE = (
    "config",
    "config_hash",
    "learning_rates",
    "tokens",
    "steps",
    "flops",
)  # fields that a resumed run may change
OURS = {".lock", "data", "error.log", RANKS}  # what a run directory may contain before its record is written
log = logging.getLogger(__name__)


def claim(config: RunConfig, folder: Path) -> RunRecord | None:
    """The record in `folder` if the run of `config` can resume from it, or None if the directory is free.

    Raises UserError with the differences if the directory holds anything else, so that no other run is overwritten, and
    for a world-writable directory, since its checkpoints cannot be trusted.
    """
    storage.refuse_file(folder)
    for path in (folder, folder / CHECKPOINTS):
        if path.exists() and path.stat().st_mode & stat.S_IWOTH:
            raise UserError(f"{path} can be written by anyone; chmod o-w it, or give another --out.")
    records.refuse_links(folder)
    record = records.read(folder)
    if record is None:
        names = {p.name for p in folder.iterdir()} if folder.exists() else set()
        if other := {name for name in names - OURS if not storage.is_temporary(name)}:
            raise UserError(
                f"{folder} holds no run but other files ({', '.join(sorted(other)[:3])}); give another --out."
            )
        return None
    if changed := _changes(config, folder, record):
        fixed = [c for c in changed if c.startswith(FIXED)]
        if fixed or record.finished:
            why = "; ".join(fixed or changed)
            raise UserError(f"{folder} holds another run ({why}); give another --out or delete it.")
    records.require_same_definitions(config, record, folder)
    return record


def open_run(config: RunConfig, shards: Shards, folder: Path) -> RunRecord:
    """The record of this run in `folder`, or a new one. Raises UserError if the directory holds another run.

    Permitted changes of the configuration are logged and recorded under `config_changes`.
    """
    record = claim(config, folder)
    if record is None:
        _require_room(config, shards, folder)
        record = replace(records.plan(config, shards.manifest.vocab_size), data=shards.identity())
        records.write(folder, record)
    elif other := _changes(config, folder, record):
        found = checkpoint.newest(folder / CHECKPOINTS)
        if found and found[1]["step"] > config.steps:
            raise UserError(
                f"{folder} is at step {found[1]['step']}, beyond the {config.steps} of this configuration "
                f"({'; '.join(other)}); give another --out."
            )
        log.warning("%s resumes with a changed configuration: %s", folder, "; ".join(other))
        planned = records.plan(config, shards.manifest.vocab_size)
        record = replace(
            record,
            **{name: getattr(planned, name) for name in CHANGEABLE},
            config_changes=[
                *(record.config_changes or []), {"step": found[1]["step"] if found else 0, "changes": other},
            ],
        )  # fmt: skip
        records.write(folder, record)
    records.require_same_data(shards, record, folder)
    return record if record.data is not None else replace(record, data=shards.identity())


def branch(config: RunConfig, trunk: Path, folder: Path) -> None:
    """Start the run of `config` in `folder` from the newest checkpoint that it shares with the run in `trunk`.

    The runs may differ in their budget only, and their warm-up must be given in tokens. Until either starts to decay,
    the learning rate, the batches and the weights are the same, so the branch equals the run trained from the start bit
    for bit. The record has the trunk and the step under `branch`. A folder that already holds the run is not changed.
    """
    own = claim(config, folder)
    if own is not None and own.status != "planned":
        return
    record = records.read(trunk)
    if record is None:
        raise UserError(f"{trunk} holds no run to branch from; give the folder of the longer run.")
    whole = _config(trunk, record)
    claim(whole, trunk)
    free = (
        "plugins",
        "tokens",
        "train.branches",
        "train.milestones",
        "train.keep",
        "train.save_every",
        "train.eval_tokens",
    )
    if other := [c for c in changes(to_dict(whole), to_dict(config)) if not c.startswith(free)]:
        raise UserError(f"a branch of {trunk} can have another budget only, not {'; '.join(other)}.")
    if whole.objective.terms:
        raise UserError(
            f"{trunk} has an objective whose weights fall with the fraction of its budget, so nothing can branch from "
            "it; train the shorter run by itself."
        )
    # A run takes only its learning rates from the rule for a size and budget.
    if whole.warmup_steps != config.warmup_steps or records.learning_rates(whole) != records.learning_rates(config):
        raise UserError(
            f"warm-up or learning rates of {trunk} depend on its budget, so nothing can branch from it; "
            "train the longer run with train.warmup_tokens."
        )
    upto = min(whole.decay_start, config.decay_start)
    found = checkpoint.newest(trunk / CHECKPOINTS, upto)
    if found is None:
        raise UserError(
            f"{trunk} has no checkpoint at step {upto} or before; train it with train.branches=[{config.tokens}]."
        )
    path, meta = found
    planned = replace(records.plan(config, record.model["vocab_size"]), data=record.data)
    with records.lock(folder):
        own = claim(config, folder)
        if own is not None and own.status != "planned":  # another process has branched it meanwhile
            return
        records.write(folder, planned)  # if killed from here on, the same command branches again
        records.truncate_steps(folder, 0)
        for row in records.steps(trunk)[: meta["step"]]:
            records.append(folder, row)
        checkpoint.copy(path, folder / CHECKPOINTS)
        records.write(folder, replace(planned, branch={"from": record.config_hash, "step": meta["step"]}))


def _config(folder: Path, record: RunRecord) -> RunConfig:
    try:
        return record.run_config
    except UserError as e:
        raise UserError(f"{folder} was written by another version ({e}); give another --out.") from None


def _changes(config: RunConfig, folder: Path, record: RunRecord) -> list[str]:
    if record.config_hash == content_hash(config):
        return []
    return changes(to_dict(_config(folder, record)), to_dict(config))


def _require_room(config: RunConfig, shards: Shards, folder: Path) -> None:
    """Raise UserError unless the disk has space for the checkpoints and the model: weights and two moments in fp32."""
    values = config.settings(shards.manifest.vocab_size)
    weights = 4 * presets.count_parameters(values)["total"]
    needed = weights + 3 * weights * (config.train.keep + 1 + len(config.milestones))
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:,.1f} MB free, but checkpoints and model take up to {needed / 1e6:,.1f} MB; "
            "free space, lower train.keep or give another --out."
        )
