"""The verbs of bench: op, train, prefill, decode, threads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qies.cli.decodings import decodings
from qies.cli.options import check_outputs, provenance, require_at_least
from qies.storage import write_json
from qies.terminal import Group, show

Clock = Literal["wall", "cpu"]


def op(
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    clock: Clock = "wall",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time the entanglement op, forward and backward, against transformers' gated delta rule and causal SDPA.

    Prints percentiles, and ratios to the first baseline round by round.

    For example:

        qies bench op
        qies bench op --cases 8x2048x4x64x64 --rounds 9

    Args:
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads.
        cases: Shapes BxTxHxKxV; by default a few.
        clock: Wall time, or the processor time of the process, which other load on the machine changes less.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("op", cases, rounds, threads, out, json, clock)


def train(
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    clock: Clock = "wall",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time whole training steps of the arms against GPT-2 and Qwen3-Next of transformers.

    Prints percentiles, and ratios to the first baseline round by round.

    For example:

        qies bench train --cases 400k:512 6m:512 --out bench.json

    Args:
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads.
        cases: SIZE:T, a model size and a sequence length; by default a few.
        clock: Wall time, or the processor time of the process, which other load on the machine changes less.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("train", cases, rounds, threads, out, json, clock)


def prefill(
    rounds: int = 3,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    arms: tuple[str, ...] = ("qies", "no_phase", "transformer"),
    clock: Clock = "wall",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time how long arms take to read a prompt into an empty cache, beside each other, in float32.

    Prints percentiles, tokens per second, the cache and ratios round by round to the first arm.

    For example:

        qies bench prefill --cases 400k:16384 --rounds 3
        qies bench prefill --arms qies transformer --cases 100k:8x2048 100k:32768 --out prefill.json

    Args:
        rounds: Timed rounds.
        threads: CPU threads.
        cases: SIZE:T or SIZE:BxT, a model size and B prompts (1) of T tokens; by default a few.
        arms: Arms of equal size; ratios are to the first.
        clock: Wall time, or the processor time of the process, which other load on the machine changes less.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("prefill", cases, rounds, threads, out, json, clock, arms)


def decode(
    rounds: int = 20,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    arms: tuple[str, ...] = ("qies", "no_phase", "transformer"),
    clock: Clock = "wall",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time how long arms take to decode one token after T cached ones, beside each other, in float32.

    The cache is synthetic: a prefill of 8 tokens and random keys and values for the others. It grows by one token in
    each round.

    For example:

        qies bench decode --cases 400k:32768 400k:8x1024
        qies bench decode --arms no_phase gpt2 --cases 200k:512 --json

    Args:
        rounds: Timed rounds, after two warm-up rounds.
        threads: CPU threads.
        cases: SIZE:T or SIZE:BxT, a model size and B sequences (1) with T tokens in the cache; by default a few.
        arms: Arms of equal size; ratios are to the first.
        clock: Wall time, or the processor time of the process, which other load on the machine changes less.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    _speed("decode", cases, rounds, threads, out, json, clock, arms)


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


def _speed(
    what: str,
    cases: tuple[str, ...],
    rounds: int,
    threads: int | None,
    out: Path | None,
    json: bool,
    clock: str = "wall",
    arms: tuple[str, ...] = (),
) -> None:
    """Measure; `threads` is None where a case names its own."""
    import torch
    from rich.console import Console

    from qies.bench import baselines
    from qies.bench.inference import bench_inference
    from qies.bench.threads import bench_threads
    from qies.bench.timing import comparison_table

    require_at_least(1, rounds=rounds, threads=threads)
    check_outputs(out=out)
    torch.set_num_threads(threads or 1)
    if what == "threads":
        results = bench_threads(cases, rounds=rounds)
    elif what in ("prefill", "decode"):
        results = bench_inference(what, cases, arms, rounds=rounds, clock=clock)
    else:
        results = baselines.run(what, cases, rounds, clock)
    value = provenance(what) | {"threads": threads, "clock": clock, "cases": [r.to_dict() for r in results]}
    if out is not None:
        write_json(out, value)
    show(json, value, lambda: Console().print(comparison_table(f"bench {what}", results)))


bench = Group(
    "Benchmark speed against reference implementations.",
    {
        "op": op,
        "train": train,
        "prefill": prefill,
        "decode": decode,
        "decodings": decodings,
        "threads": threads,
    },
)
