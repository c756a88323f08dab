"""Interleaved timing of baselines in one process: medians, and ratios by pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """The result of one case. `seconds`: median per call; `ratio`: time relative to the subject, the median of the
    ratios of the rounds, so that drift of the machine's speed cancels."""

    case: str
    subject: str
    rounds: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    spread: dict[str, tuple[float, float]]  # of the ratio, over the rounds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(case: str, baselines: Mapping[str, Callable[[], Any]], *, rounds: int = 5, warmup: int = 1) -> Comparison:
    """Time `baselines` in turn, A B C A B C ..., after `warmup` rounds that do not count; the first is the subject."""
    if rounds < 1 or not baselines:
        raise ValueError("compare needs at least one baseline and one round")
    times: dict[str, list[float]] = {name: [] for name in baselines}
    for i in range(warmup + rounds):
        for name, call in baselines.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    subject = next(iter(baselines))
    ratios = {name: [t / s for t, s in zip(ts, times[subject], strict=True)] for name, ts in times.items()}
    return Comparison(
        case=case,
        subject=subject,
        rounds=rounds,
        seconds={name: statistics.median(ts) for name, ts in times.items()},
        ratio={name: statistics.median(r) for name, r in ratios.items()},
        spread={name: (min(r), max(r)) for name, r in ratios.items()},
    )
