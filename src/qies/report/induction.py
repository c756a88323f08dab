"""The page's part on in-context copying: the gain on a repeated random segment, over training and at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from qies.config import INDUCTION_ONSET
from qies.report import charts
from qies.report.blocks import Chart, Section, Table
from qies.report.records import Cell, Study
from qies.report.text import NONE, number, si


@dataclass(frozen=True)
class Copying:
    """An arm's copying in one cell, by seed: final gain in nats per token, and onset in tokens (None: not reached)."""

    arm: str
    gains: dict[str, float]
    onsets: dict[str, float | None]

    @property
    def shortfall(self) -> str:
        """The lowest gain where copying has not set in in every seed: "gain 0.31 nats < 0.5"; else empty."""
        low = [gain for gain in self.gains.values() if gain < INDUCTION_ONSET]
        if not low:
            return ""
        seeds = f" in {len(low)} of {len(self.gains)} seeds" if len(self.gains) > 1 else ""
        return f"gain {min(low):.2f} nats < {INDUCTION_ONSET:g}{seeds}"

    @property
    def mean(self) -> str:
        """Mean over seeds with its range: "1.71 (0.40 to 2.10)"."""
        if not self.gains:
            return NONE
        values = self.gains.values()
        ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        return f"{fmean(values):.2f}{ends}"

    @property
    def onset(self) -> str:
        """Onset of every seed: "seed 0: 2.1M, seed 1: not reached"."""
        found = [f"seed {seed}: {'not reached' if at is None else si(at)}" for seed, at in self.onsets.items()]
        return ", ".join(found) or NONE

    @property
    def words(self) -> str:
        return f"{self.mean}, onset in tokens {self.onset}" if self.gains else "not recorded"


def copying(study: Study, arm: str, cell: Cell) -> Copying:
    """From the records of the finished runs that carry an induction score."""
    runs = [run for run in study.of(arm, cell) if run.induction is not None]
    runs.sort(key=lambda run: study.seeds.index(run.seed))
    return Copying(arm, {r.seed: r.induction or 0.0 for r in runs}, {r.seed: r.onset for r in runs})


def before_onset(measured: Iterable[Copying]) -> str:
    """Names the arms in which copying had not set in, as a clause; empty where it had in every arm, or is unknown."""
    arms = [f"{c.arm} ({c.shortfall})" for c in measured if c.shortfall]
    return f"in-context copying had not set in in {' and '.join(arms)}" if arms else ""


def induction(study: Study) -> Section | None:
    """None for records without induction scores."""
    curves = {cell: {arm: c for arm in study.arms if (c := _curve(study, arm, cell))} for cell in study.cells}
    rows = [
        [arm, study.label(cell), found.mean, found.onset]
        for cell in study.cells
        for arm in study.arms
        if (found := copying(study, arm, cell)).gains
    ]
    text = [
        "Gain: loss on random segments of tokens minus loss on their immediate repeats, which only a model that copies "
        f"from its context predicts (induction). Copying has set in from {INDUCTION_ONSET:g} nats per token on. Lines: "
        "mean over seeds; bands: lowest to highest seed."
    ]
    section = Section("In-context copying", text)
    if rows:
        columns = ["arm", "size", "final gain: mean (range over seeds)", "onset in tokens, by seed"]
        section.blocks.append(Table("Induction gain at the end of training (nats per token)", columns, rows))
    for cell, series in curves.items():
        if series:
            title = f"Induction gain at {study.label(cell)}"
            places = [
                [arm, si(x), f"{mean:.3f}", f"{lo:.3f} to {hi:.3f}"]
                for arm, (xs, *values) in series.items()
                for x, mean, lo, hi in zip(xs, *values, strict=True)
            ]
            table = Table(title, ["arm", "tokens", "mean over seeds", "range over seeds"], places, folded=True)
            section.blocks.append(Chart(charts.induction_chart(title, series, INDUCTION_ONSET), table))
    return section


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
