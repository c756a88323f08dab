"""Compare two arms' scaling: what the candidate gains over the baseline, and whether it is more than chance.

Compute-equivalent gain (Davidson et al. 2023, arXiv:2312.07413): how many times the candidate's FLOPs the
baseline needs for the same loss; likewise parameters, data and time.

The rule of the verdict, the only one: an arm wins if the interval of the compute gain at the largest compute
both arms have excludes 1 on its side, unless a paired test over seeds, at the largest matched size and at
FLOPs equal to 10 %, speaks against it (p below 1 - level). Where no law in compute can be fitted (one size),
that paired test decides. Otherwise: no difference. Under the null either test is wrong in 1 - level of cases.
Where in-context copying had not set in in both arms (`copying`), the reason names it, and the verdict is no headline.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qies.errors import UserError, unknown
from qies.scaling.comparison.copying import Copying, before_onset
from qies.scaling.comparison.equality_test import equality_test
from qies.scaling.comparison.gain_axes import SHARED, GainAxes, GainAxis, fit_gain_axes
from qies.scaling.comparison.joint_inference import LIMIT, JointFit, bisect, crossings, multipliers
from qies.scaling.comparison.matching import Cells, Paired, cells_of, match, paired_tests, seed_noise
from qies.scaling.comparison.planning import make_plan
from qies.scaling.comparison.result import Comparison, Crossing, FrontierPoint, Gain, plural
from qies.scaling.comparison.statistical_power import (
    TARGET,
    StatisticalPower,
    cells_needed,
    detectable_effect,
    size_power,
)
from qies.scaling.laws.divergence import sound
from qies.scaling.laws.intervals import t_quantile
from qies.scaling.tables.filtering import best_per_cell, oddities
from qies.scaling.tables.runs import Runs

Array = NDArray[np.float64]

FORMS = ("auto", "surface", "power")
EQUAL_FLOPS = 0.1
# Crossings are looked for this many times below and above the shared compute.
CROSSING_REACH = 1000.0
# Degrees of freedom between sizes below which the two levels of scatter are hardly known.
FEW_BETWEEN = 1.5


def compare(
    runs: Runs,
    candidate: str,
    baseline: str,
    *,
    form: str = "auto",
    level: float = 0.95,
    points: int = 13,
    best: bool = False,
    plan: bool = False,
) -> Comparison:
    """Compare `candidate` with `baseline` on their runs.

    form: "surface" (approach3 an arm), "power" (a power law an arm and variable) or "auto": surfaces where both
    arms vary size and tokens apart from each other. level of every interval; points of every curve. best: take only the
    lowest loss at every arm's (N, D). plan: add the power of further studies (`planning`). Diverged
    and non-finite runs are left out and named in `dropped`. Raises UserError for an arm that is not there, the
    same arm twice, an unknown form, or an arm without a sound run.
    """
    _check(runs, candidate, baseline, form, level, points)
    where = np.flatnonzero(np.isin(runs.arm, [candidate, baseline]))
    kept, left_out = sound(runs.select(where))
    if best:
        kept = kept.select(best_per_cell(kept))
    dropped = tuple(replace(run, index=int(where[run.index])) for run in left_out)
    for arm in (candidate, baseline):
        if arm not in kept.arms:
            raise UserError(f"arm '{arm}' has no sound run left; see which runs diverged and train them again")
    a, b = kept.of_arm(candidate), kept.of_arm(baseline)
    ca, cb = cells_of(a, b)
    paired = paired_tests(a, b, ca, cb, level)
    warnings = oddities(kept) + _data_warnings(a, b, ca, cb, paired)
    noise = seed_noise(a, b, ca, cb)
    axes = fit_gain_axes(ca, cb, (a, b), form, level, noise)
    warnings += axes.warnings
    gains = {variable: _curve(axis, points) for variable, axis in axes.of.items()}
    axis = axes.of.get("compute")
    shared, power = None, None
    crossed: tuple[Crossing, ...] = ()
    if axis is not None:
        warnings += _band_warnings(axis.joint)
        shared = equality_test(axis.joint, SHARED[axes.form], (candidate, baseline))
        crossed = _crossings(axis, candidate, baseline)
        power = _power(axis, ca, cb, paired)
    copied = _copying(a, b, ca, cb, (candidate, baseline))
    verdict, reason = _verdict(gains.get("compute", ()), paired, candidate, baseline, level)
    if before := before_onset(copied.values()):
        reason += f", but {before}"
    return Comparison(
        candidate=candidate,
        baseline=baseline,
        form=axes.form,
        level=level,
        flops_convention=runs.convention,
        runs={candidate: len(a), baseline: len(b)},
        cells={candidate: len(ca), baseline: len(cb)},
        gain=gains,
        paired=paired,
        shared_fit=shared,
        crossings=crossed,
        frontier={} if axis is None else _frontiers(axis, axes, candidate, baseline, points),
        losses={candidate: _points(ca), baseline: _points(cb)},
        power=power,
        plan=make_plan(ca, cb, noise, None if axis is None else axis.joint, level) if plan else None,
        regime=_regime(a, b, ca, cb),
        copying=copied,
        verdict=verdict,
        reason=reason,
        dropped=dropped,
        warnings=tuple(warnings),
    )


def _check(runs: Runs, candidate: str, baseline: str, form: str, level: float, points: int) -> None:
    for arm in (candidate, baseline):
        if arm not in runs.arms:
            note = "" if runs.arms else "The table has no column of arms; name it with --columns arm=COLUMN."
            raise unknown("arm", arm, runs.arms, where="in these runs", note=note)
    if candidate == baseline:
        raise UserError(f"both arms are '{candidate}'; name a candidate and another arm as its baseline")
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if not (0 < level < 1 and points >= 2):
        raise UserError(f"0 < level < 1 and points >= 2 are needed; got {level}, {points}")


def _data_warnings(a: Runs, b: Runs, ca: Cells, cb: Cells, paired: tuple[Paired, ...]) -> list[str]:
    said, candidate, baseline = [], a.arm[0], b.arm[0]
    lone = [f"{len(c) - len(paired)} of {arm}" for arm, c in ((candidate, ca), (baseline, cb)) if len(c) > len(paired)]
    if lone:
        said.append(f"{' and '.join(lone)} (size, tokens) points have no match in the other arm")
    if any(row.test == "Welch t" for row in paired):
        said.append("some sizes share fewer than two seeds, so their seeds are compared unpaired (Welch)")
    lone_seeds = sum(row.test == "one seed" for row in paired)
    if lone_seeds:
        where = "every matched size" if lone_seeds == len(paired) else f"{lone_seeds} of {len(paired)} matched sizes"
        said.append(
            f"one seed at {where}: one seed does not measure how much seeds move the loss, so a difference at one such "
            "size is not significant by itself, and the intervals rest on the scatter of the sizes around the laws"
        )
    if repeated := sum(int((runs.unique < runs.tokens).sum()) for runs in (a, b) if runs.unique is not None):
        said.append(f"{repeated} runs repeat data (unique below tokens), which the laws ignore")
    if not paired:
        said.append("the arms have no size and token budget in common, so nothing is paired")
    return said


def _band_warnings(joint: JointFit) -> list[str]:
    if joint.basis == "none":
        return ["the laws pass through every point, so no interval can be given; train more sizes or seeds"]
    if joint.basis == "seeds":
        return ["the laws pass through every point, so the intervals carry the noise of seeds alone, not size noise"]
    if joint.basis == "cells and seeds":
        return [
            "three sizes: the intervals pool the sizes' scatter (1 degree of freedom) with the noise of seeds, and are "
            "too narrow if sizes deviate by more than about twice the noise of a size's mean; train a fourth size"
        ]
    said = []
    if joint.dof < 3:
        said.append(f"few sizes: the intervals rest on {plural(joint.dof, 'degree')} of freedom")
    if joint.strata.clustered and joint.strata.between < FEW_BETWEEN:
        said.append(
            f"few sizes: {plural(round(max(joint.strata.between, 0.0), 1), 'degree')} of freedom measure how sizes "
            "deviate from the surface, so the intervals may be too narrow if sizes deviate as much as seeds; train "
            "more sizes"
        )
    return said


def _regime(a: Runs, b: Runs, ca: Cells, cb: Cells) -> dict[str, Any]:
    """Where the comparison holds: of the matched cells, or of both arms' where none match. `context` (lengths in
    tokens) and `corpus` are lists of what the runs' records name, empty where they name nothing."""
    rows = match(ca, cb)
    matched = rows.T if len(rows) else (np.arange(len(ca)), np.arange(len(cb)))
    sides = [(runs, cells, i) for runs, cells, i in zip((a, b), (ca, cb), matched, strict=True)]
    params, tokens = (
        np.concatenate([getattr(cells, what)[i] for _, cells, i in sides]) for what in ("params", "tokens")
    )
    ratio = tokens / params
    members = [(runs, cells.runs[j]) for runs, cells, i in sides for j in i]

    def named(what: str) -> list[str]:
        words = (getattr(runs, what)[i] for runs, rows in members if getattr(runs, what) for i in rows)
        return list(dict.fromkeys(word for word in words if word))

    return {
        "sizes": [float(params.min()), float(params.max())],
        "tokens_per_parameter": [float(ratio.min()), float(ratio.max())],
        "context": [int(word) if word.isdecimal() else word for word in named("context")],
        "corpus": named("corpus"),
        "seeds": min(len(rows) for _, rows in members),
        "sizes_count": len({size for _, cells, i in sides for size in cells.sizes[i].tolist()}),
    }


def _copying(a: Runs, b: Runs, ca: Cells, cb: Cells, arms: tuple[str, str]) -> dict[str, Copying]:
    """Each arm's copying at the largest matched size; {} where no size matches or the runs have no induction score."""
    rows = match(ca, cb)
    if (
        not len(rows)
        or a.induction is None
        or b.induction is None
        or not np.isfinite([*a.induction, *b.induction]).any()
    ):
        return {}
    found = {}
    for arm, runs, cells, i in zip(arms, (a, b), (ca, cb), rows[-1], strict=True):
        members = cells.runs[i][np.argsort(runs.seed[cells.runs[i]], kind="stable")]
        scores, onsets = (
            tuple(None if column is None else _number(float(column[row])) for row in members)
            for column in (runs.induction, runs.induction_onset)
        )
        found[arm] = Copying(arm, tuple(str(runs.seed[row]) for row in members), scores, onsets)
    return found


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _curve(axis: GainAxis, points: int) -> tuple[Gain, ...]:
    x = np.linspace(axis.low, axis.high, points)
    g, lo, hi = multipliers(axis.joint, axis.path_a, axis.path_b, x)
    reach_a = axis.joint.a.reach(axis.path_a(x))
    reach_b = axis.joint.b.reach(axis.path_b(x + np.log(np.where(np.isfinite(g), g, 1.0))))
    reach = np.maximum(reach_a, reach_b)
    return tuple(
        Gain(float(np.exp(x[i])), _number(g[i]), _number(lo[i]), _number(hi[i]), float(reach[i])) for i in range(points)
    )


def _crossings(axis: GainAxis, candidate: str, baseline: str) -> tuple[Crossing, ...]:
    margin = math.log(CROSSING_REACH)
    found = crossings(axis.joint, axis.path_a, axis.path_b, axis.low - margin, axis.high + margin)
    out = []
    for x, lo, hi, sign in found:
        at = np.array([x])
        reach = max(axis.joint.a.reach(axis.path_a(at))[0], axis.joint.b.reach(axis.path_b(at))[0])
        ends = [None if end is None else math.exp(end) for end in (lo, hi)]
        out.append(Crossing(math.exp(x), ends[0], ends[1], candidate if sign < 0 else baseline, float(reach)))
    return tuple(out)


def _frontiers(
    axis: GainAxis, axes: GainAxes, candidate: str, baseline: str, points: int
) -> dict[str, tuple[FrontierPoint, ...]]:
    """Both arms' least loss over the shared compute and three times beyond."""
    x = np.linspace(axis.low, axis.high + math.log(3.0), points)
    out = {}
    for side, arm, law, path in (
        ("a", candidate, axis.joint.a, axis.path_a),
        ("b", baseline, axis.joint.b, axis.path_b),
    ):
        at = path(x)
        loss, lo, hi = axis.joint.band(side, at)
        spent = np.exp(at) if axes.form == "surface" else np.full((points, 2), np.nan)
        out[arm] = tuple(
            FrontierPoint(
                compute=float(np.exp(x[i])),
                loss=float(loss[i]),
                lo=_number(lo[i]),
                hi=_number(hi[i]),
                params=_number(spent[i, 0]),
                tokens=_number(spent[i, 1]),
                reach=float(law.reach(at[i : i + 1])[0]),
            )
            for i in range(points)
        )
    return out


def _points(cells: Cells) -> tuple[tuple[float, float, float, float], ...]:
    columns = (cells.flops, cells.params, cells.tokens, np.exp(cells.log_loss))
    return tuple((float(c), float(n), float(d), float(loss)) for c, n, d, loss in zip(*columns, strict=True))


def _power(axis: GainAxis, ca: Cells, cb: Cells, paired: tuple[Paired, ...]) -> StatisticalPower | None:
    """Power of the test behind the verdict (the arms' losses at the largest shared compute), and of paired tests."""
    joint = axis.joint
    if joint.dof == 0:
        return None
    level = joint.level
    x = np.array([axis.high])
    effect, half, dof = (float(v[0]) for v in joint.difference(axis.path_a(x), axis.path_b(x)))
    error = half / t_quantile(level, dof)
    cells = min(len(ca), len(cb))
    scatter = None
    if joint.measured:
        spread = joint.sigma[0, 0] + joint.sigma[1, 1] - 2 * joint.sigma[0, 1]
        scatter = math.sqrt(max(float(spread), 0.0)) * math.exp(float(np.mean(cb.log_loss)))
    detectable = None
    if error > 0:
        # The compute by which the baseline's own loss falls as far as the smallest difference that shows.
        goal = joint.b.evaluate(joint.b.theta, axis.path_b(x))[0] - detectable_effect(error, dof, level)
        moved = bisect(
            lambda v: joint.b.evaluate(joint.b.theta, axis.path_b(x + v))[0] - goal, np.zeros(1), np.full(1, LIMIT)
        )
        detectable = _number(math.exp(moved[0]))
    needed = cells_needed(effect, error, cells, dof, level) if joint.measured and effect else None
    return StatisticalPower(TARGET, level, cells, needed, detectable, size_power(paired, scatter, level))


def _verdict(
    gain: tuple[Gain, ...], paired: tuple[Paired, ...], candidate: str, baseline: str, level: float
) -> tuple[str, str]:
    """The module's rule: (verdict, reason)."""
    percent = f"{100 * level:g}%"
    largest = paired[-1] if paired else None
    shown = largest is not None and largest.p is not None and largest.p < 1 - level
    if not gain:
        if largest is None or not shown:
            return "no difference", "there is no gain in compute and no paired test at the largest size shows one"
        return f"{candidate if largest.difference < 0 else baseline} wins", (
            f"there is no gain in compute, and the paired test at the largest matched size has p = {largest.p:.2g}"
        )
    last = gain[-1]
    where = f"the compute gain of {candidate} over {baseline} at {last.x:.3g} FLOPs is {last.words()}"
    side = last.excludes_one()
    if side == 0:
        why = "there is no interval" if last.lo is None else f"its {percent} CI includes 1"
        return "no difference", f"{where}, and {why}"
    winner = candidate if side > 0 else baseline
    # The lower loss has the sign opposite to a gain.
    contradicted = largest is not None and shown and largest.difference * side > 0
    if largest is not None and contradicted and abs(math.log(largest.flops_ratio)) <= EQUAL_FLOPS:
        return "no difference", (
            f"{where}, but the paired test at N = {largest.params:.3g} and equal FLOPs says the opposite "
            f"(p = {largest.p:.2g}): the laws do not hold there"
        )
    return f"{winner} wins", f"{where}, and its {percent} CI excludes 1"
