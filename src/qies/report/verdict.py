"""Findings below the answer, in sentences, each supported by the records."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any

from qies.analyses.formatting import count, number, sentence
from qies.analyses.induction import copying
from qies.analyses.records import BASELINE, Cell, Study, listed, mapping
from qies.scaling.comparison.copying import before_onset
from qies.scaling.figures import INSIDE


def verdict(study: Study, answered: bool = False) -> list[str]:
    """The lowest loss at the largest size, and the verdict of comparison.json on each pair of arms, without the main
    one where it is answered; without comparisons, each arm's differences to the baseline and what seeds support."""
    if not study.done:
        states = Counter(run.status for run in study.runs)
        counts = ", ".join(f"{n} {status}" for status, n in states.items())
        return [f"No run has finished with a result ({counts}), so there is nothing to compare."]
    compared = [cell for cell in study.cells if sum(bool(study.of(arm, cell)) for arm in study.arms) > 1]
    if not compared:
        return ["No size has finished in more than one arm, so there is nothing to compare yet."]
    said = [_largest(study, compared[-1])]
    refused = [mapping(m) for m in listed(study.part("comparison").get("not_compared"))]
    said += [f"Not compared: {m.get('candidate')} with {m.get('baseline')} ({m.get('reason')})." for m in refused]
    if study.pairs:
        others = [pair for pair in study.pairs if not (answered and pair is study.main_pair)]
        return [*said, *(_pair(study, pair) for pair in others), *_warnings(study.pairs)]
    if BASELINE in study.arms:
        said += [_against_baseline(study, arm, compared) for arm in study.arms if arm != BASELINE]
    else:
        said.append(f"There is no {BASELINE} arm, so no arm is compared with the standard baseline.")
    return [*said, _seeds(study, compared)]


def _pair(study: Study, pair: dict[str, Any]) -> str:
    """The verdict of a stored comparison with its reason, how far it extrapolates, and whether copying had set in."""
    last = mapping(mapping(pair.get("gain")).get("at_largest"))
    reach = number(last.get("reach")) or 1.0
    far = f" (a law is extrapolated {reach:.2g} times beyond its runs there)" if reach > INSIDE else ""
    arms = (pair["candidate"], pair["baseline"])
    cells = study.shared_cells(arms)
    before = before_onset(copying(study, arm, cells[-1]) for arm in arms) if cells else ""
    limit = f", but {before}" if before and before not in pair["reason"] else ""
    return f"{pair['candidate']} against {pair['baseline']}: {pair['verdict']}; {pair['reason']}{far}{limit}."


def _warnings(pairs: list[dict[str, Any]]) -> list[str]:
    """The warnings of the comparisons, each once."""
    return [sentence(w) for w in dict.fromkeys(str(w) for pair in pairs for w in listed(pair.get("warnings")))]


def _largest(study: Study, cell: Cell) -> str:
    losses = {arm: mean for arm in study.arms if (mean := study.mean(arm, cell)) is not None}
    first, second, *_ = sorted(losses, key=losses.__getitem__)
    bits = study.mean(first, cell, "bits_per_byte")
    loss = f"{losses[first]:.4f} nats per token" + ("" if bits is None else f" ({bits:.4f} bits per byte)")
    where = f"At {study.label(cell)}, the largest size to compare ({count(cell.tokens)} tokens per run),"
    gap = losses[second] - losses[first]
    if gap < 5e-5:
        return f"{where} {first} and {second} have the same validation loss to four digits: {loss}."
    share = 100 * gap / losses[second]
    return f"{where} {first} has the lowest validation loss: {loss}, {gap:.4f} nats ({share:.2f}%) below {second}."


def _against_baseline(study: Study, arm: str, cells: list[Cell]) -> str:
    means = {cell: fmean(d) for cell in cells if (d := study.differences(arm, BASELINE, cell))}
    if not means:
        return f"{arm} and {BASELINE} have no finished size and seed in common."
    lower, sizes = sum(d < 0 for d in means.values()), "size" if len(means) == 1 else "sizes"
    values = ", ".join(f"{d:+.4f} at {study.label(cell)}" for cell, d in means.items())
    return f"{arm} minus {BASELINE}, nats per token: {values}; lower at {lower} of {len(means)} {sizes}."


def _seeds(study: Study, cells: list[Cell]) -> str:
    seeds = max(len(study.of(arm, cell)) for arm in study.arms for cell in cells)
    if seeds == 1:
        return (
            "Every arm and size has one seed: the spread from seed to seed is unknown, so no difference can be called "
            "significant."
        )
    others = [arm for arm in study.arms if arm != study.base]
    pairs = [(a, c, d) for a in others for c in cells if len(d := study.differences(a, study.base, c)) > 1]
    if not pairs:
        return f"No arm shares more than one seed with {study.base} at any size, so seed noise cannot be judged."
    same = sum(min(d) > 0 or max(d) < 0 for _, _, d in pairs)
    arm, cell, widest = max(pairs, key=lambda pair: max(pair[2]) - min(pair[2]))
    return (
        f"With up to {seeds} seeds, the difference to {study.base} has the same sign in every seed in {same} of "
        f"{len(pairs)} cells; it varies most for {arm} at {study.label(cell)} ({min(widest):+.4f} to "
        f"{max(widest):+.4f}). There is no significance test."
    )
