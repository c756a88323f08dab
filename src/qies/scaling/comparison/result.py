"""The result of comparing two arms, with its summary and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qies.config import INDUCTION_ONSET
from qies.plotting import Figure
from qies.scaling import figures
from qies.scaling.comparison.copying import Copying, before_onset, set_in
from qies.scaling.comparison.equality_test import EqualityTest
from qies.scaling.comparison.matching import Paired
from qies.scaling.comparison.planning import Plan
from qies.scaling.comparison.statistical_power import StatisticalPower
from qies.scaling.result import Result, paragraph
from qies.scaling.tables.runs import Dropped

KEY = {"data": "tokens"}  # what x is called in JSON, where not as the gain
UNIT = {"compute": "FLOPs", "params": "parameters", "data": "tokens", "time": "seconds"}
# A law read up to 2 % beyond its runs (sizes of one level differ by as much) is still inside them.
INSIDE = 1.02


def plural(count: float, noun: str) -> str:
    """1 seed; 3 seeds; 0.5 degrees."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Gain:
    """How many times the candidate's `x` the baseline needs for the same loss; above 1 the candidate needs less.

    x in FLOPs, parameters, tokens or seconds of the candidate. gain None: the baseline's law does not reach
    that loss within a factor of 10,000 (a loss below its floor, say; lo and hi then still bound the gain).
    lo, hi None without an interval; hi None with a lo: unbounded above; lo 0: unbounded below. `reach`: how many
    times beyond the runs either arm's law is read here; 1 is inside.
    """

    x: float
    gain: float | None
    lo: float | None
    hi: float | None
    reach: float

    def excludes_one(self) -> int:
        """+1: the interval lies above 1; -1: below; 0: it includes 1, or there is none."""
        if self.lo is None:
            return 0
        if self.lo > 1 + 1e-6:  # arms that are the same run differ by rounding
            return 1
        return -1 if self.hi is not None and self.hi < 1 - 1e-6 else 0

    def point(self, key: str) -> dict[str, float | None]:
        """A point of a gain curve as JSON; `key` is the name of x."""
        return {key: self.x, "gain": self.gain, "lo": self.lo, "hi": self.hi, "reach": self.reach}

    def words(self) -> str:
        if self.gain is None and self.lo is None:
            return "unknown (the baseline's law does not reach that loss)"
        if self.lo is None:
            return f"{self.gain:.3g} (no interval)"
        end = "unbounded" if self.hi is None else f"{self.hi:.3g}"
        value = "out of the baseline's reach" if self.gain is None else f"{self.gain:.3g}"
        return f"{value} ({self.lo:.3g} to {end})"


@dataclass(frozen=True)
class Crossing:
    """Where the arms' losses are equal: FLOPs, the range in which they are not significantly different (None: open on
    that side), the arm that is lower beyond, and `reach`, how many times beyond the runs that is (1: inside)."""

    compute: float
    lo: float | None
    hi: float | None
    lower_beyond: str
    reach: float


@dataclass(frozen=True)
class FrontierPoint:
    """An arm's least loss at a compute, with its interval, and where a surface says to spend it."""

    compute: float
    loss: float
    lo: float | None
    hi: float | None
    params: float | None
    tokens: float | None
    reach: float


@dataclass(frozen=True)
class Comparison(Result):
    """Candidate against baseline; `compare` makes it. `verdict` is "<arm> wins" or "no difference", `reason` why.

    `copying`: each arm's induction scores and onsets at the largest matched size, {} where the runs have no score.
    `gain` by variable, in order of x over the shared range; `at_largest` is the last of compute, None where no
    law in compute could be fitted. `losses` [arm -> (compute, params, tokens, loss)] are the cells, for charts.
    """

    candidate: str
    baseline: str
    form: str
    level: float
    flops_convention: str
    runs: dict[str, int]
    cells: dict[str, int]
    gain: dict[str, tuple[Gain, ...]]
    paired: tuple[Paired, ...]
    shared_fit: EqualityTest | None
    crossings: tuple[Crossing, ...]
    frontier: dict[str, tuple[FrontierPoint, ...]]
    losses: dict[str, tuple[tuple[float, float, float, float], ...]]
    power: StatisticalPower | None
    regime: dict[str, Any]
    copying: dict[str, Copying]
    verdict: str
    reason: str
    dropped: tuple[Dropped, ...] = ()
    warnings: tuple[str, ...] = ()
    plan: Plan | None = None

    @property
    def at_largest(self) -> Gain | None:
        points = self.gain.get("compute")
        return points[-1] if points else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not known is null."""
        curves = {
            variable: [point.point(KEY.get(variable, variable)) for point in points]
            for variable, points in self.gain.items()
        }
        largest = None if self.at_largest is None else self.at_largest.point("compute")
        compute = None if largest is None else largest["compute"]
        # every gain at the largest scale that both arms have, that in compute as a curve too
        gain: dict[str, Any] = {v: {"compute": compute, **curve[-1]} for v, curve in curves.items() if curve}
        gain |= {"compute": curves.get("compute", []), "at_largest": largest, "curves": curves}
        return super().to_dict() | {"gain": gain, "copying": self._copying_dict(), "summary": self.summary()}

    def figures(self) -> dict[str, Figure]:
        """The gains, the frontier and the paired differences, where they are known."""
        return figures.comparison_figures(self)

    def summary(self) -> str:
        """The verdict, the gains with their intervals, what they rest on and every warning, as one paragraph."""
        head = self.verdict[0].upper() + self.verdict[1:] if self.verdict == "no difference" else self.verdict
        if before_onset(self.copying.values()):
            head = f"No headline; at these budgets {self.verdict}"
        said = [
            f"{head}: {self.reason} ({self._regime()})",
            *self._copying(),
            *self._gains(),
            *self._paired(),
            *self._shared(),
            *self._crossings(),
        ]
        said += self._power()
        said.append(f"FLOPs: {self.flops_convention}")
        if self.dropped:
            said.append(f"{plural(len(self.dropped), 'run')} left out, see dropped")
        return paragraph(said, self.warnings)

    def _regime(self) -> str:
        """Where the verdict holds: "4 sizes of 5e+04 to 4e+05 parameters, 10 to 82 tokens per parameter, 2 seeds"."""
        r = self.regime
        low, high = (f"{v:.2g}" for v in r["tokens_per_parameter"])
        sizes = " to ".join(dict.fromkeys(f"{v:.3g}" for v in r["sizes"]))
        said = [
            f"{plural(r['sizes_count'], 'size')} of {sizes} parameters",
            f"{low if low == high else f'{low} to {high}'} tokens per parameter",
            plural(r["seeds"], "seed"),
        ]
        said += [f"context of {' or '.join(map(str, r['context']))} tokens"] if r["context"] else []
        said += [f"corpus {' and '.join(r['corpus'])}"] if r["corpus"] else []
        return ", ".join(said)

    def _copying_dict(self) -> dict[str, Any] | None:
        """The rule's threshold and outcome, and each arm's scores and onsets; None without scores."""
        if not self.copying:
            return None
        arms = {arm: found.to_dict() for arm, found in self.copying.items()}
        return {"threshold": INDUCTION_ONSET, "set_in": set_in(self.copying.values()), "arms": arms}

    def _copying(self) -> list[str]:
        """Whether in-context copying had set in at the largest matched size; before, losses differ mainly in when it
        does."""
        if not self.copying:
            return []
        means = ", ".join(
            f"{arm} {'not measured' if c.mean is None else f'{c.mean:.2f}'}" for arm, c in self.copying.items()
        )
        state = set_in(self.copying.values())
        if state is None:
            said = "Not every run has an induction score, so whether copying had set in is unknown"
        else:
            late = [arm for arm, c in self.copying.items() if c.set_in is False]
            said = "Copying had set in in both arms" if state else f"Copying had not set in in {' and '.join(late)}"
        return [f"{said} (mean induction score at the largest matched size, nats per token: {means})"]

    def _gains(self) -> list[str]:
        """The other gains (the verdict's reason has that in compute), and how far the laws were read."""
        last = {variable: points[-1] for variable, points in self.gain.items()}
        others = [f"{p.words()} times the {UNIT[v]} at {p.x:.3g}" for v, p in last.items() if v != "compute"]
        said = [f"For the same loss {self.baseline} needs {', '.join(others)}"] if others else []
        far = [f"{p.reach:.3g} times in {variable}" for variable, p in last.items() if p.reach > INSIDE]
        if far:
            said.append(f"These gains read a law beyond the runs it was fitted to, by {', '.join(far)}")
        return said

    def _paired(self) -> list[str]:
        tested = [row for row in self.paired if row.p is not None]
        if not tested:
            return []
        last = tested[-1]
        shown = sum(row.p is not None and row.p < 1 - self.level for row in tested)
        return [
            f"Over seeds at N = {last.params:.3g}, D = {last.tokens:.3g}, {self.candidate} minus {self.baseline} is "
            f"{last.difference:+.4f} nats ({last.lo:+.4f} to {last.hi:+.4f}, p = {last.p:.2g}, {last.test}); "
            f"p is below {1 - self.level:.2g} at {shown} of {plural(len(tested), 'matched size')}"
        ]

    def _shared(self) -> list[str]:
        fit = self.shared_fit
        if fit is None or fit.p is None:
            return []
        names, plural = ", ".join(fit.shared), len(fit.shared) > 1
        shown = f"differ{'' if plural else 's'} significantly between the arms"
        finding = (
            shown
            if fit.p < 1 - self.level
            else f"{'do' if plural else 'does'} not differ significantly between the arms"
        )
        return [f"{names} {finding} (F({fit.restrictions}, {fit.dof:.3g}) = {fit.statistic:.3g}, p = {fit.p:.2g})"]

    def _crossings(self) -> list[str]:
        said = []
        for c in self.crossings:
            ends = [f"{word} {end:.3g}" for word, end in (("from", c.lo), ("to", c.hi)) if end is not None]
            range_ = f"not significantly different {' '.join(ends) or 'at any compute'}"
            where = "inside the runs" if c.reach <= INSIDE else f"{c.reach:.2g} times beyond the runs"
            said.append(
                f"The laws cross at {c.compute:.3g} FLOPs, {where} ({range_}); beyond it {c.lower_beyond} is lower"
            )
        return said

    def _power(self) -> list[str]:
        if self.power is None or self.verdict != "no difference":
            return []
        p, said = self.power, []
        if p.detectable is not None and math.isfinite(p.detectable):
            said.append(f"With {100 * p.target:.0f} % power these runs detect a gain of {p.detectable:.3g} or more")
        if p.cells_needed is not None and p.cells_needed > p.cells:
            said.append(
                f"To detect a gain as large as the one observed takes about {p.cells_needed} matched sizes and budgets "
                f"(have {p.cells})"
            )
        best = p.best
        if best is not None:
            noise = "" if best.measured else "; the scatter around the laws stands in for the noise of seeds"
            said.append(
                f"Fewest seeds are needed at N = {best.params:.3g}, D = {best.tokens:.3g}: a paired test of the same "
                f"power takes {best.need} seeds per arm (have {best.have}{noise})"
            )
        elif p.sizes:
            said.append("At no matched size do 1,000 seeds per arm detect the difference observed there")
        return said
