"""The verbs of bench: op, train, threads, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qies.cli.options import check_outputs, require_at_least
from qies.errors import Stopped
from qies.storage import write_text
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

    from qies import runs
    from qies.bench import rivals
    from qies.bench.threads import bench_threads

    require_at_least(1, rounds=rounds, threads=threads)
    check_outputs(out=out)
    torch.set_num_threads(threads or 1)
    results = bench_threads(cases, rounds=rounds) if what == "threads" else rivals.run(what, cases, rounds)
    value = _measured(what) | {"threads": threads, "cases": [r.to_dict() for r in results]}
    if out is not None:
        runs.write_json(out, value)
    show(json, value, lambda: Console().print(rivals.comparison_table(f"bench {what}", results)))


def inject_faults(
    cases: tuple[str, ...] = (),
    quick: bool = False,
    seed: int = 0,
    out: Path | None = None,
    markdown: Path | None = None,
    json: bool = False,
) -> None:
    """Inject faults into small training runs and count which requirements hold.

    Faults are kills, damaged checkpoints, full disks and more. The exit code is 1 if a requirement is violated.

    For example:

        qies bench faults --quick
        qies bench faults --cases kill disk --seed 1

    Args:
        cases: Names of rows of the table; by default all.
        quick: Inject each fault only a few times.
        seed: Seed of the random moments at which faults are injected.
        out: Also write the JSON to this file; its rows of faults that are not injected now are kept.
        markdown: Also write the table to this file.
        json: Print JSON.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qies import faults, runs

    check_outputs(out=out, markdown=markdown)
    todo = faults.chosen(cases)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        console.print(f"random moments from seed {seed}")
        tasks = {f.name: bar.add_task(f.name, total=faults.total(f, quick)) for f in todo}

        def tell(fault: faults.Fault, outcome: faults.Outcome) -> None:
            bar.update(tasks[fault.name], advance=1)
            if outcome.wrong:
                console.print(f"{fault.name}: {outcome.what}: {outcome.wrong}", highlight=False, markup=False)

        rows = faults.run(todo, seed, quick=quick, tell=tell)
    measured = _measured("faults")
    added = [row.to_dict() | {"seed": seed, "code_version": measured["code_version"]} for row in rows]
    value = measured | {"faults": faults.joined(out, added)}
    if out is not None:
        runs.write_json(out, value)
    if markdown is not None:
        write_text(markdown, faults.page(value))
    show(json, value, lambda: Console().print(faults.table(rows, seed)))
    if any(row.held < row.injections for row in rows):
        raise Stopped("a requirement was violated; see the lines above.")


def _measured(what: str) -> dict[str, Any]:
    from qies import runs

    return {"what": what, "environment": runs.environment(), "code_version": runs.code_version()}


bench = Group(
    "Benchmark speed against reference implementations, or inject faults into training runs.",
    {"op": op, "train": train, "threads": threads, "faults": inject_faults},
)
