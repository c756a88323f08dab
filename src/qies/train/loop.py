"""The training loop of one run. It resumes from the newest checkpoint."""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from qies import presets, records, storage
from qies.config import RunConfig, TrainConfig, changes, content_hash, recorded, to_dict
from qies.data.batches import Batches, val_batches
from qies.data.shards import Shards
from qies.errors import Stopped, UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.records import RunRecord, Status
from qies.train import checkpoint, peak_memory
from qies.train.distributed import Group, check_batch
from qies.train.induction import due, induction_gain, onset
from qies.train.loss_spikes import Spikes
from qies.train.optim import Optimizers
from qies.train.run_directory import CHECKPOINTS, FIXED, open_run
from qies.train.schedule import warmup_stable_decay
from qies.train.validation import held_out_loss, long_short_difference

transformers_logging.disable_progress_bar()  # of saving a model; the run has a progress bar

Progress = Callable[[dict[str, Any]], None]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


class Interrupted(Stopped):
    """A signal stopped the run after it had saved. `code` is the exit code, 128 + signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}; run the same command again to resume", code)


def precision_context(name: str, device: str = "cpu") -> Callable[[], AbstractContextManager]:
    """The context of forward passes: bf16 autocast, or none for fp32. "auto" uses bf16 if the device supports it."""
    if name == "bf16" or (name == "auto" and (device != "cpu" or torch.cpu._is_avx512_bf16_supported())):
        return lambda: torch.autocast(device, torch.bfloat16)
    return nullcontext


def keep_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system; no effect on other platforms.

    Page faults of newly allocated tensors take up to half of the time of a training step on CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, 1 << 30), (-2, 64 << 20)):  # mmap threshold, trim threshold, top pad
            libc.mallopt(option, value)


def check_data(shards: Shards, settings: TrainConfig) -> None:
    """Raise UserError unless both splits have enough tokens to train and evaluate with these settings."""
    Batches(shards, "train", seq_len=settings.seq_len, batch_size=settings.batch_size, seed=0)
    val_batches(shards, settings.seq_len, settings.batch_size)


def build_model(config: RunConfig, vocab_size: int) -> QiesForCausalLM:
    """Build the run's model. The initial weights depend only on the configuration and its seed."""
    values = config.settings(vocab_size)
    torch.manual_seed(config.seed)
    return QiesForCausalLM(QiesConfig(**values))


def train(
    config: RunConfig,
    shards: Shards,
    folder: Path,
    *,
    progress: Progress | None = None,
    patience: float = 30.0,
    group: Group | None = None,
    parent: int | None = None,
) -> RunRecord:
    """Train one run in `folder` and return its record. A finished run is returned unchanged, an unfinished one resumes.

    Writes run.json, metrics.jsonl (one row per step), checkpoints during training, and `model/` (safetensors and
    tokenizer) at the end. Every process of `group` calls this function.

    Args:
        config: The run.
        shards: Its data.
        folder: The run directory.
        progress: Called with each row of metrics.
        patience: Seconds to wait for another process that trains in `folder`.
        group: The processes of the run (`qies.train.distributed.start`); None for a single process.
        parent: The id of a process (a controller, torchrun). When it ends, the run stops as after SIGTERM.

    Raises:
        UserError: `folder` holds another run or other data.
        Interrupted: SIGTERM or SIGINT arrived, and the state is saved.
        Stopped: The disk is full.
    """
    keep_memory()
    group = group or Group()
    check_batch(config.train, group.size)  # before any write
    with ExitStack() as held:

        def opened() -> RunRecord:
            held.enter_context(records.lock(folder, patience))
            return open_run(config, shards, folder)

        record = group.on_first(opened)
        if record.finished:
            if record.status == "done" and group.rank == 0:  # the process may have been killed before
                checkpoint.remove(folder / CHECKPOINTS, config.milestones)
            return record
        stop = held.enter_context(_StopSignals())
        try:
            return _Run(config, shards, folder, record, progress, stop, group, parent).go()
        except (OSError, SafetensorError) as e:
            if isinstance(e, OSError) and e.errno not in FULL:
                raise
            raise Stopped(
                f"{folder} could not be written ({e}); its checkpoints are intact: "
                "free space and run the same command again."
            ) from e


class _Run:
    """The state of one run: model, optimizers, position in the data, and time spent."""

    def __init__(self, config, shards, folder, record, progress, stop, group, parent) -> None:
        self.group, self.slice = group, group.rows(config.train.batch_size)
        self.config, self.shards, self.folder, self.record = config, shards, folder, record
        self.progress, self.stop, self.train, self.parent = progress, stop, config.train, parent
        self.checkpoints = folder / CHECKPOINTS
        self.model = group.shard(lambda: build_model(config, shards.manifest.vocab_size))
        if self.model.objective is not None:  # which says where documents end
            self.model.config.eos_token_id = shards.tokenizer().eos_token_id
        if self.train.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        rates = presets.hyperparameters(presets.parse_size(config.size), config.tokens)
        muon = torch.bfloat16 if self.train.muon_precision == "bf16" else torch.float32
        self.optimizers = Optimizers(self.model, rates, self.train.weight_decay, self.train.lr_scale, muon)
        self.batches = Batches(
            shards, "train", seq_len=self.train.seq_len, batch_size=self.train.batch_size, seed=config.seed
        )
        self.precision = precision_context(self.train.precision, group.device.type)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.spikes = Spikes()

    def go(self) -> RunRecord:
        self._resume()
        self.record = replace(self.record, error=None)  # that of a failed attempt
        if self.group.rank == 0:
            (self.folder / "error.log").unlink(missing_ok=True)
        peak_memory.reset_peak()
        self._write("running")
        self.model.train()
        self._compile()
        peak_memory.reset_peak()
        self.stop.stepping = True
        milestones = self.config.milestones
        while self.step < self.config.steps:
            started = time.perf_counter()
            row = self._one_step()
            self.seconds += time.perf_counter() - started
            row["seconds"] = round(self.seconds, 4)
            self.step += 1
            if self.step == self.config.steps or due(row["tokens"], self.train.seq_len * self.train.batch_size):
                row["induction"] = self._induction()
            if self.group.rank == 0:
                records.append(self.folder, row)
                if self.progress:
                    self.progress(row)
            if self.skipped > self.train.max_skipped:
                return self._write("diverged", error=f"{self.skipped} steps with a non-finite loss or gradient")
            if self.parent not in (None, os.getppid()):  # the parent has ended
                self.stop.code = 128 + signal.SIGTERM
            if code := int(self.group.gather([self.stop.code]).max()):  # a signal to one process stops all
                self._save()
                raise Interrupted(code)
            last = self.step == self.config.steps  # before the evaluation, which may be long
            if last or self.step % self.train.save_every == 0 or self.step in milestones:
                self._save()
        return self._finish()

    def _compile(self) -> None:
        """Compile the kernels in a minimal forward and backward pass; training time does not include it."""
        ids = torch.zeros(1, 3, dtype=torch.long, device=self.group.device)
        with self.precision():
            loss = self.model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        self.optimizers.clear()

    def _one_step(self) -> dict[str, Any]:
        """Take one optimizer step and return its row of metrics.

        A step with a non-finite loss or gradient, or with a loss spike, is reported but not applied. The loss is the
        mean over all processes and the norm is that of the whole gradient, so all processes decide alike.
        """
        ids = torch.from_numpy(self.batches.batch(self.step)[self.slice]).to(self.group.device)
        self.model.set_progress(self.step / self.config.steps)
        terms = self.model.objective
        terms = terms if terms is not None and terms.factor > 0 else None
        parts, own = ids.chunk(self.train.accumulate), 0.0
        apart: dict[str, float] = {}
        for part in parts:  # of equal size, so the mean of their means is that of the batch
            self.group.reduce_gradients(self.model, part is parts[-1])
            with self.precision():
                loss = self.model(part[:, :-1], shift_labels=part[:, 1:]).loss / len(parts)
            loss.backward()
            own += loss.item()
            for name, term in terms.values.items() if terms is not None else ():
                apart[name] = apart.get(name, 0.0) + term.item() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        factor = warmup_stable_decay(self.step, self.config.steps, self.config.warmup_steps, self.config.decay_steps)
        tokens = (self.step + 1) * self.train.seq_len * self.train.batch_size
        row: dict[str, Any] = {"step": self.step, "tokens": tokens, "lr_factor": factor}
        value, size = self.group.gather([own]).mean().item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(size)):
            self.optimizers.clear()
            self.skipped += 1
            which = "loss" if not math.isfinite(value) else "gradient"
            return row | {"loss": None, "grad_norm": None, "skipped": f"non-finite {which}"}
        if terms is not None:  # `loss` is the cross-entropy, as in a run without terms
            means = self.group.gather(list(apart.values())).reshape(self.group.size, -1).mean(0).tolist()
            value, *others = means
            row |= {"terms": dict(zip(list(apart)[1:], others, strict=True)), "term_factor": terms.factor}
        row |= {"loss": value, "grad_norm": size, **self.spikes.see(value)}
        if "spike" in row:
            self.optimizers.clear()
            return row | {"skipped": "spike"}
        self.optimizers.step(factor)
        return row

    def _resume(self) -> None:

        def latest() -> tuple[Path, dict[str, Any]] | None:
            written = len(records.steps(self.folder))
            found = checkpoint.newest(self.checkpoints)
            if found and found[1]["step"] > written:  # rows, unlike checkpoints, are not fsynced
                log.warning("%s has %d steps; using a checkpoint of those", self.folder / "metrics.jsonl", written)
                found = checkpoint.newest(self.checkpoints, written)
            return found

        found = self.group.on_first(latest)
        start: dict[str, Any] = {"step": 0, "skipped": 0, "seconds": 0.0}
        path, meta = found or (None, start)
        if path is not None:
            was = meta["config"]
            if fixed := [c for c in changes(was, to_dict(self.config)) if c.startswith(FIXED)]:
                raise UserError(f"{path} is of another run ({'; '.join(fixed)}); delete it.")
            tensors = checkpoint.load(path, self._blank, self.group)
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(tensors[f"model.{name}"])
            self.optimizers.load_state(tensors)
            own = tensors.get(f"rng.{self.group.rank}")  # absent if there were fewer processes before
            torch.set_rng_state(own) if own is not None else torch.manual_seed(self.config.seed + self.group.rank)
        self.step, self.skipped, self.seconds = meta["step"], meta["skipped"], meta["seconds"]

        def seen() -> Spikes:
            records.truncate_steps(self.folder, self.step)
            spikes = Spikes()
            for row in records.steps(self.folder):
                spikes.see(row["loss"])
            return spikes

        self.spikes = self.group.on_first(seen)

    def _blank(self, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors into which a checkpoint with these names is loaded."""
        blank = {f"model.{n}": torch.empty_like(p.detach()) for n, p in self.model.named_parameters()}
        rng = torch.get_rng_state()
        blank |= self.optimizers.blank_state() | {n: rng.clone() for n in names if n.startswith("rng.")}
        return {n: blank[n] for n in names}

    def _save(self) -> None:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= self.optimizers.state() | {f"rng.{self.group.rank}": torch.get_rng_state()}
        meta = {
            "skipped": self.skipped,
            "seconds": self.seconds,
            "sequences": self.step * self.train.batch_size,  # the data position
            "processes": self.group.size,
            "config": recorded(self.config),
            "config_hash": content_hash(self.config),
        }
        checkpoint.save(
            self.checkpoints,
            self.step,
            tensors,
            meta,
            keep=self.train.keep,
            milestones=self.config.milestones,
            group=self.group,
        )

    def _finish(self) -> RunRecord:
        train_loss = self.group.on_first(self._train_loss)
        if train_loss is None:
            return self._write("diverged", error="no step had a finite loss and gradient")
        how: dict[str, Any] = {
            "seq_len": self.train.seq_len,
            "batch_size": self.train.batch_size,
            "max_tokens": self.train.eval_tokens,
            "precision": self.precision,
        }
        metrics: dict[str, Any] = held_out_loss(self.model, self.shards, **how, group=self.group)
        if not math.isfinite(metrics["val_loss"]):
            return self._write("diverged", error="the held-out loss is not finite")
        metrics["train_loss"] = train_loss
        if self.group.size == 1:  # sharded weights are whole only inside of the model's own forward
            metrics["long_short_difference"] = long_short_difference(self.model, self.shards, **how)
        final, tokens = self._induction(), self.step * self.train.seq_len * self.train.batch_size
        ends = {"tokens": tokens, "induction": final}  # a run that resumed after its last step has no such row
        first = self.group.on_first(lambda: onset([*records.steps(self.folder), ends]))
        metrics |= {"induction": final, "induction_onset": first}
        state = self.group.whole_state(self.model)
        self.group.on_first(lambda: self._publish(state))
        record = self._write("done", metrics=metrics)
        if self.group.rank == 0:
            checkpoint.remove(self.checkpoints, self.config.milestones)
        return record

    def _train_loss(self) -> float | None:
        """Mean of the last 50 finite losses; None if there are none."""
        last = [row["loss"] for row in records.steps(self.folder) if row["loss"] is not None][-50:]
        return sum(last) / len(last) if last else None

    def _induction(self) -> float | None:
        """The induction score; None if it is not finite, as in a diverging run."""
        gain = induction_gain(
            self.model, seq_len=self.train.seq_len, precision=self.precision, device=self.group.device
        )
        return gain if math.isfinite(gain) else None

    def _publish(self, state: dict[str, Tensor]) -> None:
        whole = build_model(self.config, self.shards.manifest.vocab_size)
        whole.load_state_dict(state)
        tokenizer = self.shards.tokenizer()
        for settings in (whole.config, whole.generation_config):  # those of the corpus's tokenizer
            settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
        whole.save_pretrained(self.folder / "model")
        for weights in (self.folder / "model").glob("*.safetensors"):
            storage.follow_umask(weights)
        tokenizer.save_pretrained(self.folder / "model")

    def _write(self, status: Status, **more: Any) -> RunRecord:
        done = self.step * self.train.seq_len * self.train.batch_size
        self.record = replace(
            self.record,
            status=status,
            skipped_steps=self.skipped,
            spikes=self.spikes.count,
            wall_seconds=round(self.seconds, 3),
            tokens_per_second=round(done / self.seconds, 1) if self.seconds else None,
            peak_memory_bytes=max(peak_memory.peak(), self.record.peak_memory_bytes or 0),
            processes=self.group.size,
            threads=torch.get_num_threads(),
            precision="fp32" if self.precision is nullcontext else "bf16",
            **more,
        )
        if self.group.rank == 0:
            records.write(self.folder, self.record)
        return self.record


class _StopSignals:
    """Defers SIGTERM and SIGINT to the end of the current step.

    SIGINT raises KeyboardInterrupt at once before the first step, while kernels are compiled, and if it arrives twice.
    """

    def __init__(self) -> None:
        self.code = 0
        self.stepping = False

    def __enter__(self) -> _StopSignals:
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and (self.code or not self.stepping):
            raise KeyboardInterrupt
        self.code = 128 + number
