"""Resumable checkpoints: written aside, fsynced, sealed with a sha256 of each file, then renamed. Never pickled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from qies.data.files import sync

PREFIX = "step-"
log = logging.getLogger(__name__)


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int = 2) -> Path:
    """Write checkpoint `step` below `folder` and drop all but the newest `keep`. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    final = folder / f"{PREFIX}{step:09d}"
    partial = folder / f"{final.name}.partial"
    partial.mkdir()
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, partial / "tensors.safetensors")
    (partial / "meta.json").write_text(json.dumps({"step": step, **meta}))
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(partial.iterdir())}
    (partial / "seal.json").write_text(json.dumps({"files": files}))
    for path in (*partial.iterdir(), partial):
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(folder)
    for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and meta of the newest checkpoint whose seal holds, or None. A broken one is named and passed over."""
    for path in sorted(folder.glob(f"{PREFIX}*[0-9]"), reverse=True):
        problem = broken(path)
        if problem:
            log.warning("checkpoint %s: %s; using the one before it", path, problem)
            continue
        meta = json.loads((path / "meta.json").read_text())
        return safetensors.torch.load_file(path / "tensors.safetensors"), meta
    return None


def remove(folder: Path) -> None:
    """Delete every checkpoint below `folder`: the finished run keeps its model instead."""
    shutil.rmtree(folder, ignore_errors=True)


def broken(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None."""
    try:
        files = json.loads((path / "seal.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its seal is missing or unreadable"
    for name in ("tensors.safetensors", "meta.json"):
        try:
            digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        except OSError:
            return f"{name} is missing"
        if digest != files.get(name):
            return f"{name} does not match its sha256"
    return None
