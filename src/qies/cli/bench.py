"""The verbs of bench: op, train, threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qies.cli.decodings import decodings
from qies.cli.options import check_outputs, require_at_least
from qies.storage import write_json
from qies.terminal import Group, show


def op(
    rounds: int = 5, threads: int = 1, cases: tuple[str, ...] = (), out: Path | None = None, json: bool = False
) -> None:
    """Time the entanglement op, forward and backward, against transformers' gated delta rule and causal SDPA.

    Prints medians and ratios round by round.

    For example:

        qies bench op
        qies bench op --cases 8x2048x4x64x64 --rounds 9

    Args:
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads.
        cases: Shapes BxTxHxKxV; by default a few.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("op", cases, rounds, threads, out, json)


def train(
    rounds: int = 5, threads: int = 1, cases: tuple[str, ...] = (), out: Path | None = None, json: bool = False
) -> None:
    """Time whole training steps of the arms against GPT-2 and Qwen3-Next of transformers.

    Prints medians and ratios round by round.

    For example:

        qies bench train --cases 400k:512 6m:512 --out bench.json

    Args:
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads.
        cases: SIZE:T, a model size and a sequence length; by default a few.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("train", cases, rounds, threads, out, json)


def threads(rounds: int = 5, cases: tuple[str, ...] = (), out: Path | None = None, json: bool = False) -> None:
    """Time the same training steps in many runs of one thread, in one run of many threads, and in many of many.

    For example:

        qies bench threads --rounds 3 --out threads.json

    Args:
        rounds: Timed rounds, after one warm-up round.
        cases: RUNSxTHREADS; by default a few.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("threads", cases, rounds, None, out, json)


def _speed(what: str, cases: tuple[str, ...], rounds: int, threads: int | None, out: Path | None, json: bool) -> None:
    """Measure; `threads` is None where a case names its own."""
    import torch
    from rich.console import Console

    from qies.bench import baselines
    from qies.bench.threads import bench_threads

    require_at_least(1, rounds=rounds, threads=threads)
    check_outputs(out=out)
    torch.set_num_threads(threads or 1)
    results = bench_threads(cases, rounds=rounds) if what == "threads" else baselines.run(what, cases, rounds)
    value = _measured(what) | {"threads": threads, "cases": [r.to_dict() for r in results]}
    if out is not None:
        write_json(out, value)
    show(json, value, lambda: Console().print(baselines.comparison_table(f"bench {what}", results)))


def _measured(what: str) -> dict[str, Any]:
    from qies.records import code_version, environment

    return {"what": what, "environment": environment(), "code_version": code_version()}


bench = Group(
    "Benchmark speed against reference implementations.",
    {"op": op, "train": train, "decodings": decodings, "threads": threads},
)
