"""In-context copying: the gain on a repeated random segment, during and at the end of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qies.analyses.formatting import NONE, number, si
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Cell, Study
from qies.config import INDUCTION_ONSET
from qies.plotting import GREY, Axis, Band, Figure, Line, Panel, Style, styles
from qies.plotting.marks import Mark
from qies.scaling.comparison.copying import Copying


def copying(study: Study, arm: str, cell: Cell) -> Copying:
    """From the records of the finished runs."""
    runs = sorted(study.of(arm, cell), key=lambda run: study.seeds.index(run.seed))
    return Copying(arm, tuple(r.seed for r in runs), tuple(r.induction for r in runs), tuple(r.onset for r in runs))


def mean_score(found: Copying) -> str:
    """Mean over seeds with its range: "1.71 (0.40 to 2.10)"."""
    values = found.measured
    if not values:
        return NONE
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{ends}"


def onset_by_seed(found: Copying) -> str:
    """Onset of every seed: "seed 0: 2.1M, seed 1: not reached, seed 2: not measured"."""
    said = [
        f"seed {seed}: {'not measured' if score is None else 'not reached' if at is None else si(at)}"
        for seed, score, at in zip(found.seeds, found.scores, found.onsets, strict=True)
    ]
    return ", ".join(said) or NONE


def in_words(found: Copying) -> str:
    """Score and onset; "not recorded" without a score."""
    return f"{mean_score(found)}, onset in tokens {onset_by_seed(found)}" if found.measured else "not recorded"


def section(result: dict[str, Any], study: Study) -> Section | None:
    """Induction scores during and at the end of training, where the records have them."""
    curves = {cell: {arm: c for arm in study.arms if (c := _curve(study, arm, cell))} for cell in study.cells}
    rows = [
        [arm, study.label(cell), mean_score(found), onset_by_seed(found)]
        for cell in study.cells
        for arm in study.arms
        if (found := copying(study, arm, cell)).measured
    ]
    text = [
        "Gain: loss on random segments of tokens minus loss on their immediate repeats, which only a model that copies "
        f"from its context predicts (induction). Copying has set in from {INDUCTION_ONSET:g} nats per token on. Lines: "
        "mean over seeds; bands: lowest to highest seed."
    ]
    part = Section("In-context copying", text)
    if rows:
        columns = ["arm", "size", "final gain: mean (range over seeds)", "onset in tokens, by seed"]
        part.blocks.append(Table("Induction gain at the end of training (nats per token)", columns, rows))
    for cell, series in curves.items():
        if series:
            title = f"Induction gain at {study.label(cell)}"
            places = [
                [arm, si(x), f"{mean:.3f}", f"{lo:.3f} to {hi:.3f}"]
                for arm, (xs, *values) in series.items()
                for x, mean, lo, hi in zip(xs, *values, strict=True)
            ]
            table = Table(title, ["arm", "tokens", "mean over seeds", "range over seeds"], places, folded=True)
            part.blocks.append(Chart(_chart(title, series, INDUCTION_ONSET), table))
    return part


def _chart(title: str, series: Mapping[str, tuple[Sequence[float], ...]], onset: float) -> Figure:
    """Induction gain against tokens: (tokens, mean, lowest, highest) per arm, and a line at the
    onset of copying."""
    looks = styles(series)
    every = [x for xs, *_ in series.values() for x in xs]
    marks: list[Mark] = [Band(xs, lo, hi, looks[arm]) for arm, (xs, _, lo, hi) in series.items()]
    marks.append(
        Line([min(every), max(every)], [onset, onset], f"onset, {onset:g} nats", Style(GREY.colour, dash="dot"))
    )
    marks += [Line(xs, mean, arm, looks[arm], markers=True) for arm, (xs, mean, *_) in series.items()]
    # Bands do not extend the automatic axis range, so it is computed from their ends.
    ends = [v for _, _, lo, hi in series.values() for v in (*lo, *hi)] + [0.0, onset]
    room = 0.05 * (max(ends) - min(ends))
    y = Axis("gain on the repeat (nats per token)", low=min(ends) - room, high=max(ends) + room)
    return Figure(title, [Panel(Axis("tokens seen", True), y, marks)])


def _curve(study: Study, arm: str, cell: Cell) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Tokens, and mean, lowest and highest gain over the finished runs evaluated there."""
    gains: dict[float, list[float]] = {}
    for run in study.of(arm, cell):
        for row in run.rows:
            tokens, gain = number(row.get("tokens")), number(row.get("induction"))
            if tokens and tokens > 0 and gain is not None:
                gains.setdefault(tokens, []).append(gain)
    if not gains:
        return None
    xs = sorted(gains)
    means, low, high = ([f(gains[x]) for x in xs] for f in (fmean, min, max))
    return xs, means, low, high
