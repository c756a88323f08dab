"""Gains of one arm over another: each arm against the baseline, and the proposal against its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qies.analyses.finished import Finished
from qies.analyses.formatting import NONE, estimate, number, si
from qies.analyses.parts import Chart, Passage, Section, Table
from qies.analyses.records import BASELINE, PROPOSAL, Study, listed, mapping
from qies.errors import UserError
from qies.scaling.figures import GAINS, frontier_figure, gain_figure, pair_name, paired_figure

Pair = Mapping[str, Any]
# Arms that differ from the proposal in one part, so that a gain can be attributed to it.
CONTROLS = ("real_registers", "no_phase", "fixed_phase", "selective_phase")


def compute(study: Finished) -> dict[str, Any]:
    """Compare every arm with the baseline, and the proposal with its controls, from the run records.

    The baseline is the transformer, or the first arm of a study without one. `not_compared` lists the pairs that the
    records do not allow to compare, with the reason.
    """
    from qies.scaling import compare, read_runs

    arms = study.config.arms
    base = BASELINE if BASELINE in arms else arms[0]
    wanted = [(arm, base) for arm in arms if arm != base]
    wanted += [(PROPOSAL, arm) for arm in CONTROLS if PROPOSAL in arms and arm in arms and arm != base]
    pairs, refused = [], []
    for candidate, baseline in wanted:
        try:
            pairs.append(compare(read_runs(study.folder / "runs"), candidate, baseline).to_dict())
        except UserError as error:
            refused.append({"candidate": candidate, "baseline": baseline, "reason": str(error).rstrip(".")})
    return {"schema": 1, "pairs": pairs, "not_compared": refused}


def gain_chart(study: Study) -> Chart | None:
    """The compute gain of every pair, for the first screen."""
    pairs = [pair for pair in study.pairs if pair["gain"]["curves"].get("compute")]
    return Chart(gain_figure(pairs, "compute"), _curve(pairs, "compute")) if pairs else None


def section(result: dict[str, Any], study: Study) -> Section | None:
    """Gains, frontiers and paired differences of the pairs."""
    pairs = study.pairs
    if not pairs:
        return None
    text = [
        "Gain: the FLOPs (or parameters, tokens, seconds) that the second arm needs for the loss of the first, divided "
        "by those of the first; above 1 the first arm needs less. Bands and ranges in parentheses are 95% CIs; lines "
        "are faint where a law is extrapolated. The chart of the compute gain is at the top of the page.",
        *_summaries(pairs),
    ]
    blocks: list[Table | Chart | Passage] = [_largest(pairs)]
    if any(pair["gain"]["curves"].get("time") for pair in pairs):
        blocks.append(Chart(gain_figure(pairs, "time"), _curve(pairs, "time")))
    if any(pair["frontier"] for pair in pairs):
        blocks.append(Chart(frontier_figure(pairs), _frontier(pairs)))
    if any(pair["paired"] for pair in pairs):
        blocks.append(Chart(paired_figure(pairs), _paired(pairs)))
    blocks += [table for table in (_power(pairs), _shared(pairs), _crossings(pairs)) if table.rows]
    return Section("Gains between arms", text, blocks)


def _summaries(pairs: Sequence[Pair]) -> list[str]:
    """The summary of each pair; sentences that all pairs share come once, at the end."""
    said = [pair["summary"].rstrip(".").split(". ") for pair in pairs]
    common = [s for s in said[0] if len(pairs) > 1 and all(s in other for other in said)]
    out = [
        f"{pair_name(pair)}. {'. '.join(s for s in own if s not in common)}."
        for pair, own in zip(pairs, said, strict=True)
    ]
    return [*out, *([f"For all pairs: {'. '.join(common)}."] if common else [])]


def _ci(value: Any, lo: Any, hi: Any, places: str = ".3g") -> str:
    return estimate(value, lo, hi, places, level=None)


def _largest(pairs: Sequence[Pair]) -> Table:
    rows = []
    for pair in pairs:
        row = [pair_name(pair)]
        for kind, (key, _, _) in GAINS.items():
            curve = pair["gain"]["curves"].get(kind)
            last = curve[-1] if curve else None
            row.append(NONE if last is None else f"{_ci(last['gain'], last['lo'], last['hi'])} at {si(last[key])}")
        rows.append(row)
    columns = ["pair", *(f"gain in {unit}" for _, _, unit in GAINS.values())]
    return Table("Gains at the largest scale of both arms", columns, rows)


def _curve(pairs: Sequence[Pair], kind: str) -> Table:
    key, x_title, unit = GAINS[kind]
    rows = [
        [pair_name(pair), si(p[key]), _ci(p["gain"], p["lo"], p["hi"]), f"{p['reach']:.2f}"]
        for pair in pairs
        for p in listed(pair["gain"]["curves"].get(kind))
    ]
    columns = ["pair", x_title, f"gain in {unit}", "extrapolation factor"]
    return Table(f"Gain in {unit}", columns, rows, folded=True)


def _frontier(pairs: Sequence[Pair]) -> Table:
    curves = {arm: curve for pair in reversed(pairs) for arm, curve in pair["frontier"].items()}
    rows = [
        [arm, si(p["compute"]), _ci(p["loss"], p["lo"], p["hi"], ".4f"), si(p["params"]), si(p["tokens"]),
         f"{p['reach']:.2f}"]
        for arm, curve in curves.items() for p in curve
    ]  # fmt: skip
    columns = ["arm", "FLOPs", "lowest loss (nats per token)", "at parameters", "at tokens", "extrapolation factor"]
    return Table("Lowest loss at each compute", columns, rows, folded=True)


def _paired(pairs: Sequence[Pair]) -> Table:
    rows = [
        [pair_name(pair, "minus"), si(r["params"]), si(r["tokens"]),
         _ci(r["difference"], r["lo"], r["hi"], "+.4f"),
         NONE if r["p"] is None else f"{r['p']:.2g}", str(r["n"]), r["test"]]
        for pair in pairs for r in pair["paired"]
    ]  # fmt: skip
    columns = ["pair", "N", "D", "difference (nats per token)", "p", "seeds", "test"]
    return Table("Differences at matched size and tokens", columns, rows, folded=True)


def _power(pairs: Sequence[Pair]) -> Table:
    """The runs that a study needs to detect a difference as large as the observed one."""
    rows = []
    for pair in pairs:
        power = mapping(pair["power"])
        if power:
            best = mapping(power["best"])
            cells = "over 1,000" if power["cells_needed"] is None else str(power["cells_needed"])
            seeds = f"{best['need']} (has {best['have']}) at N = {si(best['params'])}" if best else "over 1,000"
            rows.append([pair_name(pair), si(power["detectable"]), f"{cells} (has {power['cells']})", seeds])
    columns = ["pair", "detectable gain", "matched sizes and budgets for the gain observed", "or seeds per arm"]
    return Table("Runs needed to detect the observed gain (80% power)", columns, rows)


def _shared(pairs: Sequence[Pair]) -> Table:
    rows = [
        [pair_name(pair), ", ".join(fit["shared"]), f"F({fit['restrictions']}, {fit['dof']}) = {fit['statistic']:.3g}",
         f"{fit['p']:.2g}"]
        for pair in pairs if (fit := mapping(pair["shared_fit"])) and number(fit["p"]) is not None
    ]  # fmt: skip
    return Table("Tests of equal parameters of the laws", ["pair", "shared", "test", "p"], rows)


def _crossings(pairs: Sequence[Pair]) -> Table:
    rows = [
        [pair_name(pair), si(c["compute"]), f"{si(c['lo'])} to {si(c['hi'])}", c["lower_beyond"], f"{c['reach']:.2f}"]
        for pair in pairs
        for c in pair["crossings"]
    ]
    columns = ["pair", "FLOPs", "range without significant difference", "lower beyond", "extrapolation factor"]
    return Table("Where the laws cross", columns, rows)
