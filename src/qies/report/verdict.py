"""What the records say, in plain sentences that claim no more than the records hold."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from qies.report.records import BASELINE, Cell, Study, listed, mapping
from qies.report.text import count, number


def verdict(study: Study) -> list[str]:
    """Sentences for the head of the page: the lowest loss at the largest size, each arm against the baseline, and
    how far seeds and fitted exponents support a claim."""
    if not study.done:
        states = Counter(run.status for run in study.runs)
        counts = ", ".join(f"{n} {status}" for status, n in states.items())
        return [f"No run has finished with a result ({counts}), so there is nothing to compare."]
    compared = [cell for cell in study.cells if sum(bool(study.of(arm, cell)) for arm in study.arms) > 1]
    if not compared:
        return ["No size has finished in more than one arm, so there is nothing to compare yet."]
    said = [_largest(study, compared[-1])]
    if BASELINE in study.arms:
        said += [_against_baseline(study, arm, compared) for arm in study.arms if arm != BASELINE]
    else:
        said.append(f"There is no {BASELINE} arm, so nothing is said about the standard baseline.")
    return [*said, _seeds(study, compared), *_exponents(study)]


def _largest(study: Study, cell: Cell) -> str:
    losses = {arm: mean for arm in study.arms if (mean := study.mean(arm, cell)) is not None}
    first, second, *_ = sorted(losses, key=losses.__getitem__)
    bits = study.mean(first, cell, "bits_per_byte")
    loss = f"{losses[first]:.4f} nats per token" + ("" if bits is None else f" ({bits:.4f} bits per byte)")
    where = f"At {study.label(cell)}, the largest size to compare ({count(cell.tokens)} tokens a run),"
    gap = losses[second] - losses[first]
    if gap < 5e-5:
        return f"{where} {first} and {second} have the same validation loss to four digits: {loss}."
    share = 100 * gap / losses[second]
    return f"{where} {first} has the lowest validation loss: {loss}, {gap:.4f} nats ({share:.2f} %) below {second}."


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
            "Every arm and size ran with one seed: how much the loss moves from seed to seed is unknown here, so no "
            "difference is shown to be more than chance."
        )
    others = [arm for arm in study.arms if arm != study.base]
    pairs = [(a, c, d) for a in others for c in cells if len(d := study.differences(a, study.base, c)) > 1]
    if not pairs:
        return f"No arm shares more than one seed with {study.base} at any size, so seed noise cannot be judged."
    same = sum(min(d) > 0 or max(d) < 0 for _, _, d in pairs)
    arm, cell, widest = max(pairs, key=lambda pair: max(pair[2]) - min(pair[2]))
    return (
        f"With up to {seeds} seeds, the difference to {study.base} has the same sign in every seed in {same} of "
        f"{len(pairs)} cases; it moves most for {arm} at {study.label(cell)} ({min(widest):+.4f} to "
        f"{max(widest):+.4f}). No significance test is made."
    )


def _exponents(study: Study) -> list[str]:
    """One sentence on whether the arms' exponents in parameters differ."""
    found = {}
    for arm in study.arms:
        fit = study.fit(arm, "params")
        values = [mapping(fit.get("params")).get("alpha"), *listed(mapping(fit.get("ci")).get("alpha"))]
        alpha = [n for value in values if (n := number(value)) is not None]
        if len(alpha) == 3:
            found[arm] = alpha
    if len(found) < 2:
        return []
    overlap = max(low for _, low, _ in found.values()) <= min(high for _, _, high in found.values())
    exponents = ", ".join(f"{a:.3f} ({low:.3f} to {high:.3f}) for {arm}" for arm, (a, low, high) in found.items())
    ending = "all overlap, so the fits do not show that the arms scale differently" if overlap else "do not all overlap"
    return [f"Exponents of the loss in parameters, with 95 % intervals: {exponents}. The intervals {ending}."]
