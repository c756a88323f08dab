"""A batch that is not fit to learn from: NaN, infinity, a spike. No step may apply it."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from faults.lab import Lab, Outcome
from qies import records
from qies.train import loop

FACTORS = {"nan": float("nan"), "infinity": float("inf")}
KINDS = (*FACTORS, "spike")


@contextmanager
def spoiled(what: str, steps: set[int], rank: int | None = None) -> Iterator[dict[int, int]]:
    """Spoil the batches of these steps of every run in this process (of one `rank` of it): `nan` and `infinity` in the
    embedded text, a `gradient` that is infinite behind a finite loss, or a `spike`: random tokens instead of text.
    Yields, by step, how many tensors of model and optimizers it moved."""
    original, moved = loop._Run._one_step, {}

    def one_step(run: Any) -> dict[str, Any]:
        if run.step not in steps:
            return original(run)
        before = _state(run)
        undo = _spoil(run, what) if rank in (None, run.group.rank) else lambda: None
        row = original(run)
        undo()
        after = _state(run)
        moved[run.step] = sum(not torch.equal(before[k], after[k]) for k in before) + len(after.keys() - before.keys())
        return row

    loop._Run._one_step = one_step  # type: ignore[method-assign, assignment]
    try:
        yield moved
    finally:
        loop._Run._one_step = original  # type: ignore[method-assign]


def _state(run: Any) -> dict[str, torch.Tensor]:
    tensors = {n: p.detach() for n, p in run.model.named_parameters()} | run.optimizers.state()
    return {n: (t.to_local() if hasattr(t, "to_local") else t).clone() for n, t in tensors.items()}


def _spoil(run: Any, what: str) -> Any:
    """Do it; returns what undoes it."""
    if what in FACTORS:
        return run.model.get_input_embeddings().register_forward_hook(lambda m, a, out: out * FACTORS[what]).remove
    if what == "gradient":
        return next(run.model.parameters()).register_hook(lambda grad: grad * float("inf")).remove
    kept, noise = run.batches, np.random.default_rng(0)
    shape = kept.batch(run.step).shape

    class Noise:
        def batch(self, step: int) -> np.ndarray:
            return noise.integers(1, run.model.config.vocab_size, shape)

    run.batches = Noise()
    return lambda: setattr(run, "batches", kept)


def bad_batches(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Each kind in turn, in one process and in two."""
    for i in range(count):
        yield bad_batch(lab, rng, KINDS[i % 3], size=1 + (i // 3) % 2)


def bad_batch(lab: Lab, rng: random.Random, what: str, size: int = 1) -> Outcome:
    """Spoil one random step of a run, in two processes the part of one of them (a spike: all of it)."""
    step = rng.randrange(lab.steps - 10, lab.steps) if what == "spike" else rng.randrange(lab.steps)
    rank = None if what == "spike" or size == 1 else rng.randrange(size)
    out = lab.folder()
    note = out.with_suffix(".note")
    launch = lab.train(out, size=size, before=functools.partial(_in_victim, what, step, rank, note))
    said = f"{what} in step {step}, {size} process{'es' if size > 1 else ''}" + (
        "" if rank is None else f", rank {rank}"
    )
    if (codes := launch.codes()) != [0] * size:
        return Outcome(said, f"ended with {codes}: {launch.errors}")
    moved = [json.loads(note.with_suffix(f".{r}").read_text()) for r in range(size)]
    if moved != [{str(step): 0}] * size:
        return Outcome(said, f"tensors moved, by rank and step: {moved}")
    skipped = {row["step"]: row["skipped"] for row in records.steps(out) if "skipped" in row}
    expected = {step: "spike" if what == "spike" else "non-finite loss"}
    record = records.read(out)
    assert record is not None
    counted = record.spikes if what == "spike" else record.skipped_steps
    if skipped != expected or counted != 1:
        return Outcome(said, f"recorded as {skipped}, counted {counted}")
    return Outcome(said)


def _in_victim(what: str, step: int, rank: int | None, note: Path) -> None:
    """Spoil the step in this process, and write down what it moved when the run ends."""
    own = note.with_suffix(f".{os.environ.get('RANK', '0')}")
    context = spoiled(what, {step}, rank)
    moved = context.__enter__()

    exit_now = os._exit  # how a child of multiprocessing ends, and a rank of several, without what atexit holds

    def end(status: int) -> NoReturn:
        context.__exit__(None, None, None)
        own.write_text(json.dumps(moved))
        exit_now(status)

    os._exit = end
