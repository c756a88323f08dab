"""The estimated cost of a grid of runs."""

from __future__ import annotations

from rich import box
from rich.table import Table

from qies import records
from qies.config import RunConfig, StudyConfig
from qies.ladder.controller import cores

# Fitted to throughputs measured on one thread of the reference machine (docs/study.md).
SECONDS_PER_TOKEN = 2e-5
SECONDS_PER_FLOP = 3.4e-12


def plan_table(study: StudyConfig) -> Table:
    """A table of all runs with parameters, tokens, FLOPs and estimated time."""
    table = Table(title=f"study {study.name}: {len(study.runs())} runs", box=box.SIMPLE_HEAD)
    for column in ("run", "arm", "size", "seed", "N", "tokens", "FLOPs", "time"):
        table.add_column(column, justify="left" if column in ("run", "arm") else "right", no_wrap=True)
    for config, seconds in zip(study.runs(), estimate(study), strict=True):
        record = records.plan(config, study.data.vocab_size)
        table.add_row(
            record.config_hash[:8], config.arm, config.size, str(config.seed), f"{record.non_embedding:,}",
            f"{record.tokens / 1e6:.2f}M", f"{record.flops:.2e}", clock(seconds),
        )  # fmt: skip
    table.caption = "N: parameters without embedding and head; time: estimated"
    return table


def estimate(study: StudyConfig) -> list[float]:
    """Estimated seconds of each run on one thread of the reference machine (docs/study.md).

    Linear in the FLOPs per token, with a constant cost per token.
    """
    out = []
    for config in study.runs():
        record = records.plan(config, study.data.vocab_size)
        out.append(record.tokens * (SECONDS_PER_TOKEN + record.flops_per_token * SECONDS_PER_FLOP))
    return out


def clock(seconds: float) -> str:
    """75 -> '1:15', 7500 -> '2h05', 400000 -> '4d15'."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}" if hours < 100 else f"{hours // 24}d{hours % 24:02d}"
    return f"{minutes}:{int(seconds) % 60:02d}"


def total_time(study: StudyConfig) -> str:
    """The estimated time of all runs, as text."""
    workers = study.workers or cores()
    return f"about {clock(sum(estimate(study)) / workers)} on {workers} cores"


def longest_first(study: StudyConfig) -> list[RunConfig]:
    """The runs by decreasing estimated time, so that no core idles while a long run finishes."""
    pairs = zip(study.runs(), estimate(study), strict=True)
    return [config for config, _ in sorted(pairs, key=lambda pair: -pair[1])]
