"""Resumable checkpoints: written to a temporary directory, sealed with the sha256 of each file, fsynced and renamed.

torch.distributed.checkpoint stores the tensors as safetensors, one file per process, so a different number of processes
can read them. DCP's default storage writes its index (`.metadata`) as a pickle; it is not used, because unpickling can
execute code. No pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from qies import storage
from qies.errors import Stopped
from qies.train.distributed import Group

PREFIX = "step-"
SEAL, META = "seal.json", "meta.json"
JSON_LIMIT = 1 << 20  # bytes; larger seals and meta files are rejected
log = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    *,
    keep: int = 2,
    milestones: Collection[int] = (),
    group: Group | None = None,
) -> Path:
    """Write the checkpoint of `step` below `folder`, then delete all but the newest `keep` and the milestones.

    Every process of the group calls this with its part of the tensors. An existing checkpoint is never overwritten.
    Returns the path of the new one. Raises Stopped if the disk is full; earlier checkpoints are not affected.
    """
    group = group or Group()

    def prepare() -> Path:
        try:
            return _partial(folder, step)
        except OSError as e:
            raise _full(folder / f"{PREFIX}{step:09d}.partial", str(e)) from None

    partial = group.on_first(prepare)
    problem = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP warns about a single process
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=group.size == 1)
    except CheckpointException as e:  # a BaseException, not an Exception
        problem = "; ".join(sorted({str(failure[0]) for failure in e.failures.values()}))
    except OSError as e:
        problem = str(e)

    def seal() -> Path:
        if problem:
            raise _full(partial, problem)
        try:
            final = _seal(partial, {"step": step, **meta})
        except OSError as e:
            raise _full(partial, str(e)) from None
        _prune(folder, keep, milestones, step)
        return final

    return group.on_first(seal)


def newest(folder: Path, upto: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Path and metadata of the newest intact checkpoint, or None. The step is read from the metadata, not the name.

    `upto` excludes later steps. A broken checkpoint is logged and skipped.
    """
    found = []
    for path in _entries(folder):
        try:
            found.append((_meta(path)["step"], path))
        except ValueError as e:
            log.warning("checkpoint %s: %s; it is skipped", path, e)
    for step, path in sorted(found, reverse=True):
        if upto is not None and step > upto:
            continue
        if problem := broken(path):
            log.warning("checkpoint %s: %s; using the one before it", path, problem)
            continue
        return path, _meta(path)
    return None


def load(path: Path, template: Callable[[Collection[str]], dict[str, Tensor]], group: Group | None = None) -> dict:
    """Load the checkpoint at `path` into the tensors that `template` returns for its names."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    tensors = template(list(reader.read_metadata().state_dict_metadata))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=(group or Group()).size == 1)
    return tensors


def remove(folder: Path, milestones: Collection[int] = ()) -> None:
    """Delete the checkpoints below `folder` except for the milestones."""
    _prune(folder, 0, milestones)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def copy(path: Path, folder: Path) -> None:
    """Copy the checkpoint at `path` into `folder`, atomically."""
    partial = _partial(folder, _meta(path)["step"])
    for name in [SEAL, *_sealed(path)]:
        shutil.copyfile(path / name, partial / name, follow_symlinks=False)
    _publish(partial)


def broken(path: Path) -> str | None:
    """The problem with the checkpoint at `path`, or None.

    Files that are not in the seal are logged and ignored, but a .safetensors file is a problem: DCP would read it.
    """
    try:
        sealed = _sealed(path)
        for name, digest in sealed.items():
            if _digest(path / name) != digest:
                return f"{name} does not match its sha256"
    except ValueError as e:
        return str(e)
    for extra in sorted({p.name for p in path.iterdir()} - {SEAL, *sealed}):
        if extra.endswith(".safetensors"):
            return f"{extra} is not in its seal"
        log.warning("checkpoint %s: %s is not in its seal and is ignored", path, extra)
    return None


def _entries(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, in arbitrary order."""
    if not folder.is_dir():
        return []
    entries = [p for p in sorted(folder.glob(f"{PREFIX}*")) if not p.name.endswith(".partial")]
    for path in entries:
        if path.is_symlink() or not path.is_dir():
            log.warning("%s is not a checkpoint folder and is ignored", path)
    return [p for p in entries if p.is_dir() and not p.is_symlink()]


def _partial(folder: Path, step: int) -> Path:
    """Create an empty directory to write to. Deletes what an interrupted save left."""
    storage.make_folder(folder)
    for stale in folder.glob(f"{PREFIX}*.partial"):
        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
    partial = folder / f"{PREFIX}{step:09d}.partial"
    storage.make_folder(partial)
    return partial


def _seal(partial: Path, meta: dict[str, Any]) -> Path:
    (partial / META).write_text(json.dumps(meta))
    files = {p.name: _digest(p) for p in sorted(partial.iterdir())}
    (partial / SEAL).write_text(json.dumps({"files": files, "sha256": _of_files(files)}))
    return _publish(partial)


def _publish(partial: Path) -> Path:
    """Rename to a free name; a broken checkpoint of the same step may have the default one."""
    final, n = partial.with_suffix(""), 1
    while final.exists():
        final, n = partial.with_name(f"{partial.stem}-{n}"), n + 1
    storage.publish(partial, final)
    return final


def _prune(folder: Path, keep: int, milestones: Collection[int], upto: float = math.inf) -> None:
    """Delete the checkpoints up to step `upto` except for the newest `keep` and the milestones.

    Later ones were skipped when the run resumed (broken, or without their rows of metrics). They must not displace
    good ones, and are deleted once the run has passed them.
    """
    steps: dict[Path, int] = {}
    for path in _entries(folder):
        try:
            steps[path] = _meta(path)["step"]
        except ValueError:
            steps[path] = -1  # unreadable: older than any
    steps = {path: step for path, step in steps.items() if step <= upto}
    kept = sorted(set(steps.values()))[-keep:] if keep else []
    for path, step in steps.items():
        if step not in kept and step not in milestones:
            shutil.rmtree(path)


def _full(partial: Path, problem: str) -> Stopped:
    shutil.rmtree(partial, ignore_errors=True)
    return Stopped(
        f"the checkpoint {partial.stem} could not be written ({problem}); those before it are intact: "
        "free space and run the same command again."
    )


def _sealed(path: Path) -> dict[str, str]:
    """sha256 by file name, from the seal. Raises ValueError with the problem if the seal is invalid."""
    try:
        seal = _json(path / SEAL)
        files = dict(seal["files"])
        sound = seal["sha256"] == _of_files(files) and META in files
    except (KeyError, TypeError, ValueError):
        raise ValueError("its seal is missing or unreadable") from None
    for name in files:
        if name in (SEAL, "", ".", "..") or Path(name).name != name:
            raise ValueError(f"its seal names {name!r}, outside of the checkpoint")
    if not sound:
        raise ValueError("its seal does not match its own sha256")
    return files


def _meta(path: Path) -> dict[str, Any]:
    """The metadata of the checkpoint. Raises ValueError with the problem."""
    meta = _json(path / META)
    if not isinstance(meta, dict) or type(meta.get("step")) is not int:
        raise ValueError(f"{META} names no step")
    return meta


def _json(path: Path) -> Any:
    return storage.read_json(path, JSON_LIMIT)


def _digest(path: Path) -> str:
    with storage.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_files(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
