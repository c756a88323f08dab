"""The status of the runs of a ladder, read from their directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qies import records
from qies.config import RunConfig, content_hash
from qies.ladder.lease import STALE_SECONDS, attempts

OVER = ("done", "diverged", "failed")  # final states


def status(
    configs: Sequence[RunConfig], root: Path, estimates: Sequence[float], stale: float = STALE_SECONDS
) -> dict[str, Any]:
    """State, step, rate, loss and seconds left of each run, and `seconds_left` in total at the current concurrency.

    `estimates` are the estimated seconds of each run; a run that has started is extrapolated from its own rate. The
    state is the record's status, "stale" for an abandoned attempt, or "waiting" between attempts.
    """
    rows: list[dict[str, Any]] = []
    for config, estimate in zip(configs, estimates, strict=True):
        folder = root / content_hash(config)
        record, history = records.read(folder), attempts(folder)
        state: str = record.status if record else "planned"
        if state in ("planned", "running", "failed"):
            if history and history[-1].outcome is None:
                state = "stale" if history[-1].abandoned(stale) else "running"
            elif state == "running":
                state = "waiting"
        steps = records.steps(folder)
        last = steps[-1] if steps else None
        done = last["step"] + 1 if last else 0
        each = last["seconds"] / done if last else estimate / config.steps
        rows.append({
            "run": content_hash(config), "arm": config.arm, "size": config.size, "seed": config.seed, "state": state,
            "tokens": config.tokens, "step": done, "steps": config.steps, "loss": last["loss"] if last else None,
            "tokens_per_second": round(last["tokens"] / last["seconds"], 1) if last and last["seconds"] else None,
            "attempts": len(history), "seconds_left": 0.0 if state in OVER else round((config.steps - done) * each, 1),
        })  # fmt: skip
    active = max(1, len([r for r in rows if r["state"] == "running"]))
    return {"schema": 1, "runs": rows, "seconds_left": round(sum(r["seconds_left"] for r in rows) / active, 1)}
