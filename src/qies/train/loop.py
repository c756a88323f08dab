"""The training loop: a run's configuration and its data in, a finished run record out. Resumes where it was."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from qies import presets, runs
from qies.config import RunConfig, TrainConfig, content_hash, differences, to_dict
from qies.data.batches import Batches, val_batches
from qies.data.shards import Shards
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.train import checkpoint
from qies.train.optim import Optimizers
from qies.train.schedule import warmup_stable_decay
from qies.train.validation import held_out_loss

transformers_logging.disable_progress_bar()  # saving a model is no news beside the run's own bar

Progress = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """A signal asked the run to stop; it has saved and can be resumed. `code` is the exit code, 128 + signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}; run the same command again to resume")
        self.code = code


def precision_context(name: str) -> Callable[[], AbstractContextManager]:
    """The context forward passes run in: bf16 autocast, or nothing for fp32. "auto" asks the processor."""
    if name == "bf16" or (name == "auto" and torch.cpu._is_avx512_bf16_supported()):
        return lambda: torch.autocast("cpu", torch.bfloat16)
    return nullcontext


def keep_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it: page faults of fresh tensors cost a training step on
    a CPU up to half its time. Does nothing elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, 1 << 30), (-2, 64 << 20)):  # mmap threshold, trim threshold, top pad
            libc.mallopt(option, value)


def check_data(shards: Shards, settings: TrainConfig) -> None:
    """Raise UserError unless both splits hold enough tokens to train and evaluate with these settings."""
    Batches(shards, "train", seq_len=settings.seq_len, batch_size=settings.batch_size, seed=0)
    val_batches(shards, settings.seq_len, settings.batch_size)


def build_model(config: RunConfig, vocab_size: int) -> QiesForCausalLM:
    """The run's model with its initial weights, a function of the configuration and its seed alone."""
    values = presets.settings(config.arm, config.size, vocab_size, **config.model)
    torch.manual_seed(config.seed)
    return QiesForCausalLM(QiesConfig(**values))


def train(
    config: RunConfig, shards: Shards, folder: Path, *, progress: Progress | None = None, patience: float = 30.0
) -> dict[str, Any]:
    """Train one run in `folder` and return its record; a finished run is returned as it is, an unfinished one resumed.

    Writes run.json, metrics.jsonl (a row a step), checkpoints while it runs, and `model/` (safetensors and
    tokenizer) at the end. Raises UserError when `folder` holds another run or other data, Interrupted after
    SIGTERM or SIGINT once the state is saved. Another process in the same folder is waited for, `patience` seconds.
    """
    keep_memory()
    with runs.lock(folder, patience):
        record = open_run(config, shards, folder)
        if record["status"] in ("done", "diverged"):
            return record
        with _StopSignals() as stop:
            return _Run(config, shards, folder, record, progress, stop).go()


def claim(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The record in `folder` if it is this run's, None if the folder is free. Raises UserError when it holds anything
    else, so that nothing of another's is overwritten."""
    record = runs.read(folder)
    if record is None:
        if folder.exists() and (other := {p.name for p in folder.iterdir()} - {".lock", "data", "error.log"}):
            raise UserError(
                f"{folder} holds no run but other files ({', '.join(sorted(other)[:3])}); give another --out."
            )
        return None
    if record["config_hash"] != content_hash(config):
        changes = "; ".join(differences(record["config"], to_dict(config)))
        raise UserError(f"{folder} holds another run ({changes}); give another --out or delete it.")
    return record


def open_run(config: RunConfig, shards: Shards, folder: Path) -> dict[str, Any]:
    """The record in `folder` if it is this run's, or a new one. Raises UserError when it is another's."""
    record = claim(config, folder)
    if record is None:
        record = runs.plan(config, shards.manifest.vocab_size) | {"data": shards.identity()}
        runs.write(folder, record)
    if record.setdefault("data", shards.identity())["hash"] != shards.hash:
        raise UserError(f"{folder} was trained on other data (hash {record['data']['hash']}); give another --out.")
    return record


class _Run:
    """One run's moving parts: model, optimizers, position, and what they cost so far."""

    def __init__(self, config, shards, folder, record, progress, stop) -> None:
        self.config, self.shards, self.folder, self.record = config, shards, folder, record
        self.parent = os.getppid()
        self.progress, self.stop, self.train = progress, stop, config.train
        self.checkpoints = folder / "checkpoints"
        self.model = build_model(config, shards.manifest.vocab_size)
        rates = presets.hyperparameters(presets.parse_size(config.size), config.tokens)
        self.optimizers = Optimizers(self.model, rates, self.train.weight_decay, self.train.lr_scale)
        self.batches = Batches(
            shards, "train", seq_len=self.train.seq_len, batch_size=self.train.batch_size, seed=config.seed
        )
        self.precision = precision_context(self.train.precision)
        self.step, self.skipped, self.seconds = 0, 0, 0.0

    def go(self) -> dict[str, Any]:
        self._resume()
        self.record.pop("error", None)  # of an attempt that failed
        (self.folder / "error.log").unlink(missing_ok=True)
        self._write("running")
        self.model.train()
        while self.step < self.config.steps:
            started = time.perf_counter()
            row = self._one_step()
            self.seconds += time.perf_counter() - started
            row["seconds"] = round(self.seconds, 4)
            runs.append(self.folder, row)
            self.step += 1
            if self.progress:
                self.progress(row)
            if self.skipped > self.train.max_skipped:
                return self._write("diverged", error=f"{self.skipped} steps with a non-finite loss or gradient")
            if os.getppid() != self.parent:  # the controller is gone: nobody waits for this run any more
                self.stop.code = 128 + signal.SIGTERM
            if self.stop.code:
                self._save()
                raise Interrupted(self.stop.code)
            if self.step % self.train.save_every == 0 and self.step < self.config.steps:
                self._save()
        return self._finish()

    def _one_step(self) -> dict[str, Any]:
        """One optimizer step and its row. A non-finite loss or gradient is reported and never applied."""
        ids = torch.from_numpy(self.batches.batch(self.step))
        with self.precision():
            loss = self.model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm, foreach=True)
        factor = warmup_stable_decay(self.step, self.config.steps, self.train.warmup, self.train.decay)
        tokens = (self.step + 1) * self.train.seq_len * self.train.batch_size
        row: dict[str, Any] = {"step": self.step, "tokens": tokens, "lr_factor": factor}
        value, size = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            self.optimizers.clear()
            self.skipped += 1
            which = "loss" if not math.isfinite(value) else "gradient"
            return row | {"loss": None, "grad_norm": None, "skipped": f"non-finite {which}"}
        self.optimizers.step(factor)
        return row | {"loss": value, "grad_norm": size}

    def _resume(self) -> None:
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            runs.truncate_steps(self.folder, 0)
            return
        tensors, meta = found
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        self.optimizers.load_state(tensors)
        self.step, self.skipped, self.seconds = meta["step"], meta["skipped"], meta["seconds"]
        torch.set_rng_state(tensors["rng"])
        runs.truncate_steps(self.folder, self.step)

    def _save(self) -> None:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= self.optimizers.state() | {"rng": torch.get_rng_state()}
        checkpoint.save(self.checkpoints, self.step, tensors, {"skipped": self.skipped, "seconds": self.seconds})

    def _finish(self) -> dict[str, Any]:
        last = [r["loss"] for r in runs.steps(self.folder) if r["loss"] is not None][-50:]
        if not last:
            return self._write("diverged", error="no step had a finite loss and gradient")
        metrics: dict[str, Any] = held_out_loss(
            self.model,
            self.shards,
            seq_len=self.train.seq_len,
            batch_size=self.train.batch_size,
            max_tokens=self.train.eval_tokens,
            precision=self.precision,
        )
        if not math.isfinite(metrics["val_loss"]):
            return self._write("diverged", error="the held-out loss is not finite")
        metrics["train_loss"] = sum(last) / len(last)
        self.model.save_pretrained(self.folder / "model")
        self.shards.tokenizer().save_pretrained(self.folder / "model")
        record = self._write("done", metrics=metrics)
        checkpoint.remove(self.checkpoints)
        return record

    def _write(self, status: str, **more: Any) -> dict[str, Any]:
        done = self.step * self.train.seq_len * self.train.batch_size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.record |= {
            "status": status,
            "skipped_steps": self.skipped,
            "wall_seconds": round(self.seconds, 3),
            "tokens_per_second": round(done / self.seconds, 1) if self.seconds else None,
            "peak_memory_bytes": max(peak, self.record.get("peak_memory_bytes") or 0),
            "threads": torch.get_num_threads(),
            "precision": "fp32" if self.precision is nullcontext else "bf16",
            **more,
        }
        runs.write(self.folder, self.record)
        return self.record


class _StopSignals:
    """Turns SIGTERM and SIGINT into a request that the loop honours at the end of a step."""

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> _StopSignals:
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.code = 128 + number
