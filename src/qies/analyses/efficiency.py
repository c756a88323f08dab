"""What the loss of an arm costs: FLOPs, bytes of cache, tokens per second; Pareto fronts, and where it is cheaper."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from qies import presets
from qies.accounting.cache import cache_bytes
from qies.accounting.flops import (
    cheaper_from,
    decode_flops_per_token,
    prefill_flops,
    training_flops_per_token,
)
from qies.accounting.parameters import longest_context
from qies.analyses.finished import Finished
from qies.analyses.formatting import NONE, count, digits, fixed, si
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import BASELINE, Cell, Study, listed, mapping, stored
from qies.plotting import Axis, Figure, Line, Panel, Points, styles
from qies.plotting.marks import Mark
from qies.records import RunRecord

CONTEXT, PROMPT = 32_768, 16_384  # tokens in the cache when decoding, and of a prefill
BENCHES = ("prefill", "decode")  # `qies bench WHAT --out STUDY/bench/WHAT.json`

# The costs that loss is drawn against: key of a point, axis, whether more is better.
COSTS = {
    "flops": ("training FLOPs", False),
    "decode_flops": (f"FLOPs of a token decoded at {CONTEXT:,} tokens", False),
    "cache_bytes": (f"bytes of cache at {CONTEXT:,} tokens, half precision", False),
    "decode_rate": (f"tokens per second decoded at {CONTEXT:,} tokens", True),
}


def compute(study: Finished) -> dict[str, Any]:
    """The costs of every arm at every size and token budget, and from which context it is cheaper than the baseline.

    points: one per arm, size and tokens: the mean `loss` over seeds in nats per token; `flops` of the training;
    `prefill_flops` of PROMPT tokens, `decode_flops` of one token after CONTEXT ones, `cache_bytes` of these in half
    precision and `state_bytes`, its part of constant size; null where the arm learns fewer positions. `train_rate`,
    `prefill_rate`, `decode_rate`: tokens per second, as the runs and the study's `bench/` recorded them, or null;
    `memory`: peak bytes of the training. cheaper: the context from which on a token costs no more FLOPs than the
    baseline's of that size, decoded and trained on; null for never.
    """
    groups: dict[tuple[str, str, int], list[RunRecord]] = defaultdict(list)
    for record in study.done:
        groups[record.arm, record.size, record.tokens].append(record)
    rates = {what: _rates(stored(study.folder / "bench" / f"{what}.json")) for what in BENCHES}
    points = [_point(key, runs, rates) for key, runs in groups.items()]
    arms = study.config.arms
    base = BASELINE if BASELINE in arms else arms[0]
    models = {(arm, size): settings(runs[0]) for (arm, size, _), runs in groups.items()}
    cheaper = [
        {
            "arm": arm,
            "size": size,
            "decode": cheaper_from(values, models[base, size]),
            "training": cheaper_from(values, models[base, size], training_flops_per_token),
        }
        for (arm, size), values in models.items()
        if arm != base and (base, size) in models
    ]
    return {"schema": 1, "baseline": base, "points": points, "cheaper": cheaper}


def settings(record: RunRecord) -> dict[str, Any]:
    """The model's settings, with those that did not exist yet when it was recorded."""
    return presets.model_fields(record.model["layer_types"]) | presets.BEFORE | record.model


def front(points: Sequence[tuple[float, float]], more: bool = False) -> list[tuple[float, float]]:
    """The Pareto front of (cost, loss): the points than which none has less of both; with `more`, costs are rates of
    which more is better. By cost, ascending; equal points once."""
    best, out = math.inf, []
    for cost, loss in sorted(set(points), key=lambda p: (-p[0] if more else p[0], p[1])):
        if loss < best:
            best = loss
            out.append((cost, loss))
    return sorted(out)


def _point(
    key: tuple[str, str, int], runs: Sequence[RunRecord], rates: Mapping[str, Mapping[tuple[Any, ...], float]]
) -> dict[str, Any]:
    arm, size, tokens = key
    values = settings(runs[0])

    def at(context: int, cost: Callable[[], float]) -> float | None:
        return cost() if context < longest_context(values) else None

    def mean(of: Callable[[RunRecord], float | None]) -> float | None:
        known = [value for run in runs if (value := of(run)) is not None]
        return fmean(known) if known else None

    return {
        "arm": arm,
        "size": size,
        "tokens": tokens,
        "seeds": len(runs),
        "loss": fmean(run.val_loss for run in runs),
        "flops": fmean(run.flops for run in runs),
        "prefill_flops": at(PROMPT, lambda: sum(prefill_flops(values, PROMPT).values())),
        "decode_flops": at(CONTEXT, lambda: decode_flops_per_token(values, CONTEXT)),
        "cache_bytes": at(CONTEXT, lambda: sum(cache_bytes(values, CONTEXT).values())),
        "state_bytes": sum(cache_bytes(values, 0).values()),
        "train_rate": mean(lambda run: run.tokens_per_second),
        "prefill_rate": rates["prefill"].get((size, PROMPT, arm)),
        "decode_rate": rates["decode"].get((size, CONTEXT, arm)),
        "memory": mean(lambda run: run.peak_memory_bytes),
    }


def _rates(bench: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    """Tokens per second by (size, context, arm), of single sequences."""
    out = {}
    for case in map(mapping, listed(bench.get("cases"))):
        facts = mapping(case.get("facts"))
        if facts.get("batch") == 1:
            for arm, rate in mapping(case.get("tokens_per_second")).items():
                out[facts.get("size"), facts.get("context"), arm] = rate
    return out


def section(result: dict[str, Any], study: Study) -> Section | None:
    """What the improvement costs, and loss against each cost with the Pareto front of every arm."""
    points = [p for p in map(mapping, listed(result.get("points"))) if p.get("arm") in study.arms]
    if not points:
        return None
    base = str(result["baseline"])
    text = [
        f"Costs by the conventions of docs/efficiency.md; factors are relative to {base} at the same size and tokens. "
        "Lines join the points of an arm than which no other of its points has a lower loss at a lower cost."
    ]
    part = Section("Efficiency", text, [_price(points, result, base, study)])
    for key, (what, more) in COSTS.items():
        chart = _chart(points, key, what, more, study)
        if chart is not None:
            part.blocks.append(chart)
    return part


def _price(points: Sequence[Mapping[str, Any]], result: Mapping[str, Any], base: str, study: Study) -> Table:
    """Per size and tokens, what each arm gains over the baseline and what it costs for that."""
    cheaper = {(c["arm"], c["size"]): c for c in map(mapping, listed(result.get("cheaper")))}
    columns = [
        "arm", "size", "loss difference (nats per token)", "training FLOPs", "training time", "training memory",
        f"prefill FLOPs, {PROMPT:,}", f"decode FLOPs, {CONTEXT:,}", f"cache, {CONTEXT:,}", f"decode time, {CONTEXT:,}",
        "decoding cheaper from context", "training cheaper from context",
    ]  # fmt: skip
    rivals = {(p["size"], p["tokens"]): p for p in points if p["arm"] == base}
    rows = []
    for p in points:
        rival = rivals.get((p["size"], p["tokens"]))
        if p["arm"] == base or rival is None:
            continue
        own = cheaper.get((p["arm"], p["size"]), {})
        rows.append([
            p["arm"], study.label(Cell(p["size"], p["tokens"])), f"{p['loss'] - rival['loss']:+.4f}",
            _factor(p["flops"], rival["flops"]), _factor(rival["train_rate"], p["train_rate"]),
            _factor(p["memory"], rival["memory"]), _factor(p["prefill_flops"], rival["prefill_flops"]),
            _factor(p["decode_flops"], rival["decode_flops"]), _factor(p["cache_bytes"], rival["cache_bytes"]),
            _factor(rival["decode_rate"], p["decode_rate"]),
            *("never" if own.get(kind) is None else count(own[kind]) for kind in ("decode", "training")),
        ])  # fmt: skip
    return Table(f"What the improvement over {base} costs (factors; below 1 is less)", columns, rows)


def _factor(value: float | None, base: float | None) -> str:
    return fixed(value / base) if value is not None and base else NONE


def _chart(points: Sequence[Mapping[str, Any]], key: str, what: str, more: bool, study: Study) -> Chart | None:
    """Loss against one cost; None where no point has it."""
    looks, marks, rows = styles(study.arms), list[Mark](), []
    for arm in study.arms:
        own = [(p[key], p["loss"], p) for p in points if p["arm"] == arm and p[key] is not None]
        if not own:
            continue
        best = front([(x, y) for x, y, _ in own], more)
        marks.append(Line([x for x, _ in best], [y for _, y in best], arm, looks[arm]))
        names = [f"{arm}, {study.label(Cell(p['size'], p['tokens']))}" for *_, p in own]
        marks.append(Points([x for x, *_ in own], [y for _, y, _ in own], arm, looks[arm], names))
        rows += [
            [name, si(x), digits(y), "yes" if (x, y) in best else "no"]
            for name, (x, y, _) in zip(names, own, strict=True)
        ]
    if not marks:
        return None
    title = f"Loss against {what}"
    figure = Figure(title, [Panel(Axis(what, log=True), Axis("validation loss (nats per token)", log=True), marks)])
    return Chart(
        figure, Table(title, ["arm and size", what, "nats per token", "on its arm's front"], rows, folded=True)
    )
