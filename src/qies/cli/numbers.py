"""Verbs that read what was measured, or measure: report, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from qies.errors import UserError
from qies.terminal import show


def report(folder: Positional[Path], /, svg: Path | None = None) -> None:
    """Write report.html of a study folder from its records alone.

    For example:

        qies report results/quick
        qies report results/quick --svg docs/quick.svg

    Args:
        folder: The study's folder.
        svg: Also write the loss-against-parameters figure here.
    """
    from qies.report import build_report, write_summary_svg

    print(build_report(folder))
    if svg is not None:
        write_summary_svg(folder, svg)
        print(svg)


def bench(
    what: Positional[Literal["op", "train"]],
    /,
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Speed side by side with named rivals, in one run: medians, and ratios round by round.

    `op`: the entanglement op, forward and backward, against transformers' gated delta rule and causal SDPA.
    `train`: whole training steps of the arms against GPT-2 and Qwen3-Next of transformers.

    For example:

        qies bench op
        qies bench op --cases 8x2048x4x64x64 --rounds 9
        qies bench train --cases 400k:512 6m:512 --out bench.json

    Args:
        what: op or train.
        rounds: Timed rounds after one that does not count.
        threads: Processor threads.
        cases: BxTxHxKxV for op, SIZE:T for train; by default a few of each.
        out: Also write the JSON here.
        json: Print JSON.
    """
    import torch

    from qies import runs
    from qies.efficiency import bench as benches

    if rounds < 1 or threads < 1:
        raise UserError("--rounds and --threads must be at least 1.")
    torch.set_num_threads(threads)
    results = benches.run(what, cases, rounds)
    value = {
        "what": what,
        "threads": threads,
        "environment": runs.environment(),
        "code_version": runs.code_version(),
        "cases": [r.to_dict() for r in results],
    }
    if out is not None:
        runs.write_json(out, value)
    show(json, value, lambda: Console().print(benches.comparison_table(f"bench {what}", results)))


def compare(
    runs: Positional[Path],
    /,
    arms: tuple[str, str],
    json: Path | None = None,
    columns: str = "",
    flops: str | None = None,
    form: Literal["auto", "surface", "power"] = "auto",
    level: float = 0.95,
) -> None:
    """What one arm gains over another: gains in compute, parameters, data and time, paired tests, a verdict.

    A gain of 2 in compute: the baseline needs twice the FLOPs for the same loss. docs/comparing.md has the rule.

    For example:

        qies compare results/quick --arms qies transformer
        qies compare RUNS.csv --arms qies transformer --json gains.json
        qies compare RUNS.csv --arms mine theirs --columns params=N,tokens=D --form power

    Args:
        runs: A table (CSV, TSV, JSONL, JSON, Parquet) or a folder of run records.
        arms: The candidate and its baseline.
        json: Write the whole result here as JSON.
        columns: Other names of the table's columns, as params=N,tokens=D.
        flops: How FLOPs are counted: 6ND, another multiple of ND, or given. By default the table's, else 6ND.
        form: surface (L(N, D) an arm), power (power laws along the runs) or auto.
        level: Coverage of every interval.
    """
    from qies import runs as records
    from qies.scaling import compare as compare_arms
    from qies.scaling import read_runs

    result = compare_arms(read_runs(runs, _pairs(columns), flops), *arms, form=form, level=level)
    if json is not None:
        records.write_json(json, result.to_dict())
    print(result.summary())


def _pairs(text: str) -> dict[str, str]:
    """`params=N,tokens=D` as a dictionary."""
    pairs = [pair.split("=", 1) for pair in text.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"--columns '{text}' is not of the form params=N,tokens=D.")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}
