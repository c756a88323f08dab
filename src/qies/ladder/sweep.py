"""Summarise the variants of a sweep from its run records: means over seeds, best first."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qies import presets
from qies.config import DataConfig, TrainConfig, to_dict
from qies.errors import UserError
from qies.records import RunRecord, query


def sweep(folder: Path) -> dict[str, Any]:
    """Group the finished runs below `folder` by arm, size and tokens, and within each such cell by variant.

    A variant is a combination of the settings (of model, training and text) that differ between runs of the folder.

    Returns:
        `swept`, the names of those settings, and `cells`. Each variant of a cell has n (seeds), loss (mean, nats per
        token), se (standard error over seeds; None for one seed), losses by seed, behind (mean difference to the best
        variant over common seeds, with n and se), induction (mean final gain, nats per token) and onsets (tokens by
        seed; None if copying did not set in). The best variant has the lowest mean among those with the most seeds.

    Raises UserError if no run has finished or the folder holds the same run twice.
    """
    records = query(folder, status="done")
    if not records:
        raise UserError(f"{folder} holds no finished run; run the sweep first with qies ladder run.")
    settings = [_settings(record) for record in records]
    swept = sorted({k for s in settings for k in s if any(s.get(k) != other.get(k) for other in settings)})
    cells: dict[tuple[str, str, int], dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = defaultdict(dict)
    for record, values in zip(records, settings, strict=True):
        variant = tuple(_frozen(values.get(key)) for key in swept)
        seeds = cells[record.arm, record.size, record.tokens].setdefault(variant, {})
        if str(record.seed) in seeds:
            raise UserError(f"{folder} holds two identical runs: {record.arm} {record.size} seed {record.seed}.")
        seeds[str(record.seed)] = record.metrics
    order = sorted(cells, key=lambda cell: (presets.parse_size(cell[1]), cell[2], cell[0]))
    return {"schema": 1, "swept": swept, "cells": [_cell(*cell, cells[cell], swept) for cell in order]}


def _settings(record: RunRecord) -> dict[str, Any]:
    """The run's settings of model, training and text, by dotted key. Text is identified by its hash if it has one."""
    config, defaults = record.config, {"model": {}, "train": to_dict(TrainConfig()), "data": to_dict(DataConfig())}
    settings = {f"{part}.{k}": v for part, known in defaults.items() for k, v in (known | config[part]).items()}
    if settings["data.hash"]:
        del settings["data.source"]
    return settings


def _frozen(value: Any) -> Any:
    """The value in hashable form."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _cell(arm: str, size: str, tokens: int, variants: dict[Any, dict[str, Any]], swept: list[str]) -> dict[str, Any]:
    losses = {v: {s: m["val_loss"] for s, m in seeds.items()} for v, seeds in variants.items()}
    best = min(losses, key=lambda v: (-len(losses[v]), fmean(losses[v].values())))
    rows = []
    for variant in sorted(losses, key=lambda v: fmean(losses[v].values())):
        own, metrics = losses[variant], variants[variant].values()
        apart = [own[seed] - losses[best][seed] for seed in own if seed in losses[best]]
        gains = [m["induction"] for m in metrics if m.get("induction") is not None]
        rows.append(
            {
                "variant": dict(zip(swept, variant, strict=True)),
                "best": variant == best,
                "n": len(own),
                "loss": fmean(own.values()),
                "se": _standard_error(list(own.values())),
                "losses": dict(sorted(own.items(), key=lambda pair: int(pair[0]))),
                "behind": {"difference": fmean(apart), "se": _standard_error(apart), "n": len(apart)}
                if apart
                else None,
                "induction": fmean(gains) if gains else None,
                # None means that copying did not set in; runs without a score have no entry.
                "onsets": {
                    seed: m.get("induction_onset")
                    for seed, m in sorted(variants[variant].items(), key=lambda pair: int(pair[0]))
                    if m.get("induction") is not None
                },
            }
        )
    return {"arm": arm, "size": size, "tokens": tokens, "variants": rows}


def _standard_error(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
